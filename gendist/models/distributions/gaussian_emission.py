"""K Gaussians of any covariance type, and K mixtures of Gaussians, as what the states of a chain emit.

Legend: N samples, D features, K latents, M components of each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import torch
from pydantic import Field
from torch import Tensor

from gendist.figures import NUM_POINTS, Mixture
from gendist.models.distributions.distribution import Step
from gendist.models.distributions.gaussian import CovarianceType, Gaussian
from gendist.models.distributions.gaussian_estimation import GaussianConfig, GaussianEstimator, NormalInverseWishart
from gendist.models.distributions.gaussian_kernel import GaussianKernel
from gendist.models.distributions.gaussian_missing import drawn, expected
from gendist.models.distributions.gaussian_statistics import GaussianStatistics, Reference
from gendist.models.ops.independent_latent import Rows, draw_latents, take
from gendist.noise import Noise
from gendist.protocols import EXACT, Compute, DataSummary

SPREAD = 0.5  # how far the components of a latent begin from its center, in standard deviations of the data


class GaussianEmissionConfig(GaussianConfig):
    """num_components: of the mixture that each latent has; 1 is a Gaussian."""

    kind: Literal["gaussian"] = "gaussian"
    covariance_type: CovarianceType = "diag"
    num_components: int = Field(default=1, ge=1)


@dataclass(frozen=True, eq=False)
class GaussianEmission:
    """weights (K, M), which sum to 1 for each latent, and K M Gaussians, those of a latent one after the other.

    prior      what `config.prior` came to with the data
    reference  about what the next pass takes its moments, where not what the parameters suggest
    """

    config: GaussianEmissionConfig
    weights: Tensor
    gaussian: Gaussian
    prior: NormalInverseWishart | None = None
    reference: Reference | None = None

    def __post_init__(self) -> None:
        if self.weights.ndim != 2 or self.weights.numel() != self.gaussian.num_latents:
            raise ValueError(
                f"weights of shape {tuple(self.weights.shape)} for {self.gaussian.num_latents} Gaussians; (K, M) is needed"
            )

    @classmethod
    def of(cls, gaussian: Gaussian, **config: Any) -> Self:
        """A Gaussian a latent. config: the fields of `GaussianConfig`."""
        settings = GaussianEmissionConfig(covariance_type=gaussian.covariance_type, **config)
        return cls(settings, torch.ones(gaussian.num_latents, 1, dtype=torch.float64), gaussian)

    @classmethod
    def mixture(cls, weights_KM: Tensor, gaussian: Gaussian, **config: Any) -> Self:
        """A mixture a latent."""
        num_components = weights_KM.shape[1]
        settings = GaussianEmissionConfig(covariance_type=gaussian.covariance_type, num_components=num_components, **config)
        return cls(settings, weights_KM, gaussian)

    @classmethod
    def blank(cls, config: GaussianEmissionConfig, summary: DataSummary, centers_KD: Tensor) -> Self:
        """The columns' variances about the centers; components of a latent lie around its center, always alike."""
        num_latents, num_features = centers_KD.shape
        num_gaussians = num_latents * config.num_components
        variances_D = summary.variance + config.covariance_regularization
        variances_D = torch.where(variances_D > 0, variances_D, 1.0)  # a constant column, no regularization
        means = centers_KD.repeat_interleave(config.num_components, 0)
        if config.num_components > 1:
            means = means + SPREAD * variances_D.sqrt() * Noise(0, "start.components").normal(0, num_gaussians, num_features)
        covariances = {
            "full": torch.diag(variances_D).expand(num_gaussians, -1, -1).clone(),
            "tied": torch.diag(variances_D),
            "diag": variances_D.expand(num_gaussians, -1).clone(),
            "spherical": variances_D.mean().expand(num_gaussians).clone(),
        }[config.covariance_type]
        weights = torch.full((num_latents, config.num_components), 1.0 / config.num_components, dtype=torch.float64)
        gaussian = Gaussian(means, covariances, config.covariance_type)
        return cls(config, weights, gaussian, _prior(config, summary, num_gaussians))

    def adopted(self, config: GaussianEmissionConfig, summary: DataSummary) -> GaussianEmission:
        """The same parameters, estimated from here on as the configuration says."""
        return replace(self, config=config, prior=_prior(config, summary, self.gaussian.num_latents), reference=None)

    @property
    def num_latents(self) -> int:
        return len(self.weights)

    @property
    def num_features(self) -> int:
        return self.gaussian.num_features

    @property
    def num_parameters(self) -> int:
        return self.gaussian.num_parameters + self.num_latents * (self.weights.shape[1] - 1)

    @property
    def means(self) -> Tensor:
        """(K, D)"""
        means_KMD = self.gaussian.means.unflatten(0, tuple(self.weights.shape))
        return (self.weights[:, :, None] * means_KMD).sum(1)

    @property
    def _estimator(self) -> GaussianEstimator:
        none = torch.zeros(self.gaussian.num_latents, dtype=torch.bool)
        return GaussianEstimator(self.config, self.prior, none, none)

    def kernel(self, compute: Compute) -> GaussianKernel | MixtureKernel:
        kernel = GaussianKernel(self.gaussian, compute, self.reference)
        return kernel if self.weights.shape[1] == 1 else MixtureKernel(self.weights, kernel)

    def m_step(self, statistics: GaussianStatistics) -> Step[GaussianEmission]:
        estimate = self._estimator.estimate(self.gaussian, statistics)
        redo = None if estimate.redo is None else replace(self, reference=estimate.redo)
        counts_KM = statistics.counts.view_as(self.weights)
        total_K1 = counts_KM.sum(1, keepdim=True)
        weights_KM = torch.where(total_K1 > 0, counts_KM / torch.where(total_K1 > 0, total_K1, 1.0), self.weights)
        emission = replace(self, weights=weights_KM, gaussian=estimate.gaussian, reference=None)
        repairs = estimate.repairs
        if self.weights.shape[1] > 1:
            repairs = tuple(line.replace("of component", "of Gaussian") for line in repairs)
        return Step(emission, repairs, redo, is_final=self.weights.shape[1] == 1)

    def log_prior(self, statistics: GaussianStatistics) -> float:
        return -self._estimator.penalty(self.gaussian, statistics.weight)

    def sample(self, latent_N: Tensor, seed: int, purpose: str, start: int) -> Tensor:
        """(N, D) a sample of each latent, of the rows from `start` on of what belongs to seed and purpose."""
        num_components, num_rows = self.weights.shape[1], len(latent_N)
        if num_components > 1:
            cumulative_NM = self.weights.cumsum(1)[latent_N]
            u_N1 = Noise(seed, f"{purpose}.component").uniform(start, num_rows) * cumulative_NM[:, -1:]
            latent_N = latent_N * num_components + (cumulative_NM[:, :-1] <= u_N1).sum(1)
        return self.gaussian.sample(latent_N, Noise(seed, purpose).normal(start, num_rows, self.num_features))

    def figure(self, shares_K: Tensor, seed: int, names: tuple[str, ...]) -> Mixture:
        """The Gaussians, those of a latent in one colour; shares_K: how frequent the latents are; names: of them."""
        shares = (shares_K[:, None] * self.weights).flatten()
        gaussian_N = draw_latents(shares, seed, "figures.gaussian", 0, NUM_POINTS)
        x_ND = self.gaussian.sample(gaussian_N, Noise(seed, "figures.x").normal(0, NUM_POINTS, self.num_features))
        latent_of_each = torch.arange(self.num_latents).repeat_interleave(self.weights.shape[1])
        covariances = self.gaussian.covariances_of_latents
        return Mixture(x_ND, gaussian_N, shares, self.gaussian.means, covariances, latent_of_each, names)

    def impute(
        self, x_ND: Tensor, missing_ND: Tensor, responsibilities_NK: Tensor, noise: tuple[int, str, int] | None = None
    ) -> Tensor:
        """(N, D) x with its missing entries filled in, given how the latents are responsible for the rows: by the mean, or,
        with a seed, a purpose and the first row's number, by a draw."""
        filled_ND = torch.empty_like(x_ND)
        kernel = GaussianKernel(self.gaussian, EXACT)
        num_components = self.weights.shape[1]
        log_weights = self.weights.log().flatten()
        for rows in kernel.portions(x_ND, missing_ND):
            at_hand = take(x_ND, rows), take(missing_ND, rows)
            kernel.load(*at_hand)
            shares = take(responsibilities_NK, rows).T.repeat_interleave(num_components, 0)
            if num_components > 1:
                joint = kernel.log_prob(log_weights).unflatten(0, tuple(self.weights.shape))
                shares = joint.softmax(1).flatten(0, 1) * shares
            if noise is None:
                filled_ND[rows] = expected(self.gaussian, *at_hand, shares)
            else:
                seed, purpose, start = noise
                numbers = torch.arange(start, start + len(x_ND))[rows]
                u_N = Noise(seed, f"{purpose}.component").uniform_of_rows(numbers)
                latent_N = (shares.cumsum(0)[:-1] <= u_N * shares.sum(0)).sum(0)
                normals = Noise(seed, purpose).normal(start, len(x_ND), self.num_features)[rows]
                filled_ND[rows] = drawn(self.gaussian, *at_hand, latent_N, normals)
        return filled_ND

    def tensors(self) -> dict[str, Tensor]:
        parameters = {"weights": self.weights, "means": self.gaussian.means, "covariances": self.gaussian.covariances}
        return parameters | (self.prior.tensors() if self.prior is not None else {})

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], config: GaussianEmissionConfig) -> Self:
        gaussian = Gaussian(tensors["means"], tensors["covariances"], config.covariance_type).check()
        has_prior = any(name.startswith("prior_") for name in tensors)
        prior = NormalInverseWishart.from_tensors(tensors) if has_prior else None
        if tensors["weights"].shape[1] != config.num_components:
            raise ValueError(f"{tensors['weights'].shape[1]} components a latent; {config.num_components} are configured")
        return cls(config, tensors["weights"], gaussian, prior)


