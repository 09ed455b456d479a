"""The driver's ear while workers train: their messages, and whether the cluster has room for them."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import ray

from gendist.ray_cluster import Lookout

WAITING_S = 30.0

logger = logging.getLogger("gendist")


@dataclass
class Listener:
    """On the driver, in a thread: hands messages on while the workers are at work, and looks whether there is room for them.

    error  why the run was stopped from here
    """

    mailbox: Any
    watch: Callable[[dict[str, Any]], None]
    lookout: Lookout
    stop_run: Callable[[], None]
    error: BaseException | None = None
    _ended: threading.Event = field(default_factory=threading.Event)
    _waiting_since: float | None = field(default_factory=time.monotonic)

    def __enter__(self) -> Listener:
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join()

    def _listen(self) -> None:
        try:
            ended = False
            while not ended:
                ended = self._ended.is_set()  # then what is there is heard once more
                messages = ray.get(self.mailbox.take.remote())
                for message in messages:
                    self._hear(*message)
                if not messages and not ended:
                    self._look_for_room()
        except BaseException as error:
            self.error = error
            self.stop_run()

    def _hear(self, kind: str, content: Any) -> None:
        if kind == "record":
            self.watch(content)
        elif kind == "started":
            self._waiting_since = None
            logger.info("training with %d worker%s", content, "" if content == 1 else "s")
        elif kind == "lost":
            self._waiting_since = time.monotonic()
            logger.warning(content)
        else:
            logger.log(*content)

    def _look_for_room(self) -> None:
        there, now = self.lookout.look(), time.monotonic()
        if self._waiting_since is not None and now - self._waiting_since > WAITING_S:
            self._waiting_since = now
            free = int(ray.available_resources().get("CPU", 0))
            logger.info("waiting for workers: %d CPUs of the cluster are free, it has room for %d workers", free, there)
