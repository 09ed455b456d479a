"""Archives of arrays in NumPy's format: an array's name is that of a column, and its first axis the rows.

What `np.savez` has stored is read where it lies. What `np.savez_compressed` has packed cannot be read in parts: such an array
is unpacked once in a process, and held there.
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from gendist.data.files import Contents, Files
from gendist.data.memory import array_column, array_field
from gendist.data.npy import Array, array_at
from gendist.protocols import UserError

ARRAYS_HELD = 8  # unpacked, at a time
LOCAL_HEADER_BYTES = 30  # before the content of a file in an archive, and before its name and an extra field

_held: dict[tuple[str, int, int], np.ndarray[Any, Any]] = {}


@dataclass(frozen=True)
class _Packed:
    """An array that is compressed, in the member of an archive with this checksum and length."""

    member: str
    checksum: int
    member_bytes: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def rows(self, file: pa.NativeFile, start: int, stop: int) -> np.ndarray[Any, Any]:
        key = (self.member, self.checksum, self.member_bytes)
        array = _held.get(key)
        if array is None:
            with zipfile.ZipFile(file) as archive, archive.open(self.member) as member:
                array = np.lib.format.read_array(member, allow_pickle=False)
            while len(_held) >= ARRAYS_HELD:
                _held.pop(next(iter(_held)), None)
            _held[key] = array
        return array[start:stop]


Arrays = dict[str, Array | _Packed]


class NpzFiles(Files[Arrays]):
    """
    named   the columns that are asked for: where the arrays have different lengths, those that are as long as these are columns
    matrix  the one array of more than one axis, which is fitted alone where no columns are chosen; None where there are several
    """

    format = ".npz"
    mapped = True

    def __init__(self, paths: Sequence[str], named: Sequence[str] = ()):
        self._named = tuple(named)
        super().__init__(paths)
        of_first = {name: (path, array.shape[1:]) for path, name, array in reversed(list(self._all_arrays()))}
        for path, name, array in self._all_arrays():
            like, shape = of_first[name]
            if array.shape[1:] != shape:
                raise UserError(
                    f"{path}: '{name}' has rows of shape {array.shape[1:]}, but {shape} in {like}; choose files of one"
                )
        self.schema = pa.schema([array_field(field.name, field.type, of_first[field.name][1]) for field in self.schema])
        matrices = [name for name in self.schema.names if of_first[name][1]]
        self.matrix = matrices[0] if len(matrices) == 1 else None

    def _all_arrays(self) -> Any:
        for path, arrays in zip(self.paths, self._indexes, strict=True):
            for name, array in arrays.items():
                yield path, name, array

    def _contents(self, file: pa.NativeFile) -> Contents[Arrays]:
        with zipfile.ZipFile(file) as archive:
            members = [member for member in archive.infolist() if member.filename.endswith(".npy")]
            found = {member.filename.removesuffix(".npy"): _array(file, archive, member) for member in members}
        lengths = {name: array.shape[0] for name, array in found.items() if array.shape}  # a single number is no column
        if not lengths:
            raise ValueError("no array of rows is in it")
        asked_for = {name: length for name, length in lengths.items() if name in self._named} or lengths
        num_rows, *others = dict.fromkeys(asked_for.values())
        if others:
            said = ", ".join(f"'{name}' {length:,}" for name, length in asked_for.items())
            raise ValueError(f"arrays of different lengths: {said}; choose those of one with data.columns and data.label")
        for name in asked_for:
            if not _is_plain(found[name]):
                what = "pickled objects" if found[name].dtype.hasobject else str(found[name].dtype)
                raise ValueError(f"'{name}' is an array of {what}; numbers are needed, or, of one axis, texts")
        arrays = {name: found[name] for name, length in lengths.items() if length == num_rows and _is_plain(found[name])}
        return Contents(num_rows, pa.schema([(name, _type_of(name, array)) for name, array in arrays.items()]), arrays)

    def _rows(self, file: pa.NativeFile, index: Arrays, start: int, stop: int, columns: Sequence[str]) -> pa.Table:
        return pa.table({name: _column(name, index[name].rows(file, start, stop)) for name in columns})


def _array(file: pa.NativeFile, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Array | _Packed:
    """What is in a member, and where."""
    if member.compress_type == zipfile.ZIP_STORED:
        file.seek(member.header_offset + LOCAL_HEADER_BYTES - 4)
        lengths = np.frombuffer(file.read(4), dtype="<u2")
        file.seek(member.header_offset + LOCAL_HEADER_BYTES + int(lengths.sum()))
        return array_at(file)
    with archive.open(member) as content:
        header = array_at(content)
    return _Packed(member.filename, member.CRC, member.file_size, header.shape, header.dtype)


def _is_plain(array: Array | _Packed) -> bool:
    return array.dtype.kind in "buif" or (len(array.shape) == 1 and array.dtype.kind in "US")


def _type_of(name: str, array: Array | _Packed) -> pa.DataType:
    return _column(name, np.empty((0, *array.shape[1:]), array.dtype)).type


def _column(name: str, array: np.ndarray[Any, Any]) -> pa.Array:
    return array_column(array.astype("U") if array.dtype.kind == "S" else array, f"'{name}'")
