"""Samples and figures as pictures: a grid of images where the data are images, else the plots of `gendist.plots`."""

from __future__ import annotations

import io
import logging
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from gendist import plots
from gendist.data.schema import Schema
from gendist.errors import UserError
from gendist.figures import Figure, Matrices, Mixture, Paths, Profiles, Strips
from gendist.storage.patience import patiently

NUM_PICTURED = 100
MAX_SHOWN = 5_000  # samples, as points
MAX_IMAGES = 400
MAX_COLUMNS = 40  # of the means of latents
NUM_EXAMPLES = 9  # of each component, beside its mean
TARGET_PIXELS = 800  # of a picture's longer side, reached by enlarging whole pixels
MAX_GAP = 6  # pixels between images
MAX_PIXELS = 2**24  # of all images together
BACKGROUND, PAPER, INK = 96, 255, 32  # grey levels
TEXT_PIXELS = 15

Array = np.ndarray[Any, Any]

logger = logging.getLogger("gendist")


def draw_samples(model: Any, schema: Schema, path: Path, seed: int) -> None:
    """Write a picture of the first samples of a model; a warning where it cannot be drawn."""
    picture = samples_picture(model, schema, path.name, seed)
    if picture is not None:
        _keep(path, picture)


def samples_picture(model: Any, schema: Schema, name: str, seed: int) -> bytes | None:
    """The bytes of a PNG file of the first samples of a model, always those of the same noise, label by label where it has
    some; None and a warning where it cannot be drawn.

    name  for the warning
    """
    try:
        conditions = getattr(model, "conditions", model.labels)
        each = max(1, NUM_PICTURED // max(len(conditions), 1))
        labels = conditions[:NUM_PICTURED] or (None,)
        samples = [np.asarray(model.sample(each, seed=seed, offset=i * each, given=y)) for i, y in enumerate(labels)]
        return picture_bytes(np.concatenate(samples), schema)
    except Exception as error:  # a fit of hours is not lost to a plot of odd numbers
        logger.warning("%s could not be drawn (%s)", name, error)
        return None


def draw_figures(model: Any, schema: Schema, folder: Path, seed: int) -> None:
    """Whatever else the model's family would have people look at: each of `model.figures(seed)` as NAME.png; a warning where
    one cannot be drawn."""
    name = "figures"
    try:
        figures = model.figures(seed) if hasattr(model, "figures") else {}
        for name, figure in figures.items():
            _keep(folder / f"{name}.png", figure_bytes(figure, schema))
    except Exception as error:  # as above
        logger.warning("%s could not be drawn (%s)", name, error)


def _keep(path: Path, picture: bytes) -> None:
    try:
        patiently(str(path), lambda: path.write_bytes(picture))
    except (OSError, UserError) as error:
        logger.warning("%s could not be written (%s)", path.name, error)


def most_shown(schema: Schema) -> int:
    """As many samples can a picture show."""
    return MAX_IMAGES if schema.image_shape is not None or schema.is_sequence else MAX_SHOWN


def save_picture(x: Any, schema: Schema, path: Path) -> None:
    """Write samples (N, D), or sequences (N, T, D), as a PNG file."""
    path.write_bytes(picture_bytes(x, schema))


def picture_bytes(x: Any, schema: Schema) -> bytes:
    """The bytes of a PNG file of samples (N, D), of sequences (S, T, D), or of a list of sequences (T, D); NaN is missing."""
    x = [np.asarray(each) for each in x] if isinstance(x, list | tuple) else np.asarray(x)
    if schema.image_shape is not None and len(x) and all(each.size == prod(schema.image_shape) for each in x):
        return grid(np.stack([np.reshape(each, schema.image_shape) for each in x[:MAX_IMAGES]]))
    if schema.is_sequence:
        return plots.lines(list(x[: plots.MAX_LINES]), schema.feature_names, _texts(schema))
    return plots.panels(np.asarray(x)[:MAX_SHOWN], schema.feature_names, _texts(schema))


def figure_bytes(figure: Figure, schema: Schema) -> bytes:
    """The bytes of a PNG file of one of a model's figures."""
    has_images = schema.image_shape is not None and not schema.is_sequence
    if isinstance(figure, Paths):
        return _paths(figure, schema)
    if isinstance(figure, Mixture):
        return _means_and_examples(figure, schema) if has_images else plots.mixture(figure, schema.feature_names)
    if isinstance(figure, Strips):
        is_image = schema.image_shape is not None and prod(figure.x_STD.shape[1:]) == prod(schema.image_shape)
        return _striped_images(figure, schema) if is_image else plots.strips(figure, schema.feature_names, _texts(schema))
    if isinstance(figure, Matrices):
        return plots.matrices(figure)
    if isinstance(figure, Profiles):
        if has_images:
            return _means_and_deviations(figure, schema)
        return plots.profiles(figure, schema.feature_names, _texts(schema))
    raise TypeError(f"a {type(figure).__name__} is none of the figures of gendist.figures")


def _texts(schema: Schema) -> list[tuple[str, ...]]:
    """Of each feature, what its values are the indices of."""
    return [schema.categories.get(name, ()) for name in schema.feature_names]


def _images(x: Any, schema: Schema) -> Array:
    """(N, height, width[, channels])"""
    assert schema.image_shape is not None
    return np.asarray(x).reshape(-1, *schema.image_shape)


def _paths(figure: Paths, schema: Schema) -> bytes:
    num_steps = figure.x_RTD.shape[1]
    if schema.image_shape is not None and figure.x_RTD.shape[2] == prod(schema.image_shape):
        x_RTD = figure.x_RTD[: max(1, MAX_IMAGES // num_steps)]
        return grid(_images(x_RTD, schema), num_steps, figure.names[: len(x_RTD)])
    return plots.lines(list(figure.x_RTD.numpy()), schema.feature_names, _texts(schema), figure.names)


def _means_and_examples(figure: Mixture, schema: Schema) -> bytes:
    """A row of images a component, the most frequent first: its mean, and samples of it."""
    shown = figure.weights_K.argsort(descending=True, stable=True)[: MAX_IMAGES // (NUM_EXAMPLES + 1)]
    x_rows, names = [], []
    for k in shown.tolist():
        examples = figure.x_ND[figure.latent_N == k][:NUM_EXAMPLES].numpy()
        missing = np.full((NUM_EXAMPLES - len(examples), figure.x_ND.shape[1]), np.nan)
        x_rows += [figure.means_KD[k, None].numpy(), examples, missing]
        names.append(f"{figure.names[int(figure.group_K[k])]}  {float(figure.weights_K[k]):.2f}")
    return grid(_images(np.concatenate(x_rows), schema), NUM_EXAMPLES + 1, names)


def _means_and_deviations(figure: Profiles, schema: Schema) -> bytes:
    """The mean of each latent, and below it the standard deviations, of which the largest is white."""
    means = _images(figure.means_KD, schema)[:MAX_COLUMNS]
    if figure.variances_KD is None:
        return grid(means, len(means), ("mean",))
    deviations = np.sqrt(_images(figure.variances_KD, schema)[:MAX_COLUMNS])
    highest = max(float(deviations.max()), 1e-12)
    return grid(np.concatenate([means, deviations / highest]), len(means), ("mean", "deviation"))


def _striped_images(figure: Strips, schema: Schema) -> bytes:
    """Images, each beside a bar of the colours of its rows' states."""
    images = _images(figure.x_STD, schema)
    height, width = images.shape[1:3]
    images = images.reshape(len(images), height, width, -1)
    coloured = np.broadcast_to(images, (*images.shape[:3], 3)) if images.shape[3] == 1 else images[..., :3]
    bar = plots.colours_of(len(figure.names))[figure.states_ST.numpy()][:, :, None, :3]
    bars = np.broadcast_to(bar, (len(images), height, max(1, width // 8), 3))
    return grid(np.concatenate([bars, coloured], 2), min(len(images), plots.MAX_LINES))


def grid(images: Array, num_columns: int = 0, names: Sequence[str] = ()) -> bytes:
    """The bytes of a PNG file.

    images       (N, height, width[, channels]) of 0..1; what is missing is grey
    num_columns  as many as make a square where 0
    names        of the rows
    """
    from PIL import Image

    height, width = images.shape[1:3]
    images = images[:MAX_IMAGES]
    num_columns = num_columns or max(1, int(np.ceil(np.sqrt(len(images) * height / width))))
    num_rows = max(1, min(-(-len(images) // num_columns), MAX_PIXELS // (num_columns * width * height)))
    scale = max(1, TARGET_PIXELS // (max(num_rows * height, num_columns * width)))
    gap = min(max(1, scale // 2), MAX_GAP)
    tile_height, tile_width = height * scale + gap, width * scale + gap
    images = images[: num_rows * num_columns]
    levels = np.where(np.isnan(images), BACKGROUND / 255.0, images).clip(0.0, 1.0)
    pixels = np.round(levels * 255.0).astype(np.uint8)
    shape = (num_rows * tile_height + gap, num_columns * tile_width + gap, *images.shape[3:])
    canvas = np.full(shape, BACKGROUND, dtype=np.uint8)
    for i, image in enumerate(pixels):
        top, left = gap + i // num_columns * tile_height, gap + i % num_columns * tile_width
        enlarged = image.repeat(scale, axis=0).repeat(scale, axis=1)
        canvas[top : top + height * scale, left : left + width * scale] = enlarged
    picture = Image.fromarray(canvas.squeeze(-1) if canvas.shape[2:] == (1,) else canvas)
    if names:
        picture = _with_names(picture, names[:num_rows], [gap + (r + 0.5) * tile_height for r in range(num_rows)])
    written = io.BytesIO()
    picture.save(written, format="PNG")
    return written.getvalue()


def _with_names(picture: Any, names: Sequence[str], middles: Sequence[float]) -> Any:
    """The picture with a margin on the left, in which each name stands at its height, those for which there is room."""
    from matplotlib.font_manager import findfont
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.truetype(findfont("DejaVu Sans"), TEXT_PIXELS)
    texts = [plots.legible(name).replace(r"\$", "$") for name in names]
    margin = 2 * TEXT_PIXELS + int(max(font.getlength(text) for text in texts))
    whole = Image.new(picture.mode, (picture.width + margin, picture.height), PAPER if picture.mode == "L" else (PAPER,) * 3)
    whole.paste(picture, (margin, 0))
    draw, low = ImageDraw.Draw(whole), -1.0 * TEXT_PIXELS
    for text, middle in zip(texts, middles, strict=True):
        if middle - low >= TEXT_PIXELS:
            draw.text((margin - TEXT_PIXELS, middle), text, INK if picture.mode == "L" else (INK,) * 3, font, anchor="rm")
            low = middle
    return whole
