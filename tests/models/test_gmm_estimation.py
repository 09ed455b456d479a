"""What an M-step may be told beyond maximum likelihood: priors, a floor, frozen parameters; and what it does when it cannot."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

import gendist
from gendist.models.gmm import GaussianMixture
from gendist.protocols import UserError

KINDS = ["full", "tied", "diag", "spherical"]


def fit(data, num_components=3, kind="full", init=None, fit=None, **model):
    spec = {
        "name": "test",
        "family": "gmm",
        "model": {"num_components": num_components, "covariance_type": kind, **model},
        "fit": {"max_iterations": 30, "tolerance": 0.0, **(fit or {})},
    }
    return gendist.fit(spec, data=data, init=init)


def matrices(model: GaussianMixture) -> np.ndarray:
    """(K, D, D) whatever the covariance type."""
    num_components, num_features = model.means.shape
    covariances = model.covariances.numpy()
    if model.covariance_type == "tied":
        return np.stack([covariances] * num_components)
    if model.covariance_type == "diag":
        return np.stack([np.diag(variances) for variances in covariances])
    return covariances if model.covariance_type == "full" else covariances[:, None, None] * np.eye(num_features)


def log_posterior(model: GaussianMixture, x, mean0, scale0, precision, degrees, concentration) -> float:
    """Log likelihood plus log prior by scipy's densities, up to a constant."""
    kind, covariances = model.covariance_type, matrices(model)
    total = float(model.log_prob(x).sum()) + (concentration - 1) * np.log(model.weights.numpy()).sum()
    for k, (mean, covariance) in enumerate(zip(model.means.numpy(), covariances, strict=True)):
        total += stats.multivariate_normal.logpdf(mean, mean0, covariance / precision)
        if kind == "full" or (kind == "tied" and k == 0):
            total += stats.invwishart.logpdf(covariance, degrees, np.diag(scale0))
        elif kind == "diag":
            variances = np.diag(covariance)
            total += stats.invgamma.logpdf(variances, degrees / 2, scale=scale0 / 2).sum()
        elif kind == "spherical":
            total += stats.invgamma.logpdf(covariance[0, 0], degrees / 2, scale=scale0.mean() / 2)
    return total


