"""What a request says, and whether it may: the bytes of its body, and the options of a verb, in JSON or in the query string."""

from __future__ import annotations

import json
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, TypeVar
from urllib.parse import parse_qsl

import pydantic_core
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    ValidationError,
)
from starlette.types import Receive, Scope

from gendist.noise import MAX_SEED
from gendist.serve.checks import MAX_ROW
from gendist.serve.limits import Limits
from gendist.serve.problems import Problem, listing, named, shortened

B = TypeVar("B", bound=BaseModel)
Take = Callable[[int], None]


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


def _from_digits(value: Any) -> Any:
    """A query string has no numbers, and JavaScript none beyond 2^53."""
    return int(value) if isinstance(value, str) and re.fullmatch(r"[0-9]{1,30}", value) else value


Whole = Annotated[StrictInt, BeforeValidator(_from_digits)]
Label = StrictStr | StrictInt | StrictFloat | StrictBool


def _of_labels(given: Any) -> Any:
    # Of a list of something else pydantic would write down four mistakes an entry.
    if isinstance(given, list) and not {type(label) for label in given} <= {str, int, float, bool}:
        raise ValueError("a list of labels")
    return given


class SampleBody(BaseModel):
    """Which rows of which sample. What the numbers may be, the model says.

    num_samples  rows, or sequences
    seed         names the sample: the same seed, the same rows. Where left out, the server draws one and tells it. A string of
                 digits is taken, too, where numbers end at 2^53
    offset       of the first row in the endless sample of the seed
    given        a label or the number of a component, to draw from alone
    length       of each sequence, in steps; of models of sequences alone
    """

    model_config = ConfigDict(extra="forbid")

    num_samples: Whole = 1
    seed: Whole | None = None
    offset: Whole = 0
    given: Label | None = None
    length: Whole | None = None


class DataOptions(BaseModel):
    """What a verb of rows is told beside them; each verb of a model takes some of these.

    given        the label of all rows, or a list with one a row
    seed         of what is drawn; impute without one fills in means
    offset       the number of the first row among those that belong to the seed
    num_samples  of latents a row, that a bound is the mean of
    """

    model_config = ConfigDict(extra="forbid")

    given: Annotated[Label | list[Label] | None, BeforeValidator(_of_labels)] = None
    seed: Whole | None = None
    offset: Whole = 0
    num_samples: Whole | None = None


class Room:
    """For bodies, what is made of them, and answers that clients are slow to take: as many bytes as may wait in the queue, over
    all requests. One that is larger has room when it is alone."""

    def __init__(self, limits: Limits) -> None:
        self.limit, self.num_bytes = limits.queue_bytes, 0
        self.lock = threading.Lock()  # large bodies are read in threads

    @contextmanager
    def for_request(self) -> Iterator[Share]:
        share = Share(self)
        try:
            yield share
        finally:
            share.give_back()


class Share:
    """What one request has of the room, until it is answered."""

    def __init__(self, room: Room) -> None:
        self._room, self.num_bytes = room, 0
        self._is_over = False

    def take(self, num_bytes: int) -> None:
        """So many bytes more. Problem where there is no room for them."""
        with self._room.lock:
            if self._room.num_bytes > self.num_bytes and self._room.num_bytes + num_bytes > self._room.limit:
                raise Problem(429, "too much is on its way", headers={"retry-after": "1", "connection": "close"})
            self._add(num_bytes)

    def hold(self, num_bytes: int) -> None:
        """The same of an answer, which can no longer be refused: it is who comes next that finds no room."""
        with self._room.lock:
            self._add(num_bytes)

    def _add(self, num_bytes: int) -> None:
        if self._is_over:
            raise ClientGone  # in a thread that still reads what nobody waits for
        self.num_bytes += num_bytes
        self._room.num_bytes += num_bytes

    def give_back(self) -> None:
        """All of it, at the end of the request."""
        with self._room.lock:
            self._room.num_bytes -= self.num_bytes
            self.num_bytes, self._is_over = 0, True


async def body_of(scope: Scope, receive: Receive, most: int, take: Take) -> bytes:
    """The whole body, of `most` bytes; `take` is told of them.

    Problem where it is too large, which is told before it is in memory, or ends early.
    """
    said = _said_length(scope)
    if said is not None and said > most:
        raise _too_large(most)
    message = await receive()
    if message["type"] == "http.request" and not message.get("more_body", False):
        body: bytes = message.get("body", b"")
        take(len(body))
    else:
        body = await _joined(message, receive, most, take)
    if len(body) > most:
        raise _too_large(most)
    if said is not None and len(body) != said:
        raise Problem(400, f"the body has {len(body)} bytes, but its content-length is {said}", headers={"connection": "close"})
    return body


