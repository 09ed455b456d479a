"""Sequences of any lengths side by side, step by step, without padding, so that a step of all of them is one matrix product.

The longest sequence comes first. All first steps stand together, then all second steps, and so on: the sequences that have
a step t are the first ones, whatever t is.

Legend: N steps of all sequences, S sequences that have any, T steps of the longest.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Packing:
    """
    order     (S,) which sequence stands at each place; those without steps have none
    lengths   (S,) of the sequences, in this order: descending
    rows      (N,) the row that each packed step comes from
    sizes     how many sequences have a step 0, 1, ... T - 1
    """

    order: Tensor
    lengths: Tensor
    rows: Tensor
    sizes: list[int]

    @classmethod
    def of(cls, first_rows_S: Tensor, lengths_S: Tensor) -> Packing:
        """Of sequences that begin at these rows."""
        order = torch.argsort(lengths_S, descending=True, stable=True)
        order = order[: int((lengths_S > 0).sum())]
        lengths = lengths_S[order]
        if len(order) == 0:
            return cls(order, lengths, torch.empty(0, dtype=torch.int64), [])
        # As many sequences have a step t as are longer than t.
        num_ending = torch.bincount(lengths, minlength=int(lengths[0]) + 1)
        sizes_T = len(order) - num_ending.cumsum(0)[:-1]
        starts_T = sizes_T.cumsum(0) - sizes_T
        place_N = torch.arange(int(sizes_T.sum())) - starts_T.repeat_interleave(sizes_T)
        step_N = torch.arange(len(sizes_T)).repeat_interleave(sizes_T)
        return cls(order, lengths, first_rows_S[order][place_N] + step_N, sizes_T.tolist())

    @property
    def num_sequences(self) -> int:
        return len(self.order)

    @property
    def num_steps(self) -> int:
        return len(self.rows)

    @cached_property
    def _starts(self) -> Tensor:
        sizes_T = torch.tensor(self.sizes, dtype=torch.int64)
        return sizes_T.cumsum(0) - sizes_T

    @cached_property
    def places(self) -> Tensor:
        """(N,) the place of the sequence that each packed step belongs to."""
        sizes_T = torch.tensor(self.sizes, dtype=torch.int64)
        return torch.arange(self.num_steps) - self._starts.repeat_interleave(sizes_T)

    @cached_property
    def last(self) -> Tensor:
        """(S,) the packed step that is the last of each sequence."""
        return self._starts[self.lengths - 1] + torch.arange(self.num_sequences)

    @cached_property
    def previous(self) -> Tensor:
        """(N - S,) the packed step before each that is not a first one."""
        sizes_T = torch.tensor(self.sizes, dtype=torch.int64)
        starts_N = (self._starts[1:] - self._starts[:-1]).repeat_interleave(sizes_T[1:])
        return torch.arange(self.num_sequences, self.num_steps) - starts_N

    @cached_property
    def links(self) -> list[tuple[int, int, int]]:
        """(first, first of the steps before, how many): the packed steps that are not first ones, in runs whose predecessors
        are a run, too."""
        links: list[tuple[int, int, int]] = []
        start = 0
        for before, size in pairwise(self.sizes):
            if links and links[-1][0] - links[-1][1] == before and sum(links[-1][::2]) == start + before:
                links[-1] = (links[-1][0], links[-1][1], links[-1][2] + size)
            else:
                links.append((start + before, start, size))
            start += before
        return links

    def sums(self, values_N: Tensor) -> Tensor:
        """(S,) the sum over the steps of each sequence, one step after the other."""
        return torch.zeros(self.num_sequences, dtype=torch.float64).index_add_(0, self.places, values_N.to(torch.float64))
