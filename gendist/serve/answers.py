"""One answer on its way: its chunks through the batcher, one at a time with one ahead, and as bytes to the client, for as long
as somebody waits for it."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager, closing
from typing import Any

from starlette.types import Receive, Send

from gendist.protocols import UserError
from gendist.serve.access import Record, send_whole
from gendist.serve.batcher import Batcher, Busy, Closed, Work
from gendist.serve.bodies import ClientGone
from gendist.serve.calls import InvalidCall, together
from gendist.serve.formats import Encoder, Values
from gendist.serve.limits import Limits
from gendist.serve.problems import Problem

Headers = list[tuple[bytes, bytes]]

SLICE_BYTES = 128 * 2**10  # of an answer that the server below is given at once, and keeps where the client does not read


class Clock:
    """Of a request up to its first result, after which each part of its answer has its own time."""

    def __init__(self, timeout: asyncio.Timeout) -> None:
        self._timeout, self.is_body_here = timeout, False

    def stop(self) -> None:
        self._timeout.reschedule(None)


@asynccontextmanager
async def until_first_result(time_limit_s: float) -> AsyncIterator[Clock]:
    """Cancels what is inside when the clock is not stopped in time; then Problem."""
    try:
        async with asyncio.timeout(time_limit_s) as timeout:
            clock = Clock(timeout)
            yield clock
    except TimeoutError:
        if not clock.is_body_here:
            raise Problem(408, f"the body did not come within {time_limit_s:g} s", headers={"connection": "close"}) from None
        raise _too_late(time_limit_s) from None


def _too_late(time_limit_s: float) -> Problem:
    return Problem(504, f"it was not computed within {time_limit_s:g} s", allowed="a smaller request, or another time")


@asynccontextmanager
async def while_somebody_waits(receive: Receive, record: Record) -> AsyncIterator[None]:
    """Cancels what is inside when the client hangs up before its answer is whole; then `ClientGone`."""
    task = asyncio.current_task()
    assert task is not None
    is_gone = False

    async def watch() -> None:
        nonlocal is_gone
        while (await receive())["type"] != "http.disconnect":
            pass
        if not record.is_complete:
            is_gone = True
            task.cancel()

    watcher = asyncio.create_task(watch())
    try:
        yield
    except asyncio.CancelledError:
        if is_gone and task.uncancel() == 0:
            raise ClientGone from None
        raise
    finally:
        watcher.cancel()


def _num_bytes(chunk: Mapping[str, Values]) -> int:
    return sum(sum(each.nbytes for each in values) if isinstance(values, list) else values.nbytes for values in chunk.values())


async def _parts(encoder: Encoder, chunk: Mapping[str, Values]) -> AsyncIterator[bytes]:
    """The bytes of a chunk. Between its slices others have a turn: numbers become text slowly."""
    for number, piece in enumerate(encoder.slices(chunk)):
        if number:
            await asyncio.sleep(0)
        yield encoder.rows(piece)


class Line:
    """What a request has computed, and what that took, which is noted in its record."""

    def __init__(
        self,
        batcher: Batcher,
        limits: Limits,
        record: Record,
        clock: Clock | None = None,
        hold: Callable[[int], None] = lambda num_bytes: None,
    ) -> None:
        """
        clock  that the first result stops
        hold   is told of the bytes that are kept for a client that may read slowly
        """
        self._batcher, self._limits, self._record = batcher, limits, record
        self._clock, self._hold = clock, hold

    async def result(self, work: Work, is_continued: bool = False, is_for_client: bool = True) -> Any:
        """Problem where there is no room for the work, it takes too long, or the model refuses it.

        is_for_client  False: something else is made of it first
        """
        queued = time.monotonic()
        try:
            timed = await self._batcher.result(work, is_continued=is_continued)
        except Busy as busy:
            seconds = str(max(1, math.ceil(busy.retry_after_s)))
            raise Problem(429, str(busy), headers={"retry-after": seconds}) from None
        except Closed as closed:
            raise Problem(503, str(closed), headers={"retry-after": "1"}) from None
        except TimeoutError:
            raise _too_late(self._limits.time_limit_s) from None
        except InvalidCall as error:
            raise Problem(422, str(error), error.field, error.allowed) from None
        except UserError as error:
            raise Problem(422, str(error)) from None
        if self._clock is not None and is_for_client:
            self._clock.stop()
        record = self._record
        record.wait_s = (record.wait_s or 0.0) + max(timed.began - queued, 0.0)
        record.compute_s += timed.ended - timed.began
        return timed.result

    async def all_of(self, works: Iterable[Work]) -> Mapping[str, Values]:
        """What they come to, joined, of which something is made for the client."""
        chunks: list[Mapping[str, Values]] = []
        for work in works:
            chunks.append(await self.result(work, is_for_client=False))
            self._hold(2 * _num_bytes(chunks[-1]))  # and once more where they are joined
        return together(chunks)

    async def send(self, send: Send, headers: Headers, encoder: Encoder, works: Iterator[Work]) -> None:
        """Answer with what these works come to. The first is computed before anything is sent, so that what is wrong with the
        request is told by the status; the next is queued while the one before is sent, and no other."""
        with closing(encoder):
            await self._send(send, headers, encoder, works)

    async def _send(self, send: Send, headers: Headers, encoder: Encoder, works: Iterator[Work]) -> None:
        first: Mapping[str, Values] = await self.result(next(works))
        ahead = next(works, None)
        head = encoder.begin(first)
        if ahead is None:
            content = b"".join([head] + [part async for part in _parts(encoder, first)] + [encoder.end()])
            await self.send_whole(send, headers, content)
            return
        self._hold(2 * _num_bytes(first))  # this chunk, and the next
        num_bytes = encoder.num_bytes(first)
        length = [] if num_bytes is None else [(b"content-length", b"%d" % num_bytes)]
        pending: asyncio.Task[Any] | None = self._queued(ahead)
        try:
            await send({"type": "http.response.start", "status": 200, "headers": [*headers, *length]})
            await self._part(send, head)
            chunk: Mapping[str, Values] | None = first
            while chunk is not None:
                async for part in _parts(encoder, chunk):
                    await self._part(send, part)
                chunk = None if pending is None else await pending
                ahead = None if chunk is None else next(works, None)
                pending = None if ahead is None else self._queued(ahead)
            await self._part(send, encoder.end(), more_body=False)
        finally:
            if pending is not None:
                pending.cancel()

    async def send_whole(self, send: Send, headers: Headers, content: bytes) -> None:
        if len(content) <= SLICE_BYTES:
            await send_whole(send, 200, headers, content)
            return
        self._hold(len(content))
        length = (b"content-length", b"%d" % len(content))
        await send({"type": "http.response.start", "status": 200, "headers": [*headers, length]})
        await self._part(send, content, more_body=False)

    def _queued(self, work: Work) -> asyncio.Task[Any]:
        task = asyncio.create_task(self.result(work, is_continued=True))
        task.add_done_callback(lambda done: done.cancelled() or done.exception())  # whether or not anybody asks
        return task

    async def _part(self, send: Send, content: bytes, more_body: bool = True) -> None:
        """Slice by slice: each has its own time, so that who reads slowly is not taken for one who does not read."""
        try:
            for start in range(0, max(len(content), 1), SLICE_BYTES):
                body, is_more = content[start : start + SLICE_BYTES], more_body or start + SLICE_BYTES < len(content)
                async with asyncio.timeout(self._limits.time_limit_s):
                    await send({"type": "http.response.body", "body": body, "more_body": is_more})
        except TimeoutError:
            raise Problem(408, f"the client took nothing for {self._limits.time_limit_s:g} s") from None
