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

`AsyncClient` has the same methods, to be awaited, so that one event loop has many requests on their way. What is asked, and
what is repeated when, is the same for both (client_calls.py).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import wraps
from typing import Concatenate, ParamSpec, Self, TypeVar

import httpx

from gendist.serve.client_arrays import Samples
from gendist.serve.client_calls import (
    FAILURES,
    Answer,
    Attempts,
    Call,
    Calls,
    Chunks,
    NotAllowed,
    NotFound,
    NotOffered,
    Request,
    RequestError,
    ServerError,
    digest_of,
    refused,
)

__all__ = ["AsyncClient", "Client", "NotAllowed", "NotFound", "NotOffered", "RequestError", "Samples", "ServerError"]

P = ParamSpec("P")
T = TypeVar("T")


def _at_once(call: Callable[Concatenate[Calls, P], Call[T]]) -> Callable[Concatenate[Client, P], T]:
    @wraps(call)
    def method(client: Client, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return client._done(call(client._calls, *args, **kwargs))

    return method


def _in_turn(chunks: Callable[Concatenate[Calls, P], Chunks]) -> Callable[Concatenate[Client, P], Iterator[Samples]]:
    @wraps(chunks)
    def method(client: Client, /, *args: P.args, **kwargs: P.kwargs) -> Iterator[Samples]:
        return client._streamed(chunks(client._calls, *args, **kwargs))

    return method


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
        self._calls = Calls(url, token, timeout_s, max_retries)
        self._is_own, self._http = http is None, http or httpx.Client(follow_redirects=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._is_own:
            self._http.close()

    models = _at_once(Calls.models)
    model = _at_once(Calls.model)
    sample = _at_once(Calls.sample)
    sample_chunks = _in_turn(Calls.sample_chunks)
    picture = _at_once(Calls.picture)
    figure = _at_once(Calls.figure)
    log_prob = _at_once(Calls.log_prob)
    elbo = _at_once(Calls.elbo)
    log_prob_bound = _at_once(Calls.log_prob_bound)
    encode = _at_once(Calls.encode)
    decode = _at_once(Calls.decode)
    classify = _at_once(Calls.classify)
    impute = _at_once(Calls.impute)
    reconstruct = _at_once(Calls.reconstruct)

    def _done(self, call: Call[T]) -> T:
        try:
            request = next(call)
            while True:
                request = call.send(self._answer(request))
        except StopIteration as end:
            result: T = end.value
            return result

    def _answer(self, request: Request) -> Answer:
        attempts = self._calls.attempts()
        while True:
            try:
                with self._sent(request, attempts) as answer:
                    return Answer(digest_of(answer), b"".join(_parts(answer, attempts)))
            except FAILURES as error:
                time.sleep(attempts.pause_s(error))

    def _streamed(self, chunks: Chunks) -> Iterator[Samples]:
        while not chunks.is_done:
            try:
                with self._sent(chunks.request(), chunks.attempts) as answer:
                    self._done(chunks.begun(digest_of(answer)))
                    for part in _parts(answer, chunks.attempts):
                        yield from chunks.fed(part)
                chunks.ended()
            except FAILURES as error:
                time.sleep(chunks.attempts.pause_s(error))

    @contextmanager
    def _sent(self, request: Request, attempts: Attempts) -> Iterator[httpx.Response]:
        """An answer of 200, whose body is still to come; or what it is refused with."""
        with self._http.stream(**self._calls.sent(request, attempts)) as answer:
            if answer.status_code != 200:
                answer.read()
                raise refused(answer)
            yield answer


def _parts(answer: httpx.Response, attempts: Attempts) -> Iterator[bytes]:
    attempts.check()
    for part in answer.iter_bytes():
        yield part
        attempts.check()


# The same, to be awaited


def _awaited(call: Callable[Concatenate[Calls, P], Call[T]]) -> Callable[Concatenate[AsyncClient, P], Awaitable[T]]:
    @wraps(call)
    async def method(client: AsyncClient, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await client._done(call(client._calls, *args, **kwargs))

    return method


def _awaited_in_turn(
    chunks: Callable[Concatenate[Calls, P], Chunks],
) -> Callable[Concatenate[AsyncClient, P], AsyncIterator[Samples]]:
    @wraps(chunks)
    def method(client: AsyncClient, /, *args: P.args, **kwargs: P.kwargs) -> AsyncIterator[Samples]:
        return client._streamed(chunks(client._calls, *args, **kwargs))

    return method


class AsyncClient:
    """A server, from an event loop, of which many tasks may share it. It is closed at the end of an `async with`."""

    def __init__(
        self,
        url: str,
        token: str | None = None,
        timeout_s: float = 60.0,
        max_retries: int = 8,
        http: httpx.AsyncClient | None = None,
    ) -> None:
        """As of `Client`. http: has 100 connections at most where none is given; who waits for one waits within timeout_s."""
        self._calls = Calls(url, token, timeout_s, max_retries)
        self._is_own, self._http = http is None, http or httpx.AsyncClient(follow_redirects=False)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        if self._is_own:
            await self._http.aclose()

    models = _awaited(Calls.models)
    model = _awaited(Calls.model)
    sample = _awaited(Calls.sample)
    sample_chunks = _awaited_in_turn(Calls.sample_chunks)
    picture = _awaited(Calls.picture)
    figure = _awaited(Calls.figure)
    log_prob = _awaited(Calls.log_prob)
    elbo = _awaited(Calls.elbo)
    log_prob_bound = _awaited(Calls.log_prob_bound)
    encode = _awaited(Calls.encode)
    decode = _awaited(Calls.decode)
    classify = _awaited(Calls.classify)
    impute = _awaited(Calls.impute)
    reconstruct = _awaited(Calls.reconstruct)

    async def _done(self, call: Call[T]) -> T:
        try:
            request = next(call)
            while True:
                request = call.send(await self._answer(request))
        except StopIteration as end:
            result: T = end.value
            return result

    async def _answer(self, request: Request) -> Answer:
        attempts = self._calls.attempts()
        while True:
            try:
                async with self._sent(request, attempts) as answer:
                    return Answer(digest_of(answer), b"".join([part async for part in _parts_awaited(answer, attempts)]))
            except FAILURES as error:
                await asyncio.sleep(attempts.pause_s(error))

    async def _streamed(self, chunks: Chunks) -> AsyncIterator[Samples]:
        while not chunks.is_done:
            try:
                async with self._sent(chunks.request(), chunks.attempts) as answer:
                    await self._done(chunks.begun(digest_of(answer)))
                    async for part in _parts_awaited(answer, chunks.attempts):
                        for chunk in chunks.fed(part):
                            yield chunk
                chunks.ended()
            except FAILURES as error:
                await asyncio.sleep(chunks.attempts.pause_s(error))

    @asynccontextmanager
    async def _sent(self, request: Request, attempts: Attempts) -> AsyncIterator[httpx.Response]:
        async with self._http.stream(**self._calls.sent(request, attempts)) as answer:
            if answer.status_code != 200:
                await answer.aread()
                raise refused(answer)
            yield answer


async def _parts_awaited(answer: httpx.Response, attempts: Attempts) -> AsyncIterator[bytes]:
    attempts.check()
    async for part in answer.aiter_bytes():
        yield part
        attempts.check()
