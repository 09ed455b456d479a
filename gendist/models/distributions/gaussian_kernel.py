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

Entries that are missing are marginalised. Where columns do not depend on each other (diag, spherical) they are left out of
the sums, by a mask; else the rows that lack the same columns are done together, as `gaussian_missing.py` says.

Legend: N samples, D features, K latents, F sufficient statistics. Inside, samples are the last axis where covariances are
matrices, whose columns are multiplied with each other, else the first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from gendist.models.distributions.gaussian import Gaussian
from gendist.models.distributions.gaussian_missing import Pattern, rows_of_patterns
from gendist.models.distributions.gaussian_statistics import (
    MAX_PACKED_FEATURES,
    CompletedMoments,
    GaussianStatistics,
    Reference,
    precision_in,
    reference_of,
)
from gendist.models.ops.buffers import buffer
from gendist.models.ops.independent_latent import Rows
from gendist.one_thread import one_thread
from gendist.protocols import Compute

ENTRIES_AT_ONCE = 1 << 21  # of t(z): 16 MiB of float64. Fewer rows make small products, more leave the cache
ROWS_AT_ONCE = (256, 4096)
ROWS_OF_VECTORS_AT_ONCE = 2048  # where covariances are no matrices
FEATURES_FIRST = torch.backends.cpu.get_cpu_capability() == "AVX512"
LEAST_LOG = -1e30  # of a density: finite in either precision, so that a row far from all latents is no NaN
MANY_ROWS = 256  # of a pattern
PATTERN_BYTES = 64 * 2**20  # of what is kept of patterns from block to block


