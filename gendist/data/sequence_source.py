"""The rows of a source as the steps of sequences: as they are, or taken out of lists, texts and images.

Legend: S sequences, T steps, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from gendist.data.column_types import as_texts, entry_type, is_image
from gendist.data.matrix import entry_shape, to_matrix
from gendist.data.sources import Source
from gendist.data.tokens import TextConfig, tokens_of
from gendist.protocols import UserError

MIN_SIDE = 4  # of an array's rows and columns: what is narrower is no picture of anything

Bounds = np.ndarray[Any, np.dtype[np.int64]]
Kind = Literal["constant", "list", "characters", "tokens", "pixels"]


class SequenceSource:
    """The steps of sequences, one after the other, as the rows of a source.

    bounds       (S + 1,) rows bounds[s] up to but not including bounds[s + 1] are the steps of sequence s
    image_shape  where a sequence is an image, and its steps are the rows of pixels, else None
    """

    def __init__(self, source: Source, columns: Sequence[str], bounds: Bounds):
        self.source, self.bounds = source, bounds
        self.num_rows, self.paths, self.name = int(bounds[-1]), source.paths, source.name
        self.schema: pa.Schema = pa.schema([source.schema.field(name) for name in columns])
        self.image_shape: tuple[int, ...] | None = None

    @property
    def num_sequences(self) -> int:
        return len(self.bounds) - 1

    def read(self, start: int, stop: int, columns: Sequence[str]) -> pa.Table:
        return self.source.read(start, stop, columns)


class NestedSequences(SequenceSource):
    """Of a source each row of which is a sequence.

    kinds  what each column holds
    """

    def __init__(
        self,
        source: Source,
        kinds: dict[str, Kind],
        bounds: Bounds,
        text: TextConfig | None = None,
        image_shape: tuple[int, ...] | None = None,
    ):
        super().__init__(source, list(kinds), bounds)
        self.name = f"{source.name}, step by step"
        self.kinds, self.text, self.shape = kinds, text, image_shape
        self.width = prod(image_shape[1:]) if image_shape else 0
        self.schema = pa.schema([(name, self._type(source.schema.field(name).type, kind)) for name, kind in kinds.items()])
        if image_shape and min(image_shape[0], self.width) >= MIN_SIDE:
            self.image_shape = image_shape

    def _type(self, type_: pa.DataType, kind: Kind) -> pa.DataType:
        match kind:
            case "characters" | "tokens":
                return pa.large_string()
            case "pixels":
                return pa.list_(pa.float64() if is_image(type_) else entry_type(type_), self.width)
            case "list":
                return entry_type(type_)
        return type_

    def read(self, start: int, stop: int, columns: Sequence[str]) -> pa.Table:
        if start >= stop:
            return pa.schema([self.schema.field(name) for name in columns]).empty_table()
        first = int(np.searchsorted(self.bounds, start, side="right")) - 1
        last = int(np.searchsorted(self.bounds, stop, side="left"))
        table, lengths = self.source.read(first, last, columns), np.diff(self.bounds[first : last + 1])
        steps = {name: self._steps(table, name, lengths, first) for name in columns}
        begin = start - int(self.bounds[first])
        return pa.table(steps).slice(begin, stop - start)

    def _steps(self, table: pa.Table, name: str, lengths: Bounds, first_row: int) -> Any:
        column = table.column(name)
        match self.kinds[name]:
            case "constant":
                return column.take(pa.array(np.repeat(np.arange(len(lengths)), lengths)))
            case "characters":
                return _characters(column)
            case "tokens":
                assert self.text is not None
                return pa.array([token for tokens in tokens_of(column, self.text) for token in tokens], pa.large_string())
            case "pixels" if is_image(column.type):
                shape = entry_shape(table.slice(0, 1), name, self.source.name)
                if shape != self.shape:
                    raise UserError(f"{self.source.name}: column '{name}': images of mixed sizes: {shape} in row {first_row}, "
                                    f"{self.shape} in row 0")  # fmt: skip
                pixels = to_matrix(table, [name], first_row, self.source.name)
                return pa.FixedSizeListArray.from_arrays(pa.array(pixels.reshape(-1)), self.width)
            case "pixels":
                return pa.FixedSizeListArray.from_arrays(_entries(column), self.width)
        return _entries(column)


def _entries(column: Any) -> Any:
    """What the lists of a column hold, one after the other."""
    array = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
    return (array.storage if isinstance(array, pa.ExtensionArray) else array).flatten()


def _characters(column: Any) -> Any:
    joined = "".join(text for text in as_texts(column).to_pylist() if text)
    codes, which = np.unique(np.frombuffer(joined.encode("utf-32-le"), dtype="<u4"), return_inverse=True)
    return pa.array([chr(code) for code in codes], pa.large_string()).take(pa.array(which))
