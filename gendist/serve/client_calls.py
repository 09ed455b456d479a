"""What a client asks of a server, and what it makes of the answers: without a connection, which is for `client` to have, where
it is said, too, whether others have their turn meanwhile.

A call is a generator: it yields a `Request` for each `Answer` that it needs, and returns what it was called for. A request is
repeated where that may help: a connection that fails, a server that is busy or about to be replaced. That is safe: without a
seed one is drawn here, so that the same request has the same answer.
"""

from __future__ import annotations

import io
import json
import random
import secrets
import time
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import quote

import httpx
import numpy as np
import pyarrow as pa

from gendist.column_names import LABEL, STATE
from gendist.errors import UserError
from gendist.serve.arrow_messages import Messages
from gendist.serve.client_arrays import Array, Samples, encoded, in_json, samples_of, split
from gendist.serve.media_types import ARROW, JSON, NPY, NPZ, PNG

T = TypeVar("T")

MAX_DRAWN_SEED = 2**53  # a JSON reader anywhere has the same number
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 5.0
NOT_NOW = frozenset({429, 502, 503})  # not 504: what took too long once would take a server's time again


class RequestError(UserError):
    """The server has refused a request (a status of 4xx), for the reason in the message.

    status; field: what of the request was at fault; allowed: what it may be
    """

    def __init__(self, status: int, error: str, field: str | None = None, allowed: str | None = None) -> None:
        super().__init__(f"{error}; allowed: {allowed}" if allowed else error)
        self.status, self.field, self.allowed = status, field, allowed


class NotAllowed(RequestError):
    """Without a token that the server knows (401, 403)."""


class NotFound(RequestError):
    """No such model or figure (404)."""


class NotOffered(RequestError):
    """The model's family does not have this verb, for the reason in the message (405)."""


class ServerError(RuntimeError):
    """The server could not be reached, was busy for too long, failed, or answered what cannot be. status: of its answer."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


KINDS: Mapping[int, type[RequestError]] = {401: NotAllowed, 403: NotAllowed, 404: NotFound, 405: NotOffered}


class Again(Exception):
    """A failure after which the request may be sent again; after_s: how soon, where the server says."""

    def __init__(self, error: ServerError, after_s: float | None = None) -> None:
        super().__init__(str(error))
        self.error, self.after_s = error, after_s


FAILURES = (Again, httpx.TransportError, pa.ArrowException, OSError)  # after which a request is sent again


@dataclass(frozen=True)
class Request:
    """path: from the server's URL on. accept: the media type of the answer. parts: as httpx names them, of which it is made."""

    method: str
    path: str
    accept: str = JSON
    parts: Mapping[str, Any] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """digest: of the model that made it, where one did."""

    digest: str
    content: bytes

    def json(self) -> Any:
        try:
            return json.loads(self.content)
        except ValueError as error:
            raise ServerError(f"an answer that is no JSON ({error}); is it a gendist server?") from error


Call = Generator[Request, Answer, T]


class Attempts:
    """At one request: until when, and after what pause."""

    def __init__(self, url: str, timeout_s: float, max_retries: int) -> None:
        self._url, self._timeout_s, self._max_retries = url, timeout_s, max_retries
        self.renew()

    def renew(self) -> None:
        """Something came of it: time and failures are counted from here."""
        self._deadline, self._failures = time.monotonic() + self._timeout_s, 0

    @property
    def left_s(self) -> float:
        return max(self._deadline - time.monotonic(), 0.001)

    def check(self) -> None:
        """Before a further part of an answer is waited for."""
        if time.monotonic() > self._deadline:
            raise httpx.ReadTimeout("the answer takes too long")

    def pause_s(self, error: Exception) -> float:
        """Until the next, after one of `FAILURES`; ServerError where there is none."""
        again = error if isinstance(error, Again) else Again(_unreachable(self._url, error))
        if self._failures >= self._max_retries:
            raise again.error from error
        # Half of it at random, so that clients that were turned away together do not come again together.
        pause_s = min(FIRST_PAUSE_S * 2.0**self._failures, LONGEST_PAUSE_S) * (0.5 + 0.5 * random.random())
        pause_s = max(pause_s, again.after_s or 0.0)
        if time.monotonic() + pause_s >= self._deadline:
            raise again.error from error
        self._failures += 1
        return pause_s


