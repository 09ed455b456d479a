"""Centers come from the seed alone, and are good ones."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits

from gendist.blocks import Leaves, LocalBlocks
from gendist.data.survey import survey
from gendist.em import centers
from gendist.protocols import Block

METHODS = ("kmeans++", "kmeans||", "random")
KMEANS = METHODS[:2]


def blocks_of(x, most: int = 1, weights=None, evidence=None, rows_a_leaf: int = 64) -> LocalBlocks:
    """NaN is a missing entry."""
    columns = [None if values is None else torch.as_tensor(values) for values in (x, weights, evidence)]

    def load(bounds):
        return [leaf(a, b) for a, b in itertools.pairwise(bounds)]

    def leaf(a, b):
        x, weights, evidence = (None if values is None else values[a:b] for values in columns)
        missing = x.isnan() if bool(x.isnan().any()) else None
        return Block(x.nan_to_num(0.0), torch.arange(a, b), weights, evidence, missing)

    return LocalBlocks(load, Leaves((*range(0, len(x), rows_a_leaf), len(x))), most)


class CountingBlocks:
    def __init__(self, blocks: LocalBlocks):
        self.blocks, self.num_passes = blocks, 0

    def map_runs(self, function, broadcast):
        self.num_passes += 1
        return self.blocks.map_runs(function, broadcast)


def find(blocks, num_centers, method, seed=0, has_labels=False) -> torch.Tensor:
    return centers.find_centers(blocks, survey(blocks), num_centers, method, seed, has_labels)


def inertia(x: np.ndarray, centers_KD: torch.Tensor) -> float:
    return float(torch.cdist(torch.from_numpy(x), centers_KD).amin(1).square().sum())


@pytest.mark.parametrize("method", METHODS)
def test_they_are_the_same_for_every_run_of_leaves_and_others_for_every_seed(method, blobs):
    found = [find(blocks_of(blobs, most), 5, method) for most in (1, 2, 16)]
    assert all(torch.equal(found[0], other) for other in found[1:])
    assert len({tuple(find(blocks_of(blobs), 5, method, seed).flatten().tolist()) for seed in range(5)}) > 1


@pytest.mark.parametrize("method", KMEANS)
@pytest.mark.parametrize("num_centers", [1, 2, 5, 20])
def test_kmeans_is_about_as_good_as_scikit_learns(num_centers, method):
    x = np.random.default_rng(0).normal(size=(2000, 2)) @ np.diag([3.0, 1.0])
    blocks = blocks_of(x)
    ours = [inertia(x, find(blocks, num_centers, method, seed)) for seed in range(5)]
    theirs = [KMeans(num_centers, n_init=1, random_state=seed).fit(x).inertia_ for seed in range(5)]
    assert np.mean(ours) < 1.03 * np.mean(theirs)


@pytest.mark.parametrize("method", KMEANS)
def test_kmeans_of_the_digits_is_about_as_good_as_scikit_learns(method):
    x = load_digits().data / 16.0
    blocks = blocks_of(x)
    ours = [inertia(x, find(blocks, 20, method, seed)) for seed in range(5)]
    theirs = [KMeans(20, n_init=1, random_state=seed).fit(x).inertia_ for seed in range(5)]
    assert np.mean(ours) < 1.02 * np.mean(theirs)


def test_kmeans_parallel_makes_few_passes_however_many_centers(blobs):
    passes = {}
    for method, num_centers in itertools.product(KMEANS, (10, 40)):
        blocks = CountingBlocks(blocks_of(blobs))
        nothing_known, mean = torch.empty(0, 3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
        seeded = centers._SEEDINGS[method](blocks, nothing_known, num_centers, 0, mean)
        assert len(seeded.unique(dim=0)) == num_centers
        passes[method, num_centers] = blocks.num_passes
    assert passes["kmeans||", 10] == passes["kmeans||", 40] <= 8
    assert passes["kmeans++", 40] > 40


@pytest.mark.parametrize("method", METHODS)
def test_rows_of_weight_zero_are_never_chosen(method, blobs):
    far = np.concatenate([blobs, np.full((50, 3), 1e6)])
    weights = np.concatenate([np.ones(len(blobs)), np.zeros(50)])
    assert float(find(blocks_of(far, weights=weights), 10, method).abs().max()) < 100


@pytest.mark.parametrize("method", KMEANS)
def test_weight_two_is_the_row_twice(method, blobs):
    """k-means rests where each center is the weighted mean of its rows, whatever the seeding drew."""
    weights = np.random.default_rng(0).integers(0, 4, len(blobs)).astype(np.float64)
    found = find(blocks_of(blobs, weights=weights), 3, method)
    nearest = torch.cdist(torch.from_numpy(blobs), found).argmin(1).numpy()
    means = [np.average(blobs[nearest == k], axis=0, weights=weights[nearest == k]) for k in range(3)]
    np.testing.assert_allclose(found, means, atol=0.01)


def test_random_rows_are_drawn_in_proportion_to_their_weights():
    x = np.arange(6, dtype=np.float64)[:, None]
    weights = np.array([1.0, 2.0, 3.0, 0.0, 5.0, 9.0])
    blocks = blocks_of(x, weights=weights)
    counts = np.zeros(6)
    for seed in range(2000):
        counts[int(find(blocks, 1, "random", seed)[0, 0])] += 1
    expected = weights / weights.sum() * 2000
    assert counts[3] == 0
    assert (((counts - expected) ** 2)[weights > 0] / expected[weights > 0]).sum() < 20.5  # chi2, 4 degrees, p = 0.0004


@pytest.mark.parametrize("method", KMEANS)
@pytest.mark.parametrize("offset", [0.0, 1e7])
def test_more_centers_than_distinct_points(method, offset):
    x = np.repeat([[0.0, 0.0], [1.0, 1.0]], 40, axis=0) + offset
    assert {tuple(center) for center in find(blocks_of(x), 5, method).tolist()} == {(offset, offset), (offset + 1, offset + 1)}


@pytest.mark.parametrize("method", METHODS)
def test_labelled_rows_make_the_centers_of_their_latents(method, blobs):
    """Rows known to belong to latent 0 lie in one blob: the free centers find the other two."""
    of_blob_0 = (blobs[:, 0] < 3) & (blobs[:, 1] < 2.5)
    evidence = np.zeros((len(blobs), 3))
    evidence[of_blob_0] = [0.0, -np.inf, -np.inf]
    found = find(blocks_of(blobs, evidence=evidence), 3, method, has_labels=True)
    np.testing.assert_allclose(found[0], blobs[of_blob_0].mean(0), atol=1e-9 if method == "random" else 0.3)
    if method != "random":
        others = {bool(center[0] > 3) for center in found[1:]}
        assert others == {True, False}


@pytest.mark.parametrize("method", METHODS)
def test_all_rows_labelled_alike(method, blobs):
    """There is no row to start a free latent from: it shares a center that there is."""
    evidence = np.tile([0.0, -np.inf, -np.inf], (len(blobs), 1))
    found = find(blocks_of(blobs, evidence=evidence), 3, method, has_labels=True)
    np.testing.assert_allclose(found, np.tile(blobs.mean(0), (3, 1)), atol=1e-9)


@pytest.mark.parametrize("offset", [0.0, 1e8, 1e12])
@pytest.mark.parametrize("outlier", [None, 1e9, -1e15])
def test_the_nearest_center_is_that_of_the_differences_wherever_the_data_lie(offset, outlier):
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.normal(size=(500, 3)) + offset)
    centers_KD = x[::50].clone()
    if outlier is not None:
        centers_KD = torch.cat([centers_KD, torch.full((1, 3), outlier, dtype=torch.float64)])
    exact_NK = (x[:, None] - centers_KD).square().sum(2)
    nearest_N = centers.nearest_allowed(Block(x=x, rows=torch.arange(500)), centers_KD)
    found_N = exact_NK[torch.arange(500), nearest_N]
    torch.testing.assert_close(found_N, exact_NK.amin(1), rtol=1e-6, atol=0.0)


def test_clusters_that_are_tiny_beside_the_space_between_them_are_told_apart():
    """Two clouds 1e9 apart, each of two points 1 apart: a matrix product about one middle cannot see the 1."""
    x = torch.tensor([0.0, 1.0, 1e9, 1e9 + 1.0], dtype=torch.float64).repeat(16)[:, None]
    nearest_N = centers.nearest_allowed(Block(x=x + 0.25, rows=torch.arange(64)), x[:4])
    assert nearest_N.tolist() == [0, 1, 2, 3] * 16


# Missing entries


def with_holes(x: np.ndarray, share: float = 0.2) -> np.ndarray:
    """Some entries are missing; of every 50th row all."""
    missing = np.random.default_rng(1).random(x.shape) < share
    missing[::50] = True
    return np.where(missing, np.nan, x)


@pytest.mark.parametrize("offset", [0.0, 1e8])
def test_the_nearest_center_is_that_of_the_entries_that_are_there(offset, blobs):
    x = torch.from_numpy(with_holes(blobs)) + offset
    centers_KD = torch.from_numpy(blobs[::60].copy()) + offset
    exact_NK = (x[:, None] - centers_KD).square().nansum(2)
    block = Block(x=x.nan_to_num(0.0), rows=torch.arange(600), missing=x.isnan())
    nearest_N = centers.nearest_allowed(block, centers_KD)
    torch.testing.assert_close(exact_NK[torch.arange(600), nearest_N], exact_NK.amin(1), rtol=1e-6, atol=0.0)
    squared_N = centers._squared_to_nearest(block, centers_KD)
    torch.testing.assert_close(squared_N, exact_NK.amin(1), rtol=1e-6, atol=0.0)
    torch.testing.assert_close(centers._squared(block.x, centers_KD, (~block.missing).double()), exact_NK)


@pytest.mark.parametrize("method", METHODS)
def test_rows_with_holes_give_the_same_centers_for_every_run_of_leaves(method, blobs):
    found = [find(blocks_of(with_holes(blobs), most), 5, method) for most in (1, 2, 16)]
    assert all(torch.equal(found[0], other) for other in found[1:])
    assert bool(found[0].isfinite().all())


@pytest.mark.parametrize("method", METHODS)
def test_a_mask_of_nothing_changes_nothing(method, blobs):
    plain, x = find(blocks_of(blobs), 5, method), torch.from_numpy(blobs)

    def masked(bounds):
        return [Block(x[a:b], torch.arange(a, b), missing=torch.zeros(b - a, 3).bool()) for a, b in itertools.pairwise(bounds)]

    leaves = Leaves((*range(0, 600, 64), 600))
    np.testing.assert_allclose(find(LocalBlocks(masked, leaves), 5, method), plain, rtol=1e-12)


@pytest.mark.parametrize("method", KMEANS)
def test_kmeans_rests_at_the_means_of_the_entries_that_are_there(method, blobs):
    x = with_holes(blobs)
    found = find(blocks_of(x), 3, method).numpy()
    nearest = np.nansum((x[:, None] - found) ** 2, 2).argmin(1)
    np.testing.assert_allclose(found, [np.nanmean(x[nearest == k], 0) for k in range(3)], atol=0.01)
    whole = find(blocks_of(blobs), 3, method)
    assert np.abs(np.sort(found, 0) - np.sort(whole.numpy(), 0)).max() < 0.5


def test_a_row_that_is_drawn_has_the_means_of_the_data_where_it_lacks_entries():
    x = np.array([[1.0, np.nan], [np.nan, 2.0], [np.nan, np.nan]] * 20)
    found = {tuple(find(blocks_of(x), 1, "random", seed)[0].tolist()) for seed in range(20)}
    assert found == {(1.0, 2.0)}  # the rows without any entry are not drawn, and each column has but one value
    spread = np.column_stack([np.arange(60.0), np.where(np.arange(60) % 2, np.nan, 7.0)])
    for seed in range(5):
        assert find(blocks_of(spread), 1, "random", seed)[0, 1] == 7.0
