"""What a pass over samples keeps of Gaussians: expected moments, and about what they are taken.

Legend: N samples, D features, K latents, F sufficient statistics (see `gaussian_kernel.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gendist.cost import PassCost, tensor_bytes
from gendist.models.distributions.gaussian import CovarianceType, Gaussian
from gendist.one_thread import one_thread
from gendist.protocols import Compute

MAX_PACKED_FEATURES = 128  # of full covariances: with more, products of all pairs cost more than differences

# How much larger than the narrowest variance of a latent the squares of its rows may be in the shared coordinates. Measured,
# the relative error of a covariance is at most about 1e-16 times this in float64 and 5e-8 times this in float32.
MAX_LOSS = {"float64": 1e7, "float32": 1e6}


@dataclass(frozen=True, eq=False)
class Reference:
    """About what a pass takes its moments; a function of the parameters, so the same for every block.

    x = center + scale z: the coordinates that all latents share, in which they spread about 1 together
    points                (K, D) the moments of a narrow latent are about its own point
    narrow                (K,) bool
    """

    center: Tensor  # (D,)
    scale: Tensor  # (D, D) lower triangular, or (D,)
    points: Tensor
    narrow: Tensor
    max_loss: float

    def equals(self, other: Reference) -> bool:
        pairs = (
            (self.center, other.center),
            (self.scale, other.scale),
            (self.points, other.points),
            (self.narrow, other.narrow),
        )
        return all(torch.equal(a, b) for a, b in pairs)

    def loss_of(self, gaussian: Gaussian) -> Tensor:
        """(K,) by how much moments about this reference are larger than the narrowest variance of each latent."""
        whitening = gaussian.whitening
        if gaussian.has_matrices:
            precision = precision_in(whitening[:1] if gaussian.covariance_type == "tied" else whitening, self.scale)
            position = torch.linalg.solve_triangular(self.scale, (gaussian.means - self.center).T, upper=False).T
            # The Frobenius norm: at least the largest eigenvalue, at most sqrt(D) times it.
            in_shared = torch.linalg.matrix_norm(precision) * (1.0 + position.square().amax(-1))
        else:  # no column meets another
            precision = (whitening * self.scale).square()
            position = (gaussian.means - self.center) / self.scale
            in_shared = (precision * (1.0 + position.square())).amax(-1)
        return torch.where(self.narrow, self.loss_about_points(gaussian), in_shared)

    def loss_about_points(self, gaussian: Gaussian) -> Tensor:
        """(K,) the same of moments about the latent's own point."""
        away = gaussian.means - self.points
        if gaussian.has_matrices:
            return (gaussian.whitening @ away[:, :, None])[:, :, 0].square().sum(-1)
        return (gaussian.whitening * away).square().sum(-1)


def reference_of(gaussian: Gaussian, compute: Compute) -> Reference:
    """The reference that suits the parameters: the mean of the means, and the covariance of an even mixture of all latents;
    narrow latents are about their means."""
    center = gaussian.means.mean(0)
    between_KD = gaussian.means - center
    num_latents = gaussian.num_latents
    if gaussian.covariance_type == "full":
        with one_thread():
            total = gaussian.covariances.mean(0) + between_KD.T @ between_KD / num_latents
            scale, failed = torch.linalg.cholesky_ex(total)
        if int(failed):
            scale = torch.diag(total.diagonal().sqrt())
    elif gaussian.covariance_type == "tied":
        scale = gaussian.scale[0]
    elif gaussian.covariance_type == "diag":
        scale = (gaussian.covariances.mean(0) + between_KD.square().mean(0)).sqrt()
    else:
        scale = (gaussian.covariances.mean() + between_KD.square().mean()).sqrt().expand(gaussian.num_features)
    max_loss = MAX_LOSS[compute.precision]
    none = torch.zeros(num_latents, dtype=torch.bool)
    reference = Reference(center, scale, gaussian.means, none, max_loss)
    with one_thread():
        found = reference.loss_of(gaussian) > max_loss
    if gaussian.covariance_type == "full" and gaussian.num_features > MAX_PACKED_FEATURES:
        found = torch.ones_like(none)
    if gaussian.covariance_type == "tied":  # one covariance for all of them
        found = found.any().expand(num_latents).clone()
    return replace(reference, narrow=found)


