"""The rows that a request brings: of JSON, of an array of NumPy's, or of a table of Arrow's; checked before they are computed.

Legend: N rows, D features, S sequences, T steps. NaN is a missing entry.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
import pyarrow as pa
import scipy.sparse

from gendist.data import Schema
from gendist.data.column_types import entry_type, is_list, is_numeric, is_sparse, is_text
from gendist.data.matrix import MAX_MAGNITUDE
from gendist.data.named_rows import names_read, rows_by_name
from gendist.protocols import UserError
from gendist.serve.arrow_messages import is_compressed, stream_of
from gendist.serve.bodies import Take
from gendist.serve.limits import Limits
from gendist.serve.problems import Problem, listing, shortened

Array = np.ndarray[Any, Any]
Rows = Array | list[Array]

NUMBERS = f"numbers from {-MAX_MAGNITUDE:g} to {MAX_MAGNITUDE:g}, or null where an entry is missing"
ENTRIES = {int, float, bool, type(None)}  # of a list of numbers in JSON


class RowReader:
    """Reads rows as a model was fitted to them.

    schema        of the model's data
    num_features  D
    """

    def __init__(self, schema: Schema, num_features: int, takes_sequences: bool, limits: Limits) -> None:
        self.schema, self.num_features, self.takes_sequences, self.limits = schema, num_features, takes_sequences, limits
        self._read = names_read(schema)
        texts = [schema.categories.get(name) for name in schema.feature_names] if schema.categories else []
        self._index_of = [None if known is None else {text: i for i, text in enumerate(known)} for known in texts]

    @property
    def needs(self) -> str:
        """What x may be, in words."""
        names = listing(self.schema.feature_names, 8)
        if self.takes_sequences:
            return f"a list of sequences, each a list of steps of {self.num_features} features ({names}), or of objects by name"
        image = f", or images of shape {list(self.schema.image_shape)}" if self.schema.image_shape else ""
        return f"a list of rows of {self.num_features} features ({names}), or of objects by name{image}"

    # Of JSON

    def of_json(self, x: Any) -> Rows:
        """(N, D), or of each sequence (T, D)."""
        if not isinstance(x, list):
            raise self._refused("x is no list")
        if not x:
            raise self._refused("x is empty")
        if not self.takes_sequences:
            return self._checked(self._steps(x, "x"))
        self._check_number(sum(len(each) if isinstance(each, list) else 1 for each in x))
        return self._checked_sequences([self._steps(each, f"x[{s}]") for s, each in enumerate(x)])

    def _steps(self, rows: Any, where: str) -> Array:
        """(N, D) of a list of rows: lists, objects or, of images, lists of lists."""
        if not isinstance(rows, list) or not rows:
            raise self._refused(f"{where} is {'empty' if rows == [] else shortened(rows)}")
        self._check_number(len(rows))
        if any(isinstance(row, dict) for row in rows):
            rows = [self._by_name(row, f"{where}[{i}]") for i, row in enumerate(rows)]
        if self._index_of:
            rows = [self._with_indices(row, f"{where}[{i}]") for i, row in enumerate(rows)]
        array = numbers_of_json(rows, where, self.needs)
        return self._flat(array, where)

    def _by_name(self, row: Any, where: str) -> list[Any]:
        names = self.schema.feature_names
        if not isinstance(row, dict):
            raise Problem(422, f"{where} is no object, as others are", where, f"all of {listing(names)}")
        if row.keys() != set(names):
            known = set(names)
            unknown = [name for name in row if name not in known]
            missing = [name for name in names if name not in row]
            what = (
                f"does not have the column {shortened(unknown[0])}" if unknown else f"lacks the column {shortened(missing[0])}"
            )
            raise Problem(422, f"a row {what}" if missing else f"the model {what}", where, f"all of {listing(names)}")
        return [row[name] for name in names]

    def _with_indices(self, row: Any, where: str) -> list[Any]:
        """The row with the index of each text, as x has it; the number of texts where it is none that the model knows."""
        if not isinstance(row, list) or len(row) != self.num_features:
            raise self._refused(f"{where} has {len(row)} entries" if isinstance(row, list) else f"{where} is {shortened(row)}")
        entries = []
        for d, (entry, index_of) in enumerate(zip(row, self._index_of, strict=True)):
            if index_of is not None and entry is not None:
                if not isinstance(entry, str):
                    texts = listing(tuple(index_of))
                    raise Problem(422, f"{where}[{d}] is {shortened(entry)}", f"{where}[{d}]", f"a text, such as {texts}")
                entry = index_of.get(entry, len(index_of))
            entries.append(entry)
        return entries

    # Of .npy

    def of_npy(self, body: bytes, take: Take) -> Rows:
        array = array_of_npy(body, "x", take)
        if not self.takes_sequences:
            return self._checked(self._flat(array, "x"))
        if array.ndim != 3 or not array.size:
            raise self._refused(f"x is an array of shape {array.shape}")
        self._check_number(array.shape[0] * array.shape[1])
        return self._checked_sequences([self._flat(each, "x") for each in array])

    # Of Arrow

    def of_arrow(self, body: bytes, take: Take) -> Rows:
        """By the names of the columns, as files are read; other columns are not looked at."""
        table = table_of_arrow(body)
        self._check_number(table.num_rows)
        take(8 * table.num_rows * self.num_features)
        try:
            return self._of_table(table)
        except UserError as error:
            raise Problem(422, str(error), "x", f"columns {listing(self.schema.columns)}") from None
        except pa.ArrowException as error:
            raise Problem(422, f"the table cannot be read: {error}", "x", self.needs) from None

    def _of_table(self, table: pa.Table) -> Rows:
        names = [name for name in table.column_names if name in self._read] or table.column_names
        _check_plain(table, names, self.limits)
        rows = rows_by_name(table.select(names), self.schema)
        if isinstance(rows, list):
            return self._checked_sequences(rows)
        x_ND: Array = rows.toarray() if scipy.sparse.issparse(rows) else rows
        return self._checked(x_ND)

    # Of all

    def _flat(self, array: Array, where: str) -> Array:
        """(N, D) of rows, or of images."""
        shape = self.schema.image_shape
        if shape is not None and array.ndim > 2 and array.shape[1:] == shape and prod(shape) == self.num_features:
            array = array.reshape(len(array), -1)
        if array.ndim != 2 or array.shape[1] != self.num_features:
            raise self._refused(f"{where} is of shape {list(array.shape)}")
        self._check_number(len(array))
        return array.astype(np.float64, copy=False)

    def _checked(self, x_ND: Array) -> Array:
        _check_magnitudes(x_ND, "x")
        return x_ND

    def _checked_sequences(self, sequences: list[Array]) -> list[Array]:
        for s, x_TD in enumerate(sequences):
            _check_magnitudes(x_TD, f"x[{s}]")
        return sequences

    def _check_number(self, rows: int) -> None:
        """Of rows, or of steps of all sequences, told before there is memory for their numbers."""
        most = min(self.limits.max_rows, self.limits.queue_bytes // (8 * self.num_features))
        if rows > most:
            what = "steps in all sequences" if self.takes_sequences else "rows"
            raise Problem(413, f"x has {rows} {what}", "x", f"up to {most}")

    def _refused(self, what: str) -> Problem:
        return Problem(422, what, "x", self.needs)


def numbers_of_json(values: list[Any], where: str, needs: str) -> Array:
    """An array of nested lists of numbers, NaN for null. Problem where they are ragged, or hold something else."""
    _refuse_others(values, where, needs)
    try:
        array = np.asarray(values)
    except (ValueError, OverflowError):  # ragged
        raise Problem(422, f"the lists in {where} are not of one length and depth", where, needs) from None
    if array.dtype.kind in "buif":
        return array
    try:
        return array.astype(np.float64)
    except OverflowError:
        raise Problem(422, f"{where} has a number of too many digits", where, NUMBERS) from None


def _refuse_others(values: list[Any], where: str, needs: str) -> None:
    """Problem where nested lists hold anything but numbers and null: before NumPy gives every number the width of the longest
    text among them."""
    kinds = set(map(type, values))
    if not kinds <= ENTRIES | {list}:
        i = next(i for i, each in enumerate(values) if type(each) not in ENTRIES | {list})
        raise Problem(422, f"{where}[{i}] is {shortened(values[i])}", f"{where}[{i}]", needs)
    if list in kinds:
        for i, each in enumerate(values):
            if isinstance(each, list):
                _refuse_others(each, f"{where}[{i}]", needs)


def _place(where: str, index: Sequence[int]) -> str:
    return where + "".join(f"[{i}]" for i in index)


def _check_magnitudes(x_ND: Array, where: str) -> None:
    too_large = np.abs(x_ND) > MAX_MAGNITUDE  # NaN is not
    if too_large.any():
        index = tuple(int(i) for i in np.argwhere(too_large)[0])
        raise Problem(422, f"{_place(where, index)} is {x_ND[index]:g}", _place(where, index), NUMBERS)


def array_of_npy(body: bytes, where: str, take: Take) -> Array:
    """The array of a .npy file, of real numbers of any type and byte order. Nothing in it is executed, and there is no more
    memory for it than the bytes that came; `take` is told of what it needs as float64."""
    needs = "a whole .npy file of an array of real numbers"
    stream = io.BytesIO(body)
    try:
        version = np.lib.format.read_magic(stream)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, is_fortran, dtype = read(stream)
    except Exception as error:  # of a header that is none, it is whatever Python's tokenizer raises
        raise Problem(400, f"the body is no .npy file ({type(error).__name__})", where, needs) from None
    if dtype.kind not in "buif" or dtype.hasobject:
        raise Problem(422, f"an array of {dtype}", where, needs)
    num_bytes = len(body) - stream.tell()
    if any(side < 0 for side in shape) or prod(shape) * dtype.itemsize != num_bytes:
        said = f"an array of shape {shortened(list(shape))} and {dtype} in {num_bytes} bytes"
        raise Problem(400, said, where, needs)
    if dtype != np.float64:
        take(8 * prod(shape))
    array = np.frombuffer(body, dtype, prod(shape), stream.tell())
    try:
        return array.reshape(shape[::-1]).T if is_fortran else array.reshape(shape)
    except (ValueError, OverflowError):  # more sides, or longer ones, than an array may have
        raise Problem(400, f"an array of shape {shortened(list(shape))}", where, needs) from None


def table_of_arrow(body: bytes) -> pa.Table:
    """The table of an Arrow IPC stream or file, whose columns can be read without more memory than its rows need."""
    needs = "a whole Arrow IPC stream or file, uncompressed, of columns of numbers, texts or lists of numbers"
    try:
        if is_compressed(stream_of(body)):
            raise Problem(422, "the buffers of the Arrow IPC stream are compressed", "x", needs)
        table = pa.ipc.open_stream(stream_of(body)).read_all()
        table.validate(full=True)
    except (pa.ArrowException, OSError, ValueError, KeyError, MemoryError) as error:
        raise Problem(400, f"the body is no Arrow IPC stream ({type(error).__name__})", "x", needs) from None
    if len(set(table.column_names)) != table.num_columns:
        raise Problem(422, "two columns of the table have one name", "x", needs)
    return table


def _check_plain(table: pa.Table, names: Sequence[str], limits: Limits) -> None:
    """Problem where one of these columns does not have the memory that it seems to have: lists of nothing, and texts by
    reference, may stand for far more; or where it holds images to decode."""
    for name in names:
        column = table.column(name)
        if not _is_plain(column, limits):
            holds = f"the column {shortened(name)} holds {shortened(str(column.type))}"
            raise Problem(422, holds, name, "numbers or lists of them; texts where the model has texts; of images the pixels")


def _is_plain(column: pa.ChunkedArray, limits: Limits) -> bool:
    type_ = column.type
    if pa.types.is_dictionary(type_):
        longest = max((chunk.dictionary.nbytes for chunk in column.chunks), default=0)
        return is_text(type_.value_type) and len(column) * longest <= 8 * limits.max_body_bytes
    depth = 0
    while is_list(type_) and not isinstance(type_, pa.BaseExtensionType):
        type_, depth = entry_type(type_), depth + 1
    if depth and (depth > 3 or pa.types.is_null(type_)):
        return False
    return is_numeric(type_) or is_sparse(type_) or pa.types.is_string(type_) or pa.types.is_large_string(type_)
