"""p(x | z) of one sample, from what a decoder makes of z. Legend: B samples, D features, M components of a mixture.

Each is a module, since some have parameters of their own: called with x (..., D) and the decoder's output y (..., P D), with
P its `numbers_per_feature`, it gives (...,) log p(x | z) in nats, float32 whatever the networks compute in. The leading axes of
x and y are broadcast, so that x (B, 1, D) is compared with K reconstructions (B, K, P D) of it.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from gendist.cost import has_values
from gendist.models.ops.layout import check_between_0_and_1
from gendist.protocols import UserError

# Of a learned standard deviation. From one that is large for the data, the KL divergence wins, and latents that were given up
# do not come back; and an optimizer that moves every parameter by about its learning rate takes thousands of steps for a
# factor of ten, unless the parameter is small for what it does.
FIRST_SCALE, SPEED = 0.1, 10.0

LikelihoodName = Literal["bernoulli", "gaussian", "discretized_logistic_mixture"]
NUM_MIXTURES, NUM_LEVELS = 10, 256  # of a discretized logistic mixture, unless said otherwise (Salimans et al. 2017)
LEAST_LOG_SCALE = -7.0  # of a logistic, in the units of -1 to 1: an eighth of the 256 levels' distance (as in their code)
MOST_LOG_SCALE = 7.0  # of one that tells levels apart no more, and whose mean still has digits
OFF_LEVEL = 1e-3  # by how much of the levels' distance x may miss one


class Bernoulli(nn.Module):
    """Each feature is 1 with probability sigmoid(y).

    x between 0 and 1 is taken as the expectation over binary x (Kingma & Welling 2014, appendix C.1); of such x, this is
    no density, but still the negative cross-entropy.
    """

    numbers_per_feature = 1

    def forward(self, x_BD: Tensor, y_BD: Tensor) -> Tensor:
        # log p = x y - log(1 + exp y)
        return -functional.binary_cross_entropy_with_logits(y_BD.float(), x_BD.expand(y_BD.shape), reduction="none").sum(-1)

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

    numbers_per_feature = 1

    def __init__(self, scale: float | None):
        super().__init__()
        self.scale = scale
        if scale is None:
            self.log_scale_over_speed = nn.Parameter(torch.full((1,), math.log(FIRST_SCALE) / SPEED))

    def forward(self, x_BD: Tensor, y_BD: Tensor) -> Tensor:
        log_scale = self._log_scale(x_BD)
        squares_B = (x_BD - y_BD.float()).square().sum(-1) * torch.exp(-2.0 * log_scale)
        return -0.5 * squares_B - x_BD.shape[-1] * (log_scale + 0.5 * math.log(2.0 * math.pi))

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


class DiscretizedLogisticMixture(nn.Module):
    """Each feature is one of `num_levels` numbers, evenly from 0 to 1. Of a mixture of logistic distributions, a level has what
    lies within half a step of it, the lowest and the highest all that lies beyond (Salimans et al. 2017, "PixelCNN++", eq. 2).
    Given z, features are independent, and so are the channels of a pixel, which are a chain in the paper.

    y holds M logits of the components, then M means, then M log scales, D of each, in the units of -1 to 1.
    """

    def __init__(self, num_mixtures: int, num_levels: int):
        super().__init__()
        self.num_mixtures, self.num_levels = num_mixtures, num_levels
        self.numbers_per_feature = 3 * num_mixtures

    def forward(self, x_BD: Tensor, y_BD: Tensor) -> Tensor:
        log_weights_BMD, means_BMD, log_scales_BMD = self._components(y_BD)
        x_B1D = (2.0 * x_BD - 1.0).unsqueeze(-2)
        per_scale_BMD = torch.exp(-log_scales_BMD)
        half_step = 1.0 / (self.num_levels - 1)
        above_BMD = (x_B1D + half_step - means_BMD) * per_scale_BMD
        below_BMD = (x_B1D - half_step - means_BMD) * per_scale_BMD
        # Where s is the logistic function, s(a) - s(b) = s(a) s(-b) (1 - exp(b - a)), in which nothing cancels. For the lowest
        # level b is -inf, for the highest a is inf.
        is_lowest_B1D, is_highest_B1D = x_B1D < half_step - 1.0, x_B1D > 1.0 - half_step
        log_prob_BMD = torch.where(is_highest_B1D, 0.0, functional.logsigmoid(above_BMD))
        log_prob_BMD = log_prob_BMD + torch.where(is_lowest_B1D, 0.0, functional.logsigmoid(-below_BMD))
        log_width_BMD = torch.log(-torch.expm1(-2.0 * half_step * per_scale_BMD))
        log_prob_BMD = log_prob_BMD + torch.where(is_lowest_B1D | is_highest_B1D, 0.0, log_width_BMD)
        return torch.logsumexp(log_weights_BMD + log_prob_BMD, -2).sum(-1)

    def mean(self, y_BD: Tensor) -> Tensor:
        """Of the mixture before it is rounded to a level, which changes it by at most half a step: of a logistic with mean m
        and scale s, cut off at -1 and 1, it is -1 + s (softplus((m + 1) / s) - softplus((m - 1) / s)), as the integral from -1
        to 1 of the probability to lie above."""
        log_weights_BMD, means_BMD, log_scales_BMD = self._components(y_BD)
        scales_BMD = log_scales_BMD.exp()
        above_BMD = functional.softplus((means_BMD + 1.0) / scales_BMD) - functional.softplus((means_BMD - 1.0) / scales_BMD)
        return (0.5 * (log_weights_BMD.exp() * scales_BMD * above_BMD).sum(-2)).clamp(0.0, 1.0)

    def draw(self, y_BD: Tensor, uniform_BD: Tensor) -> Tensor:
        """x of p(x | z), from numbers uniform in (0, 1): the lowest level at which the distribution function reaches them."""
        log_weights_BMD, means_BMD, log_scales_BMD = self._components(y_BD)
        low_BD = torch.zeros(uniform_BD.shape, dtype=torch.int64, device=uniform_BD.device)
        high_BD = torch.full_like(low_BD, self.num_levels - 1)
        for _ in range((self.num_levels - 1).bit_length()):  # bisection
            middle_BD = (low_BD + high_BD) // 2
            edge_B1D = ((2.0 * middle_BD + 1.0) / (self.num_levels - 1) - 1.0).unsqueeze(-2)
            below_BMD = torch.sigmoid((edge_B1D - means_BMD) * torch.exp(-log_scales_BMD))
            is_reached_BD = (log_weights_BMD.exp() * below_BMD).sum(-2) >= uniform_BD
            low_BD, high_BD = torch.where(is_reached_BD, low_BD, middle_BD + 1), torch.where(is_reached_BD, middle_BD, high_BD)
            low_BD = torch.minimum(low_BD, high_BD)
        return low_BD.float() / (self.num_levels - 1)

    def check(self, x_BD: Tensor) -> None:
        """UserError where x is impossible."""
        name = "model.likelihood: discretized_logistic_mixture"
        check_between_0_and_1(x_BD, f"{name} takes 0 to 1: rescale the columns, or choose gaussian")
        levels_BD = x_BD * (self.num_levels - 1)
        off_BD = (levels_BD - levels_BD.round()).abs() > OFF_LEVEL
        if has_values(x_BD) and bool(off_BD.any()):
            raise UserError(
                f"x holds {float(x_BD[off_BD][0]):g}; {name} takes {self.num_levels} levels, 0, 1/{self.num_levels - 1} to "
                "1: set model.num_levels to how many there are, or choose gaussian"
            )

    def _components(self, y_BD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(..., M, D) each: log weights, means and log scales."""
        logits_BMD, means_BMD, log_scales_BMD = y_BD.float().unflatten(-1, (3, self.num_mixtures, -1)).unbind(-3)
        return torch.log_softmax(logits_BMD, -2), means_BMD, log_scales_BMD.clamp(LEAST_LOG_SCALE, MOST_LOG_SCALE)


Likelihood = Bernoulli | Gaussian | DiscretizedLogisticMixture


def likelihood_of(
    name: LikelihoodName, scale: float | None = None, num_mixtures: int | None = None, num_levels: int | None = None
) -> Likelihood:
    match name:
        case "bernoulli":
            return Bernoulli()
        case "gaussian":
            return Gaussian(scale)
        case "discretized_logistic_mixture":
            return DiscretizedLogisticMixture(num_mixtures or NUM_MIXTURES, num_levels or NUM_LEVELS)