@dataclass(frozen=True, eq=False)
class CompletedMoments:
    """Moments of rows that have some entries and lack others, as they are expected to be where they lack them.

    counts  (K,) sum of r
    first   (K, D) sum of r E[d], d = x - point
    second  sum of r E[d d^T]: (K, D, D) full, (D, D) tied
    """

    counts: Tensor
    first: Tensor
    second: Tensor

    def merge(self, other: CompletedMoments) -> CompletedMoments:
        return CompletedMoments(self.counts + other.counts, self.first + other.first, self.second + other.second)


@dataclass(frozen=True, eq=False)
class GaussianStatistics:
    """Expected moments of some samples, weighed by responsibilities r times the weights; float64 on the CPU.

    counts     (K,) sum of r
    present    of diag and spherical (K, D) sum of r over the rows that have the entry, else (K, 1) over complete rows; shared,
               first and second are sums over the same
    shared     (K, F) sum of r t(z); of no meaning for narrow latents
    first      (n, D) sum of r d for the n narrow latents, d = x - point
    second     sum of r d d^T of these: (n, D, D) full, its diagonal (n, D) diag and spherical;
               tied: (D, D) of all latents, d = z where they are not narrow
    completed  of the other rows but those that lack every entry; None: there were none
    """

    reference: Reference
    counts: Tensor
    present: Tensor
    shared: Tensor
    first: Tensor
    second: Tensor
    completed: CompletedMoments | None = None

    def merge(self, other: GaussianStatistics) -> GaussianStatistics:
        if not self.reference.equals(other.reference):
            raise ValueError("statistics about different reference points cannot be merged")
        completed = self.completed or other.completed
        if self.completed is not None and other.completed is not None:
            completed = self.completed.merge(other.completed)
        return GaussianStatistics(
            self.reference,
            self.counts + other.counts,
            self.present + other.present,
            self.shared + other.shared,
            self.first + other.first,
            self.second + other.second,
            completed,
        )

    @property
    def weight(self) -> Tensor:
        """(K, D) diag and spherical, else (K, 1): the weight of the samples that the moments of each column are of."""
        return self.present if self.completed is None else self.present + self.completed.counts[:, None]

    def moments(self, covariance_type: str) -> tuple[Tensor, Tensor]:
        """The weighted means (K, D) of the samples of each latent, and their covariances about these, in the layout of the
        covariance type; what is of no weight is not to be used."""
        reference, num_features = self.reference, len(self.reference.center)
        weight = torch.where(self.present > 0, self.present, 1.0)
        own_weight = weight[reference.narrow]
        z_KD = self.shared[:, :num_features] / weight
        shift_nD = self.first / own_weight
        scale = reference.scale
        means = reference.center + (z_KD @ scale.T if scale.ndim == 2 else z_KD * scale)
        means[reference.narrow] = reference.points[reference.narrow] + shift_nD

        if covariance_type == "tied":
            total = torch.where(self.present.sum() > 0, self.present.sum(), 1.0)
            shift_KD = shift_nD if bool(reference.narrow.any()) else z_KD
            within = (self.second - (self.present * shift_KD).T @ shift_KD) / total
            return self._with_completed(means, symmetric(within if bool(reference.narrow.any()) else scale @ within @ scale.T))
        if covariance_type == "full":
            products_KF = self.shared[:, num_features:] / weight
            first, second = torch.triu_indices(num_features, num_features)
            matrices = torch.zeros(len(z_KD), num_features, num_features, dtype=z_KD.dtype)
            if products_KF.shape[1]:
                matrices[:, first, second] = products_KF
                matrices[:, second, first] = products_KF
                matrices -= z_KD[:, :, None] * z_KD[:, None, :]
                matrices = scale @ matrices @ scale.T
            matrices[reference.narrow] = self.second / own_weight[:, :, None] - shift_nD[:, :, None] * shift_nD[:, None, :]
            return self._with_completed(means, symmetric(matrices))
        if covariance_type == "diag":
            variances = (self.shared[:, num_features:] / weight - z_KD.square()) * scale.square()
            variances[reference.narrow] = self.second / own_weight - shift_nD.square()
            return means, variances.clamp_min_(0.0)
        scatter = (self.shared[:, num_features] - (self.present * z_KD.square()).sum(1)) * scale[0].square()
        scatter[reference.narrow] = (self.second - self.present[reference.narrow] * shift_nD.square()).sum(-1)
        total = self.present.sum(1)
        return means, (scatter / torch.where(total > 0, total, 1.0)).clamp_min_(0.0)

    def _with_completed(self, means: Tensor, covariances: Tensor) -> tuple[Tensor, Tensor]:
        """These moments of the complete rows and those of the completed ones together (Chan, Golub & LeVeque 1979)."""
        if self.completed is None:
            return means, covariances
        own, others = self.present, self.completed.counts[:, None]
        both = torch.where(own + others > 0, own + others, 1.0)
        shift_KD = self.completed.first / torch.where(others > 0, others, 1.0)
        delta_KD = self.reference.points + shift_KD - means
        share = others / both
        # Where there are no complete rows, `means` is any point.
        merged = torch.where(own > 0, means + share * delta_KD, self.reference.points + shift_KD)
        if covariances.ndim == 2:
            scatter = own.sum() * covariances + self.completed.second - (others * shift_KD).T @ shift_KD
            scatter += (own * share * delta_KD).T @ delta_KD
            return merged, symmetric(scatter / torch.where(self.weight.sum() > 0, self.weight.sum(), 1.0))
        own, others, share = own[:, :, None], others[:, :, None], share[:, :, None]
        scatter = own * covariances + self.completed.second - others * (shift_KD[:, :, None] * shift_KD[:, None, :])
        scatter += own * share * (delta_KD[:, :, None] * delta_KD[:, None, :])
        return merged, symmetric(scatter / both[:, :, None])


