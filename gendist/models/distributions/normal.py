"""K distributions of D independent normal columns, one a latent: Gaussians with diagonal covariances.

Legend: N samples, D columns, K latents.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from gendist.models.distributions.distribution import Step
from gendist.models.distributions.gaussian import Gaussian
from gendist.models.distributions.gaussian_estimation import GaussianConfig, GaussianEstimator
from gendist.models.distributions.gaussian_kernel import GaussianKernel
from gendist.models.distributions.gaussian_statistics import GaussianStatistics, Reference
from gendist.protocols import Compute


@dataclass(frozen=True, eq=False)
class Normal:
    """gaussian with diagonal covariances.

    covariance_regularization, covariance_floor   as in `GaussianConfig`
    reference   about what the next pass takes its moments, where not what the parameters suggest
    """

    gaussian: Gaussian
    covariance_regularization: float = 0.0
    covariance_floor: float = 0.0
    reference: Reference | None = None

    noise: ClassVar[Literal["normal", "uniform"]] = "normal"

    @property
    def num_latents(self) -> int:
        return self.gaussian.num_latents

    @property
    def num_features(self) -> int:
        return self.gaussian.num_features

    @property
    def num_parameters(self) -> int:
        return self.gaussian.num_parameters

    @property
    def means(self) -> Tensor:
        return self.gaussian.means

    @property
    def variances(self) -> Tensor:
        return self.gaussian.covariances

    @property
    def _estimator(self) -> GaussianEstimator:
        config = GaussianConfig(
            covariance_type="diag",
            covariance_regularization=self.covariance_regularization,
            covariance_floor=self.covariance_floor,
        )
        none = torch.zeros(self.num_latents, dtype=torch.bool)
        return GaussianEstimator(config, None, none, none)

    def kernel(self, compute: Compute) -> GaussianKernel:
        return GaussianKernel(self.gaussian, compute, self.reference)

    def log_prob_of_counted(self, statistics: GaussianStatistics) -> float:
        means_KD, variances_KD = statistics.moments("diag")
        # What a latent without samples would have of them is anything, times 0.
        counts_KD = statistics.present
        away_KD = variances_KD + (means_KD - self.gaussian.means).square()
        each_KD = (2.0 * math.pi * self.gaussian.covariances).log() + away_KD / self.gaussian.covariances
        return -0.5 * float(torch.where(counts_KD > 0, counts_KD * each_KD, 0.0).sum())

    def m_step(self, statistics: GaussianStatistics) -> Step[Normal]:
        estimate = self._estimator.estimate(self.gaussian, statistics)
        redo = None if estimate.redo is None else replace(self, reference=estimate.redo)
        return Step(replace(self, gaussian=estimate.gaussian, reference=None), estimate.repairs, redo)

    def log_prior(self, statistics: GaussianStatistics) -> float:
        return -self._estimator.penalty(self.gaussian, statistics.weight)

    def sample(self, latent_N: Tensor, noise_ND: Tensor) -> Tensor:
        return self.gaussian.sample(latent_N, noise_ND)

    def impute(self, responsibilities_NK: Tensor) -> Tensor:
        return responsibilities_NK @ self.means

    def tensors(self) -> dict[str, Tensor]:
        return {"means": self.gaussian.means, "variances": self.gaussian.covariances}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], config: Any) -> Normal:
        gaussian = Gaussian(tensors["means"], tensors["variances"], "diag").check()
        return cls(gaussian, config.covariance_regularization, config.covariance_floor)
