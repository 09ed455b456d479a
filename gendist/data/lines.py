"""What CSV and JSON share: text whose rows have no fixed length, indexed once so that a task reads only its own rows."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from gendist.data.column_types import EXACT_INTEGERS, SPARSE_ROWS, common_type, entry_type, is_list, is_numeric
from gendist.data.files import Contents, Files

LINES_PER_MARK = 8192
BYTES_PER_READ = 1 << 22
BYTES_OF_HEAD, BYTES_OF_SAMPLE = 1 << 20, 1 << 16  # from which types are told: at the beginning, of each part, and at the end
# The type of a column whose integers, so far as they were looked at, float64 holds as well.
SMALL_INTEGERS = pa.int32()

Offsets = np.ndarray[Any, np.dtype[np.int64]]
# (content, whether the file ends with it) -> the offsets at which rows begin, and the part of it that is whole rows.
Split = Callable[[bytes, bool], tuple[Offsets, bytes]]


@dataclass(frozen=True)
class Lines:
    """Where the rows of a text file lie.

    header   the line that names the columns, where the format has one
    marks    the offset in bytes of every LINES_PER_MARK-th row, and of the end of the last
    split    how the file is told apart into rows
    booleans the types of columns of true and false in this file, which may be of numbers in others
    """

    header: bytes
    num_rows: int
    marks: Offsets
    split: Split
    booleans: dict[str, pa.DataType]


class LineFiles(Files[Lines]):
    """Text files of rows. Columns and types are told from the first rows, some at the beginning of each part that is read, and
    the last ones. Numbers are float64 whatever these look like, since another row may hold the first decimal; but for integers
    beyond those that float64 holds, such as ids, which are read as they are."""

    has_header: bool = False

    def __init__(self, paths: Sequence[str]):
        super().__init__(paths)
        self.schema = pa.schema([field.with_type(_type_to_read(field.type)) for field in self.schema])

    def _contents(self, file: pa.NativeFile) -> Contents[Lines]:
        split = self._split_of(file)
        header, tail, num_rows, end, marks = b"", b"", 0, 0, []
        schema = pa.schema([])
        for offset, starts, rows in _parts(file, split):
            if self.has_header and not header and len(starts):
                header_end = rows.index(b"\n", starts[0]) + 1
                header, starts = rows[starts[0] : header_end], starts[1:]
            if len(starts):
                ends = np.append(starts[1:], len(rows))
                most = BYTES_OF_SAMPLE if num_rows else BYTES_OF_HEAD
                num_seen = max(1, np.searchsorted(ends, starts[0] + most, side="right"))
                schema = _together(schema, self._guess(header, split, rows[starts[0] : ends[num_seen - 1]]))
                last = min(np.searchsorted(starts, len(rows) - BYTES_OF_SAMPLE), len(starts) - 1)
                tail = rows[starts[max(num_seen, last)] :] if num_seen < len(starts) else b""
            marks += [offset + start for start in starts[-num_rows % LINES_PER_MARK :: LINES_PER_MARK].tolist()]
            num_rows += len(starts)
            end = offset + len(rows)
        if tail or (header and not num_rows):
            schema = _together(schema, self._guess(header, split, tail))
        booleans = {field.name: field.type for field in schema if _holds_booleans(field.type)}
        return Contents(num_rows, schema, Lines(header, num_rows, np.array([*marks, end], dtype=np.int64), split, booleans))

    def _rows(self, file: pa.NativeFile, index: Lines, start: int, stop: int, columns: Sequence[str]) -> pa.Table:
        first, last = start // LINES_PER_MARK, -(-stop // LINES_PER_MARK)
        file.seek(index.marks[first])
        body = file.read(index.marks[last] - index.marks[first])
        types = {name: index.booleans.get(name, self.schema.field(name).type) for name in columns}
        table = self._parse(index, body, pa.schema(list(types.items())))
        num_lines = min(last * LINES_PER_MARK, index.num_rows) - first * LINES_PER_MARK
        if table.num_rows != num_lines:
            raise ValueError(
                f"{table.num_rows} rows in {num_lines} lines; each row needs a line of its own, without quoted line breaks"
            )
        return table.slice(start - first * LINES_PER_MARK, stop - start)

    def _split_of(self, file: pa.NativeFile) -> Split:
        """How this file is told apart into rows; leaves the file at its start."""
        return split_lines

    @abstractmethod
    def _guess(self, header: bytes, split: Split, sample: bytes) -> pa.Schema:
        """The columns of a file and the types they seem to have by some of its rows."""

    @abstractmethod
    def _parse(self, lines: Lines, body: bytes, schema: pa.Schema) -> pa.Table:
        """The columns of the schema, of whole rows."""


def _together(before: pa.Schema, found: pa.Schema) -> pa.Schema:
    """With the columns of further rows. What is another thing there than before stays as it was, which is told when it is
    read."""
    found = pa.schema([field.with_type(_text_type(field.type)) for field in found])
    types = {field.name: field.type for field in found}
    fields = [field.with_type(common_type(field.type, types.get(field.name, pa.null())) or field.type) for field in before]
    return pa.schema([*fields, *(field for field in found if field.name not in before.names)])


def unlike(column: str, found: str, told: str) -> ValueError:
    """An entry that its column's type does not hold.

    told   the name of the type, as Arrow calls it
    """
    if told == "null":
        return ValueError(
            f"column '{column}' holds {found}, but nothing in the rows its type is told from; put such a row first"
        )
    return ValueError(
        f"column '{column}' holds {found}, but {told} in the rows its type is told from; write all of them alike, and nothing "
        "where an entry is missing"
    )


def integers_type(least: int, most: int) -> pa.DataType:
    """Of a column of integers from the least to the most."""
    return pa.int64() if max(-least, most) >= EXACT_INTEGERS else SMALL_INTEGERS


def _text_type(type_: pa.DataType) -> pa.DataType:
    """Text for a date, which other rows may write in another way. What is missing may be anything."""
    if is_list(type_):
        return pa.list_(_text_type(type_.value_type))
    if pa.types.is_struct(type_) and {"indices", "values"} <= {field.name for field in type_}:
        return SPARSE_ROWS
    return type_ if is_numeric(type_) or pa.types.is_nested(type_) else pa.string()


def _type_to_read(type_: pa.DataType) -> pa.DataType:
    """That of a column of all files; float64 for numbers, but for large integers that are a column's own."""
    if is_list(type_):
        entries = _type_to_read(entry_type(type_))
        return pa.list_(pa.float64() if pa.types.is_null(entries) or pa.types.is_integer(entries) else entries)
    return pa.float64() if type_ == SMALL_INTEGERS else type_


