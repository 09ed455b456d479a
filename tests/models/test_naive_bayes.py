"""Naive Bayes against scikit-learn, brute force and SciPy, and the identities of labels, weights and missing values."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import scipy.sparse
import scipy.stats
import sklearn.naive_bayes
import torch

import gendist
from gendist.blocks import Leaves, LocalBlocks, reduce
from gendist.models.distributions.poisson import poisson_quantile
from gendist.models.naive_bayes import NaiveBayes
from gendist.noise import Noise
from gendist.protocols import Block, UserError, as_matrix

KINDS = ("gaussian", "multinomial", "bernoulli", "categorical", "poisson", "mixed")
SHARES = {"gaussian": 0.2, "multinomial": 0.1, "bernoulli": 0.3, "categorical": 0.2, "poisson": 0.2, "mixed": 0.2}


def rows_of(kind: str, num_rows: int = 300, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """x (N, 6) of three classes and y (N,)."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 3, num_rows)
    y[:3] = range(3)
    of_kind = {
        "gaussian": lambda: rng.normal(y[:, None] * [1.0, -2, 0, 3, 1, 1], [1, 2, 1, 4, 1, 0.5]),
        "multinomial": lambda: rng.poisson(1.0 + (np.arange(6) % 3 == y[:, None]) * 3.0),
        "bernoulli": lambda: rng.random((num_rows, 6)) < 0.2 + 0.6 * (np.arange(6) % 3 == y[:, None]),
        "categorical": lambda: (rng.random((num_rows, 6)) * (2 + y[:, None] + np.arange(6) % 2)).astype(int),
        "poisson": lambda: rng.poisson(0.5 + (np.arange(6) % 3 == y[:, None]) * 4.0),
    }
    if kind != "mixed":
        return of_kind[kind]().astype(np.float64), y
    parts = [of_kind[each]() for each in ("gaussian", "bernoulli", "categorical", "poisson", "multinomial", "multinomial")]
    return np.stack([part[:, d] for d, part in enumerate(parts)], 1).astype(np.float64), y


MIXED = {"kind": "mixed", "columns": dict(zip("abcdef", ("gaussian", "bernoulli", "categorical", "poisson", "multinomial",
                                                         "multinomial"), strict=True))}  # fmt: skip


def spec(
    shape: str, *, num_workers: int = 0, fit: dict | None = None, weight: bool = False, label: bool = True, **model
) -> dict:
    chosen = {**(MIXED if shape == "mixed" else {"kind": shape}), **model}
    data = {"columns": list("abcdef")} | ({"label": "y"} if label else {}) | ({"weight": "w"} if weight else {})
    return {
        "name": "nb",
        "family": "naive_bayes",
        "model": chosen,
        "data": data,
        "fit": fit or {},
        "cluster": {"num_workers": num_workers},
    }


def table(x: np.ndarray, y: object = None, w: object = None) -> dict:
    columns = {name: x[:, d] for d, name in enumerate("abcdef")}
    return columns | ({} if y is None else {"y": y}) | ({} if w is None else {"w": w})


def fitted(shape: str, x: np.ndarray, y: object = None, w: object = None, **options) -> NaiveBayes:
    return gendist.fit(spec(shape, weight=w is not None, label=y is not None, **options), data=table(x, y, w)).model


def with_holes(kind: str, x: np.ndarray, seed: int = 1) -> np.ndarray:
    holes = np.random.default_rng(seed).random(x.shape) < SHARES[kind]
    holes[:3] = False
    return np.where(holes, np.nan, x)


def assert_same_model(one: NaiveBayes, other: NaiveBayes, rtol: float = 1e-9) -> None:
    for (name, a), b in zip(one.tensors().items(), other.tensors().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=1e-12, msg=name)


# scikit-learn


