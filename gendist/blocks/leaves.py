"""Where a data set is cut: leaves, which never change, and runs of leaves, which are the work of one task.

A leaf is some consecutive rows, as many as depends only on the shape of the data. A run is some consecutive leaves. Results
depend on the leaves alone; runs are chosen for speed.

Legend: S sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np

Leaf = TypeVar("Leaf")

MIN_LEAF_ROWS = 64
MAX_LEAF_ROWS = 16_384
MAX_SPARSE_LEAF_ROWS = 16_384
LEAF_ENTRIES = 524_288  # four megabytes of float64: few enough leaves, and many enough; kernels take some rows of one at a time
NUM_LEAVES_OF_SMALL_DATA = 32  # so that small data still spread over workers

# A kernel takes a step of many sequences at a time: leaves of sequences are few and large.
MIN_SEQUENCE_LEAF_ROWS = 32_768  # a step of few sequences costs as much as one of many
MAX_SEQUENCE_LEAF_ROWS = 131_072
NUM_SEQUENCE_LEAVES_OF_SMALL_DATA = 8

Bounds = np.ndarray[Any, np.dtype[np.int64]]


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

    @classmethod
    def of_sequences(cls, bounds: Bounds, num_features: int, cut: bool = True) -> Leaves:
        """Leaves of whole sequences, one after the other; a sequence that is longer than a leaf is cut into equal pieces, each
        a leaf of its own. A function of these numbers alone.

        bounds  (S + 1,) rows bounds[s] up to but not including bounds[s + 1] are the steps of sequence s, which may be none
        cut     False: a long sequence is a leaf, however long it is

        Empty sequences belong to the leaf that ends where they stand, at row 0 to the first. Where that is a piece, there is a
        leaf without rows for them.
        """
        most = sequence_leaf_rows(int(bounds[-1]), num_features)
        if not cut:
            return cls(tuple(dict.fromkeys(bounds[pack(bounds, most)].tolist())))
        rows: list[int] = [0]
        begin, is_after_pieces = 0, False
        for end in [*np.flatnonzero(np.diff(bounds) > most).tolist(), len(bounds) - 1]:
            own = bounds[begin : end + 1]  # of the sequences between two that are cut
            if len(own) > 1:
                if own[-1] == own[0] or (is_after_pieces and own[1] == own[0]):
                    rows.append(int(own[0]))
                rows += [row for row in bounds[begin + pack(own, most)].tolist() if row > rows[-1]]
            if end < len(bounds) - 1:
                start, length = int(bounds[end]), int(bounds[end + 1] - bounds[end])
                num_pieces = -(-length // most)
                rows += [start + length * (i + 1) // num_pieces for i in range(num_pieces)]
            begin, is_after_pieces = end + 1, True
        return cls(tuple(rows))

    @property
    def num_leaves(self) -> int:
        return len(self.bounds) - 1

    @property
    def max_leaf_rows(self) -> int:
        """Of the largest leaf."""
        return max(stop - start for start, stop in pairwise(self.bounds))

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


def sequence_leaf_rows(num_rows: int, num_features: int) -> int:
    """As many rows as a leaf of sequences may have."""
    few = max(-(-num_rows // NUM_SEQUENCE_LEAVES_OF_SMALL_DATA), MIN_SEQUENCE_LEAF_ROWS)
    return max(1, min(2 * LEAF_ENTRIES // max(num_features, 1), MAX_SEQUENCE_LEAF_ROWS, few))


def pack(bounds: Bounds, most: int) -> Bounds:
    """From sequence cuts[i] up to but not including cuts[i + 1] are together: as many as have up to `most` rows, or one that
    has more."""
    cuts, num_sequences = [0], len(bounds) - 1
    while cuts[-1] < num_sequences:
        end = int(np.searchsorted(bounds, bounds[cuts[-1]] + most, side="right")) - 1
        cuts.append(max(end, cuts[-1] + 1))
    return np.array(cuts, dtype=np.int64)


class Run(list[Leaf]):
    """Consecutive leaves; `first` is the number of the first one."""

    def __init__(self, leaves: Sequence[Leaf], first: int):
        super().__init__(leaves)
        self.first = first
