"""Samples as a picture: a grid of images where the data are images, else points and histograms of the first features; of
sequences the first features over time."""

from __future__ import annotations

import logging
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from gendist.data.schema import Schema

NUM_PICTURED = 100
MAX_SHOWN = 5_000  # samples, as points
MAX_IMAGES = 400
MAX_PANELS = 4
MAX_LINES = 5  # sequences, over time
MAX_TICKS = 12  # texts at an axis
TARGET_PIXELS = 800  # of a picture's longer side, reached by enlarging whole pixels

logger = logging.getLogger("gendist")


def draw_samples(model: Any, schema: Schema, path: Path, seed: int) -> None:
    """A picture of the first samples of a model, always those of the same noise, label by label where it has some; a warning
    where it cannot be drawn."""
    try:
        conditions = getattr(model, "conditions", model.labels)
        each = max(1, NUM_PICTURED // max(len(conditions), 1))
        labels = conditions[:NUM_PICTURED] or (None,)
        samples = [np.asarray(model.sample(each, seed=seed, offset=i * each, given=y)) for i, y in enumerate(labels)]
        save_picture(np.concatenate(samples), schema, path)
    except Exception as error:  # a fit of hours is not lost to a plot of odd numbers
        logger.warning("%s could not be drawn (%s)", path.name, error)


def draw_figures(model: Any, schema: Schema, folder: Path, seed: int) -> None:
    """Whatever else the model's family would have people look at: each of `model.figures(seed)`, (rows, steps, D), as NAME.png,
    a row of images or a line over the steps; a warning where one cannot be drawn."""
    name = "figures"
    try:
        figures = model.figures(seed) if hasattr(model, "figures") else {}
        for name, x_RTD in figures.items():
            x_RTD = np.asarray(x_RTD)
            if schema.image_shape is not None and x_RTD.shape[2] == prod(schema.image_shape):
                images = x_RTD[: max(1, MAX_IMAGES // x_RTD.shape[1])].reshape(-1, *schema.image_shape)
                _save_grid(images, folder / f"{name}.png", num_columns=x_RTD.shape[1])
            else:
                _save_lines(x_RTD[:MAX_LINES], schema, folder / f"{name}.png")
    except Exception as error:  # as above
        logger.warning("%s could not be drawn (%s)", name, error)


def most_shown(schema: Schema) -> int:
    """As many samples can a picture show."""
    return MAX_IMAGES if schema.image_shape is not None or schema.is_sequence else MAX_SHOWN


def save_picture(x: Any, schema: Schema, path: Path) -> None:
    """Write samples (N, D), or sequences (N, T, D), as a PNG file."""
    x = np.asarray(x)
    if schema.image_shape is not None and prod(x.shape[1:]) == prod(schema.image_shape):
        _save_grid(x[:MAX_IMAGES].reshape(-1, *schema.image_shape), path)
    elif x.ndim == 3:
        _save_lines(x[:MAX_LINES], schema, path)
    else:
        _save_panels(x[:MAX_SHOWN], schema.feature_names, path)


def _save_grid(images: np.ndarray[Any, Any], path: Path, num_columns: int = 0) -> None:
    """images (N, height, width[, channels]) of 0..1; num_columns: as many as make a square where 0."""
    from PIL import Image

    num_images, height, width = images.shape[:3]
    num_columns = num_columns or max(1, int(np.ceil(np.sqrt(num_images * height / width))))
    num_rows = -(-num_images // num_columns)
    scale = max(1, TARGET_PIXELS // (max(num_rows * height, num_columns * width)))
    gap = max(1, scale // 2)
    pixels = np.round(images.clip(0.0, 1.0) * 255.0).astype(np.uint8).repeat(scale, axis=1).repeat(scale, axis=2)
    tile_height, tile_width = height * scale + gap, width * scale + gap
    grid = np.full((num_rows * tile_height + gap, num_columns * tile_width + gap, *images.shape[3:]), 96, dtype=np.uint8)
    for i, image in enumerate(pixels):
        top, left = gap + i // num_columns * tile_height, gap + i % num_columns * tile_width
        grid[top : top + height * scale, left : left + width * scale] = image
    Image.fromarray(grid.squeeze(-1) if grid.shape[2:] == (1,) else grid).save(path, format="PNG")


def _save_panels(x_ND: np.ndarray[Any, Any], names: tuple[str, ...], path: Path) -> None:
    """Every pair of the first features as points, and each of them as a histogram on the diagonal."""
    from matplotlib.figure import Figure

    size = min(len(names), MAX_PANELS)
    figure = Figure(figsize=(2.6 * size + 0.6, 2.6 * size + 0.6), layout="constrained")
    panels = figure.subplots(size, size, squeeze=False)
    for i in range(size):
        for j in range(size):
            if i == j:
                panels[i, j].hist(x_ND[:, i], bins=50)
            else:
                panels[i, j].plot(x_ND[:, j], x_ND[:, i], ".", markersize=2, alpha=0.5)
            if i == size - 1:
                panels[i, j].set_xlabel(names[j])
            if j == 0:
                panels[i, j].set_ylabel(names[i])
    figure.savefig(path, dpi=110, format="png")


def _save_lines(x_NTD: np.ndarray[Any, Any], schema: Schema, path: Path) -> None:
    """Each of the first features over time, a line a sequence; the texts that a feature is an index of stand at its axis."""
    from matplotlib.figure import Figure

    names = schema.feature_names[:MAX_PANELS]
    figure = Figure(figsize=(9.0, 1.8 * len(names) + 0.6), layout="constrained")
    panels = figure.subplots(len(names), 1, squeeze=False, sharex=True)[:, 0]
    for d, (panel, name) in enumerate(zip(panels, names, strict=True)):
        texts = schema.categories.get(name, ())
        panel.plot(x_NTD[:, :, d].T, linewidth=1.0, alpha=0.8, drawstyle="steps-mid" if texts else "default")
        panel.set_ylabel(name)
        if 0 < len(texts) <= MAX_TICKS:
            panel.set_yticks(range(len(texts)), [repr(text)[1:-1] for text in texts])
    panels[-1].set_xlabel("step")
    figure.savefig(path, dpi=110, format="png")
