"""What the columns of a source mean: which make x, what the features are called, whether they are the pixels of an image."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from difflib import get_close_matches
from math import prod
from typing import Any, Self

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, model_validator

from gendist.data.sources import DataConfig, Source
from gendist.protocols import UserError

MAX_MAGNITUDE = 1e150  # squares of larger numbers overflow


class Schema(BaseModel):
    """What makes a row of x; kept in the artifact, so that `score` reads the same columns and `sample` names them.

    columns        columns of the source, in order; a column may hold a list or an image
    feature_names  one a feature
    image_shape    (height, width[, channels]) where x is the pixels of one image
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    columns: tuple[str, ...]
    feature_names: tuple[str, ...]
    image_shape: tuple[int, ...] | None = None

    @model_validator(mode="after")
    def _image_has_the_features(self) -> Self:
        if self.image_shape is not None and prod(self.image_shape) != self.num_features:
            raise ValueError(f"an image of shape {self.image_shape} does not have {self.num_features} pixels")
        return self

    @property
    def num_features(self) -> int:
        return len(self.feature_names)

    @classmethod
    def of(cls, source: Source, config: DataConfig) -> Schema:
        """The schema that the source's columns, its first row and the `data:` block make."""
        if source.num_rows == 0:
            raise UserError(f"{source.name}: the data set is empty")
        for what, given in (("columns", source.schema.names), ("data.columns", list(config.columns or ()))):
            twice = [name for name, count in Counter(given).items() if count > 1]
            if twice:
                raise UserError(f"{source.name}: {what} with the same name: {_listing(twice)}; each may stand there once")
        for name in (config.label, config.weight, *(config.columns or ())):
            if name is not None:
                require_column(source, name)
        columns = config.columns or _default_columns(source, config)
        first_row = source.read(0, 1, columns)
        names: list[str] = []
        shapes = [_entry_shape(first_row, name, source.name) for name in columns]
        for name, shape in zip(columns, shapes, strict=True):
            names += [name] if shape == () else [f"{name}_{i}" for i in range(prod(shape))]
        if not names:
            raise UserError(f"{source.name}: column '{columns[0]}' holds empty lists; there is nothing to fit")
        image_shape = None
        if len(columns) == 1:
            image_shape = source.image_shape if not _is_image(source.schema.field(columns[0]).type) else shapes[0]
            if image_shape is not None and prod(image_shape) != len(names):
                image_shape = None
        return cls(columns=tuple(columns), feature_names=tuple(names), image_shape=image_shape)


