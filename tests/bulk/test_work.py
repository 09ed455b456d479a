"""Samples and scores in files: the rows of the model in this process, from any number of workers, in bounded memory."""

from __future__ import annotations

import weakref
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import scipy.sparse
import torch
from test_part_folder import content

import gendist
from gendist import bulk
from gendist.bulk import work
from gendist.config import ClusterConfig
from gendist.data import DataConfig
from gendist.evaluate.score import scores_of_rows
from gendist.launch import cli
from gendist.models.gmm import GaussianMixture
from gendist.protocols import Block, UserError, as_matrix

OUT = ["parts", "all.parquet", "all.csv", "all.npy", "all.npz"]


def read(out: Path, columns: list[str], array: str) -> np.ndarray:
    """What a person reads with the tools of others."""
    match out.suffix:
        case ".npy":
            return np.load(out)
        case ".npz":
            return np.load(out)[array]
        case ".csv":
            return pyarrow.csv.read_csv(out).to_pandas()[columns].to_numpy().squeeze()
        case _:
            return pd.read_parquet(out)[columns].to_numpy().squeeze()


def written(out: Path) -> dict[str, bytes] | bytes:
    return content(out) if out.is_dir() else out.read_bytes()


@pytest.mark.parametrize("name", OUT)
@pytest.mark.parametrize("given", [None, "left", 2])
def test_samples_are_those_of_the_model(folder, tmp_path, name, given):
    bulk.sample(folder / "run", 1000, tmp_path / name, seed=5, offset=7, given=given)
    expected = gendist.load(folder / "run").sample(1000, seed=5, offset=7, given=given).numpy()
    np.testing.assert_array_equal(read(tmp_path / name, ["a", "b", "c"], "x"), expected)


@pytest.mark.parametrize("name", OUT)
def test_encodings_are_those_of_the_model(folder, tmp_path, name):
    done = bulk.encode(folder / "run", DataConfig(path=str(folder / "data.parquet")), tmp_path / name)
    expected = gendist.load(folder / "run").encode(pd.read_parquet(folder / "data.parquet").to_numpy()).numpy()
    np.testing.assert_allclose(
        read(tmp_path / name, ["latent_0", "latent_1", "latent_2"], "latents"), expected, rtol=1e-12, atol=1e-300
    )
    assert done.num_rows == len(expected)


@pytest.mark.parametrize("name", ["all.csv", "all.parquet"])
def test_samples_of_a_model_of_an_array_can_be_scored(folder, tmp_path, name):
    x = pd.read_parquet(folder / "data.parquet").to_numpy()
    np.save(tmp_path / "x.npy", x)
    data = {"source": "npy", "path": str(tmp_path / "x.npy")}
    spec = {"name": "array", "family": "gmm", "model": {"num_components": 1}, "data": data, "fit": {"max_iterations": 2}}
    model = gendist.fit(spec, run_dir=tmp_path / "run").model
    bulk.sample(tmp_path / "run", 50, tmp_path / name)
    bulk.score(tmp_path / "run", DataConfig(path=str(tmp_path / name)), tmp_path / "scores.npy")
    expected = model.log_prob(model.sample(50)).numpy()
    np.testing.assert_allclose(np.load(tmp_path / "scores.npy"), expected, rtol=1e-12)


def test_what_draws_no_latents_says_so(folder, tmp_path):
    with pytest.raises(UserError, match=r"^draw: a gmm has no distribution of latents to draw from"):
        bulk.encode(folder / "run", DataConfig(path=str(folder / "data.parquet")), tmp_path / "parts", draw=0)
    assert not (tmp_path / "parts").exists()


