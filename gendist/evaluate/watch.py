"""Samples of a model in training beside rows of the data, so that what goes wrong is said while it can be mended.

Legend: N rows, and as many samples; D features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from gendist.evaluate.coverage import likeness
from gendist.protocols import Block

MAX_ROWS = 1000  # that are looked at
MAX_ENTRIES = 1 << 24  # of these: 128 MiB in float64
NUM_NEIGHBOURS = 5
SAMPLES_AT_ONCE = 256
# Below, samples are taken to be of next to no variety: of recall, too, since blurred ones in the middle of the data are near to
# much of it.
MIN_COVERAGE = 0.05
MIN_RECALL = 0.05

ADVICE = (
    "the generator makes next to one thing, or nothing that is like the data yet; if it does not rise by the next evaluation, "
    "look at the pictures, and try a lower learning rate, a penalty of the discriminator, or more augmentation"
)


class Rows(Protocol):
    @property
    def num_rows(self) -> int: ...

    def take(self, indices: Tensor) -> Block: ...


def watch_samples(
    model: Any, rows: Rows, seed: int, record: Mapping[str, Any], alive: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """For the record of training: samples/precision, recall, density and coverage (`Likeness`) of the first samples of the seed
    and as many rows, at most MAX_ROWS, spread evenly over all; and `warnings`, lines on what goes wrong, where something does.

    model   which may have a method advice(record): what it has to say itself
    record  of the steps before
    alive   called now and then
    """
    found: dict[str, Any] = {}
    warnings = list(model.advice(record)) if hasattr(model, "advice") else []
    size = min(MAX_ROWS, MAX_ENTRIES // model.num_features, rows.num_rows)
    if size > NUM_NEIGHBOURS:
        block = rows.take(torch.arange(size) * rows.num_rows // size)
        data_ND = block.x if block.weights is None else block.x[block.weights > 0]
        size = len(data_ND)
    if size > NUM_NEIGHBOURS:
        parts = []
        for start in range(0, size, SAMPLES_AT_ONCE):
            parts.append(model.sample(min(SAMPLES_AT_ONCE, size - start), seed=seed, offset=start))
            alive()
        samples_ND = torch.cat(parts)
        if bool(samples_ND.isfinite().all()):
            seen = likeness(data_ND, samples_ND, NUM_NEIGHBOURS)
            found = {f"samples/{name}": value for name, value in vars(seen).items()}
            if seen.coverage < MIN_COVERAGE or seen.recall < MIN_RECALL:
                measured = f"samples/coverage {seen.coverage:.1%}, samples/recall {seen.recall:.1%}"
                warnings.append(f"samples cover little of the data ({measured}): {ADVICE}")
    return found | ({"warnings": warnings} if warnings else {})
