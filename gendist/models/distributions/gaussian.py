"""K Gaussian distributions over the same D features, one a latent (component, state or class).

Legend: N samples, D features, K latents.

covariance_type  covariances
full             (K, D, D)  each its own matrix
tied             (D, D)     one matrix for all
diag             (K, D)     each its own variances
spherical        (K,)       each a single variance
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import torch
from torch import Tensor

from gendist.one_thread import one_thread
from gendist.protocols import UserError

CovarianceType = Literal["full", "tied", "diag", "spherical"]

ENTRIES_AT_ONCE = 1 << 16  # of the (k, N, D) differences that a kernel holds at a time: half a MiB, cache-sized
EMPTY = 10 * torch.finfo(torch.float64).eps  # a latent with less than this share of all weight has none
SMALLEST_JITTER = 1e-12  # of the mean variance, added to a covariance that has no Cholesky factor, and then tenfold


@dataclass(frozen=True, eq=False)
class GaussianStatistics:
    """Expected moments of N samples about a reference point for each latent (its mean while the pass was made).

    With r the responsibilities times the weights and d = x - reference:

    counts  (K,)    sum of r
    first   (K, D)  sum of r d
    second  sum of r d d^T: (K, D, D) full, (D, D) tied, its diagonal (K, D) diag and spherical

    Moments about the current mean keep their digits however narrow a component and however far from 0 it lies.
    """

    reference: Tensor
    counts: Tensor
    first: Tensor
    second: Tensor

    def merge(self, other: GaussianStatistics) -> GaussianStatistics:
        if not torch.equal(self.reference, other.reference):
            raise ValueError("statistics about different reference points cannot be merged")
        return GaussianStatistics(
            self.reference, self.counts + other.counts, self.first + other.first, self.second + other.second
        )


@dataclass(frozen=True, eq=False)
class Gaussian:
    """means (K, D) and covariances (see the table above), float64.

    covariance_regularization is added to the diagonal of every covariance that an M-step estimates.
    """

    means: Tensor
    covariances: Tensor
    covariance_type: CovarianceType
    covariance_regularization: float = 1e-6

    def __post_init__(self) -> None:
        if self.covariance_type not in get_args(CovarianceType):
            raise ValueError(f"covariance_type {self.covariance_type!r}; allowed are {', '.join(get_args(CovarianceType))}")
        if self.means.ndim != 2:
            raise ValueError(f"means of shape {tuple(self.means.shape)}; (num_components, num_features) is needed")
        num_latents, num_features = self.means.shape
        shape = {
            "full": (num_latents, num_features, num_features),
            "tied": (num_features, num_features),
            "diag": (num_latents, num_features),
            "spherical": (num_latents,),
        }[self.covariance_type]
        if tuple(self.covariances.shape) != shape:
            raise ValueError(
                f"covariances of shape {tuple(self.covariances.shape)}; {shape} is needed for {self.covariance_type}"
            )

    def check(self) -> Gaussian:
        """The same; ValueError where means or covariances are no numbers that a Gaussian can have."""
        if not bool(self.means.isfinite().all()):
            raise ValueError("a mean is missing or infinite")
        if self._has_matrices and not torch.allclose(self.covariances, self.covariances.mT, rtol=1e-6, atol=0.0):
            raise ValueError("a covariance matrix is not symmetric")
        _ = self.scale
        return self

    @property
    def num_latents(self) -> int:
        return self.means.shape[0]

    @property
    def num_features(self) -> int:
        return self.means.shape[1]

    @property
    def num_parameters(self) -> int:
        """Free parameters: of the means and of the covariances, a symmetric matrix counting D (D + 1) / 2."""
        triangle = self.num_features * (self.num_features + 1) // 2
        of_covariances = {"full": self.num_latents * triangle, "tied": triangle}
        return self.means.numel() + of_covariances.get(self.covariance_type, self.covariances.numel())

    @cached_property
    def scale(self) -> Tensor:
        """A with A A^T the covariance: (K, D, D) lower triangular, or (K, D) standard deviations.

        ValueError where a covariance is not positive definite.
        """
        if self._has_matrices:
            with one_thread():
                factor, info = torch.linalg.cholesky_ex(self.covariances)
            if bool(info.any()) or not bool(factor.isfinite().all()):
                raise ValueError("a covariance matrix is not positive definite; raise covariance_regularization")
            return factor.expand(self.num_latents, -1, -1)
        variances = self.covariances if self.covariance_type == "diag" else self.covariances[:, None]
        if not bool((variances > 0).all()):
            raise ValueError("a variance is not positive; raise covariance_regularization")
        return variances.sqrt().expand(-1, self.num_features)

    @cached_property
    def whitening(self) -> Tensor:
        """B with B^T B the inverse covariance: (K, D, D) lower triangular, or (K, D)."""
        if not self._has_matrices:
            return self.scale.reciprocal()
        identity = torch.eye(self.num_features, dtype=self.means.dtype).expand_as(self.scale)
        with one_thread():
            return torch.linalg.solve_triangular(self.scale, identity, upper=False)

    @property
    def _has_matrices(self) -> bool:
        return self.covariance_type in ("full", "tied")

    def log_prob(self, x_ND: Tensor) -> Tensor:
        """(N, K) log N(x | mean_k, covariance_k) = -1/2 (D log 2 pi + |B (x - mean)|^2) + log |B| (PRML 2.43)."""
        log_det_K = _diagonal(self.whitening, self._has_matrices).log().sum(-1)
        distances = []
        for k in self._slices(len(x_ND)):
            d_kND = x_ND - self.means[k, None, :]
            if self._has_matrices:
                z_kND = d_kND @ self.whitening[k].mT
            else:
                z_kND = d_kND * self.whitening[k, None, :]
            distances.append(z_kND.square().sum(-1))
        squared_NK = torch.cat(distances).T
        return log_det_K - 0.5 * (self.num_features * math.log(2.0 * math.pi) + squared_NK)

    def statistics(self, x_ND: Tensor, responsibilities_NK: Tensor) -> GaussianStatistics:
        """Moments about the current means; responsibilities include the weights of the samples."""
        first, second = [], []
        for k in self._slices(len(x_ND)):
            r_kN1 = responsibilities_NK.T[k, :, None]
            d_kND = x_ND - self.means[k, None, :]
            rd_kND = r_kN1 * d_kND
            first.append(rd_kND.sum(1))
            if self._has_matrices:
                rdd_kDD = rd_kND.mT @ d_kND
                second.append(rdd_kDD.sum(0, keepdim=True) if self.covariance_type == "tied" else rdd_kDD)
            else:
                second.append((rd_kND * d_kND).sum(1))
        second_KDD = torch.cat(second)
        return GaussianStatistics(
            reference=self.means,
            counts=responsibilities_NK.sum(0),
            first=torch.cat(first),
            second=second_KDD.sum(0) if self.covariance_type == "tied" else second_KDD,
        )

    def m_step(self, statistics: GaussianStatistics) -> tuple[Gaussian, tuple[str, ...]]:
        """The maximum of the expected log-likelihood (PRML 9.24, 9.25), and what had to be repaired.

        With s the mean of d, the new mean is reference + s and the covariance second / count - s s^T + regularization. A
        latent without weight keeps its parameters.
        """
        counts_K = statistics.counts
        alive_K = counts_K > EMPTY * counts_K.sum()
        counts_K1 = torch.where(alive_K, counts_K, 1.0)[:, None]
        shift_KD = statistics.first / counts_K1
        means = torch.where(alive_K[:, None], statistics.reference + shift_KD, self.means)
        ridge = self.covariance_regularization
        if self.covariance_type == "full":
            scatter_KDD = statistics.second / counts_K1[:, :, None] - shift_KD[:, :, None] * shift_KD[:, None, :]
            estimate = _symmetric(scatter_KDD) + ridge * torch.eye(self.num_features, dtype=means.dtype)
        elif self.covariance_type == "tied":
            between_DD = (counts_K[:, None] * shift_KD).T @ shift_KD
            scatter_DD = (statistics.second - between_DD) / counts_K.sum()
            estimate = _symmetric(scatter_DD) + ridge * torch.eye(self.num_features, dtype=means.dtype)
        else:
            variances_KD = (statistics.second / counts_K1 - shift_KD.square()).clamp_min(0.0) + ridge
            estimate = variances_KD if self.covariance_type == "diag" else variances_KD.mean(-1)
        if self.covariance_type != "tied":
            keep = alive_K.reshape(-1, *[1] * (estimate.ndim - 1))
            estimate = torch.where(keep, estimate, self.covariances)
        repairs = [f"component {k} is empty and stays where it was" for k in torch.nonzero(~alive_K)[:, 0].tolist()]
        covariances, raised = _positive_definite(estimate, self._has_matrices)
        repairs += [f"the covariance of component {k} was singular; its diagonal was raised" for k in raised]
        return Gaussian(means, covariances, self.covariance_type, self.covariance_regularization), tuple(repairs)

    def regularization_penalty(self, counts_K: Tensor) -> float:
        """sum of count_k / 2 tr(regularization covariance_k^-1).

        Adding the regularization to the estimate maximises the expected log-likelihood minus this penalty: the derivative
        of -n/2 (log |C| + tr C^-1 (S + e I)) with respect to C^-1 vanishes at C = S + e I.
        """
        trace_K = self.whitening.flatten(1).square().sum(-1)
        return float(0.5 * self.covariance_regularization * (counts_K * trace_K).sum())

    def sample(self, latent_N: Tensor, noise_ND: Tensor) -> Tensor:
        """(N, D) mean + A noise of each sample's latent, for standard normal noise.

        Only products and sums of single numbers, in a fixed order: a matrix product rounds a row differently according to
        how many rows stand beside it, and a sample must not depend on its neighbours.
        """
        x_ND = self.means[latent_N]
        if not self._has_matrices:
            return x_ND + self.scale[latent_N] * noise_ND
        for k in latent_N.unique().tolist():
            rows = torch.nonzero(latent_N == k)[:, 0]
            x_nD, noise_Dn = x_ND[rows], noise_ND[rows].T.contiguous()
            for j in range(self.num_features):  # the j-th column of the triangle reaches from the diagonal down
                x_nD[:, j:] += noise_Dn[j][:, None] * self.scale[k, j:, j]
            x_ND[rows] = x_nD
        return x_ND

    def _slices(self, num_rows: int) -> list[slice]:
        """Latents to treat together, so that a kernel's differences stay in cache; depends on shapes alone."""
        step = max(1, ENTRIES_AT_ONCE // max(1, num_rows * self.num_features))
        return [slice(k, k + step) for k in range(0, self.num_latents, step)]


def _diagonal(values: Tensor, has_matrices: bool) -> Tensor:
    return values.diagonal(dim1=-2, dim2=-1) if has_matrices else values


def _symmetric(matrices: Tensor) -> Tensor:
    return 0.5 * (matrices + matrices.mT)


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
    for k in torch.nonzero(torch.linalg.cholesky_ex(stack)[1])[:, 0].tolist():
        variance = float(stack[k].diagonal().mean().clamp_min(1e-280))
        jitter = SMALLEST_JITTER * variance
        while int(torch.linalg.cholesky_ex(repaired[k])[1]):
            repaired[k] = stack[k] + jitter * torch.eye(stack.shape[-1], dtype=stack.dtype)
            jitter *= 10.0
        raised.append(k)
    return repaired.reshape(covariances.shape), raised
