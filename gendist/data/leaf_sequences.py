"""Which sequences a leaf holds, whole or a piece of one, and which of them belong to a part of the data.

Legend: N rows, S sequences.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, eq=False)
class LeafSequences:
    """
    numbers    (S,) of the sequences, ascending
    bounds     (S + 1,) offsets into the leaf's rows, from 0 to N
    open_ends  how many rows of the first lie in earlier leaves, and how many of the last in later ones
    """

    numbers: Array
    bounds: Array
    open_ends: tuple[int, int] = (0, 0)

    @classmethod
    def whole(cls, bounds: Array, first: int, last: int) -> LeafSequences:
        """Sequences first up to but not including last. bounds: of all sequences."""
        return cls(np.arange(first, last), bounds[first : last + 1] - bounds[first])

    @classmethod
    def of_rows(cls, bounds: Array, start: int, stop: int) -> LeafSequences:
        """Those of the leaf with these rows, of `Leaves.of_sequences(bounds, ...)`."""
        if start == stop:  # the empty ones that stand here
            begin, end = np.searchsorted(bounds[:-1], start, side="left"), np.searchsorted(bounds[1:], start, side="right")
            return cls.whole(bounds, int(begin), int(end))
        first = int(np.searchsorted(bounds, start, side="right")) - 1
        beyond = (max(0, start - int(bounds[first])), max(0, int(bounds[first + 1]) - stop))
        if any(beyond):
            return cls(np.array([first]), np.array([0, stop - start]), beyond)
        return cls.whole(bounds, first if start else 0, int(np.searchsorted(bounds[1:], stop, side="right")))

    def row_flags(self, keep_S: Array) -> Array:
        """(N,) bool: whether a row's sequence is kept."""
        return np.repeat(keep_S, np.diff(self.bounds))

    def kept(self, keep_S: Array) -> LeafSequences:
        """Some of the sequences."""
        lengths = np.diff(self.bounds)[keep_S]
        ends = self.open_ends if bool(keep_S.any()) else (0, 0)
        return LeafSequences(self.numbers[keep_S], np.concatenate([[0], np.cumsum(lengths)]), ends)
