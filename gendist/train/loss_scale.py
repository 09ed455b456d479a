"""The scale of a loss in float16, whose gradients would vanish otherwise (Micikevicius et al. 2018, section 3.2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

GROWTH_INTERVAL = 2000  # steps without an overflow after which the scale doubles, as in torch.amp.GradScaler


@dataclass(frozen=True)
class LossScale:
    scale: float = 2.0**16
    good_steps: int = 0

    def after(self, is_finite: bool) -> LossScale:
        """The scale for the next step: half of it after an overflow, twice after many steps without one."""
        if not is_finite:
            return LossScale(self.scale / 2.0, 0)
        if self.good_steps + 1 == GROWTH_INTERVAL:
            return LossScale(self.scale * 2.0, 0)
        return LossScale(self.scale, self.good_steps + 1)

    def tensor(self) -> Tensor:
        return torch.tensor([self.scale, self.good_steps], dtype=torch.float64)

    @classmethod
    def from_tensor(cls, values: Tensor) -> LossScale:
        return cls(float(values[0]), int(values[1]))
