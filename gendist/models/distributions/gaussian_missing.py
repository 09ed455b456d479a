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

import math
from dataclasses import dataclass, replace
from functools import cached_property

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

    all_means    (K, D)
    observed     (o,) column numbers
    missing      (m,)
    covariances  of the observed columns, in the layout of the covariance type
    factor       (K, o, o) lower triangular, A A^T these covariances
    whitening    (K, o, o) its inverse
    completion   (K, D, o): E[x | x_observed] = mean + completion (x_observed - mean_observed)
    scale        (K, m, m) lower triangular, A A^T the covariance of the missing columns given the observed
    reference    of a pass over complete rows

    It holds no Gaussian: a kernel's tables are kept for as long as theirs lives.
    """

    all_means: Tensor
    observed: Tensor
    missing: Tensor
    covariances: Tensor
    factor: Tensor
    whitening: Tensor
    completion: Tensor
    scale: Tensor
    reference: Reference | None = None

    @classmethod
    def of(cls, gaussian: Gaussian, missing_D: Tensor, reference: Reference | None = None) -> Pattern:
        """missing_D  (D,) bool"""
        observed, missing = torch.nonzero(~missing_D)[:, 0], torch.nonzero(missing_D)[:, 0]
        order, num_observed = torch.cat([observed, missing]), len(observed)
        is_tied = gaussian.covariance_type == "tied"
        covariances = gaussian.covariances[None] if is_tied else gaussian.covariances
        with one_thread():
            # With the observed columns first: [[A_oo, 0], [B A_oo, A_mm]], B the slope of what is missing.
            factor, failed = torch.linalg.cholesky_ex(covariances[:, order[:, None], order])
            if bool(failed.any()):  # rounding: in another order there is a factor
                factor = _triangular((gaussian.scale[:1] if is_tied else gaussian.scale)[:, order])
            of_observed = factor[:, :num_observed, :num_observed]
            identity = torch.eye(num_observed, dtype=factor.dtype).expand_as(of_observed)
            whitening = torch.linalg.solve_triangular(of_observed, identity, upper=False)
            completion = factor.new_empty(len(factor), len(missing_D), num_observed)
            completion[:, observed] = identity
            completion[:, missing] = factor[:, num_observed:, :num_observed] @ whitening
        of_missing = factor[:, num_observed:, num_observed:]
        own = gaussian.covariances[..., observed[:, None], observed]
        return cls(gaussian.means, observed, missing, own, of_observed, whitening, completion, of_missing, reference)

    @property
    def is_tied(self) -> bool:
        return self.covariances.ndim == 2

    @cached_property
    def means(self) -> Tensor:
        """(K, o) of the observed columns."""
        return self.all_means[:, self.observed]

    @property
    def num_bytes(self) -> int:
        """About what it holds, with the tables that a kernel may make of the marginal."""
        num_latents, num_features = self.all_means.shape
        return 8 * num_latents * (num_features**2 + 6 * len(self.observed) ** 2)

    @cached_property
    def marginal(self) -> Gaussian:
        """The Gaussians of the observed columns."""
        marginal = Gaussian(self.means, self.covariances, "tied" if self.is_tied else "full")
        for name, value in (("scale", self.factor), ("whitening", self.whitening)):
            vars(marginal)[name] = value.expand(len(self.means), -1, -1)  # known, where rounding might deny it
        return marginal

    @cached_property
    def log_peak(self) -> Tensor:
        """(K,) the log density of the observed columns at their mean; (1,) tied."""
        log_det = self.whitening.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return log_det - 0.5 * len(self.observed) * math.log(2.0 * math.pi)

    @cached_property
    def conditional(self) -> Tensor:
        """(K, D, D) the covariance of x given what is observed of it."""
        num_features = self.all_means.shape[1]
        matrices = self.scale.new_zeros(len(self.scale), num_features, num_features)
        matrices[:, self.missing[:, None], self.missing] = self.scale @ self.scale.mT
        return matrices

    @cached_property
    def marginal_reference(self) -> Reference:
        """The same reference for the observed columns. These lose no more digits than all: a latent is no narrower in some
        directions than in all, compared with the others."""
        reference = self.reference
        assert reference is not None
        if self.is_tied:
            scale = self.factor[0]
        else:
            with one_thread():
                scale = _triangular(reference.scale[self.observed])
        center, points = reference.center[self.observed], reference.points[:, self.observed]
        return replace(reference, center=center, scale=scale, points=points)

    def complete(self, statistics: GaussianStatistics, points_KD: Tensor) -> CompletedMoments:
        """The expected moments about `points` of a pattern's rows, from the statistics of their observed entries."""
        counts_K1 = statistics.counts[:, None]
        observed_means_Ko, within = statistics.moments("tied" if self.is_tied else "full")
        away_Ko1 = (observed_means_Ko - self.means)[:, :, None]
        shift_KD = self.all_means - points_KD + (self.completion @ away_Ko1)[:, :, 0]
        scatter = self.completion @ within @ self.completion.mT + self.conditional
        first_KD = counts_K1 * shift_KD
        if self.is_tied:
            second = statistics.counts.sum() * scatter[0] + first_KD.T @ shift_KD
        else:
            second = counts_K1[:, :, None] * scatter + first_KD[:, :, None] * shift_KD[:, None, :]
        return CompletedMoments(statistics.counts, first_KD, second)

    # Few rows: from differences, with which the products of all latents are one call

    def differences(self, x_No: Tensor) -> Tensor:
        """(K, N, o) observed entries less their means."""
        return x_No - self.means[:, None, :]

    def log_prob(self, d_KNo: Tensor) -> Tensor:
        """(K, N) log p(x_observed | latent)."""
        return (d_KNo @ self.whitening.mT).square_().sum(-1).mul_(-0.5).add_(self.log_peak[:, None])

    def moments(self, d_KNo: Tensor, responsibilities_KN: Tensor, points_KD: Tensor) -> CompletedMoments:
        """What `complete` gives."""
        completed_KND = d_KNo @ self.completion.mT + (self.all_means - points_KD)[:, None, :]
        weighted_KND, counts_K = responsibilities_KN[:, :, None] * completed_KND, responsibilities_KN.sum(1)
        if self.is_tied:
            second = weighted_KND.flatten(0, 1).T @ completed_KND.flatten(0, 1) + counts_K.sum() * self.conditional[0]
        else:
            second = torch.baddbmm(counts_K[:, None, None] * self.conditional, weighted_KND.mT, completed_KND)
        return CompletedMoments(counts_K, weighted_KND.sum(1), second)

    def expected(self, x_No: Tensor, k: int) -> Tensor:
        """(N, m) E[x_missing | x_observed, latent k]."""
        slope_mo = self.completion[k if len(self.completion) > 1 else 0, self.missing]
        return torch.addmm(self.all_means[k, self.missing], x_No - self.means[k], slope_mo.T)


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