@pytest.mark.parametrize("kind", KINDS)
def test_a_prior_leads_to_the_mode_of_the_posterior(kind, blobs):
    """No small step away from the fitted parameters has more likelihood times prior, and none of them is far from the mode."""
    x = blobs[:80]
    mean0, scale0, precision, degrees, concentration = np.array([1.0, -1.0, 0.5]), np.array([2.0, 1.0, 3.0]), 5.0, 9.0, 4.0
    prior = {"mean": mean0.tolist(), "scale": scale0.tolist(), "mean_precision": precision, "degrees_of_freedom": degrees}
    run = fit(
        x, 2, kind, fit={"max_iterations": 3000, "tolerance": 0.0},
        prior=prior, weight_concentration=concentration, covariance_regularization=0.0,
    )  # fmt: skip
    model, at = run.model, (mean0, scale0, precision, degrees, concentration)
    best = log_posterior(model, x, *at)
    rng = np.random.default_rng(0)
    step = 1e-4
    for _ in range(40):
        weights = model.weights.numpy() * np.exp(step * rng.normal(size=2))
        means = model.means.numpy() + step * rng.normal(size=model.means.shape)
        if kind in ("full", "tied"):
            bend = np.eye(3) + step * rng.normal(size=(3, 3))
            covariances = bend @ model.covariances.numpy() @ bend.T
        else:
            covariances = model.covariances.numpy() * np.exp(step * rng.normal(size=model.covariances.shape))
        other = GaussianMixture.from_parameters(weights / weights.sum(), means, covariances, kind)
        assert log_posterior(other, x, *at) < best + 1e-9
    assert not run.results["iterations_that_fell"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_posterior_never_falls_though_the_likelihood_may(kind, blobs):
    """The engine checks each gain against what the prior allows; the start is far from what the prior wants."""
    prior = {"mean": [0.0, 0.0, 0.0], "scale": [1.0, 1.0, 1.0], "mean_precision": 400.0, "degrees_of_freedom": 900.0}
    start = fit(blobs, 3, kind).model
    run = fit(blobs, 3, kind, init=start, prior=prior, weight_concentration=50.0)
    assert run.history[1]["gain"] < 0.0
    assert not run.results["iterations_that_fell"]
    for previous, record in zip(run.history, run.history[1:], strict=False):
        assert record["gain"] >= previous["least_gain"] - 1e-9


def test_the_priors_defaults_come_from_the_data_and_are_kept(blobs, tmp_path):
    spec = {"name": "map", "family": "gmm", "model": {"num_components": 2, "prior": {}}, "fit": {"max_iterations": 3}}
    run = gendist.fit(spec, data=blobs, run_dir=tmp_path / "run")
    np.testing.assert_allclose(run.model.prior.mean, blobs.mean(0))
    np.testing.assert_allclose(run.model.prior.scale, blobs.var(0) / 2 ** (2 / 3))
    assert run.model.prior.degrees_of_freedom == 5.0
    loaded = gendist.load(tmp_path / "run")
    assert loaded.config == run.model.config
    assert torch.equal(loaded.prior.scale, run.model.prior.scale)


@pytest.mark.parametrize("kind", KINDS)
def test_the_prior_alone_says_where_a_component_without_rows_lies(kind, blobs):
    """A label that no row of training carries, weights 0: the mode of the prior, and nothing to repair."""
    start = fit(blobs, 3, kind).model
    far = start.means.clone()
    far[2] = 1e6
    start = GaussianMixture.from_parameters(start.weights, far, start.covariances, kind)
    model = fit(blobs, 3, kind, init=start, fit={"max_iterations": 1}, prior={"mean_precision": 2.0}).model
    np.testing.assert_allclose(model.means[2], blobs.mean(0), rtol=1e-8)


@pytest.mark.parametrize(
    ("prior", "message"),
    [
        ({"mean": [0.0]}, "model.prior.mean has 1 entries"),
        ({"scale": [1.0, 1.0]}, "model.prior.scale has 2 entries"),
        ({"scale": [1.0, 1.0, -1.0]}, "0 or more"),
        ({"degrees_of_freedom": 1.0}, "more than 2"),
    ],
)
def test_a_prior_that_does_not_fit_is_refused(prior, message, blobs):
    with pytest.raises(UserError, match=message):
        fit(blobs, prior=prior)


@pytest.mark.parametrize("kind", KINDS)
def test_no_variance_is_below_the_floor(kind, blobs):
    plain = fit(blobs, 3, kind)
    free = np.linalg.eigvalsh(matrices(plain.model))
    floor = float(np.quantile(free, 0.6))
    run = fit(blobs, 3, kind, covariance_floor=floor)
    assert np.linalg.eigvalsh(matrices(run.model)).min() >= floor * (1 - 1e-12)
    assert not run.results["iterations_that_fell"]
    below = fit(blobs, 3, kind, covariance_floor=free.min() / 2)
    np.testing.assert_array_equal(below.model.covariances, plain.model.covariances)


def test_a_floor_is_the_best_that_a_covariance_above_it_can_do(blobs):
    x = blobs - blobs.mean(0)
    floor = 1.5 * np.linalg.eigvalsh(np.cov(x.T))[0]
    model = fit(x, 1, covariance_floor=floor, covariance_regularization=0.0).model
    best = float(model.log_prob(x).sum())
    values, vectors = np.linalg.eigh(model.covariances[0].numpy())
    for factors in ([1.0, 1.01, 1.0], [1.0, 0.99, 1.0], [1.01, 1.0, 1.0], [1.0, 1.0, 1.01], [1.0, 1.0, 0.99]):
        other = (vectors * values * factors) @ vectors.T
        assert float(GaussianMixture.from_parameters([1.0], model.means, other[None]).log_prob(x).sum()) < best


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("frozen", ["weights", "means", "covariances"])
def test_frozen_parameters_stay_and_the_others_are_the_best_beside_them(kind, frozen, blobs):
    start = fit(blobs, 3, kind, fit={"max_iterations": 2}).model
    run = fit(blobs[::-1].copy() + 0.3, 3, kind, init=start, frozen=[frozen], covariance_regularization=0.0)
    for name in ("weights", "means", "covariances"):
        assert torch.equal(getattr(run.model, name), getattr(start, name)) == (name == frozen)
    gains = [record["gain"] for record in run.history[1:]]
    assert min(gains) > -1e-9
    assert not run.results["iterations_that_fell"]


def test_frozen_means_have_covariances_about_them(blobs):
    start = GaussianMixture.from_parameters([1.0], [[1.0, 2.0, 3.0]], np.eye(3)[None], "full", 0.0)
    model = fit(blobs, 1, init=start, frozen=["means"], covariance_regularization=0.0).model
    d = blobs - [1.0, 2.0, 3.0]
    np.testing.assert_allclose(model.covariances[0], d.T @ d / len(d), rtol=1e-10)


def test_frozen_components_stay_and_their_weight_does_not(blobs):
    start = fit(blobs, 3, fit={"max_iterations": 2}).model
    start = GaussianMixture.from_parameters([0.2, 0.3, 0.5], start.means, start.covariances)
    model = fit(blobs + 0.3, 3, init=start, frozen_components=[1]).model
    for k in range(3):
        assert torch.equal(model.means[k], start.means[k]) == (k == 1)
        assert torch.equal(model.covariances[k], start.covariances[k]) == (k == 1)
    assert model.weights[1] != start.weights[1]


def test_what_is_frozen_must_have_values(blobs):
    with pytest.raises(UserError, match=r"fit\.init"):
        fit(blobs, frozen=["means"])
    with pytest.raises(UserError, match="allowed are 0 to 2"):
        fit(blobs, frozen_components=[3])


# Never NaN, and it says what it repaired


def finite(run) -> None:
    for tensor in run.model.tensors().values():
        assert bool(tensor.isfinite().all())
    assert all(np.isfinite(record["log_likelihood"]) for record in run.history)
    assert run.model.weights.sum() == pytest.approx(1.0)


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_component_begins_anew_at_a_badly_fitted_row(kind, blobs):
    """PyCave #56: one component has run off to where no row is."""
    start = fit(blobs, 2, kind).model
    means = torch.cat([start.means, torch.full((1, 3), 1e4, dtype=torch.float64)])
    weights = torch.cat([0.999 * start.weights, torch.tensor([0.001], dtype=torch.float64)])
    covariances = start.covariances if kind == "tied" else torch.cat([start.covariances, start.covariances[:1]])
    start = GaussianMixture.from_parameters(weights, means, covariances, kind)
    run = fit(blobs, 3, kind, init=start)
    finite(run)
    revived = [line for line in run.results["repairs"] if "component 2 was empty and begins anew at row" in line]
    assert len(revived) == 1
    assert run.history[0]["repairs"] == revived
    assert run.model.weights[2] > 0.01
    assert float(run.model.log_prob(blobs).mean()) > run.history[0]["log_likelihood"] + 0.01
    assert not run.results["iterations_that_fell"]


@pytest.mark.parametrize("weight", [1.0, 1e-3])
def test_where_an_empty_component_begins_anew_the_likelihood_rises_whatever_rows_weigh(weight):
    """Rows of one weight are fitted alike, however large it is; and a row that weighs next to nothing is worth no component."""
    x = np.concatenate([np.random.default_rng(0).normal(size=1000).clip(-3.0, 3.0), [6.0]])[:, None]
    start = GaussianMixture.from_parameters([0.999, 0.001], [[0.0], [1e4]], np.ones((2, 1, 1)))

    def history(weights):
        spec = {"name": "x", "family": "gmm", "model": {"num_components": 2}, "data": {"weight": "w", "columns": ["x"]}}
        run = gendist.fit(
            {**spec, "fit": {"max_iterations": 3, "tolerance": 0.0}}, data={"x": x[:, 0], "w": weights}, init=start
        )
        return run.history

    same = history(np.full(1001, weight))
    assert "begins anew at row 1000" in same[0]["repairs"][0]
    assert same[1]["log_likelihood"] > same[0]["log_likelihood"]
    expected = history(np.ones(1001))
    assert [record["log_likelihood"] for record in same] == pytest.approx([r["log_likelihood"] for r in expected], rel=1e-9)
    light = history(np.where(x[:, 0] == 6.0, 1e-6 * weight, weight))
    assert "stays where it was" in light[0]["repairs"][0]


def test_an_empty_component_is_not_sent_to_a_row_whose_label_forbids_it():
    """The worst row has a label: a component without one would stay empty there, and be sent again, for ever."""
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.normal(size=300), rng.normal(10.0, 1.0, 300), [60.0], np.full(50, 5.0)])
    labels = np.array(["a"] * 300 + ["b"] * 300 + ["a"] + [None] * 50, dtype=object)
    spec = {"name": "x", "family": "gmm", "model": {"num_components": 4}, "data": {"label": "y", "columns": ["x"]}}
    run = gendist.fit({**spec, "fit": {"max_iterations": 20}}, data={"x": x, "y": labels})
    finite(run)
    assert not [line for line in run.results["repairs"] if "row 600" in line]


