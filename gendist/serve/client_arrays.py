"""Arrays as the bodies of requests, and the bodies of answers as arrays: what the client makes of what it is given.

Legend: N rows, D features, S sequences, T steps. A description is what the server says of a model.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from gendist.column_names import step_names
from gendist.errors import UserError
from gendist.serve.media_types import ARROW, NPY

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, eq=False)
class Samples:
    """Rows, or sequences, offset.. of the endless sample of the seed.

    x        (N, D) or, of sequences, (N, T, D) float64; of a category its index
    label    (N,) of each row's class, or None where the family has none
    state    (N, T) the hidden states, or None
    columns  one a feature
    digest   of the model
    """

    x: Array
    label: Array | None
    state: Array | None
    seed: int
    offset: int
    columns: tuple[str, ...]
    digest: str


def encoded(x: Any, of_sequences: dict[str, Any] | None) -> tuple[bytes, str, bool]:
    """The body of a request, its media type, and whether it may hold sequences of different lengths.

    of_sequences: what the server says of the model, where it is one of sequences
    """
    if hasattr(x, "columns"):
        return _stream(_table(x)), ARROW, of_sequences is not None
    if of_sequences is None:
        return _npy(x.toarray() if hasattr(x, "tocoo") else x), NPY, False
    width = len(of_sequences["columns"])
    if not isinstance(x, list | tuple) or (x and isinstance(x[0], int | float)):
        array = _steps(x, width)
        return _npy(array if array.ndim == 3 else array[None]), NPY, False
    sequences = [_steps(each, width) for each in x]
    if len({len(each) for each in sequences}) == 1:
        return _npy(np.stack(sequences)), NPY, False
    return _stream(_table_of_steps(sequences, of_sequences)), ARROW, True


def _steps(x: Any, width: int) -> Array:
    array = np.asarray(x, dtype=np.float64)
    return array[:, None] if array.ndim == 1 and width == 1 else array


def _npy(x: Any) -> bytes:
    try:
        array = np.asarray(x)
    except ValueError as error:
        raise UserError(f"x: an array of numbers is needed, not a {type(x).__name__} ({error})") from error
    if array.dtype.kind not in "buif":
        raise UserError(
            f"x: an array of numbers is needed, not of {array.dtype}; pass texts as a data frame with their columns"
        )
    written = io.BytesIO()
    dtype = np.int64 if array.dtype.kind in "iu" else np.float64
    np.lib.format.write_array(written, np.ascontiguousarray(array, dtype=dtype), allow_pickle=False)
    return written.getvalue()


def _table(frame: Any) -> pa.Table:
    """Of a data frame of pandas or Polars, or a table of Arrow's."""
    if isinstance(frame, pa.Table):
        return frame
    return frame.to_arrow() if hasattr(frame, "to_arrow") else pa.Table.from_pandas(frame, preserve_index=False)


def _table_of_steps(sequences: Sequence[Array], description: Mapping[str, Any]) -> pa.Table:
    """As `gendist sample` writes sequences: a row a step, with the numbers of sequence and step."""
    lengths = [len(each) for each in sequences]
    steps_ND = np.concatenate(sequences)
    sequence, step = step_names(description["columns"])
    table: dict[str, Any] = {
        sequence: np.arange(len(sequences)).repeat(lengths),
        step: np.concatenate([np.arange(length) for length in lengths]),
    }
    for name, values_N in zip(description["columns"], steps_ND.T, strict=True):
        texts = description["categories"].get(name)
        table[name] = values_N if texts is None else _texts(values_N, texts)
    return pa.table(table)


def _texts(values_N: Array, texts: Sequence[str]) -> pa.Array:
    """What the indices stand for; of one beyond all of them a text that is none of them."""
    unknown = "".join(texts) + "?"
    is_missing = np.isnan(values_N)
    indices = np.where(is_missing, 0, values_N).astype(np.int64)
    known = [texts[index] if 0 <= index < len(texts) else unknown for index in indices.tolist()]
    return pa.array([None if missing else text for missing, text in zip(is_missing.tolist(), known, strict=True)])


def _stream(table: pa.Table) -> bytes:
    written = io.BytesIO()
    with pa.ipc.new_stream(written, table.schema) as writer:
        writer.write_table(table)
    return written.getvalue()


def in_json(array: Array) -> Any:
    """Nested lists, with null for NaN."""
    if array.dtype.kind == "f" and np.isnan(array).any():
        nested = array.astype(object)
        nested[np.isnan(array)] = None
        return nested.tolist()
    return array.tolist()


def samples_of(
    table: pa.Table, description: Mapping[str, Any], length: int | None, seed: int, offset: int, digest: str
) -> Samples:
    """A record batch of a stream."""
    columns, categories = tuple(description["columns"]), description["categories"]
    x_ND = _features(table, columns, categories)
    beside = description["beside"]
    label = _labels(table[beside["label"]], description["labels"]) if "label" in beside else None
    state = table[beside["state"]].to_numpy() if "state" in beside else None
    if not description["takes_sequences"]:
        return Samples(x_ND, label, state, seed, offset, columns, digest)
    num_steps = length or description["length"]
    x_NTD = x_ND.reshape(-1, num_steps, len(columns))
    state = None if state is None else state.reshape(-1, num_steps)
    return Samples(x_NTD, None if label is None else label[::num_steps], state, seed, offset, columns, digest)


def _features(table: pa.Table, columns: Sequence[str], categories: Mapping[str, Sequence[str]]) -> Array:
    """(N, D) float64: numbers, indices of texts, or what sparse rows hold."""
    if not set(columns) <= set(table.column_names):
        (sparse,) = (column for column in table.columns if pa.types.is_struct(column.type))
        return _dense(sparse.combine_chunks(), len(columns))
    x_ND = np.empty((table.num_rows, len(columns)))
    for d, name in enumerate(columns):
        x_ND[:, d] = _indices(table[name], categories[name]) if name in categories else table[name].to_numpy()
    return x_ND


def _indices(column: pa.ChunkedArray, texts: Sequence[str]) -> list[float]:
    index_of = {text: index for index, text in enumerate(texts)}
    return [index_of.get(text, len(texts)) for text in column.to_pylist()]


def _dense(sparse: Any, width: int) -> Array:
    """(N, width) of rows {indices, values}."""
    x_ND = np.zeros((len(sparse), width))
    for row, (indices, values) in enumerate(
        zip(sparse.field("indices").to_pylist(), sparse.field("values").to_pylist(), strict=True)
    ):
        x_ND[row, indices] = values
    return x_ND


def _labels(column: pa.ChunkedArray, labels: Sequence[Any]) -> Array:
    by_text = {str(label): label for label in labels}
    return np.array([by_text.get(str(text), text) for text in column.to_pylist()])


def split(table: pa.Table, description: Mapping[str, Any], columns: Sequence[str]) -> Any:
    """(T, W) of each sequence; (S, W) where there is one row for each.

    columns: of the features, where these are what it holds
    """
    sequence, step = step_names(columns)
    names = [name for name in table.column_names if name not in (sequence, step)]
    categories = {name: texts for name, texts in description["categories"].items() if name in columns}
    values = _features(table, names, categories)
    if step not in table.column_names:
        return values
    firsts = np.flatnonzero(table[step].to_numpy() == 0)
    return np.split(values, firsts[1:])
