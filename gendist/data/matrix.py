"""Columns of a table as a matrix of float64: numbers, lists of numbers, images, which are decoded to 0..1, and texts."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gendist.data.column_types import as_texts, exactly, is_image, is_list, is_numeric, is_text
from gendist.protocols import UserError

MAX_MAGNITUDE = 1e75  # of a number; products of squares of larger ones and weights overflow

Matrix = np.ndarray[Any, np.dtype[np.float64]]


def to_matrix(
    table: pa.Table,
    columns: Sequence[str],
    first_row: int,
    source_name: str,
    categories: Mapping[str, Sequence[str]] | None = None,
    image_shape: tuple[int, ...] | None = None,
) -> Matrix:
    """(N, D) what these columns hold, side by side, NaN where an entry is missing; images decoded to 0..1.

    first_row   the row number of the table's first row, for the messages
    categories  of each column of text the values that it is known to have: an entry becomes the index of its value, and
                their number where it is none of them
    image_shape of the image in row 0, which all others are to have
    """
    categories = categories or {}
    parts = []
    for name in columns:
        where = f"{source_name}: column '{name}'"
        column = table.column(name)
        if name in categories:
            parts.append(_indices(column, categories[name], where))
        elif is_image(column.type):
            parts.append(as_intensities(decode_images(column, where, first_row, image_shape)))
        else:
            parts.append(_numbers(column, where, first_row))
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)


def entry_shape(first_row: pa.Table, name: str, source_name: str) -> tuple[int, ...]:
    """() of a number or a text, (length,) of a list, (height, width[, channels]) of an image."""
    column, where = first_row.column(name), f"{source_name}: column '{name}'"
    if is_text(column.type):
        return ()
    if is_image(column.type):
        return _decoded(column[0], where, 0).shape
    width = _numbers(column, where, 0).shape[1]
    return (width,) if is_list(column.type) else ()


def _numbers(column: pa.ChunkedArray, where: str, first_row: int) -> Matrix:
    """(N, width) of a column of numbers or of lists of equally many numbers."""
    array = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
    num_rows = len(array)
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    while is_list(array.type):
        if array.null_count:
            raise UserError(f"{where} is missing in row {first_row + _first(array.is_null())}; a list is needed in each")
        if not pa.types.is_fixed_size_list(array.type):
            lengths = array.value_lengths().to_numpy(zero_copy_only=False)
            if num_rows and (lengths != lengths[0]).any():
                raise UserError(f"{where} holds lists of different lengths ({lengths.min()} to {lengths.max()})")
        array = array.flatten()
    type_ = array.type
    if not is_numeric(type_):
        raise UserError(f"{where} is not numeric ({type_}); the columns to fit are chosen with data.columns")
    values = exactly(array).cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    too_large = np.abs(values) > MAX_MAGNITUDE
    if too_large.any():
        first = _first(too_large)
        what = "infinite" if np.isinf(values[first]) else f"{values[first]:g}, beyond {MAX_MAGNITUDE:g},"
        row = first_row + first // (len(values) // num_rows)
        raise UserError(f"{where} is {what} in row {row}; remove, replace or rescale such values")
    return values.reshape(num_rows, -1) if num_rows else values.reshape(0, 1)


def _indices(column: pa.ChunkedArray, values: Sequence[str], where: str) -> Matrix:
    """(N, 1) the index of each entry's value."""
    if pa.types.is_null(column.type):
        return np.full((len(column), 1), np.nan)
    if not is_text(column.type):
        raise UserError(f"{where} holds {column.type}, but the model was fitted to texts there; write it as text")
    texts = as_texts(column)
    found = pc.fill_null(pc.index_in(texts, value_set=pa.array(values, pa.large_string())), len(values))
    indices = found.to_numpy().astype(np.float64)
    indices[texts.is_null().to_numpy()] = np.nan
    return indices[:, None]


def decode_images(column: pa.ChunkedArray, where: str, first_row: int, shape: tuple[int, ...] | None) -> Any:
    """(N, H W [C]) pixels: uint8 where all have 8 bits, else float64 of 0..1."""
    images = [_decoded(entry, where, first_row + i) for i, entry in enumerate(column)]
    known, row = (images[0].shape, first_row) if shape is None else (shape, 0)
    for i, image in enumerate(images):
        if image.shape != known:
            here = f"row {first_row + i}{_named(column[i].as_py())}"
            raise UserError(
                f"{where}: images of mixed sizes: {image.shape} in {here}, {known} in row {row}; make them one size"
            )
    if any(image.dtype != np.uint8 for image in images):
        images = [as_intensities(image) for image in images]
    return np.stack(images).reshape(len(images), -1)


def as_intensities(pixels: np.ndarray[Any, Any]) -> Matrix:
    """float64 of 0..1, of pixels of 8 or 16 bits, or of those that are so already."""
    if pixels.dtype == np.float64:
        return pixels
    return pixels.astype(np.float64) / (255.0 if pixels.dtype == np.uint8 else 65535.0)


def _decoded(entry: pa.Scalar, where: str, row: int) -> np.ndarray[Any, Any]:
    """(height, width[, channels]) uint8; of an image of 16 bits a wider integer."""
    from PIL import Image, UnidentifiedImageError

    content = entry.as_py()
    where = f"{where} in row {row}{_named(content)}"
    content = content.get("bytes") if isinstance(content, dict) else content
    if content is None:
        raise UserError(f"{where} has no image, neither its bytes nor the path of a file; drop such rows")
    try:
        image: Image.Image = Image.open(io.BytesIO(content))
        if image.mode == "F":
            raise UserError(f"{where} is an image of decimals, whose white is not known; write them as lists")
        if not image.mode.startswith("I") and image.mode not in ("L", "RGB"):
            image = image.convert("L" if image.mode in ("1", "LA") else "RGB")
        return np.asarray(image)
    except UserError:
        raise
    except UnidentifiedImageError:
        raise UserError(f"{where} is not an image that can be decoded") from None
    except Image.DecompressionBombError as error:
        raise UserError(f"{where} is too large an image ({error})") from error
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"{where} is a damaged image ({error})") from error


def _named(content: Any) -> str:
    """The file of an image, where it is known."""
    path = content.get("path") if isinstance(content, dict) else None
    return f" ({path})" if path else ""


def _first(flags: Any) -> int:
    return int(np.argmax(np.asarray(flags)))
