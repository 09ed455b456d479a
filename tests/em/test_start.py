"""The first parameters: one M-step from what the rows are first taken to belong to."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from sklearn.mixture import GaussianMixture as SklearnMixture

from gendist.blocks import Leaves, LocalBlocks
from gendist.data.survey import survey
from gendist.em import start
from gendist.em.config import STARTS
from gendist.models.gmm import GaussianMixture
from gendist.protocols import Block, UserError


def blocks_of(x: np.ndarray, most: int = 1, evidence: np.ndarray | None = None) -> LocalBlocks:
    known = None if evidence is None else torch.from_numpy(evidence)

    def load(bounds):
        return [
            Block(x=torch.from_numpy(x[a:b]), rows=torch.arange(a, b), evidence=None if known is None else known[a:b])
            for a, b in itertools.pairwise(bounds)
        ]

    return LocalBlocks(load, Leaves((*range(0, len(x), 64), len(x))), most)


def first_parameters(blocks, method="kmeans++", seed=0, labels=()) -> GaussianMixture:
    config = GaussianMixture.Config(num_components=3)
    return start.start_from_data(GaussianMixture, config, blocks, survey(blocks), labels, method, seed).model


@pytest.mark.parametrize("method", [start for start in STARTS if start not in ("auto", "labels")])
def test_the_start_is_the_same_for_every_run_of_leaves(method, blobs):
    models = [first_parameters(blocks_of(blobs, most), method) for most in (1, 2, 16)]
    for model in models[1:]:
        for name, tensor in models[0].tensors().items():
            assert torch.equal(model.tensors()[name], tensor)


@pytest.mark.parametrize("method", ["random", "random_responsibilities"])
def test_another_seed_is_another_start(method, blobs):
    assert len({tuple(first_parameters(blocks_of(blobs), method, seed).means.flatten().tolist()) for seed in range(5)}) == 5


@pytest.mark.parametrize("method", ["kmeans++", "kmeans||"])
def test_it_finds_separated_clusters(method, blobs):
    for seed in range(10):
        assert float(first_parameters(blocks_of(blobs), method, seed).weights.min()) > 0.2


def responsibilities(num_rows: int, evidence: np.ndarray | None = None, seed: int = 0) -> np.ndarray:
    block = next(iter(blocks_of(np.zeros((num_rows, 1)), 1 << 10, evidence).map_runs(lambda _, leaves: leaves, None)))
    return torch.cat([start._random_shares(3, seed, leaf) for leaf in block]).exp().numpy()


def test_random_responsibilities_make_the_parameters_that_they_weigh(blobs):
    """As scikit-learn's M-step from the same responsibilities."""
    shares = responsibilities(len(blobs))
    model = first_parameters(blocks_of(blobs), "random_responsibilities")
    reference = SklearnMixture(3)
    reference._initialize(blobs, shares)
    np.testing.assert_allclose(model.weights, reference.weights_, atol=1e-9)
    np.testing.assert_allclose(model.means, reference.means_, atol=1e-9)
    np.testing.assert_allclose(model.covariances, reference.covariances_, atol=1e-9)


def test_random_responsibilities_are_uniform_on_the_simplex():
    """Of three shares that are: each has mean 1/3 and variance 1/18, and exceeds s with probability (1 - s)^2."""
    shares = responsibilities(20_000)
    np.testing.assert_allclose(shares.sum(1), 1.0)
    np.testing.assert_allclose(shares.mean(0), 1 / 3, atol=0.01)
    np.testing.assert_allclose(shares.var(0), 1 / 18, atol=0.003)
    for s in (0.2, 0.5, 0.8):
        np.testing.assert_allclose((shares > s).mean(0), (1 - s) ** 2, atol=0.015)


def test_random_responsibilities_keep_to_what_is_known():
    evidence = np.zeros((200, 3))
    evidence[:50] = [0.0, -np.inf, -np.inf]
    evidence[50:100, 2] = -np.inf
    shares = responsibilities(200, evidence)
    np.testing.assert_array_equal(shares[:50], np.tile([1.0, 0.0, 0.0], (50, 1)))
    assert (shares[50:100, 2] == 0).all()
    assert (shares[50:100, :2] > 0).all()
    assert (shares[100:] > 0).all()


def evidence_with_labels(of_row: np.ndarray) -> np.ndarray:
    """(N, 3) of labels, -1 where there is none."""
    certain = np.where(np.arange(3) == of_row[:, None], 0.0, -np.inf)
    return np.where(of_row[:, None] < 0, 0.0, certain)


@pytest.mark.parametrize("num_labels", [1, 2, 3])
def test_latents_without_a_label_begin_at_the_rows_without_one(blobs, num_labels):
    of_row = np.where(np.arange(len(blobs)) % 3 == 0, np.arange(len(blobs)) // 3 % num_labels, -1)
    model = first_parameters(blocks_of(blobs, 2, evidence_with_labels(of_row)), "labels", labels=("a", "b", "c"))
    for label in range(num_labels):
        np.testing.assert_allclose(model.means[label], blobs[of_row == label].mean(0), atol=1e-9)
    free = model.weights[num_labels:].numpy()
    if num_labels == 3:  # unlabelled rows do not count
        np.testing.assert_allclose(model.weights, np.bincount(of_row[of_row >= 0]) / (of_row >= 0).sum(), atol=1e-12)
    else:
        assert (free > 0).all()
        assert free.sum() == pytest.approx((of_row < 0).mean(), rel=1e-12)
        mean = (free[:, None] * model.means[num_labels:].numpy()).sum(0) / free.sum()
        np.testing.assert_allclose(mean, blobs[of_row < 0].mean(0), atol=1e-9)


def test_a_start_from_labels_needs_one(blobs):
    evidence = evidence_with_labels(np.full(len(blobs), -1))
    with pytest.raises(
        UserError, match=r"no row to fit has a label; give labels to rows .* fit\.init: random_responsibilities"
    ):
        first_parameters(blocks_of(blobs, 1, evidence), "labels", labels=("a", "b", "c"))
