"""Where EM begins: centers found from the seed alone, whatever the number of workers, and one M-step about them.

Random choices are races: every row draws an exponential time at its own address, divided by the weight it should be drawn
with, and the earliest wins (Efraimidis & Spirakis 2006). The earliest of two groups of rows is the earlier of their
earliest, so a draw from a whole data set is a reduction like any other.

Legend: N rows, D features, L latents, C candidates.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from gendist.blocks import Blocks, reduce
from gendist.em.engine import em_step
from gendist.noise import Noise
from gendist.protocols import Block, DataSummary, StatisticsModel, Update

MAX_LLOYD_STEPS = 50
LLOYD_TOLERANCE = 1e-4  # of the mean variance, on the squared shift of the centers; as scikit-learn's KMeans

logger = logging.getLogger("gendist")
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
    """The first parameters: each row is counted for its nearest center, or for the latent that its evidence leaves it.

    method   "kmeans++" or "random"
    """
    num_latents = family.count_latents(config, labels)
    centers_LD = _centers(blocks, summary, num_latents, method, seed, has_labels=bool(labels))
    blank = family.start(config, summary, centers_LD, labels)
    return em_step(partial(_count_nearest, centers_LD), blocks, blank)[1]


def _count_nearest(centers_LD: Tensor, model: StatisticsModel, block: Block) -> Any:
    nearest_N = _squared_distances(block, centers_LD).argmin(1)
    evidence_NL = torch.full((block.num_rows, len(centers_LD)), -torch.inf, dtype=torch.float64)
    evidence_NL[torch.arange(block.num_rows), nearest_N] = 0.0
    return model.e_step(replace(block, evidence=evidence_NL))


def _centers(blocks: Blocks[Block], summary: DataSummary, num_latents: int, method: str, seed: int, has_labels: bool) -> Tensor:
    """(L, D): latents that rows are known to belong to start at the mean of these rows, the others at chosen rows."""
    middle_LD = summary.mean.expand(num_latents, -1)
    known = torch.zeros(num_latents, dtype=torch.bool)
    centers_LD = middle_LD.clone()
    if has_labels:
        cells = reduce(_known_cells, blocks, centers_LD)
        known = cells.counts > 0
        centers_LD = cells.means()
    free = torch.nonzero(~known)[:, 0]
    if len(free):
        if method == "random":
            winners = reduce(partial(_random_rows, seed, len(free)), blocks, None)
            centers_LD[free[: len(winners.rows)]] = winners.x
        else:
            centers_LD[free] = _kmeans_plus_plus(blocks, centers_LD[known], len(free), seed)
    if method == "kmeans++":
        centers_LD = _lloyd(blocks, centers_LD, float(summary.variance.mean()))
    return centers_LD


# Drawing rows


@dataclass(frozen=True, eq=False)
class _Race:
    """The `size` earliest rows, the earliest first, and how much squared distance all rows are away from their centers."""

    size: int
    times: Tensor  # (n,) n <= size
    rows: Tensor  # (n,)
    x: Tensor  # (n, D)
    potential: float = 0.0

    def merge(self, other: _Race) -> _Race:
        times = torch.cat([self.times, other.times])
        first = torch.argsort(times, stable=True)[: self.size]
        rows, x = torch.cat([self.rows, other.rows])[first], torch.cat([self.x, other.x])[first]
        return _Race(self.size, times[first], rows, x, self.potential + other.potential)


def _race(block: Block, rates_N: Tensor, noise: Noise, size: int) -> _Race:
    """Draw `size` rows without replacement, each in proportion to its rate; rows of rate 0 never win."""
    times_N = -noise.uniform_of_rows(block.rows).log() / rates_N
    first = torch.argsort(times_N, stable=True)[:size]
    first = first[times_N[first].isfinite()]
    return _Race(size, times_N[first], block.rows[first], block.x[first])


def _random_rows(seed: int, size: int, _: None, block: Block) -> _Race:
    return _race(block, _unlabelled_weights(block), Noise(seed, "start.random"), size)


@dataclass(frozen=True)
class _Races:
    """One race for each candidate center: what would be drawn next if this candidate were taken."""

    races: tuple[_Race, ...]

    def merge(self, other: _Races) -> _Races:
        return _Races(tuple(a.merge(b) for a, b in zip(self.races, other.races, strict=True)))


def _kmeans_plus_plus(blocks: Blocks[Block], known_KD: Tensor, num_centers: int, seed: int) -> Tensor:
    """(num_centers, D) rows, each drawn in proportion to its squared distance from the centers before it.

    Arthur & Vassilvitskii 2007, with the greedy choice of the best among C candidates that scikit-learn makes too. One
    pass a center: the pass that judges the candidates also draws their successors.
    """
    num_candidates = 2 + int(math.log(num_centers))
    centers = list(known_KD)
    # No candidate is known before the first draw: the race at index 0 is the one without a new center.
    candidates_CD = torch.empty(0, known_KD.shape[1], dtype=torch.float64)
    chosen: list[Tensor] = []
    for step in range(num_centers + 1):
        taken_KD = torch.stack(centers) if centers else candidates_CD[:0]
        races = reduce(partial(_race_for_each, seed, step, num_candidates), blocks, (taken_KD, candidates_CD)).races
        best = min(range(len(races)), key=lambda i: races[i].potential)
        if step > 0:
            centers.append(candidates_CD[best])
            chosen.append(candidates_CD[best])
        candidates_CD = races[best].x
        if len(candidates_CD) == 0 and step < num_centers:
            # Every row lies on a center already: the latents left over share the last one.
            chosen += [centers[-1]] * (num_centers - len(chosen))
            break
    return torch.stack(chosen)


def _race_for_each(seed: int, step: int, size: int, broadcast: tuple[Tensor, Tensor], block: Block) -> _Races:
    taken_KD, candidates_CD = broadcast
    noise = Noise(seed, f"start.kmeans++.{step}")
    weights_N = _unlabelled_weights(block)
    if len(taken_KD) + len(candidates_CD) == 0:
        return _Races((_race(block, weights_N, noise, size),))
    nearest_N = torch.full((block.num_rows,), torch.inf, dtype=torch.float64)
    if len(taken_KD):
        nearest_N = _squared(block.x, taken_KD).amin(1)
    rates = [nearest_N] if len(candidates_CD) == 0 else torch.minimum(nearest_N, _squared(block.x, candidates_CD).T)
    races = []
    for distance_N in rates:
        rate_N = weights_N * distance_N
        races.append(replace(_race(block, rate_N, noise, size), potential=float(rate_N.sum())))
    return _Races(tuple(races))


# Lloyd's algorithm


@dataclass(frozen=True, eq=False)
class _Cells:
    """Weight and sum, about the center, of the rows nearest to each center, and the squared distance of all."""

    centers: Tensor  # (L, D)
    counts: Tensor  # (L,)
    sums: Tensor  # (L, D)
    inertia: float

    def merge(self, other: _Cells) -> _Cells:
        return _Cells(self.centers, self.counts + other.counts, self.sums + other.sums, self.inertia + other.inertia)

    def means(self) -> Tensor:
        """(L, D); the center of an empty cell stays."""
        return self.centers + self.sums / torch.where(self.counts > 0, self.counts, 1.0)[:, None]


def _lloyd(blocks: Blocks[Block], centers_LD: Tensor, mean_variance: float) -> Tensor:
    """Move each center to the mean of its rows until they rest (Lloyd 1982)."""
    for step in range(1, MAX_LLOYD_STEPS + 1):
        cells = reduce(_nearest_cells, blocks, centers_LD)
        moved_LD = cells.means()
        shift = float((moved_LD - centers_LD).square().sum())
        centers_LD = moved_LD
        logger.debug("k-means step %d: inertia %.6g", step, cells.inertia)
        if shift <= LLOYD_TOLERANCE * mean_variance:
            break
    return centers_LD


def _nearest_cells(centers_LD: Tensor, block: Block) -> _Cells:
    return _cells(centers_LD, block, block.weights_or_ones())


def _known_cells(centers_LD: Tensor, block: Block) -> _Cells:
    return _cells(centers_LD, block, block.weights_or_ones() * _is_known(block))


def _cells(centers_LD: Tensor, block: Block, weights_N: Tensor) -> _Cells:
    distance_N, nearest_N = _squared_distances(block, centers_LD).min(1)
    member_LN = torch.zeros(len(centers_LD), block.num_rows, dtype=torch.float64)
    member_LN[nearest_N, torch.arange(block.num_rows)] = weights_N
    # About the center: the rows of a cell lie close to it, wherever the data lie.
    sums_LD = torch.stack([member_LN[i] @ (block.x - center_D) for i, center_D in enumerate(centers_LD)])
    return _Cells(centers_LD, member_LN.sum(1), sums_LD, float((weights_N * distance_N).sum()))


# Distances and evidence


def _squared(x_ND: Tensor, centers_LD: Tensor) -> Tensor:
    """(N, L), from differences: the expanded product loses the digits of data far from 0."""
    return torch.cdist(x_ND, centers_LD, compute_mode="donot_use_mm_for_euclid_dist").square()


def _squared_distances(block: Block, centers_LD: Tensor) -> Tensor:
    """(N, L), infinite where the evidence excludes the latent."""
    assert block.missing is None, "a distance needs every entry of a row"
    squared_NL = _squared(block.x, centers_LD)
    return squared_NL if block.evidence is None else squared_NL.masked_fill(block.evidence == -torch.inf, torch.inf)


def _is_known(block: Block) -> Tensor:
    """(N,) 1.0 where the evidence leaves a single latent."""
    if block.evidence is None:
        return torch.zeros(block.num_rows, dtype=torch.float64)
    return ((block.evidence > -torch.inf).sum(1) == 1).to(torch.float64)


def _unlabelled_weights(block: Block) -> Tensor:
    return block.weights_or_ones() * (1.0 - _is_known(block))
