"""A server's models from Python: arrays in, arrays out, and nothing to install but NumPy, PyArrow and httpx.

    >>> from gendist.serve.client import Client
    >>> client = Client("http://127.0.0.1:8000", token=None)
    >>> samples = client.sample("digits", 100, seed=7, given=3)
    >>> samples.x.shape, samples.label[:2], samples.seed
    ((100, 64), array([3, 3]), 7)
    >>> client.log_prob("digits", samples.x)  # as gendist.load("runs/digits").log_prob(x)
    array([...])
    >>> for chunk in client.sample_chunks("digits", 10_000_000):  # in bounded memory; goes on where a connection broke
    ...     writer.write(chunk.x)

A request is repeated where that may help: a connection that fails, a server that is busy or about to be replaced. That is safe:
without a seed the client draws one, so that the same request has the same answer.
"""

from __future__ import annotations

import io
import json
import random
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self
from urllib.parse import quote

import httpx
import numpy as np
import pyarrow as pa

from gendist.column_names import LABEL, STATE
from gendist.errors import UserError
from gendist.serve.client_arrays import Array, Samples, encoded, in_json, samples_of, split
from gendist.serve.media_types import ARROW, JSON, NPY, NPZ, PNG

MAX_SEED = 2**53  # of those that are drawn: a JSON reader anywhere has the same number
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


class _Again(Exception):
    """A failure that may be another's turn; after_s: how soon, where the server says."""

    def __init__(self, error: ServerError, after_s: float | None = None) -> None:
        super().__init__(str(error))
        self.error, self.after_s = error, after_s


