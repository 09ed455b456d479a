"""Sources that are files: Parquet, CSV and .npy. Each finds any run of rows without reading what lies before it."""

from __future__ import annotations

import io
import os
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from gendist.data.memory import array_column, image_shape_of
from gendist.protocols import UserError

LINES_PER_MARK = 8192
BYTES_PER_READ = 1 << 24


def _reading(path: str, what: str, read: Callable[[], Any]) -> Any:
    """read(), with a failure told as one line about the file."""
    try:
        return read()
    except UserError:
        raise
    except Exception as error:  # whatever a parser or a file system raises over content that is not ours
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: cannot be read as {what} ({reason})") from error


class _Files(ABC):
    """The rows of several files, one after the other, in the order of the files."""

    image_shape: tuple[int, ...] | None = None

    def __init__(self, paths: Sequence[str], row_counts: Sequence[int], schemas: Sequence[pa.Schema]):
        self.paths = tuple(paths)
        self.starts = (0, *accumulate(row_counts))
        self.num_rows = self.starts[-1]
        self.schema = schemas[0]
        self._names = [frozenset(schema.names) for schema in schemas]
        self.name = paths[0] if len(paths) == 1 else f"{os.path.dirname(paths[0])} ({len(paths)} files)"

    def read(self, start: int, stop: int, columns: Sequence[str]) -> pa.Table:
        tables = []
        for index in range(bisect_right(self.starts, start) - 1, len(self.paths)):
            first, end = self.starts[index : index + 2]
            if first >= stop:
                break
            if first < end:
                lacking = [name for name in columns if name not in self._names[index]]
                if lacking:
                    raise UserError(f"{self.paths[index]}: no column '{lacking[0]}', which {self.paths[0]} has")
                tables.append(self._read_file(index, max(start, first) - first, min(stop, end) - first, columns))
        # One type for a column that is written as integers in one file and as decimals in another.
        return _reading(self.name, "one table", lambda: pa.concat_tables(tables, promote_options="permissive"))

    @abstractmethod
    def _read_file(self, index: int, start: int, stop: int, columns: Sequence[str]) -> pa.Table: ...


class ParquetFiles(_Files):
    """Parquet files: the row groups that overlap the rows asked for are decoded, those columns only."""

    def __init__(self, paths: Sequence[str]):
        footers = [_reading(path, "Parquet", partial(_parquet_footer, path)) for path in paths]
        super().__init__(paths, [sum(rows) for rows, _ in footers], [schema for _, schema in footers])
        self.row_groups = [(0, *accumulate(rows)) for rows, _ in footers]

    def _read_file(self, index: int, start: int, stop: int, columns: Sequence[str]) -> pa.Table:
        bounds = self.row_groups[index]
        groups = range(bisect_right(bounds, start) - 1, bisect_right(bounds, stop - 1))

        def read() -> pa.Table:
            with fsspec.open(self.paths[index], "rb") as file, pq.ParquetFile(file) as parquet:
                return parquet.read_row_groups(list(groups), columns=list(columns))

        table = _reading(self.paths[index], "Parquet", read)
        return table.slice(start - bounds[groups[0]], stop - start)


def _parquet_footer(path: str) -> tuple[list[int], pa.Schema]:
    with fsspec.open(path, "rb") as file, pq.ParquetFile(file) as parquet:
        rows = [parquet.metadata.row_group(group).num_rows for group in range(parquet.metadata.num_row_groups)]
        return rows, parquet.schema_arrow.remove_metadata()


@dataclass(frozen=True)
class _CsvIndex:
    """Where the lines of a CSV file begin: every LINES_PER_MARK-th line of data, by its offset in bytes."""

    header: bytes
    num_rows: int
    marks: np.ndarray[Any, np.dtype[np.int64]]
    schema: pa.Schema


