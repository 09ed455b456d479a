"""Sequences as the blocks that a fit is given, and expectation-maximization over them in this process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch

from gendist.blocks import LocalBlocks
from gendist.blocks.leaves import Leaves
from gendist.em.config import EMConfig
from gendist.em.engine import expectation_maximization
from gendist.em.restarts import Candidate
from gendist.protocols import Block

Array = np.ndarray[Any, np.dtype[Any]]


def block_of(sequences: Sequence[Array], weights_S: Any = None, evidence: Sequence[Array] | None = None) -> Block:
    """Of whole sequences (T, D); NaN is a missing entry. evidence: (T, K) of each."""
    lengths = [len(x) for x in sequences]
    x = np.concatenate(sequences).astype(np.float64)
    missing = np.isnan(x)
    return Block(
        torch.tensor(np.nan_to_num(x)),
        torch.arange(len(x)),
        None if weights_S is None else torch.tensor(np.repeat(np.asarray(weights_S, dtype=np.float64), lengths)),
        None if evidence is None else torch.tensor(np.concatenate(evidence)),
        torch.tensor(missing) if missing.any() else None,
        torch.tensor(np.concatenate([[0], np.cumsum(lengths)])),
    )


def pieces_of(block: Block, cuts: Sequence[int]) -> list[Block]:
    """Of a block of one sequence, cut at these rows."""
    bounds = [0, *cuts, block.num_rows]
    pieces = []
    for start, stop in pairwise(bounds):
        rows = slice(start, stop)
        weights, evidence, missing = (v if v is None else v[rows] for v in (block.weights, block.evidence, block.missing))
        pieces.append(
            Block(
                block.x[rows],
                block.rows[rows],
                weights,
                evidence,
                missing,
                torch.tensor([0, stop - start]),
                (start > 0, stop < block.num_rows),
            )
        )
    return pieces


def as_data_set(blocks: Sequence[Block]) -> LocalBlocks:
    """The blocks as the leaves of one data set, one after the other."""
    starts = list(accumulate((block.num_rows for block in blocks), initial=0))
    leaves = {
        start: replace(block, rows=torch.arange(start, start + block.num_rows))
        for start, block in zip(starts[:-1], blocks, strict=True)
    }
    return LocalBlocks(lambda bounds: [leaves[start] for start in bounds[:-1]], Leaves(starts))


def fitted(model: Any, blocks: Sequence[Block], num_iterations: int) -> tuple[Any, tuple[dict[str, Any], ...]]:
    """The model after so many iterations, and their records."""
    total_weight = sum(float(block.weights_or_ones().sum()) for block in blocks)
    config = EMConfig(max_iterations=num_iterations, tolerance=0.0)
    for (candidate,) in expectation_maximization([Candidate(model)], as_data_set(blocks), total_weight, config):
        model, history = candidate.model, candidate.history
    return model, history
