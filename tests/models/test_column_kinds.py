"""Which kind a column of kind mixed is taken to be, and what is said of it."""

from __future__ import annotations

import json
import logging

import numpy as np
import pandas as pd
import pytest
import torch

import gendist

RNG = np.random.default_rng(0)
CLASS = RNG.integers(0, 2, 400)
FRAME = pd.DataFrame(
    {
        "income": RNG.normal(30_000 + 9_000 * CLASS, 3_000).round().astype(int),
        "visits": RNG.poisson(2 + 3 * CLASS),
        "age": RNG.integers(18, 80, 400),
        "rare": np.where(np.arange(400) % 40 == 0, 60, 0),
        "member": RNG.integers(0, 2, 400),
        "height": RNG.normal(size=400),
        "customer": [f"c{i}" for i in range(400)],
        "city": RNG.choice(["rome", "oslo", "bern"], 400),
        "label": CLASS,
    }
)
SPEC = {"name": "kinds", "family": "naive_bayes", "model": {"kind": "mixed"}, "data": {"label": "label"}}
FOUND = {
    "income": "gaussian",
    "visits": "poisson",
    "age": "poisson",
    "rare": "poisson",
    "member": "bernoulli",
    "height": "gaussian",
    "customer": "categorical",
    "city": "categorical",
}


def test_whole_numbers_too_far_apart_for_counts_are_gaussian(tmp_path):
    """As poisson, incomes would have log p(true class) of hundreds of nats below 0."""
    run = gendist.fit(SPEC, data=FRAME, run_dir=tmp_path / "run")
    assert run.model.kinds == FOUND
    assert gendist.load(tmp_path / "run").kinds == FOUND
    of_class = run.model.classify(FRAME)[torch.arange(400), torch.from_numpy(CLASS)]
    assert float(of_class.mean()) > -1.0


def test_it_is_said_which_kinds_were_taken_and_which_look_wrong(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "gendist"):
        run = gendist.fit(SPEC, data=FRAME, run_dir=tmp_path / "run")
    (kinds,) = [record.message for record in caplog.records if record.message.startswith("columns taken as")]
    expected = "gaussian: income, height; poisson: visits, age, rare; bernoulli: member; categorical: customer, city"
    assert kinds == f"columns taken as {expected}"
    warnings = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    of_texts, of_counts = warnings
    assert "column 'customer' is taken as categorical, but has 400 different texts in 400 rows" in of_texts
    assert "column 'rare' is taken as poisson, but a variance is up to" in of_counts
    assert "declare it with model.columns: {rare: gaussian}" in of_counts
    description = json.loads((tmp_path / "run" / "manifest.json").read_text())["results"]["description"]
    assert description[0] == kinds
    assert [line in warning for line, warning in zip(description[1:], warnings, strict=True)] == [True, True]
    assert run.results["description"] == description


def test_what_is_declared_is_no_matter_of_remarks(caplog):
    columns = {"rare": "poisson", "customer": "categorical", "income": "poisson"}
    with caplog.at_level(logging.WARNING, "gendist"):
        run = gendist.fit({**SPEC, "model": {"kind": "mixed", "columns": columns}}, data=FRAME)
    assert not caplog.records
    assert run.model.kinds == FOUND | {"income": "poisson"}


def test_models_of_classes_have_the_kinds_of_all_rows():
    """Else the density of one class would stand beside the probability of another."""
    label = np.repeat([0, 1], 60)
    sales = np.where(label == 1, RNG.poisson(20, 120), RNG.integers(0, 1_000, 120))
    frame = pd.DataFrame({"id": np.arange(120) // 10, "sales": sales, "label": label})
    spec = {"name": "sales", "family": "hmm", "data": {"sequence": "id", "label": "label"}}
    spec["model"] = {"num_states": 1, "labels": "classes", "emission": {"kind": "mixed"}}
    model = gendist.fit(spec, data=frame).model
    assert model.kinds == {"sales": "gaussian"}
    assert [each.kinds for each in model.models] == [("gaussian",)] * 2


@pytest.mark.parametrize(("kind", "expected"), [("gaussian", "gaussian"), ("poisson", "poisson")])
def test_a_kind_of_all_columns_is_theirs(kind, expected):
    model = gendist.fit({**SPEC, "model": {"kind": kind}}, data=FRAME[["visits", "age", "label"]]).model
    assert model.kinds == {"visits": expected, "age": expected}


def test_features_of_one_column_have_one_remark():
    rng = np.random.default_rng(0)
    x = np.where(rng.random((300, 6)) < 0.05, rng.integers(50, 250, (300, 6)), 0).astype(float)
    run = gendist.fit({"name": "pixels", "family": "naive_bayes", "model": {"kind": "mixed", "num_classes": 1}}, data={"x": x})
    (line,) = [line for line in run.results["description"] if "poisson, but" in line]
    number = list(run.model.kinds.values()).count("poisson")
    assert number > 1
    assert f"{number} features of column 'x' are taken as poisson" in line
