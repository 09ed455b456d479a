"""What CSV and JSON share: text whose rows have no fixed length, indexed once so that a task reads only its own rows."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from gendist.data.column_types import SPARSE_ROWS, is_list, is_numeric
from gendist.data.files import Contents, Files

LINES_PER_MARK = 8192
BYTES_PER_READ = 1 << 22
BYTES_TO_GUESS_FROM = 1 << 20

Offsets = np.ndarray[Any, np.dtype[np.int64]]
# (content, whether the file ends with it) -> the offsets at which rows begin, and the part of it that is whole rows.
Split = Callable[[bytes, bool], tuple[Offsets, bytes]]


@dataclass(frozen=True)
class Lines:
    """Where the rows of a text file lie.

    header   the line that names the columns, where the format has one
    marks    the offset in bytes of every LINES_PER_MARK-th row, and of the end of the last
    split    how the file is told apart into rows
    """

    header: bytes
    num_rows: int
    marks: Offsets
    split: Split


class LineFiles(Files[Lines]):
    """Text files of rows. Numbers are float64 whatever the first rows look like: a later one may hold the first decimal."""

    has_header: bool = False

    def _contents(self, file: pa.NativeFile) -> Contents[Lines]:
        split = self._split_of(file)
        header, head, num_rows, end, marks = b"", b"", 0, 0, []
        for offset, starts, rows in _parts(file, split):
            if self.has_header and not header and len(starts):
                header_end = rows.index(b"\n", starts[0]) + 1
                header, starts = rows[starts[0] : header_end], starts[1:]
            if not head and len(starts):
                head = rows[starts[0] : starts[np.searchsorted(starts, starts[0] + BYTES_TO_GUESS_FROM) - 1]]
                head = head or rows[starts[0] :]
            marks += [offset + start for start in starts[-num_rows % LINES_PER_MARK :: LINES_PER_MARK].tolist()]
            num_rows += len(starts)
            end = offset + len(rows)
        lines = Lines(header, num_rows, np.array([*marks, end], dtype=np.int64), split)
        schema = self._guess(lines, head) if header or head else pa.schema([])
        return Contents(num_rows, pa.schema([(field.name, _text_type(field.type)) for field in schema]), lines)

    def _rows(self, file: pa.NativeFile, index: Lines, start: int, stop: int, columns: Sequence[str]) -> pa.Table:
        first, last = start // LINES_PER_MARK, -(-stop // LINES_PER_MARK)
        file.seek(index.marks[first])
        body = file.read(index.marks[last] - index.marks[first])
        table = self._parse(index, body, pa.schema([self.schema.field(name) for name in columns]))
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
    def _guess(self, lines: Lines, head: bytes) -> pa.Schema:
        """The columns of a file and the types they seem to have by its first rows."""

    @abstractmethod
    def _parse(self, lines: Lines, body: bytes, schema: pa.Schema) -> pa.Table:
        """The columns of the schema, of whole rows."""


def _text_type(type_: pa.DataType) -> pa.DataType:
    """float64 for numbers; text for a date, which other rows may write in another way. What is missing may be anything."""
    if is_list(type_):
        return pa.list_(pa.float64() if pa.types.is_null(type_.value_type) else _text_type(type_.value_type))
    if pa.types.is_struct(type_) and {"indices", "values"} <= {field.name for field in type_}:
        return SPARSE_ROWS
    if pa.types.is_null(type_) or pa.types.is_boolean(type_) or pa.types.is_nested(type_):
        return type_
    return pa.float64() if is_numeric(type_) else pa.string()


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
