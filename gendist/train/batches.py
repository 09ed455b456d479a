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

NUM_AHEAD = 2  # steps, beyond the one that the loop has begun, made while a GPU computes; each by a thread of its own


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
    sent   the same on a GPU, once the event has come about
    """

    start: int
    block: Block
    noise: Mapping[Phase, Mapping[str, Tensor]]
    sent: tuple[MicroBatch, torch.cuda.Event] | None = None

    def on_device(self) -> MicroBatch:
        """Where it is computed with."""
        if self.sent is None:
            return self
        there, event = self.sent
        stream = torch.cuda.current_stream(there.block.x.device)
        stream.wait_event(event)

        def used(values: Tensor) -> Tensor:  # for as long as what is queued here needs it
            values.record_stream(stream)
            return values

        return there._each(used)

    def sent_by(self, stream: torch.cuda.Stream) -> MicroBatch:
        pinned = self._each(Tensor.pin_memory)  # memory that a GPU reads by itself
        with torch.cuda.stream(stream):
            there = pinned._each(partial(_sent, device=stream.device))
            return replace(self, noise={}, sent=(there, stream.record_event()))  # rows are still counted here

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
def ahead(
    make: Callable[[int], T], num_steps: int, begin_thread: Callable[[], None] = lambda: None
) -> Iterator[Callable[[int], T]]:
    """The same function of steps that are asked for in their order, but that it makes the next ones in threads meanwhile."""
    with ThreadPoolExecutor(num_steps, "batches", begin_thread) as threads:
        begun: dict[int, Future[T]] = {}

        def at(step: int) -> T:
            for each in range(step, step + num_steps + 1):
                if each not in begun:
                    begun[each] = threads.submit(make, each)
            return begun.pop(step).result()

        try:
            yield at
        finally:
            threads.shutdown(cancel_futures=True)


@contextmanager
def for_device(make: Callable[[int], list[MicroBatch]], device: torch.device) -> Iterator[Callable[[int], list[MicroBatch]]]:
    """`make`, which where a GPU computes is some steps ahead of it, and has sent them there by then."""
    if device.type == "cpu":
        yield make
        return
    stream = torch.cuda.Stream(device)
    begin_thread = partial(torch.cuda.set_device, stream.device)
    with ahead(lambda step: [batch.sent_by(stream) for batch in make(step)], NUM_AHEAD, begin_thread) as at:
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
