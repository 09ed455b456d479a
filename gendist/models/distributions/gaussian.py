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

TILE = 8  # samples of one latent that are computed together
FEW = 32  # samples
ENTRIES_A_WORD = 8  # of float64: 64 bytes, the widest registers and the alignment of torch's memory

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
        if self.has_matrices:
            widths = self.covariances.diagonal(dim1=-2, dim2=-1).abs().sqrt()
            asymmetry = (self.covariances - self.covariances.mT).abs()
            if bool((asymmetry > 1e-6 * widths[..., :, None] * widths[..., None, :]).any()):
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
    def covariances_of_latents(self) -> Tensor:
        """(K, D, D), or (K, D) the variances where features are uncorrelated; a view of `covariances`."""
        if self.covariance_type == "tied":
            return self.covariances.expand(self.num_latents, -1, -1)
        return self.covariances[:, None].expand_as(self.means) if self.covariance_type == "spherical" else self.covariances

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

    @cached_property
    def _factors(self) -> Tensor:
        """(K, W, W), of tied (1, W, W): the transposed scales, with zeros up to a whole number of the processor's words."""
        scale = self.scale[:1] if self.covariance_type == "tied" else self.scale
        extra = -self.num_features % ENTRIES_A_WORD
        return torch.nn.functional.pad(scale, (0, extra, 0, extra)).mT.contiguous()

    def sample(self, latent_N: Tensor, noise_ND: Tensor) -> Tensor:
        """(N, D) mean + A noise of each sample's latent, for standard normal noise."""
        if not self.has_matrices:
            return self.means[latent_N] + self.scale[latent_N] * noise_ND
        factor_N = torch.zeros_like(latent_N) if self.covariance_type == "tied" else latent_N
        with one_thread():
            scaled_ND = (_scaled_each if len(noise_ND) <= FEW else _scaled_together)(self._factors, factor_N, noise_ND)
        return scaled_ND.add_(self.means.index_select(0, latent_N))


# A sample must not depend on its neighbours, but a matrix product rounds a row differently according to how many rows stand
# beside it, and where rows do not begin with a word of the processor's, according to its place among them. So all products
# are of one shape, TILE rows of W entries and one factor, filled up with zeros.


def _scaled_each(factors_KWW: Tensor, factor_N: Tensor, noise_ND: Tensor) -> Tensor:
    """(N, D) noise times its factor, a tile for each: the quickest for a few."""
    num_samples, num_features = noise_ND.shape
    padded_NTW = noise_ND.new_zeros(num_samples, TILE, factors_KWW.shape[-1])
    padded_NTW[:, 0, :num_features] = noise_ND
    return torch.bmm(padded_NTW, factors_KWW.index_select(0, factor_N))[:, 0, :num_features]


def _scaled_together(factors_KWW: Tensor, factor_N: Tensor, noise_ND: Tensor) -> Tensor:
    """(N, D) the same, with samples of one factor sharing tiles."""
    num_features, width = noise_ND.shape[1], factors_KWW.shape[-1]
    counts_K = torch.bincount(factor_N, minlength=len(factors_KWW))
    tiles_K = (counts_K + TILE - 1) // TILE
    order_N = torch.argsort(factor_N, stable=True)
    gaps_K = (tiles_K.cumsum(0) - tiles_K) * TILE - (counts_K.cumsum(0) - counts_K)
    place_N = torch.arange(len(order_N)) + torch.repeat_interleave(gaps_K, counts_K)  # among all tiles' rows
    padded = noise_ND.new_zeros(int(tiles_K.sum()), TILE, width)
    padded.view(-1, width)[:, :num_features].index_copy_(0, place_N, noise_ND.index_select(0, order_N))
    product, stop = torch.empty_like(padded), 0
    for factor_WW, num_tiles in zip(factors_KWW, tiles_K.tolist(), strict=True):
        start, stop = stop, stop + num_tiles
        torch.bmm(padded[start:stop], factor_WW.expand(num_tiles, -1, -1), out=product[start:stop])
    place_of_sample_N = torch.empty_like(order_N)
    place_of_sample_N[order_N] = place_N
    return product.view(-1, width).index_select(0, place_of_sample_N)[:, :num_features]
