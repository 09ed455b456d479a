"""Where EM begins: what the rows are first taken to belong to, from the seed alone, and one M-step from that."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from gendist.blocks import Blocks
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
             "labels": rows whose evidence says nothing do not count, the others do as their evidence says
    """
    num_latents = family.count_latents(config, labels)
    evidence: Callable[[Block], Tensor]
    if method == "labels":
        if not labels:
            raise UserError("fit.init: labels: there are none; name their column with data.label, or start otherwise")
        blank = family.start(config, summary, summary.mean.repeat(num_latents, 1), labels)
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
    if block.evidence is None or bool((is_labelled := (block.evidence != 0).any(1)).all()):
        return model.e_step(block)
    return model.e_step(replace(block, weights=block.weights_or_ones() * is_labelled))


def _all_for_the_nearest(centers_LD: Tensor, block: Block) -> Tensor:
    evidence_NL = torch.full((block.num_rows, len(centers_LD)), -torch.inf, dtype=torch.float64)
    evidence_NL[torch.arange(block.num_rows), nearest_allowed(block, centers_LD)] = 0.0
    return evidence_NL


def _random_shares(num_latents: int, seed: int, block: Block) -> Tensor:
    """Shares that are exponentials divided by their sum are drawn uniformly from all there can be (Devroye 1986, XI.4)."""
    exponentials_NL = -Noise(seed, "start.responsibilities").uniforms_of_rows(block.rows, num_latents).log()
    shares_NL = exponentials_NL.log() if block.evidence is None else exponentials_NL.log() + block.evidence
    return shares_NL.log_softmax(1)
