"""Sources held in memory: arrays, data frames, Arrow tables, a `datasets.Dataset`, and the embedded digits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from gendist.protocols import UserError


def array_column(array: np.ndarray[Any, Any], name: str) -> pa.Array:
    """A column whose entries are the rows of an array; images of bytes are scaled to 0..1."""
    if array.ndim == 0 or (array.ndim > 1 and 0 in array.shape[1:]):
        raise UserError(f"{name} has shape {array.shape}; one row a sample is needed")
    if array.ndim == 1:
        return pa.array(array, from_pandas=True)
    if array.dtype.kind not in "buif":
        raise UserError(f"{name} holds {array.dtype}; numbers are needed")
    if array.dtype == np.uint8 and image_shape_of(array) is not None:
        array = array / 255.0
    flat = np.ascontiguousarray(array).reshape(-1)
    return pa.FixedSizeListArray.from_arrays(pa.array(flat), int(np.prod(array.shape[1:])))


def image_shape_of(array: np.ndarray[Any, Any]) -> tuple[int, ...] | None:
    """(height, width[, channels]) of an array of shape (N, height, width[, channels]), else None."""
    return tuple(array.shape[1:]) if array.ndim in (3, 4) else None


class TableSource:
    """A table that is held in memory."""

    def __init__(self, table: pa.Table, name: str, image_shape: tuple[int, ...] | None = None):
        self.table = table
        self.num_rows: int = table.num_rows
        self.schema: pa.Schema = table.schema
        self.image_shape = image_shape
        self.name = name

    def read(self, start: int, stop: int, columns: Sequence[str]) -> pa.Table:
        return self.table.select(list(columns)).slice(start, stop - start)


class HuggingFaceSource:
    """A `datasets.Dataset`, read by index."""

    image_shape: tuple[int, ...] | None = None
    name = "the data set"

    def __init__(self, dataset: Any):
        self.dataset = dataset.with_format("arrow")
        self.num_rows: int = len(dataset)
        self.schema: pa.Schema = dataset.features.arrow_schema

    def read(self, start: int, stop: int, columns: Sequence[str]) -> pa.Table:
        return self.dataset.select_columns(list(columns))[start:stop]


def source_of(data: Any) -> TableSource | HuggingFaceSource:
    """The source behind an array, a mapping of arrays, a pandas DataFrame, an Arrow table or a `datasets.Dataset`."""
    if isinstance(data, pa.Table):
        return TableSource(data, "the table")
    if isinstance(data, Mapping):
        columns = {name: array_column(np.asarray(values), f"data[{name!r}]") for name, values in data.items()}
        lengths = {name: len(column) for name, column in columns.items()}
        if len(set(lengths.values())) > 1:
            raise UserError(f"data: columns of different lengths ({lengths})")
        return TableSource(pa.table(columns), "the arrays")
    if hasattr(data, "select_columns") and hasattr(data, "with_format"):
        return HuggingFaceSource(data)
    if hasattr(data, "columns") and hasattr(data, "dtypes"):
        table = pa.Table.from_pandas(data, preserve_index=False).replace_schema_metadata(None)
        return TableSource(table.rename_columns([str(name) for name in data.columns]), "the data frame")
    if hasattr(data, "__array__"):
        array = np.asarray(data)
        return TableSource(pa.table({"x": array_column(array, "the array")}), "the array", image_shape_of(array))
    raise UserError(
        f"data: a {type(data).__name__}; give an array, a mapping of arrays, a DataFrame, an Arrow table or a datasets.Dataset"
    )


def digits() -> TableSource:
    """The 1,797 handwritten digits that come with scikit-learn: 8 x 8 pixels of 0..1 and their label."""
    from sklearn.datasets import load_digits

    embedded = load_digits()
    columns = {"image": array_column(embedded.images / 16.0, "digits"), "label": pa.array(embedded.target)}
    return TableSource(pa.table(columns), "digits", image_shape=(8, 8))
