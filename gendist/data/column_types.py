"""What columns hold, told by their Arrow types: numbers, lists, images, texts or sparse rows."""

from __future__ import annotations

from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc

from gendist.protocols import UserError

# Sparse rows as files of different types are read in common (see `sparse.py`).
SPARSE_ROWS = pa.struct(
    [("type", pa.int8()), ("size", pa.int64()), ("indices", pa.list_(pa.int64())), ("values", pa.list_(pa.float64()))]
)
# Images as files of different types are read in common: the layout of the Hugging Face hub.
IMAGES = pa.struct([("bytes", pa.large_binary()), ("path", pa.large_string())])

EXACT_INTEGERS = 2**53  # below it float64 holds each of them; larger ones that differ may be one number there


def is_image(type_: pa.DataType) -> bool:
    """The layout of the Hugging Face hub, a struct with the encoded bytes, or the bytes alone."""
    if pa.types.is_struct(type_):
        index = type_.get_field_index("bytes")
        return index >= 0 and is_image(type_.field(index).type)
    return bool(pa.types.is_binary(type_) or pa.types.is_large_binary(type_))


def is_list(type_: pa.DataType) -> bool:
    """A list of any kind, an extension such as Array2D of `datasets` included."""
    if isinstance(type_, pa.ExtensionType):
        type_ = type_.storage_type
    return bool(pa.types.is_list(type_) or pa.types.is_large_list(type_) or pa.types.is_fixed_size_list(type_))


def is_numeric(type_: pa.DataType) -> bool:
    """Numbers, or lists of them, however deep; a column that is missing throughout may have been either."""
    while is_list(type_):
        type_ = entry_type(type_)
    kinds = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_decimal, pa.types.is_null)
    return any(is_kind(type_) for is_kind in kinds)


def entry_type(list_type: pa.DataType) -> pa.DataType:
    return (list_type.storage_type if isinstance(list_type, pa.ExtensionType) else list_type).value_type


def common_type(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    """A type that holds the entries of two columns, or None where they are different things, such as numbers and text."""
    one, other = (type_.value_type if pa.types.is_dictionary(type_) else type_ for type_ in (one, other))
    if one == other or pa.types.is_null(other):
        return one
    if pa.types.is_null(one):
        return other
    if is_list(one) and is_list(other):
        entries = common_type(entry_type(one), entry_type(other))
        return entries and pa.large_list(entries)
    if is_list(one) or is_list(other):
        return None
    if is_sparse(one) and is_sparse(other):
        return SPARSE_ROWS
    if is_image(one) and is_image(other):
        return IMAGES
    if pa.types.is_unsigned_integer(one) and pa.types.is_unsigned_integer(other):
        return pa.uint64()
    if pa.types.is_integer(one) and pa.types.is_integer(other) and pa.uint64() not in (one, other):
        return pa.int64()
    if is_numeric(one) and is_numeric(other):
        return pa.float64()
    return pa.large_string() if is_text(one) and is_text(other) else None


def to_type(column: pa.ChunkedArray, type_: pa.DataType) -> pa.ChunkedArray:
    """A column in the type that `common_type` found for it and others."""
    if column.type == type_:
        return column
    if type_ in (SPARSE_ROWS, IMAGES):
        return pa.chunked_array([_in_common(chunk, type_) for chunk in column.chunks], type_)
    if isinstance(column.type, pa.ExtensionType):
        column = column.cast(column.type.storage_type)
    return exactly(column).cast(type_, safe=False)


def check_exact(column: Any, where: str) -> None:
    """UserError where numbers, by which rows are told apart, are too large for that."""
    largest = pc.max(pc.abs(column)).as_py() if column.type == pa.float64() else None
    if largest is not None and largest >= EXACT_INTEGERS:
        raise UserError(
            f"{where} holds {largest:.0f} among float64, which cannot tell numbers beyond 2^53 apart; let all of them be "
            "integers below 2^63, or write them as texts (in CSV with a letter in each)"
        )


def exactly(column: Any) -> Any:
    """Decimals as text: Arrow's own conversion to float64 is off by a bit here and there."""
    return column.cast(pa.string()) if pa.types.is_decimal(column.type) else column


def is_sparse(type_: pa.DataType) -> bool:
    """A struct with lists of indices and of values."""
    if not pa.types.is_struct(type_):
        return False
    fields = {field.name: field.type for field in type_}
    indices, values = fields.get("indices"), fields.get("values")
    if indices is None or values is None or not (is_list(indices) and is_list(values)):
        return False
    are_integers = pa.types.is_integer(entry_type(indices)) or pa.types.is_null(entry_type(indices))
    return bool(are_integers and is_numeric(values) and not is_list(entry_type(values)))


def _in_common(rows: pa.Array, type_: pa.StructType) -> pa.StructArray:
    """Sparse rows or images of whatever fields as `SPARSE_ROWS` or `IMAGES`; what they lack is missing."""
    if pa.types.is_struct(rows.type):
        there = dict(zip((field.name for field in rows.type), rows.flatten(), strict=True))
    else:
        there = {"bytes": rows}
    parts = [there[f.name].cast(f.type) if f.name in there else pa.nulls(len(rows), f.type) for f in type_]
    return pa.StructArray.from_arrays(parts, fields=list(type_), mask=rows.is_null())


def is_text(type_: pa.DataType) -> bool:
    """Text of any kind, or a dictionary of it."""
    if pa.types.is_dictionary(type_):
        type_ = type_.value_type
    return bool(pa.types.is_string(type_) or pa.types.is_large_string(type_) or pa.types.is_string_view(type_))


def as_texts(column: Any) -> Any:
    """A column of text, of whatever kind, in one."""
    return column.cast(pa.large_string())


def type_of_entries(type_: pa.DataType) -> Literal["real", "integer", "boolean", "category"]:
    """What a column holds, or the lists in it; pixels are real."""
    while is_list(type_):
        type_ = entry_type(type_)
    if pa.types.is_boolean(type_):
        return "boolean"
    if pa.types.is_integer(type_):
        return "integer"
    return "category" if is_text(type_) else "real"