def pass_cost(covariance_type: CovarianceType, num_latents: int, num_features: int) -> PassCost:
    """Of an E-step in which no latent is narrow and nothing is missing, by the shapes of `GaussianStatistics`."""
    K, D = num_latents, num_features
    has_matrices = covariance_type in ("full", "tied")
    square = (D, D) if has_matrices else (D,)
    by_differences = covariance_type == "full" and D > MAX_PACKED_FEATURES
    F = {"full": D + (0 if by_differences else D * (D + 1) // 2), "diag": 2 * D}.get(covariance_type, D + 1)
    # The densities and the moments; before them z, and of tied ones their products.
    flops = 4.0 * K * D**2 if by_differences else 4.0 * K * F + {"full": 2.0, "tied": 4.0}.get(covariance_type, 0.0) * D**2
    n = K if by_differences else 0
    second = {"full": (n, D, D), "tied": (D, D), "diag": (n, D), "spherical": (n, D)}[covariance_type]
    kept = {
        "counts": (K,),
        "present": (K, 1 if has_matrices else D),
        "shared": (K, F),
        "first": (n, D),
        "second": second,
        "reference.center": (D,),
        "reference.scale": square,
        "reference.points": (K, D),
    }
    covariances = {"full": (K, D, D), "tied": (D, D), "diag": (K, D), "spherical": (K,)}[covariance_type]
    return PassCost(flops, tensor_bytes(kept) + K, tensor_bytes({"means": (K, D), "covariances": covariances}))


def precision_in(whitening: Tensor, scale: Tensor) -> Tensor:
    """(K, D, D) inverse covariances in the shared coordinates."""
    factor = whitening @ scale
    return factor.mT @ factor


def symmetric(matrices: Tensor) -> Tensor:
    return 0.5 * (matrices + matrices.mT)
