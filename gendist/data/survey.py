"""The first look at all the data: how much there is, where it lies and how wide it spreads, and what it is by content."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from gendist.blocks import Blocks, reduce
from gendist.data.weightless import first_that_counts
from gendist.protocols import Block, Feature


@dataclass(frozen=True, eq=False)
class Summary:
    """Moments of the columns and the fingerprint of the data, over some rows. D features.

    feature_weight  (D,) the weight of the rows that have the entry
    minimum, maximum, all_integers   (D,) of the entries of rows of positive weight
    mean            (D,) weighted, over these rows
    scatter         (D,) weighted sum of squares about the mean
    num_missing     (D,) entries, of rows of positive weight
    fingerprint     SHA-256 of the content of the leaves, combined as the tree of the reduction combines them
    features        what the columns are, where it is known
    num_sequences   that begin in these rows; 0 where the rows are independent
    """

    num_rows: int
    num_weighted_rows: int
    total_weight: float
    feature_weight: Tensor
    mean: Tensor
    scatter: Tensor
    num_missing: Tensor
    minimum: Tensor
    maximum: Tensor
    all_integers: Tensor
    fingerprint: bytes
    features: tuple[Feature, ...] = ()
    num_sequences: int = 0

    @property
    def variance(self) -> Tensor:
        """(D,) of each column, biased; 0 of a column without entries."""
        return self.scatter / self.feature_weight.clamp_min(torch.finfo(torch.float64).tiny)

    def merge(self, other: Summary) -> Summary:
        """Chan, Golub & LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample variances"."""
        weight = self.feature_weight + other.feature_weight
        share = other.feature_weight / weight.clamp_min(torch.finfo(torch.float64).tiny)
        delta = other.mean - self.mean
        return Summary(
            num_rows=self.num_rows + other.num_rows,
            num_weighted_rows=self.num_weighted_rows + other.num_weighted_rows,
            total_weight=self.total_weight + other.total_weight,
            feature_weight=weight,
            mean=self.mean + delta * share,
            scatter=self.scatter + other.scatter + delta.square() * self.feature_weight * share,
            num_missing=self.num_missing + other.num_missing,
            minimum=torch.minimum(self.minimum, other.minimum),
            maximum=torch.maximum(self.maximum, other.maximum),
            all_integers=self.all_integers & other.all_integers,
            fingerprint=hashlib.sha256(self.fingerprint + other.fingerprint).digest(),
            num_sequences=self.num_sequences + other.num_sequences,
        )


def survey(blocks: Blocks[Block]) -> Summary:
    """One pass over the blocks."""
    return reduce(summarize, blocks, None)


def summarize(_: None, block: Block) -> Summary:
    """Of one block."""
    if block.is_sparse:
        return _summarize_sparse(block)
    weights_N = block.weights_or_ones()
    present_ND = torch.ones_like(block.x) if block.missing is None else (~block.missing).to(block.x.dtype)
    weights_ND = weights_N[:, None] * present_ND
    feature_weight = weights_ND.sum(0)
    reference = first_that_counts(block.x, weights_ND)  # keeps the digits of data far from 0
    centred_ND = (block.x - reference).masked_fill_(weights_ND == 0, 0.0)
    shift = (weights_ND * centred_ND).sum(0) / feature_weight.clamp_min(torch.finfo(torch.float64).tiny)
    minimum, maximum = torch.full_like(reference, torch.inf), torch.full_like(reference, -torch.inf)
    is_whole_ND = block.x == block.x.round()
    if block.num_rows and (block.missing is not None or block.weights is not None):
        left_out_ND = weights_ND == 0
        minimum = block.x.masked_fill(left_out_ND, torch.inf).amin(0)
        maximum = block.x.masked_fill(left_out_ND, -torch.inf).amax(0)
        is_whole_ND |= left_out_ND
    elif block.num_rows:
        minimum, maximum = block.x.amin(0), block.x.amax(0)
    return Summary(
        num_rows=block.num_rows,
        num_weighted_rows=int((weights_N > 0).sum()),
        total_weight=float(weights_N.sum()),
        feature_weight=feature_weight,
        mean=reference + shift,
        scatter=(weights_ND * (centred_ND - shift).square()).sum(0),
        num_missing=(present_ND == 0).sum(0),
        minimum=minimum,
        maximum=maximum,
        all_integers=is_whole_ND.all(0),
        fingerprint=_fingerprint(block, block.x, block.missing),
        num_sequences=0 if block.sequence_bounds is None else len(block.sequence_bounds) - 1 - bool(block.open_ends[0]),
    )


def _summarize_sparse(block: Block) -> Summary:
    """Of rows whose other entries are 0, about which the moments are taken: they need no other reference."""
    weights_N, num_features = block.weights_or_ones(), block.num_features
    crow, columns_n, values_n = block.x.crow_indices(), block.x.col_indices(), block.x.values()
    weights_n = weights_N.repeat_interleave(crow.diff())

    def summed(entries_n: Tensor) -> Tensor:
        return torch.zeros(num_features, dtype=torch.float64).index_add_(0, columns_n, entries_n)

    total_weight = weights_N.sum()
    mean = summed(weights_n * values_n) / total_weight.clamp_min(torch.finfo(torch.float64).tiny)
    weight_of_zeros = (total_weight - summed(weights_n)).clamp_min(0.0)
    scatter = summed(weights_n * (values_n - mean[columns_n]).square()) + weight_of_zeros * mean.square()
    num_counted = int((weights_N > 0).sum())
    columns_n, values_n = columns_n[weights_n > 0], values_n[weights_n > 0]
    # A column with an entry in every row has no 0.
    has_zero = torch.bincount(columns_n, minlength=num_features) < num_counted
    minimum = torch.where(has_zero, 0.0, torch.inf).to(torch.float64).scatter_reduce_(0, columns_n, values_n, "amin")
    maximum = torch.where(has_zero, 0.0, -torch.inf).to(torch.float64).scatter_reduce_(0, columns_n, values_n, "amax")
    num_fractions = torch.bincount(columns_n[values_n != values_n.round()], minlength=num_features)
    return Summary(
        num_rows=block.num_rows,
        num_weighted_rows=num_counted,
        total_weight=float(total_weight),
        feature_weight=total_weight.expand(num_features).clone(),
        mean=mean,
        scatter=scatter,
        num_missing=torch.zeros(num_features, dtype=torch.int64),
        minimum=minimum,
        maximum=maximum,
        all_integers=num_fractions == 0,
        fingerprint=_fingerprint(block, crow, block.x.col_indices(), block.x.values()),
    )


def _fingerprint(block: Block, *of_x: Tensor | None) -> bytes:
    """Of the shape and bytes of one block."""
    digest = hashlib.sha256(repr(tuple(block.x.shape)).encode())
    for values in (of_x[0], block.weights, block.evidence, *of_x[1:]):
        digest.update(b"-" if values is None else values.numpy().data)
    if block.sequence_bounds is not None:
        digest.update(repr(block.open_ends).encode())
        digest.update(block.sequence_bounds.numpy().data)
    return digest.digest()