async def _joined(message: Any, receive: Receive, most: int, take: Take) -> bytes:
    parts = bytearray()
    while True:
        if message["type"] == "http.disconnect":
            raise ClientGone
        take(len(message.get("body", b"")))
        parts += message.get("body", b"")
        if len(parts) > most:
            raise _too_large(most)
        if not message.get("more_body", False):
            return bytes(parts)
        message = await receive()


def _said_length(scope: Scope) -> int | None:
    said: bytes | None = None
    for name, value in scope["headers"]:
        if name == b"content-length":
            said = value
        elif name == b"content-encoding" and value.lower() != b"identity":
            encoding = value.decode("latin-1")
            raise Problem(415, f"content-encoding {shortened(encoding)}", "content-encoding", "none: send it uncompressed")
    if said is None:
        return None
    if not re.fullmatch(rb"[0-9]{1,18}", said):
        raise Problem(400, "a content-length that is no number of bytes", "content-length")
    return int(said)


def _too_large(most: int) -> Problem:
    allowed = f"up to {most} bytes; .npy and Arrow may be larger than JSON"
    return Problem(413, "the body is too large", "body", allowed, headers={"connection": "close"})


def json_object(body: bytes) -> dict[str, Any]:
    """The object that a body holds. Problem where it is none, or says a field twice."""
    try:
        content = pydantic_core.from_json(body, allow_inf_nan=False, cache_strings="keys")
    except ValueError as error:
        raise Problem(400, f"the body is no JSON: {error}", "body", "an object of JSON, without NaN or Infinity") from None
    if not isinstance(content, dict):
        raise Problem(422, f"the body is {_kind(content)}", "body", 'an object of JSON, such as {} or {"seed": 7}')
    # A parser this fast keeps the last of two fields of one name. There are none where as many names stand in the text as
    # were kept; else a slower one looks.
    if len(re.findall(rb'"\s*:', body)) != _num_names(content):
        json.loads(body, object_pairs_hook=_without_duplicates)
    return content


def _num_names(content: Mapping[str, Any]) -> int:
    lists = [value for value in content.values() if isinstance(value, list)]
    return len(content) + sum(len(row) for rows in lists for row in rows if isinstance(row, dict))


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = next(name for name, number in Counter(name for name, _ in pairs).items() if number > 1)
        raise Problem(422, f"the field {shortened(twice)} is given twice", named(twice), "once")
    return found


def _kind(value: Any) -> str:
    kinds = {list: "a list", str: "a string", bool: "true or false", int: "a number", float: "a number", type(None): "null"}
    return kinds.get(type(value), "an object")


def query_of(scope: Scope) -> dict[str, str]:
    """Problem where a parameter is given twice, or it is no query string."""
    text = scope.get("query_string", b"")
    if not text:
        return {}
    try:
        pairs = parse_qsl(text.decode("ascii"), keep_blank_values=True, strict_parsing=True, errors="strict", max_num_fields=50)
    except ValueError:
        raise Problem(400, "the query string cannot be read", "query", "name=value pairs, joined by &") from None
    query = dict(pairs)
    if len(query) != len(pairs):
        twice = next(name for name, number in Counter(name for name, _ in pairs).items() if number > 1)
        raise Problem(422, f"the parameter {shortened(twice)} is given twice", named(twice), "once")
    return query


def sample_body(content: Mapping[str, Any]) -> SampleBody:
    """Problem, with the field, where the content is none. What the values may be is for the model to say."""
    return _validated(SampleBody, content, tuple(SampleBody.model_fields))


def data_options(content: Mapping[str, Any], takes: Sequence[str]) -> dict[str, Any]:
    """Those that are given. takes: the names of the options that the verb has."""
    return _validated(DataOptions, content, takes).model_dump(exclude_unset=True, exclude_none=True)


def _validated(kind: type[B], content: Mapping[str, Any], takes: Sequence[str]) -> B:
    for name in content:
        if name not in takes:
            raise Problem(422, f"an unknown field {shortened(name)}", named(name), listing(takes) or "no options")
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        field = str(error.errors(include_url=False, include_context=False)[0]["loc"][0])
        raise Problem(422, f"{field} {shortened(content[field])}", field, ALLOWED[field]) from None


def whole_number(name: str, text: str, most: int) -> int:
    """Of a query string."""
    if not re.fullmatch(r"[0-9]{1,30}", text) or int(text) > most:
        raise Problem(422, f"{name} {shortened(text)}", name, f"a whole number from 0 to {most}")
    return int(text)


ALLOWED = {
    "num_samples": "a whole number from 1 on",
    "seed": f"a whole number from 0 to {MAX_SEED}, a string of its digits, or null",
    "offset": f"a whole number from 0 to {MAX_ROW}",
    "given": "a label: a string, a number, true or false",
    "length": "a whole number from 1 on, or null",
}
