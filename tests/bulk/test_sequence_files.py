"""Samples and scores of models of sequences: those of the model, in every format, stopped and gone on with, and read back."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from PIL import Image
from test_part_folder import content

import gendist
from gendist import bulk
from gendist.artifact import load_artifact
from gendist.blocks import leaves
from gendist.bulk import parts
from gendist.config import ClusterConfig
from gendist.data import DataConfig
from gendist.launch.cli import main
from gendist.pictures import save_picture
from gendist.protocols import UserError

RNG = np.random.default_rng(0)
LENGTHS = (5, 40, 1, 7, 30, 12, 2) * 12
SEQUENCES = [RNG.normal(size=(length, 2)) + np.sin(np.arange(length))[:, None] for length in LENGTHS]
LONG = pd.DataFrame(np.concatenate(SEQUENCES), columns=["a", "b"]).assign(
    id=np.repeat([f"s{99 - i}" for i in range(len(LENGTHS))], LENGTHS), t=np.concatenate([np.arange(n) for n in LENGTHS])
)


@pytest.fixture(scope="session")
def chains(tmp_path_factory) -> Path:
    """run/, fitted behind a transform to long.parquet; texts/, fitted to the tokens of texts."""
    folder = tmp_path_factory.mktemp("chains")
    LONG.to_parquet(folder / "long.parquet", index=False)
    data = {"path": str(folder / "long.parquet"), "sequence": "id", "order": "t", "transforms": ["standardize"]}
    spec = {"name": "chain", "family": "hmm", "model": {"num_states": 2}, "fit": {"max_iterations": 2}}
    gendist.fit({**spec, "data": data}, run_dir=folder / "run")
    texts = ["the cat sat", "a dog sat on the cat", "", "the dog"] * 5
    spec |= {"model": {"num_states": 2, "emission": {"kind": "categorical"}}}
    text = {"column": "text", "pattern": r"\w+"}
    gendist.fit({**spec, "data": {"text": text}}, data={"text": texts}, run_dir=folder / "texts")
    return folder


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(parts, "MIN_PART_BYTES", 512)
    monkeypatch.setattr(leaves, "MIN_SEQUENCE_LEAF_ROWS", 16)


def table_of(out: Path) -> pd.DataFrame:
    return pyarrow.csv.read_csv(out).to_pandas() if out.suffix == ".csv" else pd.read_parquet(out)


@pytest.mark.parametrize("name", ["parts", "all.parquet", "all.csv", "all.npy", "all.npz"])
def test_samples_are_those_of_the_model(chains, tmp_path, name):
    bulk.sample(chains / "run", 50, tmp_path / name, seed=5, offset=7, length=6)
    model = gendist.load(chains / "run")
    expected = model.sample(50, seed=5, offset=7, length=6).numpy()
    assert expected.shape == (50, 6, 2)
    if name.startswith("all.np"):
        loaded = np.load(tmp_path / name)
        np.testing.assert_array_equal(loaded["x"] if name == "all.npz" else loaded, expected)
        return
    table = table_of(tmp_path / name)
    assert list(table) == ["sequence", "step", "a", "b", "state"]
    np.testing.assert_array_equal(table[["a", "b"]], expected.reshape(300, 2))
    np.testing.assert_array_equal(table["sequence"], np.repeat(np.arange(7, 57), 6))
    np.testing.assert_array_equal(table["step"], np.tile(np.arange(6), 50))
    np.testing.assert_array_equal(table["state"], model.model.sample_states(50, seed=5, offset=7, length=6).flatten())


def test_samples_are_as_long_as_the_model_says(chains, tmp_path):
    bulk.sample(chains / "run", 3, tmp_path / "all.npy")
    assert (
        np.load(tmp_path / "all.npy").shape == gendist.load(chains / "run").sample(3).shape == (3, round(np.mean(LENGTHS)), 2)
    )


@pytest.mark.parametrize("name", ["parts", "all.parquet", "all.csv", "all.npy", "all.npz"])
def test_a_score_is_one_number_a_sequence(chains, tmp_path, name):
    done = bulk.score(chains / "run", DataConfig(path=str(chains / "long.parquet")), tmp_path / name)
    expected = gendist.load(chains / "run").log_prob(SEQUENCES).numpy()
    assert (done.num_rows, done.what) == (len(SEQUENCES), "sequences")
    assert done.sums["log_likelihood"] == pytest.approx(expected.sum(), rel=1e-12)
    if name.startswith("all.np"):
        loaded = np.load(tmp_path / name)
        found = loaded["log_prob"] if name == "all.npz" else loaded
    else:
        table = table_of(tmp_path / name)
        assert table["sequence"].tolist() == list(range(len(SEQUENCES)))
        found = table["log_prob"]
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_the_mean_over_steps_is_what_the_fit_says(chains, tmp_path):
    """The log-likelihood of the fit, by another way through the data."""
    done = bulk.score(chains / "run", DataConfig(path=str(chains / "long.parquet")), tmp_path / "all.npy")
    log_likelihood = gendist.artifact.json.loads((chains / "run/manifest.json").read_text())["results"]["log_likelihood"]
    assert done.sums["num_steps"] == len(LONG)
    assert done.sums["log_likelihood"] / len(LONG) == pytest.approx(log_likelihood, rel=1e-9)


def test_every_format_is_scored_alike(chains, tmp_path):
    (tmp_path / "files").mkdir()
    for i, x in enumerate(SEQUENCES):
        np.save(tmp_path / f"files/{i:03d}.npy", x)
    lists = pd.DataFrame({name: [x[:, i] for x in SEQUENCES] for i, name in enumerate("ab")})
    lists.to_parquet(tmp_path / "lists.parquet", index=False)
    LONG.rename(columns={"id": "who"}).to_csv(tmp_path / "long.csv", index=False)
    expected = gendist.load(chains / "run").log_prob(SEQUENCES).numpy()
    for path, options in (("files", {}), ("lists.parquet", {}), ("long.csv", {"sequence": "who"})):
        bulk.score(chains / "run", DataConfig(path=str(tmp_path / path), **options), tmp_path / "all.npy")
        np.testing.assert_allclose(np.load(tmp_path / "all.npy"), expected, rtol=1e-12)


def test_a_sample_is_scored_as_data(chains, tmp_path):
    bulk.sample(chains / "run", 20, tmp_path / "sample.parquet", length=9)
    data = DataConfig(path=str(tmp_path / "sample.parquet"), sequence="sequence", order="step")
    bulk.score(chains / "run", data, tmp_path / "all.npy")
    model = gendist.load(chains / "run")
    np.testing.assert_allclose(np.load(tmp_path / "all.npy"), model.log_prob(model.sample(20, length=9)), rtol=1e-12)


def test_a_sample_is_scored_as_data_whatever_its_features_are_called(tmp_path):
    frame = pd.DataFrame(RNG.normal(size=(40, 2)), columns=["step", "sequence"]).assign(id=np.arange(40) // 4)
    spec = {"name": "x", "family": "hmm", "model": {"num_states": 2}, "fit": {"max_iterations": 2}}
    gendist.fit({**spec, "data": {"sequence": "id"}}, data=frame, run_dir=tmp_path / "run")
    bulk.sample(tmp_path / "run", 5, tmp_path / "x.parquet", seed=1)
    bulk.score(tmp_path / "run", DataConfig(path=str(tmp_path / "x.parquet")), tmp_path / "scores.npy")
    model = gendist.load(tmp_path / "run")
    np.testing.assert_allclose(np.load(tmp_path / "scores.npy"), model.log_prob(model.sample(5, seed=1)))


@pytest.mark.parametrize("verb", ["sample", "score"])
def test_parts_that_are_stopped_go_on_and_end_in_the_same_bytes(chains, tmp_path, verb):
    def write(name: str, watch) -> None:
        if verb == "sample":
            bulk.sample(chains / "run", 100, tmp_path / name, length=5, watch=watch)
        else:
            bulk.score(chains / "run", DataConfig(path=str(chains / "long.parquet")), tmp_path / name, watch=watch)

    def stop(done: int, _: int) -> None:
        if done > 30:
            raise KeyboardInterrupt

    write("whole", lambda done, number: None)
    with pytest.raises(KeyboardInterrupt):
        write("stopped", stop)
    seen: list[int] = []
    write("stopped", lambda done, number: seen.append(done))
    assert 30 < seen[0] < seen[-1]
    assert len(list((tmp_path / "whole").glob("*.parquet"))) > 4
    assert content(tmp_path / "stopped") == content(tmp_path / "whole")
    with pytest.raises(UserError, match="holds the rows of another request"):
        bulk.sample(chains / "run", 100, tmp_path / "whole", length=6)


@pytest.mark.ray
def test_any_number_of_workers_writes_the_same_bytes(cluster, chains, tmp_path):
    data, workers = DataConfig(path=str(chains / "long.parquet")), ClusterConfig(num_workers=2)
    bulk.score(chains / "run", data, tmp_path / "here")
    bulk.score(chains / "run", data, tmp_path / "there", cluster=workers)
    assert content(tmp_path / "there") == content(tmp_path / "here")
    bulk.sample(chains / "run", 100, tmp_path / "here.parquet", length=5)
    bulk.sample(chains / "run", 100, tmp_path / "there.parquet", length=5, cluster=workers)
    assert (tmp_path / "there.parquet").read_bytes() == (tmp_path / "here.parquet").read_bytes()


def test_texts_are_taken_apart_as_they_were_fitted(chains, tmp_path):
    texts = ["the cat", "on a unicorn", "", "dog dog dog"]
    pd.DataFrame({"body": texts}).to_parquet(tmp_path / "texts.parquet", index=False)
    bulk.score(chains / "texts", DataConfig(path=str(tmp_path / "texts.parquet")), tmp_path / "all.npy")
    artifact = load_artifact(chains / "texts")
    (values,) = artifact.schema.categories.values()
    index = {value: float(i) for i, value in enumerate(values)}
    sequences = [np.array([[index.get(token, len(values))] for token in text.split()]).reshape(-1, 1) for text in texts]
    np.testing.assert_allclose(np.load(tmp_path / "all.npy"), artifact.model.log_prob(sequences), rtol=1e-12)
    bulk.sample(chains / "texts", 5, tmp_path / "sample.parquet", length=3)
    words = pq.read_table(tmp_path / "sample.parquet")["text"].to_pylist()
    indices = artifact.model.sample(5, length=3).flatten().long()
    assert words == [values[i] for i in indices]
    data = DataConfig(path=str(tmp_path / "texts.parquet"), text={"column": "body"})
    with pytest.raises(UserError, match="has taken texts apart otherwise"):
        bulk.score(chains / "texts", data, tmp_path / "no.npy")


def test_the_sequence_that_cannot_be_scored_is_named(chains, tmp_path):
    frame = LONG.astype({"a": float})
    frame.to_parquet(tmp_path / "good.parquet", index=False)
    bulk.score(chains / "run", DataConfig(path=str(tmp_path / "good.parquet")), tmp_path / "good.npy")
    shuffled = LONG.sample(frac=1.0, random_state=0)
    shuffled.to_parquet(tmp_path / "bad.parquet", index=False)
    with pytest.raises(UserError, match=r"must ascend: sort|comes back"):
        bulk.score(chains / "run", DataConfig(path=str(tmp_path / "bad.parquet")), tmp_path / "bad.npy")
    assert not (tmp_path / "bad.npy").exists()
    data = {"path": str(chains / "long.parquet"), "sequence": "id", "transforms": ["log1p"], "columns": ["a"]}
    LONG.assign(a=LONG["a"].abs()).to_parquet(tmp_path / "positive.parquet", index=False)
    spec = {"name": "log", "family": "hmm", "model": {"num_states": 1}, "fit": {"max_iterations": 1}}
    gendist.fit({**spec, "data": {**data, "path": str(tmp_path / "positive.parquet")}}, run_dir=tmp_path / "log")
    wrong = LONG.assign(a=LONG["a"].abs())
    wrong.loc[5 + 40 + 1 + 3, "a"] = -2.0
    wrong.to_parquet(tmp_path / "wrong.parquet", index=False)
    with pytest.raises(UserError, match="sequence 3, step 3: column 'a' is -2"):
        bulk.score(tmp_path / "log", DataConfig(path=str(tmp_path / "wrong.parquet")), tmp_path / "wrong.npy")


def test_a_length_is_of_sequences_alone(folder, chains, tmp_path):
    with pytest.raises(UserError, match="length 5: of models of sequences alone"):
        bulk.sample(folder / "run", 10, tmp_path / "all.npy", length=5)
    with pytest.raises(UserError, match="length 0"):
        bulk.sample(chains / "run", 10, tmp_path / "all.npy", length=0)
    with pytest.raises(UserError, match=r"data.sequence: of families of sequences alone"):
        bulk.score(folder / "run", DataConfig(path=str(chains / "long.parquet"), sequence="id"), tmp_path / "all.npy")
    assert not list(tmp_path.iterdir())


def test_the_command_line_speaks_of_sequences(chains, tmp_path, monkeypatch, capsys):
    def call(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["gendist", *map(str, arguments)])
        main()
        return capsys.readouterr().out

    said = call("score", chains / "run", chains / "long.parquet", "--out", tmp_path / "scores.csv")
    assert said.startswith("84 sequences scored, mean log density -")
    assert " a step, in " in said
    call("sample", chains / "run", "-n", 3, "--length", 4, "--out", tmp_path / "all.npy")
    assert np.load(tmp_path / "all.npy").shape == (3, 4, 2)
    call("sample", chains / "run", "-n", 3, "--length", 4, "--out", tmp_path / "all.png")
    with Image.open(tmp_path / "all.png") as picture:
        assert picture.format == "PNG"


def test_samples_of_a_model_for_each_class_say_which(tmp_path):
    y = ["even" if i % 2 else "odd" for i in range(len(SEQUENCES))]
    model = {"num_states": 2, "labels": "classes"}
    spec = {"name": "classes", "family": "hmm", "model": model, "fit": {"max_iterations": 1}, "data": {"label": "y"}}
    gendist.fit(spec, data={"x": SEQUENCES, "y": y}, run_dir=tmp_path / "run")
    bulk.sample(tmp_path / "run", 10, tmp_path / "all.parquet", length=3)
    table = pd.read_parquet(tmp_path / "all.parquet")
    assert list(table) == ["sequence", "step", "x_0", "x_1", "state", "label"]
    loaded = gendist.load(tmp_path / "run")
    np.testing.assert_array_equal(table[["x_0", "x_1"]], loaded.sample(10, length=3).flatten(0, 1))
    names = np.array(loaded.labels)[loaded.sample_classes(10).numpy()]
    assert table["label"].tolist() == np.repeat(names, 3).tolist()


def test_each_sequence_has_a_label(tmp_path):
    y = ["even" if i % 2 else "odd" for i in range(len(SEQUENCES))]
    model = {"num_states": 2, "labels": "classes"}
    spec = {"name": "classes", "family": "hmm", "model": model, "fit": {"max_iterations": 1}, "data": {"label": "y"}}
    gendist.fit(spec, data={"x": SEQUENCES, "y": y}, run_dir=tmp_path / "run")
    rows = [{"id": s, "a": x[0], "b": x[1]} for s, sequence in enumerate(SEQUENCES) for x in np.asarray(sequence).tolist()]
    pd.DataFrame(rows).to_parquet(tmp_path / "long.parquet", index=False)
    data = DataConfig(path=str(tmp_path / "long.parquet"), sequence="id", columns=["a", "b"])
    assert bulk.classify(tmp_path / "run", data, tmp_path / "parts").what == "sequences"
    table = pd.read_parquet(tmp_path / "parts")
    assert table["sequence"].tolist() == list(range(len(SEQUENCES)))
    expected = gendist.load(tmp_path / "run").classify(SEQUENCES).exp().numpy()
    np.testing.assert_allclose(table[["p_even", "p_odd"]], expected, rtol=1e-9, atol=1e-300)
    assert table["label"].tolist() == np.array(["even", "odd"])[expected.argmax(1)].tolist()


def test_pictures(chains, tmp_path):
    """Lines over time; of images, images, unless another length makes none of them."""
    artifact = load_artifact(chains / "run")
    save_picture(artifact.model.sample(3, length=20), artifact.schema, tmp_path / "lines.png")
    images = artifact.schema.model_copy(update={"image_shape": (6, 2)})
    save_picture(artifact.model.sample(4, length=6), images, tmp_path / "images.png")
    save_picture(artifact.model.sample(4, length=7), images, tmp_path / "seven.png")
    shapes = {}
    for name in ("lines", "images", "seven"):
        with Image.open(tmp_path / f"{name}.png") as picture:
            shapes[name] = picture.size
    assert shapes["lines"] == shapes["seven"] != shapes["images"]
    assert (chains / "run" / "samples.png").exists()
