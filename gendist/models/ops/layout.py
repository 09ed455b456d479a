"""Samples as rows, which is how everybody else has them, and as networks take them.

Legend: B samples, D features, H, W, C height, width and channels of an image.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from gendist.cost import has_values
from gendist.protocols import UserError, as_tensor


@dataclass(frozen=True)
class Layout:
    """x_shape: (H, W) or (H, W, C) where a row is the pixels of an image, else (D,)."""

    x_shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if not 1 <= len(self.x_shape) <= 3 or min(self.x_shape) < 1:
            raise UserError(f"samples of shape {self.x_shape}; (D,), (H, W) or (H, W, C) is needed, each 1 or more")

    @property
    def num_features(self) -> int:
        return prod(self.x_shape)

    @property
    def is_image(self) -> bool:
        return len(self.x_shape) > 1

    @property
    def network_shape(self) -> tuple[int, ...]:
        """Of one sample inside a network: (C, H, W), or (D,)."""
        height_width_channels = self.x_shape if len(self.x_shape) != 2 else (*self.x_shape, 1)
        return (height_width_channels[-1], *height_width_channels[:-1])

    def to_network(self, x_BD: Tensor) -> Tensor:
        """(B, D) rows as (B, C, H, W), or as they are."""
        if len(self.x_shape) == 3:
            return x_BD.reshape(-1, *self.x_shape).permute(0, 3, 1, 2).contiguous()
        return x_BD.reshape(-1, *self.network_shape)

    def to_rows(self, y: Tensor) -> Tensor:
        """The inverse of `to_network`."""
        return (y.permute(0, 2, 3, 1) if len(self.x_shape) == 3 else y).reshape(-1, self.num_features)

    def rows(self, x: Any) -> Tensor:
        """(N, D) float32 of what a caller handed over: rows, or images (N, H, W[, C]). UserError where they do not fit."""
        x = as_tensor(x, torch.float32)
        if self.is_image and tuple(x.shape[1:]) == self.x_shape:
            x = x.reshape(-1, self.num_features)
        if x.ndim != 2 or x.shape[1] != self.num_features:
            images = f", or (N, {', '.join(map(str, self.x_shape))})" if self.is_image else ""
            raise UserError(f"x has shape {tuple(x.shape)}; (N, {self.num_features}) is needed{images}")
        if not bool(x.isfinite().all()):
            raise UserError("x has missing or infinite entries; complete rows are needed")
        return x

    def tensors(self) -> dict[str, Tensor]:
        return {"x_shape": torch.tensor(self.x_shape, dtype=torch.int64)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Layout:
        """ValueError where there is no x_shape."""
        x_shape = tensors.get("x_shape")
        if x_shape is None or x_shape.ndim != 1 or x_shape.is_floating_point():
            raise ValueError(f"tensors {sorted(tensors)[:8]}; x_shape is needed, whole numbers")
        return cls(tuple(x_shape.tolist()))


def check_between_0_and_1(x: Tensor, because: str) -> None:
    """UserError where x is not; because: what needs it and what to try, such as "likelihood bernoulli takes 0 to 1"."""
    if x.numel() and has_values(x):
        low, high = torch.stack(x.aminmax()).tolist()
        if not (low >= 0.0 and high <= 1.0):  # NaN is neither
            raise UserError(f"x goes from {low:g} to {high:g}; {because}")