@pytest.mark.parametrize("name", OUT)
def test_scores_are_those_of_the_model(folder, tmp_path, name):
    done = bulk.score(folder / "run", DataConfig(path=str(folder / "data.parquet")), tmp_path / name)
    expected = gendist.load(folder / "run").log_prob(pd.read_parquet(folder / "data.parquet").to_numpy()).numpy()
    np.testing.assert_allclose(read(tmp_path / name, ["log_prob"], "log_prob"), expected, rtol=1e-13)
    assert done.sums["log_likelihood"] == pytest.approx(expected.sum(), rel=1e-13)
    if not name.startswith("all.np"):
        np.testing.assert_array_equal(read(tmp_path / name, ["row"], ""), np.arange(2000))


def test_the_files_of_a_folder_are_in_the_order_of_their_rows(folder, tmp_path):
    bulk.score(folder / "run", DataConfig(path=str(folder / "data.parquet")), tmp_path / "parts")
    bulk.score(folder / "run", DataConfig(path=str(folder / "data.parquet")), tmp_path / "all.npy")
    files = sorted((tmp_path / "parts").glob("*.parquet"))
    assert len(files) > 8
    assert files[0].name == "part-00000000.parquet"
    tables = [pq.read_table(file) for file in files]
    np.testing.assert_array_equal(np.concatenate([table["row"] for table in tables]), np.arange(2000))
    # To the last bit: a row's log density depends on the leaf that it lies in, not on parts.
    np.testing.assert_array_equal(np.concatenate([table["log_prob"] for table in tables]), np.load(tmp_path / "all.npy"))


def test_a_sample_may_be_written_in_two_folders(folder, tmp_path):
    for name, num_samples, offset in (("whole", 1000, 3), ("one", 400, 3), ("two", 600, 403)):
        bulk.sample(folder / "run", num_samples, tmp_path / name, offset=offset)
    one, two, whole = (pd.read_parquet(tmp_path / name) for name in ("one", "two", "whole"))
    pd.testing.assert_frame_equal(pd.concat([one, two], ignore_index=True), whole, check_exact=True)


@pytest.mark.ray
@pytest.mark.parametrize(("name", "num_workers"), [("parts", 1), ("parts", 2), ("parts", 4), *((name, 2) for name in OUT[1:])])
def test_any_number_of_workers_writes_the_same_bytes(cluster, folder, tmp_path, monkeypatch, name, num_workers):
    data = DataConfig(path=str(folder / "data.parquet"))
    bulk.sample(folder / "run", 1000, tmp_path / f"sample_{name}", seed=5)
    bulk.score(folder / "run", data, tmp_path / f"score_{name}")
    original = GaussianMixture.sample

    def not_here(model, num_samples, **options):
        assert num_samples == 1, "drawn by the driver"
        return original(model, num_samples, **options)

    monkeypatch.setattr(GaussianMixture, "sample", not_here)
    monkeypatch.setattr(GaussianMixture, "log_prob", None)
    workers = ClusterConfig(num_workers=num_workers)
    bulk.sample(folder / "run", 1000, tmp_path / f"ray_sample_{name}", seed=5, cluster=workers)
    there = bulk.score(folder / "run", data, tmp_path / f"ray_score_{name}", cluster=workers)
    for verb in ("sample", "score"):
        assert written(tmp_path / f"ray_{verb}_{name}") == written(tmp_path / f"{verb}_{name}"), verb
    assert there.num_rows == 2000


@pytest.mark.parametrize("name", OUT)
def test_no_more_than_a_part_or_two_is_held_at_a_time(folder, tmp_path, monkeypatch, name):
    alive: list[weakref.ref] = []
    most = [0]
    original = work._make_part

    def make_part(*arguments):
        part = original(*arguments)
        alive.append(weakref.ref(part))
        most[0] = max(most[0], sum(ref() is not None for ref in alive))
        return part

    monkeypatch.setattr(work, "_make_part", make_part)
    bulk.sample(folder / "run", 2000, tmp_path / name)
    assert len(alive) >= 16
    assert most[0] <= 2


