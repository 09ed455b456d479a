"""What a request is called, in its answer and in the log: as the client says, where that may stand there, else by a new name.

Ray Serve says it, too, as the client did, whatever that is, beside what the application says. `middlewares` is what Serve is
told of (RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH), in its proxy and before replicas: they stand around what it does itself.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

NAME = b"x-request-id"
SANE_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")


def request_id(headers: Iterable[tuple[bytes, bytes]]) -> str:
    said = next((value for name, value in headers if name == NAME), b"")
    return said.decode() if SANE_ID.fullmatch(said) else secrets.token_hex(8)


class OneRequestId:
    """There is one in the request and one in the answer, and it is the same."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        own = (NAME, request_id(scope["headers"]).encode())

        async def once(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*_others(message.get("headers", ())), own]}
            await send(message)

        await self._app({**scope, "headers": [*_others(scope["headers"]), own]}, receive, once)


def _others(headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    return [(name, value) for name, value in headers if name.lower() != NAME]


def middlewares() -> list[Middleware]:
    return [Middleware(OneRequestId)]
