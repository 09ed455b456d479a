"""What a generator and a discriminator D play for, and penalties of D's gradient.

Losses: Goodfellow et al. 2014, section 3 (non-saturating); Lim & Ye 2017, Miyato et al. 2018 (hinge); Arjovsky, Chintala &
Bottou 2017 (Wasserstein). Penalties: Mescheder, Geiger & Nowozin 2018 (R1); Gulrajani et al. 2017 (WGAN-GP).
Legend: B samples of a micro-batch.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import relu, softplus

LossName = Literal["non_saturating", "hinge", "wasserstein"]


def discriminator_loss(name: LossName, real_B: Tensor, fake_B: Tensor) -> tuple[Tensor, Tensor]:
    """(B,) and (B,): what each sample of the data and each of the generator adds to what D minimises, from D's logits."""
    match name:
        case "non_saturating":  # -log sigmoid(real), -log(1 - sigmoid(fake)) (Goodfellow et al. 2014, eq. 1)
            return softplus(-real_B), softplus(fake_B)
        case "hinge":  # Miyato et al. 2018, eq. 16
            return relu(1.0 - real_B), relu(1.0 + fake_B)
        case "wasserstein":  # Gulrajani et al. 2017, eq. 3
            return -real_B, fake_B


def generator_loss(name: LossName, fake_B: Tensor) -> Tensor:
    """(B,) what each sample of the generator adds to what G minimises."""
    # -log sigmoid(fake) (Goodfellow et al. 2014, section 3); for hinge, too, the plain mean (Miyato et al. 2018, eq. 17)
    return softplus(-fake_B) if name == "non_saturating" else -fake_B


def squared_gradient(discriminator: nn.Module, x: Tensor) -> Tensor:
    """(B,) |grad_x D(x)|^2, differentiable in the parameters of D."""
    x = x.detach().requires_grad_()
    # A logit depends on its own sample alone, so the gradient of their sum is every sample's own.
    (gradient,) = torch.autograd.grad(discriminator(x).sum(), x, create_graph=True)
    return gradient.square().flatten(1).sum(1)


def r1(discriminator: nn.Module, real: Tensor) -> Tensor:
    """(B,) 1/2 |grad_x D(x)|^2 at the data (Mescheder et al. 2018, eq. 9)."""
    return 0.5 * squared_gradient(discriminator, real)


def gradient_penalty(discriminator: nn.Module, real: Tensor, fake: Tensor, uniform_B1: Tensor) -> Tensor:
    """(B,) (|grad_x D(x)| - 1)^2 somewhere between a sample of the data and one of the generator (Gulrajani et al., eq. 3)."""
    share = uniform_B1.reshape(-1, *(1,) * (real.ndim - 1))
    squares_B = squared_gradient(discriminator, share * real + (1.0 - share) * fake)
    # The root has no finite slope at 0, where D is flat.
    return (torch.sqrt(squares_B + 1e-12) - 1.0).square()
