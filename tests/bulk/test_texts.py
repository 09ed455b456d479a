"""Models of texts: samples are written as texts, and scores read texts by the values that the fit saw."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch

import gendist
from gendist import bulk, em_fitting
from gendist.artifact import load_artifact
from gendist.bulk.parts import Layout
from gendist.data import DataConfig
from gendist.protocols import UserError

RNG = np.random.default_rng(0)
FRAME = pd.DataFrame({
    "colour": np.array(["red", "green", "blue"])[RNG.integers(0, 3, 300)],
    "count": RNG.integers(0, 4, 300),
    "kind, of": np.array(["a", 'b "quoted"'])[RNG.integers(0, 2, 300)],
})  # fmt: skip
TEXTS = pd.DataFrame({"body": np.array(["the fox", "a dog and the fox", "dog dog"])[RNG.integers(0, 3, 300)]})


def fit(counter, path, data, **config):
    spec = {"name": "texts", "family": counter, "model": {}, "data": config, "fit": {"max_iterations": 2}}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(em_fitting, "draw_samples", lambda *_: None)  # which takes longer than all the rest
        return gendist.fit(spec, data=data, run_dir=path)


@pytest.fixture(scope="module")
def run(counter, tmp_path_factory):
    """Fitted to FRAME."""
    return fit(counter, tmp_path_factory.mktemp("texts") / "run", FRAME)


def as_texts(values: np.ndarray) -> pd.DataFrame:
    """What stands for the samples of `counter` in the columns of FRAME, which are 0 to 3."""
    categories = {"colour": ["blue", "green", "red"], "kind, of": ["a", 'b "quoted"']}
    columns = {}
    for name, column in zip(FRAME.columns, values.T, strict=True):
        known = categories.get(name)
        columns[name] = column if known is None else [known[int(v)] if v < len(known) else None for v in column]
    return pd.DataFrame(columns)


@pytest.mark.parametrize("name", ["all.parquet", "all.csv", "parts"])
def test_samples_are_written_as_texts(run, tmp_path, name):
    bulk.sample(run.path, 200, tmp_path / name, seed=3, offset=5)
    read = pd.read_csv if name.endswith(".csv") else pd.read_parquet
    there = read(tmp_path / name)
    expected = as_texts(run.model.sample(200, seed=3, offset=5).numpy())
    assert expected["colour"].isna().any()  # an index beyond the texts is none of them
    assert there.columns.tolist() == expected.columns.tolist()
    for column in expected:
        assert there[column].fillna("none").tolist() == expected[column].fillna("none").tolist()
    if name == "all.parquet":
        metadata = pq.read_metadata(tmp_path / name).row_group(0)
        assert metadata.column(0).has_dictionary_page
        assert not metadata.column(1).has_dictionary_page


def test_an_array_has_the_indices(run, tmp_path):
    bulk.sample(run.path, 50, tmp_path / "all.npy", seed=3)
    np.testing.assert_array_equal(np.load(tmp_path / "all.npy"), run.model.sample(50, seed=3).numpy())


def test_scores_read_texts_by_the_values_of_the_fit(run, tmp_path):
    rows = FRAME.iloc[:40].copy()
    rows.loc[3, "colour"] = "violet"
    rows = rows[rows["colour"] != "blue"]  # so that texts found anew would have other indices
    rows.to_parquet(tmp_path / "rows.parquet", index=False)
    bulk.score(run.path, DataConfig(path=str(tmp_path / "rows.parquet")), tmp_path / "scores.npy")
    index = {"colour": {"blue": 0, "green": 1, "red": 2, "violet": 3}, "kind, of": {"a": 0, 'b "quoted"': 1}}
    x = np.stack([rows[name].map(index[name]) if name in index else rows[name] for name in FRAME.columns], axis=1)
    np.testing.assert_array_equal(np.load(tmp_path / "scores.npy"), run.model.log_prob(x.astype(float)))


@pytest.mark.parametrize("hash_buckets", [0, 4])
def test_scores_read_bodies_of_text(counter, tmp_path, hash_buckets):
    text = {"column": "body", "hash_buckets": hash_buckets}
    run = fit(counter, tmp_path / "run", TEXTS, text=text)
    other = pd.DataFrame({"z": [1.0, 2.0, 3.0], "body": ["dog fox fox unheard", None, ""]})
    other.to_parquet(tmp_path / "rows.parquet", index=False)
    for name, config in (("a", {}), ("b", {"text": text})):
        bulk.score(tmp_path / "run", DataConfig(path=str(tmp_path / "rows.parquet"), **config), tmp_path / f"{name}.npy")
    scores = np.load(tmp_path / "a.npy")
    np.testing.assert_array_equal(scores, np.load(tmp_path / "b.npy"))
    if hash_buckets == 0:
        names = load_artifact(tmp_path / "run").schema.feature_names
        x = torch.tensor([[{"dog": 1.0, "fox": 2.0}.get(name, 0.0) for name in names], [0.0] * 4, [0.0] * 4]).double()
        np.testing.assert_allclose(scores, run.model.log_prob(x), rtol=1e-14)
    assert scores[1] == scores[2]
    other_text = DataConfig(path=str(tmp_path / "rows.parquet"), text=text | {"min_count": 7})
    with pytest.raises(UserError, match="counted tokens otherwise"):
        bulk.score(tmp_path / "run", other_text, tmp_path / "c.npy")


def test_an_artifact_says_whether_an_older_gendist_can_read_it(counter, tmp_path):
    for name, data, config, version in (
        ("numbers", FRAME[["count"]], {}, 1),
        ("categories", FRAME, {}, 3),
        ("texts", TEXTS, {"text": {"column": "body"}}, 3),
    ):
        fit(counter, tmp_path / name, data, **config)
        description = json.loads((tmp_path / name / "artifact" / "model.json").read_text())
        assert description["format_version"] == version
        allowed = {"columns", "feature_names", "image_shape"} if version == 1 else set(description["schema"])
        assert set(description["schema"]) <= allowed


def test_a_table_of_values_that_are_no_index_has_no_text_there():
    layout = Layout(("a", "b"), "x", categories={"b": ("no", "yes")})
    table = layout.table(np.array([[0.5, 0.0], [1.5, 1.0], [2.5, 2.0], [3.5, np.nan], [4.5, -1.0]]), 0)
    assert table.to_pydict() == {"a": [0.5, 1.5, 2.5, 3.5, 4.5], "b": ["no", "yes", None, None, None]}


@pytest.mark.parametrize("hash_buckets", [0, 4])
@pytest.mark.parametrize("name", ["all.parquet", "parts"])
def test_samples_of_sparse_rows_are_sparse_rows_that_the_model_reads(counter, tmp_path, name, hash_buckets):
    text = {"column": "body", "hash_buckets": hash_buckets}
    model = fit(counter, tmp_path / "run", TEXTS, text=text).model
    bulk.sample(tmp_path / "run", 200, tmp_path / name, seed=3)
    x = model.sample(200, seed=3)
    rows = pd.read_parquet(tmp_path / name)["body"]
    for row, expected in zip(rows, x.numpy(), strict=True):
        assert row["indices"].tolist() == np.flatnonzero(expected).tolist()
        assert row["values"].tolist() == expected[expected != 0].tolist()
        assert (row["type"], row["size"]) == (0, 4)
    bulk.score(tmp_path / "run", DataConfig(path=str(tmp_path / name)), tmp_path / "scores.npy")
    np.testing.assert_allclose(np.load(tmp_path / "scores.npy"), model.log_prob(x), rtol=1e-14)


@pytest.mark.parametrize("name", ["all.csv", "all.npy"])
def test_samples_of_sparse_rows_have_a_column_a_feature_where_a_format_knows_no_sparse_ones(counter, tmp_path, name):
    model = fit(counter, tmp_path / "run", TEXTS, text={"column": "body"}).model
    bulk.sample(tmp_path / "run", 200, tmp_path / name, seed=3)
    if name == "all.npy":
        values = np.load(tmp_path / name)
    else:
        frame = pd.read_csv(tmp_path / name)
        assert frame.columns.tolist() == ["and", "dog", "fox", "the"]
        values = frame.to_numpy()
    np.testing.assert_array_equal(values, model.sample(200, seed=3))
