"""Pictures that lie in files of their own: a folder of them as a table, and columns of images that name files."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import takewhile

import pyarrow as pa

from gendist.data.column_types import IMAGES
from gendist.data.opening import obstacle, opened
from gendist.protocols import UserError

logger = logging.getLogger("gendist")

FILES_AT_ONCE = 16  # read side by side: a disk over a network is slow to answer, not slow to read


class PictureFiles:
    """A file a row, in the order of the files; each is read when its row is.

    The columns: image and, where they lie in several folders, label, the name of the folder; what lies in the folder that
    holds all others has none.
    """

    image_shape: tuple[int, ...] | None = None

    def __init__(self, paths: Sequence[str]):
        self.paths: tuple[str, ...] = tuple(paths)
        folders = [os.path.dirname(path) for path in paths]
        root = _common_folder(set(folders))
        self.name = paths[0] if len(paths) == 1 else f"{root} ({len(paths)} pictures)"
        self.num_rows = len(paths)
        self.schema = pa.schema([("image", IMAGES)])
        self._labels = [None if folder == root else os.path.basename(folder) for folder in folders]
        if any(label is not None for label in self._labels):
            self.schema = self.schema.append(pa.field("label", pa.string()))
        folder_of: dict[str, str] = {}
        for label, folder in zip(self._labels, folders, strict=True):
            if label is not None and folder_of.setdefault(label, folder) != folder:
                logger.warning("%s: '%s' is the label of pictures in %s and in %s", root, label, folder_of[label], folder)
                break

    def read(self, start: int, stop: int, columns: Sequence[str]) -> pa.Table:
        table: dict[str, pa.Array] = {}
        for name in columns:
            if name == "image":
                paths = pa.array(self.paths[start:stop], pa.large_string())
                table[name] = pa.StructArray.from_arrays([_contents(self.paths[start:stop]), paths], fields=list(IMAGES))
            else:
                table[name] = pa.array(self._labels[start:stop], pa.string())
        return pa.table(table)


def _common_folder(folders: set[str]) -> str:
    """The folder that holds all of these, which may be URLs."""
    split = [folder.split("/") for folder in folders]
    first, last = min(split), max(split)
    common = [one for one, _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))]
    return "/".join(common)


def with_files(table: pa.Table, folder: str, source_name: str) -> pa.Table:
    """The table, with the bytes of images of which it holds the path alone.

    folder  that such a path is relative to

    UserError where a file cannot be read.
    """
    for index, field in enumerate(table.schema):
        if pa.types.is_struct(field.type) and {part.name for part in field.type} == {"bytes", "path"}:
            where = f"{source_name}: column '{field.name}'"
            chunks = [_with_bytes(chunk, folder, where) for chunk in table.column(index).chunks]
            table = table.set_column(index, field, pa.chunked_array(chunks, field.type))
    return table


def _with_bytes(images: pa.StructArray, folder: str, where: str) -> pa.StructArray:
    parts = dict(zip((field.name for field in images.type), images.flatten(), strict=True))
    if not parts["bytes"].null_count:
        return images
    contents, paths = parts["bytes"].to_pylist(), parts["path"].to_pylist()
    rows = [row for row, (content, path) in enumerate(zip(contents, paths, strict=True)) if content is None and path]
    places = [_place(paths[row], folder, where) for row in rows]
    for row, content in zip(rows, _contents(places, where).to_pylist(), strict=True):
        contents[row] = content
    parts["bytes"] = pa.array(contents, parts["bytes"].type)
    return pa.StructArray.from_arrays(list(parts.values()), fields=list(images.type))


def _place(path: str, folder: str, where: str) -> str:
    """Where a file lies that a column names. Data of one file system send nobody to another, such as a web server."""
    if "://" in path and path.partition("://")[0] != folder.partition("://")[0]:
        raise UserError(f"{where} names {path}, which is not where the data are; put the images beside them")
    return path if "://" in path or os.path.isabs(path) else f"{folder}/{path}"


def _contents(paths: Sequence[str], where: str = "") -> pa.Array:
    """The bytes of files. where: what names them, unless it is the data block."""

    def content(path: str) -> bytes:
        try:
            with opened(path) as file:
                return bytes(file.read())
        except Exception as error:  # whatever a file system raises
            what = f"{where} names {path}, which" if where else f"{path}:"
            raise UserError(
                f"{what} cannot be read on {os.uname().nodename} ({obstacle(path, error)}); put it where all nodes see it"
                + (", or the images themselves into the file" if where else "")
            ) from error

    with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
        return pa.array(list(pool.map(content, paths)), pa.large_binary())
