"""The Gaussian mixture on data that cost digits, against EM written out in 80-bit numbers and against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.mixture import GaussianMixture as SklearnMixture

import gendist
from gendist.models.distributions.gaussian_statistics import reference_of
from gendist.models.gmm import GaussianMixture
from gendist.protocols import EXACT

KINDS = ["full", "tied", "diag", "spherical"]
long = np.longdouble


def whitening_of(covariance: np.ndarray) -> np.ndarray:
    """Inverse of the Cholesky factor, by hand: NumPy factorizes no long doubles."""
    size = len(covariance)
    factor, inverse = np.zeros((size, size), long), np.zeros((size, size), long)
    for i in range(size):
        for j in range(i + 1):
            rest = covariance[i, j] - factor[i, :j] @ factor[j, :j]
            factor[i, j] = np.sqrt(rest) if i == j else rest / factor[j, j]
    for i in range(size):
        inverse[i] = -(factor[i, :i] @ inverse[:i]) / factor[i, i]
        inverse[i, i] += 1 / factor[i, i]
    return inverse


def em_in_long_doubles(x, weights, means, covariances, kind, regularization, num_iterations):
    """(trace, weights, means, covariances (K, D, D)): PRML 9.2.2, two passes, nothing clever."""
    x, weights, means = x.astype(long), weights.astype(long), means.astype(long)
    covariances = covariances.astype(long)
    num_features, trace = x.shape[1], []
    for _ in range(num_iterations):
        log_joint = []
        for weight, mean, covariance in zip(weights, means, covariances, strict=True):
            whitening = whitening_of(covariance)
            z = (x - mean) @ whitening.T
            constant = np.log(np.diag(whitening)).sum() - num_features * np.log(2 * np.pi * long(1)) / 2
            log_joint.append(np.log(weight) + constant - (z * z).sum(1) / 2)
        log_joint = np.array(log_joint)
        largest = log_joint.max(0)
        log_prob = largest + np.log(np.exp(log_joint - largest).sum(0))
        trace.append(log_prob.mean())
        r = np.exp(log_joint - log_prob)
        counts = r.sum(1)
        weights, means = counts / len(x), (r @ x) / counts[:, None]
        scatter = np.array([(r_k[:, None] * (x - mean)).T @ (x - mean) for r_k, mean in zip(r, means, strict=True)])
        if kind == "tied":
            covariances = np.array([scatter.sum(0) / len(x)] * len(means))
        else:
            covariances = scatter / counts[:, None, None]
        if kind == "diag":
            covariances = np.array([np.diag(np.diag(c)) for c in covariances])
        if kind == "spherical":
            covariances = np.array([np.eye(num_features) * np.diag(c).mean() for c in covariances])
        covariances = covariances + long(regularization) * np.eye(num_features)
    return np.array(trace), weights, means, covariances


def layout(covariances: np.ndarray, kind: str) -> np.ndarray:
    if kind == "tied":
        return covariances[0]
    if kind == "diag":
        return np.array([np.diag(c) for c in covariances])
    return covariances if kind == "full" else covariances[:, 0, 0]


def matrices(model: GaussianMixture) -> np.ndarray:
    """(K, D, D) whatever the covariance type."""
    num_components, num_features = model.means.shape
    covariances = model.covariances.numpy()
    if model.covariance_type == "tied":
        return np.stack([covariances] * num_components)
    if model.covariance_type == "diag":
        return np.stack([np.diag(variances) for variances in covariances])
    return covariances if model.covariance_type == "full" else covariances[:, None, None] * np.eye(num_features)


def clusters(widths, num_rows: int = 900, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows of clusters of these widths at distances of about 1, and the centers."""
    rng = np.random.default_rng(seed)
    centers = rng.normal(size=(len(widths), 3))
    shapes = rng.normal(size=(len(widths), 3, 3)) / 2 + np.eye(3)
    which = np.arange(num_rows) % len(widths)
    noise = np.einsum("nij,nj->ni", shapes[which], rng.normal(size=(num_rows, 3)))
    return centers[which] + np.asarray(widths)[which, None] * noise, centers


def assert_same_fit(kind, x, means, covariances, num_iterations, rtol=1e-8, shift=0.0):
    weights = np.full(len(means), 1 / len(means))
    start = GaussianMixture.from_parameters(weights, means + shift, layout(covariances, kind), kind, 0.0)
    spec = {
        "name": "exact",
        "family": "gmm",
        "model": {"num_components": len(means), "covariance_type": kind, "covariance_regularization": 0.0},
        "fit": {"max_iterations": num_iterations, "tolerance": 0.0},
    }
    run = gendist.fit(spec, data=x + shift, init=start)
    expected = em_in_long_doubles(x, weights, means, covariances, kind, 0.0, num_iterations)
    trace = np.array([record["log_likelihood"] for record in run.history])
    np.testing.assert_allclose(trace, expected[0].astype(float), rtol=rtol, atol=rtol)
    np.testing.assert_allclose(run.model.weights, expected[1].astype(float), rtol=rtol)
    ours, theirs = matrices(run.model), expected[3].astype(float)
    widths = np.sqrt(np.array([np.diag(c) for c in theirs]))
    off = np.abs(run.model.means.numpy() - shift - expected[2].astype(float))
    assert (off < rtol * widths + np.spacing(shift)).all()  # a mean is a float64 number itself
    # Each covariance in the units of its own widest and narrowest direction.
    for mine, reference in zip(ours, theirs, strict=True):
        whitening = whitening_of(reference.astype(long)).astype(float)
        assert np.abs(whitening @ (mine - reference) @ whitening.T).max() < rtol
    assert not run.results["repairs"]
    return run


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [1e-1, 1e-2, 1e-3, 1e-4, 1e-5])
def test_narrow_components_keep_their_digits_from_a_start_that_knows_them(kind, width):
    x, centers = clusters([1.0, width, 0.3, width])
    covariances = np.array([np.eye(3) * w**2 for w in (1.0, width, 0.3, width)])
    if kind == "tied":
        x, centers = clusters([width] * 4)
        covariances = np.array([np.eye(3) * width**2] * 4)
    assert_same_fit(kind, x, centers, covariances, 6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [1e-1, 1e-2, 1e-3, 1e-4, 1e-5])