def _make_tables(gaussian: Gaussian, compute: Compute, reference: Reference) -> _Tables:
    center, num_features = reference.center, gaussian.num_features
    columns_KD = torch.zeros(gaussian.num_latents, 0, dtype=center.dtype)
    with one_thread():
        constant_K = gaussian.log_peak
        if gaussian.covariance_type == "full":
            to_z = torch.linalg.solve_triangular(reference.scale, torch.eye(num_features, dtype=center.dtype), upper=False)
            m_KD = (gaussian.means - center) @ to_z.T
            precision_KDD = precision_in(gaussian.whitening, reference.scale)
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
        if not gaussian.has_matrices:
            columns_KD = gaussian.whitening.log() - 0.5 * math.log(2.0 * math.pi)
    weights_KF = torch.cat([linear_KD, quadratic_KF], dim=1)
    own = torch.nonzero(reference.narrow)[:, 0].tolist()
    device, dtype = compute.torch_device, compute.dtype
    return _Tables(
        reference,
        center.to(device),
        to_z.to(device),
        weights_KF.to(device, dtype),
        offset_K.to(device),
        (columns_KD - 0.5 * linear_KD * m_KD).to(device, dtype) if columns_KD.numel() else columns_KD,
        own,
        gaussian.means[own].to(device),
        gaussian.whitening[own].to(device),
        constant_K[own].to(device),
        columns_KD[own].to(device),
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
    columns: Tensor  # (K, D) what each column adds to c; (K, 0) where columns depend on each other
    own: list[int]  # the n narrow latents
    own_means: Tensor  # (n, D) float64
    own_whitening: Tensor  # (n, D, D) or (n, D)
    own_constant: Tensor  # (n,) float64
    own_columns: Tensor  # (n, D) float64, what each column adds to that, or (n, 0)
    own_points: Tensor  # (n, D) float64
    patterns: dict[bytes, Pattern] = field(default_factory=dict)  # the first that came up

    def pattern_of(self, gaussian: Gaussian, missing_D: Tensor) -> Pattern:
        key = missing_D.numpy().tobytes()
        if key in self.patterns:
            return self.patterns[key]
        pattern = Pattern.of(gaussian, missing_D, self.reference)
        if (len(self.patterns) + 1) * pattern.num_bytes <= PATTERN_BYTES:
            self.patterns[key] = pattern
        return pattern


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
        self._present: Tensor | None = None  # (N, D) of the rows at hand 1.0 where an entry is there; None: all are
        self._part: _Part | None = None  # what does the rows at hand, if they lack columns that others depend on
        self._parts: dict[bytes, _Part] = {}
        device = compute.torch_device
        self._counts = torch.zeros(gaussian.num_latents, dtype=torch.float64, device=device)
        width = 1 if gaussian.has_matrices else num_features
        self._weight = torch.zeros(gaussian.num_latents, width, dtype=torch.float64, device=device)
        self._shared = torch.zeros(self._tables.weights.shape, dtype=torch.float64, device=device)
        self._first = torch.zeros_like(self._tables.own_points)
        shape = {"full": (num_features, num_features), "tied": (), "diag": (num_features,), "spherical": (num_features,)}[kind]
        second = (num_features, num_features) if kind == "tied" else (len(self._tables.own), *shape)
        self._second = torch.zeros(second, dtype=torch.float64, device=device)

    def portions(self, x_ND: Tensor, missing_ND: Tensor | None) -> Iterator[Rows]:
        num_rows, (least, most) = max(len(x_ND), 1), ROWS_AT_ONCE
        most = most if self._gaussian.has_matrices else ROWS_OF_VECTORS_AT_ONCE
        entries = max(self._tables.weights.shape)
        size = min(max(1 << (ENTRIES_AT_ONCE // entries).bit_length() - 1, least), most)
        if missing_ND is None or not self._gaussian.has_matrices or not bool(missing_ND.any()):
            return (slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size))
        return (rows for of_pattern in rows_of_patterns(missing_ND) for rows in of_pattern.split(size))

    def load(self, x_ND: Tensor, missing_ND: Tensor | None) -> None:
        self._part = self._present = None
        if missing_ND is not None and self._gaussian.has_matrices:
            if bool(missing_ND[:1].any()):  # all of the portion's rows lack these
                self._part = self._part_of(missing_ND[0].cpu())
                self._part.load(x_ND)
                return
        elif missing_ND is not None and bool(missing_ND.any()):
            self._present = (~missing_ND).to(self._compute.torch_device, self._compute.dtype)
        self._x = x_ND.to(self._compute.torch_device)
        if not self._all_own:
            self._features = self._sufficient_statistics(self._x)

    def _part_of(self, missing_D: Tensor) -> _Part:
        key = missing_D.numpy().tobytes()
        if key not in self._parts:
            pattern = None if bool(missing_D.all()) else self._tables.pattern_of(self._gaussian, missing_D)
            self._parts[key] = _Part(self._gaussian, self._compute, self._tables.reference, pattern)
        return self._parts[key]

    def log_prob(self, offset_K: Tensor) -> Tensor:
        """(K, N) log N(x | mean_k, covariance_k) + offset_k, of the entries that are there."""
        if self._part is not None:
            return self._part.log_prob(offset_K)
        tables, dtype, device = self._tables, self._compute.dtype, self._compute.torch_device
        offset_K = offset_K.to(device)
        log_prob_KN = buffer("log_prob", (len(tables.offset), len(self._x)), dtype, device)
        if not self._all_own:
            features_FN = self._features if self._gaussian.has_matrices else self._features.T
            offset_K1 = (offset_K if self._present is not None else tables.offset + offset_K).to(dtype)[:, None]
            torch.addmm(offset_K1, tables.weights, features_FN, out=log_prob_KN)
            if self._present is not None:
                log_prob_KN.addmm_(tables.columns, self._present.T)
        for i, k in enumerate(tables.own):
            d_DN = self._difference(self._x, tables.own_means[i], self._present)
            z_DN = buffer("z own", tuple(d_DN.shape), torch.float64, device)
            if self._gaussian.has_matrices:
                torch.mm(tables.own_whitening[i], d_DN, out=z_DN)
            else:
                torch.mul(tables.own_whitening[i][:, None], d_DN, out=z_DN)
            own_N = z_DN.mul_(z_DN).sum(0).mul_(-0.5)
            if self._present is None:
                own_N.add_(tables.own_constant[i] + offset_K[k])
            else:
                own_N.addmv_(self._present.double(), tables.own_columns[i]).add_(offset_K[k])
            log_prob_KN[k] = own_N.clamp_min_(LEAST_LOG)
        return log_prob_KN

    def add(self, responsibilities_KN: Tensor) -> None:
        """Add the moments of the rows, whose responsibilities include their weights."""
        if self._part is not None:
            return self._part.add(responsibilities_KN)
        tables, kind = self._tables, self._gaussian.covariance_type
        counts_K = responsibilities_KN.sum(1)
        self._counts += counts_K
        self._weight += counts_K[:, None] if self._present is None else torch.mm(responsibilities_KN, self._present)
        if not self._all_own:
            dtype, device = self._compute.dtype, self._compute.torch_device
            if self._gaussian.has_matrices and FEATURES_FIRST:
                sums_FK = buffer("sums", tuple(tables.weights.T.shape), dtype, device)
                self._shared += torch.mm(self._features, responsibilities_KN.T, out=sums_FK).T
            else:
                features_NF = self._features.T if self._gaussian.has_matrices else self._features
                sums_KF = buffer("sums", tuple(tables.weights.shape), dtype, device)
                self._shared += torch.mm(responsibilities_KN, features_NF, out=sums_KF)
            if kind == "tied":
                z_DN = self._features[:-1]
                self._second += (z_DN * responsibilities_KN.sum(0)) @ z_DN.T
        for i, k in enumerate(tables.own):
            r_N, x_ND, present_ND = responsibilities_KN[k], self._x, self._present
            near = torch.nonzero(r_N)[:, 0]
            if len(near) < len(r_N) // 2:  # a narrow latent is near to few rows
                r_N, x_ND, present_ND = r_N[near], x_ND[near], None if present_ND is None else present_ND[near]
            d_DN = self._difference(x_ND, tables.own_points[i], present_ND)
            rd_DN = torch.mul(r_N, d_DN, out=buffer("z own", tuple(d_DN.shape), torch.float64, d_DN.device))
            self._first[i] += rd_DN.sum(1)
            second = self._second if kind == "tied" else self._second[i]
            second += rd_DN @ d_DN.T if self._gaussian.has_matrices else rd_DN.mul_(d_DN).sum(1)
        return None

    def count(self, latent_N: Tensor) -> None:
        """`add` of rows of which each belongs to one latent alone, with weight 1: several times as fast where no latent is
        narrow, since there is nothing to multiply."""
        num_latents = self._gaussian.num_latents
        if self._gaussian.has_matrices or self._tables.own or self._features.dtype != self._shared.dtype:
            one_hot_NK = torch.nn.functional.one_hot(latent_N.to(self._compute.torch_device), num_latents)
            self.add(one_hot_NK.T.to(self._compute.dtype).contiguous())
            return
        latent_N = latent_N.to(self._shared.device)
        counts_K = torch.bincount(latent_N, minlength=num_latents).to(self._counts)
        self._counts += counts_K
        if self._present is None:
            self._weight += counts_K[:, None]
        else:
            self._weight.index_add_(0, latent_N, self._present)
        self._shared.index_add_(0, latent_N, self._features)

    def _difference(self, x_ND: Tensor, point_D: Tensor, present_ND: Tensor | None) -> Tensor:
        """(D, N) x - point, 0 where x is missing; float64 in any precision."""
        d_DN = buffer("difference", (x_ND.shape[1], x_ND.shape[0]), torch.float64, x_ND.device)
        torch.sub(x_ND.T, point_D[:, None], out=d_DN)
        return d_DN if present_ND is None else d_DN.mul_(present_ND.T)

    def statistics(self) -> GaussianStatistics:
        """What was added."""
        reference, counts_K = self._tables.reference, self._counts.cpu()
        completed: CompletedMoments | None = None
        for part in self._parts.values():
            of_part_K, moments = part.statistics()
            counts_K = counts_K + of_part_K
            if moments is not None:
                completed = moments if completed is None else completed.merge(moments)
        weight, shared, first, second = (v.cpu() for v in (self._weight, self._shared, self._first, self._second))
        return GaussianStatistics(reference, counts_K, weight, shared, first, second, completed)

    def _sufficient_statistics(self, x_ND: Tensor) -> Tensor:
        """t(z): (F, N) where covariances are matrices, else (N, F)."""
        tables, device, (num_rows, num_features) = self._tables, self._compute.torch_device, x_ND.shape
        num_statistics, dtype = tables.weights.shape[1], self._compute.dtype
        centred_ND = torch.sub(x_ND, tables.center, out=buffer("centred", (num_rows, num_features), torch.float64, device))
        if not self._gaussian.has_matrices:
            if self._present is not None:
                centred_ND.mul_(self._present)
            t_NF = buffer("t", (num_rows, num_statistics), dtype, device)
            z_ND = torch.mul(centred_ND, tables.to_z, out=t_NF[:, :num_features])
            if self._gaussian.covariance_type == "diag":
                torch.mul(z_ND, z_ND, out=t_NF[:, num_features:])
            else:
                torch.sum(z_ND.square(), 1, out=t_NF[:, num_features])
            return t_NF
        t_FN = buffer("t", (num_statistics, num_rows), dtype, device)
        z_DN = t_FN[:num_features]
        z_DN.copy_(torch.mm(tables.to_z, centred_ND.T, out=buffer("z", (num_features, num_rows), torch.float64, device)))
        if self._gaussian.covariance_type == "tied":
            t_FN[num_features] = z_DN.square().sum(0)
            return t_FN
        start = num_features
        for i in range(num_features):
            torch.mul(z_DN[i:], z_DN[i], out=t_FN[start : start + num_features - i])
            start += num_features - i
        return t_FN


class _Part:
    """A pass over the rows of one pattern; `pattern` is None where they lack every entry.

    Many rows are done by a kernel of the observed columns, whose moments are completed at the end. For few its tables would
    cost more than they save.
    """

    def __init__(self, gaussian: Gaussian, compute: Compute, reference: Reference, pattern: Pattern | None) -> None:
        self._compute, self._points, self._pattern = compute, reference.points, pattern
        self._kernel: GaussianKernel | None = None
        self._is_few, self._num_rows, self._differences = False, 0, torch.empty(0)
        self._unseen = torch.zeros(gaussian.num_latents, dtype=torch.float64)
        self._moments: CompletedMoments | None = None  # of few rows at a time

    def load(self, x_ND: Tensor) -> None:
        self._num_rows = len(x_ND)
        if self._pattern is None:
            return
        pattern = self._pattern
        x_No, self._is_few = x_ND[:, pattern.observed], len(x_ND) < MANY_ROWS
        if self._is_few:
            self._differences = pattern.differences(x_No.cpu())
            return
        if self._kernel is None:
            self._kernel = GaussianKernel(pattern.marginal, self._compute, pattern.marginal_reference)
        self._kernel.load(x_No, None)

    def log_prob(self, offset_K: Tensor) -> Tensor:
        device = self._compute.torch_device
        if self._pattern is None:
            return offset_K.to(device)[:, None].repeat(1, self._num_rows)
        if self._is_few or self._kernel is None:
            log_prob_KN = self._pattern.log_prob(self._differences)
            return log_prob_KN.add_(offset_K.cpu()[:, None]).clamp_min_(LEAST_LOG).to(device)
        return self._kernel.log_prob(offset_K)

    def add(self, responsibilities_KN: Tensor) -> None:
        if self._pattern is None:
            self._unseen += responsibilities_KN.sum(1).cpu()
        elif self._is_few or self._kernel is None:
            moments = self._pattern.moments(self._differences, responsibilities_KN.cpu().double(), self._points)
            self._moments = moments if self._moments is None else self._moments.merge(moments)
        else:
            self._kernel.add(responsibilities_KN)

    def statistics(self) -> tuple[Tensor, CompletedMoments | None]:
        """(K,) the weight of the rows, and their moments, as they are expected to be when complete."""
        moments = self._moments
        if self._pattern is not None and self._kernel is not None:
            completed = self._pattern.complete(self._kernel.statistics(), self._points)
            moments = completed if moments is None else moments.merge(completed)
        return (self._unseen if moments is None else moments.counts), moments
