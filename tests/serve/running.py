"""An application behind uvicorn on a free port of this machine, in a thread of the test's process."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import uvicorn

TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Running:
    app: Any
    client: httpx.Client
    port: int

    @property
    def batcher(self) -> Any:
        return self.app.state.server.batcher

    def post(self, path: str, **request: Any) -> httpx.Response:
        return self.client.post(path, **request)

    def get(self, path: str, **request: Any) -> httpx.Response:
        return self.client.get(path, **request)

    def connected(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=TIMEOUT_S)


def until(holds: Callable[[], bool], what: str) -> None:
    """Wait for it."""
    deadline = time.monotonic() + TIMEOUT_S
    while not holds():
        assert time.monotonic() < deadline, f"not within {TIMEOUT_S:g} s: {what}"
        time.sleep(0.005)


@contextmanager
def running(app: Any) -> Iterator[Running]:
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_config=None, timeout_graceful_shutdown=2)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        until(lambda: server.started, "the server has started")
        port = server.servers[0].sockets[0].getsockname()[1]
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=TIMEOUT_S) as client:
            yield Running(app, client, port)
    finally:
        server.should_exit = True
        thread.join(TIMEOUT_S)
