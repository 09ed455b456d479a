"""Requests that wait for a model are computed together: a batch is counted in rows, and leaves when it is full, when nobody
else is expected to join it, or when the oldest of it has waited long enough.

Nothing that is queued can be wrong (it was checked before), and what fails all the same fails alone. Whoever stops waiting
frees its rows at once. Nobody starves: as soon as the oldest of all that wait may leave, it leaves next. A large request is
queued chunk by chunk, the next when the one before is taken, so that between two of its chunks everybody else has a turn.

One thread computes, one batch at a time. To it and back a batch takes 0.1 to 0.2 ms, more than a small mixture takes for a
sample, and meanwhile thread and event loop wait for each other's turn. So what nothing can join and what is known to be quick
is computed on the loop, when the thread has nothing to do: never is more than one thing computed at a time.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, Literal, NamedTuple

from gendist.serve.limits import Limits
from gendist.serve.waiting import Lately, Queue, Waiting, Work

__all__ = ["Batcher", "Busy", "Closed", "Left", "Reason", "Work", "is_admitted", "why_leave"]

Reason = Literal["full", "waited", "complete", "alone"]
Compute = Callable[[Hashable, Sequence[Any]], Sequence[Any]]

QUICK_S = 0.002  # that a work may keep the event loop from its requests
CROWDED = 4.0  # so many times longer it may take on a processor that others want, too
SHARE = 0.125  # of what is measured in what is expected from then on


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


class _Took(NamedTuple):
    """How long a computation took: seconds that passed, and those of them that the processor was at it."""

    seconds: float
    of_processor: float


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


class Batcher:
    """One queue and one thread that computes, of one event loop. Not to be called from other threads."""

    def __init__(
        self,
        compute: Compute,
        limits: Limits,
        watch: Callable[[Left], None] = lambda left: None,
        watch_queue: Callable[[int, int], None] = lambda num_rows, num_bytes: None,
    ) -> None:
        """
        compute  (key, payloads) -> one result for each, an Exception for what fails. Of the key None they have nothing to do
                 with one another. It runs in a thread of its own, or, of works that are known to be quick, on the event loop
        watch    is told of every batch that leaves
        watch_queue   and of the rows and bytes that wait, whenever these are others
        """
        self._compute = compute
        self._limits = limits
        self._watch = watch
        self._queue = Queue(watch_queue)
        self._ready: OrderedDict[Hashable, None] = OrderedDict()  # keys whose works may leave, unless some have given up since
        self._seconds = Lately(math.inf)  # that a work takes, by cost
        self._usual = Lately(1)  # by key, how many waited when a batch left
        self._seconds_per_row = 0.0
        self._number = 0
        self._batch: list[Waiting] = []  # that the thread has
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
        if self._is_quick(work) and not self._batch and not self._queue.all and not is_continued:
            return self._at_once(work)
        if self._loop is None:
            self._start()
        assert self._loop is not None
        self._number += 1
        waiting = Waiting(self._number, work, time.monotonic(), self._loop.create_future())
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
        results, took = self._computed(None, [work])
        self._learn([work], results, took)
        self._watch(Left(None, "alone", 1, work.num_rows, 0.0))
        if isinstance(results[0], BaseException):
            raise results[0]
        return results[0]

    def _is_quick(self, work: Work) -> bool:
        """Whether it may keep the event loop from its requests for so long as it takes."""
        return work.key is None and self._seconds[work.cost] <= QUICK_S

    def _next_batch(self) -> None:
        """Give the thread the next batch, where it has none and there is one that may leave; else see to it that somebody comes
        back when there is."""
        if self._batch or self._is_closed or not self._queue.all:
            return
        now = time.monotonic()
        oldest = self._queue.oldest
        key, reason = oldest.work.key, self._why_leave(oldest.work.key, now)
        while reason is None and self._ready:
            key = next(iter(self._ready))
            reason = self._why_leave(key, now)
            if reason is None:
                del self._ready[key]
        if reason is None:
            if self._timer is None:
                assert self._loop is not None
                self._timer = self._loop.call_later(oldest.since + self._limits.target_wait_s - now, self._after_wait)
        elif self._is_quick(self._queue.lanes[key].oldest.work):
            self._leave_to_loop(self._queue.lanes[key].oldest, now)
        else:
            self._leave(key, reason, now)

    def _after_wait(self) -> None:
        self._timer = None
        self._next_batch()

    def _why_leave(self, key: Hashable, now: float) -> Reason | None:
        lane = self._queue.lanes.get(key)
        if lane is None:
            return None
        if key is None:
            return "alone"
        return why_leave(lane.num_rows, len(lane.waiting), self._usual[key], now - lane.oldest.since, self._limits)

    def _leave(self, key: Hashable, reason: Reason, now: float) -> None:
        num_waiting = len(self._queue.lanes[key].waiting)
        # It rises at once and falls by halves: one request alone soon waits for nobody.
        self._usual[key] = max(num_waiting, (self._usual[key] + num_waiting) // 2)
        self._batch, self._batch_since = self._taken(key), now
        self._look_again(key, now)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        works = [each.work for each in self._batch]
        self._to_thread.put((key, works))
        self._watch(Left(key, reason, len(works), sum(work.num_rows for work in works), now - self._batch[0].since))

    def _leave_to_loop(self, oldest: Waiting, now: float) -> None:
        """It is computed here; requests that have come meanwhile are read before the next."""
        self._queue.discard(oldest)
        self._look_again(None, now)
        results, took = self._computed(None, [oldest.work])
        self._learn([oldest.work], results, took)
        _tell(oldest.result, results[0])
        assert self._loop is not None
        self._loop.call_soon(self._next_batch)
        self._watch(Left(None, "alone", 1, oldest.work.num_rows, now - oldest.since))

    def _look_again(self, key: Hashable, now: float) -> None:
        """Some of the key have left. The others come after those of other keys, where both may leave."""
        self._ready.pop(key, None)
        if self._why_leave(key, now) is not None:
            self._ready[key] = None

    def _taken(self, key: Hashable) -> list[Waiting]:
        """The oldest of the key, and what fits beside it of those that came next."""
        batch: list[Waiting] = []
        rows = 0
        for each in self._queue.lanes[key].waiting.values():
            rows += each.work.num_rows
            if batch and (key is None or rows > self._limits.batch_rows):
                break
            batch.append(each)
        for each in batch:
            self._queue.discard(each)
        return batch

    def _done(self, results: Sequence[Any], took: _Took) -> None:
        """The thread has computed its batch."""
        batch, self._batch = self._batch, []
        self._learn([each.work for each in batch], results, took)
        for each, result in zip(batch, results, strict=True):
            _tell(each.result, result)
        self._next_batch()

    def _learn(self, works: Sequence[Work], results: Sequence[Any], took: _Took) -> None:
        if any(isinstance(result, BaseException) for result in results):
            return  # how soon something fails does not tell how long it takes
        cost = works[0].cost
        if cost is None:
            return  # its rows tell nothing of how long others take
        per_row = took.seconds / max(1, sum(work.num_rows for work in works))
        self._seconds_per_row += (SHARE if self._seconds_per_row else 1.0) * (per_row - self._seconds_per_row)
        if works[0].key is None:
            before, now = self._seconds[cost], max(took.of_processor, took.seconds / CROWDED)
            self._seconds[cost] = now if before == math.inf else before + SHARE * (now - before)

    def _retry_after_s(self) -> float:
        """When what waits should be computed, from the rate of late."""
        return min(max(self._queue.num_rows * self._seconds_per_row, 0.1), self._limits.time_limit_s)

    # In the thread

    def _run(self) -> None:
        assert self._loop is not None
        while (batch := self._to_thread.get()) is not None:
            try:
                self._loop.call_soon_threadsafe(self._done, *self._computed(*batch))
            except RuntimeError:  # the loop is closed, and nobody waits
                return
            batch = None  # which may hold much, while this waits for the next

    def _computed(self, key: Hashable, works: Sequence[Work]) -> tuple[Sequence[Any], _Took]:
        """One result for each work, whatever `compute` does, and how long it took."""
        began, of_processor = time.monotonic(), time.thread_time()
        try:
            results = self._compute(key, [work.payload for work in works])
            if len(results) != len(works):
                raise RuntimeError(f"{len(results)} results of {len(works)} works")
        except BaseException as error:
            results = [error] * len(works)
        return results, _Took(time.monotonic() - began, time.thread_time() - of_processor)


def _tell(future: asyncio.Future[Any], result: Any) -> None:
    """Whoever waits for it, if anybody does."""
    if future.done():
        return
    if isinstance(result, BaseException):
        future.set_exception(_of_one(result))
    else:
        future.set_result(result)


def _of_one(error: BaseException) -> Exception:
    """What a request fails with: what would end the whole loop, or cannot be raised in a coroutine, is put into words."""
    if isinstance(error, Exception) and not isinstance(error, StopIteration | StopAsyncIteration):
        return error
    return RuntimeError(f"{type(error).__name__} in a computation: {error}")
