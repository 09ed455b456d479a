"""Where rows come from. A source knows how many rows it has and returns any run of them as an Arrow table.

Sources are small and travel to the tasks, which do the reading; what is held in memory travels once. What the spec's `data:`
block can name stands in `files.py`, what Python can hand over in `memory.py`.
"""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import fsspec
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field

from gendist.data.files import CsvFiles, NpyFile, ParquetFiles
from gendist.data.memory import digits
from gendist.protocols import UserError

SUFFIXES = {".parquet": "parquet", ".pq": "parquet", ".csv": "csv", ".npy": "npy"}


class DataConfig(BaseModel):
    """The `data:` block of a spec.

    source               what kind of data; told by the suffix of the path where it is left out
    path                 a file, a folder, a pattern such as "data/*.parquet", or a list of these
    columns              the columns that are fitted; all but label and weight where left out, or the image column
    label                a column that says which component (class) a row belongs to; may have missing entries
    weight               a column of weights; weight 2 counts a row twice
    validation_fraction  the share of rows held out, chosen by row number
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: Literal["digits", "npy", "parquet", "csv"] | None = None
    path: str | Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    columns: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    label: str | None = None
    weight: str | None = None
    validation_fraction: float = Field(default=0.0, ge=0.0, lt=1.0)


class Source(Protocol):
    """Rows 0..num_rows of a data set.

    num_rows     how many there are
    schema       the names and types of the columns
    image_shape  (height, width[, channels]) where the first column is known to hold images, else None
    name         what error messages call it
    paths        the files it reads
    """

    num_rows: int
    paths: tuple[str, ...]
    schema: pa.Schema
    image_shape: tuple[int, ...] | None
    name: str

    def read(self, start: int, stop: int, columns: Sequence[str]) -> pa.Table:
        """These columns of the rows start <= row < stop."""
        ...


def open_source(config: DataConfig) -> Source:
    """The source that a spec's `data:` block names; UserError where there is none."""
    if config.source == "digits":
        if config.path is not None:
            raise UserError("data.path: the digits are embedded and have no path; leave it out")
        return digits()
    if config.path is None:
        raise UserError("data.path is missing: give a file, a folder or a pattern, or `source: digits` for embedded data")
    files = _expand([config.path] if isinstance(config.path, str) else config.path)
    kinds = {config.source} if config.source else {_kind_of(path) for path in files}
    if len(kinds) > 1:
        raise UserError(f"data.path: files of several kinds ({', '.join(sorted(map(str, kinds)))}); give data.source")
    match kinds.pop():
        case "parquet":
            return ParquetFiles(files)
        case "csv":
            return CsvFiles(files)
        case _:
            if len(files) > 1:
                raise UserError(f"data.path: {len(files)} .npy files; a source of .npy is one file")
            return NpyFile(files[0])


def identity(source: Source, config: DataConfig) -> dict[str, Any]:
    """What tells these rows from others without reading them, as plain JSON.

    Of each file, in order: its name, size and time of change, or what its file system knows instead (an ETag, say). Not the
    folder, which another machine may have mounted elsewhere.
    """
    files: list[tuple[Any, ...]] = []
    for path in source.paths:
        if "://" in path:
            system, inside = fsspec.core.url_to_fs(path)
            files.append((path, system.ukey(inside)))
        else:
            status = os.stat(path)
            files.append((os.path.basename(path), status.st_size, status.st_mtime_ns))
    said = config.model_dump(mode="json", exclude={"path", "columns"} if files else {"columns"})
    return {**said, "num_rows": source.num_rows, "files": hashlib.sha256(repr(files).encode()).hexdigest()}


def _expand(paths: Sequence[str]) -> list[str]:
    """The files behind paths, folders and patterns, in the order of their names."""
    files: list[str] = []
    for path in paths:
        if "://" in path:
            files.append(path)
        elif os.path.isdir(path):
            inside = sorted(str(file) for file in Path(path).rglob("*") if _is_data(file.relative_to(path)))
            if not inside:
                raise UserError(f"{path}: no {', '.join(SUFFIXES)} file in this folder")
            files += inside
        elif os.path.exists(path):
            files.append(path)
        elif glob.has_magic(path):
            found = sorted(glob.glob(path, recursive=True))
            if not found:
                raise UserError(f"{path}: no file matches")
            files += found
        else:
            raise UserError(f"{path}: no such file")
    return [path if "://" in path else os.path.abspath(path) for path in files]


def _is_data(file: Path) -> bool:
    """Whether a file inside a folder is meant: what begins with a dot or an underline is some writer's own."""
    return file.suffix.lower() in SUFFIXES and not any(part.startswith((".", "_")) for part in file.parts)


def _kind_of(path: str) -> str:
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise UserError(f"{path}: the suffix does not say what this is; allowed are {', '.join(SUFFIXES)}, or give data.source")
    return SUFFIXES[suffix]
