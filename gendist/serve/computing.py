"""What the batcher computes for the HTTP application, with the time that it took: answers of models, and pictures of them."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any

from gendist.serve.waiting import Work

DRAWN_ROWS = 1_024  # that take about as long as a picture of little
DRAWN_BYTES = 4 * 2**20  # that it takes to draw on
MOST_DRAWN_BYTES = 32 * 2**20  # of pictures that are kept


@dataclass(frozen=True)
class Timed:
    """A result, and when the batch that it was in began and ended, in seconds of `time.monotonic`."""

    result: Any
    began: float
    ended: float


@dataclass(frozen=True)
class Drawing:
    """A payload of the batcher's that is no call of a model: what is drawn takes its turn among what is computed."""

    draw: Callable[[], Any]


def drawing(draw: Callable[[], Any], num_rows: int = 0, num_bytes: int = 0) -> Work:
    """num_rows, num_bytes: of what is shown."""
    return Work(key=None, num_rows=DRAWN_ROWS + num_rows, num_bytes=DRAWN_BYTES + num_bytes, payload=Drawing(draw))


class Drawn:
    """The pictures that were asked for last, by what they show. Whoever draws looks here again when it is their turn: others
    may have asked for the same meanwhile."""

    def __init__(self, most_bytes: int = MOST_DRAWN_BYTES) -> None:
        self._pictures: OrderedDict[Hashable, bytes] = OrderedDict()
        self._num_bytes, self._most_bytes = 0, most_bytes
        self._lock = Lock()  # the event loop looks, the thread that computes draws

    def get(self, what: Hashable) -> bytes | None:
        with self._lock:
            if what not in self._pictures:
                return None
            self._pictures.move_to_end(what)
            return self._pictures[what]

    def keep(self, what: Hashable, picture: bytes) -> None:
        with self._lock:
            self._num_bytes += len(picture) - len(self._pictures.pop(what, b""))
            self._pictures[what] = picture
            while self._num_bytes > self._most_bytes:
                self._num_bytes -= len(self._pictures.popitem(last=False)[1])

    def or_draw(self, what: Hashable, draw: Callable[[], bytes]) -> bytes:
        picture = self.get(what)
        if picture is None:
            picture = draw()
            self.keep(what, picture)
        return picture


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


def _drawn(drawing: Drawing) -> Any:
    try:
        return drawing.draw()
    except Exception as error:
        return error