class Client:
    """A server. It may be shared by threads, and is closed at the end of a `with`."""

    def __init__(
        self,
        url: str,
        token: str | None = None,
        timeout_s: float = 60.0,
        max_retries: int = 8,
        http: httpx.Client | None = None,
    ) -> None:
        """
        url          such as http://127.0.0.1:8000, with the path that the server stands at, if any
        token        where the server asks for one
        timeout_s    of a call with all that it repeats; of `sample_chunks` until the next chunk
        max_retries  of a request
        http         an httpx.Client with settings of its own, such as proxies or certificates; it is not closed
        """
        if not url.startswith(("http://", "https://")):
            raise UserError(f"url {url!r}: an address such as http://127.0.0.1:8000 is needed")
        self._is_own, self._http = http is None, http or httpx.Client(follow_redirects=False)
        self._url = url.rstrip("/")
        self._headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        self._timeout_s, self._max_retries = timeout_s, max_retries
        self._descriptions: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._is_own:
            self._http.close()

    # Models

    def models(self) -> list[dict[str, Any]]:
        """What the server says of each of its models."""
        models: list[dict[str, Any]] = self._get("/models").json()["models"]
        return models

    def model(self, name: str) -> dict[str, Any]:
        """What the server says of one: its family, columns, labels, the verbs that it offers and why not the others."""
        description: dict[str, Any] = self._get(_path(name)).json()
        self._descriptions[name] = description
        return description

    def _known(self, name: str) -> dict[str, Any]:
        return self._descriptions[name] if name in self._descriptions else self.model(name)

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
    ) -> Samples:
        """num_samples rows, or sequences, offset.. of the endless sample that belongs to the seed, which is drawn where none is
        given.

        given   a label or component to draw from alone
        length  of sequences, in steps
        """
        body = _sample_body(num_samples, seed, offset, given, length)
        answer = self._post(name, "sample", NPZ, json=body)
        with np.load(io.BytesIO(answer.content), allow_pickle=False) as arrays:
            parts = {key: arrays[key] for key in arrays.files}
        columns = tuple(self._described_by(answer.digest, name)["columns"])
        return Samples(
            parts["x"], parts.get(LABEL), parts.get(STATE), body["seed"], offset, columns, answer.digest
        )  # fmt: skip

    def sample_chunks(
        self,
        name: str,
        num_samples: int,
        *,
        seed: int | None = None,
        offset: int = 0,
        given: Any = None,
        length: int | None = None,
    ) -> Iterator[Samples]:
        """The same rows, some at a time, as many as the server makes at once. Where the connection breaks it goes on from the
        row that it has come to; ServerError where the model has become another one meanwhile."""
        body = _sample_body(num_samples, seed, offset, given, length)
        done, failures, digest = 0, 0, None
        deadline = time.monotonic() + self._timeout_s
        while digest is None or done < num_samples:  # of no rows, too, the server says what it has against it
            rest = {**body, "offset": offset + done, "num_samples": num_samples - done}
            try:
                with self._sent("POST", _path(name, "sample"), deadline, ARROW, json=rest) as answer:
                    if digest not in (None, _digest(answer)):
                        raise ServerError(f"{name} is another model now than when the samples began; begin anew")
                    digest = _digest(answer)
                    description = self._described_by(digest, name)
                    content = _Body(answer, deadline)
                    for batch in pa.ipc.open_stream(io.BufferedReader(content)):
                        chunk = samples_of(pa.table(batch), description, length, body["seed"], offset + done, digest)
                        done, failures = done + len(chunk.x), 0
                        yield chunk
                        deadline = content.deadline = time.monotonic() + self._timeout_s
                if done < num_samples:
                    raise _Again(ServerError(f"the answer broke off after {done} of {num_samples} rows"))
            except (httpx.TransportError, pa.ArrowException, OSError) as error:
                failures = self._pause(_Again(_unreachable(self._url, error)), failures, deadline)
            except _Again as again:
                failures = self._pause(again, failures, deadline)

    def picture(
        self,
        name: str,
        num_samples: int = 1,
        *,
        seed: int | None = None,
        offset: int = 0,
        given: Any = None,
        length: int | None = None,
    ) -> bytes:
        """The bytes of a PNG file: the samples as one picture."""
        body = _sample_body(num_samples, seed, offset, given, length)
        return self._post(name, "sample", PNG, json=body).content

    def figure(self, name: str, figure: str, seed: int = 0) -> bytes:
        """The bytes of a PNG file: one of the family's own figures, which `model` names."""
        return self._get(_path(name, "figures", figure), params={"seed": str(seed)}, accept=PNG).content

    # What is said of data. x is an array (N, D), of sequences a list of (T, D) or an array (S, T, D), or a data frame.

    def log_prob(self, name: str, x: Any) -> Array:
        """(N,) log p(x) in nats."""
        return self._array(name, "log_prob", x)

    def elbo(self, name: str, x: Any, *, seed: int = 0, offset: int = 0, given: Any = None) -> Array:
        """(N,) a lower bound of log p(x), by one latent a row, which belongs to the seed and the row's number, offset.."""
        return self._array(name, "elbo", x, seed=seed, offset=offset, given=given)

    def log_prob_bound(
        self, name: str, x: Any, *, num_samples: int | None = None, seed: int = 0, offset: int = 0, given: Any = None
    ) -> Array:
        """(N,) a tighter one, by num_samples latents a row."""
        return self._array(name, "log_prob_bound", x, num_samples=num_samples, seed=seed, offset=offset, given=given)

    def encode(self, name: str, x: Any, *, given: Any = None) -> Any:
        """(N, L) what the family represents rows by; of each sequence (T, K), a list."""
        return self._answer(name, "encode", x, given=given)

    def decode(self, name: str, z: Any, *, given: Any = None) -> Array:
        """(N, D) the means of x given latents (N, L), or given components, classes or states (N,), integers."""
        return self._array(name, "decode", z, given=given)

    def classify(self, name: str, x: Any) -> Array:
        """(N, C) log p(label | x), columns in the order of the labels."""
        return self._array(name, "classify", x)

    def impute(self, name: str, x: Any, *, seed: int | None = None, offset: int = 0) -> Any:
        """(N, D) x with its missing entries (NaN) filled in, by their mean or, with a seed, by a draw; of sequences a list."""
        return self._answer(name, "impute", x, seed=seed, offset=offset if seed is not None else None)

    def reconstruct(self, name: str, x: Any, *, given: Any = None) -> Array:
        """(N, D) the decoded representation of x."""
        return self._array(name, "reconstruct", x, given=given)

    def _array(self, name: str, verb: str, x: Any, **options: Any) -> Array:
        answer = self._answer(name, verb, x, **options)
        return np.stack(answer) if isinstance(answer, list) else answer

    def _answer(self, name: str, verb: str, x: Any, **options: Any) -> Any:
        said = {key: value for key, value in options.items() if value is not None}
        description = self._known(name)
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
        params = {key: str(value) for key, value in said.items()}
        headers = {"Content-Type": media_type}
        answer = self._post(name, verb, wants, content=body, params=params, headers=headers)
        if wants == ARROW:
            columns = description["columns"] if verb == "impute" else ()
            return split(pa.ipc.open_stream(answer.content).read_all(), description, columns)
        values: Array = np.load(io.BytesIO(answer.content), allow_pickle=False)
        return list(values) if is_of_sequences and values.ndim == 3 else values

    # Requests

    def _get(self, path: str, accept: str = JSON, params: Mapping[str, str] | None = None) -> _Answer:
        return self._whole("GET", path, accept, params=params)

    def _post(self, name: str, verb: str, accept: str, **request: Any) -> _Answer:
        return self._whole("POST", _path(name, verb), accept, **request)

    def _whole(self, method: str, path: str, accept: str, **request: Any) -> _Answer:
        """The answer, repeated where that may help until there is one."""
        deadline, failures = time.monotonic() + self._timeout_s, 0
        while True:
            try:
                with self._sent(method, path, deadline, accept, **request) as answer:
                    return _Answer(_digest(answer), _Body(answer, deadline).readall())
            except httpx.TransportError as error:
                failures = self._pause(_Again(_unreachable(self._url, error)), failures, deadline)
            except _Again as again:
                failures = self._pause(again, failures, deadline)

    @contextmanager
    def _sent(self, method: str, path: str, deadline: float, accept: str, **request: Any) -> Iterator[httpx.Response]:
        """An answer of 200, whose body is still to come; `_Again` or what it is refused with."""
        headers = {**self._headers, "Accept": accept, **request.pop("headers", {})}
        left_s = max(deadline - time.monotonic(), 0.001)
        url = self._url + path
        with self._http.stream(method, url, headers=headers, timeout=httpx.Timeout(left_s), **request) as answer:
            if answer.status_code != 200:
                answer.read()
                raise _refused(answer)
            yield answer

    def _pause(self, again: _Again, failures: int, deadline: float) -> int:
        """Wait until it is time for another attempt; ServerError where there is none left."""
        if failures >= self._max_retries:
            raise again.error from again
        # Half of it at random, so that clients that were turned away together do not come again together.
        pause_s = min(FIRST_PAUSE_S * 2.0**failures, LONGEST_PAUSE_S) * (0.5 + 0.5 * random.random())
        pause_s = max(pause_s, again.after_s or 0.0)
        if time.monotonic() + pause_s >= deadline:
            raise again.error from again
        time.sleep(pause_s)
        return failures + 1

    def _described_by(self, digest: str, name: str) -> dict[str, Any]:
        """What the server says of the model that made the answer."""
        description = self._known(name)
        return description if description["digest"] == digest else self.model(name)


