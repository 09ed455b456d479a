"""An answer's arrays as bytes: JSON, .npy, .npz, an Arrow IPC stream or lines of JSON, each chunk by chunk.

Where an answer is cut into chunks is a function of the model, and so are the bytes. Legend: N rows, S sequences, T steps.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from math import prod
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pydantic_core

from gendist.bulk.parts import Layout
from gendist.column_names import LABEL, STATE, step_names
from gendist.serve.media_types import MEDIA_TYPES
from gendist.serve.problems import Problem, listing, shortened

VALUES_AT_ONCE = 2**15  # numbers that become text without a pause: a few milliseconds

Array = np.ndarray[Any, Any]
Values = Array | list[Array]
"""(N, ...), or of sequences a list of (T, ...)."""


def format_of(query: str | None, accept: str | None) -> str:
    """The format that is asked for. Problem where there is no such one."""
    if query is not None:
        if query not in MEDIA_TYPES:
            raise Problem(406, f"format {shortened(query)}", "format", listing(tuple(MEDIA_TYPES)))
        return query
    return _accepted(accept[:1000]) if accept is not None and accept.strip(", \t") else "json"


@lru_cache(maxsize=256)
def _accepted(accept: str) -> str:
    """The first of those that the client likes best (RFC 9110, 12.5.1). How well, says the most specific range."""
    liked: dict[str, float] = {}
    for each in accept.split(","):
        range_, *parameters = (part.strip().lower() for part in each.split(";"))
        said = next((part[2:] for part in parameters if part.startswith("q=")), "1")
        try:
            liked[range_] = float(said)
        except ValueError:
            continue
    range_of = {
        name: next((range_ for range_ in (ours, f"{ours.split('/')[0]}/*", "*/*") if range_ in liked), None)
        for name, ours in MEDIA_TYPES.items()
    }
    for best in sorted(liked, key=lambda range_: -liked[range_]):
        for name, within in range_of.items():
            if within == best and liked[best] > 0:
                return name
    raise Problem(406, f"accept {shortened(accept)}", "accept", listing(tuple(MEDIA_TYPES.values())))


@dataclass(frozen=True)
class Described:
    """What an answer is of.

    name       of the array that was asked for: "x" of samples, else the verb
    num_rows   in all, or sequences
    first_row  the number of the first
    layout     what its columns are called in a table; None: latent_0, latent_1, ...
    labels     that the numbers of `label` stand for
    facts      what stands before the rows in JSON
    after      and after them
    """

    name: str
    num_rows: int
    first_row: int
    layout: Layout | None
    labels: Sequence[Any] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    after: Mapping[str, Any] = field(default_factory=dict)


class Encoder(Protocol):
    """Of one answer: the bytes of what stands before the rows, of each chunk of rows in turn, and of what stands after them."""

    def begin(self, first: Mapping[str, Values]) -> bytes: ...
    def slices(self, chunk: Mapping[str, Values]) -> Iterator[Mapping[str, Values]]:
        """What `rows` is to be given in turn: the chunk, or less at a time where that takes long."""
        ...

    def rows(self, chunk: Mapping[str, Values]) -> bytes: ...
    def end(self) -> bytes: ...
    def close(self) -> None:
        """Whether or not the end was reached."""
        ...

    def num_bytes(self, first: Mapping[str, Values]) -> int | None:
        """Of the whole body, where they are known before it is made."""
        ...


def encoder_of(format_: str, described: Described) -> Encoder:
    encoders: dict[str, Any] = {"json": JsonEncoder, "npy": NpyEncoder, "npz": NpzEncoder, "arrow": ArrowEncoder}
    encoder: Encoder = encoders.get(format_, LinesEncoder)(described)
    return encoder


class _Closed:
    def close(self) -> None:
        pass


class _Whole(_Closed):
    def slices(self, chunk: Mapping[str, Values]) -> Iterator[Mapping[str, Values]]:
        yield chunk


class _Sliced(_Closed):
    """Of formats whose bytes do not tell where rows were cut."""

    _described: Described

    def slices(self, chunk: Mapping[str, Values]) -> Iterator[Mapping[str, Values]]:
        values = chunk[self._described.name]
        num_values = sum(each.size for each in values) if isinstance(values, list) else values.size
        step = max(1, len(values) * VALUES_AT_ONCE // max(num_values, 1))
        if step >= len(values):
            yield chunk
            return
        for start in range(0, len(values), step):
            yield {name: each[start : start + step] for name, each in chunk.items()}


def json_bytes(value: Any) -> bytes:
    """JSON has no numbers that are not finite; they become null."""
    return pydantic_core.to_json(value, inf_nan_mode="null")


class JsonEncoder(_Sliced):
    """{..facts, name: [rows], "label": [...], ..after}; texts of categories as they are, null for one that has no name."""

    def __init__(self, described: Described) -> None:
        self._described = described
        self._beside: dict[str, list[bytes]] = {}
        self._is_first = True

    def begin(self, first: Mapping[str, Values]) -> bytes:
        facts = json_bytes(dict(self._described.facts))[1:-1]
        return b"{%s%s%s:[" % (facts, b"," if facts else b"", json_bytes(self._described.name))

    def rows(self, chunk: Mapping[str, Values]) -> bytes:
        for name in (LABEL, STATE):
            if name in chunk:
                beside = chunk[name]
                values = _labels_in_json(beside, self._described.labels) if name == LABEL else _nested(beside)
                self._beside.setdefault(name, []).append(json_bytes(values)[1:-1])
        rows = json_bytes(self._in_json(chunk[self._described.name]))[1:-1]
        comma, self._is_first = (b"" if self._is_first else b","), False
        return comma + rows

    def end(self) -> bytes:
        beside = b"".join(b",%s:[%s]" % (json_bytes(name), b",".join(parts)) for name, parts in self._beside.items())
        after = json_bytes(dict(self._described.after))[1:-1]
        return b"]%s%s%s}" % (beside, b"," if after else b"", after)

    def num_bytes(self, first: Mapping[str, Values]) -> int | None:
        return None

    def _in_json(self, values: Values) -> list[Any]:
        layout = self._described.layout
        if layout is None or not layout.categories or not set(layout.categories) & set(layout.columns):
            return _nested(values)
        return [_with_texts(np.asarray(row), layout) for row in values]


def _nested(values: Values) -> list[Any]:
    return [each.tolist() for each in values] if isinstance(values, list) else np.asarray(values).tolist()


def _labels_in_json(indices: Any, labels: Sequence[Any]) -> list[Any]:
    return [labels[index] if 0 <= index < len(labels) else None for index in np.asarray(indices).astype(np.int64).tolist()]


def _with_texts(row: Array, layout: Layout) -> list[Any]:
    """Of a row (D,), or of a sequence (T, D)."""
    if row.ndim > 1:
        return [_with_texts(step, layout) for step in row]
    texts = [layout.categories.get(name) for name in layout.columns]
    return [
        entry if known is None else known[int(entry)] if 0 <= entry < len(known) else None
        for entry, known in zip(row.tolist(), texts, strict=False)
    ]


def _floats(values: Values) -> Array:
    """As files hold numbers, in whatever precision a family computes."""
    array = np.stack(values) if isinstance(values, list) else np.asarray(values)
    return np.ascontiguousarray(array, dtype="<f8")


def _shape(first: Values, num_rows: int) -> tuple[int, ...]:
    """Of the whole array."""
    return (num_rows, *(np.shape(first)[1:] if isinstance(first, np.ndarray) else (np.shape(first[0]))))


@lru_cache(maxsize=256)
def npy_header(shape: tuple[int, ...]) -> bytes:
    """Of float64."""
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "<f8", "fortran_order": False, "shape": shape})
    return stream.getvalue()


class NpyEncoder(_Whole):
    """What was asked for alone, as float64."""

    def __init__(self, described: Described) -> None:
        self._described = described

    def begin(self, first: Mapping[str, Values]) -> bytes:
        return npy_header(self._shape(first))

    def rows(self, chunk: Mapping[str, Values]) -> bytes:
        return _floats(chunk[self._described.name]).tobytes()

    def end(self) -> bytes:
        return b""

    def num_bytes(self, first: Mapping[str, Values]) -> int | None:
        shape = self._shape(first)
        return len(npy_header(shape)) + 8 * prod(shape)

    def _shape(self, first: Mapping[str, Values]) -> tuple[int, ...]:
        return _shape(first[self._described.name], self._described.num_rows)


class _Sink(io.RawIOBase):
    """Takes what is written, until it is taken away."""

    def __init__(self) -> None:
        self._content = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, content: Any) -> int:
        self._content += content
        return memoryview(content).nbytes

    def taken(self) -> bytes:
        content = bytes(self._content)
        self._content.clear()
        return content


class NpzEncoder(_Whole):
    """What was asked for, and label and state beside it, as whole numbers or texts."""

    def __init__(self, described: Described) -> None:
        self._described = described
        self._sink = _Sink()
        self._archive = zipfile.ZipFile(self._sink, "w")
        self._rows: Any = None
        self._beside: dict[str, list[Array]] = {}

    def begin(self, first: Mapping[str, Values]) -> bytes:
        self._rows = self._archive.open(f"{self._described.name}.npy", "w", force_zip64=True)
        self._rows.write(npy_header(_shape(first[self._described.name], self._described.num_rows)))
        return self._sink.taken()

    def rows(self, chunk: Mapping[str, Values]) -> bytes:
        self._rows.write(_floats(chunk[self._described.name]).data)
        for name in (LABEL, STATE):
            if name in chunk:
                self._beside.setdefault(name, []).append(np.asarray(chunk[name]).astype(np.int64))
        return self._sink.taken()

    def end(self) -> bytes:
        self._rows.close()
        for name, parts in self._beside.items():
            values = np.concatenate(parts)
            with self._archive.open(f"{name}.npy", "w", force_zip64=True) as inside:
                array = _labels_in_array(values, self._described.labels) if name == LABEL else values
                np.lib.format.write_array(inside, array, allow_pickle=False)
        self._archive.close()
        return self._sink.taken()

    def close(self) -> None:
        if self._rows is not None:
            self._rows.close()
        self._archive.close()

    def num_bytes(self, first: Mapping[str, Values]) -> int | None:
        return None


def _labels_in_array(indices_N: Array, labels: Sequence[Any]) -> Array:
    """The label of each row; where it has none, an empty text, or NaN among numbers."""
    values = _labels_in_json(indices_N, labels)
    if all(isinstance(label, int) for label in labels):
        return np.array(values, dtype=np.float64 if None in values else np.int64)
    return np.array(["" if value is None else str(value) for value in values])


def table_of(described: Described, chunk: Mapping[str, Values], first_row: int) -> pa.Table:
    """The rows as `gendist sample`, `score` and `encode` write them into tables; a row a step where they are sequences."""
    values = chunk[described.name]
    width = values[0].shape[-1] if values[0].ndim else 1
    layout = described.layout or Layout(tuple(f"latent_{i}" for i in range(width)), array=described.name)
    if isinstance(values, list) or (values.ndim == 3 and layout.num_steps is None):
        lengths = [len(each) for each in values]
        steps = layout.table(np.concatenate(list(values)).astype(np.float64, copy=False), 0)
        sequence, step = step_names(layout.columns)
        numbers = {
            sequence: np.arange(first_row, first_row + len(values)).repeat(lengths),
            step: np.concatenate([np.arange(length) for length in lengths]),
        }
        return pa.table({**numbers, **dict(zip(steps.column_names, steps.columns, strict=True))})
    array = _floats(values)
    beside = [np.asarray(chunk[name], dtype=np.float64) for name in (STATE, LABEL) if name in chunk]
    if beside:
        of_steps = [each if each.ndim == array.ndim - 1 else each[:, None] for each in beside]
        columns = [np.broadcast_to(each, array.shape[:-1])[..., None] for each in of_steps]
        array = np.concatenate([array, *columns], axis=-1)
    return layout.table(array, first_row)


class _OfTables:
    def __init__(self, described: Described) -> None:
        self._described, self._next_row = described, described.first_row

    def _table(self, chunk: Mapping[str, Values]) -> pa.Table:
        first_row, self._next_row = self._next_row, self._next_row + len(chunk[self._described.name])
        return table_of(self._described, chunk, first_row)

    def num_bytes(self, first: Mapping[str, Values]) -> int | None:
        return None


class ArrowEncoder(_OfTables, _Whole):
    """A record batch a chunk."""

    def begin(self, first: Mapping[str, Values]) -> bytes:
        self._sink = _Sink()
        self._writer = pa.ipc.new_stream(self._sink, table_of(self._described, first, self._described.first_row).schema)
        return self._sink.taken()

    def rows(self, chunk: Mapping[str, Values]) -> bytes:
        self._writer.write_table(self._table(chunk))
        return self._sink.taken()

    def end(self) -> bytes:
        self._writer.close()
        return self._sink.taken()


class LinesEncoder(_OfTables, _Sliced):
    """An object a line, {column: value}."""

    def begin(self, first: Mapping[str, Values]) -> bytes:
        return b""

    def rows(self, chunk: Mapping[str, Values]) -> bytes:
        table = self._table(chunk)
        columns = [_as_list(column) for column in table.columns]
        return b"".join(
            [json_bytes(dict(zip(table.column_names, row, strict=True))) + b"\n" for row in zip(*columns, strict=True)]
        )

    def end(self) -> bytes:
        return b""


def _as_list(column: pa.ChunkedArray) -> list[Any]:
    is_number = pa.types.is_floating(column.type) or (pa.types.is_integer(column.type) and not column.null_count)
    values: list[Any] = column.to_numpy().tolist() if is_number else column.to_pylist()
    return values