@pytest.mark.parametrize(
    ("kind", "estimator"),
    [
        ("gaussian", sklearn.naive_bayes.GaussianNB(var_smoothing=0.0)),
        ("multinomial", sklearn.naive_bayes.MultinomialNB(alpha=0.7)),
        ("bernoulli", sklearn.naive_bayes.BernoulliNB(alpha=0.7)),
        ("categorical", sklearn.naive_bayes.CategoricalNB(alpha=0.7)),
        ("categorical", sklearn.naive_bayes.CategoricalNB(alpha=0.7, min_categories=6)),
    ],
)
@pytest.mark.parametrize("weighted", [False, True])
def test_it_is_scikit_learns(kind, estimator, weighted):
    x, y = rows_of(kind)
    if kind == "categorical":
        x[0] = 4 if estimator.min_categories else x.max(0)  # the slot for what was not seen is the sixth category there
    w = np.random.default_rng(5).integers(0, 4, len(x)) / 2.0 if weighted else None
    estimator.fit(x, y, sample_weight=w)
    options = {"covariance_regularization": 0.0} if kind == "gaussian" else {"pseudocount": 0.7}
    if kind == "categorical":
        options["unseen_categories"] = bool(estimator.min_categories)
    model = fitted(kind, x, y, w, **options)
    test = rows_of(kind, seed=3)[0]
    if kind == "categorical":
        test = np.minimum(test, x.max(0))
    expected = estimator.predict_joint_log_proba(test)
    np.testing.assert_allclose(model.joint_log_prob(test), expected, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(model.classify(test), estimator.predict_log_proba(test), rtol=1e-9, atol=1e-9)
    for same in (NaiveBayes.from_sklearn(estimator), NaiveBayes.from_sklearn(model.to_sklearn())):
        np.testing.assert_allclose(same.joint_log_prob(test), expected, rtol=1e-10, atol=1e-10)
        assert same.labels == (0, 1, 2)
    np.testing.assert_allclose(model.to_sklearn().predict_joint_log_proba(test), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("prior", ["uniform", (0.2, 0.3, 0.5)])
def test_class_priors_that_are_not_the_datas(prior):
    x, y = rows_of("multinomial")
    model = fitted("multinomial", x, y, class_prior=prior)
    given = [1 / 3] * 3 if prior == "uniform" else prior
    expected = sklearn.naive_bayes.MultinomialNB(class_prior=given).fit(x, y).predict_joint_log_proba(x)
    np.testing.assert_allclose(model.joint_log_prob(x), expected, rtol=1e-10)


def test_a_pseudocount_of_the_classes():
    x, y = rows_of("poisson")
    counts = np.bincount(y) + 2.0
    np.testing.assert_allclose(fitted("poisson", x, y, class_pseudocount=2.0).weights, counts / counts.sum())


def test_sparse_rows_are_the_same_rows():
    for kind in ("multinomial", "bernoulli", "poisson"):
        x, y = rows_of(kind)
        model = fitted(kind, x, y)
        np.testing.assert_allclose(model.joint_log_prob(scipy.sparse.csr_matrix(x)), model.joint_log_prob(x), rtol=1e-12)
        evidence = torch.where(torch.arange(3) == torch.from_numpy(y)[:, None], 0.0, -torch.inf).double()
        half = torch.rand(len(x), 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64).log()
        csr = scipy.sparse.csr_matrix(x)
        sparse = as_matrix(csr)
        for known in (evidence, half):
            dense = Block(x=torch.from_numpy(x), rows=torch.arange(len(x)), evidence=known)
            one, other = (model.m_step(model.e_step(block)) for block in (dense, replace(dense, x=sparse)))
            assert_same_model(one.model, other.model)


# Brute force


def log_prob_by_hand(model: NaiveBayes, x: np.ndarray) -> np.ndarray:
    """(N, K) log p(x, class) from SciPy's distributions, entry by entry; what is missing counts as 1."""
    joint = np.tile(model.weights.log().numpy(), (len(x), 1))
    for group in model.columns.groups:
        d: object = group.distribution
        for k in range(model.num_classes):
            values = x[:, group.columns.numpy()]
            if group.kind == "multinomial":
                there = ~np.isnan(values)
                probs = np.where(there, d.probs[k].numpy(), 0.0)
                probs = probs / np.where(there.any(1), probs.sum(1), 1.0)[:, None]
                joint[:, k] += np.where(there, np.nan_to_num(values) * np.log(np.where(there, probs, 1.0)), 0.0).sum(1)
                continue
            for i in range(values.shape[1]):
                v = values[:, i]
                if group.kind == "gaussian":
                    each = scipy.stats.norm.logpdf(v, d.gaussian.means[k, i], d.gaussian.covariances[k, i].sqrt())
                elif group.kind == "bernoulli":
                    each = scipy.stats.bernoulli.logpmf(np.nan_to_num(v), float(d.probs[k, i]))
                elif group.kind == "poisson":
                    each = scipy.stats.poisson.logpmf(np.nan_to_num(v), float(d.rates[k, i]))
                else:
                    first, slots = int(d.num_slots[:i].sum()), int(d.num_slots[i])
                    each = d.probs[k, first : first + slots].log().numpy()[np.minimum(np.nan_to_num(v).astype(int), slots - 1)]
                joint[:, k] += np.where(np.isnan(v), 0.0, each)
    return joint


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("holes", [False, True])
def test_the_density_is_that_of_scipy(kind, holes):
    x, y = rows_of(kind)
    x = with_holes(kind, x) if holes else x
    model = fitted(kind, x, y)
    joint = log_prob_by_hand(model, x)
    np.testing.assert_allclose(model.joint_log_prob(x), joint, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(model.log_prob(x), np.logaddexp.reduce(joint, 1), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(model.encode(x).sum(1), 1.0)


def block_of(x: np.ndarray, evidence: object = None, weights: object = None) -> Block:
    values = torch.from_numpy(np.array(x))
    missing = values.isnan()
    as_double = {name: None if v is None else torch.as_tensor(v, dtype=torch.float64) for name, v in
                 (("evidence", evidence), ("weights", weights))}  # fmt: skip
    return Block(
        values.masked_fill(missing, 0.0), torch.arange(len(x)), missing=missing if missing.any() else None, **as_double
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("holes", [False, True])
def test_soft_labels_are_an_enumeration_of_the_classes(kind, holes):
    """EM with soft labels is counting every row once for each class, weighed by its posterior."""
    x, y = rows_of(kind)
    x = with_holes(kind, x) if holes else x
    model = fitted(kind, x, y)
    evidence = np.log(np.random.default_rng(2).dirichlet([1, 1, 1], len(x)))
    joint = log_prob_by_hand(model, x) + evidence
    total = np.logaddexp.reduce(joint, 1)
    weights = np.arange(len(x)) % 3
    statistics = model.e_step(block_of(x, evidence, weights))
    assert statistics.log_likelihood == pytest.approx((weights * total).sum(), rel=1e-9)
    thrice = np.tile(x, (3, 1))
    known = np.repeat(np.where(np.eye(3) == 1, 0.0, -np.inf), len(x), axis=0)
    shares = (np.exp(joint - total[:, None]) * weights[:, None]).T.reshape(-1)
    assert_same_model(model.m_step(statistics).model, model.m_step(model.e_step(block_of(thrice, known, shares))).model)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("holes", [False, True])
def test_the_log_likelihood_of_counted_rows_is_that_of_their_densities(kind, holes):
    x, y = rows_of(kind)
    x = with_holes(kind, x) if holes else x
    model = fitted(kind, x, y)
    other = fitted(kind, rows_of(kind, seed=9)[0], y)  # whose parameters the counts did not make
    for each in (model, other):
        block = block_of(x, np.where(np.arange(3) == y[:, None], 0.0, -np.inf), np.arange(len(x)) % 3)
        assert each.e_step(block).log_likelihood == pytest.approx(block.weighted_sum(each.log_prob_of(block)), rel=1e-9)


# Identities, of every kind, with and without missing entries, of all, some and no labels


def some_labels(y: np.ndarray, share: float) -> np.ndarray:
    known = np.arange(len(y)) < share * len(y)
    return np.where(known, y.astype(float), np.nan)


CASES = [pytest.param(kind, holes, share, id=f"{kind}-{'holes' if holes else 'whole'}-{share}")
         for kind, holes, share in itertools.product(KINDS, (False, True), (1.0, 0.5))]  # fmt: skip


@pytest.mark.parametrize(("kind", "holes", "share"), CASES)
def test_weight_two_is_the_row_twice_and_weight_zero_no_row(kind, holes, share):
    x, y = rows_of(kind, 120)
    x, y = with_holes(kind, x) if holes else x, some_labels(y, share)
    w = np.random.default_rng(4).integers(0, 3, len(x))
    w[:3] = 1
    fit = {"max_iterations": 5, "tolerance": 0}
    repeated = fitted(kind, np.repeat(x, w, axis=0), np.repeat(y, w), fit=fit)
    assert_same_model(fitted(kind, x, y, w.astype(float), fit=fit), repeated, rtol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_all_labels_is_counting_in_one_step(kind):
    x, y = rows_of(kind)
    run = gendist.fit(spec(kind), data=table(x, y))
    assert run.results["num_iterations"] == 1
    assert "counted" in run.results["stopped"]
    joint = log_prob_by_hand(run.model, x)
    assert run.results["log_likelihood"] == pytest.approx(joint[np.arange(len(x)), y].mean(), rel=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_no_labels_is_unsupervised_and_the_likelihood_never_falls(kind):
    x, _ = rows_of(kind)
    for rows in (x, with_holes(kind, x)):
        run = gendist.fit(spec(kind, label=False, num_classes=3, fit={"max_iterations": 15, "tolerance": 0}), data=table(rows))
        assert run.results["iterations_that_fell"] == []
        assert run.history[-1]["log_likelihood"] > run.history[0]["log_likelihood"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_column_without_entries_is_marginalised(kind):
    x, y = rows_of(kind)
    model = fitted(kind, x, y)
    blank = x.copy()
    blank[:, 4] = np.nan
    everything = np.full_like(x, np.nan)
    np.testing.assert_allclose(model.log_prob(everything), 0.0, atol=1e-12)
    without = log_prob_by_hand(model, blank)
    np.testing.assert_allclose(model.joint_log_prob(blank), without, rtol=1e-9, atol=1e-9)
    if kind == "multinomial":
        return  # whose other columns then share the tokens
    # The sum over all values of the column, or the integral, is what is left.
    values = np.arange(200.0) if kind in ("poisson", "mixed") else np.arange(8.0) if kind == "categorical" else np.arange(2.0)
    if kind == "mixed":
        return
    if kind == "gaussian":
        values = np.linspace(-30, 30, 6001)
    total = []
    for value in values:
        filled = x[:5].copy()
        filled[:, 4] = value
        total.append(model.joint_log_prob(filled).numpy())
    if kind == "categorical":
        total = total[: int(model.columns.groups[0].distribution.num_slots[4])]
    measure = np.log(values[1] - values[0])
    np.testing.assert_allclose(np.logaddexp.reduce(total, 0) + measure, without[:5], rtol=1e-6, atol=1e-8)


def leaves_of(block: Block):
    def load(bounds):
        fields = ("x", "rows", "weights", "evidence", "missing")
        cut = [{name: getattr(block, name) for name in fields} for _ in bounds[1:]]
        return [Block(**{name: None if v is None else v[a:b] for name, v in each.items()})
                for each, (a, b) in zip(cut, itertools.pairwise(bounds), strict=True)]  # fmt: skip

    return load


@pytest.mark.parametrize("kind", KINDS)
def test_shards_classes_that_some_lack_and_empty_ones_change_no_bit(kind):
    """heat #771, cuml #3150: 1, 2, 3 and 7 shards, one of them empty, classes in some of them alone."""
    x, y = rows_of(kind)
    order = np.argsort(y, kind="stable")
    x, y = with_holes(kind, x)[order], y[order]
    model = fitted(kind, x, y)
    block = block_of(x, np.where(np.arange(3) == y[:, None], 0.0, -np.inf))
    bounds = (0, 40, 40, 90, 130, 200, 260, len(x))
    values = [
        reduce(NaiveBayes.e_step, LocalBlocks(leaves_of(block), Leaves(bounds), -(-7 // shards)), model)
        for shards in (1, 2, 3, 7)
    ]
    models = [model.m_step(value).model.tensors() for value in values]
    for other in models[1:]:
        assert all(torch.equal(tensor, other[name]) for name, tensor in models[0].items())
    whole = model.m_step(model.e_step(block)).model
    assert_same_model(whole, model.m_step(values[0]).model)


# Samples


@pytest.mark.parametrize("kind", KINDS)
def test_samples_have_the_models_moments(kind):
    x, y = rows_of(kind)
    model = fitted(kind, x, y, unseen_categories=False)
    samples, classes = model.sample(20_000, seed=1), model.sample_classes(20_000, seed=1)
    assert torch.equal(torch.cat([model.sample(40, seed=1), model.sample(60, seed=1, offset=40)]), samples[:100])
    np.testing.assert_allclose(torch.bincount(classes) / 20_000, model.weights, atol=0.015)
    for k in range(3):
        own = model.sample(20_000, seed=2, given=k)
        for group in model.columns.groups:
            if group.kind == "categorical":
                d = group.distribution
                for i, column in enumerate(group.columns.tolist()):
                    first, slots = int(d.num_slots[:i].sum()), int(d.num_slots[i])
                    seen = torch.bincount(own[:, column].long(), minlength=slots) / 20_000
                    np.testing.assert_allclose(seen, d.probs[k, first : first + slots], atol=0.015)
            else:
                means = group.distribution.means[k]
                spread = own[:, group.columns].std(0)
                assert bool(((own[:, group.columns].mean(0) - means).abs() < 5 * spread / 20_000**0.5).all())
        at_k = samples[classes == k]
        assert bool(((at_k.mean(0) - own.mean(0)).abs() < 6 * own.std(0) / len(at_k) ** 0.5 + 1e-9).all())


def test_poisson_quantiles_are_scipys():
    rates = torch.tensor([1e-9, 0.1, 1.0, 7.3, 40.0, 900.0, 1e5, 1e8], dtype=torch.float64)
    u = Noise(0, "test").uniform(0, 200, len(rates))
    u[0], u[1] = 2.0**-53, 1.0 - 2.0**-53
    found = poisson_quantile(u, rates.expand_as(u))
    expected = scipy.stats.poisson.ppf(u.numpy(), rates.numpy())
    at_least = scipy.stats.poisson.cdf(found.numpy(), rates.numpy()) >= u.numpy() - 1e-12
    assert at_least.all()
    np.testing.assert_allclose(found[2:], expected[2:], atol=1.0, rtol=1e-9)
    assert float((found == torch.from_numpy(expected)).double().mean()) > 0.99


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_missing_is_filled_in(kind):
    x, y = rows_of(kind)
    model, holes = fitted(kind, x, y), with_holes(kind, x)
    filled = model.impute(holes).numpy()
    there = ~np.isnan(holes)
    assert (filled[there] == holes[there]).all()
    posterior = model.encode(holes)
    if kind not in ("categorical", "mixed"):
        np.testing.assert_allclose(filled[~there], (posterior @ model.columns.means).numpy()[~there], rtol=1e-9)
    drawn = model.impute(holes, seed=3)
    assert torch.equal(torch.cat([model.impute(holes[:50], seed=3), model.impute(holes[50:], seed=3, offset=50)]), drawn)
    # A row of nothing is a sample of the model.
    blank = np.full((20_000, 6), np.nan)
    draws, samples = model.impute(blank, seed=5), model.sample(20_000, seed=6)
    spread = samples.std(0) * (2 / 20_000) ** 0.5
    assert bool(((draws.mean(0) - samples.mean(0)).abs() < 5 * spread + 1e-9).all())


# Categories


def test_unseen_categories_have_a_slot_or_are_refused():
    x, y = rows_of("categorical")
    model = fitted("categorical", x, y)
    unseen = x[:4].copy()
    unseen[:, 2] = 99
    assert bool(model.log_prob(unseen).isfinite().all())
    refusing = fitted("categorical", x, y, unseen_categories=False)
    with pytest.raises(UserError, match="99"):
        refusing.log_prob(unseen)


# Models to start from


def test_a_model_goes_on_under_the_priors_of_the_spec():
    x, y = rows_of("poisson")
    far = fitted("poisson", 50 * x, y)
    given = {**spec("poisson", label=True, class_prior="uniform", pseudocount=50.0), "fit": {"max_iterations": 3}}
    run = gendist.fit(given, data=table(x, y), init=far)
    assert_same_model(run.model, fitted("poisson", x, y, class_prior="uniform", pseudocount=50.0))
    joint = run.model.joint_log_prob(x).numpy()[np.arange(len(x)), y]
    assert run.results["log_likelihood"] == pytest.approx(joint.mean(), rel=1e-9)


def test_a_model_of_other_columns_categories_or_classes_is_no_start():
    x, y = rows_of("categorical")
    model = fitted("categorical", x, y)
    for data, options, said in (
        (table(x[:, ::-1], y), {}, "other kinds of columns or categories"),
        (table(x, y), {"num_classes": 4}, "has 3 classes, the spec and the data 4"),
    ):
        with pytest.raises(UserError, match=said):
            gendist.fit(spec("categorical", **options), data=data, init=model)


def test_what_texts_were_is_known_to_a_run_and_not_to_a_model_of_arrays(tmp_path):
    """Of other texts the same numbers would be other categories."""
    given = {**spec("categorical"), "data": {"label": "y"}}
    old = {"pet": np.array(["cat", "dog"] * 20), "y": np.array([0, 1] * 20)}
    new = {"pet": np.array(["dog", "zebra"] * 20), "y": np.array([0, 1] * 20)}
    run = gendist.fit(given, data=old, run_dir=tmp_path / "run")
    with pytest.raises(UserError, match="'pet'"):
        gendist.fit(given, data=new, init=run.model.plain)
    again = gendist.fit({**given, "fit": {"init": str(run.path)}}, data=new).model
    assert torch.equal(gendist.fit(given, data=new, init=run.model).model.log_prob(new), again.log_prob(new))
    probs = again.columns.groups[0].distribution.probs
    assert bool((probs[0] == probs[0].max()).tolist() == [False, True, False]), "dog is the second of the run's texts"
    assert bool((probs[1] == probs[1].max()).tolist() == [False, False, True]), "zebra is none of them"


def test_missing_counts_are_not_zeros():
    """Half of the counts are missing: a document has as many tokens as before, and fills in as many."""
    rng = np.random.default_rng(0)
    x, y = rng.poisson(4.0, (4000, 6)).astype(float), rng.integers(0, 3, 4000)
    holes = np.where(rng.random(x.shape) < 0.5, np.nan, x)
    model = fitted("multinomial", holes, y)
    assert float(model.columns.groups[0].distribution.mean_length) == pytest.approx(24.0, rel=0.02)
    np.testing.assert_allclose(model.impute(holes)[np.isnan(holes)].mean(), 4.0, rtol=0.03)


def test_a_column_that_a_class_lacks_keeps_its_share():
    x, y = rows_of("multinomial")
    x[y == 1, 2] = np.nan
    model = fitted("multinomial", x, y, pseudocount=0.0)
    before = rows_of("multinomial")[0].mean(0)
    probs = model.columns.groups[0].distribution.probs
    assert float(probs[1, 2]) == pytest.approx(before[2] / before.sum(), rel=0.2)
    own = rows_of("multinomial")[0][y == 1].mean(0)[[0, 1, 3, 4, 5]]
    np.testing.assert_allclose(probs[1, [0, 1, 3, 4, 5]] / probs[1, [0, 1, 3, 4, 5]].sum(), own / own.sum(), rtol=1e-9)


@pytest.mark.parametrize("kind", ["gaussian", "categorical"])
def test_sparse_rows_of_kinds_that_must_look_at_zeros_are_refused(kind):
    x, y = rows_of("bernoulli")
    with pytest.raises(UserError, match="sparse rows"):
        gendist.fit({**spec(kind), "data": {"label": "y"}}, data={"x": scipy.sparse.csr_matrix(x), "y": y})
    with pytest.raises(UserError, match="sparse rows"):
        fitted(kind, x, y).log_prob(scipy.sparse.csr_matrix(x))


def test_held_out_rows_are_held_to_the_kind():
    x, y = rows_of("poisson")
    given = spec("poisson")
    given["data"]["validation_fraction"] = 0.3
    parts = Noise(0, "validation").uniform_of_rows(torch.arange(len(x))).numpy() < 0.3
    x[np.flatnonzero(parts)[0], 0] = -400
    with pytest.raises(UserError, match="-400"):
        gendist.fit(given, data=table(x, y))


# Mistakes


@pytest.mark.parametrize(
    ("kind", "change", "options", "said"),
    [
        ("poisson", lambda x: np.where(x == x.max(), -1.0, x), {}, "-1"),
        ("multinomial", lambda x: np.where(x == x.max(), -1.0, x), {}, "-1"),
        ("poisson", lambda x: x + 0.5, {}, "whole numbers"),
        ("bernoulli", lambda x: 3 * x, {}, "holds 3"),
        ("categorical", lambda x: x * 1e6, {}, "categor"),
        ("gaussian", lambda x: np.where(np.arange(6) == 2, np.nan, x), {}, "'c' has no value"),
        ("mixed", lambda x: x, {"columns": {"nonsense": "poisson"}}, "nonsense"),
        ("gaussian", lambda x: x, {"columns": {"a": "poisson"}}, "mixed alone"),
        ("gaussian", lambda x: x, {"columns": {"a": "round"}, "kind": "mixed"}, "poisson"),
        ("gaussian", lambda x: x, {"num_classes": 2}, "3 different labels"),
        ("gaussian", lambda x: x, {"class_prior": (0.5, 0.6)}, "sum to 1"),
        ("gaussian", lambda x: x, {"class_prior": (0.5, 0.5)}, "3 different labels"),
        ("gaussian", lambda x: abs(x), {"kind": "mixed", "columns": {"a": "multinomial"}}, "declare it poisson"),
    ],
)
def test_what_does_not_fit_is_told_in_one_line(kind, change, options, said):
    x, y = rows_of(kind)
    with pytest.raises(UserError, match=said) as caught:
        fitted(kind, change(x), y, **options)
    assert "\n" not in str(caught.value)


def test_without_labels_the_number_of_classes_is_needed():
    with pytest.raises(UserError, match="num_classes"):
        fitted("gaussian", rows_of("gaussian")[0])
    model = fitted("gaussian", rows_of("gaussian")[0], num_classes=2)
    with pytest.raises(UserError, match="labels"):
        model.classify(rows_of("gaussian")[0])


def test_a_class_that_lost_its_rows_is_reported():
    x, y = rows_of("gaussian")
    run = gendist.fit(spec("gaussian", weight=True), data=table(x, y, (y != 1).astype(float)))
    assert any("class 1 has no rows" in line for line in run.results["repairs"])
    assert bool(run.model.log_prob(x).isfinite().all())


def test_a_single_class_is_that_of_all_rows():
    x, y = rows_of("gaussian")
    reference = sklearn.naive_bayes.GaussianNB(var_smoothing=0.0).fit(x, np.zeros(len(x)))
    for labels in (np.zeros(len(x)), np.where(y == 0, 0.0, np.nan)):
        run = gendist.fit(spec("gaussian", covariance_regularization=0.0), data=table(x, labels))
        gaussian = run.model.columns.groups[0].distribution.gaussian
        np.testing.assert_allclose(gaussian.means, reference.theta_, rtol=1e-9)
        np.testing.assert_allclose(gaussian.covariances, reference.var_, rtol=1e-9)
        assert len(run.history) == 1


def test_a_declared_class_without_a_label_is_found_among_the_unlabelled_rows():
    """Three clusters far apart, the rows of one of them all unlabelled."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 300)
    x = rng.normal(size=(300, 6)) + 20.0 * y[:, None]
    some = np.where((np.arange(300) < 100) & (y != 1), y.astype(float), np.nan)
    declared = spec("gaussian")
    declared["data"]["labels"] = [0, 1, 2]
    run = gendist.fit(declared, data=table(x, some))
    assert run.results["repairs"] == []
    assert (run.model.classify(x).argmax(1).numpy() == y).mean() > 0.99


def test_a_class_without_rows_is_told_once():
    x, y = rows_of("gaussian")
    some = np.where(np.arange(300) < 200, np.where(y == 1, 0.0, y), np.nan)
    declared = spec("gaussian", fit={"unlabelled_weight": 0.0})
    declared["data"]["labels"] = [0, 1, 2]
    run = gendist.fit(declared, data=table(x, some))
    assert [line for line in run.results["repairs"] if "no rows" in line] == [
        "class 1 has no rows; its parameters are what the prior or the start says"
    ]
    assert float(run.model.weights[1]) == 0.0


def test_a_list_beside_a_transformed_column_keeps_its_kind():
    """log1p leaves it as it was."""
    x, y = rows_of("multinomial")
    data = {"a": x[:, 0], "c": x[:, 1:], "y": y}
    step = {"log1p": {"columns": ["a"]}}
    chosen = spec("mixed") | {
        "model": {"kind": "mixed", "columns": {"c": "multinomial"}},
        "data": {"label": "y", "transforms": [step]},
    }
    model = gendist.fit(chosen, data=data).model.model
    assert {group.kind: group.columns.tolist() for group in model.columns.groups} == {
        "gaussian": [0],
        "multinomial": [1, 2, 3, 4, 5],
    }
    # Of a column that a transform changed the list is known, too.
    chosen["model"], chosen["data"]["transforms"] = {"kind": "mixed", "columns": {"c": "gaussian"}}, ["standardize"]
    assert [group.kind for group in gendist.fit(chosen, data=data).model.model.columns.groups] == ["gaussian"]


@pytest.mark.ray
def test_any_number_of_workers_ends_in_the_same_bytes(cluster, tmp_path):
    x, y = rows_of("mixed", 5000)
    x, y = with_holes("mixed", x), some_labels(y, 0.3)
    found = set()
    for num_workers in (0, 1, 2):
        path = tmp_path / str(num_workers)
        given = spec("mixed", num_workers=num_workers, fit={"max_iterations": 3, "tolerance": 0})
        gendist.fit(given, data=table(x, y), run_dir=path)
        found.add((path / "artifact" / "model.safetensors").read_bytes())
    assert len(found) == 1
