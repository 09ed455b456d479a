"""Responsibilities from joint log densities. Legend: N samples, K latents."""

from __future__ import annotations

import torch
from torch import Tensor

SMALLEST_LOG = (
    -60.0
)  # exp of less is below 1e-26 of the largest: nothing in any sum, but denormal numbers cost 2.5 times as much
SMALLEST = 1e-26


def responsibilities_(log_joint_KN: Tensor) -> Tensor:
    """Turn log p(x, latent) into p(latent | x) in place; returns (N,) log p(x).

    Exactly 0 below 1e-26. Rows are latents, so that the sums over them run along the samples. Each column has a latent whose
    log density is finite.
    """
    if log_joint_KN.shape[1] == 0:
        return log_joint_KN.new_empty(0)
    largest_1N = torch.amax(log_joint_KN, 0, keepdim=True)
    log_joint_KN.sub_(largest_1N).clamp_min_(SMALLEST_LOG).exp_()
    torch.threshold_(log_joint_KN, SMALLEST, 0.0)
    total_1N = log_joint_KN.sum(0, keepdim=True)
    log_joint_KN.div_(total_1N)
    return total_1N.log_().add_(largest_1N)[0]
