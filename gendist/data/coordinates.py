"""Fitted transforms of the columns: each a frozen value that maps rows forth and back and knows its Jacobian.

Legend: N rows, D features before a transform, E after it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from gendist.one_thread import one_thread

Names = tuple[str, ...]


class Coordinates(ABC):
    """A fitted transform; its fields are tensors, and NaN in x is a missing entry.

    takes      what to say of an entry that `outside` marks
    is_linear  whether x is a linear function of z, and a constant
    """

    takes: ClassVar[str] = ""
    is_linear: ClassVar[bool] = True

    @property
    @abstractmethod
    def num_features(self) -> int:
        """D."""

    @property
    def num_coordinates(self) -> int:
        """E."""
        return self.num_features

    @property
    def drops(self) -> bool:
        """Whether E < D: x cannot be told from its projection, and has no density."""
        return self.num_coordinates < self.num_features

    def tensors(self) -> dict[str, Tensor]:
        return {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]

    def rename(self, names: Names) -> Names:
        """What the E features are called, after what the D are called."""
        return names

    @property
    def leaves(self) -> Tensor:
        """(E,) bool: the coordinates that are the feature of their name as it was."""
        return torch.zeros(self.num_coordinates, dtype=torch.bool)

    def outside(self, x_ND: Tensor) -> Tensor:
        """(N, D) bool: the entries that cannot be transformed."""
        return torch.zeros_like(x_ND, dtype=torch.bool)

    @abstractmethod
    def forward(self, x_ND: Tensor) -> Tensor:
        """(N, E)."""

    @abstractmethod
    def inverse(self, z_NE: Tensor) -> Tensor:
        """(N, D); a row comes out the same whatever rows stand beside it."""

    @abstractmethod
    def log_abs_det(self, x_ND: Tensor) -> Tensor:
        """(N,) log |det dz/dx|, of the entries that are not missing."""


@dataclass(frozen=True, eq=False)
class LogPlusOne(Coordinates):
    """z = log(1 + x) of the chosen features; chosen (D,) bool."""

    chosen: Tensor

    takes: ClassVar[str] = "log1p takes numbers above -1"
    is_linear: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.chosen.ndim != 1 or self.chosen.dtype != torch.bool:
            raise ValueError("log1p: one truth value a feature is needed")

    @property
    def num_features(self) -> int:
        return len(self.chosen)

    @property
    def leaves(self) -> Tensor:
        return ~self.chosen

    def outside(self, x_ND: Tensor) -> Tensor:
        return self.chosen & (x_ND <= -1.0)

    def forward(self, x_ND: Tensor) -> Tensor:
        return torch.where(self.chosen, x_ND.log1p(), x_ND)

    def inverse(self, z_NE: Tensor) -> Tensor:
        return torch.where(self.chosen, z_NE.expm1(), z_NE)

    def log_abs_det(self, x_ND: Tensor) -> Tensor:
        return -torch.where(self.chosen & ~x_ND.isnan(), x_ND.log1p(), 0.0).sum(1)


@dataclass(frozen=True, eq=False)
class Standard(Coordinates):
    """z = (x - mean) / scale, feature by feature, so that a missing entry stays the only one; mean, scale (D,)."""

    mean: Tensor
    scale: Tensor

    def __post_init__(self) -> None:
        if self.mean.ndim != 1 or self.mean.shape != self.scale.shape:
            raise ValueError("standardize: one mean and one scale a feature are needed")
        _check_values(self.mean, self.scale)

    @property
    def num_features(self) -> int:
        return len(self.mean)

    def forward(self, x_ND: Tensor) -> Tensor:
        return (x_ND - self.mean) / self.scale

    def inverse(self, z_NE: Tensor) -> Tensor:
        return z_NE * self.scale + self.mean

    def log_abs_det(self, x_ND: Tensor) -> Tensor:
        return -torch.where(x_ND.isnan(), 0.0, self.scale.log()).sum(1)


@dataclass(frozen=True, eq=False)
class StandardOfSome(Standard):
    """The same of the chosen features; chosen (D,) bool, mean 0 and scale 1 of the others, which stay as they are."""

    chosen: Tensor

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chosen.dtype != torch.bool or self.chosen.shape != self.mean.shape:
            raise ValueError("standardize: one truth value a feature is needed")
        if bool(((self.mean != 0.0) | (self.scale != 1.0))[~self.chosen].any()):
            raise ValueError("standardize: a feature that is not chosen has a mean or a scale")

    @property
    def leaves(self) -> Tensor:
        return ~self.chosen

    def forward(self, x_ND: Tensor) -> Tensor:
        return torch.where(self.chosen, super().forward(x_ND), x_ND)

    def inverse(self, z_NE: Tensor) -> Tensor:
        return torch.where(self.chosen, super().inverse(z_NE), z_NE)


@dataclass(frozen=True, eq=False)
class PrincipalAxes(Coordinates):
    """z = V (x - mean) / scale, with V some of the principal axes.

    mean        (D,)
    directions  (E, D) V, orthonormal
    scale       (E,) what the coordinate along each direction is divided by
    """

    mean: Tensor
    directions: Tensor
    scale: Tensor

    takes: ClassVar[str] = "whiten and pca take complete rows: drop or fill such rows, or leave the column out"

    def __post_init__(self) -> None:
        if self.mean.ndim != 1 or self.scale.ndim != 1 or self.directions.shape != (len(self.scale), len(self.mean)):
            raise ValueError("whiten, pca: mean (D,), directions (E, D) and scale (E,) are needed")
        products_EE = self.directions @ self.directions.mT
        if not torch.allclose(products_EE, torch.eye(len(self.scale), dtype=torch.float64), atol=1e-6):
            raise ValueError("whiten, pca: the directions are not orthonormal")
        _check_values(self.mean, self.scale)

    @property
    def num_features(self) -> int:
        return len(self.mean)

    @property
    def num_coordinates(self) -> int:
        return len(self.scale)

    def rename(self, names: Names) -> Names:
        return tuple(f"pc_{i}" for i in range(self.num_coordinates))

    @cached_property
    def matrices(self) -> tuple[Tensor, Tensor]:
        """A (E, D) and B (E, D) of z = A (x - mean) and x = mean + z B."""
        return self._scaled()

    def _scaled(self) -> tuple[Tensor, Tensor]:
        return self.directions / self.scale[:, None], self.directions * self.scale[:, None]

    def outside(self, x_ND: Tensor) -> Tensor:
        return x_ND.isnan()

    def forward(self, x_ND: Tensor) -> Tensor:
        return (x_ND - self.mean) @ self.matrices[0].mT

    def inverse(self, z_NE: Tensor) -> Tensor:
        # Only products and sums of single numbers, in a fixed order: a matrix product rounds a row differently according
        # to how many rows stand beside it, and a sample must not depend on its neighbours.
        x_ND = self.mean.repeat(len(z_NE), 1)
        part_ND = torch.empty_like(x_ND)
        for z_N, direction_D in zip(z_NE.T.contiguous(), self.matrices[1], strict=True):
            x_ND += torch.mul(z_N[:, None], direction_D, out=part_ND)
        return x_ND

    def log_abs_det(self, x_ND: Tensor) -> Tensor:
        return -self.scale.log().sum().expand(len(x_ND))


@dataclass(frozen=True, eq=False)
class Whitened(PrincipalAxes):
    """z = V^T V (x - mean) / scale, with V all of the principal axes: scaled along them and turned back."""

    def rename(self, names: Names) -> Names:
        return names

    @cached_property
    def matrices(self) -> tuple[Tensor, Tensor]:
        with one_thread():
            along, back = self._scaled()
            return self.directions.mT @ along, self.directions.mT @ back


def _check_values(mean: Tensor, scale: Tensor) -> None:
    if not bool(mean.isfinite().all() & scale.isfinite().all() & (scale > 0).all()):
        raise ValueError("a transform's mean is not finite, or a scale not positive")
