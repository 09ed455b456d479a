"""The M-step of Gaussians: maximum likelihood, or maximum a posteriori where a prior is declared.

Legend: N samples, D features, K latents.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from gendist.models.distributions.gaussian import CovarianceType, Gaussian
from gendist.models.distributions.gaussian_statistics import GaussianStatistics, Reference
from gendist.one_thread import one_thread
from gendist.protocols import DataSummary, UserError

EMPTY = 10 * torch.finfo(torch.float64).eps  # a latent with less than this share of all weight has none
SMALLEST_JITTER = 1e-12  # of the mean variance, added to a covariance that has no Cholesky factor, and then tenfold


class PriorConfig(BaseModel):
    """A normal-inverse-Wishart prior of each component; what is left out comes from the data, as in mclust.

    mean_precision       how many samples at `mean` the prior of the mean counts for; 0 leaves means to the data
    degrees_of_freedom   of the inverse Wishart; D + 2 where left out (3 for diag and spherical)
    mean                 (D,); the mean of the data where left out
    scale                (D,) diagonal of the inverse Wishart's scale matrix; variance / K^(2/D) where left out
                         (Fraley & Raftery 2007, "Bayesian regularization for normal mixture estimation")
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    mean_precision: float = Field(default=0.01, ge=0.0, allow_inf_nan=False)
    degrees_of_freedom: float | None = Field(default=None, gt=0.0, allow_inf_nan=False)
    mean: tuple[float, ...] | None = None
    scale: tuple[float, ...] | None = None


