"""The Gaussian mixture against scikit-learn and against itself."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from sklearn.mixture import GaussianMixture as SklearnMixture

import gendist
from gendist.models.gmm import GaussianMixture
from gendist.protocols import Block, UserError

KINDS = ["full", "tied", "diag", "spherical"]


def sklearn_start(kind: str, x: np.ndarray, num_components: int, seed: int = 0, **options) -> SklearnMixture:
    """An estimator that starts from random rows and the covariance of the data."""
    rng = np.random.default_rng(seed)
    num_features = x.shape[1]
    variances = x.var(0)
    precisions = {
        "full": np.stack([np.linalg.inv(np.cov(x.T).reshape(num_features, num_features))] * num_components),
        "tied": np.linalg.inv(np.cov(x.T).reshape(num_features, num_features)),
        "diag": np.tile(1.0 / variances, (num_components, 1)),
        "spherical": np.full(num_components, 1.0 / variances.mean()),
    }[kind]
    return SklearnMixture(
        num_components,
        covariance_type=kind,
        weights_init=rng.dirichlet(np.full(num_components, 5.0)),
        means_init=x[rng.choice(len(x), num_components, replace=False)],
        precisions_init=precisions,
        **options,
    )


def spec(kind: str, num_components: int, **fit) -> dict:
    model = {"num_components": num_components, "covariance_type": kind}
    return {"name": "test", "family": "gmm", "model": model, "fit": fit}


def close(ours: torch.Tensor, theirs: np.ndarray, rtol: float = 1e-8) -> None:
    scale = np.abs(theirs).max()
    assert np.abs(ours.numpy() - theirs).max() <= rtol * scale


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_and_trace_equal_scikit_learn(kind, blobs):
    iterations = 25
    estimator = sklearn_start(kind, blobs, 4, max_iter=iterations, tol=0.0)
    run = gendist.fit(spec(kind, 4, max_iterations=iterations, tolerance=0.0), data=blobs, init=estimator)
    with pytest.warns(Warning, match="did not converge"):
        estimator.fit(blobs)
    model = run.model
    close(model.weights, estimator.weights_)
    close(model.means, estimator.means_)
    close(model.covariances, estimator.covariances_)
    trace = np.array([record["log_likelihood"] for record in run.history])
    np.testing.assert_allclose(trace, estimator.lower_bounds_, rtol=1e-8)
    np.testing.assert_allclose(model.log_prob(blobs), estimator.score_samples(blobs), rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(model.encode(blobs), estimator.predict_proba(blobs), rtol=1e-6, atol=1e-10)
    total = float(model.log_prob(blobs).sum())
    assert model.aic(total) == pytest.approx(estimator.aic(blobs), rel=1e-9)
    assert model.bic(total, len(blobs)) == pytest.approx(estimator.bic(blobs), rel=1e-9)
    assert run.results["bic"] == pytest.approx(estimator.bic(blobs), rel=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_convergence_comes_at_the_same_iteration_as_in_scikit_learn(kind, blobs):
    estimator = sklearn_start(kind, blobs, 3, max_iter=500, tol=1e-4)
    run = gendist.fit(spec(kind, 3, max_iterations=500, tolerance=1e-4), data=blobs, init=estimator)
    estimator.fit(blobs)
    assert run.results["stopped"] == "converged"
    assert len(run.history) == estimator.n_iter_
    close(run.model.means, estimator.means_)


@pytest.mark.parametrize("kind", KINDS)
def test_embedded_digits_equal_scikit_learn(kind):
    from sklearn.datasets import load_digits

    x = load_digits().data / 16.0
    x = x[:, x.std(0) > 0.05]
    estimator = sklearn_start(kind, x, 5, max_iter=8, tol=0.0, reg_covar=1e-3)
    wanted = spec(kind, 5, max_iterations=8, tolerance=0.0)
    wanted["model"]["covariance_regularization"] = 1e-3
    run = gendist.fit(wanted, data=x, init=estimator)
    with pytest.warns(Warning, match="did not converge"):
        estimator.fit(x)
    close(run.model.means, estimator.means_)
    close(run.model.covariances, estimator.covariances_)


@pytest.mark.parametrize("kind", KINDS)
def test_moving_the_data_far_away_moves_the_means_and_nothing_else(kind, blobs):
    """Mean 1e6, variance 1: moments about the current means keep their digits."""
    estimator = sklearn_start(kind, blobs, 3)
    near = gendist.fit(spec(kind, 3, max_iterations=10, tolerance=0.0), data=blobs, init=estimator).model
    shift = 2.0**20
    estimator.means_init = estimator.means_init + shift
    far = gendist.fit(spec(kind, 3, max_iterations=10, tolerance=0.0), data=blobs + shift, init=estimator).model
    np.testing.assert_allclose(far.means - shift, near.means, atol=1e-8)
    np.testing.assert_allclose(far.covariances, near.covariances, rtol=1e-7, atol=1e-8)


def random_mixture(kind: str, num_components: int = 3, num_features: int = 4, seed: int = 0) -> GaussianMixture:
    rng = np.random.default_rng(seed)
    factor = rng.normal(size=(num_components, num_features, num_features)) + 2 * np.eye(num_features)
    full = factor @ factor.transpose(0, 2, 1)
    covariances = {
        "full": full,
        "tied": full[0],
        "diag": rng.uniform(0.5, 3.0, (num_components, num_features)),
        "spherical": rng.uniform(0.5, 3.0, num_components),
    }[kind]
    means = 3.0 * rng.normal(size=(num_components, num_features))
    return GaussianMixture.from_parameters(rng.dirichlet(np.full(num_components, 3.0)), means, covariances, kind)


def dense_covariances(model: GaussianMixture) -> np.ndarray:
    """(K, D, D) whatever the covariance type."""
    covariances, size = model.covariances.numpy(), model.num_features
    return {
        "full": lambda: covariances,
        "tied": lambda: np.stack([covariances] * model.num_components),
        "diag": lambda: np.stack([np.diag(row) for row in covariances]),
        "spherical": lambda: np.stack([value * np.eye(size) for value in covariances]),
    }[model.covariance_type]()


@pytest.mark.parametrize("kind", KINDS)
def test_the_density_is_that_of_scipy(kind):
    model, x = random_mixture(kind), np.random.default_rng(1).normal(size=(50, 4)) * 4
    parts = [
        weight * stats.multivariate_normal(mean, covariance).pdf(x)
        for weight, mean, covariance in zip(model.weights.numpy(), model.means.numpy(), dense_covariances(model), strict=True)
    ]
    np.testing.assert_allclose(model.log_prob(x), np.log(np.sum(parts, axis=0)), rtol=1e-10)
    np.testing.assert_allclose(model.encode(x), (np.array(parts) / np.sum(parts, axis=0)).T, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_samples_have_the_moments_and_the_density_of_the_model(kind):
    model, n = random_mixture(kind), 100_000
    x = model.sample(n, seed=1).numpy()
    weights, means, covariances = model.weights.numpy(), model.means.numpy(), dense_covariances(model)
    mean = weights @ means
    centred = means - mean
    covariance = np.einsum("k,kij->ij", weights, covariances) + np.einsum("k,ki,kj->ij", weights, centred, centred)
    error = 5 * np.sqrt(np.diag(covariance) / n)
    assert (np.abs(x.mean(0) - mean) < error).all()
    np.testing.assert_allclose(np.cov(x.T), covariance, atol=0.05 * np.abs(covariance).max())
    # Goodness of fit: each column is distributed as the mixture's marginal.
    for j in range(model.num_features):

        def marginal(values, j=j):
            scales = np.sqrt(covariances[:, j, j])
            return weights @ stats.norm.cdf((values[None, :] - means[:, j, None]) / scales[:, None])

        assert stats.kstest(x[:, j], marginal).pvalue > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_the_density_of_small_boxes_is_the_share_of_samples_in_them(kind):
    model = random_mixture(kind, num_features=2)
    x = model.sample(200_000, seed=3).numpy()
    width = 0.5
    for center in model.means.numpy():
        share = (np.abs(x - center) < width / 2).all(1).mean()
        grid = center + (np.stack(np.meshgrid(*[np.linspace(-0.5, 0.5, 21)[:-1] + 0.025] * 2), -1).reshape(-1, 2)) * width
        expected = float(model.log_prob(grid).exp().mean()) * width**2
        assert share == pytest.approx(expected, abs=5 * np.sqrt(expected / len(x)))


@pytest.mark.parametrize("kind", KINDS)
def test_given_a_component_only_this_one_is_drawn_and_nothing_is_rejected(kind):
    model = random_mixture(kind)
    x = model.sample(20_000, seed=5, given=2).numpy()
    covariance = dense_covariances(model)[2]
    assert (np.abs(x.mean(0) - model.means[2].numpy()) < 5 * np.sqrt(np.diag(covariance) / len(x))).all()
    np.testing.assert_allclose(np.cov(x.T), covariance, atol=0.08 * np.abs(covariance).max())


def test_components_are_drawn_by_their_weights():
    model = random_mixture("full")
    far = GaussianMixture.from_parameters(model.weights, model.means * 1e6, model.covariances)
    counts = far.encode(far.sample(50_000, seed=2)).round().sum(0).numpy()
    assert stats.chisquare(counts, far.weights.numpy() * 50_000).pvalue > 1e-3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_features", [1, 3, 8, 11, 17, 50])
def test_a_sample_does_not_depend_on_its_neighbours(kind, num_features):
    model = random_mixture(kind, 5, num_features)
    whole = model.sample(9000, seed=11)
    rng = np.random.default_rng(0)
    for start, size in [(0, 40), (40, 60), (4000, 200), (8999, 1), *(map(int, rng.integers(1, 4000, 2)) for _ in range(10))]:
        assert torch.equal(model.sample(size, seed=11, offset=start), whole[start : start + size])
    assert not torch.equal(model.sample(40, seed=12), whole[:40])


@pytest.mark.parametrize("kind", KINDS)
def test_weight_two_is_the_row_twice_and_weight_zero_is_no_row(kind, blobs):
    rng = np.random.default_rng(4)
    weights = rng.integers(0, 4, len(blobs))
    estimator = sklearn_start(kind, blobs, 3)
    wanted = spec(kind, 3, max_iterations=15, tolerance=0.0)
    repeated = gendist.fit(wanted, data=np.repeat(blobs, weights, axis=0), init=estimator)
    weighted = gendist.fit({**wanted, "data": {"weight": "w"}}, data={"x": blobs, "w": weights}, init=estimator)
    for name, tensor in repeated.model.tensors().items():
        np.testing.assert_allclose(weighted.model.tensors()[name], tensor, rtol=1e-9, atol=1e-9)
    assert weighted.results["log_likelihood"] == pytest.approx(repeated.results["log_likelihood"], rel=1e-12)
    assert weighted.results["bic"] == pytest.approx(repeated.results["bic"], rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("init", ["kmeans++", "random"])
def test_all_components_known_is_counting(kind, init, blobs):
    labels = np.where(blobs[:, 0] > 3, "right", np.where(blobs[:, 1] > 2.5, "above", "below"))
    run = gendist.fit({**spec(kind, 3, max_iterations=3, init=init), "data": {"label": "y"}}, data={"x": blobs, "y": labels})
    model = run.model
    assert model.labels == ("above", "below", "right")
    members = [blobs[labels == label] for label in model.labels]
    np.testing.assert_allclose(model.weights, [len(m) / len(blobs) for m in members], rtol=1e-12)
    np.testing.assert_allclose(model.means, [m.mean(0) for m in members], rtol=1e-10, atol=1e-12)
    scatter = [np.cov(m.T, bias=True) for m in members]
    pooled = sum(len(m) * s for m, s in zip(members, scatter, strict=True)) / len(blobs)
    ridge = 1e-6
    expected = {
        "full": [s + ridge * np.eye(3) for s in scatter],
        "tied": pooled + ridge * np.eye(3),
        "diag": [np.diag(s) + ridge for s in scatter],
        "spherical": [np.diag(s).mean() + ridge for s in scatter],
    }[kind]
    np.testing.assert_allclose(model.covariances, expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(model.sample(5000, given="right").mean(0), members[2].mean(0), atol=0.2)


def test_partly_known_components_keep_their_meaning(blobs):
    """Rows of one cluster carry the label that sorts last: its component is the last, whatever k-means++ finds."""
    labels = [None] * len(blobs)
    right = np.flatnonzero(blobs[:, 0] > 3)
    for row in right[:5]:
        labels[row] = "z"
    labels[int(np.flatnonzero(blobs[:, 1] > 2.5)[0])] = "a"
    run = gendist.fit({**spec("full", 3), "data": {"label": "y"}}, data={"x": blobs, "y": labels})
    assert run.model.labels == ("a", "z")
    np.testing.assert_allclose(run.model.means[1], blobs[right].mean(0), atol=0.3)
    assert run.model.means[0, 1] > 2.5


def test_soft_evidence_multiplies_the_joint_density(blobs):
    model = random_mixture("full", 3, 3)
    rng = np.random.default_rng(0)
    evidence = torch.log(torch.from_numpy(rng.dirichlet([1.0, 1.0, 1.0], len(blobs))))
    x = torch.from_numpy(blobs)
    statistics = model.e_step(Block(x=x, rows=torch.arange(len(x)), evidence=evidence))
    densities = np.stack(
        [
            weight * stats.multivariate_normal(mean, covariance).pdf(blobs)
            for weight, mean, covariance in zip(
                model.weights.numpy(), model.means.numpy(), model.covariances.numpy(), strict=True
            )
        ],
        axis=1,
    )
    joint = densities * evidence.exp().numpy()
    assert statistics.log_likelihood == pytest.approx(np.log(joint.sum(1)).sum(), rel=1e-10)
    responsibilities = joint / joint.sum(1, keepdims=True)
    np.testing.assert_allclose(statistics.gaussian.counts, responsibilities.sum(0), rtol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_to_and_from_scikit_learn(kind, blobs):
    estimator = SklearnMixture(3, covariance_type=kind, random_state=0).fit(blobs)
    model = GaussianMixture.from_sklearn(estimator)
    back = model.to_sklearn()
    for name in ("weights_", "means_", "covariances_", "precisions_", "precisions_cholesky_"):
        np.testing.assert_allclose(getattr(back, name), getattr(estimator, name), rtol=1e-6, atol=1e-9, err_msg=name)
    np.testing.assert_allclose(back.score_samples(blobs), model.log_prob(blobs), rtol=1e-8, atol=1e-8)
    assert back.predict(blobs[:5]).shape == (5,)
    with pytest.raises(UserError, match="no parameters"):
        GaussianMixture.from_sklearn(SklearnMixture(3))


def test_decode_gives_component_means():
    model = random_mixture("diag")
    assert torch.equal(model.decode([0, 2]), model.means[[0, 2]])
    responsibilities = torch.tensor([[0.5, 0.5, 0.0]], dtype=torch.float64)
    assert torch.allclose(model.decode(responsibilities)[0], (model.means[0] + model.means[1]) / 2)
    with pytest.raises(UserError, match="allowed are 0 to 2"):
        model.decode([3])
    with pytest.raises(UserError, match="not an array of shape"):
        model.decode(torch.zeros(2, 5))


def test_parameters_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="sum to 1"):
        GaussianMixture.from_parameters([0.5, 0.6], np.zeros((2, 1)), np.ones((2, 1)), "diag")
    with pytest.raises(ValueError, match=r"covariances of shape \(2, 2\); \(2, 1, 1\) is needed for full"):
        GaussianMixture.from_parameters([0.5, 0.5], np.zeros((2, 1)), np.ones((2, 2)), "full")
    with pytest.raises(ValueError, match="positive definite"):
        GaussianMixture.from_parameters([1.0], np.zeros((1, 2)), [[[1.0, 2.0], [2.0, 1.0]]])
    with pytest.raises(ValueError, match="allowed are full, tied, diag, spherical"):
        GaussianMixture.from_parameters([1.0], np.zeros((1, 2)), np.ones((1, 2)), "round")


def test_x_that_does_not_fit_is_refused():
    model = random_mixture("full")
    with pytest.raises(UserError, match=r"\(N, 4\) is needed"):
        model.log_prob(np.zeros((3, 5)))
    with pytest.raises(UserError, match="columns in the order in which they were fitted"):
        model.log_prob(pd.DataFrame(np.zeros((3, 4))))
    with pytest.raises(UserError, match="infinite entries"):
        model.log_prob([[0.0, np.inf, 0.0, 0.0]])
    with pytest.raises(UserError, match="the components are 0 to 2"):
        model.sample(1, given=3)


@pytest.mark.parametrize("kind", KINDS)
def test_hard_cases_end_finite_and_say_what_was_repaired(kind, blobs):
    """A constant column, every row many times, more components than distinct points; without regularization."""
    points = np.array([[0.0, 1.0, 7.0], [1.0, 1.0, 7.0], [5.0, 1.0, 7.0]])
    wanted = spec(kind, 5, max_iterations=10, tolerance=0.0)
    wanted["model"]["covariance_regularization"] = 0.0
    run = gendist.fit(wanted, data=np.repeat(points, 20, axis=0))
    assert all(bool(tensor.isfinite().all()) for tensor in run.model.tensors().values())
    assert bool(run.model.sample(10).isfinite().all())
    assert run.results["repairs"]
    assert np.isfinite(run.results["log_likelihood"])


@pytest.mark.parametrize("kind", KINDS)
def test_the_log_likelihood_never_falls_below_what_the_step_guarantees(kind, blobs):
    """With heavy regularization the likelihood does fall, and by no more than the penalty explains."""
    wanted = spec(kind, 6, max_iterations=40, tolerance=0.0)
    wanted["model"]["covariance_regularization"] = 0.5
    run = gendist.fit(wanted, data=blobs)
    assert run.results["iterations_that_fell"] == []
    for record, following in zip(run.history[:-1], run.history[1:], strict=True):
        assert following["gain"] >= record["least_gain"] - 1e-9
    exact = gendist.fit({**wanted, "model": {**wanted["model"], "covariance_regularization": 0.0}}, data=blobs)
    assert all(record["gain"] > -1e-9 for record in exact.history[1:])
