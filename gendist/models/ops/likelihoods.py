"""p(x | z) of one sample, from what a decoder makes of z. Legend: B samples, D features.

Each is a module, since some have parameters of their own: called with x (B, D) and the decoder's output y (B, D), it gives
(B,) log p(x | z) in nats, in float32 whatever the networks compute in.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from gendist.models.ops.layout import check_between_0_and_1

# Of a learned standard deviation. From one that is large for the data, the KL divergence wins, and latents that were given up
# do not come back; and an optimizer that moves every parameter by about its learning rate takes thousands of steps for a
# factor of ten, unless the parameter is small for what it does.
FIRST_SCALE, SPEED = 0.1, 10.0

LikelihoodName = Literal["bernoulli", "gaussian"]


class Bernoulli(nn.Module):
    """Each feature is 1 with probability sigmoid(y).

    x between 0 and 1 is taken as the expectation over binary x (Kingma & Welling 2014, appendix C.1); of such x, this is
    no density, but still the negative cross-entropy.
    """

    def forward(self, x_BD: Tensor, y_BD: Tensor) -> Tensor:
        # log p = x y - log(1 + exp y)
        return -functional.binary_cross_entropy_with_logits(y_BD.float(), x_BD, reduction="none").sum(1)

    def mean(self, y_BD: Tensor) -> Tensor:
        return torch.sigmoid(y_BD.float())

    def draw(self, y_BD: Tensor, uniform_BD: Tensor) -> Tensor:
        """x of p(x | z), from numbers uniform in (0, 1)."""
        return (uniform_BD < self.mean(y_BD)).float()

    def check(self, x_BD: Tensor) -> None:
        """UserError where x is impossible."""
        check_between_0_and_1(x_BD, "model.likelihood: bernoulli takes 0 to 1: rescale the columns, or choose gaussian")


class Gaussian(nn.Module):
    """Each feature is normal about y, with one standard deviation for all.

    scale  the standard deviation; where None, it is learned with the networks (Rybkin et al. 2021) from FIRST_SCALE on
    """

    def __init__(self, scale: float | None):
        super().__init__()
        self.scale = scale
        if scale is None:
            self.log_scale_over_speed = nn.Parameter(torch.full((1,), math.log(FIRST_SCALE) / SPEED))

    def forward(self, x_BD: Tensor, y_BD: Tensor) -> Tensor:
        log_scale = self._log_scale(x_BD)
        squares_B = (x_BD - y_BD.float()).square().sum(1) * torch.exp(-2.0 * log_scale)
        return -0.5 * squares_B - x_BD.shape[1] * (log_scale + 0.5 * math.log(2.0 * math.pi))

    def mean(self, y_BD: Tensor) -> Tensor:
        return y_BD.float()

    def draw(self, y_BD: Tensor, uniform_BD: Tensor) -> Tensor:
        """x of p(x | z), from numbers uniform in (0, 1)."""
        normal_BD = torch.special.ndtri(uniform_BD.double()).to(y_BD)
        return self.mean(y_BD) + self._log_scale(y_BD).exp() * normal_BD

    def check(self, x_BD: Tensor) -> None:
        """Any number is possible."""

    def _log_scale(self, like: Tensor) -> Tensor:
        return SPEED * self.log_scale_over_speed if self.scale is None else like.new_tensor([math.log(self.scale)])


Likelihood = Bernoulli | Gaussian


def likelihood_of(name: LikelihoodName, scale: float | None) -> Likelihood:
    return Bernoulli() if name == "bernoulli" else Gaussian(scale)