def test_progress_counts_every_row_and_those_that_stood_there(folder, tmp_path):
    seen: list[int] = []
    calls = []

    def stop(done: int, num_rows: int) -> None:
        calls.append((done, num_rows))
        if done > 500:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bulk.sample(folder / "run", 1000, tmp_path / "parts", watch=stop)
    bulk.sample(folder / "run", 1000, tmp_path / "parts", watch=lambda done, num_rows: seen.append(done))
    assert calls[0] == (0, 1000)
    assert seen[0] == calls[-1][0] > 500
    assert seen[-1] == 1000
    assert seen == sorted(seen)


@pytest.mark.parametrize("name", ["parts", "all.npy"])
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"num_samples": 0}, "num_samples 0; ask for 1 or more"),
        ({"given": "nobody"}, "given 'nobody'"),
        ({"offset": -1}, "both must be 0 or more"),
        ({"seed": -1}, "seed -1"),
        ({"artifact": "nowhere"}, "nowhere: no such artifact"),
        ({"address": "127.0.0.1:1"}, "cluster.num_workers is 0"),
    ],
)
def test_a_mistake_leaves_nothing_behind(folder, tmp_path, name, arguments, expected):
    with pytest.raises(UserError, match=expected):
        bulk.sample(**{"artifact": folder / "run", "num_samples": 10, "out": tmp_path / name, **arguments})
    assert not list(tmp_path.iterdir())


def test_a_row_without_a_density_is_named(folder, tmp_path):
    """One that lacks an entry, behind a transform that needs all of them."""
    frame = pd.read_parquet(folder / "data.parquet")
    data = {"path": str(folder / "data.parquet"), "transforms": ["whiten"]}
    spec = {"name": "whitened", "family": "gmm", "model": {"num_components": 1}, "data": data, "fit": {"max_iterations": 1}}
    gendist.fit(spec, run_dir=tmp_path / "run")
    for row, left in ((1500, True), (3, False)):  # what was reached is kept, where there is something
        frame.iloc[row, 1] = np.nan
        frame.to_parquet(tmp_path / "holes.parquet", index=False)
        with pytest.raises(UserError, match=f"row {row}: column 'b' is missing"):
            bulk.score(tmp_path / "run", DataConfig(path=str(tmp_path / "holes.parquet")), tmp_path / str(row))
        assert (tmp_path / str(row)).exists() == left


@pytest.mark.parametrize(
    ("model", "is_said"),
    [
        ({"likelihood": "bernoulli"}, True),
        ({"likelihood": "bernoulli", "binarize": True}, False),
        ({"likelihood": "gaussian"}, False),
    ],
)
def test_what_is_no_density_is_not_called_one(tmp_path, model, is_said):
    """The Bernoulli log p(x | z) of x between 0 and 1 integrates to no 1."""
    x = np.random.default_rng(0).random((60, 3))
    np.save(tmp_path / "x.npy", x)
    network = {"hidden_sizes": [4]}
    model = {"latent_dim": 2, "encoder": network, "decoder": network, **model}
    gendist.fit({"name": "x", "family": "vae", "model": model, "fit": {"num_steps": 1}}, data=x, run_dir=tmp_path / "run")
    done = bulk.score(tmp_path / "run", DataConfig(path=str(tmp_path / "x.npy")), tmp_path / "scores.npy")
    assert "log_prob_bound: a lower bound of the log density" in done.density
    assert ("no density of x" in done.density) == is_said


@pytest.mark.parametrize("name", ["parts", "all.parquet", "all.csv"])
def test_samples_of_a_model_with_classes_have_a_column_of_labels(tmp_path, name):
    rng = np.random.default_rng(0)
    y = np.array(["one", "two"])[rng.integers(0, 2, 200)]
    spec = {"name": "nb", "family": "naive_bayes", "model": {"kind": "gaussian"}, "data": {"label": "y", "columns": ["x"]}}
    gendist.fit(spec, data={"x": rng.normal(size=(200, 2)), "y": y}, run_dir=tmp_path / "run")
    bulk.sample(tmp_path / "run", 300, tmp_path / name, seed=5, offset=7)
    model = gendist.load(tmp_path / "run")
    frame = pyarrow.csv.read_csv(tmp_path / name).to_pandas() if name == "all.csv" else pd.read_parquet(tmp_path / name)
    np.testing.assert_array_equal(frame[["x_0", "x_1"]].to_numpy(), model.sample(300, seed=5, offset=7))
    classes = model.sample_classes(300, seed=5, offset=7).numpy()
    assert frame["label"].tolist() == np.array(model.labels)[classes].tolist()