class Calls:
    """The calls that a server answers."""

    def __init__(self, url: str, token: str | None, timeout_s: float, max_retries: int) -> None:
        if not url.startswith(("http://", "https://")):
            raise UserError(f"url {url!r}: an address such as http://127.0.0.1:8000 is needed")
        self.url = url.rstrip("/")
        self._headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        self._timeout_s, self._max_retries = timeout_s, max_retries
        self._descriptions: dict[str, dict[str, Any]] = {}

    def attempts(self) -> Attempts:
        return Attempts(self.url, self._timeout_s, self._max_retries)

    def sent(self, request: Request, attempts: Attempts) -> dict[str, Any]:
        """The arguments of httpx for a request."""
        headers = {**self._headers, "Accept": request.accept, **request.headers}
        timeout = httpx.Timeout(attempts.left_s)
        return {
            "method": request.method,
            "url": self.url + request.path,
            "headers": headers,
            "timeout": timeout,
            **request.parts,
        }

    # Models

    def models(self) -> Call[list[dict[str, Any]]]:
        """What the server says of each of its models."""
        answer = yield Request("GET", "/models")
        models: list[dict[str, Any]] = answer.json()["models"]
        return models

    def model(self, name: str) -> Call[dict[str, Any]]:
        """What the server says of one: its family, columns, labels, the verbs that it offers and why not the others."""
        answer = yield Request("GET", _path(name))
        description: dict[str, Any] = answer.json()
        self._descriptions[name] = description
        return description

    def _known(self, name: str) -> Call[dict[str, Any]]:
        return self._descriptions[name] if name in self._descriptions else (yield from self.model(name))

    def described_by(self, digest: str, name: str) -> Call[dict[str, Any]]:
        """What the server says of the model that made the answer."""
        description = yield from self._known(name)
        return description if description["digest"] == digest else (yield from self.model(name))

    # Samples

    def sample(
        self,
        name: str,
        num_samples: int,
        *,
        seed: int | None = None,
        offset: int = 0,
        given: Any = None,
        length: int | None = None,
    ) -> Call[Samples]:
        """num_samples rows, or sequences, offset.. of the endless sample that belongs to the seed, which is drawn where none is
        given.

        given   a label or component to draw from alone
        length  of sequences, in steps
        """
        body = _sample_body(num_samples, seed, offset, given, length)
        answer = yield Request("POST", _path(name, "sample"), NPZ, {"json": body})
        with np.load(io.BytesIO(answer.content), allow_pickle=False) as arrays:
            parts = {key: arrays[key] for key in arrays.files}
        columns = tuple((yield from self.described_by(answer.digest, name))["columns"])
        return Samples(parts["x"], parts.get(LABEL), parts.get(STATE), body["seed"], offset, columns, answer.digest)

    def sample_chunks(
        self,
        name: str,
        num_samples: int,
        *,
        seed: int | None = None,
        offset: int = 0,
        given: Any = None,
        length: int | None = None,
    ) -> Chunks:
        """The same rows, some at a time, as many as the server makes at once. Where the connection breaks it goes on from the
        row that it has come to; ServerError where the model has become another one meanwhile."""
        return Chunks(self, name, _sample_body(num_samples, seed, offset, given, length))

    def picture(
        self,
        name: str,
        num_samples: int = 1,
        *,
        seed: int | None = None,
        offset: int = 0,
        given: Any = None,
        length: int | None = None,
    ) -> Call[bytes]:
        """The bytes of a PNG file: the samples as one picture."""
        body = _sample_body(num_samples, seed, offset, given, length)
        return (yield Request("POST", _path(name, "sample"), PNG, {"json": body})).content

    def figure(self, name: str, figure: str, seed: int = 0) -> Call[bytes]:
        """The bytes of a PNG file: one of the family's own figures, which `model` names."""
        return (yield Request("GET", _path(name, "figures", figure), PNG, {"params": {"seed": str(seed)}})).content

    # What is said of data. x is an array (N, D), of sequences a list of (T, D) or an array (S, T, D), or a data frame.

    def log_prob(self, name: str, x: Any) -> Call[Array]:
        """(N,) log p(x) in nats."""
        return self._array(name, "log_prob", x)

    def elbo(self, name: str, x: Any, *, seed: int = 0, offset: int = 0, given: Any = None) -> Call[Array]:
        """(N,) a lower bound of log p(x), by one latent a row, which belongs to the seed and the row's number, offset.."""
        return self._array(name, "elbo", x, seed=seed, offset=offset, given=given)

    def log_prob_bound(
        self, name: str, x: Any, *, num_samples: int | None = None, seed: int = 0, offset: int = 0, given: Any = None
    ) -> Call[Array]:
        """(N,) a tighter one, by num_samples latents a row."""
        return self._array(name, "log_prob_bound", x, num_samples=num_samples, seed=seed, offset=offset, given=given)

    def encode(self, name: str, x: Any, *, given: Any = None) -> Call[Any]:
        """(N, L) what the family represents rows by; of each sequence (T, K), a list."""
        return self._answer(name, "encode", x, given=given)

    def decode(self, name: str, z: Any, *, given: Any = None) -> Call[Array]:
        """(N, D) the means of x given latents (N, L), or given components, classes or states (N,), integers."""
        return self._array(name, "decode", z, given=given)

    def classify(self, name: str, x: Any) -> Call[Array]:
        """(N, C) log p(label | x), columns in the order of the labels."""
        return self._array(name, "classify", x)

    def impute(self, name: str, x: Any, *, seed: int | None = None, offset: int = 0) -> Call[Any]:
        """(N, D) x with its missing entries (NaN) filled in, by their mean or, with a seed, by a draw; of sequences a list."""
        return self._answer(name, "impute", x, seed=seed, offset=offset if seed is not None else None)

    def reconstruct(self, name: str, x: Any, *, given: Any = None) -> Call[Array]:
        """(N, D) the decoded representation of x."""
        return self._array(name, "reconstruct", x, given=given)

    def _array(self, name: str, verb: str, x: Any, **options: Any) -> Call[Array]:
        answer = yield from self._answer(name, verb, x, **options)
        return np.stack(answer) if isinstance(answer, list) else answer

    def _answer(self, name: str, verb: str, x: Any, **options: Any) -> Call[Any]:
        said = {key: value for key, value in options.items() if value is not None}
        description = yield from self._known(name)
        is_of_sequences = description["takes_sequences"] and verb != "decode"
        body, media_type, is_ragged = encoded(x, description if is_of_sequences else None)
        given: Any = said.get("given")
        if isinstance(given, list | tuple) or getattr(given, "ndim", 0) > 0:
            # A label a row is more than a query string holds.
            said["given"] = given.tolist() if hasattr(given, "tolist") else list(given)
            if media_type != NPY:
                raise UserError("given: a label for each row goes with an array, not with a data frame; pass frame.to_numpy()")
            content = json.dumps({("z" if verb == "decode" else "x"): in_json(np.asarray(x)), **said}, allow_nan=False)
            body, media_type, said = content.encode(), JSON, {}
        wants = ARROW if is_ragged and verb in ("encode", "impute") else NPY
        parts = {"content": body, "params": {key: str(value) for key, value in said.items()}}
        answer = yield Request("POST", _path(name, verb), wants, parts, {"Content-Type": media_type})
        if wants == ARROW:
            columns = description["columns"] if verb == "impute" else ()
            return split(pa.ipc.open_stream(answer.content).read_all(), description, columns)
        values: Array = np.load(io.BytesIO(answer.content), allow_pickle=False)
        return list(values) if is_of_sequences and values.ndim == 3 else values


