"""Sparse rows: in Arrow a column of structs that say which entries are not 0 (`indices`) and what they are (`values`).

    struct<indices: list<integer>, values: list<number>[, size: integer][, type: integer]>

`size` is the number of features. With `type` it is the layout of a vector of Spark ML in Parquet, whose rows of type 1 are
dense: they have no indices. Order and type of the fields do not matter.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from scipy.sparse import csr_array

from gendist.data.column_types import is_sparse
from gendist.data.matrix import MAX_MAGNITUDE, to_matrix
from gendist.protocols import UserError, csr_tensor

DENSE = 1  # the `type` of a row of Spark's that has no indices
WIDTH = b"num_features"  # in the metadata of a column that was made here

Array = np.ndarray[Any, Any]


def sparse_column(matrix: Any) -> tuple[pa.Field, pa.Array]:
    """A column, without a name, of a sparse matrix of SciPy's, that shares its memory."""
    rows = matrix.tocsr()
    if len(rows.shape) != 2 or rows.dtype.kind not in "buif":
        raise UserError(f"a sparse matrix of {rows.dtype} of shape {rows.shape}; real numbers are needed, one row a sample")
    offsets = pa.array(rows.indptr.astype(np.int64, copy=False))
    values = rows.data.astype(np.float64, copy=False)
    lists = [pa.LargeListArray.from_arrays(offsets, pa.array(entries)) for entries in (rows.indices, values)]
    array = pa.StructArray.from_arrays(lists, ["indices", "values"])
    return pa.field("", array.type, metadata={WIDTH: str(rows.shape[1])}), array


def sparse_rows(matrix: Array) -> pa.Array:
    """The rows of a matrix, which say its width themselves, in the types that Spark has."""
    rows, columns = matrix.nonzero()
    offsets = pa.array(np.searchsorted(rows, np.arange(len(matrix) + 1)).astype(np.int32))
    parts = {
        "type": pa.array(np.zeros(len(matrix), dtype=np.int8)),
        "size": pa.array(np.full(len(matrix), matrix.shape[1], dtype=np.int32)),
        "indices": pa.ListArray.from_arrays(offsets, pa.array(columns.astype(np.int32))),
        "values": pa.ListArray.from_arrays(offsets, pa.array(matrix[rows, columns])),
    }
    return pa.StructArray.from_arrays(list(parts.values()), list(parts))


def width_of(field: pa.Field) -> int | None:
    """The number of features, where the column itself says it."""
    metadata = field.metadata or {}
    return int(metadata[WIDTH]) if WIDTH in metadata else None


def widest(column: pa.ChunkedArray, first_row: int, where: str) -> int:
    """The number of features that these rows say, or need."""
    rows, columns, _, size = _entries(column, first_row, where)
    return max(size, int(columns.max()) + 1 if len(rows) else 0)


def to_csr(table: pa.Table, name: str, num_features: int, first_row: int, source_name: str) -> Any:
    """(N, num_features) csr_array of the rows of a column. A column of lists of numbers is taken, too.

    UserError, with the row's number, where an index is beyond, a value is missing or the lists do not fit together.
    """
    column, where = table.column(name), f"{source_name}: column '{name}'"
    if is_sparse(column.type):
        rows, columns, values, _ = _entries(column, first_row, where)
    else:
        matrix = to_matrix(table, [name], first_row, source_name)
        rows, columns = matrix.nonzero()
        values = matrix[rows, columns]
        _refuse(np.isnan(values), rows, first_row, where, "has a missing value")
    _refuse(columns >= num_features, rows, first_row, where, f"has an index beyond the {num_features} features")
    return csr_rows(rows, columns, values, (len(column), num_features))


def csr_rows(rows: Array, columns: Array, values: Array, shape: tuple[int, int]) -> Any:
    """csr_array of entries in any order, in the one form that `csr_tensor` gives the same matrix."""
    tensor = csr_tensor(rows, columns, values, shape)
    arrays = (tensor.values().numpy(), tensor.col_indices().numpy(), tensor.crow_indices().numpy())
    return csr_array(arrays, shape=shape)


def _entries(column: pa.ChunkedArray, first_row: int, where: str) -> tuple[Array, Array, Array, int]:
    """Of every entry its row (from 0 on), column and value; and the largest size that a row states, or 0."""
    array = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
    if array.null_count:
        raise UserError(f"{where} is missing in row {first_row + int(np.argmax(array.is_null()))}; give empty lists")
    parts = dict(zip((field.name for field in array.type), array.flatten(), strict=True))
    indices, values = parts["indices"], parts["values"]
    has_no_indices = np.asarray(indices.is_null())
    is_dense = has_no_indices & np.asarray(pc.fill_null(pc.equal(parts["type"], DENSE), False)) if "type" in parts else False
    lengths, stated = _lengths(values), _lengths(indices)
    numbers = np.arange(len(array))
    _refuse(np.asarray(values.is_null()), numbers, first_row, where, "has no values")
    _refuse(has_no_indices & ~np.asarray(is_dense), numbers, first_row, where, "has no indices")
    _refuse((lengths != stated) & ~np.asarray(is_dense), numbers, first_row, where, "has not as many indices as values")
    rows = np.repeat(numbers, lengths)
    flat = values.flatten().cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    _refuse(np.isnan(flat), rows, first_row, where, "has a missing value")
    _refuse(np.abs(flat) > MAX_MAGNITUDE, rows, first_row, where, f"has a value beyond {MAX_MAGNITUDE:g}")
    given = indices.flatten()
    _refuse(np.asarray(given.is_null()), np.repeat(numbers, stated), first_row, where, "has a missing index")
    columns = given.cast(pa.int64()).to_numpy(zero_copy_only=False)
    if np.any(is_dense):
        every = np.arange(len(rows)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        every[~np.repeat(is_dense, lengths)] = columns
        columns = every
    _refuse(columns < 0, rows, first_row, where, "has an index below 0")
    if "size" not in parts or not len(array):
        return rows, columns, flat, 0
    sizes = pc.fill_null(parts["size"].cast(pa.int64()), np.iinfo(np.int64).max).to_numpy(zero_copy_only=False)
    _refuse(columns >= sizes[rows], rows, first_row, where, "has an index that is not below its size")
    return rows, columns, flat, int(pc.max(parts["size"]).as_py() or 0)


def _lengths(lists: Any) -> Array:
    lengths: Array = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False)
    return lengths


def _refuse(wrong: Array, rows: Array, first_row: int, where: str, what: str) -> None:
    if wrong.any():
        raise UserError(f"{where} {what} in row {first_row + int(rows[np.argmax(wrong)])}")
