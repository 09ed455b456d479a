"""K distributions of D independent columns of counts, one a latent.

Legend: N samples, D columns, K latents.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from gendist.models.distributions.distribution import Step
from gendist.models.distributions.linear_kernel import LinearKernel, LinearStatistics, log_prob_of_counted, unchanged
from gendist.protocols import Compute

SMALLEST = 1e-30  # of a rate: a column that a latent has only zeros of is unlikely to hold anything else, and not impossible


@dataclass(frozen=True, eq=False)
class Poisson:
    """rates (K, D). pseudocount: so many samples with the rates `prior_rates` (D,) are taken to have been seen by each
    latent: a Gamma prior with shape pseudocount x prior_rate + 1 and rate pseudocount."""

    rates: Tensor
    prior_rates: Tensor
    pseudocount: float = 0.0

    noise: ClassVar[Literal["normal", "uniform"]] = "uniform"

    def __post_init__(self) -> None:
        if self.rates.ndim != 2 or not bool(((self.rates > 0) & self.rates.isfinite()).all()):
            raise ValueError("rates of a Poisson: a matrix of positive numbers is needed")
        if tuple(self.prior_rates.shape) != (self.num_features,):
            raise ValueError(f"prior_rates of shape {tuple(self.prior_rates.shape)}; ({self.num_features},) is needed")

    @property
    def num_latents(self) -> int:
        return self.rates.shape[0]

    @property
    def num_features(self) -> int:
        return self.rates.shape[1]

    @property
    def num_parameters(self) -> int:
        return self.rates.numel()

    @property
    def means(self) -> Tensor:
        return self.rates

    variances = means

    @cached_property
    def _weights(self) -> Tensor:
        return self.rates.log()

    def kernel(self, compute: Compute) -> LinearKernel:
        """log p(x) = x log rate - rate - log x!"""
        return LinearKernel(self._weights, -self.rates, compute, unchanged, _minus_log_factorials)

    def log_prob_of_counted(self, statistics: LinearStatistics) -> float:
        return log_prob_of_counted(self._weights, -self.rates, statistics)

    def m_step(self, statistics: LinearStatistics) -> Step[Poisson]:
        total_KD = statistics.present + self.pseudocount
        rates_KD = (statistics.sums + self.pseudocount * self.prior_rates) / torch.where(total_KD > 0, total_KD, 1.0)
        return Step(replace(self, rates=torch.where(total_KD > 0, rates_KD.clamp_min(SMALLEST), self.rates)))

    def log_prior(self, statistics: LinearStatistics) -> float:
        return self.pseudocount * float((self.prior_rates * self.rates.log() - self.rates).sum())

    def sample(self, latent_N: Tensor, noise_ND: Tensor) -> Tensor:
        return poisson_quantile(noise_ND, self.rates[latent_N])

    def impute(self, responsibilities_NK: Tensor) -> Tensor:
        return responsibilities_NK @ self.rates

    def tensors(self) -> dict[str, Tensor]:
        return {"rates": self.rates, "prior_rates": self.prior_rates}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], config: Any) -> Poisson:
        return cls(tensors["rates"], tensors["prior_rates"], config.pseudocount)


def _minus_log_factorials(x_ND: Tensor) -> Tensor:
    """(N,)"""
    if x_ND.layout is not torch.sparse_csr:
        return -_log_factorials(x_ND).sum(1)
    factorials = _log_factorials(x_ND.values())  # of 0 it is 0
    return -torch.segment_reduce(factorials, "sum", lengths=x_ND.crow_indices().diff(), initial=0.0)


_SMALL = torch.lgamma(torch.arange(1, 257, dtype=torch.float64))  # log 0! to log 255!: looked up, ten times as fast


def _log_factorials(counts: Tensor) -> Tensor:
    if counts.numel() and float(counts.amax()) < len(_SMALL):
        return _SMALL.to(counts.device)[counts.to(torch.int64)]
    return torch.lgamma(counts + 1.0)


def poisson_quantile(u: Tensor, rates: Tensor) -> Tensor:
    """The smallest count whose cumulative probability is at least u, found by halving: P(x <= c) = Q(c + 1, rate), the upper
    regularized incomplete gamma function (Abramowitz & Stegun 26.4.21)."""
    counts = torch.zeros_like(rates)
    more = u > torch.exp(-rates)  # than none, which with small rates few have
    counts[more] = _quantile_by_halving(u[more], rates[more])
    return counts


def _quantile_by_halving(u: Tensor, rates: Tensor) -> Tensor:
    below = torch.zeros_like(rates)
    # Chernoff: P(x >= c) <= 2^-c for c >= 6 rate, which is less than any 1 - u that a number of 52 bits can be.
    above = torch.ceil(6.0 * rates + 64.0)
    for _ in range(int(above.max().log2().ceil()) + 1 if above.numel() else 0):
        middle = torch.floor(0.5 * (below + above))
        enough = torch.special.gammaincc(middle + 1.0, rates) >= u
        inside = above - below > 1.0
        above = torch.where(inside & enough, middle, above)
        below = torch.where(inside & ~enough, middle, below)
    return above