class CsvFiles(_Files):
    """CSV files with a header line, indexed once by the driver so that a task reads only its own lines.

    A line is a row: line breaks inside quotes are not understood, and said so.
    """

    def __init__(self, paths: Sequence[str]):
        self.indexes = [_reading(path, "CSV", partial(_index_csv, path)) for path in paths]
        super().__init__(paths, [index.num_rows for index in self.indexes], [index.schema for index in self.indexes])
        # The first file's types hold for all of them: a later file's text in a column of numbers is an error.
        self.types = {field.name: field.type for field in self.schema}

    def _read_file(self, index: int, start: int, stop: int, columns: Sequence[str]) -> pa.Table:
        path, lines = self.paths[index], self.indexes[index]
        first, last = start // LINES_PER_MARK, -(-stop // LINES_PER_MARK)

        def read() -> pa.Table:
            with fsspec.open(path, "rb") as file:
                file.seek(lines.marks[first])
                body = file.read(lines.marks[last] - lines.marks[first])
            return _parse_csv(lines.header + body, columns, self.types)

        table = _reading(path, "CSV", read)
        if table.num_rows != min(last * LINES_PER_MARK, lines.num_rows) - first * LINES_PER_MARK:
            raise UserError(f"{path}: a row spans several lines (quoted line breaks), which is not supported; use Parquet")
        return table.slice(start - first * LINES_PER_MARK, stop - start)


def _parse_csv(content: bytes, columns: Sequence[str] | None, types: dict[str, pa.DataType]) -> pa.Table:
    convert = pa.csv.ConvertOptions(include_columns=columns, column_types=types, strings_can_be_null=True)
    return pa.csv.read_csv(io.BytesIO(content), convert_options=convert)


def _index_csv(path: str) -> _CsvIndex:
    header, head, num_rows, end, marks = b"", b"", 0, 0, []
    for offset, line_starts, lines in _lines(path):
        if not header and len(line_starts):
            header_end = lines.index(b"\n", line_starts[0]) + 1
            header = lines[line_starts[0] : header_end]
            head = lines[header_end:]
            line_starts = line_starts[1:]
        marks += [offset + start for start in line_starts[-num_rows % LINES_PER_MARK :: LINES_PER_MARK].tolist()]
        num_rows += len(line_starts)
        end = offset + len(lines)
    if not header:
        raise UserError(f"{path}: no header line; the file is empty")
    # Numbers are read as float64 whatever they look like at first: a later line may hold the first decimal.
    guessed = _parse_csv(header + head[: 1 << 20].rpartition(b"\n")[0] if head else header, None, {}).schema
    numeric = (pa.types.is_integer, pa.types.is_floating, pa.types.is_null)
    fields = [
        pa.field(field.name, pa.float64() if any(test(field.type) for test in numeric) else field.type) for field in guessed
    ]
    return _CsvIndex(header, num_rows, np.array([*marks, end], dtype=np.int64), pa.schema(fields))


def _lines(path: str) -> Iterator[tuple[int, np.ndarray[Any, Any], bytes]]:
    """(offset in the file, starts of the lines that are not empty, whole lines) of consecutive parts of a file."""
    offset, rest = 0, b""
    with fsspec.open(path, "rb") as file:
        while True:
            read = file.read(BYTES_PER_READ)
            content = rest + read
            if not read and content and not content.endswith(b"\n"):
                content += b"\n"  # the last line needs no line break
            whole = content.rfind(b"\n") + 1
            lines, rest = content[:whole], content[whole:]
            if lines:
                codes = np.frombuffer(lines, dtype=np.uint8)
                ends = np.flatnonzero(codes == ord("\n"))
                starts = np.concatenate([[0], ends[:-1] + 1])
                empty = (ends == starts) | ((ends == starts + 1) & (codes[starts] == ord("\r")))
                yield offset, starts[~empty], lines
            offset += whole
            if not read:
                return


class NpyFile:
    """One array in NumPy's format, mapped into memory: the first axis is the rows."""

    def __init__(self, path: str):
        self.path = self.name = path
        self.paths: tuple[str, ...] = (path,)
        array = self._open()
        if array.ndim < 1 or array.dtype.kind not in "buif":
            raise UserError(f"{path}: an array of {array.dtype} of shape {array.shape}; rows of numbers are needed")
        self.num_rows: int = len(array)
        self.image_shape = image_shape_of(array)
        self.schema = pa.schema([("x", array_column(array[:1], path).type)])

    def read(self, start: int, stop: int, columns: Sequence[str]) -> pa.Table:
        return pa.table({"x": array_column(self._open()[start:stop], self.path)})

    def _open(self) -> np.ndarray[Any, Any]:
        open_memmap = partial(np.lib.format.open_memmap, self.path, mode="r")
        array: np.ndarray[Any, Any] = _reading(self.path, ".npy", open_memmap)
        return array
