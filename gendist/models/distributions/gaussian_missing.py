"""Rows that lack entries, under Gaussians whose columns depend on each other (full and tied covariances).

A pattern is a set of columns that some rows lack together. Under each latent these rows have a marginal Gaussian of the
observed columns, and what they lack a Gaussian whose mean is affine in what is observed (PRML 2.3.1 and 2.3.2). So the
moments of the observed entries of all of a pattern's rows tell the expected moments of the completed rows: nothing is done
row by row (Ghahramani & Jordan 1994, "Supervised learning from incomplete data via an EM approach", section 3;
Little & Rubin 2002, "Statistical Analysis with Missing Data", 11.2).

Legend: N samples, D features, K latents, o observed and m missing columns of a pattern. Where a covariance is tied, tensors
of it have 1 for K.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from gendist.models.distributions.gaussian import Gaussian
from gendist.models.distributions.gaussian_statistics import CompletedMoments, GaussianStatistics, Reference
from gendist.one_thread import one_thread


def rows_of_patterns(missing_ND: Tensor) -> list[Tensor]:
    """The rows of each pattern, in the lexicographic order of the patterns, complete rows first; rows ascend."""
    if len(missing_ND) == 0:
        return []
    packed = np.packbits(missing_ND.cpu().numpy(), axis=1)
    words = np.zeros((len(packed), -(-packed.shape[1] // 8) * 8), dtype=np.uint8)
    words[:, : packed.shape[1]] = packed
    words_NW = words.view(">u8").astype(np.uint64)
    order = np.lexsort(words_NW.T[::-1])  # stable
    in_order = words_NW[order]
    starts = np.flatnonzero((in_order[1:] != in_order[:-1]).any(1)) + 1
    return [torch.from_numpy(rows) for rows in np.split(order, starts)]


@dataclass(frozen=True, eq=False)
class Pattern:
    """What the parameters say of rows that lack the same columns, and have others.

    observed   (o,) column numbers
    missing    (m,)
    marginal   the Gaussians of the observed columns
    slope      (K, m, o): E[x_missing | x_observed] = mean_missing + slope (x_observed - mean_observed)
    scale      (K, m, m) lower triangular: A A^T is the covariance of x_missing given x_observed
    """

    gaussian: Gaussian
    observed: Tensor
    missing: Tensor
    marginal: Gaussian
    slope: Tensor
    scale: Tensor

    @classmethod
    def of(cls, gaussian: Gaussian, missing_D: Tensor) -> Pattern:
        """missing_D  (D,) bool"""
        observed, missing = torch.nonzero(~missing_D)[:, 0], torch.nonzero(missing_D)[:, 0]
        num_observed = len(observed)
        scale = gaussian.scale[:1] if gaussian.covariance_type == "tied" else gaussian.scale
        with one_thread():
            # The Cholesky factor of the covariance with the observed columns first: [[A_oo, 0], [slope A_oo, A_mm]].
            factor = _triangular(scale[:, torch.cat([observed, missing])])
            of_observed, both = factor[:, :num_observed, :num_observed], factor[:, num_observed:, :num_observed]
            slope = torch.linalg.solve_triangular(of_observed, both, upper=False, left=False)
        covariances = gaussian.covariances[..., observed[:, None], observed]
        marginal = Gaussian(gaussian.means[:, observed], covariances, gaussian.covariance_type)
        vars(marginal)["scale"] = of_observed.expand(gaussian.num_latents, -1, -1)  # known, where rounding might deny it
        return cls(gaussian, observed, missing, marginal, slope, factor[:, num_observed:, num_observed:])

    @property
    def num_bytes(self) -> int:
        """About what it holds, with the tables that a kernel makes of the marginal."""
        return 8 * self.gaussian.num_latents * (self.gaussian.num_features**2 + 4 * len(self.observed) ** 2)

    def marginal_reference(self, reference: Reference) -> Reference:
        """The same reference for the observed columns. These lose no more digits than all: a latent is no narrower in some
        directions than in all, compared with the others."""
        if self.gaussian.covariance_type == "tied":
            scale = self.marginal.scale[0]
        else:
            with one_thread():
                scale = _triangular(reference.scale[self.observed])
        return replace(
            reference, center=reference.center[self.observed], scale=scale, points=reference.points[:, self.observed]
        )

    def complete(self, statistics: GaussianStatistics, points_KD: Tensor) -> CompletedMoments:
        """The expected moments about `points` of a pattern's rows, from the statistics of their observed entries."""
        gaussian, kind = self.gaussian, self.gaussian.covariance_type
        num_latents, num_features = gaussian.means.shape
        observed_means_Ko, within = statistics.moments(kind)
        slope_KDo = self.slope.new_zeros(len(self.slope), num_features, len(self.observed))
        slope_KDo[:, self.observed, torch.arange(len(self.observed))] = 1.0
        slope_KDo[:, self.missing] = self.slope
        scatter = slope_KDo @ within @ slope_KDo.mT
        scatter[:, self.missing[:, None], self.missing] += self.scale @ self.scale.mT
        away_Ko1 = (observed_means_Ko - self.marginal.means)[:, :, None]
        counts_K1 = statistics.counts[:, None]
        shift_KD = gaussian.means - points_KD + (slope_KDo @ away_Ko1)[:, :, 0]
        first_KD = counts_K1 * shift_KD
        if kind == "tied":
            second = statistics.counts.sum() * scatter[0] + first_KD.T @ shift_KD
        else:
            second = counts_K1[:, :, None] * scatter + first_KD[:, :, None] * shift_KD[:, None, :]
        return CompletedMoments(statistics.counts, first_KD, second)

    def expected(self, x_No: Tensor, k: int) -> Tensor:
        """(N, m) E[x_missing | x_observed, latent k]."""
        slope = self.slope[k if len(self.slope) > 1 else 0]
        return torch.addmm(self.gaussian.means[k, self.missing], x_No - self.marginal.means[k], slope.T)


