"""The micro-batches of a step: a function of (seed, step), whatever came before and however many processes share the work.

A process takes a contiguous run of each global batch (`order.py` says which rows those are), and its micro-batches are runs
of that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from gendist.noise import Noise
from gendist.protocols import Block, DeepModel, Draw, Phase
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


@dataclass(frozen=True)
class MicroBatch:
    """
    start  the position of its first sample in the endless sequence
    block  its rows
    noise  of each phase of the step what its loss draws
    """

    start: int
    block: Block
    noise: Mapping[Phase, Mapping[str, Tensor]]

    def to(self, device: torch.device) -> MicroBatch:
        return self if device.type == "cpu" else self._each(partial(_sent, device=device))

    def pinned(self) -> MicroBatch:
        """In memory that a GPU reads by itself."""
        return self._each(Tensor.pin_memory)

    def _each(self, function: Callable[[Tensor], Tensor]) -> MicroBatch:
        noise = {phase: {name: function(values) for name, values in of.items()} for phase, of in self.noise.items()}
        return MicroBatch(self.start, _with_each(self.block, function), noise)


@dataclass(frozen=True)
class MicroBatches:
    """Those of one process, as a function of the step."""

    model: DeepModel
    rows: Rows
    order: Order
    division: Division
    rank: int
    seed: int

    def __call__(self, step: int) -> list[MicroBatch]:
        start, mine = step * self.division.global_batch_size, self.division.slice(self.rank)
        taken, phases = self.order.rows(step, mine), self.model.phases(step)
        return [
            MicroBatch(
                start + positions.start,
                self.rows.take(taken[positions.start - mine.start : positions.stop - mine.start]),
                {phase: self._noise(phase, start + positions.start, len(positions)) for phase in phases},
            )
            for positions in self.division.micro_batches(self.rank)
        ]

    def _noise(self, phase: Phase, start: int, num_rows: int) -> dict[str, Tensor]:
        return noise(self.seed, f"train.{phase.name}", self.model.draws(phase), start, num_rows)


T = TypeVar("T")


@contextmanager
def ahead(make: Callable[[int], T], begin_thread: Callable[[], None] = lambda: None) -> Iterator[Callable[[int], T]]:
    """The same function of steps that are asked for in their order, but that it makes the next one in a thread meanwhile."""
    with ThreadPoolExecutor(1, "batches", begin_thread) as thread:
        begun: dict[int, Future[T]] = {}

        def at(step: int) -> T:
            this = begun.pop(step, None) or thread.submit(make, step)
            begun[step + 1] = thread.submit(make, step + 1)
            return this.result()

        yield at


@contextmanager
def for_device(make: Callable[[int], list[MicroBatch]], device: torch.device) -> Iterator[Callable[[int], list[MicroBatch]]]:
    """`make`, which where a GPU computes is one step ahead of it."""
    if device.type == "cpu":
        yield make
        return
    gpu = torch.cuda.current_device() if device.index is None else device.index
    with ahead(lambda step: [batch.pinned() for batch in make(step)], partial(torch.cuda.set_device, gpu)) as at:
        yield at


def noise(seed: int, purpose: str, draws: Mapping[str, Draw], start: int, num_rows: int) -> dict[str, Tensor]:
    """The draws of the samples from position `start` on, (num_rows, width) float32 each, by name."""
    values = {}
    for name, draw in draws.items():
        source = Noise(seed, f"{purpose}.{name}")
        drawn = source.normal if draw.kind == "normal" else source.uniform
        values[name] = drawn(start, num_rows, draw.width).to(torch.float32)
    return values


def moved(block: Block, device: torch.device) -> Block:
    """The block on the device where it is computed with; row numbers stay on the CPU."""
    return block if device.type == "cpu" else _with_each(block, partial(_sent, device=device))


def _with_each(block: Block, function: Callable[[Tensor], Tensor]) -> Block:
    """With what the function makes of every tensor but the row numbers."""
    weights, evidence, missing = (
        None if values is None else function(values) for values in (block.weights, block.evidence, block.missing)
    )
    return replace(block, x=function(block.x), weights=weights, evidence=evidence, missing=missing)


def _sent(values: Tensor, device: torch.device) -> Tensor:
    return values.to(device, non_blocking=True)
