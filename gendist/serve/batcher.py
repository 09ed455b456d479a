"""Requests that wait for a model are computed together: a batch is counted in rows, and leaves when it is full or when the
oldest of it has waited long enough.

Nothing that is queued can be wrong (it was checked before), and what fails all the same fails alone. Whoever stops waiting
frees its rows. A large request is queued chunk by chunk, the next when the one before is taken: so it shares with small ones.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

from gendist.serve.limits import Limits

Reason = Literal["full", "waited", "alone"]


@dataclass(frozen=True, eq=False)
class Work:
    """What a request, or a chunk of one, asks for.

    key        works of one key may be computed in one call; None: it is computed by itself
    num_rows   that come out of it
    num_bytes  of what goes in and comes out
    payload    for whoever computes
    """

    key: Hashable
    num_rows: int
    num_bytes: int
    payload: Any


@dataclass(frozen=True)
class Left:
    """A batch that left the queue, for the metrics."""

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


@dataclass(eq=False)
class _Waiting:
    work: Work
    since: float
    result: asyncio.Future[Any] = field(repr=False)


class Batcher:
    """One queue and one thread that computes, of one event loop."""

    def __init__(
        self,
        compute: Callable[[Hashable, Sequence[Any]], Sequence[Any]],
        limits: Limits,
        watch: Callable[[Left], None] = lambda left: None,
    ) -> None:
        """compute(key, payloads) -> one result for each, an Exception for what fails; it runs in a thread of its own."""
        self._compute = compute
        self._limits = limits
        self._watch = watch
        self._queue: deque[_Waiting] = deque()
        self._rows = 0
        self._bytes = 0
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._task: asyncio.Task[None] | None = None

    async def result(self, work: Work) -> Any:
        """What is computed for this work. `Busy` where the queue has no room; TimeoutError after `time_limit_s`."""
        if self._task is None:
            self._task = asyncio.create_task(self._run())
        if self._queue and (
            self._rows + work.num_rows > self._limits.queue_rows or self._bytes + work.num_bytes > self._limits.queue_bytes
        ):
            raise Busy(1.0)
        waiting = _Waiting(work, time.monotonic(), asyncio.get_running_loop().create_future())
        self._queue.append(waiting)
        self._rows += work.num_rows
        self._bytes += work.num_bytes
        self._arrived.set()
        try:
            async with asyncio.timeout(self._limits.time_limit_s):
                return await waiting.result
        finally:
            if waiting in self._queue:
                self._queue.remove(waiting)
                self._forget(waiting)

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _forget(self, waiting: _Waiting) -> None:
        self._rows -= waiting.work.num_rows
        self._bytes -= waiting.work.num_bytes

    async def _run(self) -> None:
        while True:
            while not self._queue:
                self._arrived.clear()
                await self._arrived.wait()
            reason = await self._ready()
            batch = self._taken()
            if not batch:
                continue
            rows = sum(each.work.num_rows for each in batch)
            key = batch[0].work.key
            self._watch(Left(key, reason, len(batch), rows, time.monotonic() - batch[0].since))
            payloads = [each.work.payload for each in batch]
            results = await asyncio.get_running_loop().run_in_executor(self._thread, self._computed, key, payloads)
            for each, result in zip(batch, results, strict=True):
                if each.result.done():
                    continue
                if isinstance(result, Exception):
                    each.result.set_exception(result)
                else:
                    each.result.set_result(result)

    def _computed(self, key: Hashable, payloads: Sequence[Any]) -> Sequence[Any]:
        try:
            return self._compute(key, payloads)
        except Exception as error:
            return [error] * len(payloads)

    async def _ready(self) -> Reason:
        while self._queue:
            first = self._queue[0]
            if first.work.key is None:
                return "alone"
            if sum(each.work.num_rows for each in self._queue if each.work.key == first.work.key) >= self._limits.batch_rows:
                return "full"
            left = first.since + self._limits.target_wait_s - time.monotonic()
            if left <= 0:
                return "waited"
            self._arrived.clear()
            try:
                async with asyncio.timeout(left):
                    await self._arrived.wait()
            except TimeoutError:
                return "waited"
        return "alone"

    def _taken(self) -> list[_Waiting]:
        """The oldest, and what of its key fits beside it."""
        batch: list[_Waiting] = []
        rows = 0
        for each in list(self._queue):
            if batch and (each.work.key is None or each.work.key != batch[0].work.key):
                continue
            if batch and rows + each.work.num_rows > self._limits.batch_rows:
                break
            self._queue.remove(each)
            self._forget(each)
            batch.append(each)
            rows += each.work.num_rows
            if each.work.key is None:
                break
        return batch
