"""What goes wrong with a request, in the one shape that every error answer has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pydantic_core
from pydantic import BaseModel, ConfigDict


class Problem(Exception):
    """The answer to a request that cannot be served.

    error    one line: what was given
    field    of the request, that it is about
    allowed  what the field may be
    headers  of the answer
    """

    def __init__(
        self,
        status: int,
        error: str,
        field: str | None = None,
        allowed: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(error)
        self.status, self.error, self.field, self.allowed = status, " ".join(error.split()), field, allowed
        self.headers = dict(headers or {})

    def body(self) -> bytes:
        return pydantic_core.to_json({"error": self.error, "field": self.field, "allowed": self.allowed})


class ProblemBody(BaseModel):
    """What went wrong, and where: the shape of every answer of status 400 and above."""

    model_config = ConfigDict(title="Problem")

    error: str
    field: str | None
    allowed: str | None


def listing(names: Sequence[Any], most: int = 20) -> str:
    """Of many only the first."""
    more = f", ... ({len(names)} in all)" if len(names) > most else ""
    return ", ".join(map(str, names[:most])) + more


def named(field: str) -> str:
    """A field that the client has named, as an answer repeats it."""
    return field[:60]


def shortened(value: Any, most: int = 60) -> str:
    """As a message repeats what was given: not all of it, where it is long."""
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 256:
        return "a number of hundreds of digits"
    text = repr(value) if not isinstance(value, str) else repr(value[: most + 1])
    return text if len(text) <= most else f"{text[:most]}..."
