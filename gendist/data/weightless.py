"""Rows of weight 0 count for nothing, whatever they hold or lack: a fill value such as 1e20 or -999 reaches no arithmetic."""

from __future__ import annotations

import torch
from torch import Tensor


def first_that_counts(x_ND: Tensor, weights_ND: Tensor) -> Tensor:
    """(D,) the first entry of each column that has weight; 0 where none has. weights_ND: of entries, or (N, 1) of rows."""
    if not len(x_ND):
        return x_ND.sum(0)
    first_1D = (weights_ND > 0).to(torch.uint8).argmax(0, keepdim=True).expand(1, x_ND.shape[1])
    return torch.where((weights_ND > 0).any(0), x_ND.gather(0, first_1D)[0], 0.0)


def silenced(x_ND: Tensor, weights_N: Tensor, missing_ND: Tensor) -> tuple[Tensor, Tensor]:
    """x with entries that count in place of those of rows of weight 0, and what is missing of the others."""
    weightless_N1 = weights_N[:, None] == 0
    if not bool(weightless_N1.any()):
        return x_ND, missing_ND
    filler_D = first_that_counts(x_ND, ~(weightless_N1 | missing_ND))
    return torch.where(weightless_N1, filler_D, x_ND), missing_ND & ~weightless_N1
