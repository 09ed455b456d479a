"""A pass of distributions whose log density is linear in statistics t(x) of a sample, as those of counts are.

log p(x | latent) = base(x) + weights . t(x) + sum of the constants of the columns that are not missing; t of a missing entry
is 0. So the densities of all latents are one matrix product, and the statistics to keep are the product of responsibilities
and t(x) (PRML 2.4). t may be sparse: then only its entries are touched.

Legend: N samples, D columns, K latents, F sufficient statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import scipy.sparse
import torch
from torch import Tensor

from gendist.models.ops.buffers import buffer
from gendist.protocols import Compute

ENTRIES_AT_ONCE = 1 << 17  # of t(x), a megabyte: it is still in cache when it is multiplied a second time
ROWS_AT_ONCE = (256, 8192)


@dataclass(frozen=True, eq=False)
class LinearStatistics:
    """Sums over samples, weighed by responsibilities r times the weights; float64 on the CPU.

    counts   (K,) sum of r
    sums     (K, F) sum of r t(x)
    present  (K, D) sum of r over the samples that have the column; (K, 1) where nothing is missing
    base     sum of r base(x), over all latents
    """

    counts: Tensor
    sums: Tensor
    present: Tensor
    base: float

    def merge(self, other: LinearStatistics) -> LinearStatistics:
        return LinearStatistics(
            self.counts + other.counts, self.sums + other.sums, self.present + other.present, self.base + other.base
        )


class LinearKernel:
    """The `Kernel` of `ops/independent_latent.py`.

    weights    (K, F)
    constants  (K, D)
    features   (x (n, D), missing (n, D) or None) -> t(x) (n, F), dense or CSR
    base       x (n, D) -> (n,), or None: it is 0
    """

    def __init__(
        self,
        weights: Tensor,
        constants: Tensor,
        compute: Compute,
        features: Callable[[Tensor, Tensor | None], Tensor],
        base: Callable[[Tensor], Tensor] | None = None,
    ):
        self._dtype, self._device = compute.dtype, compute.torch_device
        self._weights = weights.to(self._device, self._dtype)
        self._constants = constants.to(self._device, self._dtype)
        self._total_constant = constants.sum(1).to(self._device)
        self._make_features, self._make_base = features, base
        self._t = torch.empty(0)
        self._missing: Tensor | None = None
        self._base: Tensor | None = None
        self._counts = torch.zeros(len(weights), dtype=torch.float64, device=self._device)
        self._sums = torch.zeros(weights.shape, dtype=torch.float64, device=self._device)
        self._present = torch.zeros(len(weights), 1, dtype=torch.float64, device=self._device)
        self._sum_of_base = 0.0

    def portions(self, x_ND: Tensor, missing_ND: Tensor | None) -> Iterator[slice]:
        num_rows, (least, most) = len(x_ND), ROWS_AT_ONCE
        if x_ND.layout is torch.sparse_csr:
            return iter([slice(0, num_rows)])
        size = min(max(1 << (ENTRIES_AT_ONCE // max(self._weights.shape)).bit_length() - 1, least), most)
        return (slice(start, min(start + size, num_rows)) for start in range(0, max(num_rows, 1), size))

    def load(self, x_ND: Tensor, missing_ND: Tensor | None) -> None:
        x_ND = x_ND.to(self._device)
        self._missing = None if missing_ND is None else missing_ND.to(self._device, self._dtype)
        self._t = self._make_features(x_ND, missing_ND).to(self._device, self._dtype)
        self._base = None if self._make_base is None else self._make_base(x_ND)

    def log_prob(self, offset_K: Tensor) -> Tensor:
        """(K, N) log p(x | latent) + offset of the latent."""
        offset_K1 = (self._total_constant + offset_K.to(self._device)).to(self._dtype)[:, None]
        shape = (len(self._weights), len(self._t))
        if self._t.layout is torch.sparse_csr:
            log_prob_KN = (self._t @ self._weights.T.contiguous()).T + offset_K1
        else:
            out = buffer("log_prob linear", shape, self._dtype, self._device)
            log_prob_KN = torch.addmm(offset_K1, self._weights, self._t.T, out=out)
        if self._missing is not None:
            log_prob_KN.addmm_(self._constants, self._missing.T, alpha=-1.0)
        return log_prob_KN if self._base is None else log_prob_KN.add_(self._base)

    def add(self, responsibilities_KN: Tensor) -> None:
        """Add the statistics of the rows, whose responsibilities include their weights."""
        self._counts += responsibilities_KN.sum(1)
        if self._t.layout is torch.sparse_csr:
            self._sums += _transposed_product(self._t, responsibilities_KN.T.contiguous()).T
        else:
            self._sums += responsibilities_KN @ self._t
        if self._missing is None:
            self._present += responsibilities_KN.sum(1, keepdim=True)
        else:
            self._present = self._present + responsibilities_KN @ (1.0 - self._missing)
        if self._base is not None:
            self._sum_of_base += float((responsibilities_KN.sum(0) * self._base).sum())

    def count(self, latent_N: Tensor) -> None:
        """Each row added to the sums of its latent."""
        latent_N = latent_N.to(self._device)
        counts_K = torch.bincount(latent_N, minlength=len(self._counts))
        self._counts += counts_K
        if self._t.layout is torch.sparse_csr:
            latent_n = torch.repeat_interleave(latent_N, self._t.crow_indices().diff())
            cell_n = latent_n.mul_(self._sums.shape[1]).add_(self._t.col_indices())
            self._sums += torch.bincount(cell_n, self._t.values(), self._sums.numel()).view_as(self._sums)
        else:
            self._sums.index_add_(0, latent_N, self._t.to(torch.float64))
        if self._missing is None:
            self._present += counts_K[:, None]
        else:
            self._present = self._present.expand(-1, self._missing.shape[1]).contiguous()
            self._present.index_add_(0, latent_N, 1.0 - self._missing.to(torch.float64))
        if self._base is not None:
            self._sum_of_base += float(self._base.sum())

    def statistics(self) -> LinearStatistics:
        """What was added."""
        return LinearStatistics(self._counts.cpu(), self._sums.cpu(), self._present.cpu(), self._sum_of_base)


def _transposed_product(t_NF: Tensor, responsibilities_NK: Tensor) -> Tensor:
    """(F, K), of t in CSR layout. On the CPU by scipy, since torch sorts all entries by their column first."""
    if t_NF.device.type != "cpu":
        return t_NF.t() @ responsibilities_NK
    arrays = (t_NF.values().numpy(), t_NF.col_indices().numpy(), t_NF.crow_indices().numpy())
    return torch.from_numpy(scipy.sparse.csr_array(arrays, shape=t_NF.shape).T @ responsibilities_NK.numpy())


def log_prob_of_counted(weights: Tensor, constants: Tensor, statistics: LinearStatistics) -> float:
    """Sum of r log p(x | latent) under these parameters, from the statistics."""
    return float((weights * statistics.sums).sum() + (constants * statistics.present).sum()) + statistics.base


def unchanged(x_ND: Tensor, missing_ND: Tensor | None) -> Tensor:
    """t(x) = x: missing entries hold 0 already."""
    return x_ND
