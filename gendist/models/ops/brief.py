"""What `repr` says of a fitted model, of whatever family: a line without its tensors."""

from __future__ import annotations

from typing import Any

NUMBERS = ("num_classes", "num_components", "num_states", "latent_dim", "num_features")


def brief(model: Any) -> str:
    """Such as GaussianMixture(num_components=8, num_features=16)."""
    numbers = {name: getattr(model, name, getattr(model.config, name, None)) for name in NUMBERS}
    numbers["num_labels"] = len(model.labels) or None
    said = ", ".join(f"{name}={number}" for name, number in numbers.items() if number is not None)
    return f"{type(model).__name__}({said})"
