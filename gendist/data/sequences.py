"""Sequences in time: which rows of a source are the steps of which, and how a source is read step by step.

What makes a sequence, the first that applies:

    data.sequence   a column of ids: each row is a step, and the rows of one id are a sequence
    images, arrays (S, T, D)   each is the sequence of its rows (of pixels)
    .npy files of (T, D) or (T,)   each file is a sequence
    columns of lists   each row is a sequence, and each entry a step: a number, a text or a list of numbers. Several columns are
                    side by side. Other columns hold for all steps
    a column of texts   each text is the sequence of its characters; with data.text of its tokens
    else            all rows are the steps of one sequence

Legend: S sequences, T steps, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gendist.data.column_types import as_texts, entry_type, is_image, is_list, is_numeric, is_text
from gendist.data.matrix import entry_shape, to_matrix
from gendist.data.memory import TableSource, array_shape_of
from gendist.data.npy import NpyFiles
from gendist.data.sequence_ids import bounds_of_ids
from gendist.data.sources import DataConfig, Source, check_columns, listing, require_column
from gendist.data.tokens import TextConfig, holds_tokens, tokens_of
from gendist.protocols import UserError

BYTES_AT_ONCE = 32 * 2**20  # about as many are looked at in one go, to see how long the sequences are
FIRST_LOOK_ROWS = 256
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
        self.kinds, self.text, self.image_shape = kinds, text, image_shape
        self.width = prod(image_shape[1:]) if image_shape else 0
        self.schema = pa.schema([(name, self._type(source.schema.field(name).type, kind)) for name, kind in kinds.items()])
        if image_shape and min(image_shape[0], self.width) < MIN_SIDE:
            self.image_shape = None

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
                pixels = to_matrix(table, [name], first_row, self.source.name)
                if pixels.size != lengths.sum() * self.width:
                    raise UserError(f"{self.source.name}: column '{name}' holds images of mixed sizes, in rows {first_row} to "
                                    f"{first_row + len(lengths) - 1} others than in row 0")  # fmt: skip
                return pa.FixedSizeListArray.from_arrays(pa.array(pixels.reshape(-1)), self.width)
            case "pixels":
                return pa.FixedSizeListArray.from_arrays(_entries(column), self.width)
        return _entries(column)


def as_sequences(source: Source, config: DataConfig) -> SequenceSource:
    """The source, step by step; UserError where it holds no step, or no sequences can be told from what it holds."""
    if source.num_rows == 0:
        raise UserError(f"{source.name}: the data set is empty")
    check_columns(source, config)
    sequences = _opened(source, config)
    if sequences.num_rows == 0:
        raise UserError(
            f"{source.name}: {sequences.num_sequences} sequences, none of which has a step; there is nothing to fit"
        )
    return sequences


def as_fitted(
    config: DataConfig, source: Source, sequence: str | None, order: str | None, text: TextConfig | None
) -> DataConfig:
    """The `data:` block with what the model says that is to read the source: the columns of ids and order, where they are
    there, and how texts become tokens. UserError where the block says otherwise."""
    names = source.schema.names
    if config.sequence is None and sequence in names:
        config = config.model_copy(update={"sequence": sequence, "order": order if order in names else None})
    if text is None:
        if config.text is not None:
            raise UserError("data.text: the model was not fitted to tokens of texts; leave it out")
        return config
    if config.sequence is not None:
        return config  # tokens already, as a sample of the model has them
    name = config.text.column if config.text else names[0] if len(names) == 1 else text.column
    as_known = text.model_copy(update={"column": name})
    if config.text not in (None, as_known):
        raise UserError(f"data.text: the model has taken texts apart otherwise ({as_known}); leave it out")
    return config.model_copy(update={"text": as_known, "columns": None})


def as_rows(source: Source, config: DataConfig) -> Source:
    """The source as it is, for a family whose rows are independent; UserError where what is given are sequences."""
    for field in ("sequence", "order"):
        if getattr(config, field) is not None:
            raise UserError(f"data.{field}: of families of sequences alone; to this one rows are independent: leave it out")
    if isinstance(source, TableSource) and source.is_list_of_sequences:
        raise UserError("data: a list of sequences, but to this family rows are independent; give an array (N, D) of them")
    return source


def _opened(source: Source, config: DataConfig) -> SequenceSource:
    if config.sequence is not None:
        for name in filter(None, (config.sequence, config.order)):
            require_column(source, name)
        others = [name for name in source.schema.names if name not in (config.sequence, config.order)]
        for name in config.columns or ():
            if name not in others:
                raise UserError(f"data.columns: '{name}' says where the sequences are, and is no feature; leave it out")
        _refuse_text(config, "with data.sequence a row is one step already")
        return SequenceSource(source, others, bounds_of_ids(source, config.sequence, config.order))
    beside = [name for name in dict.fromkeys((*config.label_columns, config.weight)) if name is not None]
    features = config.columns or tuple(name for name in source.schema.names if name not in beside)
    if config.text is not None:
        return _of_texts(source, config, features, beside)
    types = {name: source.schema.field(name).type for name in features}
    image = _image(source, types, features)
    if image is not None:
        name, shape = image
        _refuse_others(source, config, name, features, "images")
        bounds = np.arange(source.num_rows + 1, dtype=np.int64) * shape[0]
        return NestedSequences(source, {name: "pixels", **dict.fromkeys(beside, "constant")}, bounds, image_shape=shape)
    if isinstance(source, NpyFiles):
        return SequenceSource(source, source.schema.names, np.array(source.starts, dtype=np.int64))
    lists = [name for name, type_ in types.items() if is_list(type_) and array_shape_of(source.schema.field(name)) is None]
    if lists:
        return _of_lists(source, config.columns or tuple(lists), beside)
    texts = [name for name, type_ in types.items() if is_text(type_)]
    if texts and not all(is_numeric(type_) for type_ in types.values()):
        return _of_texts(source, config, features, beside)
    return SequenceSource(source, source.schema.names, np.array([0, source.num_rows], dtype=np.int64))


def _image(source: Source, types: dict[str, Any], features: Sequence[str]) -> tuple[str, tuple[int, ...]] | None:
    """The column that holds images, or arrays (T, D), and their shape."""
    first = source.schema.names[0]
    if source.image_shape is not None and first in types:
        return first, source.image_shape
    for name in features:
        shape = array_shape_of(source.schema.field(name))
        if shape is not None and len(shape) > 1:
            return name, shape
        if is_image(types[name]):
            return name, entry_shape(source.read(0, 1, [name]), name, source.name)
    return None


def _refuse_others(source: Source, config: DataConfig, name: str, features: Sequence[str], what: str) -> None:
    others = [other for other in features if other != name]
    if config.columns is not None and others:
        raise UserError(f"{source.name}: column '{name}' holds {what}; such a column is fitted alone: leave out "
                        f"{listing(others)} (data.columns)")  # fmt: skip


def _refuse_text(config: DataConfig, why: str) -> None:
    if config.text is not None:
        raise UserError(f"data.text: {why}; leave one of both out")


def _of_texts(source: Source, config: DataConfig, features: Sequence[str], beside: Sequence[str]) -> NestedSequences:
    """Each text the sequence of its characters, or of its tokens."""
    text = config.text
    if text is None:
        if len(features) > 1:
            raise UserError(
                f"{source.name}: columns {listing(features)}, some of texts: choose one whose texts are sequences with "
                "data.columns, or name the column of ids with data.sequence where a row is one step"
            )
        name = features[0]
        bounds = _scanned(source, [name], lambda table: [_num_characters(table.column(name))])
        return NestedSequences(source, {name: "characters", **dict.fromkeys(beside, "constant")}, bounds)
    name = text.column
    require_column(source, name)
    if config.columns not in (None, (name,)):
        raise UserError(f"data.columns: {listing(config.columns)}; with data.text its column '{name}' is fitted alone")
    usual = TextConfig(column=name)
    for field in ("hash_buckets", "max_vocabulary", "min_count"):
        if getattr(text, field) != getattr(usual, field):
            raise UserError(f"data.text.{field}: of counts of tokens; here a text is the sequence of its tokens: leave it out")
    type_ = source.schema.field(name).type
    if not holds_tokens(type_):
        raise UserError(f"{source.name}: column '{name}' holds {type_}; data.text takes texts, or lists of tokens")
    bounds = _scanned(
        source,
        [name],
        lambda table: [np.array([len(tokens) for tokens in tokens_of(table.column(name), text)], dtype=np.int64)],
    )
    return NestedSequences(source, {name: "tokens", **dict.fromkeys(beside, "constant")}, bounds, text)


def _of_lists(source: Source, features: Sequence[str], beside: Sequence[str]) -> NestedSequences:
    """Each row a sequence; its lists must be equally long."""
    kinds: dict[str, Kind] = {}
    for name in (*features, *beside):
        kinds[name] = "list" if is_list(source.schema.field(name).type) else "constant"
    lists = [name for name, kind in kinds.items() if kind == "list"]
    bounds = _scanned(source, lists, lambda table: [_num_entries(table.column(name)) for name in lists])
    return NestedSequences(source, kinds, bounds)


def _scanned(source: Source, columns: Sequence[str], lengths_of: Any) -> Bounds:
    """The bounds of the sequences that rows are, by one pass over these columns.

    lengths_of  table -> for each column the length of each row's sequence
    """
    lengths = [np.zeros(1, dtype=np.int64)]
    start, rows = 0, FIRST_LOOK_ROWS
    while start < source.num_rows:
        stop = min(start + rows, source.num_rows)
        table = source.read(start, stop, columns)
        each = lengths_of(table)
        for name, other in zip(columns[1:], each[1:], strict=True):
            different = np.flatnonzero(other != each[0])
            if len(different):
                row = int(different[0])
                raise UserError(
                    f"{source.name}: row {start + row}: column '{columns[0]}' has {each[0][row]} steps, column '{name}' has "
                    f"{other[row]}; each needs one entry a step"
                )
        lengths.append(each[0])
        rows = max(1, min(8 * rows, BYTES_AT_ONCE * (stop - start) // max(table.nbytes, 1)))
        start = stop
    return np.cumsum(np.concatenate(lengths))


def _num_entries(column: Any) -> Bounds:
    chunks = [chunk.storage if isinstance(chunk, pa.ExtensionArray) else chunk for chunk in column.chunks]
    counts = [pc.fill_null(pc.list_value_length(chunk), 0).to_numpy(zero_copy_only=False) for chunk in chunks]
    return np.concatenate([np.zeros(0, dtype=np.int64), *counts]).astype(np.int64)


def _num_characters(column: Any) -> Bounds:
    counts: Bounds = pc.fill_null(pc.utf8_length(as_texts(column)), 0).to_numpy().astype(np.int64)
    return counts


def _entries(column: Any) -> Any:
    """What the lists of a column hold, one after the other."""
    array = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
    return (array.storage if isinstance(array, pa.ExtensionArray) else array).flatten()


def _characters(column: Any) -> Any:
    joined = "".join(text for text in as_texts(column).to_pylist() if text)
    codes, which = np.unique(np.frombuffer(joined.encode("utf-32-le"), dtype="<u4"), return_inverse=True)
    return pa.array([chr(code) for code in codes], pa.large_string()).take(pa.array(which))
