"""Where a data set is cut: leaves, which never change, and runs of leaves, which are the work of one task.

A leaf is a run of consecutive rows whose size depends only on the shape of the data. A run is 2^m leaves that begin at a
multiple of 2^m. Results depend on the leaves alone; m is chosen for speed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MIN_LEAF_ROWS = 64
MAX_LEAF_ROWS = 16_384
LEAF_ENTRIES = 131_072  # a megabyte of float64: a leaf and its responsibilities stay in the processor's cache
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

    @property
    def num_leaves(self) -> int:
        return len(self.bounds) - 1

    def runs(self, leaves_per_run: int) -> list[Sequence[int]]:
        """The bounds of each run's leaves: leaves_per_run + 1 row numbers, fewer in the last."""
        assert leaves_per_run & (leaves_per_run - 1) == 0, "runs of a power of two keep the tree the same"
        return [self.bounds[i : i + leaves_per_run + 1] for i in range(0, self.num_leaves, leaves_per_run)]


def leaves_per_run(num_leaves: int, num_workers: int, most: int) -> int:
    """The largest power of two, up to `most`, that keeps the workers about evenly busy.

    Few, fat tasks cost the least; a run is split further only while the busiest worker would have over 15 % more to do
    than an even share, and no further than 64 tasks a worker.
    """
    size = 1 << max(num_leaves - 1, 0).bit_length()
    while size > 1:
        num_runs = -(-num_leaves // size)
        busiest = min(-(-num_runs // num_workers) * size, num_leaves)
        even = busiest * num_workers <= 1.15 * num_leaves
        if size <= most and (even or num_runs >= 64 * num_workers):
            break
        size //= 2
    return size
