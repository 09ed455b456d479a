"""Transforms: those of scikit-learn, the same bytes for every run of leaves, there and back, with the Jacobian of autograd."""

from __future__ import annotations

import logging
import math
import pickle

import numpy as np
import pytest
import scipy.linalg
import torch
from pydantic import TypeAdapter
from sklearn.decomposition import PCA
from sklearn.preprocessing import StandardScaler

import gendist.bulk
from gendist.blocks import LocalBlocks
from gendist.config import load_spec
from gendist.data import DataConfig, Dataset, Schema, source_of
from gendist.data.survey import survey
from gendist.data.transforms import RowError, Steps, Transforms
from gendist.protocols import UserError

RNG = np.random.default_rng(0)
MIXING = RNG.normal(size=(5, 5))
X = RNG.normal(size=(3000, 5)) @ MIXING + [0.0, 3.0, -2.0, 10.0, 0.5]
ALL_KINDS = ["standardize", {"whiten": {}}, {"pca": {"num_components": 5, "whiten": True}}, {"pca": {"num_components": 5}}]


def dataset_of(data, make_blocks=LocalBlocks, **config) -> Dataset:
    source, data_config = source_of(data), DataConfig(**config)
    return Dataset.open(source, data_config, Schema.of(source, data_config), make_blocks)


def fitted(declared, data, make_blocks=LocalBlocks, **config) -> Transforms:
    dataset = dataset_of(data, make_blocks, **config)
    blocks = dataset.blocks()
    return Transforms.fit(steps(*declared), dataset.schema.feature_names, blocks, survey(blocks))


def steps(*declared):
    return TypeAdapter(Steps).validate_python(declared)


def table(x, **columns):
    return {**{f"c{j}": x[:, j] for j in range(x.shape[1])}, **columns}


def same_bytes(a: Transforms, b: Transforms) -> bool:
    first, second = a.tensors(), b.tensors()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# Oracles


@pytest.mark.parametrize(("center", "tolerance"), [(0.0, 1e-13), (1e8, 1e-8)])
def test_standardize_is_scikit_learns(center, tolerance):
    x, weights = X + center, RNG.uniform(0, 3, len(X))
    transforms = fitted(["standardize"], table(x, w=weights), weight="w")
    # Of the centred rows, which have their digits: scikit-learn itself loses them far from 0.
    scaler = StandardScaler().fit(x - center, sample_weight=weights)
    np.testing.assert_allclose(transforms.steps[0].scale, scaler.scale_, rtol=tolerance)
    np.testing.assert_allclose(transforms.forward(x), scaler.transform(x - center), atol=10 * tolerance)


def correlated(widths: np.ndarray) -> np.ndarray:
    """Rows that vary by these widths along directions that no column follows."""
    rotation = np.linalg.qr(RNG.normal(size=(len(widths), len(widths))))[0]
    return RNG.normal(size=(4000, len(widths))) * widths @ rotation + 1.0


@pytest.mark.parametrize("widths", [np.linspace(1, 3, 6), np.logspace(-4, 4, 9)], ids=["alike", "from 1e-4 to 1e4"])
@pytest.mark.parametrize("whiten", [False, True])
def test_pca_is_scikit_learns(widths, whiten):
    x = correlated(widths)
    estimator = PCA(svd_solver="full").fit(x)
    signs = np.sign(estimator.components_[range(len(widths)), np.abs(estimator.components_).argmax(1)])
    # Biased, as of all transforms here: scikit-learn divides by N - 1.
    deviations = np.sqrt(estimator.explained_variance_ * (len(x) - 1) / len(x))
    transforms = fitted([{"pca": {"num_components": len(widths), "whiten": whiten}}], x)
    expected = (x - x.mean(0)) @ (estimator.components_ * signs[:, None]).T
    np.testing.assert_allclose(transforms.steps[0].directions, estimator.components_ * signs[:, None], atol=1e-10)
    np.testing.assert_allclose(transforms.forward(x).numpy() * (deviations if whiten else 1.0), expected, atol=1e-10)
    assert transforms.feature_names[:2] == ("pc_0", "pc_1")
    variances = transforms.forward(x).var(0, correction=0)
    np.testing.assert_allclose(variances, np.ones(len(widths)) if whiten else deviations**2, rtol=1e-6)


@pytest.mark.parametrize("share", [0.1, 0.8, 0.95, 0.999999])
def test_a_share_of_the_variance_keeps_as_many_directions_as_scikit_learn(share):
    transforms = fitted([{"pca": {"num_components": share}}], X)
    assert len(transforms.feature_names) == PCA(n_components=share, svd_solver="full").fit(X).n_components_


