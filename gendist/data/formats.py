"""Which files a path means, and who reads them: a class for each format, told by the suffix."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import fsspec

from gendist.data.arrow_ipc import ArrowFiles
from gendist.data.csv import CsvFiles
from gendist.data.files import Files
from gendist.data.json import JsonFiles
from gendist.data.npy import NpyFiles
from gendist.data.npz import NpzFiles
from gendist.data.opening import obstacle
from gendist.data.parquet import ParquetFiles
from gendist.data.picture_files import PictureFiles
from gendist.protocols import UserError

FORMATS: dict[str, type[Files[Any]]] = {
    "parquet": ParquetFiles,
    "csv": CsvFiles,
    "json": JsonFiles,
    "arrow": ArrowFiles,
    "npy": NpyFiles,
    "npz": NpzFiles,
}
SUFFIXES = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".npy": "npy",
    ".npz": "npz",
}
# Those are looked for in a folder where none of the others is there: beside a table pictures are what someone made of it.
PICTURES = "pictures"
PICTURE_SUFFIXES = dict.fromkeys((".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff"), PICTURES)
COMPRESSED = (".gz", ".zst", ".bz2", ".xz", ".zip")


def open_files(
    paths: Sequence[str], format_: str | None = None, options: Mapping[str, Mapping[str, Any]] = MappingProxyType({})
) -> Files[Any] | PictureFiles:
    """The rows of the files behind paths, folders and patterns; the suffix tells the format where it is not given.

    options  of each format, what its reader is told
    """
    files = [file for path in paths for file in expand(path, format_)]
    kinds = {format_} if format_ else {_kind_of(path) for path in files}
    if len(kinds) > 1:
        raise UserError(f"data.path: files of several kinds ({', '.join(sorted(map(str, kinds)))}); give data.source")
    kind = kinds.pop()
    return PictureFiles(files) if kind == PICTURES else FORMATS[kind](files, **options.get(kind, {}))


def expand(path: str, format_: str | None) -> list[str]:
    """The files behind a path, a folder or a pattern, in the order of their names."""
    if "://" in path:
        return _expand_url(path, format_)
    if os.path.isdir(path):
        found = list(_files_in(path))
        inside = _data_among(found, path, format_)
        if not inside:
            suffixes = [suffix for suffix, kind in SUFFIXES.items() if format_ in (None, kind)]
            suffixes += list(PICTURE_SUFFIXES) if format_ in (None, PICTURES) else []
            packed = next((file for file in sorted(found) if Path(file).suffix.lower() in COMPRESSED), None)
            hint = f"; {_unpack(packed)}" if packed else ""
            raise UserError(f"{path}: no {', '.join(suffixes)} file in this folder{hint}")
        return [os.path.abspath(file) for file in inside]
    if glob.has_magic(path) and not os.path.lexists(path):
        found = [file for file in sorted(glob.glob(path, recursive=True)) if not os.path.isdir(file)]
        if not found:
            raise UserError(f"{path}: no file matches")
        return [os.path.abspath(file) for file in found]
    return [os.path.abspath(path)]


def _expand_url(url: str, format_: str | None) -> list[str]:
    """The same of a URL that fsspec knows. What ends in a suffix of data is taken for a file, so that nobody need be asked."""
    if not glob.has_magic(url) and Path(url).suffix.lower() in SUFFIXES | PICTURE_SUFFIXES:
        return [url]
    try:
        system, inside = fsspec.core.url_to_fs(url)
        if system.isdir(inside):
            found = _data_among(system.find(inside), inside, format_)
        elif glob.has_magic(inside):
            found = [file for file in system.glob(inside) if not system.isdir(file)]
        else:
            return [url]
    except (OSError, ValueError, ImportError, NotImplementedError) as error:
        raise UserError(f"{url}: cannot be listed ({' '.join(str(error).split()) or type(error).__name__})") from error
    if not found:
        raise UserError(f"{url}: no file {'matches' if glob.has_magic(inside) else 'of data is there'}")
    return [system.unstrip_protocol(file) for file in sorted(found)]


def check_readable(path: str) -> None:
    """UserError where a local file is none, or may not be read."""
    try:
        with open(path, "rb"):
            pass
    except OSError as error:
        raise UserError(f"{path}: {obstacle(path, error)}") from error


def is_quick_to_open(path: str, format_: str | None) -> bool:
    """Whether a file says which columns it has without being read from its beginning to its end."""
    return (format_ or SUFFIXES.get(Path(path).suffix.lower())) in ("parquet", "arrow", "npy", "npz")


def _data_among(files: Sequence[str], folder: str, format_: str | None) -> list[str]:
    """Those of the files in a folder that are meant, in order: what begins with a dot or an underline is some writer's own."""
    for kinds in (SUFFIXES, PICTURE_SUFFIXES):
        of_kind = [file for file in files if format_ in (None, kind := kinds.get(Path(file).suffix.lower())) and kind]
        meant = [file for file in of_kind if not _is_hidden(Path(file).relative_to(folder))]
        if meant:
            return sorted(meant)
    return []


def _is_hidden(file: Path) -> bool:
    return any(part.startswith((".", "_")) for part in file.parts)


def _files_in(folder: str) -> Iterator[str]:
    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: the folder cannot be read ({error.strerror})") from error

    seen = {os.path.realpath(folder)}  # links to folders are followed, but not in circles
    for parent, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        real = {name: os.path.realpath(os.path.join(parent, name)) for name in folders}
        folders[:] = [name for name in folders if real[name] not in seen]
        seen |= {real[name] for name in folders}
        yield from (os.path.join(parent, name) for name in names)


def _kind_of(path: str) -> str:
    suffix = Path(path).suffix.lower()
    if suffix in COMPRESSED:
        raise UserError(_unpack(path))
    if suffix not in SUFFIXES | PICTURE_SUFFIXES:
        allowed = ", ".join(SUFFIXES | PICTURE_SUFFIXES)
        raise UserError(f"{path}: the suffix does not say what this is; allowed are {allowed}, or give data.source")
    return (SUFFIXES | PICTURE_SUFFIXES)[suffix]


def _unpack(path: str) -> str:
    return f"{path}: compressed as a whole, so that no row is found without all before it; unpack it, or write it as Parquet"
