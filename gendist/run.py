"""What a fit leaves, and how it may be watched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Watch = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Run:
    """
    model    the fitted model, a `FittedModel`, which takes and makes rows as the data have them
    history  the records of metrics.jsonl that led to the model: one dict an iteration, or every few steps
    path     the run directory, which may be a URL, or None where none was asked for
    results  the manifest's: why it stopped and how good the fitted model is; of EM every repair, and how each restart ended
    """

    model: Any = field(repr=False)
    history: list[dict[str, Any]] = field(repr=False)
    path: Path | str | None
    results: dict[str, Any]

    @property
    def aic(self) -> float:
        """Akaike's information criterion of the fitted rows; the lower is the better."""
        return self._criterion("aic")

    @property
    def bic(self) -> float:
        """Bayesian information criterion of the fitted rows; the lower is the better."""
        return self._criterion("bic")

    def _criterion(self, name: str) -> float:
        if name not in self.results:
            raise AttributeError(f"{name} is not offered: it is of models with a log-likelihood alone; compare run.results")
        return float(self.results[name])

    def save(self, path: str | Path) -> None:
        """Write the model to a folder that `gendist.load` and the command line take. UserError where something stands there."""
        self.model.save(path)