@pytest.mark.parametrize("regularization", [0.0, 0.5])
def test_whiten_is_the_inverse_square_root_of_the_covariance(regularization):
    covariance = np.cov(X.T, bias=True) + regularization * np.eye(5)
    expected = (X - X.mean(0)) @ np.linalg.inv(scipy.linalg.sqrtm(covariance))
    transforms = fitted([{"whiten": {"regularization": regularization}}], table(X))
    np.testing.assert_allclose(transforms.forward(X), expected, atol=1e-10)
    assert transforms.feature_names == ("c0", "c1", "c2", "c3", "c4")


def test_each_is_fitted_to_what_those_before_it_make():
    x = np.exp(X / 3)
    columns = ["c1", "c4"]
    transforms = fitted([{"log1p": {"columns": columns}}, "standardize", {"pca": {"num_components": 3}}], table(x))
    logs = x.copy()
    logs[:, [1, 4]] = np.log1p(x[:, [1, 4]])
    expected = PCA(3, svd_solver="full").fit_transform(StandardScaler().fit_transform(logs))
    np.testing.assert_allclose(transforms.forward(x).abs(), np.abs(expected), atol=1e-10)


# Blocks


def one_run_a_leaf(load, leaves, most, keep):
    return LocalBlocks(load, leaves, 1, keep)


DECLARED = ["standardize", {"whiten": {"regularization": 0.1}}, {"pca": {"num_components": 0.9, "whiten": True}}]


def test_fitted_over_any_run_of_leaves_they_are_the_same_bytes():
    assert same_bytes(fitted(DECLARED, X), fitted(DECLARED, X, one_run_a_leaf))
    assert same_bytes(fitted(DECLARED, X), fitted(DECLARED, X, lambda *args: LocalBlocks(args[0], args[1], 4, False)))


