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

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gendist.column_names import step_names
from gendist.data.column_types import as_texts, is_image, is_list, is_numeric, is_text
from gendist.data.matrix import entry_shape
from gendist.data.memory import TableSource, array_shape_of
from gendist.data.npy import NpyFiles
from gendist.data.schema import Schema
from gendist.data.sequence_ids import bounds_of_ids
from gendist.data.sequence_source import Bounds, Kind, NestedSequences, SequenceSource
from gendist.data.sources import DataConfig, Source, check_columns, listing, require_column
from gendist.data.tokens import TextConfig, holds_tokens, tokens_of
from gendist.protocols import UserError

BYTES_AT_ONCE = 32 * 2**20  # about as many are looked at in one go, to see how long the sequences are
FIRST_LOOK_ROWS = 256


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


def as_fitted(config: DataConfig, source: Source, known: Schema) -> DataConfig:
    """The `data:` block with what the model's schema says that is to read the source: the columns of ids and order, where they
    are there, and how texts become tokens. UserError where the block says otherwise."""
    names, sequence, order, text = source.schema.names, known.sequence, known.order, known.text
    of_sample = step_names(known.feature_names)
    if config.sequence is None and sequence in names:
        config = config.model_copy(update={"sequence": sequence, "order": order if order in names else None})
    elif config.sequence is None and set(of_sample) <= set(names):
        config = config.model_copy(update={"sequence": of_sample[0], "order": of_sample[1]})
    elif config.sequence is None and sequence is not None and len(names) > 1 and _are_numbers(source):
        raise UserError(
            f"{source.name}: no column '{sequence}', which tells the sequences of the model's data apart; name the column that "
            "does with data.sequence"
        )
    if text is None:
        if config.text is not None:
            raise UserError("data.text: the model was not fitted to tokens of texts; leave it out")
        return config
    if config.sequence is not None:
        return config  # tokens already, as a sample of the model has them
    chosen = (config.text.column,) if config.text else config.columns or names
    name = chosen[0] if len(chosen) == 1 else text.column
    as_known = text.model_copy(update={"column": name})
    if config.text not in (None, as_known):
        raise UserError(f"data.text: the model has taken texts apart otherwise ({as_known}); leave it out")
    return config.model_copy(update={"text": as_known, "columns": None})


def _are_numbers(source: Source) -> bool:
    """Whether each row holds numbers alone, so that it can be no more than a step."""
    return all(is_numeric(field.type) and not is_list(field.type) for field in source.schema)


def as_rows(source: Source, config: DataConfig) -> Source:
    """The source as it is, for a family whose rows are independent; UserError where what is given are sequences."""
    for field in ("sequence", "order"):
        if getattr(config, field) is not None:
            raise UserError(f"data.{field}: of families of sequences alone; to this one rows are independent: leave it out")
    if isinstance(source, TableSource) and source.is_list_of_sequences:
        raise UserError(
            "data: a list of sequences, but to this family rows are independent; give an array (N, D) of them, or columns by "
            "their names, such as {'x': x, 'label': y}"
        )
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
        return _nested(source, {name: _kind(source, name) for name in config.columns or lists}, beside)
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
        return _nested(source, {features[0]: "characters"}, beside)
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
    return _nested(source, {name: "tokens"}, beside, text)


def _nested(
    source: Source, features: dict[str, Kind], beside: Sequence[str], text: TextConfig | None = None
) -> NestedSequences:
    """Each row a sequence, as long as its lists, texts or tokens are, all of which must be equally long.

    beside  columns that hold for all steps, unless they are of lists, too
    """
    kinds = {**{name: _kind(source, name) for name in beside}, **features}
    kinds = {name: kinds[name] for name in (*features, *beside)}  # features first
    varying = [name for name, kind in kinds.items() if kind != "constant"]

    def lengths_of(table: pa.Table) -> list[Bounds]:
        return [_lengths(table.column(name), kinds[name], text) for name in varying]

    return NestedSequences(source, kinds, _scanned(source, varying, lengths_of), text)


def _kind(source: Source, name: str) -> Kind:
    return "list" if is_list(source.schema.field(name).type) else "constant"


def _lengths(column: Any, kind: Kind, text: TextConfig | None) -> Bounds:
    """(S,) of the sequence that each row is."""
    if kind == "characters":
        counts: Bounds = pc.fill_null(pc.utf8_length(as_texts(column)), 0).to_numpy().astype(np.int64)
        return counts
    if kind == "tokens":
        assert text is not None
        return np.array([len(tokens) for tokens in tokens_of(column, text)], dtype=np.int64)
    chunks = [chunk.storage if isinstance(chunk, pa.ExtensionArray) else chunk for chunk in column.chunks]
    lengths = [pc.fill_null(pc.list_value_length(chunk), 0).to_numpy(zero_copy_only=False) for chunk in chunks]
    return np.concatenate([np.zeros(0, dtype=np.int64), *lengths]).astype(np.int64)


def _scanned(source: Source, columns: Sequence[str], lengths_of: Callable[[pa.Table], list[Bounds]]) -> Bounds:
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
