"""K distributions of D independent columns of 0 and 1, one a latent. Bishop 2006 (PRML), 2.2 and 9.3.3.

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

SMALLEST = 1e-15  # a probability is so far from 0 and from 1 at least: without pseudocounts a column may be constant


@dataclass(frozen=True, eq=False)
class Bernoulli:
    """probs (K, D) p(x = 1). pseudocount: so many ones and as many zeros are taken to have been seen of each (Beta prior)."""

    probs: Tensor
    pseudocount: float = 0.0

    noise: ClassVar[Literal["normal", "uniform"]] = "uniform"

    def __post_init__(self) -> None:
        if self.probs.ndim != 2 or not bool(((self.probs > 0) & (self.probs < 1)).all()):
            raise ValueError("probs of a Bernoulli: a matrix of numbers between 0 and 1 is needed")

    @property
    def num_latents(self) -> int:
        return self.probs.shape[0]

    @property
    def num_features(self) -> int:
        return self.probs.shape[1]

    @property
    def num_parameters(self) -> int:
        return self.probs.numel()

    @property
    def means(self) -> Tensor:
        return self.probs

    @property
    def variances(self) -> Tensor:
        return self.probs * (1.0 - self.probs)

    @cached_property
    def _weights(self) -> Tensor:
        return self.probs.logit()

    @cached_property
    def _constants(self) -> Tensor:
        return torch.log1p(-self.probs)

    def kernel(self, compute: Compute) -> LinearKernel:
        """x log p + (1 - x) log(1 - p) = x log(p / (1 - p)) + log(1 - p)."""
        return LinearKernel(self._weights, self._constants, compute, unchanged)

    def log_prob_of_counted(self, statistics: LinearStatistics) -> float:
        return log_prob_of_counted(self._weights, self._constants, statistics)

    def m_step(self, statistics: LinearStatistics) -> Step[Bernoulli]:
        total_KD = statistics.present + 2.0 * self.pseudocount
        probs_KD = (statistics.sums + self.pseudocount) / torch.where(total_KD > 0, total_KD, 1.0)
        probs_KD = torch.where(total_KD > 0, probs_KD.clamp(SMALLEST, 1.0 - SMALLEST), self.probs)
        return Step(replace(self, probs=probs_KD))

    def log_prior(self, statistics: LinearStatistics) -> float:
        return self.pseudocount * float((self.probs.log() + self._constants).sum())

    def sample(self, latent_N: Tensor, noise_ND: Tensor) -> Tensor:
        return (noise_ND < self.probs[latent_N]).to(torch.float64)

    def impute(self, responsibilities_NK: Tensor) -> Tensor:
        return responsibilities_NK @ self.probs

    def tensors(self) -> dict[str, Tensor]:
        return {"probs": self.probs}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], config: Any) -> Bernoulli:
        return cls(tensors["probs"], config.pseudocount)