def _holds_booleans(type_: pa.DataType) -> bool:
    return _holds_booleans(entry_type(type_)) if is_list(type_) else bool(pa.types.is_boolean(type_))


def _parts(file: pa.NativeFile, split: Split) -> Iterator[tuple[int, Offsets, bytes]]:
    """(offset in the file, offsets of the rows in this part, whole rows) of consecutive parts of a file."""
    offset, rest = 0, b""
    while True:
        read = file.read(BYTES_PER_READ)
        starts, whole = split(rest + read, not read)
        if whole:
            yield offset, starts, whole
        offset += len(whole)
        rest = (rest + read)[len(whole) :]
        if not read:
            return


def split_lines(content: bytes, is_end: bool) -> tuple[Offsets, bytes]:
    """A line is a row, unless it is empty; the last needs no line break."""
    if is_end and content and not content.endswith(b"\n"):
        content += b"\n"
    whole = content[: content.rfind(b"\n") + 1]
    codes = np.frombuffer(whole, dtype=np.uint8)
    ends = np.flatnonzero(codes == ord("\n"))
    starts = np.concatenate([[0], ends[:-1] + 1])[: len(ends)]
    empty = (ends == starts) | ((ends == starts + 1) & (codes[starts] == ord("\r")))
    return starts[~empty], whole
