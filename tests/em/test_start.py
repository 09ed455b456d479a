"""The start comes from the seed alone, and is a good one."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans

from gendist.blocks import Leaves, LocalBlocks
from gendist.data.survey import survey
from gendist.em import start
from gendist.models.gmm import GaussianMixture
from gendist.protocols import Block


def blocks_of(x: np.ndarray, most: int = 1, weights: np.ndarray | None = None, rows_a_leaf: int = 64) -> LocalBlocks:
    x = torch.from_numpy(x)
    w = None if weights is None else torch.from_numpy(weights)

    def load(bounds):
        return [
            Block(x=x[a:b], rows=torch.arange(a, b), weights=None if w is None else w[a:b])
            for a, b in itertools.pairwise(bounds)
        ]

    return LocalBlocks(load, Leaves((*range(0, len(x), rows_a_leaf), len(x))), most)


def first_parameters(blocks, method="kmeans++", num_components=3, seed=0, labels=()):
    config = GaussianMixture.Config(num_components=num_components)
    return start.start_from_data(GaussianMixture, config, blocks, survey(blocks), labels, method, seed).model


@pytest.mark.parametrize("method", ["kmeans++", "random"])
def test_the_start_is_the_same_for_every_run_of_leaves_and_another_for_every_seed(method, blobs):
    models = [first_parameters(blocks_of(blobs, most), method) for most in (1, 2, 16)]
    for model in models[1:]:
        for name, tensor in models[0].tensors().items():
            assert torch.equal(model.tensors()[name], tensor)
    others = {tuple(first_parameters(blocks_of(blobs), "random", seed=seed).means.flatten().tolist()) for seed in range(5)}
    assert len(others) == 5


@pytest.mark.parametrize("num_centers", [1, 2, 5, 20])
def test_kmeans_is_about_as_good_as_scikit_learns(num_centers):
    x = np.random.default_rng(0).normal(size=(2000, 2)) @ np.diag([3.0, 1.0])
    inertia = {"ours": [], "theirs": []}
    for seed in range(5):
        blocks = blocks_of(x)
        centers = start._centers(blocks, survey(blocks), num_centers, "kmeans++", seed, has_labels=False)
        distances = torch.cdist(torch.from_numpy(x), centers)
        inertia["ours"].append(float(distances.amin(1).square().sum()))
        inertia["theirs"].append(KMeans(num_centers, n_init=1, random_state=seed).fit(x).inertia_)
    assert np.mean(inertia["ours"]) < 1.03 * np.mean(inertia["theirs"])


def test_it_finds_separated_clusters(blobs):
    for seed in range(10):
        model = first_parameters(blocks_of(blobs), seed=seed)
        assert float(model.weights.min()) > 0.2


def test_rows_of_weight_zero_are_never_chosen(blobs):
    far = np.concatenate([blobs, np.full((50, 3), 1e6)])
    weights = np.concatenate([np.ones(len(blobs)), np.zeros(50)])
    for method in ("kmeans++", "random"):
        model = first_parameters(blocks_of(far, weights=weights), method, num_components=10)
        assert float(model.means.abs().max()) < 100


def test_random_rows_are_drawn_in_proportion_to_their_weights():
    x = np.arange(6, dtype=np.float64)[:, None]
    weights = np.array([1.0, 2.0, 3.0, 0.0, 5.0, 9.0])
    blocks = blocks_of(x, weights=weights)
    counts = np.zeros(6)
    for seed in range(2000):
        centers = start._centers(blocks, survey(blocks), 1, "random", seed, has_labels=False)
        counts[int(centers[0, 0])] += 1
    expected = weights / weights.sum() * 2000
    assert counts[3] == 0
    assert (((counts - expected) ** 2)[weights > 0] / expected[weights > 0]).sum() < 20.5  # chi2, 4 degrees, p = 0.0004


def test_more_centers_than_distinct_points():
    x = np.repeat([[0.0, 0.0], [1.0, 1.0]], 40, axis=0)
    centers = start._centers(blocks_of(x), survey(blocks_of(x)), 5, "kmeans++", 0, has_labels=False)
    assert {tuple(center) for center in centers.tolist()} == {(0.0, 0.0), (1.0, 1.0)}