def _triangular(rows: Tensor) -> Tensor:
    """(..., n, n) lower triangular A with A A^T = rows rows^T, of rows (..., n, D) that are independent."""
    upper = torch.linalg.qr(rows.mT, mode="r").R
    return upper.mT * torch.where(upper.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0)[..., None, :]


def expected(gaussian: Gaussian, x_ND: Tensor, missing_ND: Tensor, responsibilities_KN: Tensor) -> Tensor:
    """(N, D) x with E[x_missing | x_observed] filled in, the latents being responsible for it.

    Of matrices, all rows lack the same columns, as a kernel's `portions` have them.
    """
    if not gaussian.has_matrices:
        return torch.where(missing_ND, responsibilities_KN.T @ gaussian.means, x_ND)
    if not bool(missing_ND[:1].any()):
        return x_ND
    pattern, filled_ND = Pattern.of(gaussian, missing_ND[0]), x_ND.clone()
    x_No, total_Nm = x_ND[:, pattern.observed], x_ND.new_zeros(len(x_ND), len(pattern.missing))
    for k, responsibilities_N in enumerate(responsibilities_KN):
        total_Nm.addcmul_(responsibilities_N[:, None], pattern.expected(x_No, k))
    filled_ND[:, pattern.missing] = total_Nm
    return filled_ND


def drawn(gaussian: Gaussian, x_ND: Tensor, missing_ND: Tensor, latent_N: Tensor, noise_ND: Tensor) -> Tensor:
    """(N, D) x with a draw from p(x_missing | x_observed, latent) filled in, for standard normal noise of all columns; rows as
    for `expected`."""
    if not gaussian.has_matrices:
        return torch.where(missing_ND, gaussian.means[latent_N] + gaussian.scale[latent_N] * noise_ND, x_ND)
    if not bool(missing_ND[:1].any()):
        return x_ND
    pattern, filled_ND = Pattern.of(gaussian, missing_ND[0]), x_ND.clone()
    x_No, noise_Nm = x_ND[:, pattern.observed], noise_ND[:, pattern.missing]
    for k in latent_N.unique().tolist():
        rows = torch.nonzero(latent_N == k)[:, 0]
        scale = pattern.scale[k if len(pattern.scale) > 1 else 0]
        filled_ND[rows[:, None], pattern.missing] = pattern.expected(x_No[rows], k) + noise_Nm[rows] @ scale.T
    return filled_ND
