"""Arrays in NumPy's format, mapped into memory: the first axis is the rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from gendist.data.files import Contents, Files
from gendist.data.memory import array_column, image_shape_of
from gendist.protocols import UserError


@dataclass(frozen=True)
class Array:
    """Where in the file its entries begin, and how they are to be read."""

    offset: int
    shape: tuple[int, ...]
    in_columns: bool  # Fortran's order
    dtype: np.dtype[Any]

    def rows(self, file: pa.NativeFile, start: int, stop: int) -> np.ndarray[Any, Any]:
        row_bytes = self.dtype.itemsize * math.prod(self.shape[1:])
        if self.in_columns:
            file.seek(self.offset)
            whole = np.frombuffer(file.read_buffer(self.shape[0] * row_bytes), dtype=self.dtype)
            return whole.reshape(self.shape, order="F")[start:stop]
        file.seek(self.offset + start * row_bytes)
        entries = np.frombuffer(file.read_buffer((stop - start) * row_bytes), dtype=self.dtype)
        return entries.reshape(stop - start, *self.shape[1:])


def array_at(file: Any) -> Array:
    """The array whose header begins where the file stands."""
    version = np.lib.format.read_magic(file)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, in_columns, dtype = read_header(file)
    return Array(file.tell(), shape, in_columns, dtype)


class NpyFiles(Files[Array]):
    """The one column of all arrays is called x."""

    format = ".npy"
    mapped = True

    def __init__(self, paths: Sequence[str]):
        super().__init__(paths)
        first = self._indexes[0]
        for path, array in zip(self.paths, self._indexes, strict=True):
            if array.shape[1:] != first.shape[1:]:
                raise UserError(
                    f"{path}: rows of shape {array.shape[1:]}, but {first.shape[1:]} in {self.paths[0]}; choose files of one"
                )
        self.image_shape = image_shape_of(np.empty((0, *first.shape[1:])))

    def _contents(self, file: pa.NativeFile) -> Contents[Array]:
        array = array_at(file)
        shape, dtype = array.shape, array.dtype
        if not shape or dtype.kind not in "buif":
            raise ValueError(f"an array of {dtype} of shape {shape}; rows of numbers are needed")
        if file.size() < array.offset + dtype.itemsize * math.prod(shape):
            raise ValueError(f"{file.size():,} bytes do not hold an array of {dtype} of shape {shape}; the file is cut short")
        first_row = array_column(array.rows(file, 0, min(1, shape[0])), "the array")
        return Contents(shape[0], pa.schema([("x", first_row.type)]), array)

    def _rows(self, file: pa.NativeFile, index: Array, start: int, stop: int, columns: Sequence[str]) -> pa.Table:
        return pa.table({"x": array_column(index.rows(file, start, stop), "the array")})