def test_fitted_with_two_threads_they_are_the_same_bytes():
    wide = RNG.normal(size=(2000, 200)) @ RNG.normal(size=(200, 200))
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            transforms = fitted(DECLARED, wide)
            results.append((transforms, transforms.forward(wide)))
    finally:
        torch.set_num_threads(before)
    assert same_bytes(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("kind", ALL_KINDS, ids=str)
def test_weight_two_is_the_row_twice_and_weight_zero_no_row(kind):
    weights = np.array([0.0, 1.0, 2.0])[RNG.integers(0, 3, len(X))]
    weighted = fitted([kind], table(X, w=weights), weight="w")
    repeated = fitted([kind], table(np.repeat(X, weights.astype(int), axis=0)))
    for name, tensor in weighted.tensors().items():
        np.testing.assert_allclose(tensor, repeated.tensors()[name], rtol=1e-10, atol=1e-12)


def test_more_features_than_rows():
    x = RNG.normal(size=(20, 70))
    transforms = fitted([{"pca": {"num_components": 19, "whiten": True}}], x)
    np.testing.assert_allclose(np.cov(transforms.forward(x).T, bias=True), np.eye(19), atol=1e-10)
    np.testing.assert_allclose(transforms.inverse(transforms.forward(x)), x, atol=1e-12)
    with pytest.raises(UserError, match="only 19 directions have any variance"):
        fitted([{"pca": {"num_components": 20, "whiten": True}}], x)


def test_blocks_behind_transforms_hold_transformed_rows():
    dataset = dataset_of(table(X, w=np.ones(len(X))), weight="w")
    transforms = fitted(DECLARED, table(X, w=np.ones(len(X))), weight="w")
    behind = type(dataset)(**{**vars(dataset), "transforms": transforms}).blocks()
    blocks = [block for leaves in behind.map_runs(lambda _, leaves: list(leaves), None) for block in leaves]
    np.testing.assert_allclose(torch.cat([block.x for block in blocks]), transforms.forward(X), atol=1e-12)
    assert torch.cat([block.rows for block in blocks]).tolist() == list(range(len(X)))
    assert all(block.weights is not None for block in blocks)


# Of some columns, among others of texts

MIXED = {
    "income": np.exp(RNG.normal(size=300) + 3),
    "country": RNG.choice(["de", "fr", "it"], 300),
    "age": RNG.normal(40, 10, 300),
    "rooms": RNG.integers(1, 9, 300),
}
OF_SOME = [{"log1p": {"columns": ["income"]}}, {"standardize": {"columns": ["income", "age"]}}]


def test_standardize_of_some_columns_leaves_the_others():
    x = np.exp(X / 3)
    x[7, 1] = np.nan
    transforms = fitted([{"standardize": {"columns": ["c1", "c4"]}}], table(x))
    z = transforms.forward(x).numpy()
    np.testing.assert_array_equal(z[:, [0, 2, 3]], x[:, [0, 2, 3]])
    np.testing.assert_allclose(z[:, [1, 4]], StandardScaler().fit_transform(x[:, [1, 4]]), atol=1e-12)
    np.testing.assert_array_equal(transforms.inverse(z)[:, [0, 2, 3]], x[:, [0, 2, 3]])
    assert transforms.left_names == {"c0", "c2", "c3"}
    scale = np.nanstd(x[:, [1, 4]], axis=0)
    expected = -(~np.isnan(x[:, [1, 4]]) * np.log(scale)).sum(1)
    np.testing.assert_allclose(transforms.log_abs_det(x), expected, atol=1e-12)
    again = Transforms.from_tensors(transforms.source_names, transforms.declared, transforms.tensors())
    assert torch.equal(again.forward(x).nan_to_num(), transforms.forward(x).nan_to_num())
    with pytest.raises(ValueError, match="not chosen has a mean or a scale"):
        Transforms.from_tensors(
            transforms.source_names, transforms.declared, {**transforms.tensors(), "0.mean": torch.ones(5).double()}
        )
    with pytest.raises(UserError, match=r"standardize\.columns has 'c9'; the features there are c0, c1"):
        fitted([{"standardize": {"columns": ["c9"]}}], table(x))


def test_a_model_of_texts_and_transformed_numbers_is_that_of_the_numbers_transformed_by_hand(tmp_path):
    spec = {"name": "a", "family": "naive_bayes", "model": {"kind": "mixed"}, "data": {}, "fit": {"max_iterations": 1}}
    spec["model"] |= {"num_classes": 1, "columns": {"income": "gaussian", "age": "gaussian", "rooms": "poisson"}}
    behind = gendist.fit({**spec, "data": {"transforms": OF_SOME}}, data=MIXED, run_dir=tmp_path / "run").model
    logs, age = np.log1p(MIXED["income"]), MIXED["age"]
    by_hand = {**MIXED, "income": (logs - logs.mean()) / logs.std(), "age": (age - age.mean()) / age.std()}
    plain = gendist.fit(spec, data=by_hand).model
    codes = np.searchsorted(["de", "fr", "it"], MIXED["country"])
    x, z = (np.stack([data["income"], codes, data["age"], data["rooms"]], axis=1) for data in (MIXED, by_hand))
    jacobian = -logs - np.log(logs.std()) - np.log(age.std())
    np.testing.assert_allclose(behind.log_prob(x), plain.log_prob(z).numpy() + jacobian, rtol=1e-9)
    sample = behind.sample(50, seed=3)
    np.testing.assert_array_equal(sample[:, [1, 3]], plain.sample(50, seed=3)[:, [1, 3]])
    loaded = gendist.load(tmp_path / "run")
    assert torch.equal(loaded.log_prob(x), behind.log_prob(x))
    gendist.bulk.sample(tmp_path / "run", 20, tmp_path / "new.csv")
    gendist.bulk.score(tmp_path / "run", DataConfig(path=str(tmp_path / "new.csv")), tmp_path / "scores.npy")
    assert np.isfinite(np.load(tmp_path / "scores.npy")).all()


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (
            "log1p",
            r"which log1p cannot transform; name the columns of numbers that it is of, as in {log1p: {columns: \[a, b\]}}",
        ),
        ("standardize", "which standardize cannot transform; name the columns of numbers"),
        ({"log1p": {"columns": ["income", "country"]}}, r"which log1p cannot transform; leave it out of log1p\.columns"),
        ("whiten", "which whiten mixes with others; leave one of both out"),
        ({"pca": {"num_components": 1}}, "which pca mixes with others; leave one of both out"),
    ],
)
def test_texts_that_a_step_would_transform_are_refused(step, expected):
    spec = {"name": "a", "family": "naive_bayes", "model": {"kind": "mixed", "num_classes": 1}}
    with pytest.raises(UserError, match=f"data.transforms: column 'country' holds texts, {expected}"):
        gendist.fit({**spec, "data": {"transforms": [step]}}, data=MIXED)


# There and back