def test_rows_that_lack_entries_are_scored_by_those_they_have(folder, tmp_path):
    frame = pd.read_parquet(folder / "data.parquet")
    frame.iloc[3, 1] = frame.iloc[1500, 0] = np.nan
    frame.to_parquet(tmp_path / "holes.parquet", index=False)
    bulk.score(folder / "run", DataConfig(path=str(tmp_path / "holes.parquet")), tmp_path / "all.npy")
    expected = gendist.load(folder / "run").log_prob(frame.to_numpy())
    np.testing.assert_allclose(np.load(tmp_path / "all.npy"), expected, rtol=1e-13)


@pytest.mark.parametrize("is_sparse", [False, True])
def test_the_first_row_that_a_model_refuses_is_named(tmp_path, is_sparse):
    x = np.random.default_rng(0).poisson(2.0, (400, 3)).astype(float)
    model = {"kind": "poisson", "num_classes": 1}
    gendist.fit({"name": "counts", "family": "naive_bayes", "model": model}, data=x, run_dir=tmp_path / "run")
    fitted = gendist.load(tmp_path / "run")
    for row in (0, 250, 399):
        wrong = x.copy()
        wrong[[row, 399], 1] = -3.0
        rows = torch.arange(1000, 1400)
        block = Block(as_matrix(scipy.sparse.csr_array(wrong)) if is_sparse else torch.from_numpy(wrong), rows)
        with pytest.raises(UserError, match=f"^row {1000 + row}: x has the entry -3; poisson columns hold 0 and more$"):
            scores_of_rows(fitted, [block])


@pytest.fixture(scope="module")
def people(tmp_path_factory) -> Path:
    """run/, a naive Bayes of three kinds of columns, and people.parquet, rows for it of which some lack entries."""
    folder, rng = tmp_path_factory.mktemp("people"), np.random.default_rng(0)
    is_gold = rng.random(600) < 0.3
    frame = pd.DataFrame(
        {
            "age": rng.normal(np.where(is_gold, 55.0, 30.0), 5.0),
            "visits": rng.poisson(np.where(is_gold, 9.0, 2.0)).astype(float),
            "country": np.where(rng.random(600) < np.where(is_gold, 0.8, 0.2), "FR", "DE"),
            "plan": np.where(is_gold, "gold", "basic"),
        }
    )
    spec = {"name": "people", "family": "naive_bayes", "model": {"kind": "mixed"}, "data": {"label": "plan"}}
    gendist.fit(spec, data=frame, run_dir=folder / "run")
    frame.loc[3, "age"] = frame.loc[500, "visits"] = np.nan
    frame.loc[[7, 8], "country"] = None
    frame.drop(columns="plan").to_parquet(folder / "people.parquet", index=False)
    return folder


def as_codes(frame: pd.DataFrame) -> np.ndarray:
    codes = frame["country"].map({"DE": 0.0, "FR": 1.0})
    return frame.assign(country=codes)[["age", "visits", "country"]].to_numpy(dtype=float)


@pytest.mark.parametrize("name", ["parts", "all.parquet", "all.csv"])
def test_labels_and_their_probabilities_are_those_of_the_model(people, tmp_path, name):
    data = DataConfig(path=str(people / "people.parquet"))
    assert bulk.classify(people / "run", data, tmp_path / name).num_rows == 600
    frame = pyarrow.csv.read_csv(tmp_path / name).to_pandas() if name == "all.csv" else pd.read_parquet(tmp_path / name)
    assert list(frame) == ["label", "p_basic", "p_gold"]
    expected = gendist.load(people / "run").classify(as_codes(pd.read_parquet(people / "people.parquet"))).exp().numpy()
    np.testing.assert_allclose(frame[["p_basic", "p_gold"]].to_numpy(), expected, rtol=1e-12, atol=1e-300)
    assert frame["label"].tolist() == np.where(expected[:, 1] > expected[:, 0], "gold", "basic").tolist()


