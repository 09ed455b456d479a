"""A mixture for each class: against the mixtures themselves, enumeration of the classes, and the identities of labels."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

import gendist
from gendist.blocks import Leaves, LocalBlocks, reduce
from gendist.class_conditional import class_conditional
from gendist.models.gmm import GaussianMixture
from gendist.protocols import Block, GenerativeModel, UserError

SPEC = {
    "name": "classes",
    "family": "gmm",
    "model": {"num_components": 2, "labels": "classes"},
    "data": {"label": "y", "columns": ["x"]},
    "fit": {"tolerance": 1e-9, "max_iterations": 200},
}


@pytest.fixture(scope="module")
def data() -> dict:
    """Two classes of two clusters each, far enough apart to have one best mixture."""
    rng = np.random.default_rng(0)
    y = np.array(["no", "yes"])[(rng.random(600) < 0.4).astype(int)]
    centers = {"no": [[0, 0], [6, 0]], "yes": [[0, 6], [6, 6]]}
    x = np.array([centers[label][i] for label, i in zip(y, rng.integers(0, 2, 600), strict=True)])
    return {"x": x + rng.normal(size=(600, 2)) * [1.0, 0.7], "y": y}


@pytest.fixture(scope="module")
def model(data):
    return gendist.fit(SPEC, data=data).model


def block_of(x, evidence=None, weights=None) -> Block:
    given = {"evidence": evidence, "weights": weights}
    as_double = {name: None if v is None else torch.as_tensor(v, dtype=torch.float64) for name, v in given.items()}
    return Block(torch.from_numpy(x), torch.arange(len(x)), **as_double)


def hard(y) -> np.ndarray:
    return np.where(np.array(["no", "yes"]) == np.asarray(y)[:, None], 0.0, -np.inf)


def assert_same(one, other, rtol: float = 1e-9) -> None:
    for (name, a), b in zip(one.tensors().items(), other.tensors().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=1e-9, msg=name)


def test_it_keeps_the_protocol(model):
    assert isinstance(model, GenerativeModel)
    assert model.labels == ("no", "yes")
    with pytest.raises(AttributeError):
        _ = model.decode
    assert "decode" in model.not_offered
    assert repr(model) == "ClassConditionalGaussianMixture(num_components=2, num_features=2, num_labels=2)"


def test_with_all_labels_each_class_has_the_mixture_of_its_rows(data, model):
    for c, label in enumerate(("no", "yes")):
        own = data["x"][data["y"] == label]
        alone = gendist.fit({**SPEC, "model": {"num_components": 2}, "data": {}}, data=own).model
        order, same = (torch.argsort(m.means[:, 0]) for m in (model.models[c], alone))
        torch.testing.assert_close(model.models[c].means[order], alone.means[same], rtol=1e-3, atol=1e-3)
        assert float(model.weights[c]) == pytest.approx(len(own) / 600)


def test_the_joint_density_is_that_of_the_parts(data, model):
    x = data["x"][:50]
    joint = np.stack([np.log(float(w)) + m.log_prob(x).numpy() for w, m in zip(model.weights, model.models, strict=True)], 1)
    np.testing.assert_allclose(model.joint_log_prob(x), joint, rtol=1e-12)
    np.testing.assert_allclose(model.log_prob(x), np.logaddexp.reduce(joint, 1), rtol=1e-12)
    np.testing.assert_allclose(model.classify(x), joint - np.logaddexp.reduce(joint, 1, keepdims=True), atol=1e-9)


def test_known_classes_are_counted(data, model):
    statistics = model.e_step(block_of(data["x"], hard(data["y"])))
    rows = [data["x"][data["y"] == label] for label in ("no", "yes")]
    expected = sum(
        len(own) * np.log(float(w)) + float(m.log_prob(own).sum())
        for own, w, m in zip(rows, model.weights, model.models, strict=True)
    )
    assert statistics.log_likelihood == pytest.approx(expected, rel=1e-12)
    updated = model.m_step(statistics).model
    for own, old, new in zip(rows, model.models, updated.models, strict=True):
        assert_same(new, old.m_step(old.e_step(block_of(own))).model)


def test_soft_labels_are_an_enumeration_of_the_classes(data, model):
    x, weights = data["x"], np.arange(600) % 3
    evidence = np.log(np.random.default_rng(1).dirichlet([1, 1], 600))
    joint = model.joint_log_prob(x).numpy() + evidence
    total = np.logaddexp.reduce(joint, 1)
    statistics = model.e_step(block_of(x, evidence, weights))
    assert statistics.log_likelihood == pytest.approx((weights * total).sum(), rel=1e-12)
    known = np.repeat(np.where(np.eye(2) == 1, 0.0, -np.inf), 600, axis=0)
    shares = (np.exp(joint - total[:, None]) * weights[:, None]).T.reshape(-1)
    twice = model.e_step(block_of(np.tile(x, (2, 1)), known, shares))
    assert_same(model.m_step(statistics).model, model.m_step(twice).model)


@pytest.mark.parametrize("share", [1.0, 0.3])
def test_weight_two_is_the_row_twice_and_weight_zero_no_row(data, model, share):
    evidence = np.where(np.arange(600)[:, None] < 600 * share, hard(data["y"]), 0.0)
    weights = np.random.default_rng(2).integers(0, 3, 600)
    index = np.repeat(np.arange(600), weights)
    one = model.e_step(block_of(data["x"], evidence, weights))
    other = model.e_step(block_of(data["x"][index], evidence[index]))
    assert one.log_likelihood == pytest.approx(other.log_likelihood, rel=1e-12)
    assert_same(model.m_step(one).model, model.m_step(other).model)


def test_rows_without_a_label_help_where_the_model_is_right(data):
    few = np.where(np.arange(600) < 40, data["y"], None)
    semi = gendist.fit(SPEC, data={"x": data["x"], "y": few})
    assert semi.results["iterations_that_fell"] == []
    predicted = np.array(semi.model.labels)[semi.model.classify(data["x"]).argmax(1).numpy()]
    assert (predicted == data["y"]).mean() > 0.99


def test_statistics_are_the_same_bytes_for_every_run_of_leaves(data, model):
    evidence = torch.from_numpy(np.where(np.arange(600)[:, None] < 300, hard(data["y"]), 0.0))
    x = torch.from_numpy(data["x"])

    def load(bounds):
        return [Block(x[a:b], torch.arange(a, b), evidence=evidence[a:b]) for a, b in itertools.pairwise(bounds)]

    bounds = Leaves((0, 100, 100, 250, 400, 600))
    step = type(model.plain).e_step
    tensors = [model.m_step(reduce(step, LocalBlocks(load, bounds, most), model)).model.tensors() for most in (1, 2, 5)]
    assert all(torch.equal(tensor, other[name]) for other in tensors[1:] for name, tensor in tensors[0].items())


def test_samples_are_windows_and_have_the_classes(data, model):
    whole = model.sample(100, seed=3)
    assert torch.equal(torch.cat([model.sample(40, seed=3), model.sample(60, seed=3, offset=40)]), whole)
    own = model.sample(4000, seed=1, given="yes")
    np.testing.assert_allclose(own.mean(0), data["x"][data["y"] == "yes"].mean(0), atol=0.3)
    np.testing.assert_allclose(model.sample(20_000, seed=2).mean(0), data["x"].mean(0), atol=0.3)
    with pytest.raises(UserError, match="labels are no, yes"):
        model.sample(1, given="maybe")


def test_saved_and_loaded_it_is_the_same(data, model, tmp_path):
    run = gendist.fit(SPEC, data=data, run_dir=tmp_path / "run")
    loaded = gendist.load(run.path)
    assert isinstance(loaded, class_conditional(GaussianMixture))
    assert_same(loaded, run.model, rtol=0.0)
    assert torch.equal(loaded.classify(data["x"]), run.model.classify(data["x"]))
    assert_same(model, run.model, rtol=0.0)
    gone_on = gendist.fit({**SPEC, "fit": {"init": str(run.path), "max_iterations": 1}}, data=data)
    assert gone_on.history[0]["log_likelihood"] == pytest.approx(run.results["log_likelihood"], rel=1e-9)


def test_what_does_not_fit_is_told_in_one_line(data):
    with pytest.raises(UserError, match=r"data\.label"):
        gendist.fit({**SPEC, "data": {}}, data=data["x"])
    rare = np.where(np.arange(600) == 0, "maybe", data["y"])
    with pytest.raises(UserError, match=r"class maybe: model.num_components is 2, but there are only 1 rows"):
        gendist.fit(SPEC, data={"x": data["x"], "y": rare})


@pytest.mark.ray
def test_any_number_of_workers_ends_in_the_same_bytes(cluster, data, tmp_path):
    few, found = np.where(np.arange(600) < 300, data["y"], None), set()
    for num_workers in (0, 1, 2):
        spec = {**SPEC, "cluster": {"num_workers": num_workers}, "fit": {"max_iterations": 3, "tolerance": 0}}
        gendist.fit(spec, data={"x": data["x"], "y": few}, run_dir=tmp_path / str(num_workers))
        found.add((tmp_path / str(num_workers) / "artifact" / "model.safetensors").read_bytes())
    assert len(found) == 1


def test_missing_entries_weights_and_labels_together(data, model):
    """An enumeration of the classes of rows that lack entries, some of them labelled, with weights."""
    x = np.where(np.random.default_rng(5).random(data["x"].shape) < 0.2, np.nan, data["x"])
    evidence = np.where(np.arange(600)[:, None] < 200, hard(data["y"]), 0.0)
    weights = np.arange(600) % 3
    joint = np.stack([np.log(float(w)) + m.log_prob(x).numpy() for w, m in zip(model.weights, model.models, strict=True)], 1)
    joint += evidence
    total = np.logaddexp.reduce(joint, 1)
    missing = torch.from_numpy(np.isnan(x))

    def e_step(index, known, shares):
        block = block_of(np.nan_to_num(x[index]), known, shares)
        return model.e_step(replace(block, missing=missing[index]))

    statistics = e_step(np.arange(600), evidence, weights)
    assert statistics.log_likelihood == pytest.approx((weights * total).sum(), rel=1e-12)
    known = np.repeat(np.where(np.eye(2) == 1, 0.0, -np.inf), 600, axis=0)
    shares = (np.exp(joint - total[:, None]) * weights[:, None]).T.reshape(-1)
    assert_same(
        model.m_step(statistics).model, model.m_step(e_step(np.tile(np.arange(600), 2), known, shares)).model, rtol=1e-7
    )
    filled = model.impute(x)
    assert bool(filled.isfinite().all())
    assert torch.equal(filled[~missing], torch.from_numpy(x)[~missing])
    drawn = model.impute(x, seed=1)
    assert torch.equal(drawn[~missing], filled[~missing])


def test_the_class_that_fills_in_a_sequence_is_that_of_its_steps_wherever_a_request_begins():
    rng = np.random.default_rng(0)
    sequences = [rng.normal(3.0 * (i % 2), 0.5, (5, 1)) for i in range(20)]
    frame = pd.DataFrame(
        {"id": np.repeat(np.arange(20), 5), "x": np.concatenate(sequences)[:, 0], "y": np.repeat(["a", "b"] * 10, 5)}
    )
    spec = {"name": "s", "family": "hmm", "model": {"num_states": 1, "labels": "classes"}}
    spec |= {"data": {"sequence": "id", "label": "y", "columns": ["x"]}, "fit": {"max_iterations": 2}}
    model = gendist.fit(spec, data=frame).model
    gaps = [np.full((length, 1), np.nan) for length in (5, 2, 0, 7, 5, 3, 9, 1)]
    together, first_step = model.impute(gaps, seed=3), 0
    for gap, filled in zip(gaps, together, strict=True):
        assert torch.equal(model.impute([gap], seed=3, offset=first_step)[0], filled)
        first_step += len(gap)


def test_a_single_class_has_the_mixture_of_all_rows(data):
    spec = {**SPEC, "model": {"num_components": 1, "labels": "classes"}}
    one = gendist.fit(spec, data={"x": data["x"], "y": np.where(np.arange(600) < 3, "yes", None)}).model
    np.testing.assert_allclose(one.models[0].means[0], data["x"].mean(0), rtol=1e-9)
    assert one.weights.tolist() == [1.0]


def test_a_class_that_has_no_rows_is_told_when_it_lost_them(data, model):
    rows_of_no = data["y"] == "no"
    block = block_of(data["x"][rows_of_no], hard(data["y"][rows_of_no]))
    update = model.m_step(model.e_step(block))
    assert "class yes: no rows; the model stays" in update.repairs
    assert not any("no rows" in line for line in update.model.m_step(update.model.e_step(block)).repairs)