class Chunks:
    """Of one sample: what is asked for next, and what has come of it."""

    def __init__(self, calls: Calls, name: str, body: Mapping[str, Any]) -> None:
        self._calls, self._name, self._body = calls, name, body
        self._num_done, self._messages = 0, Messages()
        self._digest: str | None = None
        self._description: Mapping[str, Any] = {}
        self.attempts = calls.attempts()

    @property
    def is_done(self) -> bool:
        # Of no rows, too, the server says what it has against it.
        return self._digest is not None and self._num_done >= self._body["num_samples"]

    def request(self) -> Request:
        """For the rows that are still to come."""
        offset, num_left = self._body["offset"] + self._num_done, self._body["num_samples"] - self._num_done
        body = {**self._body, "offset": offset, "num_samples": num_left}
        return Request("POST", _path(self._name, "sample"), ARROW, {"json": body})

    def begun(self, digest: str) -> Call[None]:
        """An answer has begun, of the model of this digest."""
        if self._digest not in (None, digest):
            raise ServerError(f"{self._name} is another model now than when the samples began; begin anew")
        self._description = yield from self._calls.described_by(digest, self._name)
        self._digest, self._messages = digest, Messages()

    def fed(self, part: bytes) -> Iterator[Samples]:
        """The chunks that are whole with this part of the answer."""
        assert self._digest is not None
        length, seed = self._body.get("length"), self._body["seed"]
        for batch in self._messages.fed(part):
            offset = self._body["offset"] + self._num_done
            chunk = samples_of(pa.table(batch), self._description, length, seed, offset, self._digest)
            self._num_done += len(chunk.x)
            yield chunk
            self.attempts.renew()

    def ended(self) -> None:
        """So has the answer."""
        if not self.is_done:
            told = f"the answer broke off after {self._num_done} of {self._body['num_samples']} rows"
            raise Again(ServerError(told))