def test_components_that_narrow_all_at_once_keep_their_digits(kind, width):
    """From a broad start: the pass in which a component finds its cluster begins with a width of 1 and ends with 1e-5."""
    x, centers = clusters([width] * 4)
    covariances = np.array([np.eye(3) * 0.02] * 4)
    run = assert_same_fit(kind, x, centers + 0.1, covariances, 8)
    assert matrices(run.model).max() < max(1.0, 100 * width**2)


@pytest.mark.parametrize("kind", KINDS)
def test_data_far_from_zero_keep_their_digits(kind):
    """Mean 1e8, variance 1: the rows themselves are exact there, after rounding to 2^-20."""
    x, centers = clusters([1.0, 0.5, 0.7])
    x = np.round(x * 2**20) / 2**20
    assert_same_fit(kind, x, np.round(centers * 2**20) / 2**20, np.array([np.eye(3)] * 3), 8, 1e-7, 2.0**27)


def test_highly_correlated_columns_keep_their_digits_and_the_fast_kernel():
    x, centers = clusters([0.5, 0.3, 0.4])
    mix = np.array([[1.0, 1.0, 1.0], [0.0, 1e-3, 0.0], [0.0, 1e-3, 1e-3]]).T  # all columns equal, but for 1e-3 of them
    y = x @ mix.T
    covariances = np.array([mix @ np.cov(x.T) @ mix.T] * 3)
    run = assert_same_fit("full", y, centers @ mix.T, covariances, 6, rtol=1e-7)
    # Whitening makes them ordinary: no component has to take differences.
    assert not bool(reference_of(run.model.gaussian, EXACT).narrow.any())


@pytest.mark.parametrize("width", [1e-2, 1e-5])
def test_scikit_learn_agrees(width):
    x, centers = clusters([1.0, width, 0.3, width], num_rows=4000)
    precisions = np.array([np.eye(3) / w**2 for w in (1.0, width, 0.3, width)])
    estimator = SklearnMixture(
        4, weights_init=np.full(4, 0.25), means_init=centers, precisions_init=precisions, reg_covar=0.0, max_iter=10, tol=0.0
    )
    spec = {
        "name": "sklearn",
        "family": "gmm",
        "model": {"num_components": 4, "covariance_regularization": 0.0},
        "fit": {"max_iterations": 10, "tolerance": 0.0},
    }
    run = gendist.fit(spec, data=x, init=estimator)
    with pytest.warns(Warning, match="did not converge"):
        estimator.fit(x)
    np.testing.assert_allclose([record["log_likelihood"] for record in run.history], estimator.lower_bounds_, rtol=1e-8)
    np.testing.assert_allclose(run.model.means, estimator.means_, rtol=1e-8)
    np.testing.assert_allclose(run.model.covariances, estimator.covariances_, rtol=1e-8, atol=1e-8 * width**2)
    np.testing.assert_allclose(run.model.log_prob(x), estimator.score_samples(x), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_the_kernel_is_chosen_from_the_parameters(kind):
    """Narrow ones are found one by one (all, where they share the covariance), and more of them in less precision."""
    from gendist.protocols import Compute

    widths = np.array([1.0, 1e-5, 0.3])
    covariances = np.array([np.eye(3) * w**2 for w in widths])
    model = GaussianMixture.from_parameters(np.full(3, 1 / 3), clusters(widths)[1], layout(covariances, kind), kind)
    narrow = reference_of(model.gaussian, EXACT).narrow.tolist()
    assert narrow == ([False] * 3 if kind == "tied" else [False, True, False])
    narrower = GaussianMixture.from_parameters(model.weights, model.means, model.covariances * 1e-12, kind)
    assert all(reference_of(narrower.gaussian, Compute("float32")).narrow.tolist())


@pytest.mark.parametrize("kind", KINDS)
def test_float32_is_close_and_sums_in_float64(kind, blobs):
    start = {"name": "f32", "family": "gmm", "model": {"num_components": 3, "covariance_type": kind}}
    runs = [
        gendist.fit(
            {**start, "fit": {"max_iterations": 10, "tolerance": 0.0, "precision": precision}}, data=np.tile(blobs, (20, 1))
        )
        for precision in ("float64", "float32")
    ]
    for exact, close in zip(runs[0].model.tensors().values(), runs[1].model.tensors().values(), strict=True):
        assert close.dtype == torch.float64
        np.testing.assert_allclose(close, exact, rtol=1e-4, atol=1e-4)
    assert runs[1].model.weights.sum() == pytest.approx(1.0, abs=1e-14)
    assert not runs[1].results["iterations_that_fell"]
