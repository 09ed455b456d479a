"""What a generator and a discriminator D play for, and penalties of D's gradient.

Losses: Goodfellow et al. 2014, section 3 (non-saturating); Lim & Ye 2017, Miyato et al. 2018 (hinge); Arjovsky, Chintala &
Bottou 2017 (Wasserstein). Penalties: Mescheder, Geiger & Nowozin 2018 (R1); Gulrajani et al. 2017 (WGAN-GP). Conditions: Miyato
& Koyama 2018, "cGANs with Projection Discriminator".
Legend: B samples of a micro-batch, C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
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


def projection(outputs_B: Tensor, classes_BC: Tensor) -> Tensor:
    """(B,) D's logits given the classes, one-hot or probabilities, of the 1 + C outputs that D gives for each sample.

    They are linear in D's features phi: the first is psi(phi(x)), another <v_c, phi(x)>, with a phi that has a constant for the
    bias, so that psi(phi(x)) + <V y, phi(x)> (Miyato & Koyama 2018, eq. 3) is the first and the one of the class.
    """
    return outputs_B[:, 0] + (classes_BC.to(outputs_B) * outputs_B[:, 1:]).sum(1)


def squared_gradient(discriminator: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """(B,) |grad_x D(x)|^2, differentiable in the parameters of D."""
    x = x.detach().requires_grad_()
    # A logit depends on its own sample alone, so the gradient of their sum is every sample's own.
    (gradient,) = torch.autograd.grad(discriminator(x).sum(), x, create_graph=True)
    return gradient.square().flatten(1).sum(1)


def r1(discriminator: Callable[[Tensor], Tensor], real: Tensor) -> Tensor:
    """(B,) 1/2 |grad_x D(x)|^2 at the data (Mescheder et al. 2018, eq. 9)."""
    return 0.5 * squared_gradient(discriminator, real)


def gradient_penalty(discriminator: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor, uniform_B1: Tensor) -> Tensor:
    """(B,) (|grad_x D(x)| - 1)^2 somewhere between a sample of the data and one of the generator (Gulrajani et al., eq. 3)."""
    share = uniform_B1.reshape(-1, *(1,) * (real.ndim - 1))
    squares_B = squared_gradient(discriminator, share * real + (1.0 - share) * fake)
    # The root has no finite slope at 0, where D is flat.
    return (torch.sqrt(squares_B + 1e-12) - 1.0).square()