def require_column(source: Source, name: str) -> None:
    if name not in source.schema.names:
        near = get_close_matches(name, source.schema.names, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"there are {_listing(source.schema.names)}"
        raise UserError(f"{source.name}: no column '{name}'; {hint}")


def to_matrix(table: pa.Table, schema: Schema, first_row: int, source_name: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    """(N, D) the features of a table's rows, NaN where an entry is missing; images decoded to 0..1.

    first_row is the row number of the table's first row, for the messages.
    """
    parts = []
    for name in schema.columns:
        where = f"{source_name}: column '{name}'"
        column = table.column(name)
        if _is_image(column.type):
            parts.append(_decode_images(column, where, first_row))
        else:
            parts.append(_numbers(column, where, first_row))
    widths = sum(part.shape[1] for part in parts)
    if widths != schema.num_features:
        raise UserError(f"{source_name}: {widths} features in rows from {first_row} on, but {schema.num_features} before")
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)


def _default_columns(source: Source, config: DataConfig) -> tuple[str, ...]:
    """Every column but label and weight; the image column alone where there is one."""
    names = [name for name in source.schema.names if name not in (config.label, config.weight)]
    images = [name for name in names if _is_image(source.schema.field(name).type)]
    if source.image_shape is not None:
        images = names[:1]
    if len(images) == 1:
        return (images[0],)
    if not names:
        raise UserError(f"{source.name}: no column is left to fit")
    return tuple(names)


def _is_image(type_: pa.DataType) -> bool:
    """The layout of the Hugging Face hub, a struct with the encoded bytes, or the bytes alone."""
    if pa.types.is_struct(type_):
        index = type_.get_field_index("bytes")
        return index >= 0 and _is_image(type_.field(index).type)
    return bool(pa.types.is_binary(type_) or pa.types.is_large_binary(type_))


def _is_list(type_: pa.DataType) -> bool:
    if isinstance(type_, pa.ExtensionType):  # such as Array2D of `datasets`
        type_ = type_.storage_type
    return bool(pa.types.is_list(type_) or pa.types.is_large_list(type_) or pa.types.is_fixed_size_list(type_))


def _entry_shape(first_row: pa.Table, name: str, source_name: str) -> tuple[int, ...]:
    """() of a number, (length,) of a list, (height, width[, channels]) of an image."""
    column, where = first_row.column(name), f"{source_name}: column '{name}'"
    if _is_image(column.type):
        return _decode_image(column[0], where, 0).shape
    width = _numbers(column, where, 0).shape[1]
    return (width,) if _is_list(column.type) else ()


def _numbers(column: pa.ChunkedArray, where: str, first_row: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """(N, width) of a column of numbers or of lists of equally many numbers."""
    array = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
    num_rows = len(array)
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    while _is_list(array.type):
        if array.null_count:
            raise UserError(f"{where} is missing in row {first_row + _first(array.is_null())}; a list is needed in each")
        if not pa.types.is_fixed_size_list(array.type):
            lengths = array.value_lengths().to_numpy(zero_copy_only=False)
            if num_rows and (lengths != lengths[0]).any():
                raise UserError(f"{where} holds lists of different lengths ({lengths.min()} to {lengths.max()})")
        array = array.flatten()
    type_ = array.type
    if not (
        pa.types.is_integer(type_)
        or pa.types.is_floating(type_)
        or pa.types.is_boolean(type_)
        or pa.types.is_decimal(type_)
        or pa.types.is_null(type_)
    ):
        raise UserError(f"{where} is not numeric ({type_}); the columns to fit are chosen with data.columns")
    if pa.types.is_boolean(type_):
        array = array.cast(pa.int8())
    values = array.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    too_large = np.abs(values) > MAX_MAGNITUDE
    if too_large.any():
        first = _first(too_large)
        what = "infinite" if np.isinf(values[first]) else f"{values[first]:g}, beyond {MAX_MAGNITUDE:g},"
        row = first_row + first // (len(values) // num_rows)
        raise UserError(f"{where} is {what} in row {row}; remove, replace or rescale such values")
    return values.reshape(num_rows, -1) if num_rows else values.reshape(0, 1)


def _decode_images(column: pa.ChunkedArray, where: str, first_row: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """(N, H W [C]) pixels of 0..1."""
    images = [_decode_image(entry, where, first_row + i) for i, entry in enumerate(column)]
    for i, image in enumerate(images):
        if image.shape != images[0].shape:
            raise UserError(
                f"{where}: images of mixed sizes: {image.shape} in row {first_row + i}, {images[0].shape} in row {first_row}"
            )
    return np.stack(images).reshape(len(images), -1)


def _decode_image(entry: pa.Scalar, where: str, row: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    from PIL import Image, UnidentifiedImageError

    content = entry.as_py()
    content = content.get("bytes") if isinstance(content, dict) else content
    if content is None:
        raise UserError(f"{where} has no image in row {row}")
    try:
        image: Image.Image = Image.open(io.BytesIO(content))
        if image.mode.startswith("I"):  # 16 bits a pixel
            return np.asarray(image, dtype=np.float64) / 65535.0
        if image.mode not in ("L", "RGB"):
            image = image.convert("L" if image.mode in ("1", "LA") else "RGB")
        return np.asarray(image, dtype=np.float64) / 255.0
    except UnidentifiedImageError:
        raise UserError(f"{where} in row {row} is not an image that can be decoded") from None
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"{where} in row {row} is a damaged image ({error})") from error


def _first(flags: Any) -> int:
    return int(np.argmax(np.asarray(flags)))


def _listing(names: Sequence[str], most: int = 12) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
