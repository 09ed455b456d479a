"""The command line, as a person calls it."""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA

import gendist
from gendist.launch import cli
from gendist.launch.summary import next_steps

ROOT = Path(__file__).parents[2]
SPEC = {
    "name": "two",
    "family": "gmm",
    "model": {"num_components": 2},
    "data": {"path": "data.csv", "columns": ["a", "b"]},
    "fit": {"max_iterations": 5},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with data, a spec and a finished run, as a person may have it."""
    folder = tmp_path_factory.mktemp("cli")
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"a": rng.normal(size=300), "b": rng.normal(size=300) + 4, "note": "x"})
    frame.to_csv(folder / "data.csv", index=False)
    frame.to_parquet(folder / "data.parquet", index=False)
    (folder / "spec.yaml").write_text(yaml.safe_dump(SPEC))
    done = subprocess.run(
        [sys.executable, ROOT / "launch.py", "fit", "spec.yaml", "--run-dir", "run"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "in run" in done.stdout
    assert "next:" in done.stdout
    return folder


def call(monkeypatch, capsys, folder: Path, *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command, run in this process."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["gendist", *arguments])
    try:
        cli.main()
        code = 0
    except SystemExit as exit_:
        code = int(exit_.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".parquet", ".csv"])
def test_samples_in_every_format_are_the_same_rows(monkeypatch, capsys, folder, suffix):
    out = folder / f"samples{suffix}"
    assert call(monkeypatch, capsys, folder, "sample", "run", "-n", "50", "--seed", "3", "--out", str(out))[0] == 0
    read = {
        ".npy": lambda: np.load(out),
        ".npz": lambda: np.load(out)["x"],
        ".parquet": lambda: pd.read_parquet(out)[["a", "b"]].to_numpy(),
        ".csv": lambda: pyarrow.csv.read_csv(out).to_pandas()[["a", "b"]].to_numpy(),
    }[suffix]()
    np.testing.assert_array_equal(read, gendist.load(folder / "run").sample(50, seed=3).numpy())


def test_a_sample_may_be_drawn_in_two_commands(monkeypatch, capsys, folder):
    for name, n, offset in (("whole", 100, 0), ("one", 40, 0), ("two", 60, 40)):
        code, _, _ = call(
            monkeypatch, capsys, folder, "sample", "run", "-n", str(n), "--offset", str(offset), "--out", f"{name}.npy"
        )
        assert code == 0
    parts = [np.load(folder / "one.npy"), np.load(folder / "two.npy")]
    np.testing.assert_array_equal(np.load(folder / "whole.npy"), np.concatenate(parts))


def test_pictures_of_samples_that_are_no_images(monkeypatch, capsys, folder):
    assert call(monkeypatch, capsys, folder, "sample", "run", "-n", "50", "--given", "1", "--out", "points.png")[0] == 0
    with Image.open(folder / "points.png") as image:
        assert min(image.size) > 300
    with Image.open(folder / "run" / "samples.png") as image:
        assert min(image.size) > 300


@pytest.mark.parametrize("out", ["scores.parquet", "scores.npy", "scores.csv", "scores.npz"])
@pytest.mark.parametrize("data", ["data.parquet", "data.csv", "spec.yaml"])
def test_scores_are_the_log_density_of_every_row_in_order(monkeypatch, capsys, folder, data, out):
    code, stdout, _ = call(monkeypatch, capsys, folder, "score", "run", data, "--out", out)
    assert code == 0
    assert "300 rows scored" in stdout
    x = pd.read_parquet(folder / "data.parquet")[["a", "b"]].to_numpy()
    expected = gendist.load(folder / "run").log_prob(x).numpy()
    read = {
        ".npy": np.load,
        ".npz": lambda path: np.load(path)["log_prob"],
        ".parquet": lambda path: pd.read_parquet(path)["log_prob"],
        ".csv": lambda path: pd.read_csv(path)["log_prob"],
    }[Path(out).suffix](folder / out)
    np.testing.assert_allclose(read, expected, rtol=1e-14)
    if out == "scores.parquet":
        assert pq.read_table(folder / out).column_names == ["row", "log_prob"]


DIGITS_BEHIND_PCA = """\
name: digits
family: gmm
model: {num_components: 5, covariance_regularization: 1.0e-3}
data:
  source: digits
  transforms: [{pca: {num_components: 12, whiten: true}}, standardize]
fit: {max_iterations: 3}
"""


def test_digits_behind_a_pca(monkeypatch, capsys, tmp_path):
    """Fit, sample and score, for rows as the data have them: images of 8 x 8, and the density of their coordinates."""
    (tmp_path / "spec.yaml").write_text(DIGITS_BEHIND_PCA)
    code, out, err = call(monkeypatch, capsys, tmp_path, "fit", "spec.yaml", "--run-dir", "run")
    assert code == 0, err
    assert "12 principal coordinates" in out
    for name in ("samples.png", "samples.parquet", "samples.npy"):
        assert call(monkeypatch, capsys, tmp_path, "sample", "run", "-n", "100", "--out", name)[0] == 0
    # A hundred images, all of them drawn: the picture that the fit drew of the same samples.
    assert (tmp_path / "samples.png").read_bytes() == (tmp_path / "run" / "samples.png").read_bytes()
    frame, x = pd.read_parquet(tmp_path / "samples.parquet"), np.load(tmp_path / "samples.npy")
    assert list(frame.columns) == [f"image_{i}" for i in range(64)]
    np.testing.assert_array_equal(frame.to_numpy(), x)
    digits = load_digits().data / 16.0
    # Samples lie where the digits' first 12 principal components do, and are spread as they are.
    pca = PCA(12, svd_solver="full").fit(digits)
    np.testing.assert_allclose(pca.inverse_transform(pca.transform(x)), x, atol=1e-9)
    many = gendist.load(tmp_path / "run").sample(50_000, seed=1).numpy()
    np.testing.assert_allclose(many.mean(0), digits.mean(0), atol=0.02)

    code, out, err = call(monkeypatch, capsys, tmp_path, "score", "run", "spec.yaml", "--out", "scores.npy")
    assert code == 0, err
    assert "1,797 rows scored" in out
    assert "density of the 12 principal coordinates" in out
    z = pca.transform(digits) * np.sign(pca.components_[range(12), np.abs(pca.components_).argmax(1)])
    deviations = z.std(0)
    within = gendist.load(tmp_path / "run").model
    expected = within.log_prob(z / deviations).numpy() - np.log(deviations).sum()
    np.testing.assert_allclose(np.load(tmp_path / "scores.npy"), expected, atol=1e-8)


def test_a_row_that_cannot_be_transformed_is_named_by_its_number(monkeypatch, capsys, tmp_path):
    x = np.abs(np.random.default_rng(0).normal(size=(20_000, 2)))
    np.save(tmp_path / "fine.npy", x)
    x[17_000, 1] = -3.0
    np.save(tmp_path / "odd.npy", x)
    spec = {**SPEC, "data": {"path": "fine.npy", "transforms": ["log1p"]}}
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec))
    assert call(monkeypatch, capsys, tmp_path, "fit", "spec.yaml", "--run-dir", "run")[0] == 0
    code, _, err = call(monkeypatch, capsys, tmp_path, "score", "run", "odd.npy", "--out", "scores.npy")
    assert code == 2
    assert "error: row 17000: column 'x_1' is -3; log1p takes numbers above -1" in err
    code, _, err = call(monkeypatch, capsys, tmp_path, "fit", "spec.yaml", "data.path=odd.npy", "--run-dir", "other")
    assert code == 2
    assert "error: row 17000: column 'x_1' is -3; log1p takes numbers above -1" in err


@pytest.mark.ray
def test_scores_from_ray_are_the_same_bytes(cluster, monkeypatch, capsys, folder):
    assert call(monkeypatch, capsys, folder, "score", "run", "data.csv", "--out", "here.npy")[0] == 0
    code, _, err = call(monkeypatch, capsys, folder, "score", "run", "data.csv", "cluster.num_workers=3", "--out", "there.npy")
    assert code == 0, err
    np.testing.assert_array_equal(np.load(folder / "here.npy"), np.load(folder / "there.npy"))


def test_a_dry_run_prints_the_resolved_spec_and_does_nothing(monkeypatch, capsys, folder):
    code, out, _ = call(monkeypatch, capsys, folder, "fit", "spec.yaml", "seed=5", "--dry-run", "--run-dir", "other")
    assert code == 0
    assert yaml.safe_load(out)["seed"] == 5
    assert yaml.safe_load(out)["fit"]["init"] == "auto"
    assert not (folder / "other").exists()


def test_a_dry_run_tells_the_size_of_networks_whose_data_are_elsewhere(monkeypatch, capsys, folder):
    spec = {"name": "a", "family": "vae", "model": {"latent_dim": 2, "encoder": {"channels": [4, 4]}}}
    spec["model"]["decoder"] = {"hidden_sizes": []}
    spec["data"] = {"path": "nowhere.parquet", "image_shape": [9, 8]}
    (folder / "deep.yaml").write_text(yaml.safe_dump(spec))
    code, out, err = call(monkeypatch, capsys, folder, "fit", "deep.yaml", "--dry-run")
    assert code == 0, err
    encoder = (16 * 4 + 4) + (16 * 4 * 4 + 4) + (4 * 2 * 2 * 4 + 4)
    decoder = 2 * 72 + 72
    assert f"# autoencoder: {encoder + decoder:,} parameters" in out
    assert yaml.safe_load(out)["data"]["path"] == "nowhere.parquet"
    code, _, err = call(monkeypatch, capsys, folder, "fit", "deep.yaml", "--dry-run", "data.image_shape=[9,3]")
    assert code == 2
    assert "model.encoder.channels: 2 convolutions, but images of 9 x 3 can be halved 1 times" in err


def test_a_finished_run_says_so_and_changes_nothing(monkeypatch, capsys, folder):
    before = (folder / "run" / "manifest.json").read_bytes()
    code, out, err = call(monkeypatch, capsys, folder, "fit", "spec.yaml", "--run-dir", "run")
    assert code == 0
    assert "is finished" in err + out
    assert (folder / "run" / "manifest.json").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["fit", "nowhere.yaml"], "nowhere.yaml: no such file"),
        (["fit", "spec.yaml", "model.num_component=3"], "did you mean 'num_components'?"),
        (["fit", "spec.yaml", "data.path=zzz.csv"], "zzz.csv: no such file"),
        (["fit", "spec.yaml", "data.columns=[a,note]"], "column 'note' is not numeric"),
        (["fit", "spec.yaml", "model.num_components=301"], "only 300 rows"),
        (["fit", "spec.yaml", "seed=1", "--run-dir", "run"], "another spec (different: seed)"),
        (["fit", "spec.yaml", "--run-dir", "spec.yaml"], "a file; a run directory is a folder"),
        (["fit", "spec.yaml", "cluster.num_workers=1", "--address", "127.0.0.1:1"], "nothing answers there"),
        (["sample", "nowhere", "-n", "1", "--out", "a.npy"], "nowhere: no such artifact"),
        (["sample", "run", "-n", "1", "--out", "a.jpg"], "allowed are .npy, .npz, .parquet, .csv, .png"),
        (["sample", "run", "-n", "1", "--out", "no/where.npy"], "no such folder"),
        (["sample", "run", "-n", "1", "--given", "7", "--out", "a.npy"], "the components are 0 to 1"),
        (["score", "run", "data.csv", "data.columns=[a]", "--out", "a.npy"], "1 features, but the model has 2"),
        (["score", "run", "digits", "--out", "a.npy"], "digits: no column 'a'"),
        (["score", "run", "wide.npy", "--out", "a.npy"], "3 features, but the model has 2"),
        (["score", "run", "data.csv", "--out", "data.csv"], "the data themselves"),
        (["score", "run", "data.csv", "--out", "run/../data.csv"], "the data themselves"),
        (["score", "run", "data.csv", "data.transforms=[log1p]", "--out", "a.npy"], "those of run are part of it"),
        (["score", "run", "data.csv", "seed=3", "--out", "a.npy"], "only data.KEY and cluster.KEY"),
        (["fit", "spec.yaml", "--address", "127.0.0.1:1"], "cluster.num_workers is 0"),
        (["sample", "run", "--out", "a.npy"], "Missing option '-n'"),
        (["sample", "run", "-n", "0", "--out", "a.npy"], "greater than or equal to 1"),
        (["fit"], "Missing argument 'SPEC.yaml'"),
        (["nonsense"], "No such command 'nonsense'"),
        (["sample", "run", "-n", "1", "--out", "s3://bucket/new"], "--out s3://bucket/new: a URL"),
        (["sample", "run", "-n", "1", "--out", "s3://key:hush7Qx@bucket/new.png"], "--out s3://bucket/new.png: a URL"),
        (["score", "run", "data.csv", "--out", "s3://key:hush7Qx@bucket/new"], "--out s3://bucket/new: a URL"),
        (["encode", "run", "data.csv", "--out", "gs://bucket/new.parquet"], "--out gs://bucket/new.parquet: a URL"),
        (["prior", "run", "--out", "s3://bucket/prior"], "--out s3://bucket/prior: a URL"),
        (["plan", "spec.yaml", "--out", "s3://bucket/plan.json"], "--out s3://bucket/plan.json: a URL"),
        (["fit", "spec.yaml", "--run-dir", "memory://runs/x"], "memory://runs/x: in the memory of this process"),
        (["fit", "spec.yaml", "cluster.storage=memory://"], "memory://two: in the memory of this process"),
        (
            ["submit", "spec.yaml", "cluster.num_workers=1", "--run-dir", "memory://x", "--dry-run"],
            "in the memory of this process",
        ),
        (
            ["submit", "spec.yaml", "--run-dir", "/shared/x", "--dry-run"],
            "cluster.num_workers is 0, which computes in one process",
        ),
        (["fit", "spec.yaml", "data.path=data #1/data.csv"], "data #1/data.csv: no such file"),
        (["fit", "spec.yaml", "name=!!int foo"], "name: string should match pattern"),
        (["fit", "s3://key:hush7Qx@bucket/x.yaml"], "s3://bucket/x.yaml: no such file"),
        (["plan", "s3://key:hush7Qx@bucket/x.yaml"], "s3://bucket/x.yaml: no such file"),
        (["score", "run", "https://hush7Qx@host/x.yaml", "--out", "a.npy"], "https://host/x.yaml: no such file"),
        (
            ["fit", "spec.yaml", "--address", "ray://u:hush7Qx@127.0.0.1:1"],
            "--address ray://127.0.0.1:1: cluster.num_workers is 0",
        ),
        (["fit", "spec.yaml", "cluster.num_workers=1", "--address", "ray://u:hush7Qx@127.0.0.1:1"], "comes with a password"),
        (["fit", "spec.yaml", "cluster.num_workers=1", "--address", "u:hush7Qx@127.0.0.1:1"], "--address 127.0.0.1:1: not an"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(monkeypatch, capsys, folder, arguments, expected):
    np.save(folder / "wide.npy", np.zeros((5, 3)))
    code, _, err = call(monkeypatch, capsys, folder, *arguments)
    assert code == 2
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert expected in lines[0]
    assert "Traceback" not in err
    assert "hush7Qx" not in err
    assert not (folder / "a.npy").exists()
    assert not list(folder.glob("*:*"))
    assert not list(folder.glob(".*unfinished"))


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_told_to_end_a_fit_says_how_to_go_on(folder, tmp_path, how):
    check_told_to_end(folder, tmp_path, how)


@pytest.mark.ray
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_told_to_end_a_fit_on_a_cluster_says_how_to_go_on(cluster, folder, tmp_path, how):
    check_told_to_end(folder, tmp_path, how, "cluster.num_workers=1", "--address", cluster.address)


def check_told_to_end(folder: Path, tmp_path: Path, how: signal.Signals, *arguments: str) -> None:
    """SIGTERM, as schedulers send it, and Ctrl-C: code 130, one line, a run that the same command finishes."""
    command = [sys.executable, ROOT / "launch.py", "fit", "spec.yaml", "--run-dir", str(tmp_path / "run")]
    command += ["fit.tolerance=0", "fit.max_iterations=20000", "fit.time_budget_s=100", *arguments]
    process = subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "run" / "metrics.jsonl").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(how)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert err.splitlines()[-1].startswith("error: interrupted; what was reached is kept")
    # No iteration is lost: the newest checkpoint is that of the last line of metrics.jsonl.
    num_iterations = len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert max(path.name for path in (tmp_path / "run" / "checkpoints").glob("[0-9]*")) == f"{num_iterations:08d}"


@pytest.mark.parametrize("is_url", [False, True])
def test_interrupted_it_says_what_is_kept_however_the_folder_is_called(monkeypatch, capsys, folder, tmp_path, is_url):
    def interrupted(spec, run_dir, **_):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "spec.yaml").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr("gendist.fitting.fit", interrupted)
    run_dir = f"{'file://' if is_url else ''}{tmp_path / 'run'}"
    code, _, err = call(monkeypatch, capsys, folder, "fit", "spec.yaml", "--run-dir", run_dir)
    assert code == 130
    assert "error: interrupted; what was reached is kept: the same command goes on from there" in err


def test_next_steps_can_be_typed_as_they_stand():
    lines = next_steps(["{program} sample {run} -n 64", "{program} score {run} DATA"], "gendist", Path("/runs/my run"))
    assert [shlex.split(line.removeprefix("next:"))[:3] for line in lines] == [
        ["gendist", "sample", "/runs/my run"],
        ["gendist", "score", "/runs/my run"],
    ]


def test_the_demo_draws_digits(monkeypatch, capsys, tmp_path):
    """As `make demo`, without Ray: pictures of pixels, some dark and some bright, that differ from each other."""
    quick = ["cluster.num_workers=0", "fit.max_iterations=3", "fit.num_steps=60"]
    code, out, _ = call(monkeypatch, capsys, tmp_path, "demo", *quick)
    assert code == 0
    pictures = sorted((tmp_path / "runs" / "demo").glob("*/samples.png"))
    assert len(pictures) == len(list((ROOT / "configs").glob("*_digits.yaml")))
    for picture in pictures:
        assert f"runs/demo/{picture.parent.name}/samples.png" in out
        with Image.open(picture) as image:
            values = np.asarray(image)
        assert values.min() < 40
        assert values.max() > 215
