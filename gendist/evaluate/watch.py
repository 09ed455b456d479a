"""Samples of a model in training beside rows of the data, so that what goes wrong is said while it can be mended.

Legend: N rows, and as many samples; D features, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from gendist.evaluate.coverage import likeness
from gendist.noise import Noise
from gendist.protocols import Block, SampleAddress

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
NOT_FINITE = "the generator has diverged: go back to a checkpoint before, with a lower learning rate or a clipped gradient"


class Rows(Protocol):
    """weights  (num_rows,) an array, or None: each weighs 1"""

    @property
    def num_rows(self) -> int: ...

    @property
    def weights(self) -> Any: ...

    def take(self, indices: Tensor) -> Block: ...


def watch_samples(
    model: Any, rows: Rows, seed: int, record: Mapping[str, Any], alive: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """For the record of training: samples/precision, recall, density and coverage (`Likeness`) of the first samples of the seed
    and as many rows, at most MAX_ROWS; and `warnings`, lines on what goes wrong, where something does.

    Both are of the distribution that is learned: rows are spread evenly over the total weight, so that each comes up in
    proportion to its own, though no more than once; and a model that is given a class makes samples of those of the rows.

    model   which may have a method advice(record): what it has to say itself
    record  of the steps before
    alive   called now and then
    """
    found: dict[str, Any] = {}
    warnings = list(model.advice(record)) if hasattr(model, "advice") else []
    places = _spread(rows, min(MAX_ROWS, MAX_ENTRIES // model.num_features, rows.num_rows))
    if len(places) > NUM_NEIGHBOURS:
        block = rows.take(places)
        parts: list[Tensor] = []
        for addresses in _addresses(model, block, seed):
            parts += _sampled(model, addresses)
            alive()
        samples_ND = torch.cat(parts)
        num_finite = int(samples_ND.flatten(1).isfinite().all(1).sum())
        if num_finite < len(samples_ND):
            warnings.append(f"{len(samples_ND) - num_finite} of {len(samples_ND)} samples are not finite: {NOT_FINITE}")
        else:
            seen = likeness(block.x, samples_ND, NUM_NEIGHBOURS)
            found = {f"samples/{name}": value for name, value in vars(seen).items()}
            if seen.coverage < MIN_COVERAGE:
                warnings.append(f"samples cover little of the data (samples/coverage {seen.coverage:.1%}): {ADVICE}")
            elif seen.recall < MIN_RECALL:
                warnings.append(f"little of the data lies among the samples (samples/recall {seen.recall:.1%}): {ADVICE}")
    return found | ({"warnings": warnings} if warnings else {})


def _spread(rows: Rows, size: int) -> Tensor:
    """(N,) int64, ascending: the places of `size` rows at equal steps of the cumulative weight; of fewer where some weigh more
    than a step, and would come up again."""
    if rows.weights is None:
        return torch.arange(size) * rows.num_rows // size
    cumulative = np.cumsum(rows.weights, dtype=np.float64)
    steps = np.arange(size) * cumulative[-1] / size
    return torch.from_numpy(np.unique(cumulative.searchsorted(steps, side="right")))


def _addresses(model: Any, block: Block, seed: int) -> Iterator[list[SampleAddress]]:
    """Of as many samples as rows, some at a time: where the model is given a class, as many of each as rows have it. A soft
    label is one of its classes, drawn as the seed has it."""
    labels: tuple[Any, ...] = (None,)
    class_N = torch.zeros(block.num_rows, dtype=torch.int64)
    if block.evidence is not None and getattr(model, "conditions", model.labels):
        labels = model.labels
        uniform_N1 = Noise(seed, "watch.class").uniform(0, block.num_rows)
        class_N = (block.evidence.softmax(1).cumsum(1)[:, :-1] <= uniform_N1).sum(1).sort().values
    for start in range(0, block.num_rows, SAMPLES_AT_ONCE):
        classes, counts = class_N[start : start + SAMPLES_AT_ONCE].unique_consecutive(return_counts=True)
        offsets = start + counts.cumsum(0) - counts
        runs = zip(classes.tolist(), counts.tolist(), offsets.tolist(), strict=True)
        yield [SampleAddress(number, seed, offset, labels[c]) for c, number, offset in runs]


def _sampled(model: Any, addresses: list[SampleAddress]) -> list[Tensor]:
    if hasattr(model, "sample_together"):
        together: list[Tensor] = model.sample_together(addresses)
        return together
    return [model.sample(each.num_samples, seed=each.seed, offset=each.offset, given=each.given) for each in addresses]
