"""Where a data set is cut: leaves, which never change, and runs of leaves, which are the work of one task.

A leaf is some consecutive rows, as many as depends only on the shape of the data. A run is some consecutive leaves. Results
depend on the leaves alone; runs are chosen for speed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

Leaf = TypeVar("Leaf")

MIN_LEAF_ROWS = 64
MAX_LEAF_ROWS = 16_384
MAX_SPARSE_LEAF_ROWS = 16_384
LEAF_ENTRIES = 524_288  # four megabytes of float64: few enough leaves, and many enough; kernels take some rows of one at a time
NUM_LEAVES_OF_SMALL_DATA = 32  # so that small data still spread over workers


@dataclass(frozen=True)
class Leaves:
    """bounds: row numbers; leaf i is the rows bounds[i] up to but not including bounds[i + 1]."""

    bounds: Sequence[int]

    @classmethod
    def of_shape(cls, num_rows: int, num_features: int) -> Leaves:
        """Leaves of equal size, a power of two that depends only on the shape of the data."""
        most = min(LEAF_ENTRIES // max(num_features, 1), num_rows // NUM_LEAVES_OF_SMALL_DATA, MAX_LEAF_ROWS)
        leaf_rows = 1 << max(most, MIN_LEAF_ROWS).bit_length() - 1
        return cls((*range(0, num_rows, leaf_rows), num_rows))

    @classmethod
    def of_sparse_rows(cls, num_rows: int) -> Leaves:
        """Of data whose rows hold few entries, however many features there are."""
        return cls.of_shape(num_rows, LEAF_ENTRIES // MAX_SPARSE_LEAF_ROWS)

    @property
    def num_leaves(self) -> int:
        return len(self.bounds) - 1

    def runs(self, num_workers: int, most: int) -> list[range]:
        """The numbers of each run's leaves, up to `most` of them: as many runs for each worker, all of about one size.

        Few, fat tasks cost the least.
        """
        rounds = -(-self.num_leaves // (num_workers * most))
        num_runs = min(rounds * num_workers, self.num_leaves)
        return [range(start, stop) for start, stop in pairwise(self.num_leaves * i // num_runs for i in range(num_runs + 1))]

    def bounds_of(self, run: range) -> Sequence[int]:
        """Where a run's leaves begin, and where the last ends: len(run) + 1 row numbers."""
        return self.bounds[run.start : run.stop + 1]


class Run(list[Leaf]):
    """Consecutive leaves; `first` is the number of the first one."""

    def __init__(self, leaves: Sequence[Leaf], first: int):
        super().__init__(leaves)
        self.first = first