@dataclass(frozen=True)
class _Answer:
    """digest: of the model that made it, where one did."""

    digest: str
    content: bytes

    def json(self) -> Any:
        try:
            return json.loads(self.content)
        except ValueError as error:
            raise ServerError(f"an answer that is no JSON ({error}); is it a gendist server?") from error


class _Body(io.RawIOBase):
    """The body of an answer, as a file that is read while it comes, until the deadline."""

    def __init__(self, answer: httpx.Response, deadline: float) -> None:
        self.deadline = deadline
        self._parts = answer.iter_bytes()
        self._left = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._left:
            if time.monotonic() > self.deadline:
                raise httpx.ReadTimeout("the answer takes too long")
            part = next(self._parts, None)
            if part is None:
                return 0
            self._left = memoryview(part)
        number = min(len(buffer), len(self._left))
        buffer[:number] = self._left[:number]
        self._left = self._left[number:]
        return number


def _path(name: str, *rest: str) -> str:
    return "/".join(["/models", *(quote(part, safe="") for part in (name, *rest))])


def _sample_body(num_samples: int, seed: int | None, offset: int, given: Any, length: int | None) -> dict[str, Any]:
    drawn = secrets.randbelow(MAX_SEED) if seed is None else int(seed)
    given = given.item() if isinstance(given, np.generic) else given
    body = {"num_samples": int(num_samples), "seed": drawn, "offset": int(offset), "given": given}
    return body if length is None else {**body, "length": int(length)}


def _digest(answer: httpx.Response) -> str:
    return answer.headers.get("X-Gendist-Model-Digest", "")


def _refused(answer: httpx.Response) -> Exception:
    """The server's own line, as the exception that its status calls for."""
    try:
        problem = answer.json()
        error, field, allowed = str(problem["error"]), problem.get("field"), problem.get("allowed")
    except (ValueError, KeyError, TypeError):
        error, field, allowed = f"{answer.request.url}: status {answer.status_code}", None, None
    status = answer.status_code
    if status in NOT_NOW:
        return _Again(ServerError(error, status), _seconds(answer.headers.get("Retry-After")))
    if 400 <= status < 500:
        return KINDS.get(status, RequestError)(status, error, field, allowed)
    return ServerError(error, status)


def _seconds(retry_after: str | None) -> float | None:
    return float(retry_after) if retry_after is not None and retry_after.isdecimal() else None


def _unreachable(url: str, error: Exception) -> ServerError:
    return ServerError(f"{url}: {str(error) or type(error).__name__}; is a server running there?")