def test_rows_of_no_weight_change_nothing_in_float32(blobs):
    x = {"x": np.concatenate([[1e20], blobs[:, 0]]), "w": np.concatenate([[0.0], np.ones(len(blobs))])}
    spec = {"name": "x", "family": "gmm", "model": {"num_components": 2}, "data": {"weight": "w", "columns": ["x"]}}
    spec |= {"fit": {"precision": "float32", "max_iterations": 5, "init": "random"}}
    finite(gendist.fit(spec, data=x))


def test_an_empty_component_stays_where_no_row_would_gain(blobs):
    """Rows that all lie on one point are fitted as well as can be."""
    x = np.zeros((50, 2))
    start = GaussianMixture.from_parameters([0.5, 0.5], [[0.0, 0.0], [1e3, 0.0]], np.stack([1e-6 * np.eye(2)] * 2))
    run = fit(x, 2, init=start, fit={"max_iterations": 3})
    finite(run)
    assert "component 1 is empty and stays where it was" in run.results["repairs"]
    np.testing.assert_allclose(run.model.weights, [1.0, 0.0], atol=1e-12)


def test_a_labels_component_is_not_sent_to_rows_of_others(blobs):
    labels = np.where(np.arange(len(blobs)) < 300, 0.0, np.nan)
    x = {"x": blobs[:, 0], "y": blobs[:, 1], "component": labels, "weight": np.where(labels == 0.0, 0.0, 1.0)}
    spec = {
        "name": "labels",
        "family": "gmm",
        "model": {"num_components": 2},
        "data": {"label": "component", "weight": "weight", "columns": ["x", "y"]},
        "fit": {"max_iterations": 20},
    }
    start = GaussianMixture.from_parameters([0.5, 0.5], [[1e6, 1e6], [1.0, 1.0]], np.stack([np.eye(2)] * 2), labels=(0,))
    run = gendist.fit(spec, data=x, init=start)
    finite(run)
    assert torch.equal(run.model.means[0], start.means[0])


