"""What an E-step does with Gaussians: log densities of samples, then the moments that responsibilities weigh.

A Gaussian is of the exponential family (PRML 2.4): log N(x) = c + W . t(z) with the sufficient statistics t(z), which are z
and its products, in coordinates z that all latents share. So the densities of all latents are one matrix product, and the
moments are the product of t(z) and the responsibilities: about 20 times as fast as differences from each mean. Products
about a shared point lose digits where a latent is narrow, as (spread of the data / its narrowest width)^2 says. Such latents
are found from the parameters before a pass and take differences from points of their own instead, in float64. Either way
the result is good to 1e-8.

covariance_type  t(z)                           F
full             z, z_i z_j for i <= j          D + D (D + 1) / 2
diag             z, z_i^2                       2 D
tied, spherical  z, |z|^2                       D + 1

Legend: N samples, D features, K latents, F sufficient statistics. Inside, samples are the last axis.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from gendist.models.distributions.gaussian import Gaussian
from gendist.models.ops.buffers import buffer
from gendist.one_thread import one_thread
from gendist.protocols import Compute

ENTRIES_AT_ONCE = 1 << 21  # of t(z): 16 MiB of float64. Fewer rows make small products, more leave the cache
ROWS_AT_ONCE = (256, 4096)
FEATURES_FIRST = torch.backends.cpu.get_cpu_capability() == "AVX512"
LEAST_LOG = -1e30  # of a density: finite in either precision, so that a row far from all latents is no NaN
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
        whitening, away = gaussian.whitening, gaussian.means - self.points
        if gaussian.has_matrices:
            precision = _precision(whitening[:1] if gaussian.covariance_type == "tied" else whitening, self.scale)
            position = torch.linalg.solve_triangular(self.scale, (gaussian.means - self.center).T, upper=False).T
            shift = (whitening @ away[:, :, None])[:, :, 0]
            # The Frobenius norm: at least the largest eigenvalue, at most sqrt(D) times it.
            in_shared = torch.linalg.matrix_norm(precision) * (1.0 + position.square().amax(-1))
        else:  # no column meets another
            precision = (whitening * self.scale).square()
            position = (gaussian.means - self.center) / self.scale
            shift = whitening * away
            in_shared = (precision * (1.0 + position.square())).amax(-1)
        return torch.where(self.narrow, shift.square().sum(-1), in_shared)


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
class GaussianStatistics:
    """Expected moments of some samples, weighed by responsibilities r times the weights; float64 on the CPU.

    counts  (K,) sum of r
    shared  (K, F) sum of r t(z); of no meaning for narrow latents
    first   (n, D) sum of r d for the n narrow latents, d = x - point
    second  sum of r d d^T of these: (n, D, D) full, its diagonal (n, D) diag and spherical;
            tied: (D, D) of all latents, d = z where they are not narrow
    """

    reference: Reference
    counts: Tensor
    shared: Tensor
    first: Tensor
    second: Tensor

    @property
    def present(self) -> Tensor:
        """(K, D) sum of r over the samples that have the column."""
        return self.counts[:, None].expand(-1, len(self.reference.center))

    def merge(self, other: GaussianStatistics) -> GaussianStatistics:
        if not self.reference.equals(other.reference):
            raise ValueError("statistics about different reference points cannot be merged")
        return GaussianStatistics(
            self.reference,
            self.counts + other.counts,
            self.shared + other.shared,
            self.first + other.first,
            self.second + other.second,
        )

    def moments(self, covariance_type: str) -> tuple[Tensor, Tensor]:
        """The weighted means (K, D) of the samples of each latent, and their covariances about these, in the layout of the
        covariance type; what a latent without weight has is not to be used."""
        reference, num_features = self.reference, len(self.reference.center)
        counts_K1 = torch.where(self.counts > 0, self.counts, 1.0)[:, None]
        z_KD = self.shared[:, :num_features] / counts_K1
        products_KF = self.shared[:, num_features:] / counts_K1
        own_counts_n1 = counts_K1[reference.narrow]
        shift_nD = self.first / own_counts_n1
        scale = reference.scale
        if scale.ndim == 2:
            means = reference.center + z_KD @ scale.T
        else:
            means = reference.center + z_KD * scale
        means[reference.narrow] = reference.points[reference.narrow] + shift_nD

        if covariance_type == "tied":
            total = torch.where(self.counts.sum() > 0, self.counts.sum(), 1.0)
            shift_KD = shift_nD if bool(reference.narrow.any()) else z_KD
            within = (self.second - (self.counts[:, None] * shift_KD).T @ shift_KD) / total
            return means, _symmetric(within if bool(reference.narrow.any()) else scale @ within @ scale.T)
        if covariance_type == "full":
            first, second = torch.triu_indices(num_features, num_features)
            matrices = torch.zeros(len(z_KD), num_features, num_features, dtype=z_KD.dtype)
            if products_KF.shape[1]:
                matrices[:, first, second] = products_KF
                matrices[:, second, first] = products_KF
                matrices -= z_KD[:, :, None] * z_KD[:, None, :]
                matrices = scale @ matrices @ scale.T
            matrices[reference.narrow] = self.second / own_counts_n1[:, :, None] - shift_nD[:, :, None] * shift_nD[:, None, :]
            return means, _symmetric(matrices)
        if covariance_type == "diag":
            variances = (products_KF - z_KD.square()) * scale.square()
            variances[reference.narrow] = self.second / own_counts_n1 - shift_nD.square()
            return means, variances.clamp_min_(0.0)
        variances = (products_KF[:, 0] - z_KD.square().sum(1)) * scale[0].square() / num_features
        variances[reference.narrow] = (self.second / own_counts_n1 - shift_nD.square()).mean(-1)
        return means, variances.clamp_min_(0.0)


def _make_tables(gaussian: Gaussian, compute: Compute, reference: Reference) -> _Tables:
    center, num_features = reference.center, gaussian.num_features
    with one_thread():
        constant_K = gaussian.log_peak
        if gaussian.covariance_type == "full":
            to_z = torch.linalg.solve_triangular(reference.scale, torch.eye(num_features, dtype=center.dtype), upper=False)
            m_KD = (gaussian.means - center) @ to_z.T
            precision_KDD = _precision(gaussian.whitening, reference.scale)
            linear_KD = (precision_KDD @ m_KD[:, :, None])[:, :, 0]
            first, second = torch.triu_indices(num_features, num_features)
            if num_features > MAX_PACKED_FEATURES:
                first = second = first[:0]
            quadratic_KF = torch.where(first == second, -0.5, -1.0) * precision_KDD[:, first, second]
        elif gaussian.covariance_type == "tied":
            to_z = gaussian.whitening[0]
            linear_KD = m_KD = (gaussian.means - center) @ to_z.T
            quadratic_KF = torch.full((gaussian.num_latents, 1), -0.5, dtype=center.dtype)
        else:
            to_z = reference.scale.reciprocal()
            m_KD = (gaussian.means - center) * to_z
            precision_KD = (gaussian.whitening * reference.scale).square()
            linear_KD = precision_KD * m_KD
            quadratic_KF = -0.5 * (precision_KD if gaussian.covariance_type == "diag" else precision_KD[:, :1])
        offset_K = constant_K - 0.5 * (linear_KD * m_KD).sum(1)
    weights_KF = torch.cat([linear_KD, quadratic_KF], dim=1)
    own = torch.nonzero(reference.narrow)[:, 0].tolist()
    device, dtype = compute.torch_device, compute.dtype
    return _Tables(
        reference,
        center.to(device),
        to_z.to(device),
        weights_KF.to(device, dtype),
        offset_K.to(device),
        own,
        gaussian.means[own].to(device),
        gaussian.whitening[own].to(device),
        constant_K[own].to(device),
        reference.points[own].to(device),
    )


@dataclass(frozen=True, eq=False)
class _Tables:
    """What a pass needs of the parameters."""

    reference: Reference
    center: Tensor  # (D,) float64
    to_z: Tensor  # (D, D) or (D,) float64: z = to_z (x - center)
    weights: Tensor  # (K, F) W
    offset: Tensor  # (K,) c, float64
    own: list[int]  # the n narrow latents
    own_means: Tensor  # (n, D) float64
    own_whitening: Tensor  # (n, D, D) or (n, D)
    own_constant: Tensor  # (n,) float64
    own_points: Tensor  # (n, D) float64


# Made once for all blocks of a pass, and gone with the parameters.
_made: WeakKeyDictionary[Gaussian, dict[tuple[Compute, Reference | None], _Tables]] = WeakKeyDictionary()


def _tables(gaussian: Gaussian, compute: Compute, reference: Reference | None) -> _Tables:
    made = _made.setdefault(gaussian, {})
    key = (compute, reference)
    if key not in made:
        made[key] = _make_tables(gaussian, compute, reference or reference_of(gaussian, compute))
    return made[key]


class GaussianKernel:
    """One pass over samples, some at a time: the `Kernel` of `ops/independent_latent.py`."""

    def __init__(self, gaussian: Gaussian, compute: Compute, reference: Reference | None = None):
        self._gaussian, self._compute = gaussian, compute
        self._tables = _tables(gaussian, compute, reference)
        kind, num_features = gaussian.covariance_type, gaussian.num_features
        self._all_own = len(self._tables.own) == gaussian.num_latents
        self._x = self._features = torch.empty(0)
        self._counts = torch.zeros(gaussian.num_latents, dtype=torch.float64, device=compute.torch_device)
        self._shared = torch.zeros(self._tables.weights.shape, dtype=torch.float64, device=compute.torch_device)
        self._first = torch.zeros_like(self._tables.own_points)
        shape = {"full": (num_features, num_features), "tied": (), "diag": (num_features,), "spherical": (num_features,)}[kind]
        second = (num_features, num_features) if kind == "tied" else (len(self._tables.own), *shape)
        self._second = torch.zeros(second, dtype=torch.float64, device=compute.torch_device)

    def portions(self, x_ND: Tensor, missing_ND: Tensor | None) -> Iterator[slice]:
        num_rows, (least, most) = max(len(x_ND), 1), ROWS_AT_ONCE
        entries = max(self._tables.weights.shape)
        size = min(max(1 << (ENTRIES_AT_ONCE // entries).bit_length() - 1, least), most)
        return (slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size))

    def load(self, x_ND: Tensor, missing_ND: Tensor | None) -> None:
        self._x = x_ND.to(self._compute.torch_device)
        if not self._all_own:
            self._features = self._sufficient_statistics(self._x)

    def log_prob(self, offset_K: Tensor) -> Tensor:
        """(K, N) log N(x | mean_k, covariance_k) + offset_k."""
        tables, dtype, device = self._tables, self._compute.dtype, self._compute.torch_device
        offset_K = offset_K.to(device)
        log_prob_KN = buffer("log_prob", (len(tables.offset), len(self._x)), dtype, device)
        if not self._all_own:
            offset_K1 = (tables.offset + offset_K).to(dtype)[:, None]
            torch.addmm(offset_K1, tables.weights, self._features, out=log_prob_KN)
        for i, k in enumerate(tables.own):
            d_DN = self._difference(self._x, tables.own_means[i])
            z_DN = buffer("z own", tuple(d_DN.shape), torch.float64, device)
            if self._gaussian.has_matrices:
                torch.mm(tables.own_whitening[i], d_DN, out=z_DN)
            else:
                torch.mul(tables.own_whitening[i][:, None], d_DN, out=z_DN)
            own_N = z_DN.mul_(z_DN).sum(0).mul_(-0.5).add_(tables.own_constant[i] + offset_K[k])
            log_prob_KN[k] = own_N.clamp_min_(LEAST_LOG)
        return log_prob_KN

    def add(self, responsibilities_KN: Tensor) -> None:
        """Add the moments of the rows, whose responsibilities include their weights."""
        tables, kind = self._tables, self._gaussian.covariance_type
        self._counts += responsibilities_KN.sum(1)
        if not self._all_own:
            dtype, device = self._compute.dtype, self._compute.torch_device
            if FEATURES_FIRST:
                sums_FK = buffer("sums", tuple(tables.weights.T.shape), dtype, device)
                self._shared += torch.mm(self._features, responsibilities_KN.T, out=sums_FK).T
            else:
                sums_KF = buffer("sums", tuple(tables.weights.shape), dtype, device)
                self._shared += torch.mm(responsibilities_KN, self._features.T, out=sums_KF)
            if kind == "tied":
                z_DN = self._features[:-1]
                self._second += (z_DN * responsibilities_KN.sum(0)) @ z_DN.T
        for i, k in enumerate(tables.own):
            r_N, x_ND = responsibilities_KN[k], self._x
            near = torch.nonzero(r_N)[:, 0]
            if len(near) < len(r_N) // 2:  # a narrow latent is near to few rows
                r_N, x_ND = r_N[near], x_ND[near]
            d_DN = self._difference(x_ND, tables.own_points[i])
            rd_DN = torch.mul(r_N, d_DN, out=buffer("z own", tuple(d_DN.shape), torch.float64, d_DN.device))
            self._first[i] += rd_DN.sum(1)
            second = self._second if kind == "tied" else self._second[i]
            second += rd_DN @ d_DN.T if self._gaussian.has_matrices else rd_DN.mul_(d_DN).sum(1)

    def _difference(self, x_ND: Tensor, point_D: Tensor) -> Tensor:
        """(D, N) x - point, float64 in any precision."""
        d_DN = buffer("difference", (x_ND.shape[1], x_ND.shape[0]), torch.float64, x_ND.device)
        return torch.sub(x_ND.T, point_D[:, None], out=d_DN)

    def statistics(self) -> GaussianStatistics:
        """What was added."""
        values = (self._counts, self._shared, self._first, self._second)
        return GaussianStatistics(self._tables.reference, *(value.cpu() for value in values))

    def _sufficient_statistics(self, x_ND: Tensor) -> Tensor:
        """(F, N) t(z)."""
        tables, kind, device = self._tables, self._gaussian.covariance_type, self._compute.torch_device
        num_rows, num_features = x_ND.shape
        t_FN = buffer("t", (tables.weights.shape[1], num_rows), self._compute.dtype, device)
        centred_ND = torch.sub(x_ND, tables.center, out=buffer("centred", (num_rows, num_features), torch.float64, device))
        z_DN = t_FN[:num_features]
        if self._gaussian.has_matrices:
            z_DN.copy_(torch.mm(tables.to_z, centred_ND.T, out=buffer("z", (num_features, num_rows), torch.float64, device)))
        else:
            z_DN.copy_(centred_ND.mul_(tables.to_z).T)
        if kind == "full":
            start = num_features
            for i in range(num_features):
                torch.mul(z_DN[i:], z_DN[i], out=t_FN[start : start + num_features - i])
                start += num_features - i
        elif kind == "diag":
            torch.mul(z_DN, z_DN, out=t_FN[num_features:])
        else:
            t_FN[num_features] = z_DN.square().sum(0)
        return t_FN


def _precision(whitening: Tensor, scale: Tensor) -> Tensor:
    """(K, D, D) inverse covariances in the shared coordinates."""
    factor = whitening @ scale
    return factor.mT @ factor


def _symmetric(matrices: Tensor) -> Tensor:
    return 0.5 * (matrices + matrices.mT)
