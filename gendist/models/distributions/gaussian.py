"""K Gaussian distributions over the same D features, one a latent (component, state or class): parameters and samples.

`gaussian_kernel.py` has their densities and what a pass over the data keeps, `gaussian_estimation.py` the M-step.
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

TILE = 16  # samples of one latent that are computed together
FACTOR_ENTRIES_AT_ONCE = 1 << 20  # of the factors of covariances, one a tile

CovarianceType = Literal["full", "tied", "diag", "spherical"]


@dataclass(frozen=True, eq=False)
class Gaussian:
    """means (K, D) and covariances (see the table above), float64."""

    means: Tensor
    covariances: Tensor
    covariance_type: CovarianceType

    def __post_init__(self) -> None:
        # Laid out as they are saved: products with another layout have other last digits.
        object.__setattr__(self, "means", self.means.contiguous())
        object.__setattr__(self, "covariances", self.covariances.contiguous())
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
        if self.has_matrices and not torch.allclose(self.covariances, self.covariances.mT, rtol=1e-6, atol=0.0):
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
    def has_matrices(self) -> bool:
        return self.covariance_type in ("full", "tied")

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
        if self.has_matrices:
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
        if not self.has_matrices:
            return self.scale.reciprocal()
        identity = torch.eye(self.num_features, dtype=self.means.dtype)
        factors = self.scale[:1] if self.covariance_type == "tied" else self.scale
        with one_thread():
            inverse = torch.linalg.solve_triangular(factors, identity.expand_as(factors), upper=False)
        return inverse.expand(self.num_latents, -1, -1)

    @property
    def log_det_whitening(self) -> Tensor:
        """(K,) log |B|, which is -1/2 log |covariance|."""
        diagonal = self.whitening.diagonal(dim1=-2, dim2=-1) if self.has_matrices else self.whitening
        return diagonal.log().sum(-1)

    @property
    def log_peak(self) -> Tensor:
        """(K,) the log density at the mean."""
        return self.log_det_whitening - 0.5 * self.num_features * math.log(2.0 * math.pi)

    def pooled(self, counts_K: Tensor) -> Gaussian:
        """The one latent that has the mean of the means and of the covariances, weighted."""
        share_K = counts_K / counts_K.sum()
        if self.covariance_type == "tied":
            covariances = self.covariances
        else:
            covariances = torch.einsum("k,k...->...", share_K, self.covariances)[None]
        return Gaussian(share_K[None] @ self.means, covariances, self.covariance_type)

    def sample(self, latent_N: Tensor, noise_ND: Tensor) -> Tensor:
        """(N, D) mean + A noise of each sample's latent, for standard normal noise.

        A sample must not depend on its neighbours, but a matrix product rounds a row differently according to how many rows
        stand beside it. So all products are of one shape, TILE rows of one latent, filled up with zeros.
        """
        if not self.has_matrices:
            return self.means[latent_N] + self.scale[latent_N] * noise_ND
        num_samples, num_features = noise_ND.shape
        if num_samples <= TILE:  # a tile for each is quicker than finding out who shares one
            tile_latent_T, place_N = latent_N, torch.arange(num_samples) * TILE
        else:
            counts_K = torch.bincount(latent_N, minlength=self.num_latents)
            tiles_K = (counts_K + TILE - 1) // TILE
            tile_latent_T = torch.repeat_interleave(torch.arange(self.num_latents), tiles_K)
            order_N = torch.argsort(latent_N, stable=True)
            rank_N = torch.arange(num_samples) - (counts_K.cumsum(0) - counts_K)[latent_N[order_N]]
            place_N = torch.empty_like(order_N)
            place_N[order_N] = ((tiles_K.cumsum(0) - tiles_K) * TILE)[latent_N[order_N]] + rank_N
        padded = torch.zeros(len(tile_latent_T) * TILE, num_features, dtype=noise_ND.dtype)
        padded[place_N] = noise_ND
        padded_TPD = padded.view(-1, TILE, num_features)
        at_once = max(1, FACTOR_ENTRIES_AT_ONCE // num_features**2)
        with one_thread():
            product = torch.cat(
                [
                    torch.bmm(rows_tPD, self.scale[latent_t].mT)
                    for rows_tPD, latent_t in zip(padded_TPD.split(at_once), tile_latent_T.split(at_once), strict=True)
                ]
            )
        return product.view(-1, num_features)[place_N] + self.means[latent_N]
