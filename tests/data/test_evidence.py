"""Labels as evidence: certain, soft, declared or missing; and what a row without one weighs."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from blocks_of import dataset_of, evidence_of, joined

import gendist
from gendist.config import load_spec
from gendist.data.survey import survey
from gendist.protocols import UserError

RNG = np.random.default_rng(0)
X = RNG.normal(size=(200, 2))
PROBS = RNG.dirichlet([1.0, 1.0, 1.0], size=200)
PROBS[7] = [0.0, 1.0, 0.0]
SOFT = {"x": X, "cat": PROBS[:, 0].copy(), "dog": PROBS[:, 1].copy(), "eel": PROBS[:, 2].copy()}
for name in ("cat", "dog", "eel"):
    SOFT[name][5] = np.nan


def test_probabilities_of_classes_are_log_evidence():
    dataset = dataset_of(SOFT, label=["eel", "cat", "dog"])
    assert dataset.labels == ("eel", "cat", "dog")
    assert dataset.schema.columns == ("x",)
    evidence = evidence_of(dataset, 5)
    with np.errstate(divide="ignore"):
        expected = np.log(PROBS[:, [2, 0, 1]])
    known = np.arange(200) != 5
    np.testing.assert_array_equal(evidence[known, :3], expected[known])
    assert (evidence[known, 3:] == -np.inf).all()  # latents beyond the labels
    assert (evidence[5] == 0.0).all()
    assert evidence[7].tolist() == [-np.inf, -np.inf, 0.0, -np.inf, -np.inf]


def test_float32_probabilities_sum_to_one_well_enough():
    columns = {name: SOFT[name].astype(np.float32) for name in ("cat", "dog", "eel")}
    evidence_of(dataset_of({"x": X, **columns}, label=["cat", "dog", "eel"]), 3)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ((0.5, 0.6, 0.0), r"data.label \(cat, dog, eel\) are no probabilities in row 130: they sum to 1.1"),
        ((0.5, 0.5 - 2e-6, 0.0), "in row 130: they sum to 0.999998; they must be 0 or more and sum to 1, or all be missing"),
        ((1.5, -0.5, 0.0), "in row 130: 'dog' is -0.5"),
        ((0.5, 0.5, np.nan), "in row 130: 'eel' is missing, others are not"),
    ],
)
def test_what_is_no_probability_is_told_with_its_row(values, expected):
    columns = {name: SOFT[name].copy() for name in ("cat", "dog", "eel")}
    for name, value in zip(columns, values, strict=True):
        columns[name][130] = value
    with pytest.raises(UserError, match=expected) as caught:
        evidence_of(dataset_of({"x": X, **columns}, label=["cat", "dog", "eel"]), 3)
    assert "\n" not in str(caught.value)


def test_declared_labels_are_there_in_their_order_whether_rows_have_them_or_not():
    labels = ["b", None, "a", "b"]
    dataset = dataset_of({"x": X[:4], "y": labels}, label="y", labels=["c", "b", "a"])
    assert dataset.labels == ("c", "b", "a")
    inf = np.inf
    expected = [[-inf, 0, -inf, -inf], [0, 0, 0, 0], [-inf, -inf, 0, -inf], [-inf, 0, -inf, -inf]]
    np.testing.assert_array_equal(evidence_of(dataset, 4), expected)
    numbers = dataset_of({"x": X[:4], "y": [1.0, np.nan, 0.0, 1.0]}, label="y", labels=[0, 1, 2])
    assert numbers.labels == (0, 1, 2)
    assert dataset_of({"x": X[:2], "y": [None, None]}, label="y", labels=["a", "b"]).labels == ("a", "b")


def test_a_label_that_is_not_declared_is_told_with_its_row():
    labels = np.array(["a", "b"], dtype=object)[RNG.integers(0, 2, 200)]
    labels[150] = "z"
    with pytest.raises(
        UserError, match=r"column .y. holds .z. in row 150: labels out of range; data\.labels are .a., .b., .c."
    ):
        evidence_of(dataset_of({"x": X, "y": labels}, label="y", labels=["a", "b", "c"]), 3)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"label": ["cat"]}, "data.label: the name of a column is needed, or a list of two and more different columns"),
        ({"label": ["cat", "cat"]}, "data.label: the name of a column is needed, or a list of two and more different columns"),
        ({"label": 3}, "data.label: the name of a column is needed"),
        ({"labels": ["a"]}, "labels: of one column of labels, which data.label names"),
        ({"label": ["cat", "dog"], "labels": ["a"]}, "of columns of probabilities they are the columns' names"),
        ({"label": "y", "labels": []}, "data.labels: a list of different labels is needed"),
        ({"label": "y", "labels": ["a", "a"]}, "data.labels: a list of different labels is needed"),
        ({"label": "y", "labels": [1, 1.0]}, "data.labels: a list of different labels is needed"),
    ],
)
def test_a_spec_that_says_no_labels_is_told(data, expected):
    with pytest.raises(UserError, match=expected) as caught:
        load_spec({"name": "a", "family": "gmm", "model": {"num_components": 2}, "data": data})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "label", "expected"),
    [
        (SOFT, ["cat", "dgo"], "no column 'dgo'; did you mean 'dog'"),
        (SOFT | {"text": ["a"] * 200}, ["cat", "text"], "column 'text' is not numeric"),
        (SOFT, ["cat", "x"], "column 'x' holds fixed_size_list.*; a label is a number or a text"),
    ],
)
def test_columns_that_hold_no_probabilities_are_told(data, label, expected):
    with pytest.raises(UserError, match=expected):
        evidence_of(dataset_of(data, label=label), 2)


LABELS = np.where(RNG.random(200) < 0.7, None, (X[:, 0] > 0).astype(int).astype(object))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("factor", [0.0, 0.25, 1.0])
def test_an_unlabelled_row_weighs_its_part(factor, weighted):
    weights = RNG.uniform(0, 2, 200)
    data = {"x": X, "y": LABELS} | ({"w": weights} if weighted else {})
    options = {"label": "y"} | ({"weight": "w"} if weighted else {})
    blocks = dataset_of(data, **options).blocks(2, unlabelled_weight=factor)
    expected = np.where(LABELS == None, factor, 1.0) * (weights if weighted else 1.0)  # noqa: E711
    np.testing.assert_array_equal(torch.cat([block.weights_or_ones() for block in joined(blocks)]), expected)
    summary = survey(blocks)
    assert summary.total_weight == pytest.approx(expected.sum(), rel=1e-13)
    assert summary.num_weighted_rows == (expected > 0).sum()
    if factor == 1.0 and not weighted:
        assert all(block.weights is None for block in joined(blocks))


def fitted(data, factor: float, **fit):
    spec = {
        "name": "a",
        "family": "gmm",
        "model": {"num_components": 2},
        "data": {"label": "y", "weight": "w", "validation_fraction": 0.2},
        "fit": {"unlabelled_weight": factor, "max_iterations": 5, "tolerance": 0.0, **fit},
    }
    return gendist.fit(spec, data=data)


def test_a_fit_weighs_unlabelled_rows_as_if_their_weights_said_so():
    frame = pd.DataFrame({"a": X[:, 0], "b": X[:, 1], "y": LABELS, "w": 1.0})
    by_hand = frame.assign(w=np.where(frame["y"].isna(), 0.25, 1.0))
    one, other = fitted(frame, 0.25), fitted(by_hand, 1.0)
    assert torch.equal(one.model.means, other.model.means)
    assert one.results == other.results
    whole = fitted(frame, 1.0)
    assert not torch.equal(one.model.means, whole.model.means)


def test_a_weight_of_zero_leaves_the_unlabelled_rows_out():
    frame = pd.DataFrame({"a": X[:, 0], "b": X[:, 1], "y": LABELS, "w": 1.0})
    run = fitted(frame, 0.0, init="labels")
    held_out = dataset_of(frame, label="y", weight="w", validation_fraction=0.2)
    rows = torch.cat([block.rows for block in joined(held_out.blocks(part="training"))]).numpy()
    training = frame.iloc[rows]
    for label, mean in zip(run.model.labels, run.model.means, strict=True):
        np.testing.assert_allclose(mean, training[training["y"] == label][["a", "b"]].mean(), rtol=1e-12)


def test_a_weight_for_unlabelled_rows_needs_labels():
    spec = {"name": "a", "family": "gmm", "model": {"num_components": 2}, "fit": {"unlabelled_weight": 0.5}}
    with pytest.raises(UserError, match=r"fit\.unlabelled_weight is 0\.5, but no row has a label; name their column with data"):
        gendist.fit(spec, data=X)
    with pytest.raises(UserError, match=r"fit\.unlabelled_weight: input should be greater than or equal to 0"):
        gendist.fit(spec | {"fit": {"unlabelled_weight": -1}}, data=X)


def test_of_a_single_label_every_row_is_known():
    blocks = dataset_of({"x": X, "y": np.where(np.arange(200) < 5, "a", None)}, label="y").blocks(1, unlabelled_weight=0.0)
    assert all(bool(block.is_labelled.all()) and bool(block.has_one_latent.all()) for block in joined(blocks))
    assert survey(blocks).total_weight == 200.0


def test_numbers_and_texts_are_told_apart():
    with pytest.raises(UserError, match=r"holds '2' in row 0: .* data\.labels are 1, 2$"):
        evidence_of(dataset_of({"x": X[:2], "y": ["2", "1"]}, label="y", labels=[1, 2]), 2)
    with pytest.raises(UserError, match=r"holds 2 in row 0: .* data\.labels are '1', '2'$"):
        evidence_of(dataset_of({"x": X[:2], "y": [2, 1]}, label="y", labels=["1", "2"]), 2)


def test_a_share_of_rows_keeps_its_labels_and_all_that_are_held_out_do():
    labels = np.where(X[:, 0] > 0, "right", "left")
    columns = {"x": X, "y": labels}
    whole = evidence_of(dataset_of(columns, label="y"), 2)
    part = evidence_of(dataset_of(columns, label="y", label_fraction=0.3), 2)
    is_kept = (part != 0).any(1)
    np.testing.assert_array_equal(part[is_kept], whole[is_kept])
    assert abs(is_kept.sum() - 60) < 5 * (200 * 0.3 * 0.7) ** 0.5
    dataset = dataset_of(columns, label="y", label_fraction=0.3, validation_fraction=0.4)
    assert all(bool(block.is_labelled.all()) for block in joined(dataset.blocks(2, "validation", 0)))
    training = torch.cat([block.is_labelled for block in joined(dataset.blocks(2, "training", 0))])
    assert 0 < int(training.sum()) < len(training)
    with pytest.raises(UserError, match="no labels to keep"):
        load_spec({"name": "n", "family": "gmm", "model": {"num_components": 1}, "data": {"label_fraction": 0.5}})