DEGENERATE = {
    "constant column": lambda rng: np.column_stack([rng.normal(size=(200, 2)), np.full(200, 7.0)]),
    "duplicated points": lambda rng: np.repeat(rng.normal(size=(5, 3)), 40, axis=0),
    "fewer distinct points than components": lambda rng: np.repeat(rng.normal(size=(2, 3)), 100, axis=0),
    "one point": lambda rng: np.full((200, 3), 3.5),
    "fewer rows than features": lambda rng: rng.normal(size=(6, 30)),
    "a column twice": lambda rng: rng.normal(size=(200, 2))[:, [0, 1, 1]],
    "one row far away (PyCave #25)": lambda rng: np.concatenate([rng.normal(size=(200, 3)), np.full((1, 3), 1e9)]),
    "zeros and ones (hmmlearn #137)": lambda rng: (rng.random((200, 3)) < 0.1).astype(float),
    "tiny numbers": lambda rng: 1e-160 * rng.normal(size=(200, 3)),
    "large numbers": lambda rng: 1e70 * rng.normal(size=(200, 3)),
    "widths from 1e-12 to 1e12 (PyCave #20)": lambda rng: rng.normal(size=(200, 3)) * [1e-12, 1.0, 1e12],
}


@pytest.mark.parametrize("precision", ["float64", "float32"])
@pytest.mark.parametrize("regularization", [0.0, 1e-6])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", DEGENERATE)
def test_degenerate_data_end_finite(name, kind, regularization, precision):
    x = DEGENERATE[name](np.random.default_rng(0))
    config = {"max_iterations": 15, "precision": precision}
    try:
        run = fit(x, 4, kind, fit=config, covariance_regularization=regularization)
    except UserError as error:
        # Allowed where float32 cannot hold the squares of the numbers, and said so.
        refused = str(error) if precision == "float32" and ("numbers" in name or "widths" in name) else ""
        assert "rescale" in refused, error  # noqa: PT017
        return
    finite(run)
    assert bool(run.model.sample(50).isfinite().all())
    assert bool(run.model.log_prob(x).isfinite().all())
    singular = regularization == 0.0 and name in ("constant column", "one point", "a column twice") and kind == "full"
    assert bool(run.results["repairs"]) or not singular


def test_float32_input_is_taken_as_it_is(blobs):
    exact = fit(blobs.astype(np.float32).astype(np.float64)).model
    assert torch.equal(fit(blobs.astype(np.float32)).model.means, exact.means)