class GaussianConfig(BaseModel):
    """How Gaussians are estimated.

    covariance_regularization  is added to the diagonal of each covariance, as scikit-learn's reg_covar
    covariance_floor           no covariance has an eigenvalue (no variance is) below this
    prior                      maximum a posteriori instead of maximum likelihood
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    covariance_type: CovarianceType = "full"
    covariance_regularization: float = Field(default=1e-6, ge=0.0, allow_inf_nan=False)
    covariance_floor: float = Field(default=0.0, ge=0.0, allow_inf_nan=False)
    prior: PriorConfig | None = None


@dataclass(frozen=True, eq=False)
class NormalInverseWishart:
    """mean | C ~ N(mean, C / mean_precision), C ~ IW(diag(scale), degrees_of_freedom), one for all latents.

    Of diag, each column has its own in one dimension; of spherical, an inverse gamma of the one variance, with the mean of
    the scale.
    """

    mean: Tensor  # (D,)
    scale: Tensor  # (D,)
    mean_precision: float
    degrees_of_freedom: float

    @classmethod
    def of(cls, config: PriorConfig, covariance_type: str, summary: DataSummary, num_latents: int) -> Self:
        """The prior that a config and the data make; UserError where it does not fit the data."""
        num_features = len(summary.mean)
        for name, given in (("mean", config.mean), ("scale", config.scale)):
            if given is not None and len(given) != num_features:
                raise UserError(f"model.prior.{name} has {len(given)} entries, the data {num_features} features")
        if config.scale is not None and min(config.scale) < 0:
            raise UserError("model.prior.scale: variances are 0 or more")
        mean = summary.mean if config.mean is None else torch.tensor(config.mean, dtype=torch.float64)
        if config.scale is None:
            scale = summary.variance / num_latents ** (2.0 / num_features)
        else:
            scale = torch.tensor(config.scale, dtype=torch.float64)
        least = num_features - 1.0 if covariance_type in ("full", "tied") else 0.0
        degrees = config.degrees_of_freedom or least + 3.0
        if degrees <= least:
            raise UserError(
                f"model.prior.degrees_of_freedom {degrees:g}; more than {least:g} are needed for {num_features} features"
            )
        return cls(mean, scale, config.mean_precision, degrees)

    def tensors(self) -> dict[str, Tensor]:
        numbers = torch.tensor([self.mean_precision, self.degrees_of_freedom], dtype=torch.float64)
        return {"prior_mean": self.mean, "prior_scale": self.scale, "prior_numbers": numbers}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        mean_precision, degrees_of_freedom = tensors["prior_numbers"].tolist()
        return cls(tensors["prior_mean"], tensors["prior_scale"], mean_precision, degrees_of_freedom)


@dataclass(frozen=True)
class Estimate:
    """
    gaussian  the new parameters
    repairs   a line for each that could not be estimated
    redo      where the moments had too few digits for what came out: about what to take them again
    """

    gaussian: Gaussian
    repairs: tuple[str, ...]
    redo: Reference | None


@dataclass(frozen=True, eq=False)
class GaussianEstimator:
    """The M-step that a config describes.

    keep_means, keep_covariances  (K,) bool: latents whose parameters are frozen
    """

    config: GaussianConfig
    prior: NormalInverseWishart | None
    keep_means: Tensor
    keep_covariances: Tensor

    def estimate(self, current: Gaussian, statistics: GaussianStatistics) -> Estimate:
        """The maximum of the expected log-likelihood (PRML 9.24, 9.25) plus the log prior.

        A latent without weight keeps its parameters, unless there is a prior to say what they are; so does a column that all
        rows of a latent lack, where no column depends on another.
        """
        kind, weight = current.covariance_type, statistics.weight
        alive_K = self.alive(statistics.counts)
        sample_means_KD, covariances = statistics.moments(kind)
        means = sample_means_KD
        is_seen = weight > EMPTY * statistics.counts.sum()  # (K, D), or (K, 1) for all columns
        has_mean = is_seen
        if self.prior is not None and self.prior.mean_precision > 0:
            means = self.prior.mean + weight / (weight + self.prior.mean_precision) * (means - self.prior.mean)
            has_mean = torch.ones_like(is_seen)
        means = torch.where(has_mean & ~self.keep_means[:, None], means, current.means)
        away_KD = torch.where(is_seen, sample_means_KD - means, 0.0)
        with one_thread():
            covariances = self._covariances(weight, covariances, away_KD, means, kind)
            covariances = self._above_floor(covariances, kind)
        if kind == "tied":
            if bool(self.keep_covariances.any()) or not bool(is_seen.any()):
                covariances = current.covariances
        else:
            is_known = is_seen | (self.prior is not None)
            shape = (len(is_known), *[1] * (covariances.ndim - 1))
            if kind != "diag":
                is_known = is_known.any(1)
            renewed = is_known.reshape(covariances.shape if kind == "diag" else shape) & ~self.keep_covariances.reshape(shape)
            covariances = torch.where(renewed, covariances, current.covariances)
        covariances, raised = _positive_definite(covariances, current.has_matrices)
        gaussian = Gaussian(means, covariances, kind)
        repairs = [f"the covariance of component {k} was singular; its diagonal was raised" for k in raised]
        return Estimate(gaussian, tuple(repairs), self._redo(gaussian, statistics, alive_K))

    def alive(self, counts_K: Tensor) -> Tensor:
        """(K,) bool: the latents that can be estimated."""
        return (counts_K > EMPTY * counts_K.sum()) | (self.prior is not None)

    def _covariances(self, weight: Tensor, within: Tensor, away_KD: Tensor, means_KD: Tensor, kind: str) -> Tensor:
        """Scatter about the new means, and the prior's, by the weight of both (Murphy 2012, "Machine Learning", 11.46).

        weight   (K, 1) or (K, D) of the samples
        within   the covariances about the samples' own means, which are `away` from the new means
        """
        divisor = self._weight(weight, kind)
        prior, num_features = self.prior, means_KD.shape[1]
        precision = 0.0 if prior is None else prior.mean_precision
        off_KD = torch.zeros_like(means_KD) if prior is None else means_KD - prior.mean
        scale_D = torch.zeros(num_features, dtype=means_KD.dtype) if prior is None else prior.scale
        ridge = self.config.covariance_regularization
        if kind == "full":
            counts_K11 = weight[:, :, None]
            scatter = counts_K11 * within + counts_K11 * (away_KD[:, :, None] * away_KD[:, None, :])
            scatter += precision * off_KD[:, :, None] * off_KD[:, None, :] + torch.diag(scale_D)
            return scatter / divisor[:, None, None] + ridge * torch.eye(num_features, dtype=within.dtype)
        if kind == "tied":
            scatter = weight.sum() * within + (weight * away_KD).T @ away_KD
            scatter += precision * off_KD.T @ off_KD + torch.diag(scale_D)
            return scatter / divisor + ridge * torch.eye(num_features, dtype=within.dtype)
        squares_KD = weight * away_KD.square() + precision * off_KD.square()
        if kind == "diag":
            return (weight * within + squares_KD + scale_D) / divisor + ridge
        return (weight.sum(1) * within + squares_KD.sum(1) + scale_D.mean()) / divisor + ridge

    def _weight(self, weight: Tensor, kind: str) -> Tensor:
        """How many samples a covariance rests on, the prior's included: (K,) full, () tied, (K, D) diag; (K,) spherical, whose
        samples are entries."""
        num_latents, width = weight.shape
        num_covariances = num_latents if kind == "tied" else 1
        dimensions = width if kind == "spherical" else 1
        total = {"full": lambda: weight[:, 0], "tied": weight.sum, "diag": lambda: weight, "spherical": lambda: weight.sum(1)}
        divisor = total[kind]()
        if self.prior is not None:
            per_column = len(self.prior.mean) + 1 if kind in ("full", "tied") else 2
            divisor = divisor + self.prior.degrees_of_freedom + per_column
            divisor = divisor + (num_covariances * dimensions if self.prior.mean_precision > 0 else 0)
        return torch.where(divisor > 0, divisor, 1.0)

    def penalty(self, gaussian: Gaussian, weight: Tensor) -> float:
        """What the M-step takes off the expected log-likelihood that it maximises: minus the log prior, up to a constant, and
        what regularization stands for, sum of weight_k / 2 tr(regularization covariance_k^-1).

        weight   of the samples: (K,), or where entries are missing `GaussianStatistics.weight`
        For the derivative of -n/2 (log |C| + tr C^-1 (S + e I)) with respect to C^-1 vanishes at C = S + e I.
        """
        kind, num_features = gaussian.covariance_type, gaussian.num_features
        whitening = gaussian.whitening[:1] if kind == "tied" else gaussian.whitening
        weight = weight[:, None] if weight.ndim == 1 else weight
        divisor = self._weight(weight if gaussian.has_matrices else weight.expand(-1, num_features), kind)
        inverse_variances = whitening.square().sum(1) if gaussian.has_matrices else whitening.square()  # diagonal of C^-1
        trace_K = inverse_variances.sum(1) / (num_features if kind == "spherical" else 1)
        total = (
            0.5 * self.config.covariance_regularization * (divisor * (inverse_variances if kind == "diag" else trace_K)).sum()
        )
        if self.prior is None:
            return float(total)
        log_det = -2.0 * (gaussian.log_det_whitening[:1] if kind == "tied" else gaussian.log_det_whitening)
        off_KD = gaussian.means - self.prior.mean
        off_KD = (gaussian.whitening @ off_KD[:, :, None])[:, :, 0] if gaussian.has_matrices else gaussian.whitening * off_KD
        if kind == "spherical":
            own = (self.prior.degrees_of_freedom + 2) / num_features * log_det + self.prior.scale.mean() * trace_K
        else:
            per_column = 2 if kind == "diag" else num_features + 1
            own = (self.prior.degrees_of_freedom + per_column) * log_det + (self.prior.scale * inverse_variances).sum(1)
        if self.prior.mean_precision > 0:
            total = total + 0.5 * (log_det * (gaussian.num_latents if kind == "tied" else 1)).sum()
            total = total + 0.5 * self.prior.mean_precision * off_KD.square().sum()
        return float(total + 0.5 * own.sum())

    def _above_floor(self, covariances: Tensor, kind: str) -> Tensor:
        """With eigenvalues cut off below, which is the maximum among covariances that have none below."""
        floor = self.config.covariance_floor
        if floor == 0.0:
            return covariances
        if kind in ("diag", "spherical"):
            return covariances.clamp_min(floor)
        values, vectors = torch.linalg.eigh(covariances)
        cut = (vectors * values.clamp_min(floor)[..., None, :]) @ vectors.mT
        below = (values[..., 0] < floor)[..., None, None]
        return torch.where(below, 0.5 * (cut + cut.mT), covariances)

    def _redo(self, gaussian: Gaussian, statistics: GaussianStatistics, alive_K: Tensor) -> Reference | None:
        reference = statistics.reference
        with one_thread():
            loss_K = reference.loss_of(gaussian)
            if statistics.completed is not None:
                loss_K = torch.maximum(loss_K, reference.loss_about_points(gaussian))
        lost_K = alive_K & (loss_K > reference.max_loss)
        if not bool(lost_K.any()):
            return None
        narrow = reference.narrow | lost_K if gaussian.covariance_type != "tied" else torch.ones_like(lost_K)
        return replace(reference, points=gaussian.means, narrow=narrow)


def _positive_definite(covariances: Tensor, has_matrices: bool) -> tuple[Tensor, list[int]]:
    """Covariances that can be factorized, and the indices of those that had to be raised."""
    if not bool(covariances.isfinite().all()):
        raise UserError("a covariance is not finite: the columns are too large or too far apart for float64; rescale them")
    if not has_matrices:
        smallest = torch.finfo(torch.float64).tiny
        singular = ~(covariances > smallest)
        floor = SMALLEST_JITTER * covariances.mean() + smallest * 1e16
        rows = singular.reshape(len(covariances), -1).any(-1)
        return torch.where(singular, floor, covariances), torch.nonzero(rows)[:, 0].tolist()
    stack = covariances if covariances.ndim == 3 else covariances[None]
    repaired, raised = stack.clone(), []
    with one_thread():
        for k in torch.nonzero(torch.linalg.cholesky_ex(stack)[1])[:, 0].tolist():
            variance = float(stack[k].diagonal().mean().clamp_min(1e-280))
            jitter = SMALLEST_JITTER * variance
            while int(torch.linalg.cholesky_ex(repaired[k])[1]):
                repaired[k] = stack[k] + jitter * torch.eye(stack.shape[-1], dtype=stack.dtype)
                jitter *= 10.0
            raised.append(k)
    return repaired.reshape(covariances.shape), raised
