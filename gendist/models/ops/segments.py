"""Long sequences cut into segments, so that there are many steps at once to multiply: what is expected of all of it is then
exact by messages between the segments (`chain.py`).

Legend: S sequences, C segments.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SEGMENT_STEPS = 512  # at least
TRANSFER_BYTES = 1 << 20  # of a block's segments at most, or nearly so: they travel
STEP_S = 25e-6  # what a step of all sequences costs besides its arithmetic, forward and backward
FLOPS = 1e10  # of products of small matrices, a second


@dataclass(frozen=True, eq=False)
class Segments:
    """Of sequences of positive weight, in the order of time.

    first_rows, lengths  (C,)
    sequences            (C,) the number of the sequence in the block
    begins, ends         (C,) bool: whether the sequence begins (ends) here; not where it goes on in another block
    """

    first_rows: Tensor
    lengths: Tensor
    sequences: Tensor
    begins: Tensor
    ends: Tensor

    @property
    def are_linked(self) -> bool:
        return not bool(self.begins.all() & self.ends.all())

    def take(self, chosen: Tensor) -> Segments:
        values = (self.first_rows, self.lengths, self.sequences, self.begins, self.ends)
        return Segments(*(value[chosen] for value in values))


def cut(bounds: Tensor, counts_S: Tensor, open_ends: tuple[int, int], num_states: int, can_cut: bool) -> Segments:
    """The sequences between these bounds that count and have a step, cut where that pays. Long ones that other blocks go on
    with are cut in any case."""
    lengths_S = bounds.diff()
    sequences = torch.nonzero(counts_S & (lengths_S > 0))[:, 0]
    lengths = lengths_S[sequences]
    size = 0
    if any(open_ends) or (can_cut and pays(lengths, num_states)):
        most = max(1, TRANSFER_BYTES // (8 * num_states**2))
        size = max(SEGMENT_STEPS, -(-int(lengths.sum()) // most))
    numbers = torch.ones_like(lengths) if size == 0 else (lengths + size - 1).div(size, rounding_mode="floor")
    which = torch.arange(len(sequences)).repeat_interleave(numbers)
    within = torch.arange(len(which)) - (numbers.cumsum(0) - numbers).repeat_interleave(numbers)
    of_segment = lengths[which] if size == 0 else (lengths[which] - within * size).clamp_max(size)
    begins, ends = within == 0, within == numbers[which] - 1
    if len(which):
        begins[0] &= not open_ends[0]
        ends[-1] &= not open_ends[1]
    return Segments(bounds[:-1][sequences][which] + within * size, of_segment, sequences[which], begins, ends)


def pays(lengths: Tensor, num_states: int) -> bool:
    """Whether the transfer of each segment, a forward pass from every state, costs less than steps of few sequences do."""
    if len(lengths) == 0:
        return False
    longest = int(lengths.max())
    if longest < 4 * SEGMENT_STEPS:
        return False
    transfer_s = int(lengths.sum()) * 2 * (num_states + 4) * num_states**2 / FLOPS
    return transfer_s + 2 * SEGMENT_STEPS * STEP_S < longest * STEP_S
