"""Blocks in this process: the same reduction as on a cluster, as a plain loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from gendist.blocks.leaves import Leaves, leaves_per_run

Result = TypeVar("Result")


@contextmanager
def one_thread() -> Iterator[None]:
    """Kernels with one intra-op thread: with two, a matrix product adds in another order and gives other bytes."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


class LocalBlocks:
    """load(bounds) returns the leaves between these row numbers; each run is loaded once and kept."""

    def __init__(self, load: Callable[[Sequence[int]], list[Any]], leaves: Leaves, max_leaves_per_run: int = 1 << 30):
        self._load = load
        self._runs = leaves.runs(leaves_per_run(leaves.num_leaves, 1, max_leaves_per_run))
        self._loaded: dict[int, list[Any]] = {}

    def map_runs(self, function: Callable[[Any, Sequence[Any]], Result], broadcast: Any) -> Iterator[Result]:
        for index, bounds in enumerate(self._runs):
            if index not in self._loaded:
                self._loaded[index] = self._load(bounds)
            with one_thread():
                result = function(broadcast, self._loaded[index])
            yield result
