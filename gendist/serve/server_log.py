"""The log of a server: a line of JSON for each request, and what went wrong.

Replicas of a cluster write it to their standard error, which Ray keeps with its own logs. Those of `gendist serve`, with which
Ray's logs go, write it into a pipe that it shows on its own standard error. No request waits until that is read: a thread
writes, a little later, and what nobody reads for long is lost.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread
from typing import BinaryIO, TextIO

VARIABLE = "GENDIST_LOG"  # of a replica's environment: the pipe
LAST_LINES_S = 5.0
LATER_S = 0.2
MOST_LINES = 100_000  # that wait to be written


def write_log() -> None:
    """From now on, of this process."""
    path = os.environ.get(VARIABLE)
    # A line of less than 4096 bytes goes into a pipe in one piece, also where several write to it.
    handler = logging.FileHandler(path, encoding="utf-8") if path else logging.StreamHandler()
    logger = logging.getLogger("gendist")
    logger.handlers, logger.propagate = [_Later(handler)], False
    logging.getLogger("gendist.access").setLevel(logging.INFO)


class _Later(logging.Handler):
    """Hands records to another handler, in a thread."""

    def __init__(self, handler: logging.Handler) -> None:
        super().__init__()
        self._handler = handler
        self._waiting: deque[logging.LogRecord] = deque(maxlen=MOST_LINES)
        self._is_urgent = threading.Event()
        Thread(target=self._run, name="log", daemon=True).start()
        atexit.register(self._end)

    def emit(self, record: logging.LogRecord) -> None:
        self._waiting.append(record)
        if record.levelno > logging.INFO:
            self._is_urgent.set()

    def _run(self) -> None:
        while True:
            self._is_urgent.wait(LATER_S)
            self._is_urgent.clear()
            while self._waiting:
                self._handler.handle(self._waiting.popleft())

    def _end(self) -> None:
        """Wait for the last lines, if somebody reads them."""
        until = time.monotonic() + LAST_LINES_S
        while self._waiting and time.monotonic() < until:
            self._is_urgent.set()
            time.sleep(0.01)


@contextmanager
def shown_log(path: Path, on: TextIO) -> Iterator[Mapping[str, str]]:
    """A pipe at `path`, all of which is shown until those who write into it have ended; yields what tells them of it."""
    os.mkfifo(path, 0o600)
    pipe = open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb")  # noqa: SIM115  (nobody writes yet, whom it would wait for)
    os.set_blocking(pipe.fileno(), True)
    writer = os.open(path, os.O_WRONLY)  # else it would end with the first replica that does
    thread = Thread(target=_show, args=(pipe, on), daemon=True)
    thread.start()
    try:
        yield {VARIABLE: str(path)}
    finally:
        os.close(writer)
        thread.join(LAST_LINES_S)


def _show(pipe: BinaryIO, on: TextIO) -> None:
    with pipe:
        for line in pipe:
            with suppress(OSError, ValueError):  # whoever read it is gone; the replicas must not wait for that
                on.write(line.decode(errors="replace"))
                on.flush()
