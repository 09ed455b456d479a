"""Sums over a micro-batch whose rows have weights: of weight 2 a row counts twice, of weight 0 not at all."""

from __future__ import annotations

import torch
from torch import Tensor

from gendist.protocols import Block


def weighted_sum(values_B: Tensor, batch: Block) -> Tensor:
    """() the sum of weight times value; whatever the value is, a row of weight 0 adds nothing."""
    if batch.weights is None:
        return values_B.sum()
    weights_B = batch.weights.to(values_B)
    return torch.where(weights_B > 0, values_B * weights_B, 0.0).sum()


def total_weight(batch: Block) -> float:
    return float(batch.num_rows if batch.weights is None else batch.weights.sum())
