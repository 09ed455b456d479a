"""Blocks in this process: the same reduction as on a cluster, as a plain loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from gendist.blocks.leaves import Leaves, Run
from gendist.one_thread import one_thread

Result = TypeVar("Result")


class LocalBlocks:
    """load(bounds) returns the leaves between these row numbers, run by run.

    keep   whether to hold on to what was loaded, for the next pass
    """

    def __init__(
        self,
        load: Callable[[Sequence[int]], list[Any]],
        leaves: Leaves,
        max_leaves_per_run: int = 1 << 30,
        keep: bool = True,
    ):
        self._load = load
        self._leaves = leaves
        self._runs = leaves.runs(1, max_leaves_per_run)
        self._keep = keep
        self._loaded: dict[int, list[Any]] = {}

    def map_runs(self, function: Callable[[Any, Run[Any]], Result], broadcast: Any) -> Iterator[Result]:
        for index, run in enumerate(self._runs):
            leaves = self._loaded.get(index) or self._load(self._leaves.bounds_of(run))
            if self._keep:
                self._loaded[index] = leaves
            with one_thread():
                result = function(broadcast, Run(leaves, run.start))
            del leaves  # before the next run is read
            yield result
