"""Sequences by their ids: one row a step, told apart by a column of ids, checked by a column that ascends."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gendist.data.column_types import check_exact, is_image, is_list
from gendist.data.sources import Source
from gendist.protocols import UserError

ROWS_AT_ONCE = 1 << 20

Array = np.ndarray[Any, Any]


def bounds_of_ids(source: Source, sequence: str, order: str | None) -> Array:
    """(S + 1,) where the sequences begin, and where the last ends, by one pass over the two columns.

    sequence  a column of ids; the rows of one stand together
    order     a column that ascends strictly within a sequence

    UserError, with row and column, where they do not, or an entry is missing.
    """
    columns = [sequence] if order is None else [sequence, order]
    for name in columns:
        type_ = source.schema.field(name).type
        if pa.types.is_nested(type_) or is_list(type_) or is_image(type_):
            raise UserError(f"{source.name}: column '{name}' holds {type_}; numbers or texts are needed there")
    sort = f"sort the rows by '{sequence}'" + ("" if order is None else f" and '{order}'")
    starts, ids = [np.zeros(1, dtype=np.int64)], []
    for start in range(0, source.num_rows, ROWS_AT_ONCE):
        before = max(start - 1, 0)  # one row more, for the next to be held against
        table = source.read(before, min(start + ROWS_AT_ONCE, source.num_rows), columns)
        arrays = {name: _one_array(table.column(name)) for name in columns}
        for name, array in arrays.items():
            missing = _flags(pc.is_null(array, nan_is_null=True))
            if missing.any():
                row = before + int(np.argmax(missing))
                raise UserError(f"{source.name}: column '{name}' is missing in row {row}; each step needs one")
        id_N = arrays[sequence]
        check_exact(id_N, f"{source.name}: column '{sequence}'")
        is_new = _flags(pc.not_equal(id_N[1:], id_N[:-1]))
        if order is not None:
            order_N = arrays[order]
            falls = ~is_new & ~_flags(pc.greater(order_N[1:], order_N[:-1]))
            if falls.any():
                i = int(np.argmax(falls))
                a, b = order_N[i].as_py(), order_N[i + 1].as_py()
                if a == b:
                    check_exact(order_N[i : i + 1], f"{source.name}: column '{order}'")
                what = f"is {b!r} twice" if a == b else f"falls from {a!r} to {b!r}"
                raise UserError(
                    f"{source.name}: column '{order}' {what} in row {before + i + 1}, within the sequence "
                    f"{id_N[i].as_py()!r}; it must ascend: {sort}"
                )
        new = np.flatnonzero(is_new) + 1
        starts.append(before + new)
        ids.append(id_N.take(pa.array(np.concatenate([[0], new]) if start == 0 else new)))
    bounds = np.concatenate([*starts, [source.num_rows]])
    _check_together(pa.chunked_array(ids), bounds, f"{source.name}: column '{sequence}'", sort)
    return bounds


def _check_together(ids: pa.ChunkedArray, bounds: Array, where: str, sort: str) -> None:
    """UserError where a sequence begins a second time."""
    if pc.count_distinct(ids).as_py() == len(ids):
        return
    seen: set[Any] = set()
    for s, id_ in enumerate(ids.to_pylist()):
        if id_ in seen:
            raise UserError(
                f"{where}: the sequence {id_!r} comes back in row {bounds[s]}; its rows must stand together: {sort}"
            )
        seen.add(id_)


def _one_array(column: pa.ChunkedArray) -> pa.Array:
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    return column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)


def _flags(array: Any) -> Array:
    flags: Array = array.to_numpy(zero_copy_only=False).astype(bool)
    return flags
