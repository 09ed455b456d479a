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
    model    the fitted model; a `Transformed` behind `data.transforms`, so that it takes and makes rows as the data have them
    history  the records of metrics.jsonl that led to the model: one dict an iteration, or every few steps
    path     the run directory, which may be a URL, or None where none was asked for
    results  the manifest's: why it stopped and how good the fitted model is; of EM every repair, and how each restart ended
    """

    model: Any = field(repr=False)
    history: list[dict[str, Any]] = field(repr=False)
    path: Path | str | None
    results: dict[str, Any]
