"""Differentiable augmentation of images, data and samples alike, so that a discriminator has more than it can learn by heart.

Zhao et al. 2020, "Differentiable Augmentation for Data-Efficient GAN Training", with the ranges of its published code. Since
the generator's samples are augmented, too, and gradients go through, it does not learn to make augmented images.
Legend: B samples, C, H, W channels, height and width of an image, U random numbers a sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

AugmentationName = Literal["color", "translation", "cutout"]
NUM_UNIFORMS: dict[AugmentationName, int] = {"color": 3, "translation": 2, "cutout": 2}

TRANSLATION = 0.125  # of height and width, at most
CUTOUT = 0.5  # of height and width


def num_uniforms(names: Sequence[AugmentationName]) -> int:
    """U."""
    return sum(NUM_UNIFORMS[name] for name in names)


def augment(x: Tensor, names: Sequence[AugmentationName], uniform_BU: Tensor) -> Tensor:
    """(B, C, H, W) images of -1 to 1, augmented in this order: a function of the image and its own random numbers in (0, 1)."""
    start = 0
    for name in names:
        u = uniform_BU[:, start : start + NUM_UNIFORMS[name], None, None, None]
        start += NUM_UNIFORMS[name]
        match name:
            case "color":
                x = colored(x, u[:, 0], u[:, 1], u[:, 2])
            case "translation":
                x = translated(x, u[:, 0, 0, 0], u[:, 1, 0, 0])
            case "cutout":
                x = x * ~_cut_out(x, u[:, 0, 0, 0], u[:, 1, 0, 0])
    return x


def colored(x: Tensor, brightness: Tensor, saturation: Tensor, contrast: Tensor) -> Tensor:
    """Brightness up to 1/2 more or less, saturation 0 to 2 times, contrast 1/2 to 3/2 times, each of (B, 1, 1, 1)."""
    x = x + (brightness - 0.5)
    gray = x.mean(1, keepdim=True)
    x = gray + 2.0 * saturation * (x - gray)
    mean = x.mean((1, 2, 3), keepdim=True)
    return mean + (contrast + 0.5) * (x - mean)


def translated(x: Tensor, down_B1: Tensor, right_B1: Tensor) -> Tensor:
    """By whole pixels, up to an eighth of the image to every side; what comes in from outside is 0."""
    height, width = x.shape[2:]
    rows_BH, is_inside_BH = _shifted(height, down_B1)
    columns_BW, is_inside_BW = _shifted(width, right_B1)
    samples = torch.arange(len(x), device=x.device)[:, None, None]
    # Channels last, since indices are of the other three.
    moved = x.permute(0, 2, 3, 1)[samples, rows_BH[:, :, None], columns_BW[:, None, :]].permute(0, 3, 1, 2)
    return moved * (is_inside_BH[:, None, :, None] & is_inside_BW[:, None, None, :])


def _shifted(size: int, uniform_B1: Tensor) -> tuple[Tensor, Tensor]:
    """(B, size) where each place of the image comes from, and whether that is inside of it."""
    most = int(size * TRANSLATION + 0.5)
    from_BS = torch.arange(size, device=uniform_B1.device) + _integer(uniform_B1, -most, most)
    return from_BS.clamp(0, size - 1), (from_BS >= 0) & (from_BS < size)


def _cut_out(x: Tensor, down_B1: Tensor, right_B1: Tensor) -> Tensor:
    """(B, 1, H, W) whether a pixel is in a rectangle of half of height and width, which may reach beyond the image."""
    sides = []
    for size, uniform_B1 in ((x.shape[2], down_B1), (x.shape[3], right_B1)):
        cut = int(size * CUTOUT + 0.5)
        first_B1 = _integer(uniform_B1, 0, size - cut % 2) - cut // 2
        place_BS = torch.arange(size, device=x.device) - first_B1
        sides.append((place_BS >= 0) & (place_BS < cut))
    return (sides[0][:, :, None] & sides[1][:, None, :])[:, None]


def _integer(uniform_B1: Tensor, least: int, most: int) -> Tensor:
    """(B, 1) int64, each from least to most equally likely."""
    # Where float32 rounds a number up to 1, the product reaches the next integer.
    return least + (uniform_B1 * (most - least + 1)).long().clamp_max(most - least)
