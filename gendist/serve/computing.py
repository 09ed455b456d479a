"""What the batcher computes for the HTTP application, with the time that it took: answers of models, and pictures of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Timed:
    """A result, and when the batch that it was in began and ended, in seconds of `time.monotonic`."""

    result: Any
    began: float
    ended: float


@dataclass(frozen=True)
class Drawing:
    """A payload of the batcher's that is no call of a model: what is drawn takes its turn among what is computed."""

    draw: Callable[[], bytes]


def timed(
    compute: Callable[[Hashable, Sequence[Any]], Sequence[Any]], watch: Callable[[float], None]
) -> Callable[[Hashable, Sequence[Any]], Sequence[Any]]:
    """`compute` with a `Timed` for each result that is no exception, and the seconds of each batch told to `watch`."""

    def compute_timed(key: Hashable, payloads: Sequence[Any]) -> Sequence[Any]:
        began = time.monotonic()
        if any(isinstance(payload, Drawing) for payload in payloads):
            results = [_drawn(payload) if isinstance(payload, Drawing) else compute(key, [payload])[0] for payload in payloads]
        else:
            results = list(compute(key, payloads))
        ended = time.monotonic()
        watch(ended - began)
        return [result if isinstance(result, BaseException) else Timed(result, began, ended) for result in results]

    return compute_timed


def _drawn(drawing: Drawing) -> bytes | Exception:
    try:
        return drawing.draw()
    except Exception as error:
        return error
