"""The micro-batches of a step: a function of (seed, step), whatever came before and however many processes share the work.

A process takes a contiguous run of each global batch (`order.py` says which rows those are), and its micro-batches are runs
of that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from gendist.noise import Noise
from gendist.protocols import Block, Draw
from gendist.train.order import Order


class Rows(Protocol):
    """The rows that are trained on, or held out, at random access."""

    @property
    def num_rows(self) -> int: ...

    def take(self, indices: Tensor) -> Block:
        """The rows at these places, (B,) int64 from 0 to num_rows, in this order; x float32, on the CPU."""
        ...

    def labelled(self) -> Tensor:
        """(L,) int64: the places of the rows of which something is known, in ascending order."""
        ...


@dataclass(frozen=True)
class Division:
    """How the positions 0 to global_batch_size of every global batch are divided.

    micro_batch_size  samples at once on one process, at most; None: all that the process has
    """

    global_batch_size: int
    world_size: int = 1
    micro_batch_size: int | None = None

    @property
    def num_micro_batches(self) -> int:
        """Of every process, those with a sample less too."""
        largest = -(-self.global_batch_size // self.world_size)
        return -(-largest // (self.micro_batch_size or largest))

    def slice(self, rank: int) -> range:
        """The positions of a process; the first have one more where they do not divide."""
        size, more = divmod(self.global_batch_size, self.world_size)
        start = rank * size + min(rank, more)
        return range(start, start + size + (rank < more))

    def micro_batches(self, rank: int) -> list[range]:
        """As many on every process. The last have one more where they do not divide, so that the last one is never empty."""
        whole = self.slice(rank)
        size, more = divmod(len(whole), self.num_micro_batches)
        ends = [
            whole.start + (i + 1) * size + max(0, more - self.num_micro_batches + i + 1) for i in range(self.num_micro_batches)
        ]
        return [range(start, end) for start, end in zip([whole.start, *ends[:-1]], ends, strict=True)]


def training_batches(rows: Rows, order: Order, step: int, division: Division, rank: int) -> list[tuple[int, Block]]:
    """The micro-batches of a process at a step, each with the position of its first sample in the endless sequence."""
    start = step * division.global_batch_size
    mine = division.slice(rank)
    taken = order.rows(step, mine)
    return [
        (start + positions.start, rows.take(taken[positions.start - mine.start : positions.stop - mine.start]))
        for positions in division.micro_batches(rank)
    ]


def noise(
    seed: int, purpose: str, draws: Mapping[str, Draw], start: int, num_rows: int, device: torch.device
) -> dict[str, Tensor]:
    """The draws of the samples from position `start` on, (num_rows, width) float32 each, by name."""
    values = {}
    for name, draw in draws.items():
        source = Noise(seed, f"{purpose}.{name}")
        drawn = source.normal if draw.kind == "normal" else source.uniform
        values[name] = drawn(start, num_rows, draw.width).to(torch.float32).to(device, non_blocking=True)
    return values


def moved(block: Block, device: torch.device) -> Block:
    """The block on the device where it is computed with; row numbers stay on the CPU."""
    if device.type == "cpu":
        return block

    def there(values: Tensor | None) -> Tensor | None:
        return None if values is None else values.to(device, non_blocking=True)

    x = block.x.to(device, non_blocking=True)
    return replace(block, x=x, weights=there(block.weights), evidence=there(block.evidence), missing=there(block.missing))