@pytest.mark.parametrize("kind", ALL_KINDS, ids=str)
def test_there_and_back_is_the_row(kind):
    x = np.exp(X / 3)
    transforms = fitted(["log1p", kind], x)
    np.testing.assert_allclose(transforms.inverse(transforms.forward(x)), x, rtol=1e-10, atol=1e-10)


def test_behind_a_pca_that_drops_directions_there_and_back_is_the_projection():
    estimator = PCA(2, svd_solver="full").fit(X)
    transforms = fitted([{"pca": {"num_components": 2, "whiten": True}}], X)
    projected = transforms.inverse(transforms.forward(X))
    np.testing.assert_allclose(projected, estimator.inverse_transform(estimator.transform(X)), atol=1e-10)
    np.testing.assert_allclose(transforms.inverse(transforms.forward(projected)), projected, atol=1e-10)


@pytest.mark.parametrize("kind", ALL_KINDS, ids=str)
def test_the_jacobian_is_that_of_autograd(kind):
    x = torch.from_numpy(np.exp(X / 3))
    transforms = fitted([{"log1p": {"columns": ["c0", "c3"]}}, "standardize", kind], table(x.numpy()))

    def forward(row):
        for step in transforms.steps:
            row = step.forward(row[None])[0]
        return row

    for row in x[:5]:
        expected = torch.linalg.slogdet(torch.autograd.functional.jacobian(forward, row)).logabsdet
        torch.testing.assert_close(transforms.log_abs_det(row[None])[0], expected, rtol=0, atol=1e-10)


def test_behind_a_pca_that_drops_directions_the_jacobian_is_that_from_its_coordinates():
    transforms = fitted(["standardize", {"pca": {"num_components": 2, "whiten": True}}, "log1p"], X[:20] / 100)
    plain = fitted(["standardize", {"pca": {"num_components": 2}}], X[:20] / 100)
    coordinates = plain.forward(X[:20] / 100)
    deviations = coordinates.std(0, correction=0)
    expected = -deviations.log().sum() - (coordinates / deviations).log1p().sum(1)
    kept = (coordinates / deviations > -1).all(1)
    torch.testing.assert_close(transforms.log_abs_det((X[:20] / 100)[kept]), expected[kept], rtol=0, atol=1e-9)


def test_a_row_comes_back_the_same_whatever_rows_stand_beside_it():
    transforms = fitted(["standardize", {"whiten": {}}, {"pca": {"num_components": 4}}], X)
    z = transforms.forward(X)
    whole = transforms.inverse(z)
    for start, stop in ((0, 1), (3, 10), (1000, 2777)):
        assert torch.equal(transforms.inverse(z[start:stop]), whole[start:stop])


# What cannot be transformed


def with_holes() -> np.ndarray:
    x = np.exp(X / 3)
    x[RNG.random(x.shape) < 0.1] = np.nan
    return x


def test_missing_entries_stay_and_count_for_nothing():
    x = with_holes()
    transforms = fitted(["log1p", "standardize"], x)
    expected = StandardScaler().fit_transform(np.log1p(x))
    np.testing.assert_allclose(transforms.forward(x), expected, atol=1e-12)
    np.testing.assert_allclose(transforms.inverse(transforms.forward(x)), x, rtol=1e-12)
    # The Jacobian of the entries that are there.
    scale = np.nanstd(np.log1p(x), axis=0)
    expected = -np.nansum(np.log1p(x), axis=1) - (~np.isnan(x) * np.log(scale)).sum(1)
    np.testing.assert_allclose(transforms.log_abs_det(x), expected, atol=1e-10)


@pytest.mark.parametrize("kind", [{"whiten": {}}, {"pca": {"num_components": 2}}], ids=str)
def test_whiten_and_pca_refuse_missing_entries(kind):
    x = X.copy()
    x[1234, 3] = np.nan
    for before in ([], ["standardize"]):
        with pytest.raises(UserError, match=r"row 1234: column 'c3' is missing; whiten and pca take complete rows"):
            fitted([*before, kind], table(x))
    with pytest.raises(RowError, match="row 4: column 'c3' is missing") as caught:
        fitted([kind], table(X)).forward(x[1230:])
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_log1p_names_the_row_and_the_column_of_what_it_cannot_take():
    x = np.exp(X)
    x[2500, 1] = -1.0
    with pytest.raises(UserError, match=r"row 2500: column 'c1' is -1; log1p takes numbers above -1"):
        fitted(["log1p", "standardize"], table(x))
    dataset = dataset_of(table(x))
    behind = type(dataset)(**{**vars(dataset), "transforms": fitted(["log1p"], table(x))})
    with pytest.raises(UserError, match="row 2500: column 'c1'"):
        survey(behind.blocks())
    fitted([{"log1p": {"columns": ["c0", "c2"]}}, "standardize"], table(x))
    with pytest.raises(UserError, match=r"log1p\.columns has 'c9'; the features there are c0, c1"):
        fitted([{"log1p": {"columns": ["c9"]}}], table(x))