def _path(name: str, *rest: str) -> str:
    return "/".join(["/models", *(quote(part, safe="") for part in (name, *rest))])


def _sample_body(num_samples: int, seed: int | None, offset: int, given: Any, length: int | None) -> dict[str, Any]:
    drawn = secrets.randbelow(MAX_DRAWN_SEED) if seed is None else int(seed)
    given = given.item() if isinstance(given, np.generic) else given
    body = {"num_samples": int(num_samples), "seed": drawn, "offset": int(offset), "given": given}
    return body if length is None else {**body, "length": int(length)}


def digest_of(answer: httpx.Response) -> str:
    digest: str = answer.headers.get("X-Gendist-Model-Digest", "")
    return digest


def refused(answer: httpx.Response) -> Exception:
    """The server's own line, as the exception that its status calls for."""
    try:
        problem = answer.json()
        error, field, allowed = str(problem["error"]), problem.get("field"), problem.get("allowed")
    except (ValueError, KeyError, TypeError):
        error, field, allowed = f"{answer.request.url}: status {answer.status_code}", None, None
    status = answer.status_code
    if status in NOT_NOW:
        return Again(ServerError(error, status), _seconds(answer.headers.get("Retry-After")))
    if 400 <= status < 500:
        return KINDS.get(status, RequestError)(status, error, field, allowed)
    return ServerError(error, status)


def _seconds(retry_after: str | None) -> float | None:
    return float(retry_after) if retry_after is not None and retry_after.isdecimal() else None


def _unreachable(url: str, error: Exception) -> ServerError:
    return ServerError(f"{url}: {str(error) or type(error).__name__}; is a server running there?")
