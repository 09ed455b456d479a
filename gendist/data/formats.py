"""Which files a path means, and who reads them: a class for each format, told by the suffix."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import fsspec

from gendist.data.arrow_ipc import ArrowFiles
from gendist.data.csv import CsvFiles
from gendist.data.files import Files
from gendist.data.json import JsonFiles
from gendist.data.npy import NpyFiles
from gendist.data.parquet import ParquetFiles
from gendist.protocols import UserError

FORMATS: dict[str, type[Files[Any]]] = {
    "parquet": ParquetFiles,
    "csv": CsvFiles,
    "json": JsonFiles,
    "arrow": ArrowFiles,
    "npy": NpyFiles,
}
SUFFIXES = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".csv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".npy": "npy",
}


def open_files(paths: Sequence[str], format_: str | None = None) -> Files[Any]:
    """The rows of the files behind paths, folders and patterns; the suffix tells the format where it is not given."""
    files = [file for path in paths for file in expand(path, format_)]
    kinds = {format_} if format_ else {_kind_of(path) for path in files}
    if len(kinds) > 1:
        raise UserError(f"data.path: files of several kinds ({', '.join(sorted(map(str, kinds)))}); give data.source")
    return FORMATS[kinds.pop()](files)


def expand(path: str, format_: str | None) -> list[str]:
    """The files behind a path, a folder or a pattern, in the order of their names."""
    if "://" in path:
        return _expand_url(path, format_)
    if os.path.isdir(path):
        inside = sorted(file for file in _files_in(path) if _is_data(Path(file).relative_to(path), format_))
        if not inside:
            suffixes = [suffix for suffix, kind in SUFFIXES.items() if format_ in (None, kind)]
            raise UserError(f"{path}: no {', '.join(suffixes)} file in this folder")
        return [os.path.abspath(file) for file in inside]
    if glob.has_magic(path) and not os.path.lexists(path):
        found = [file for file in sorted(glob.glob(path, recursive=True)) if not os.path.isdir(file)]
        if not found:
            raise UserError(f"{path}: no file matches")
        return [os.path.abspath(file) for file in found]
    return [os.path.abspath(path)]


def _expand_url(url: str, format_: str | None) -> list[str]:
    """The same of a URL that fsspec knows. What ends in a suffix of data is taken for a file, so that nobody need be asked."""
    if not glob.has_magic(url) and Path(url).suffix.lower() in SUFFIXES:
        return [url]
    try:
        system, inside = fsspec.core.url_to_fs(url)
        if system.isdir(inside):
            found = [file for file in system.find(inside) if _is_data(Path(file).relative_to(inside), format_)]
        elif glob.has_magic(inside):
            found = [file for file in system.glob(inside) if not system.isdir(file)]
        else:
            return [url]
    except (OSError, ValueError, ImportError, NotImplementedError) as error:
        raise UserError(f"{url}: cannot be listed ({' '.join(str(error).split()) or type(error).__name__})") from error
    if not found:
        raise UserError(f"{url}: no file {'matches' if glob.has_magic(inside) else 'of data is there'}")
    return [system.unstrip_protocol(file) for file in sorted(found)]


def _files_in(folder: str) -> Iterator[str]:
    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: the folder cannot be read ({error.strerror})") from error

    for parent, _, names in os.walk(folder, onerror=refuse):
        yield from (os.path.join(parent, name) for name in names)


def _is_data(file: Path, format_: str | None) -> bool:
    """Whether a file inside a folder is meant: what begins with a dot or an underline is some writer's own."""
    kind = SUFFIXES.get(file.suffix.lower())
    return kind is not None and format_ in (None, kind) and not any(part.startswith((".", "_")) for part in file.parts)


def _kind_of(path: str) -> str:
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise UserError(f"{path}: the suffix does not say what this is; allowed are {', '.join(SUFFIXES)}, or give data.source")
    return SUFFIXES[suffix]
