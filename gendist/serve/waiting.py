"""What waits to be computed: in the order in which it came, and by what it may be computed with."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

T = TypeVar("T")

MOST_KINDS = 4_096  # of work, of which something is remembered


@dataclass(frozen=True, eq=False)
class Work:
    """What a request, or a chunk of one, asks for.

    key        works of one key may be computed in one call; None: it is computed by itself
    num_rows   that come out of it
    num_bytes  of what goes in and comes out
    payload    for whoever computes
    cost       works of one cost take about as long; None: nobody knows how long it takes
    """

    key: Hashable
    num_rows: int
    num_bytes: int
    payload: Any
    cost: Hashable = None


@dataclass(eq=False)
class Waiting:
    """A work in the queue; its number tells who came first."""

    number: int
    work: Work
    since: float
    result: asyncio.Future[Any] = field(repr=False)


@dataclass(eq=False)
class Lane:
    """The works of one key that wait, in the order in which they came."""

    waiting: OrderedDict[int, Waiting] = field(default_factory=OrderedDict)
    num_rows: int = 0

    @property
    def oldest(self) -> Waiting:
        return next(iter(self.waiting.values()))


class Queue:
    """What waits: in order of arrival, and by key. Each step takes the same time, however many wait."""

    def __init__(self, watch: Callable[[int, int], None]) -> None:
        """watch: is told of the rows and bytes that wait, whenever these are others"""
        self._watch = watch
        self.all: OrderedDict[int, Waiting] = OrderedDict()
        self.lanes: dict[Hashable, Lane] = {}
        self.num_rows = self.num_bytes = 0

    @property
    def oldest(self) -> Waiting:
        return next(iter(self.all.values()))

    def add(self, waiting: Waiting) -> None:
        lane = self.lanes.setdefault(waiting.work.key, Lane())
        self.all[waiting.number] = lane.waiting[waiting.number] = waiting
        lane.num_rows += waiting.work.num_rows
        self.num_rows += waiting.work.num_rows
        self.num_bytes += waiting.work.num_bytes
        self._watch(self.num_rows, self.num_bytes)

    def discard(self, waiting: Waiting) -> None:
        """Take it out, if it is there."""
        if self.all.pop(waiting.number, None) is None:
            return
        key = waiting.work.key
        lane = self.lanes[key]
        del lane.waiting[waiting.number]
        lane.num_rows -= waiting.work.num_rows
        self.num_rows -= waiting.work.num_rows
        self.num_bytes -= waiting.work.num_bytes
        if not lane.waiting:
            del self.lanes[key]
        self._watch(self.num_rows, self.num_bytes)


class Lately(Generic[T]):
    """A number for each of the kinds of work that came last."""

    def __init__(self, otherwise: T) -> None:
        self._numbers: OrderedDict[Hashable, T] = OrderedDict()
        self._otherwise = otherwise

    def __getitem__(self, kind: Hashable) -> T:
        return self._numbers.get(kind, self._otherwise)

    def __setitem__(self, kind: Hashable, number: T) -> None:
        self._numbers[kind] = number
        self._numbers.move_to_end(kind)
        if len(self._numbers) > MOST_KINDS:
            self._numbers.popitem(last=False)
