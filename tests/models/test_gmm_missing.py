"""The Gaussian mixture with missing entries, against scipy's marginals and EM written out row by row."""

from __future__ import annotations

import gc
import itertools
import weakref

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.special import logsumexp

import gendist
from gendist.blocks import Leaves, LocalBlocks, reduce
from gendist.evaluate.score import scores_of_rows
from gendist.models.distributions import gaussian_kernel
from gendist.models.distributions.gaussian_kernel import GaussianKernel
from gendist.models.distributions.gaussian_missing import rows_of_patterns
from gendist.models.gmm import GaussianMixture
from gendist.protocols import EXACT, Block, Compute, UserError

KINDS = ["full", "tied", "diag", "spherical"]
SUBSETS = [(), (0,), (2,), (1, 3), (0, 1, 2), (0, 1, 2, 3)]


def layout(matrices: np.ndarray, kind: str) -> np.ndarray:
    diagonal = np.array([np.diag(matrix) for matrix in matrices])
    return {"full": matrices, "tied": matrices[0], "diag": diagonal, "spherical": diagonal.mean(1)}[kind]


def matrices_of(model: GaussianMixture) -> np.ndarray:
    """(K, D, D) whatever the covariance type."""
    (num_components, num_features), covariances = model.means.shape, model.covariances.numpy()
    if model.covariance_type == "tied":
        return np.stack([covariances] * num_components)
    if model.covariance_type == "diag":
        return np.stack([np.diag(variances) for variances in covariances])
    return covariances if model.covariance_type == "full" else covariances[:, None, None] * np.eye(num_features)


def mixture(kind: str, width: float = 1.0, seed: int = 0) -> GaussianMixture:
    """Three components of four features; the second is `width` as wide as the others."""
    rng = np.random.default_rng(seed)
    factors = rng.normal(size=(3, 4, 4)) + 2 * np.eye(4)
    matrices = factors @ factors.transpose(0, 2, 1) * np.array([1.0, width, 1.0])[:, None, None] ** 2
    weights, means = rng.dirichlet(np.full(3, 5.0)), 3.0 * rng.normal(size=(3, 4))
    return GaussianMixture.from_parameters(weights, means, layout(matrices, kind), kind, 0.0)


def with_holes(x: np.ndarray, share: float = 0.3, seed: int = 0) -> np.ndarray:
    """Some entries are missing; of row 5 all, of row 6 none."""
    rng = np.random.default_rng(seed)
    missing = rng.random(x.shape) < share
    missing[5], missing[6] = True, False
    return np.where(missing, np.nan, x)


def sample(model: GaussianMixture, num_rows: int = 120) -> np.ndarray:
    return with_holes(model.sample(num_rows, seed=1).numpy())


def block_of(x: np.ndarray, weights=None, evidence=None, rows=None) -> Block:
    x = torch.from_numpy(np.array(x))
    fields = {name: torch.from_numpy(v) for name, v in (("weights", weights), ("evidence", evidence)) if v is not None}
    rows = torch.arange(len(x)) if rows is None else rows
    return Block(x=x.nan_to_num(0.0), rows=rows, missing=x.isnan() if bool(x.isnan().any()) else None, **fields)


def log_joint(model: GaussianMixture, x: np.ndarray) -> np.ndarray:
    """(N, K) log p(x_observed, component)."""
    values = np.tile(np.log(model.weights.numpy()), (len(x), 1))
    for k, (mean, covariance) in enumerate(zip(model.means.numpy(), matrices_of(model), strict=True)):
        for n, row in enumerate(x):
            seen = ~np.isnan(row)
            if seen.any():
                values[n, k] += stats.multivariate_normal.logpdf(row[seen], mean[seen], covariance[np.ix_(seen, seen)])
    return values


