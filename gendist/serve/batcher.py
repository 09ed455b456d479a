"""Requests that wait for a model are computed together: a batch is counted in rows, and leaves when it is full, when nobody
else is expected to join it, or when the oldest of it has waited long enough.

Nothing that is queued can be wrong (it was checked before), and what fails all the same fails alone. Whoever stops waiting
frees its rows at once. Nobody starves: as soon as the oldest of all that wait may leave, it leaves next. A large request is
queued chunk by chunk, the next when the one before is taken, so that between two of its chunks everybody else has a turn.

One thread computes, one batch at a time. Between it and the event loop a batch goes to and fro for 0.1 to 0.2 ms, which is more
than a small mixture takes for a sample. So works that nothing can join go several at a time where they are known to be quick,
and one that finds nobody before it is computed on the loop, which the thread would only have kept from its other requests.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any, Generic, Literal, TypeVar

from gendist.serve.limits import Limits

T = TypeVar("T")

Reason = Literal["full", "waited", "complete", "alone"]
Compute = Callable[[Hashable, Sequence[Any]], Sequence[Any]]

QUICK_S = 0.001  # of the processor, up to which a work is computed on the event loop
HOP_S = 0.002  # that works which nothing can join may take together on one way to the thread and back
SHARE = 0.125  # of what is measured in what is expected from then on
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


@dataclass(frozen=True)
class Left:
    """A batch that left the queue, for the metrics.

    reason  full      of `batch_rows` rows
            waited    for `target_wait_s`
            complete  as many of its key wait as lately came together, so that nobody is expected to join them
            alone     nothing can join it
    """

    key: Hashable
    reason: Reason
    num_works: int
    num_rows: int
    oldest_wait_s: float


class Busy(Exception):
    """The queue is full. retry_after_s: when there should be room again."""

    def __init__(self, retry_after_s: float) -> None:
        super().__init__(f"the queue is full; try again in {retry_after_s:.1f} s")
        self.retry_after_s = retry_after_s


class Closed(Exception):
    """The batcher computes no more."""

    def __init__(self) -> None:
        super().__init__("the server is shutting down; try again later")


def is_admitted(rows: int, num_bytes: int, queued_rows: int, queued_bytes: int, limits: Limits) -> bool:
    """Whether a work finds room in the queue. One that is larger than all of it does when nothing waits."""
    if queued_rows == 0 and queued_bytes == 0:
        return True
    return queued_rows + rows <= limits.queue_rows and queued_bytes + num_bytes <= limits.queue_bytes


def why_leave(num_rows: int, num_works: int, usual: int, waited_s: float, limits: Limits) -> Reason | None:
    """The reason why works that may be computed in one call leave now, or None.

    num_rows, num_works  that wait
    usual                as many works as lately waited together
    waited_s             by the oldest
    """
    if num_rows >= limits.batch_rows:
        return "full"
    if num_works >= usual:
        return "complete"
    return "waited" if waited_s >= limits.target_wait_s else None


@dataclass(eq=False)
class _Waiting:
    """A work in the queue; its number tells who came first."""

    number: int
    work: Work
    since: float
    result: asyncio.Future[Any] = field(repr=False)


@dataclass(eq=False)
class _Lane:
    """The works of one key that wait, in the order in which they came."""

    waiting: OrderedDict[int, _Waiting] = field(default_factory=OrderedDict)
    num_rows: int = 0


class _Queue:
    """What waits: in order of arrival, and by key. Each step takes the same time, however many wait."""

    def __init__(self) -> None:
        self.all: OrderedDict[int, _Waiting] = OrderedDict()
        self.lanes: dict[Hashable, _Lane] = {}
        self.num_rows = self.num_bytes = 0

    def add(self, waiting: _Waiting) -> None:
        lane = self.lanes.setdefault(waiting.work.key, _Lane())
        self.all[waiting.number] = lane.waiting[waiting.number] = waiting
        lane.num_rows += waiting.work.num_rows
        self.num_rows += waiting.work.num_rows
        self.num_bytes += waiting.work.num_bytes

    def discard(self, waiting: _Waiting) -> None:
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


class _Lately(Generic[T]):
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


class Batcher:
    """One queue and one thread that computes, of one event loop. Not to be called from other threads."""

    def __init__(self, compute: Compute, limits: Limits, watch: Callable[[Left], None] = lambda left: None) -> None:
        """
        compute  (key, payloads) -> one result for each, an Exception for what fails. Of the key None they have nothing to do
                 with one another. It runs in a thread of its own, or, of works that are known to be quick, on the event loop
        watch    is told of every batch that leaves
        """
        self._compute = compute
        self._limits = limits
        self._watch = watch
        self._queue = _Queue()
        self._ready: OrderedDict[Hashable, None] = OrderedDict()  # keys whose works may leave, unless some have given up since
        self._seconds = _Lately(math.inf)  # of the processor, by cost: an interruption by others says nothing of a work
        self._usual = _Lately(1)  # by key, how many waited when a batch left
        self._seconds_per_row = 0.0
        self._number = 0
        self._batch: list[_Waiting] = []  # that the thread has
        self._batch_since = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._to_thread: SimpleQueue[tuple[Hashable, list[Work]] | None] = SimpleQueue()
        self._is_closed = False

    @property
    def num_rows(self) -> int:
        """That wait."""
        return self._queue.num_rows

    @property
    def num_bytes(self) -> int:
        """Of what waits."""
        return self._queue.num_bytes

    @property
    def stuck_for_s(self) -> float:
        """How long the thread has been in the batch that it has; 0 where it has none. No batch that works as it should takes
        longer than `time_limit_s`."""
        return time.monotonic() - self._batch_since if self._batch else 0.0

    async def result(self, work: Work, *, is_continued: bool = False) -> Any:
        """What is computed for this work.

        is_continued  whether it is a further chunk of a request of which a part is answered already: it is always admitted,
                      since it can no longer be refused

        `Busy` where the queue has no room; TimeoutError after `time_limit_s`; `Closed`; and what the computation raised.
        """
        if self._is_closed:
            raise Closed
        waiting_rows, waiting_bytes = self._queue.num_rows, self._queue.num_bytes
        if not is_continued and not is_admitted(work.num_rows, work.num_bytes, waiting_rows, waiting_bytes, self._limits):
            raise Busy(self._retry_after_s())
        if work.key is None and not self._batch and not self._queue.all and self._seconds[work.cost] <= QUICK_S:
            return self._at_once(work)
        if self._loop is None:
            self._start()
        assert self._loop is not None
        self._number += 1
        waiting = _Waiting(self._number, work, time.monotonic(), self._loop.create_future())
        self._queue.add(waiting)
        if self._why_leave(work.key, waiting.since) is not None:
            self._ready[work.key] = None
        if not self._batch:
            # Soon, not now: others that have arrived with it are to be in the batch.
            self._loop.call_soon(self._next_batch)
        try:
            async with asyncio.timeout(self._limits.time_limit_s):
                return await waiting.result
        finally:
            self._queue.discard(waiting)

    async def close(self) -> None:
        """Whoever waits is told that the batcher is `Closed`. A batch that is being computed is not waited for."""
        self._is_closed = True
        if self._timer is not None:
            self._timer.cancel()
        for each in [*self._batch, *self._queue.all.values()]:
            if not each.result.done():
                each.result.set_exception(Closed())
        self._to_thread.put(None)

    def _start(self) -> None:
        self._loop = asyncio.get_running_loop()
        # A thread that hangs in a computation must not keep the process from its end, as one of a ThreadPoolExecutor would.
        threading.Thread(target=self._run, name="model", daemon=True).start()

    # On the event loop

    def _at_once(self, work: Work) -> Any:
        results, seconds = self._computed(None, [work])
        self._learn_seconds(work.cost, seconds)
        self._watch(Left(None, "alone", 1, work.num_rows, 0.0))
        if isinstance(results[0], BaseException):
            raise results[0]
        return results[0]

    def _next_batch(self) -> None:
        """Give the thread the next batch, where it has none and there is one that may leave; else see to it that somebody comes
        back when there is."""
        if self._batch or self._is_closed or not self._queue.all:
            return
        now = time.monotonic()
        oldest = next(iter(self._queue.all.values()))
        key, reason = oldest.work.key, self._why_leave(oldest.work.key, now)
        while reason is None and self._ready:
            key = next(iter(self._ready))
            reason = self._why_leave(key, now)
            if reason is None:
                del self._ready[key]
        if reason is not None:
            self._leave(key, reason, now)
        elif self._timer is None:
            assert self._loop is not None
            self._timer = self._loop.call_later(oldest.since + self._limits.target_wait_s - now, self._after_wait)

    def _after_wait(self) -> None:
        self._timer = None
        self._next_batch()

    def _why_leave(self, key: Hashable, now: float) -> Reason | None:
        lane = self._queue.lanes.get(key)
        if lane is None:
            return None
        if key is None:
            return "alone"
        oldest = next(iter(lane.waiting.values()))
        return why_leave(lane.num_rows, len(lane.waiting), self._usual[key], now - oldest.since, self._limits)

    def _leave(self, key: Hashable, reason: Reason, now: float) -> None:
        num_waiting = len(self._queue.lanes[key].waiting)
        # It rises at once and falls by halves: one request alone soon waits for nobody.
        self._usual[key] = max(num_waiting, (self._usual[key] + num_waiting) // 2)
        self._batch, self._batch_since = self._taken(key), now
        self._ready.pop(key, None)
        if self._why_leave(key, now) is not None:
            self._ready[key] = None  # after the others
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        works = [each.work for each in self._batch]
        self._to_thread.put((key, works))
        self._watch(Left(key, reason, len(works), sum(work.num_rows for work in works), now - self._batch[0].since))

    def _taken(self, key: Hashable) -> list[_Waiting]:
        """The oldest of the key, and what fits beside it of those that came next: in `batch_rows` rows or, where nothing can be
        joined, in `HOP_S` of the thread."""
        batch: list[_Waiting] = []
        rows, seconds = 0, 0.0
        for each in self._queue.lanes[key].waiting.values():
            rows += each.work.num_rows
            seconds += self._seconds[each.work.cost]
            if batch and (seconds > HOP_S if key is None else rows > self._limits.batch_rows):
                break
            batch.append(each)
        for each in batch:
            self._queue.discard(each)
        return batch

    def _done(self, results: Sequence[Any], seconds: float) -> None:
        """The thread has computed its batch, in so many seconds of the processor."""
        batch, self._batch = self._batch, []
        rows = sum(each.work.num_rows for each in batch)
        per_row = (time.monotonic() - self._batch_since) / max(rows, 1)
        self._seconds_per_row += (SHARE if self._seconds_per_row else 1.0) * (per_row - self._seconds_per_row)
        for each, result in zip(batch, results, strict=True):
            if each.work.key is None:
                self._learn_seconds(each.work.cost, seconds / len(batch))
            if each.result.done():  # nobody waits any more
                continue
            if isinstance(result, BaseException):
                each.result.set_exception(_of_one(result))
            else:
                each.result.set_result(result)
        self._next_batch()

    def _learn_seconds(self, cost: Hashable, seconds: float) -> None:
        if cost is not None:
            before = self._seconds[cost]
            self._seconds[cost] = seconds if before == math.inf else before + SHARE * (seconds - before)

    def _retry_after_s(self) -> float:
        """When what waits should be computed, from the rate of late."""
        return min(max(self._queue.num_rows * self._seconds_per_row, 0.1), self._limits.time_limit_s)

    # In the thread

    def _run(self) -> None:
        assert self._loop is not None
        while (batch := self._to_thread.get()) is not None:
            results, seconds = self._computed(*batch)
            try:
                self._loop.call_soon_threadsafe(self._done, results, seconds)
            except RuntimeError:  # the loop is closed, and nobody waits
                return

    def _computed(self, key: Hashable, works: Sequence[Work]) -> tuple[Sequence[Any], float]:
        """One result for each work, whatever `compute` does, and the seconds of the processor that it took."""
        began = time.thread_time()
        try:
            results = self._compute(key, [work.payload for work in works])
            if len(results) != len(works):
                raise RuntimeError(f"{len(results)} results of {len(works)} works")
        except BaseException as error:
            results = [error] * len(works)
        return results, time.thread_time() - began


def _of_one(error: BaseException) -> Exception:
    """What a request fails with: what would end the whole loop, or cannot be raised in a coroutine, is put into words."""
    if isinstance(error, Exception) and not isinstance(error, StopIteration | StopAsyncIteration):
        return error
    return RuntimeError(f"{type(error).__name__} in a computation: {error}")
