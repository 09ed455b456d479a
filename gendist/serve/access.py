"""Who may ask, and what is noted of each request: the outermost layer of the application, plain ASGI.

A server that is for this machine alone refuses peers from elsewhere, and, since a page of any site may have a browser here ask,
names that are not this machine's (DNS rebinding). The server below (uvicorn) may already have put what X-Forwarded-For says in
the place of the peer; and who comes by way of a proxy on this machine may be from anywhere. So whatever is said to be forwarded
is refused there, too: neither HAProxy nor Serve's own proxy says so of what `gendist serve` answers.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import json
import logging
import re
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gendist.serve.bodies import ClientGone
from gendist.serve.problems import Problem
from gendist.serve.request_ids import request_id

access_logger = logging.getLogger("gendist.access")
logger = logging.getLogger("gendist")

CLIENT_GONE = 499  # as nginx notes it; nobody is told
OPEN = frozenset({"/healthz"})
PAGE = ("/", "/page/")  # may be loaded without a token; what it asks for then may not
FORWARDED = re.compile(rb"forwarded|x-forwarded-.*|x-real-ip")  # what proxies say of whom they ask for
LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
SECURITY = [(b"x-content-type-options", b"nosniff"), (b"cross-origin-resource-policy", b"same-origin")]
PAGE_HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' blob: data:; object-src 'none'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "x-frame-options": "DENY",
}
EXPOSED = "X-Request-ID, X-Gendist-Model-Digest, X-Gendist-Seed, X-Gendist-Offset, X-Gendist-Num-Samples, Retry-After"


@dataclass(slots=True)
class Record:
    """What is noted of a request, while it is served. Times are in seconds."""

    request_id: str
    began: float
    model: str | None = None
    verb: str | None = None
    status: int = 0
    rows: int = 0
    bytes: int = 0
    wait_s: float | None = None
    compute_s: float = 0.0
    seed: int | None = None
    is_started: bool = field(default=False)
    is_complete: bool = field(default=False)


class Access:
    """tokens: any of them is good; none: everybody may. loopback_only: peers on this machine alone. cors_origins: of pages that
    may call from a browser."""

    def __init__(self, tokens: Collection[str] = (), loopback_only: bool = False, cors_origins: Collection[str] = ()) -> None:
        self._digests = [hashlib.sha256(token.encode()).digest() for token in tokens]
        self._loopback_only = loopback_only
        self._origins = frozenset(origin.encode() for origin in cors_origins)

    def check_peer(self, scope: Scope) -> None:
        """Problem where it is from elsewhere and may not ask."""
        if not self._loopback_only:
            return
        client = scope.get("client")
        if client is None or not _is_loopback(client[0]):
            raise Problem(403, "this server answers its own machine alone; give it tokens to answer others")
        if any(FORWARDED.fullmatch(name) for name, _ in scope["headers"]):
            raise Problem(403, "this server answers its own machine alone, not by way of a proxy; give it tokens to do so")
        host = _header(scope, b"host") or b""
        name = re.sub(r":[0-9]*$", "", host.decode("latin-1")).strip("[]").lower()
        if name not in LOCAL_NAMES:
            raise Problem(403, "this server answers its own machine alone", "host", "localhost or 127.0.0.1")

    def check_token(self, scope: Scope) -> None:
        """Problem where it has none of the tokens that are needed."""
        path = _path(scope)
        if not self._digests or path in OPEN or path == PAGE[0] or path.startswith(PAGE[1]):
            return
        scheme, _, token = (_header(scope, b"authorization") or b"").partition(b" ")
        digest = hashlib.sha256(token.strip()).digest()
        # All are compared, so that the time says nothing.
        good = [hmac.compare_digest(digest, each) for each in self._digests]
        if scheme.lower() != b"bearer" or not any(good):
            said = "the token is not known here" if token else "a token is needed"
            raise Problem(401, said, "authorization", "Bearer TOKEN", headers={"www-authenticate": 'Bearer realm="gendist"'})

    def cors(self, scope: Scope) -> list[tuple[bytes, bytes]]:
        """The headers for a page of another origin that may call."""
        if not self._origins:
            return []
        origin = _header(scope, b"origin")
        if origin is None or not (origin in self._origins or b"*" in self._origins):
            return [(b"vary", b"Origin")]
        return [
            (b"vary", b"Origin"),
            (b"access-control-allow-origin", origin),
            (b"access-control-expose-headers", EXPOSED.encode()),
        ]

    def is_preflight(self, scope: Scope) -> bool:
        """A browser asks whether a page may call; it sends no token along."""
        return (
            bool(self._origins)
            and scope["method"] == "OPTIONS"
            and _header(scope, b"access-control-request-method") is not None
        )


class Edge:
    """What every request passes through: whether it may, and, when it is done, a line in the log and the metrics. Whatever goes
    wrong inside is answered in the one shape of errors, or, where part of the answer is sent already, by cutting it off."""

    def __init__(self, app: ASGIApp, access: Access, answered: Callable[[Record], None]) -> None:
        self._app, self._access, self._answered = app, access, answered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close"})  # before it is accepted: 403
            return
        record = Record(request_id(scope["headers"]), time.monotonic())
        scope["gendist"] = record
        further = [(b"x-request-id", record.request_id.encode()), *SECURITY, *self._access.cors(scope)]

        async def noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status, record.is_started = message["status"], True
                message = {**message, "headers": [*message.get("headers", ()), *further]}
            else:
                record.bytes += len(message.get("body", b""))
                record.is_complete = not message.get("more_body", False)
            await send(message)

        try:
            self._access.check_peer(scope)
            if self._access.is_preflight(scope):
                await send_whole(noted, 204, PREFLIGHT, b"")
            else:
                self._access.check_token(scope)
                await self._app(scope, receive, noted)
        except ClientGone:
            record.status = CLIENT_GONE
        except asyncio.CancelledError:
            record.status = CLIENT_GONE
            raise
        except Problem as problem:
            await self._fail(record, noted, problem)
        except Exception:
            logger.exception("request %s failed", record.request_id)
            await self._fail(record, noted, Problem(500, f"the server failed; its log says why (request {record.request_id})"))
        finally:
            self._answered(record)
            if access_logger.isEnabledFor(logging.INFO):
                access_logger.info(_line(scope, record))

    async def _fail(self, record: Record, send: Send, problem: Problem) -> None:
        if record.is_started:
            # The server below closes the connection of an answer that does not end, and the client sees that it is cut off.
            logger.warning("request %s is cut off: %s", record.request_id, problem.error)
            record.status = problem.status
            return
        await send_problem(send, problem)


PREFLIGHT = [
    (b"access-control-allow-methods", b"GET, POST"),
    (b"access-control-allow-headers", b"authorization, content-type, accept, x-request-id"),
    (b"access-control-max-age", b"600"),
]


async def send_whole(send: Send, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
    length = [] if status == 204 else [(b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": [*headers, *length]})
    await send({"type": "http.response.body", "body": body})


async def send_problem(send: Send, problem: Problem) -> None:
    headers = [(name.encode(), value.encode("latin-1")) for name, value in problem.headers.items()]
    await send_whole(send, problem.status, [(b"content-type", b"application/json"), *headers], problem.body())


def _header(scope: Scope, name: bytes) -> bytes | None:
    for each, value in scope["headers"]:
        if each == name:
            found: bytes = value
            return found
    return None


def _path(scope: Scope) -> str:
    """As the routes have it: without the prefix that the application stands at."""
    path, prefix = str(scope["path"]), scope.get("root_path", "")
    return path.removeprefix(prefix) if path == prefix or path.startswith(f"{prefix}/") else path


def _is_loopback(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_loopback)


def _line(scope: Scope, record: Record) -> str:
    """One line of JSON. Neither tokens nor query strings stand in it."""
    now = time.time()
    return json.dumps(
        {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now % 1 * 1000):03d}Z",
            "method": scope["method"],
            "path": scope["path"][:256],
            "model": record.model,
            "verb": record.verb,
            "status": record.status,
            "rows": record.rows,
            "bytes": record.bytes,
            "wait_ms": None if record.wait_s is None else round(1000 * record.wait_s, 3),
            "compute_ms": round(1000 * record.compute_s, 3),
            "total_ms": round(1000 * (time.monotonic() - record.began), 3),
            "seed": record.seed,
            "request_id": record.request_id,
        }
    )
