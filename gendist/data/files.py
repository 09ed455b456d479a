"""Rows that lie in files: opening, many files as one table, and what may be wrong with them. Each format has its own module.

A file is looked into once, when it is opened; a task then finds any run of rows without reading what lies before it.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, ClassVar, Generic, TypeVar

import pyarrow as pa

from gendist.data.column_types import common_type, to_type
from gendist.data.opening import obstacle, opened
from gendist.data.picture_files import FILES_AT_ONCE, with_files
from gendist.protocols import UserError

Index = TypeVar("Index")


@dataclass(frozen=True)
class Contents(Generic[Index]):
    """What was found when a file was looked into.

    schema  the names and types of its columns
    index   where in the file its rows lie, in the way of the format
    """

    num_rows: int
    schema: pa.Schema
    index: Index


class Files(ABC, Generic[Index]):
    """The rows of several files of one format, one after the other, in the order of the files.

    format             what messages call it
    mapped             whether a local file is mapped into memory
    columns_may_lack   whether a column that a file does not name is one without entries, as in JSON
    """

    format: ClassVar[str]
    mapped: ClassVar[bool] = False
    columns_may_lack: ClassVar[bool] = False
    image_shape: tuple[int, ...] | None = None

    def __init__(self, paths: Sequence[str]):
        self.paths = tuple(paths)
        self.name = paths[0] if len(paths) == 1 else f"{os.path.dirname(paths[0])} ({len(paths)} files)"
        with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
            looks = list(pool.map(self._look_into, paths))
        self._sizes = [size for size, _ in looks]
        self._indexes = [contents.index for _, contents in looks]
        self.starts = (0, *accumulate(contents.num_rows for _, contents in looks))
        self.num_rows = self.starts[-1]
        # A file without rows may be without columns, too.
        filled = [(path, look.schema) for path, (_, look) in zip(paths, looks, strict=True) if look.num_rows]
        self.schema, self._problems = _merged(filled or [(paths[0], looks[0][1].schema)], self.columns_may_lack)

    def read(self, start: int, stop: int, columns: Sequence[str]) -> pa.Table:
        for name in columns:
            if name in self._problems:
                raise UserError(self._problems[name])
        tables = []
        for index in range(bisect_right(self.starts, start) - 1, len(self.paths)):
            first, end = self.starts[index : index + 2]
            if first >= stop:
                break
            if first < end:
                path = self.paths[index]
                with self._opened(path, self._sizes[index]) as file:
                    rows = (max(start, first) - first, min(stop, end) - first)
                    table = self._rows(file, self._indexes[index], *rows, columns)
                tables.append(self._in_common_types(with_files(table, os.path.dirname(path), path), columns))
        return pa.concat_tables(tables) if tables else pa.schema([self.schema.field(name) for name in columns]).empty_table()

    def _look_into(self, path: str) -> tuple[int, Contents[Index]]:
        """The length of a file in bytes, and what it contains."""
        with self._opened(path) as file:
            return file.size(), self._contents(file)

    @abstractmethod
    def _contents(self, file: pa.NativeFile) -> Contents[Index]:
        """Whatever is raised here and in `_rows` is told as one line that names the file."""

    @abstractmethod
    def _rows(self, file: pa.NativeFile, index: Index, start: int, stop: int, columns: Sequence[str]) -> pa.Table:
        """These columns of a file's rows start <= row < stop, in any order of the columns."""

    def _in_common_types(self, table: pa.Table, columns: Sequence[str]) -> pa.Table:
        return pa.table({name: to_type(table.column(name), self.schema.field(name).type) for name in columns})

    @contextmanager
    def _opened(self, path: str, size: int | None = None) -> Iterator[pa.NativeFile]:
        """A file, with a failure inside of the `with` block told as one line about it.

        size   its length when it was looked into; UserError where it has another now, since its rows lie elsewhere then
        """
        try:
            with opened(path, self.mapped) as file:
                if size is not None and file.size() != size:
                    raise UserError(f"{path}: has changed: {size:,} bytes when it was opened, {file.size():,} now; restore it")
                yield file
        except UserError:
            raise
        except FileNotFoundError as error:
            gone = "; it was there when the data were opened" if size is not None else ""
            raise UserError(f"{path}: {obstacle(path, error)}{gone}") from error
        except PermissionError as error:
            raise UserError(f"{path}: cannot be read ({obstacle(path, error)})") from error
        except Exception as error:  # whatever a parser or a file system raises over content that is not ours
            raise UserError(f"{path}: cannot be read as {self.format} ({obstacle(path, error)})") from error


def _merged(files: Iterable[tuple[str, pa.Schema]], columns_may_lack: bool) -> tuple[pa.Schema, dict[str, str]]:
    """The columns of all files, in the first one's order, with types that hold the entries of each; and of every column
    that is not the same thing in all of them, what is wrong with it."""
    (first_path, first), *others = files
    names = list(first.names)
    if columns_may_lack:
        names += list(dict.fromkeys(name for _, schema in others for name in schema.names if name not in names))
    types: dict[str, Any] = {field.name: common_type(field.type, field.type) for field in first}
    problems: dict[str, str] = {}
    # Thousands of files have few schemas.
    seen = {first}
    for path, schema in others:
        if schema in seen:
            continue
        seen.add(schema)
        for name in names:
            found = schema.get_all_field_indices(name)
            if not found:
                if not columns_may_lack:
                    problems.setdefault(name, f"{path}: no column '{name}', which {first_path} has")
            elif len(found) > 1:
                problems.setdefault(name, f"{path}: columns with the same name: '{name}'; each may stand there once")
            else:
                type_ = schema.field(found[0]).type
                together = common_type(types.setdefault(name, type_), type_)
                if together is None:
                    problems.setdefault(
                        name,
                        f"{path}: column '{name}' holds {type_}, but {types[name]} in {first_path}; write one of them anew",
                    )
                else:
                    types[name] = together
    # Names that the first file has twice stay so, for `Schema` to tell of.
    return pa.schema([pa.field(name, types[name]) for name in names]), problems
