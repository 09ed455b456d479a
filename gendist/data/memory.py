"""Sources held in memory: arrays, sparse matrices, lists of sequences, data frames, Arrow tables, a `datasets.Dataset`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from gendist.data.picture_files import with_files
from gendist.data.sparse import sparse_column
from gendist.protocols import UserError

ARRAY_SHAPE = b"array_shape"  # in the metadata of a column that was made of an array: the shape of an entry


def _as_array(values: Any, name: str) -> np.ndarray[Any, Any]:
    if hasattr(values, "detach"):  # a tensor, of whatever device and precision
        values = values.detach().cpu()
        values = values.numpy() if str(values.dtype) != "torch.bfloat16" else values.float().numpy()
    if isinstance(values, np.ma.MaskedArray):
        return np.ma.filled(values.astype(np.float64), np.nan)
    try:
        return np.asarray(values)
    except ValueError as error:
        raise UserError(f"{name}: rows of different lengths ({error})") from error


def _column(values: Any, name: str) -> tuple[pa.Field, pa.Array]:
    """A column and its field, without a name."""
    if hasattr(values, "tocoo"):
        return sparse_column(values)
    is_listed = isinstance(values, list | tuple)
    if is_listed and _is_ragged(values):
        column = _ragged_column(values, name)
        return pa.field("", column.type), column
    array = _as_array(values, name)
    column = array_column(array, name)
    shape = array.shape[1:]
    # A list of lists of numbers may be sequences of them; an array of two axes is rows of numbers.
    return array_field("", column.type, shape if len(shape) > is_listed else ()), column


def array_field(name: str, type_: pa.DataType, shape: tuple[int, ...]) -> pa.Field:
    """Of a column that was made of an array, whose entries have this shape."""
    return pa.field(name, type_, metadata={ARRAY_SHAPE: ",".join(map(str, shape))} if shape else None)


def array_shape_of(field: pa.Field) -> tuple[int, ...] | None:
    """The shape of an entry of a column that was made of an array of two and more axes, else None."""
    shape = (field.metadata or {}).get(ARRAY_SHAPE)
    return None if shape is None else tuple(map(int, shape.decode().split(",")))


def _is_ragged(values: Sequence[Any]) -> bool:
    """Whether these are sequences, some longer than others, or missing."""
    lengths = {len(each) for each in values if hasattr(each, "__len__") and not isinstance(each, str)}
    return len(lengths) > 1 or (bool(lengths) and any(each is None for each in values))


def _ragged_column(values: Sequence[Any], name: str) -> pa.Array:
    """A column each row of which is a sequence: numbers, texts, or arrays (T, D) of one width.

    UserError, with the number of the sequence, where it is something else.
    """
    arrays: list[np.ndarray[Any, Any]] = []
    for s, given in enumerate(values):
        where = f"{name}: sequence {s}"
        array = _as_array([] if given is None else given, where)
        if array.ndim not in (1, 2) or (array.size and array.dtype.kind not in "buifOSUT"):
            raise UserError(f"{where} has shape {array.shape} of {array.dtype}; (T, D) or (T,) is needed")
        arrays.append(array)
    filled = [(s, array) for s, array in enumerate(arrays) if array.size or array.ndim == 2]
    if not filled:
        return pa.array([[]] * len(arrays), pa.large_list(pa.float64()))
    first, like = filled[0]
    for s, array in filled:
        if array.shape[1:] != like.shape[1:]:
            raise UserError(
                f"{name}: sequence {s} has shape {array.shape}, but sequence {first} {like.shape}; give all as many features"
            )
    offsets = pa.array(np.cumsum([0, *map(len, arrays)]))
    return pa.LargeListArray.from_arrays(offsets, array_column(np.concatenate([array for _, array in filled]), name))


def _table(columns: Mapping[str, tuple[pa.Field, pa.Array]]) -> pa.Table:
    fields = [field.with_name(name) for name, (field, _) in columns.items()]
    return pa.table([column for _, column in columns.values()], schema=pa.schema(fields))


def array_column(array: np.ndarray[Any, Any], name: str) -> pa.Array:
    """A column whose entries are the rows of an array; images of bytes are scaled to 0..1."""
    if array.ndim == 0 or (array.ndim > 1 and 0 in array.shape[1:]):
        raise UserError(f"{name} has shape {array.shape}; one row a sample is needed")
    if array.dtype.kind in "buif":
        native = np.dtype(np.float64) if array.dtype.itemsize > 8 else array.dtype.newbyteorder("=")
        array = array.astype(native, copy=False)
    elif array.ndim > 1 or array.dtype.kind not in "OSUT":
        raise UserError(f"{name} holds {array.dtype}; numbers are needed")
    if array.ndim == 1:
        try:
            return pa.array(array, from_pandas=True)
        except pa.ArrowException as error:
            raise UserError(f"{name} holds values of several kinds ({str(error).splitlines()[0]})") from error
    if array.dtype == np.uint8 and image_shape_of(array) is not None:
        array = array / 255.0
    flat = np.ascontiguousarray(array).reshape(-1)
    return pa.FixedSizeListArray.from_arrays(pa.array(flat), int(np.prod(array.shape[1:])))


def image_shape_of(array: np.ndarray[Any, Any]) -> tuple[int, ...] | None:
    """(height, width[, channels]) of an array of shape (N, height, width[, channels]), else None."""
    return tuple(array.shape[1:]) if array.ndim in (3, 4) else None


class TableSource:
    """A table that is held in memory.

    is_list_of_sequences  whether Python handed over a list, each entry of which is a sequence
    """

    paths: tuple[str, ...] = ()

    def __init__(
        self, table: pa.Table, name: str, image_shape: tuple[int, ...] | None = None, is_list_of_sequences: bool = False
    ):
        self.table = table
        self.num_rows: int = table.num_rows
        self.schema: pa.Schema = table.schema
        self.image_shape = image_shape
        self.is_list_of_sequences = is_list_of_sequences
        self.name = name
        self._folder = os.getcwd()

    def read(self, start: int, stop: int, columns: Sequence[str]) -> pa.Table:
        return with_files(self.table.select(list(columns)).slice(start, stop - start), self._folder, self.name)


class HuggingFaceSource:
    """A `datasets.Dataset`, read by index."""

    image_shape: tuple[int, ...] | None = None

    def __init__(self, dataset: Any, name: str = "the data set"):
        if not hasattr(dataset, "__len__"):
            raise UserError("a streamed data set has no length; give a datasets.Dataset, or the files it streams from")
        self.name = name
        self.paths: tuple[str, ...] = tuple(file["filename"] for file in dataset.cache_files)
        # Where its files are mapped into memory, as what `datasets` loads is, their names are all that travels to a task.
        self.dataset = dataset.with_format("arrow")
        self.num_rows: int = len(dataset)
        self.schema: pa.Schema = dataset.features.arrow_schema
        self._folder = os.path.dirname(self.paths[0]) if self.paths else os.getcwd()

    def read(self, start: int, stop: int, columns: Sequence[str]) -> pa.Table:
        return with_files(self.dataset.select_columns(list(columns))[start:stop], self._folder, self.name)


def source_of(data: Any) -> TableSource | HuggingFaceSource:
    """The source behind an array, a sparse matrix of SciPy's, a mapping of these, a list of sequences, a pandas DataFrame, an
    Arrow table or a `datasets.Dataset`."""
    if isinstance(data, pa.Table):
        return TableSource(data, "the table")
    if isinstance(data, Mapping):
        columns = {str(name): _column(values, f"data[{name!r}]") for name, values in data.items()}
        lengths = {name: len(column) for name, (_, column) in columns.items()}
        if len(set(lengths.values())) > 1:
            raise UserError(f"data: columns of different lengths ({lengths})")
        return TableSource(_table(columns), "the arrays")
    if hasattr(data, "tocoo"):
        return TableSource(_table({"x": sparse_column(data)}), "the sparse matrix")
    if hasattr(data, "select_columns") and hasattr(data, "with_format"):
        return HuggingFaceSource(data)
    if hasattr(data, "columns") and hasattr(data, "dtypes"):
        try:
            table = _of_frame(data)
        except AttributeError as error:
            kind = f"{type(data).__name__} of {type(data).__module__.partition('.')[0]}"
            raise UserError(f"data: a {kind}, which is none of pandas; give its Arrow table, as data.to_arrow() is") from error
        except (pa.ArrowException, TypeError, ValueError) as error:
            raise UserError(f"the data frame cannot be read ({str(error).splitlines()[0]})") from error
        return TableSource(table.rename_columns([str(name) for name in data.columns]), "the data frame")
    if hasattr(data, "__array__"):
        array = _as_array(data, "the array")
        return TableSource(_table({"x": _column(array, "the array")}), "the array", image_shape_of(array))
    if isinstance(data, list | tuple):
        if _are_rows_and_labels(data):
            raise UserError(
                "data: a pair of rows and labels; call them by names, data={'x': x, 'label': y}, and say `label: label` in the "
                "spec's data: block"
            )
        return TableSource(pa.table({"x": _sequences_column(data)}), "the list", is_list_of_sequences=True)
    raise UserError(
        f"data: a {type(data).__name__}; give an array, a sparse matrix, a mapping of these, a list of sequences, a DataFrame, "
        "an Arrow table or a datasets.Dataset"
    )


def _of_frame(frame: Any) -> pa.Table:
    """Columns whose entries are arrays of several axes, such as images, are each taken for one array: Arrow takes none."""
    positions = range(len(frame.columns))
    arrays = [at for at in positions if any(getattr(entry, "ndim", 0) > 1 for entry in frame.iloc[:1, at])]
    others = [at for at in positions if at not in arrays]
    table = pa.Table.from_pandas(frame.iloc[:, others], preserve_index=False)
    columns = {at: (table.field(i), table.column(i)) for i, at in enumerate(others)}
    columns |= {at: _column(np.stack(list(frame.iloc[:, at])), f"column '{frame.columns[at]}'") for at in arrays}
    in_order = [columns[at] for at in positions]
    return pa.table([column for _, column in in_order], schema=pa.schema([field for field, _ in in_order]))


def _are_rows_and_labels(data: Sequence[Any]) -> bool:
    """Whether these are (x, y), as other libraries take them: as sequences they would have different widths."""
    if len(data) != 2 or not all(hasattr(each, "shape") for each in data):
        return False
    x, y = (tuple(each.shape) for each in data)
    return len(x) > 1 and y in ((x[0],), (x[0], 1)) and x != y


def _sequences_column(data: Sequence[Any]) -> pa.Array:
    """A column of a list: of texts, or of sequences."""
    if data and all(isinstance(each, str) or each is None for each in data):
        return pa.array(data, pa.large_string())
    for s, each in enumerate(data):
        if isinstance(each, str) or (each is not None and not hasattr(each, "__len__")):
            raise UserError(
                f"data: entry {s} of the list is a {type(each).__name__}; each is a sequence: an array (T, D) or (T,), a list "
                "of numbers, or, in all of them, a text"
            )
    return _ragged_column(data, "data")
