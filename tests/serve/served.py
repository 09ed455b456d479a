"""An application behind uvicorn, and a client of it, in this process."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
from live_server import running

TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Served:
    app: Any
    client: httpx.Client

    @property
    def batcher(self) -> Any:
        return self.app.state.server.batcher

    def post(self, path: str, **request: Any) -> httpx.Response:
        return self.client.post(path, **request)

    def get(self, path: str, **request: Any) -> httpx.Response:
        return self.client.get(path, **request)

    def connected(self) -> socket.socket:
        port = self.client.base_url.port
        assert port is not None
        return socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT_S)


@contextmanager
def serving(app: Any) -> Iterator[Served]:
    with running(app) as url, httpx.Client(base_url=url, timeout=TIMEOUT_S) as client:
        yield Served(app, client)


def until(holds: Callable[[], bool], what: str) -> None:
    """Wait for it."""
    deadline = time.monotonic() + TIMEOUT_S
    while not holds():
        assert time.monotonic() < deadline, f"not within {TIMEOUT_S:g} s: {what}"
        time.sleep(0.005)
