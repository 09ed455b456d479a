"""Which rows a step sees: a function of (seed, step), whatever came before and however many processes share the work.

The samples form one endless sequence: epoch after epoch a permutation of the training rows, by (seed, epoch). The global
batch of step s holds the positions s G up to (s + 1) G of it. A process takes a contiguous run of each global batch, and
its micro-batches are runs of that.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from gendist.noise import Noise, derived_seed
from gendist.protocols import Block, Draw

SORTED_UP_TO = 2**20  # rows whose permutation is made as a whole, 8 bytes a row; beyond, each index is computed by itself
ROUNDS = 8


class Rows(Protocol):
    """The rows that are trained on, or held out, at random access."""

    @property
    def num_rows(self) -> int: ...

    def take(self, indices: Tensor) -> Block:
        """The rows at these places, (B,) int64 from 0 to num_rows, in this order; x float32, on the CPU."""
        ...


def indices(num_rows: int, seed: int, start: int, num_samples: int) -> Tensor:
    """(num_samples,) int64: the row of each position from `start` on."""
    positions = np.arange(start, start + num_samples, dtype=np.int64)
    parts = []
    for epoch in range(start // num_rows, (start + num_samples - 1) // num_rows + 1):
        inside = positions[(positions >= epoch * num_rows) & (positions < (epoch + 1) * num_rows)] - epoch * num_rows
        parts.append(_permuted(num_rows, derived_seed(seed, f"train.order.{epoch}"), inside))
    return torch.from_numpy(np.concatenate(parts)) if parts else torch.empty(0, dtype=torch.int64)


def _permuted(num_rows: int, seed: int, places: np.ndarray) -> np.ndarray:
    """What stands at these places of the permutation that belongs to the seed."""
    if num_rows <= SORTED_UP_TO:
        order: np.ndarray = _sorted_permutation(num_rows, seed)[places]
        return order
    return _feistel_permutation(num_rows, seed, places)


@lru_cache(maxsize=2)  # a global batch may end one epoch and begin the next
def _sorted_permutation(num_rows: int, seed: int) -> np.ndarray:
    return np.argsort(Noise(seed, "permutation").uniform(0, num_rows)[:, 0].numpy(), kind="stable")


def _feistel_permutation(num_rows: int, seed: int, places: np.ndarray) -> np.ndarray:
    """A Feistel network permutes the numbers of an even number of bits (Luby & Rackoff 1988); to stay within num_rows, it is
    applied until it comes back there, which keeps it a permutation (Black & Rogaway 2002, cycle walking)."""
    half = np.uint64((int(num_rows - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << int(half)) - 1)
    keys = np.frombuffer(hashlib.blake2b(f"{seed}/permutation".encode(), digest_size=8 * ROUNDS).digest(), dtype=np.uint64)
    values = places.astype(np.uint64)
    outside = np.ones(len(values), dtype=bool)
    while outside.any():
        left, right = values[outside] >> half, values[outside] & mask
        for key in keys:
            left, right = right, left ^ (_mixed(right ^ key) & mask)
        values[outside] = (left << half) | right
        outside = values >= num_rows
    return values.astype(np.int64)


def _mixed(values: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64 (Steele, Lea & Flood 2014): every bit of the result depends on every bit of the value."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


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


def training_batches(rows: Rows, seed: int, step: int, division: Division, rank: int) -> list[tuple[int, Block]]:
    """The micro-batches of a process at a step, each with the position of its first sample in the endless sequence."""
    start = step * division.global_batch_size
    mine = division.slice(rank)
    taken = indices(rows.num_rows, seed, start + mine.start, len(mine))
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