@pytest.mark.parametrize("draw", [None, 3])
def test_rows_are_filled_in_as_the_model_does_it_in_the_words_of_the_data(people, tmp_path, draw):
    data, given = DataConfig(path=str(people / "people.parquet")), pd.read_parquet(people / "people.parquet")
    bulk.impute(people / "run", data, tmp_path / "all.parquet", draw=draw)
    bulk.impute(people / "run", data, tmp_path / "parts", draw=draw)
    filled = pd.read_parquet(tmp_path / "all.parquet")
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "parts"), filled)
    expected = gendist.load(people / "run").impute(as_codes(given), seed=draw).numpy()
    np.testing.assert_allclose(as_codes(filled), expected, rtol=1e-12)
    assert list(filled) == list(given)
    assert not filled.isna().any().any()
    has = given.notna()
    assert (filled.where(has) == given.where(has)).where(has, True).all().all()


@pytest.mark.parametrize(("verb", "reason"), [("classify", "components are not classes"), ("impute", "complete rows")])
def test_a_verb_that_a_family_lacks_is_refused_with_its_reason(folder, tmp_path, verb, reason):
    if verb == "impute":
        spec = {"name": "v", "family": "vae", "model": {"latent_dim": 2, "likelihood": "gaussian"}, "fit": {"num_steps": 2}}
        gendist.fit(spec, data=np.random.default_rng(0).normal(size=(200, 3)), run_dir=tmp_path / "run")
    run = folder / "run" if verb == "classify" else tmp_path / "run"
    with pytest.raises(UserError, match=f"^{verb}: .*{reason}"):
        getattr(bulk, verb)(run, DataConfig(path=str(folder / "data.parquet")), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_labels_and_filled_rows_from_the_command_line(people, tmp_path, monkeypatch, capsys):
    run, data = str(people / "run"), str(people / "people.parquet")
    for arguments, said in (
        (["classify", run, data], "600 rows classified"),
        (["impute", run, data, "--draw", "3"], "600 rows, in"),
    ):
        out = tmp_path / f"{arguments[0]}.parquet"
        monkeypatch.setattr("sys.argv", ["launch.py", *arguments, "--out", str(out)])
        cli.main()
        assert said in capsys.readouterr().out
        assert pq.read_metadata(out).num_rows == 600


def test_sparse_rows_lack_nothing_and_unknown_texts_are_counted(people, tmp_path, monkeypatch, capsys):
    x = scipy.sparse.csr_array(np.random.default_rng(0).poisson(0.5, (80, 5)).astype(float))
    gendist.fit(
        {"name": "w", "family": "naive_bayes", "model": {"kind": "multinomial", "num_classes": 1}},
        data=x,
        run_dir=tmp_path / "w",
    )
    bulk.sample(tmp_path / "w", 30, tmp_path / "rows.parquet")
    bulk.impute(tmp_path / "w", DataConfig(path=str(tmp_path / "rows.parquet")), tmp_path / "filled.npy")
    np.testing.assert_array_equal(np.load(tmp_path / "filled.npy"), gendist.load(tmp_path / "w").sample(30).to_dense())
    frame = pd.read_parquet(people / "people.parquet")
    frame.loc[[4, 5], "country"] = "XX"
    frame.to_parquet(tmp_path / "people.parquet", index=False)
    monkeypatch.setattr(
        "sys.argv",
        ["launch.py", "impute", str(people / "run"), str(tmp_path / "people.parquet"), "--out", str(tmp_path / "parts")],
    )
    cli.main()
    assert "(2 texts that the fit has not seen are left out)" in capsys.readouterr().out
    assert pd.read_parquet(tmp_path / "parts")["country"].isna().sum() == 2
