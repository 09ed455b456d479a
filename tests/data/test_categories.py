"""Columns of text as categories: the same numbers from every source, kept in the schema, and every mistake in one line."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from blocks_of import EVERYTHING, dataset_of, matrix_of, one_run_a_leaf

import gendist
from gendist import em_fitting
from gendist.data import DataConfig, Schema, source_of
from gendist.data import domains as domains_module
from gendist.data.survey import survey
from gendist.protocols import Feature, UserError

RNG = np.random.default_rng(0)
COLOURS = np.array(["red", "green", "blue", None], dtype=object)[RNG.integers(0, 4, 500)]
SIZES = np.array(["small", "large"], dtype=object)[RNG.integers(0, 2, 500)]
FRAME = pd.DataFrame({"colour": COLOURS, "length": RNG.normal(size=500), "size": SIZES})
EXPECTED = np.stack([
    [{"blue": 0.0, "green": 1.0, "red": 2.0, None: np.nan}[colour] for colour in COLOURS],
    FRAME["length"],
    [{"large": 0.0, "small": 1.0}[size] for size in SIZES],
], axis=1)  # fmt: skip


def handed_over(kind: str):
    table = pa.table({"colour": pa.array(COLOURS), "length": FRAME["length"], "size": pa.array(SIZES)})
    if kind == "dictionary":
        return table.set_column(0, "colour", table["colour"].dictionary_encode())
    frames = {"frame": FRAME, "category": FRAME.astype({"colour": "category", "size": "category"}), "table": table}
    return (
        frames[kind]
        if kind in frames
        else {name: FRAME[name].to_numpy(dtype=object) for name in ("colour", "size")} | {"length": FRAME["length"].to_numpy()}
    )


@pytest.mark.parametrize("kind", ["frame", "category", "table", "dictionary", "mapping"])
def test_a_text_is_the_index_of_its_value(kind):
    dataset = dataset_of(handed_over(kind), columns=["colour", "length", "size"])
    assert dataset.schema.categories == {"colour": ("blue", "green", "red"), "size": ("large", "small")}
    assert dataset.schema.features == (
        Feature("colour", "colour", "category", 3),
        Feature("length", "length", "real"),
        Feature("size", "size", "category", 2),
    )
    np.testing.assert_array_equal(matrix_of(dataset), EXPECTED)


@pytest.mark.parametrize("cuts", [(), (1,), (100, 100, 499)])
@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl"])
def test_the_same_rows_in_other_files_are_the_same_bytes(tmp_path, suffix, cuts):
    for i, (start, stop) in enumerate(itertools.pairwise((0, *cuts, 500))):
        part, path = FRAME.iloc[start:stop], tmp_path / f"{i}{suffix}"
        if suffix == ".parquet":
            table = pa.Table.from_pandas(part, preserve_index=False)
            if i % 2:
                table = table.set_column(0, "colour", table["colour"].cast(pa.string()).dictionary_encode())
            pq.write_table(table, path, row_group_size=70)
        elif suffix == ".csv":
            part.to_csv(path, index=False, float_format="%.17g")
        else:
            part.to_json(path, orient="records", lines=True, double_precision=15)
    here, there = dataset_of(FRAME), dataset_of(None, one_run_a_leaf, path=str(tmp_path))
    assert there.schema.categories == here.schema.categories
    if suffix != ".jsonl":  # whose writer rounds
        assert survey(there.blocks()).fingerprint == survey(here.blocks()).fingerprint
    np.testing.assert_allclose(matrix_of(there), EXPECTED, rtol=1e-12)


def test_a_known_schema_decides_what_a_text_is():
    known = dataset_of(FRAME).schema
    other = pd.DataFrame({"colour": ["green", "violet", None], "length": [0.0, 1.0, 2.0], "size": ["small", "tiny", "large"]})
    schema = Schema.of(source_of(other), DataConfig(), known=known)
    assert schema.categories == known.categories
    dataset = dataset_of(FRAME)
    reread = type(dataset).open(source_of(other), DataConfig(), schema, dataset.make_blocks)
    np.testing.assert_array_equal(matrix_of(reread), [[1, 0, 1], [3, 1, 2], [np.nan, 2, 0]])
    renamed = other.rename(columns={"colour": "farbe", "size": "groesse"})  # by position, as columns of numbers are
    assert Schema.of(source_of(renamed), DataConfig(), known=known).categories["farbe"] == ("blue", "green", "red")
    nothing = pa.table({"colour": pa.nulls(2), "length": [0.0, 1.0], "size": ["small", "large"]})
    schema = Schema.of(source_of(nothing), DataConfig(), known=known)
    assert np.isnan(matrix_of(type(dataset).open(source_of(nothing), DataConfig(), schema, dataset.make_blocks))[:, 0]).all()


def test_columns_are_what_arrow_says_they_are():
    columns = {
        "a": pa.array([1, 2], pa.int32()),
        "b": pa.array([True, False]),
        "c": pa.array([[1, 2], [3, 4]], pa.list_(pa.int8())),
        "d": pa.array([1.5, 2.5], pa.float32()),
        "e": pa.array(["x", "y"]),
        "f": pa.array([1, 2], pa.decimal128(5, 2)),
        "g": pa.array([[1.0], [2.0]]),
    }
    features = dataset_of(pa.table(columns)).schema.features
    assert [(f.name, f.column, f.type, f.num_categories) for f in features] == [
        ("a", "a", "integer", 0),
        ("b", "b", "boolean", 0),
        ("c_0", "c", "integer", 0),
        ("c_1", "c", "integer", 0),
        ("d", "d", "real", 0),
        ("e", "e", "category", 2),
        ("f", "f", "real", 0),
        ("g_0", "g", "real", 0),
    ]
    digits = dataset_of(None, source="digits", label="label").schema
    assert {(f.column, f.type) for f in digits.features} == {("image", "real")}
    assert len(Schema.model_validate(dataset_of(pa.table(columns)).schema.model_dump(mode="json")).features) == 8


def test_a_family_that_takes_no_texts_refuses_them_by_name(counter):
    spec = {"name": "texts", "family": "gmm", "model": {"num_components": 1}}
    with pytest.raises(UserError, match=r"column 'colour' is not numeric .*such as data.columns=\[length\]"):
        gendist.fit(spec, data=FRAME)
    with pytest.raises(UserError, match=r"column 'size' is not numeric"):
        gendist.fit(spec | {"data": {"columns": ["length", "size"]}}, data=FRAME)


def test_a_fit_keeps_the_texts_and_goes_on_from_them(counter, tmp_path, monkeypatch):
    monkeypatch.setattr(em_fitting, "draw_samples", lambda *_: None)
    data = FRAME.drop(columns="length").dropna()
    spec = {"name": "texts", "family": counter, "model": {}, "fit": {"max_iterations": 2}}
    run = gendist.fit(spec, data=data, run_dir=tmp_path / "run")
    from gendist.artifact import load_artifact

    artifact = load_artifact(tmp_path / "run")
    assert artifact.schema.categories == {"colour": ("blue", "green", "red"), "size": ("large", "small")}
    assert run.model.num_features == 2
    fewer = data[data["colour"] != "green"]  # of which there would be other indices
    again = spec | {"fit": {"init": str(tmp_path / "run"), "max_iterations": 1}}
    gendist.fit(again, data=fewer, run_dir=tmp_path / "again")
    assert load_artifact(tmp_path / "again").schema.categories == artifact.schema.categories


@pytest.mark.parametrize(
    ("data", "config", "expected"),
    [
        (
            {"a": ["x", "y", "z", "w"]},
            {},
            "'a' holds more than 3 different texts, too many to be categories; leave",
        ),
        (
            pa.table({"a": pa.array([None, None], pa.string()), "b": [1, 2]}),
            {},
            "'a' holds no text in any row; leave",
        ),
        (
            {"a": ["x", "y"]},
            {"transforms": ["standardize"]},
            "column 'a' holds texts, which standardize cannot transform; name the columns",
        ),
        (pa.table({"a": pa.array([0, 1], pa.timestamp("s"))}), {}, "column 'a' is not numeric .timestamp"),
    ],
)
def test_what_is_no_category_is_told(monkeypatch, data, config, expected):
    monkeypatch.setattr(domains_module, "MAX_CATEGORIES", 3)
    with pytest.raises(UserError, match=expected) as caught:
        dataset_of(data, takes=EVERYTHING, **config)
    assert "\n" not in str(caught.value)


def test_too_many_texts_are_told_wherever_they_lie(monkeypatch):
    monkeypatch.setattr(domains_module, "MAX_CATEGORIES", 100)
    monkeypatch.setattr(domains_module, "FEW_ENTRIES", 1)  # so that no run has too many by itself
    with pytest.raises(UserError, match="more than 100 different"):
        dataset_of({"a": np.arange(1000).astype(str)})


def test_texts_where_the_model_had_numbers_and_the_other_way_round():
    known = dataset_of(FRAME).schema
    numbers = FRAME.assign(colour=1.0)
    schema = Schema.of(source_of(numbers), DataConfig(), known=known)
    with pytest.raises(UserError, match="column 'colour' holds double, but the model was fitted to texts there"):
        matrix_of(type(dataset_of(FRAME)).open(source_of(numbers), DataConfig(), schema, dataset_of(FRAME).make_blocks))
    with pytest.raises(UserError, match="column 'length' is not numeric"):
        Schema.of(source_of(FRAME.assign(length="1")), DataConfig(), known=known)