def test_a_constant_column_is_only_centred_and_said_so(caplog):
    x = X.copy()
    x[:, 2] = 0.1
    with caplog.at_level(logging.WARNING, logger="gendist"):
        transforms = fitted(["standardize"], table(x))
    assert "1 column is constant, and only centred: c2" in caplog.text
    assert not transforms.forward(x)[:, 2].any()
    assert torch.equal(transforms.inverse(transforms.forward(x))[:, 2], torch.from_numpy(x[:, 2]))
    with pytest.raises(UserError, match="1 of 5 directions have no variance"):
        fitted([{"whiten": {}}], table(x))
    with pytest.raises(UserError, match="only 5 features are there"):
        fitted([{"pca": {"num_components": 6}}], table(x))


def test_rows_of_another_width_are_refused():
    transforms = fitted(["standardize"], X)
    with pytest.raises(UserError, match=r"\(N, 5\) is needed"):
        transforms.forward(X[:, :4])
    with pytest.raises(UserError, match=r"\(N, 5\) is needed"):
        transforms.inverse(X[0])


# As tensors, and as written


def test_of_their_tensors_they_are_made_again():
    transforms = fitted(["log1p", *DECLARED], np.exp(X))
    again = Transforms.from_tensors(transforms.source_names, transforms.declared, transforms.tensors())
    assert same_bytes(transforms, again)
    assert torch.equal(again.forward(np.exp(X)), transforms.forward(np.exp(X)))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("0.mean", torch.zeros(4)),
        ("0.scale", torch.zeros(5)),
        ("0.mean", torch.full((5,), math.nan)),
        ("1.directions", torch.ones(5, 5, dtype=torch.float64)),
        ("1.directions", torch.ones(5, dtype=torch.float64)),
        ("2.directions", torch.eye(4, dtype=torch.float64)),
        ("3.mean", torch.zeros(5)),
        ("0.nonsense", torch.zeros(5)),
    ],
)
def test_tensors_that_do_not_fit_are_refused(name, value):
    transforms = fitted(["standardize", {"whiten": {}}, {"pca": {"num_components": 2}}], X)
    with pytest.raises((ValueError, KeyError, TypeError)):
        Transforms.from_tensors(transforms.source_names, transforms.declared, {**transforms.tensors(), name: value})


SPEC = {"name": "a", "family": "gmm", "model": {"num_components": 1}}


def test_a_declaration_is_written_as_it_is_read():
    written = [
        "log1p",
        "standardize",
        OF_SOME[1],
        {"whiten": {"regularization": 0.5}},
        {"pca": {"num_components": 0.5, "whiten": True}},
    ]
    spec = load_spec({**SPEC, "data": {"transforms": written}})
    again = load_spec(spec.model_dump(mode="json"))
    assert again == spec
    assert spec.model_dump(mode="json")["data"]["transforms"] == [{"log1p": {"columns": None}}, *written[1:]]


@pytest.mark.parametrize(
    ("transforms", "expected"),
    [
        (["standardise"], "unknown key 'standardise' in data.transforms.0; did you mean 'standardize'"),
        (
            [{"pca": {"num_component": 3}}],
            "unknown key 'num_component' in data.transforms.0.pca; did you mean 'num_components'",
        ),
        (["log1p", "pca"], "data.transforms.1.pca.num_components is missing"),
        ([{"pca": {"num_components": 0}}], "give a whole number from 1 on, or a share"),
        ([{"pca": {"num_components": 1.0}}], "give a whole number from 1 on, or a share"),
        ([{"pca": {"num_components": True}}], "give a whole number from 1 on, or a share"),
        ([{"whiten": {}, "log1p": {}}], "data.transforms.0: a step is one name"),
        ([3], "data.transforms.0: a step is one name"),
        ("standardize", "data.transforms: a list is needed"),
        ([{"whiten": {"regularization": -1}}], "data.transforms.0.whiten.regularization"),
    ],
)
def test_a_mistake_in_a_declaration_is_one_line(transforms, expected):
    with pytest.raises(UserError) as caught:
        load_spec({**SPEC, "data": {"transforms": transforms}})
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
