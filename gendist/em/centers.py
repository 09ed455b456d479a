"""Centers in the data for the latents to begin at: rows drawn at random, or k-means. Found from the seed alone.

Random choices are races: every row draws an exponential time at its own address, divided by the weight it should be drawn
with, and the earliest wins (Efraimidis & Spirakis 2006). The earliest of two groups of rows is the earlier of their
earliest, so a draw from a whole data set is a reduction like any other.

A row that lacks entries is as far from a center as the entries that it has, and counts for the mean of their columns alone.
Where it becomes a center itself, it has the means of the data for the others.

Legend: N rows, D features, L latents, K centers, C candidates.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from gendist.blocks import Blocks, Each, Leaves, LocalBlocks, reduce
from gendist.noise import Noise, derived_seed
from gendist.protocols import Block, DataSummary

MAX_LLOYD_STEPS = 50
LLOYD_TOLERANCE = 1e-4  # of the mean variance, on the squared shift of the centers; as scikit-learn's KMeans
NUM_ROUNDS = 5  # of k-means||, and
OVERSAMPLING = 2  # candidates a round for each center: both as Bahmani et al. 2012 found to be enough
NUM_RECLUSTERINGS = 4  # of its candidates, the best of which counts; they are few, and one is often a bad one
BLUR = 1e-8  # the part of a squared length below which a difference taken through a matrix product has too few digits

logger = logging.getLogger("gendist")


def find_centers(
    blocks: Blocks[Block], summary: DataSummary, num_latents: int, method: str, seed: int, has_labels: bool
) -> Tensor:
    """(L, D): latents that rows are known to belong to start at the mean of these rows, the others at chosen rows.

    method   "random", or the seeding of k-means, whose steps then move all centers: "kmeans++" or "kmeans||"
    """
    centers_LD = summary.mean.repeat(num_latents, 1)
    known = torch.zeros(num_latents, dtype=torch.bool)
    if has_labels:
        cells = reduce(_known_cells, blocks, centers_LD)
        known = cells.counts > 0
        centers_LD = cells.means()
    free = torch.nonzero(~known)[:, 0]
    if method == "random":
        if len(free):
            winners = reduce(partial(_random_rows, seed, len(free)), blocks, summary.mean)
            centers_LD[free[: len(winners.rows)]] = winners.x
        return centers_LD
    if len(free):
        centers_LD[free] = _SEEDINGS[method](blocks, centers_LD[known], len(free), seed, summary.mean)
    return _lloyd(blocks, centers_LD, float(summary.variance.mean()))


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


def _race(block: Block, rates_N: Tensor, exponentials_N: Tensor, size: int, mean_D: Tensor) -> _Race:
    """Draw `size` rows without replacement, each in proportion to its rate; rows of rate 0 never win."""
    times, first = torch.topk(exponentials_N / rates_N, min(size, block.num_rows), largest=False)
    finite = times.isfinite()
    times, first = times[finite], first[finite]
    x_nD = block.x[first]
    if block.missing is not None:
        x_nD = torch.where(block.missing[first], mean_D, x_nD)
    return _Race(size, times, block.rows[first], x_nD)


def _exponentials(block: Block, noise: Noise) -> Tensor:
    return -noise.uniform_of_rows(block.rows).log()


def _random_rows(seed: int, size: int, mean_D: Tensor, block: Block) -> _Race:
    return _race(block, _unlabelled_weights(block), _exponentials(block, Noise(seed, "start.random")), size, mean_D)


# Seeding


def _kmeans_plus_plus(blocks: Blocks[Block], known_KD: Tensor, num_centers: int, seed: int, mean_D: Tensor) -> Tensor:
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
        race = partial(_race_for_each, seed, step, num_candidates)
        races = reduce(race, blocks, (taken_KD, candidates_CD, mean_D)).values
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


def _race_for_each(seed: int, step: int, size: int, broadcast: tuple[Tensor, Tensor, Tensor], block: Block) -> Each[_Race]:
    """One race for each candidate center: what would be drawn next if this candidate were taken."""
    taken_KD, candidates_CD, mean_D = broadcast
    exponentials_N = _exponentials(block, Noise(seed, f"start.kmeans++.{step}"))
    weights_N = _unlabelled_weights(block)
    if len(taken_KD) + len(candidates_CD) == 0:
        return Each((_race(block, weights_N, exponentials_N, size, mean_D),))
    distances = [_squared_to_nearest(block, taken_KD)]
    if len(candidates_CD):
        distances = list(torch.minimum(distances[0], _squared(block.x, candidates_CD, _present(block)).T))
    races = []
    for distance_N in distances:
        rates_N = weights_N * distance_N
        race = _race(block, rates_N, exponentials_N, size, mean_D)
        races.append(replace(race, potential=float(rates_N.sum())))
    return Each(tuple(races))


def _kmeans_parallel(blocks: Blocks[Block], known_KD: Tensor, num_centers: int, seed: int, mean_D: Tensor) -> Tensor:
    """(num_centers, D), by k-means||: some passes over the rows, however many centers there are.

    Bahmani et al. 2012, "Scalable k-means++", algorithm 2: in each round many candidates at once are drawn in proportion
    to their squared distance from all before; then as many as are needed are found among them, each weighed by the rows
    that are nearest to it. A round draws a fixed number of rows without replacement, where the paper tosses a coin for each.
    """
    candidates_CD = known_KD
    for step in range(NUM_ROUNDS + 1):
        size = OVERSAMPLING * num_centers if step > 0 or len(known_KD) else 1
        race = reduce(partial(_race_far_off, seed, step, size), blocks, (candidates_CD, mean_D))
        candidates_CD = torch.cat([candidates_CD, race.x])
    counts_C = reduce(_unlabelled_cells, blocks, candidates_CD).counts
    num_known = len(known_KD)
    few = Block(candidates_CD[num_known:], torch.arange(len(candidates_CD) - num_known), counts_C[num_known:])
    few_blocks = LocalBlocks(partial(_whole, few), Leaves((0, few.num_rows)))
    clusterings = []
    for index in range(NUM_RECLUSTERINGS):
        attempt = derived_seed(seed, f"start.kmeans||.{index}")
        chosen_KD = _kmeans_plus_plus(few_blocks, known_KD, num_centers, attempt, mean_D)
        centers_KD = _lloyd(few_blocks, torch.cat([known_KD, chosen_KD]), mean_variance=0.0)
        clusterings.append(reduce(_nearest_cells, few_blocks, centers_KD))
    return min(clusterings, key=lambda cells: cells.inertia).centers[num_known:]


def _race_far_off(seed: int, step: int, size: int, broadcast: tuple[Tensor, Tensor], block: Block) -> _Race:
    candidates_CD, mean_D = broadcast
    rates_N = _unlabelled_weights(block)
    if len(candidates_CD):
        rates_N = rates_N * _squared_to_nearest(block, candidates_CD)
    return _race(block, rates_N, _exponentials(block, Noise(seed, f"start.kmeans||.{step}")), size, mean_D)


def _whole(block: Block, _: Sequence[int]) -> list[Block]:
    return [block]


_SEEDINGS: dict[str, Callable[[Blocks[Block], Tensor, int, int, Tensor], Tensor]] = {
    "kmeans++": _kmeans_plus_plus,
    "kmeans||": _kmeans_parallel,
}


# Lloyd's algorithm


@dataclass(frozen=True, eq=False)
class _Cells:
    """Weight and sum, about the center, of the rows nearest to each center, and the squared distance of all."""

    centers: Tensor  # (L, D)
    counts: Tensor  # (L,)
    present: Tensor  # (L, D) the weight of the rows that have the entry; (L, 1) where none is missing
    sums: Tensor  # (L, D)
    inertia: float

    def merge(self, other: _Cells) -> _Cells:
        counts, present = self.counts + other.counts, self.present + other.present
        return _Cells(self.centers, counts, present, self.sums + other.sums, self.inertia + other.inertia)

    def means(self) -> Tensor:
        """(L, D); the center of an empty cell stays."""
        return self.centers + self.sums / torch.where(self.present > 0, self.present, 1.0)


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
    return _cells(centers_LD, block, block.weights_or_ones(), nearest_allowed(block, centers_LD))


def _known_cells(centers_LD: Tensor, block: Block) -> _Cells:
    return _cells(centers_LD, block, block.weights_or_ones() * block.has_one_latent, nearest_allowed(block, centers_LD))


def _unlabelled_cells(centers_CD: Tensor, block: Block) -> _Cells:
    return _cells(centers_CD, block, _unlabelled_weights(block), _nearest(block, centers_CD))


def _cells(centers_LD: Tensor, block: Block, weights_N: Tensor, nearest_N: Tensor) -> _Cells:
    # About the center: the rows of a cell lie close to it, wherever the data lie.
    difference_ND, present_ND = block.x - centers_LD[nearest_N], _present(block)
    counts_L = torch.zeros(len(centers_LD), dtype=torch.float64).index_add_(0, nearest_N, weights_N)
    present_L = counts_L[:, None]
    if present_ND is not None:
        difference_ND *= present_ND
        present_L = torch.zeros_like(centers_LD).index_add_(0, nearest_N, weights_N[:, None] * present_ND)
    sums_LD = torch.zeros_like(centers_LD).index_add_(0, nearest_N, weights_N[:, None] * difference_ND)
    return _Cells(centers_LD, counts_L, present_L, sums_LD, float((weights_N * difference_ND.square().sum(1)).sum()))


# Distances and evidence


def nearest_allowed(block: Block, centers_LD: Tensor) -> Tensor:
    """(N,) the nearest center of each row, among the latents that its evidence leaves it."""
    return _nearest(block, centers_LD, None if block.evidence is None else block.evidence == -torch.inf)


def _nearest(block: Block, centers_LD: Tensor, excluded_NL: Tensor | None = None) -> Tensor:
    """(N,) the nearest center of each row.

    By a matrix product about the middle of the centers, |x - c|^2 = |x|^2 - 2 x c + |c|^2, which is many times as fast as
    differences. It loses the digits of rows that are much nearer to a center than to that middle: these are done again.
    """
    present_ND = _present(block)
    middle_D = centers_LD.median(0).values  # of which a few centers far away take no hold
    about_ND, about_LD = block.x - middle_D, centers_LD - middle_D
    if present_ND is None:
        score_NL = torch.addmm(0.5 * about_LD.square().sum(1), about_ND, about_LD.T, alpha=-1.0)
    else:
        about_ND *= present_ND
        score_NL = torch.addmm(0.5 * present_ND @ about_LD.square().T, about_ND, about_LD.T, alpha=-1.0)
    if excluded_NL is not None:
        score_NL = score_NL.masked_fill(excluded_NL, torch.inf)
    nearest_N = score_NL.min(1).indices
    squared_N = _squared_norms(block.x - centers_LD[nearest_N], present_ND)
    blurred = torch.nonzero((squared_N > 0) & (squared_N < BLUR * about_ND.square().sum(1)))[:, 0]
    if len(blurred):
        squared_nL = _squared(block.x[blurred], centers_LD, None if present_ND is None else present_ND[blurred])
        if excluded_NL is not None:
            squared_nL = squared_nL.masked_fill(excluded_NL[blurred], torch.inf)
        nearest_N[blurred] = squared_nL.min(1).indices
    return nearest_N


def _squared_to_nearest(block: Block, centers_KD: Tensor) -> Tensor:
    """(N,) squared distance from the nearest center; infinite where there is none."""
    if len(centers_KD) == 0:
        return torch.full((block.num_rows,), torch.inf, dtype=torch.float64)
    return _squared_norms(block.x - centers_KD[_nearest(block, centers_KD)], _present(block))


def _squared(x_ND: Tensor, centers_LD: Tensor, present_ND: Tensor | None) -> Tensor:
    """(N, L), from differences: the expanded product loses the digits of data far from 0."""
    if present_ND is None:
        return torch.cdist(x_ND, centers_LD, compute_mode="donot_use_mm_for_euclid_dist").square()
    return torch.stack([_squared_norms(x_ND - center_D, present_ND) for center_D in centers_LD], 1)


def _squared_norms(difference_ND: Tensor, present_ND: Tensor | None) -> Tensor:
    """(N,) of the entries that are there."""
    if present_ND is not None:
        difference_ND = difference_ND * present_ND
    return difference_ND.square().sum(1)


def _present(block: Block) -> Tensor | None:
    """(N, D) 1.0 where an entry is there; None: everywhere."""
    return None if block.missing is None else (~block.missing).to(block.x.dtype)


def _unlabelled_weights(block: Block) -> Tensor:
    """(N,) the weights of the rows that may become centers; those without any entry may not."""
    weights_N = block.weights_or_ones() * ~block.has_one_latent
    return weights_N if block.missing is None else weights_N * ~block.missing.all(1)
