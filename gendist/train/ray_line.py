"""What a worker of a training run says to the driver, and that it is alive."""

from __future__ import annotations

import faulthandler
import logging
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import ray

FLUSH_INTERVAL_S = 0.2

logger = logging.getLogger("gendist")
Message = tuple[str, Any]


class Line:
    """The messages of rank 0 alone are heard, in their order."""

    def __init__(self, mailbox: Any, rank: int, silence_limit_s: float):
        self._mailbox, self._is_heard, self._limit_s = mailbox, rank == 0, silence_limit_s
        self._messages: list[Message] = []
        self._lock = threading.Lock()
        self._flushing, self._arming = threading.Lock(), threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._flush_now_and_then, daemon=True)
        self._alive_at = float("-inf")

    def record(self, record: Mapping[str, Any]) -> None:
        self._say(("record", dict(record)))

    def started(self, world_size: int) -> None:
        self._say(("started", world_size))

    def log(self, level: int, text: str) -> None:
        self._say(("log", (level, text)))

    def checkpoint(self) -> None:
        """A checkpoint stands: the losses of workers before it no longer count."""
        if self._is_heard:
            self._flush(num_checkpoints=1)  # at once: this worker may be the next to be lost

    def alive(self) -> None:
        """To be called by every worker, at least once in a step."""
        now = time.monotonic()
        with self._arming:
            if now - self._alive_at > min(1.0, self._limit_s / 10) and not self._closed.is_set():
                self._alive_at = now
                # A thread of C's, which a process that hangs in whatever place does not hinder, ends it when this is not called
                # again in time; where each thread was is written to the worker's log.
                faulthandler.dump_traceback_later(self._limit_s, exit=True)

    def _say(self, message: Message) -> None:
        if self._is_heard:
            with self._lock:
                self._messages.append(message)

    def __enter__(self) -> Line:
        self.alive()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._arming:  # threads that look ahead may still say that they are alive
            self._closed.set()
            faulthandler.cancel_dump_traceback_later()
        self._thread.join()

    def _flush_now_and_then(self) -> None:
        while not self._closed.wait(FLUSH_INTERVAL_S):
            self._flush()
        self._flush()

    def _flush(self, num_checkpoints: int = 0) -> None:
        with self._flushing:
            with self._lock:
                messages, self._messages = self._messages, []
            if messages or num_checkpoints:
                ray.get(self._mailbox.put.remote(messages, num_checkpoints))


@contextmanager
def log_over(line: Line) -> Iterator[None]:
    """What gendist logs in this worker is logged by the driver."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            line.log(record.levelno, record.getMessage())

    handler = Handler(logging.INFO)
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