class MixtureKernel:
    """The `Kernel` of mixtures, by that of their Gaussians."""

    def __init__(self, weights_KM: Tensor, kernel: GaussianKernel) -> None:
        self._kernel, self._shape, self._log_weights = kernel, tuple(weights_KM.shape), weights_KM.log().flatten()

    def portions(self, x_ND: Tensor, missing_ND: Tensor | None) -> Iterator[Rows]:
        return self._kernel.portions(x_ND, missing_ND)

    def load(self, x_ND: Tensor, missing_ND: Tensor | None) -> None:
        self._kernel.load(x_ND, missing_ND)

    def _joint(self) -> Tensor:
        """(K, M, N) log p(x, component | latent)."""
        return self._kernel.log_prob(self._log_weights).unflatten(0, self._shape)

    def log_prob(self, offset_K: Tensor) -> Tensor:
        log_prob_KN = self._joint().logsumexp(1)
        return log_prob_KN.add_(offset_K.to(log_prob_KN)[:, None])

    def add(self, responsibilities_KN: Tensor) -> None:
        shares_KMN = self._joint().softmax(1).mul_(responsibilities_KN[:, None, :])
        self._kernel.add(shares_KMN.flatten(0, 1))

    def count(self, latent_N: Tensor) -> None:
        self.add(torch.nn.functional.one_hot(latent_N, self._shape[0]).T.to(self._joint()))

    def statistics(self) -> GaussianStatistics:
        """Those of all Gaussians."""
        return self._kernel.statistics()


def _prior(config: GaussianEmissionConfig, summary: DataSummary, num_gaussians: int) -> NormalInverseWishart | None:
    if config.prior is None:
        return None
    return NormalInverseWishart.of(config.prior, config.covariance_type, summary, num_gaussians)