def completed(mean: np.ndarray, covariance: np.ndarray, row: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean and the covariance of a row given what is observed of it (PRML 2.81, 2.82)."""
    seen = ~np.isnan(row)
    slope = covariance[np.ix_(~seen, seen)] @ np.linalg.inv(covariance[np.ix_(seen, seen)])
    filled, rest = row.copy(), np.zeros_like(covariance)
    filled[~seen] = mean[~seen] + slope @ (row[seen] - mean[seen])
    rest[np.ix_(~seen, ~seen)] = covariance[np.ix_(~seen, ~seen)] - slope @ covariance[np.ix_(seen, ~seen)]
    return filled, rest


def em_by_rows(model: GaussianMixture, x, weights=1.0, evidence=0.0):
    """(log-likelihood, weights, means, covariances) after one iteration, nothing clever.

    Rows without any entry count for the weights alone. Where no column depends on another, missing entries need no
    completion: each column is estimated from the rows that have it.
    """
    kind, matrices, means = model.covariance_type, matrices_of(model), model.means.numpy()
    joint = log_joint(model, x) + evidence
    log_prob = logsumexp(joint, axis=1)
    weights = np.broadcast_to(weights, len(x))
    r = np.exp(joint - log_prob[:, None]) * weights[:, None]
    seen = ~np.isnan(x)
    new_means, scatters, counts = [], [], []
    for k in range(len(means)):
        if kind in ("full", "tied"):
            some = seen.any(1)
            rows = [completed(means[k], matrices[k], row) for row in x[some]]
            filled, rest = np.array([row[0] for row in rows]), np.array([row[1] for row in rows])
            count, r_k = r[some, k].sum(), r[some, k]
            new_means.append(means[k] + r_k @ (filled - means[k]) / count)
            d = filled - new_means[k]
            scatters.append((r_k[:, None] * d).T @ d + np.einsum("n,nij->ij", r_k, rest))
        else:
            share = r[:, k, None] * seen
            count = share.sum(0)
            new_means.append(means[k] + (share * np.where(seen, x - means[k], 0.0)).sum(0) / count)
            scatters.append((share * np.where(seen, x - new_means[k], 0.0) ** 2).sum(0))
        counts.append(count)
    scatters, counts = np.array(scatters), np.array(counts)
    covariances = {
        "full": lambda: scatters / counts[:, None, None],
        "tied": lambda: scatters.sum(0) / counts.sum(),
        "diag": lambda: scatters / counts,
        "spherical": lambda: scatters.sum(1) / counts.sum(1),
    }[kind]()
    return (weights * log_prob).sum(), r.sum(0) / r.sum(), np.array(new_means), covariances


def assert_close(model: GaussianMixture, expected, rtol: float = 1e-8) -> None:
    """Means and covariances in the units of each component's own width."""
    _, weights, means, covariances = expected
    np.testing.assert_allclose(model.weights, weights, rtol=rtol)
    reference = GaussianMixture.from_parameters(model.weights, means, covariances, model.covariance_type)
    whitening = np.linalg.inv(np.linalg.cholesky(matrices_of(reference)))
    off = np.einsum("kij,kj->ki", whitening, model.means.numpy() - means)
    difference = whitening @ (matrices_of(model) - matrices_of(reference)) @ whitening.transpose(0, 2, 1)
    assert np.abs(off).max() < rtol
    assert np.abs(difference).max() < rtol


# Against the oracle


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [1.0, 1e-4])
def test_densities_and_responsibilities_are_those_of_the_observed_entries(kind, width):
    model = mixture(kind, width)
    x = sample(model)
    joint = log_joint(model, x)
    np.testing.assert_allclose(model.log_prob(x), logsumexp(joint, axis=1), rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(model.encode(x), np.exp(joint - logsumexp(joint, axis=1)[:, None]), atol=1e-8)
    assert float(model.log_prob(x)[5]) == pytest.approx(0.0, abs=1e-12)
    np.testing.assert_allclose(model.encode(x)[5], model.weights, atol=1e-12)


def test_many_rows_of_a_pattern_and_few_have_the_same_moments(monkeypatch):
    """The kernel of the marginal and the differences, for narrow components and others."""
    for kind, width in itertools.product(("full", "tied"), (1.0, 1e-4)):
        model = mixture(kind, width)
        block = block_of(sample(model))
        found = []
        for many in (1, 1 << 30):
            monkeypatch.setattr(gaussian_kernel, "MANY_ROWS", many)
            found.append(model.e_step(block))
        assert found[0].log_likelihood == pytest.approx(found[1].log_likelihood, rel=1e-10)
        for first, second in zip(*(statistics.gaussian.moments(kind) for statistics in found), strict=True):
            np.testing.assert_allclose(first, second, rtol=1e-8, atol=1e-9 * width**2)


@pytest.mark.parametrize(
    ("kind", "many"), [("full", 1), ("full", 256), ("tied", 1), ("tied", 256), ("diag", 1), ("spherical", 1)]
)
@pytest.mark.parametrize("width", [1.0, 1e-4])
def test_em_is_that_written_out_row_by_row(monkeypatch, kind, many, width):
    """Weights, some 0, and soft evidence, which here excludes a component of some rows."""
    monkeypatch.setattr(gaussian_kernel, "MANY_ROWS", many)
    model, rng = mixture(kind, width), np.random.default_rng(2)
    x = sample(model)
    weights, shares = rng.integers(0, 3, len(x)).astype(np.float64), rng.dirichlet(np.ones(3), len(x))
    shares[::7, 0], shares[3::11, 1] = 0.0, 0.0
    with np.errstate(divide="ignore"):
        evidence = np.log(shares)
    for _ in range(2):
        statistics, expected = model.e_step(block_of(x, weights, evidence)), em_by_rows(model, x, weights, evidence)
        assert statistics.log_likelihood == pytest.approx(expected[0], rel=1e-9)
        model = model.m_step(statistics).model
        assert_close(model, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [1e-2, 1e-5])
def test_components_that_narrow_all_at_once_keep_their_digits(kind, width):
    """From a broad start: the pass in which a component finds its cluster begins with a width of 1 and ends with 1e-5."""
    rng = np.random.default_rng(3)
    centers, which = 5.0 * rng.normal(size=(3, 4)), np.arange(120) % 3
    x = with_holes(centers[which] + width * rng.normal(size=(120, 4)), 0.2)
    matrices = np.array([np.eye(4)] * 3)
    model = GaussianMixture.from_parameters(np.full(3, 1 / 3), centers + 0.1, layout(matrices, kind), kind, 0.0)
    spec = spec_of(kind, covariance_regularization=0.0, fit={"max_iterations": 3})
    run = gendist.fit(spec, data=x, init=model)
    for record in run.history:
        expected = em_by_rows(model, x)
        assert record["log_likelihood"] * len(x) == pytest.approx(expected[0], rel=1e-8, abs=1e-6)
        model = GaussianMixture.from_parameters(*expected[1:], kind, 0.0)
    assert_close(run.model, expected, 1e-6 if width < 1e-4 else 1e-8)  # the oracle itself has 1e-16 / 1e-5 of a width
    assert not run.results["repairs"]


@pytest.mark.parametrize("kind", KINDS)
def test_float32_is_close(kind):
    model = mixture(kind)
    block = block_of(sample(model, 1000))
    exact, close = (model.m_step(model.e_step(block, compute)).model for compute in (EXACT, Compute("float32")))
    for name, tensor in exact.tensors().items():
        np.testing.assert_allclose(close.tensors()[name], tensor, rtol=1e-4, atol=1e-4)


# Identities


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("missing", SUBSETS[:-1])
def test_columns_that_all_rows_lack_are_marginalised(kind, missing):
    model = mixture(kind)
    kept = [i for i in range(4) if i not in missing]
    matrices = matrices_of(model)[:, kept][:, :, kept]
    smaller = GaussianMixture.from_parameters(model.weights, model.means[:, kept], layout(matrices, kind), kind)
    x = model.sample(50, seed=3).numpy()
    x[:, list(missing)] = np.nan
    np.testing.assert_allclose(model.log_prob(x), smaller.log_prob(x[:, kept]), rtol=1e-10)
    np.testing.assert_allclose(model.encode(x), smaller.encode(x[:, kept]), atol=1e-10)


def tensors_of(value) -> list:
    if value is None:
        return []
    if isinstance(value, torch.Tensor | float):
        return [torch.as_tensor(value)]
    return [tensor for name in sorted(vars(value)) for tensor in tensors_of(getattr(value, name))]


def same_bytes(first, second) -> bool:
    pairs = zip(tensors_of(first), tensors_of(second), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_of_nothing_changes_no_byte(kind):
    model = mixture(kind)
    block = block_of(model.sample(500, seed=1).numpy())
    masked = Block(x=block.x, rows=block.rows, missing=torch.zeros_like(block.x, dtype=torch.bool))
    assert same_bytes(model.e_step(block), model.e_step(masked))


@pytest.mark.parametrize("kind", KINDS)
def test_weight_two_is_the_row_twice_and_weight_zero_no_row(kind):
    model, weights = mixture(kind), np.arange(120) % 3.0
    x = sample(model)
    weighted = model.e_step(block_of(x, weights))
    repeated = model.e_step(block_of(np.repeat(x, weights.astype(int), axis=0)))
    assert weighted.log_likelihood == pytest.approx(repeated.log_likelihood, rel=1e-10)
    first, second = model.m_step(weighted).model, model.m_step(repeated).model
    for name, tensor in first.tensors().items():
        np.testing.assert_allclose(tensor, second.tensors()[name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_soft_labels_are_the_enumeration_of_the_components(kind):
    """log p(x, evidence) = log sum over k of p(x_observed, k) e_k; and what one iteration makes of all rows is the same."""
    model, rng = mixture(kind), np.random.default_rng(4)
    x, shares = sample(model), rng.dirichlet(np.ones(3), 120)
    block = block_of(x, evidence=np.log(shares))
    joint = log_joint(model, x)
    np.testing.assert_allclose(model.log_prob_of(block), np.log((np.exp(joint) * shares).sum(1)), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["diag", "spherical"])
def test_known_components_are_counted_in_one_step(kind):
    """Whatever the parameters were: each column's mean and variance over the rows of the component that have it."""
    model, which = mixture(kind), np.arange(120) % 3
    x = sample(model)
    evidence = np.where(np.arange(3) == which[:, None], 0.0, -np.inf)
    found = model.m_step(model.e_step(block_of(x, evidence=evidence))).model
    np.testing.assert_allclose(found.means, [np.nanmean(x[which == k], 0) for k in range(3)], rtol=1e-10)
    squares = [(x[which == k] - np.nanmean(x[which == k], 0)) ** 2 for k in range(3)]
    expected = [np.nanmean(square, 0 if kind == "diag" else None) for square in squares]
    np.testing.assert_allclose(found.covariances, expected, rtol=1e-10)
    np.testing.assert_allclose(found.weights, 1 / 3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [1.0, 1e-5])
def test_counted_rows_have_the_moments_of_rows_that_are_added(kind, width):
    model, block = mixture(kind, width), block_of(sample(mixture(kind)))
    latent_N = torch.arange(120) % 3
    kernels = GaussianKernel(model.gaussian, EXACT), GaussianKernel(model.gaussian, EXACT)
    for rows in kernels[0].portions(block.x, block.missing):
        for kernel in kernels:
            kernel.load(block.x[rows], block.missing[rows])
        kernels[0].count(latent_N[rows])
        kernels[1].add(torch.nn.functional.one_hot(latent_N[rows], 3).T.double())
    counted, added = (kernel.statistics() for kernel in kernels)
    assert torch.equal(counted.counts, added.counts)
    assert torch.equal(counted.weight, added.weight)
    for first, second in zip(counted.moments(kind), added.moments(kind), strict=True):
        np.testing.assert_allclose(first, second, rtol=1e-9, atol=1e-9 * float(second.abs().max()))


@pytest.mark.parametrize("kind", ["full", "tied"])
def test_known_components_with_complete_rows_and_others_are_em_of_each_alone(kind):
    """The components are known, the entries are not: as many EM fits of one Gaussian, where the covariance is not shared."""
    model, which = mixture(kind), np.arange(120) % 3
    x = sample(model)
    evidence = np.where(np.arange(3) == which[:, None], 0.0, -np.inf)
    found = model.m_step(model.e_step(block_of(x, evidence=evidence))).model
    assert_close(found, em_by_rows(model, x, evidence=evidence))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("column", [0, 3])
def test_a_column_that_a_component_never_sees_keeps_what_was_said_of_it(kind, column):
    model, which = mixture(kind), np.arange(120) % 3
    x = sample(model)
    x[which == 1, column] = np.nan
    evidence = np.where(np.arange(3) == which[:, None], 0.0, -np.inf)
    update = model.m_step(model.e_step(block_of(x, evidence=evidence)))
    assert bool(torch.cat([tensor.flatten() for tensor in update.model.tensors().values()]).isfinite().all())
    assert not update.repairs
    if kind in ("diag", "spherical"):
        assert update.model.means[1, column] == model.means[1, column]
    if kind == "diag":
        assert update.model.covariances[1, column] == model.covariances[1, column]


# Whole fits


def spec_of(kind: str, num_components: int = 3, fit=None, data=None, num_workers: int = 0, **model) -> dict:
    return {
        "name": "holes",
        "family": "gmm",
        "model": {"num_components": num_components, "covariance_type": kind, **model},
        "data": data or {},
        "fit": {"max_iterations": 8, "tolerance": 0.0, **(fit or {})},
        "cluster": {"num_workers": num_workers},
    }


PRIOR = {"mean_precision": 5.0, "degrees_of_freedom": 9.0}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{"covariance_regularization": 0.0}, {"covariance_regularization": 0.3}, {"prior": PRIOR}])
def test_no_iteration_gains_less_than_its_step_guarantees(kind, options, blobs):
    run = gendist.fit(spec_of(kind, 4, **options), data=with_holes(blobs[::2]))
    assert run.results["iterations_that_fell"] == []
    for record, following in itertools.pairwise(run.history):
        assert following["gain"] >= record["least_gain"] - 1e-9
    if not options.get("prior") and not options["covariance_regularization"]:
        assert all(record["gain"] > -1e-9 for record in run.history[1:])


@pytest.mark.parametrize("kind", KINDS)
def test_a_prior_leads_to_the_mode_of_the_posterior(kind, blobs):
    """No small step away from the fitted parameters has more likelihood times prior."""
    x = with_holes(blobs[:64])
    prior = {"mean": [1.0, -1.0, 0.5], "scale": [2.0, 1.0, 3.0], "mean_precision": 5.0, "degrees_of_freedom": 9.0}
    options = {"prior": prior, "covariance_regularization": 0.0, "fit": {"max_iterations": 300, "tolerance": 1e-13}}
    model = gendist.fit(spec_of(kind, 2, **options), data=x).model

    def log_posterior(other: GaussianMixture) -> float:
        total, scale = float(other.log_prob(x).sum()), np.array(prior["scale"])
        for k, (mean, covariance) in enumerate(zip(other.means.numpy(), matrices_of(other), strict=True)):
            total += stats.multivariate_normal.logpdf(mean, prior["mean"], covariance / 5.0)
            if kind == "full" or (kind == "tied" and k == 0):
                total += stats.invwishart.logpdf(covariance, 9.0, np.diag(scale))
            elif kind == "diag":
                total += stats.invgamma.logpdf(np.diag(covariance), 4.5, scale=scale / 2).sum()
            elif kind == "spherical":
                total += stats.invgamma.logpdf(covariance[0, 0], 4.5, scale=scale.mean() / 2)
        return total

    best, step, rng = log_posterior(model), 1e-4, np.random.default_rng(0)
    for _ in range(30):
        means = model.means.numpy() + step * rng.normal(size=model.means.shape)
        covariances = model.covariances.numpy() * np.exp(step * rng.normal(size=model.covariances.shape))
        if kind in ("full", "tied"):
            bend = np.eye(3) + step * rng.normal(size=(3, 3))
            covariances = bend @ model.covariances.numpy() @ bend.T
        other = GaussianMixture.from_parameters(model.weights, means, covariances, kind)
        assert log_posterior(other) < best + 1e-9


def leaves_of(block: Block):
    def load(bounds):
        return [
            Block(
                x=block.x[a:b],
                rows=block.rows[a:b],
                weights=block.weights[a:b],
                evidence=block.evidence[a:b],
                missing=block.missing[a:b] if bool(block.missing[a:b].any()) else None,
            )
            for a, b in itertools.pairwise(bounds)
        ]

    return load


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_are_the_same_bytes_for_every_run_of_leaves(kind):
    model, rng = mixture(kind), np.random.default_rng(6)
    x = sample(model, 400)
    x[100:250] = model.sample(150, seed=7)  # leaves in which nothing is missing
    evidence = np.where(rng.random((400, 3)) < 0.1, -1.0, 0.0)
    load, leaves = leaves_of(block_of(x, rng.integers(0, 3, 400).astype(np.float64), evidence)), Leaves.of_shape(400, 4)
    step = type(model).e_step
    values = [reduce(step, LocalBlocks(load, leaves, most), model) for most in (1, 2, 8, 64)]
    assert all(same_bytes(values[0], value) for value in values[1:])
    assert_close(model.m_step(values[0]).model, em_by_rows(model, x, *(block.numpy() for block in (
        load((0, 400))[0].weights, load((0, 400))[0].evidence))))  # fmt: skip


@pytest.mark.ray
@pytest.mark.parametrize("kind", ["full", "diag"])
def test_any_number_of_workers_gives_the_same_bytes(cluster, blobs, kind):
    x = with_holes(blobs)
    here = gendist.fit(spec_of(kind, fit={"max_iterations": 4}), data=x).model.tensors()
    for num_workers in (1, 2):
        there = gendist.fit(spec_of(kind, fit={"max_iterations": 4}, num_workers=num_workers), data=x).model.tensors()
        assert all(torch.equal(tensor, here[name]) for name, tensor in there.items())


@pytest.mark.parametrize("init", ["kmeans||", "kmeans++", "random", "random_responsibilities"])
@pytest.mark.parametrize("kind", ["full", "diag"])
def test_every_start_takes_rows_with_holes_labels_and_weights(init, kind, blobs):
    rng, x = np.random.default_rng(8), with_holes(blobs, 0.2)
    labels = np.where(rng.random(600) < 0.1, (blobs[:, 0] > 3).astype(float), np.nan)
    columns = {"x": x, "label": labels, "weight": rng.integers(0, 3, 600).astype(float)}
    data = {"label": "label", "weight": "weight", "columns": ["x"]}
    run = gendist.fit(spec_of(kind, fit={"init": init}, data=data), data=columns)
    assert np.isfinite(run.results["log_likelihood"])
    assert run.results["iterations_that_fell"] == []
    assert run.model.labels == (0, 1)


def test_an_empty_component_begins_anew_at_a_complete_row(blobs):
    start = gendist.fit(spec_of("full", 2), data=blobs).model
    means = torch.cat([start.means, torch.full((1, 3), 1e4, dtype=torch.float64)])
    weights = torch.cat([0.999 * start.weights, torch.tensor([0.001], dtype=torch.float64)])
    start = GaussianMixture.from_parameters(weights, means, torch.cat([start.covariances, start.covariances[:1]]))
    x = with_holes(blobs)
    run = gendist.fit(spec_of("full", fit={"max_iterations": 1}), data=x, init=start)
    (revived,) = [line for line in run.results["repairs"] if "component 2 was empty and begins anew at row" in line]
    row = int(revived.split("row ")[1].split(",")[0])
    np.testing.assert_array_equal(run.model.means[2], x[row])


def test_a_column_without_a_value_is_refused(blobs):
    blobs = np.array(blobs)
    blobs[:, 1] = np.nan
    with pytest.raises(UserError, match="every value of 'x_1' is missing"):
        gendist.fit(spec_of("full"), data=blobs)
    columns = {"x": np.where(np.arange(600)[:, None] < 9, np.ones((600, 2)), [[1.0, np.nan]]), "w": np.arange(600) >= 9}
    with pytest.raises(UserError, match="every value of 'x_1' is missing from the rows to fit, or of weight 0"):
        gendist.fit(spec_of("full", data={"weight": "w", "columns": ["x"]}), data={**columns, "w": columns["w"].astype(float)})


DEGENERATE = {
    "one point": lambda rng: np.full((200, 3), 3.5),
    "constant column": lambda rng: np.column_stack([rng.normal(size=(200, 2)), np.full(200, 7.0)]),
    "a column twice": lambda rng: rng.normal(size=(200, 2))[:, [0, 1, 1]],
    "fewer rows than features": lambda rng: rng.normal(size=(8, 20)),
}


@pytest.mark.parametrize(("kind", "precision"), [("full", "float64"), ("tied", "float64"), ("diag", "float32")])
@pytest.mark.parametrize("name", DEGENERATE)
def test_degenerate_data_end_finite(name, kind, precision):
    x = with_holes(DEGENERATE[name](np.random.default_rng(0)))
    fit = {"max_iterations": 2, "precision": precision}
    run = gendist.fit(spec_of(kind, 4, fit=fit, covariance_regularization=0.0), data=x)
    assert all(bool(tensor.isfinite().all()) for tensor in run.model.tensors().values())
    for filled in (run.model.log_prob(x), run.model.impute(x), run.model.impute(x, seed=1)):
        assert bool(filled.isfinite().all())


def test_infinite_entries_are_refused():
    with pytest.raises(UserError, match="infinite entries"):
        mixture("full").log_prob([[0.0, np.inf, 0.0, 0.0]])


# Imputation


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_missing_is_filled_in_with_its_conditional_mean(kind):
    model = mixture(kind)
    x = sample(model)
    joint = log_joint(model, x)
    posterior = np.exp(joint - logsumexp(joint, axis=1)[:, None])
    filled = [[completed(m, c, row)[0] for m, c in zip(model.means.numpy(), matrices_of(model), strict=True)] for row in x]
    imputed = model.impute(x)
    np.testing.assert_allclose(imputed, np.einsum("nk,nkd->nd", posterior, np.array(filled)), rtol=1e-8, atol=1e-8)
    seen = ~np.isnan(x)
    np.testing.assert_array_equal(imputed[seen], x[seen])
    np.testing.assert_array_equal(model.impute(x, seed=1)[seen], x[seen])
    np.testing.assert_allclose(imputed[5], model.weights @ model.means, rtol=1e-10)
    complete = model.sample(3)
    assert torch.equal(model.impute(complete), complete)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("missing", [(2,), (1, 3), (0, 1, 2, 3)])
def test_draws_have_the_moments_of_what_they_are_drawn_from(kind, missing):
    """Of many copies of one row, which the components share; the tolerance is 5 standard errors."""
    model, size, missing = mixture(kind), 5_000, list(missing)
    row = 0.5 * (model.means[0] + model.means[1]).numpy()
    row[missing] = np.nan
    joint = log_joint(model, row[None])[0]
    posterior = np.exp(joint - logsumexp(joint))
    parts = [completed(m, c, row) for m, c in zip(model.means.numpy(), matrices_of(model), strict=True)]
    mean = sum(p * part[0] for p, part in zip(posterior, parts, strict=True))
    second = sum(p * (part[1] + np.outer(part[0], part[0])) for p, part in zip(posterior, parts, strict=True))
    covariance = (second - np.outer(mean, mean))[np.ix_(missing, missing)]
    drawn = model.impute(np.tile(row, (size, 1)), seed=3).numpy()[:, missing]
    error = np.sqrt(np.diag(covariance) / size)
    assert (np.abs(drawn.mean(0) - mean[missing]) < 5 * error).all()
    d = drawn - mean[missing]
    products = d[:, :, None] * d[:, None, :]
    assert (np.abs(products.mean(0) - covariance) < 5 * products.std(0) / np.sqrt(size)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_draw_belongs_to_the_seed_and_the_rows_number(kind):
    model = mixture(kind)
    x = sample(model)
    drawn = model.impute(x, seed=1)
    np.testing.assert_allclose(model.impute(x[70:], seed=1, offset=70), drawn[70:], rtol=1e-9, atol=1e-9)
    assert not torch.allclose(model.impute(x, seed=2), drawn)


@pytest.mark.parametrize("transforms", [["standardize"], ["log1p", "standardize"]])
def test_behind_transforms_rows_are_scored_and_filled_in_and_what_is_observed_stays(transforms, blobs):
    x = with_holes(np.abs(blobs))
    spec = spec_of("full", data={"transforms": transforms}, fit={"max_iterations": 3})
    model = gendist.fit(spec, data=x).model
    imputed, seen = model.impute(x), ~np.isnan(x)
    assert bool(imputed.isfinite().all())
    np.testing.assert_allclose(imputed[seen], x[seen], rtol=1e-10, atol=1e-10)
    assert bool(model.log_prob(x).isfinite().all())


def test_rows_with_holes_are_scored():
    model = mixture("full")
    x = sample(model)
    blocks = [block_of(x[a:b], rows=torch.arange(a, b)) for a, b in ((0, 50), (50, 120))]
    np.testing.assert_allclose(scores_of_rows(model, blocks), model.log_prob(x), rtol=1e-12)


# Patterns


@pytest.mark.parametrize("many", [1, 256])
def test_what_a_pass_keeps_of_patterns_goes_with_the_parameters(monkeypatch, many):
    monkeypatch.setattr(gaussian_kernel, "MANY_ROWS", many)
    model = mixture("full")
    model.e_step(block_of(sample(model)))
    parameters = weakref.ref(model.gaussian)
    pattern = weakref.ref(next(iter(gaussian_kernel._tables(model.gaussian, EXACT, None).patterns.values())))
    del model
    gc.collect()
    assert parameters() is None
    assert pattern() is None


def test_patterns_come_in_lexicographic_order_and_their_rows_ascend():
    missing = torch.rand(500, 70, generator=torch.Generator().manual_seed(0)) < 0.01
    missing[::3] = False
    groups = rows_of_patterns(missing)
    assert sorted(torch.cat(groups).tolist()) == list(range(500))
    patterns = [tuple(missing[rows[0]].tolist()) for rows in groups]
    assert patterns == sorted(set(patterns))
    for rows, pattern in zip(groups, patterns, strict=True):
        assert rows.tolist() == sorted(rows.tolist())
        assert bool((missing[rows] == torch.tensor(pattern)).all())
    assert rows_of_patterns(missing[:0]) == []


@pytest.mark.parametrize("kind", KINDS)
def test_portions_hold_every_row_once_and_one_pattern_where_columns_depend_on_each_other(kind):
    model = mixture(kind)
    block = block_of(sample(model, 5000))
    portions = list(GaussianKernel(model.gaussian, EXACT).portions(block.x, block.missing))
    rows = [torch.arange(5000)[portion] for portion in portions]
    assert sorted(torch.cat(rows).tolist()) == list(range(5000))
    if model.gaussian.has_matrices:
        assert all(len(block.missing[each].unique(dim=0)) == 1 for each in rows)
    else:
        assert len(portions) <= 5
