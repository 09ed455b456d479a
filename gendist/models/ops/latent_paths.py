"""Ways through a latent space whose prior is N(0, I), for pictures of what a decoder has learned.

Legend: N pairs of latents, T steps, L latent dimensions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

NUM_PATHS, NUM_STEPS = 10, 9  # of a figure
MAX_CLASSES = 40  # of a figure
MAX_RANKED = 64  # latent dimensions of which a figure shows those that change x most
NEARLY_PARALLEL = 1e-4  # radians, below which the sines that are divided have too few digits


def great_circles(a_NL: Tensor, b_NL: Tensor, num_steps: int) -> Tensor:
    """(N, T, L) from each a to its b, both included, along the great circle through their directions (White 2016,
    "Sampling generative networks"): unlike the straight line it does not come nearer to the origin than latents of the prior
    are. Where a and b point the same way, or opposite ways, between which no circle is the shortest, it is the straight line.
    """
    t_T1 = torch.linspace(0.0, 1.0, num_steps, dtype=torch.float64)[:, None]
    a_N1L, b_N1L = a_NL.double()[:, None], b_NL.double()[:, None]
    lengths_N11 = a_N1L.norm(dim=2, keepdim=True) * b_N1L.norm(dim=2, keepdim=True)
    cosine_N11 = (a_N1L * b_N1L).sum(2, keepdim=True) / lengths_N11.clamp_min(1e-300)
    angle_N11 = cosine_N11.clamp(-1.0, 1.0).acos()
    is_circle_N11 = (angle_N11 > NEARLY_PARALLEL) & (angle_N11 < math.pi - NEARLY_PARALLEL) & (lengths_N11 > 0.0)
    safe_N11 = torch.where(is_circle_N11, angle_N11, 1.0)
    share_of_a = torch.where(is_circle_N11, ((1.0 - t_T1) * safe_N11).sin() / safe_N11.sin(), 1.0 - t_T1)
    share_of_b = torch.where(is_circle_N11, (t_T1 * safe_N11).sin() / safe_N11.sin(), t_T1)
    return (share_of_a * a_N1L + share_of_b * b_N1L).to(a_NL)


def along_axes(z_L: Tensor, low: float, high: float, num_steps: int) -> Tensor:
    """(L, T, L) each latent dimension in turn moved from low to high, the others as in z."""
    moved_LTL = z_L.repeat(len(z_L), num_steps, 1)
    moved_LTL.diagonal(dim1=0, dim2=2).copy_(torch.linspace(low, high, num_steps).to(z_L)[:, None])
    return moved_LTL
