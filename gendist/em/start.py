"""Where EM begins: what the rows are first taken to belong to, from the seed alone, and one M-step from that."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from gendist.blocks import Blocks, reduce
from gendist.em.centers import find_centers, nearest_allowed
from gendist.em.engine import em_steps, not_finite
from gendist.noise import Noise
from gendist.protocols import Block, DataSummary, StatisticsModel, Update, UserError

M = TypeVar("M", bound=StatisticsModel)


def start_from_data(
    family: type[M],
    config: Any,
    blocks: Blocks[Block],
    summary: DataSummary,
    labels: tuple[Any, ...],
    method: str,
    seed: int,
) -> Update[M]:
    """The first parameters.

    method   "random_responsibilities": each row is shared out among the latents at random, as its evidence allows.
             Otherwise each row is counted for its nearest center, or for the latent that its evidence leaves it, and the
             centers are found by `find_centers`.
             "labels": rows whose evidence says nothing do not count, the others do as their evidence says. Where no row
             speaks for some latents, the rows whose evidence says nothing are shared out among these at random
    """
    num_latents = family.count_latents(config, labels)
    evidence: Callable[[Block], Tensor]
    if method == "labels":
        if not labels:
            raise UserError("fit.init: labels: there are none; name their column with data.label, or start otherwise")
        found = reduce(_find_labels, blocks, num_latents)
        if not bool(found.have_rows.any()):
            raise UserError(
                "no row to fit has a label; give labels to rows that are not held out and of positive weight, or start without "
                "them, such as with fit.init: random_responsibilities"
            )
        blank = family.start(config, summary, summary.mean.repeat(num_latents, 1), labels)
        if found.are_others and not bool(found.have_rows.all()):
            return _first_step(partial(_e_step_given, partial(_labels_and_shares, found.have_rows, seed)), blocks, blank)
        return _first_step(_e_step_of_labelled, blocks, blank)
    if method == "random_responsibilities":
        # About one center all latents are alike, so that the responsibilities are what the evidence says.
        centers_LD = summary.mean.repeat(num_latents, 1)
        evidence = partial(_random_shares, num_latents, seed)
    else:
        centers_LD = find_centers(blocks, summary, num_latents, method, seed, has_labels=bool(labels))
        evidence = partial(_all_for_the_nearest, centers_LD)
    blank = family.start(config, summary, centers_LD, labels)
    return _first_step(partial(_e_step_given, evidence), blocks, blank)


def _first_step(function: Callable[[M, Block], Any], blocks: Blocks[Block], blank: M) -> Update[M]:
    ((total, update),) = em_steps(function, blocks, [blank])
    if update is None:
        raise not_finite(total)
    return update


def _e_step_given(evidence: Callable[[Block], Tensor], model: StatisticsModel, block: Block) -> Any:
    return model.e_step(replace(block, evidence=evidence(block)))


def _e_step_of_labelled(model: StatisticsModel, block: Block) -> Any:
    is_labelled_N = block.is_labelled
    if bool(is_labelled_N.all()):
        return model.e_step(block)
    return model.e_step(replace(block, weights=block.weights_or_ones() * is_labelled_N))


@dataclass(frozen=True, eq=False)
class _Labels:
    """Of rows of positive weight: have_rows (L,) bool, whether a labelled one may be of the latent; are_others: whether some
    have no label."""

    have_rows: Tensor
    are_others: bool

    def merge(self, other: _Labels) -> _Labels:
        return _Labels(self.have_rows | other.have_rows, self.are_others or other.are_others)


def _find_labels(num_latents: int, block: Block) -> _Labels:
    is_labelled_N, counts_N = block.is_labelled, block.weights_or_ones() > 0
    have_rows_L = torch.zeros(num_latents, dtype=torch.bool)
    if block.evidence is not None:
        have_rows_L = ((block.evidence > -torch.inf) & (is_labelled_N & counts_N)[:, None]).any(0)
    return _Labels(have_rows_L, bool((~is_labelled_N & counts_N).any()))


def _labels_and_shares(have_rows_L: Tensor, seed: int, block: Block) -> Tensor:
    """The evidence of labelled rows, and for the others random shares of the latents that no labelled row may be of.

    A latent that begins without any row has weight 0, and would never have one.
    """
    assert block.evidence is not None  # some block has labels, so that all have evidence
    free_NL = torch.where(have_rows_L, -torch.inf, torch.zeros_like(block.evidence))
    shares_NL = _random_shares(len(have_rows_L), seed, replace(block, evidence=free_NL))
    return torch.where(block.is_labelled[:, None], block.evidence, shares_NL)


def _all_for_the_nearest(centers_LD: Tensor, block: Block) -> Tensor:
    evidence_NL = torch.full((block.num_rows, len(centers_LD)), -torch.inf, dtype=torch.float64)
    evidence_NL[torch.arange(block.num_rows), nearest_allowed(block, centers_LD)] = 0.0
    return evidence_NL


def _random_shares(num_latents: int, seed: int, block: Block) -> Tensor:
    """Shares that are exponentials divided by their sum are drawn uniformly from all there can be (Devroye 1986, XI.4)."""
    exponentials_NL = -Noise(seed, "start.responsibilities").uniforms_of_rows(block.rows, num_latents).log()
    shares_NL = exponentials_NL.log() if block.evidence is None else exponentials_NL.log() + block.evidence
    return shares_NL.log_softmax(1)
