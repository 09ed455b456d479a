"""A whole fit: any number of workers, any interruption, the same bytes; and the run directory tells the truth."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from power_cut import PowerCut, cut_power_at

import gendist
from gendist import em_fitting
from gendist.em_checkpoints import resume
from gendist.models.gmm import GaussianMixture
from gendist.protocols import UserError
from gendist.run_directory import RunDirectory

SPEC = {
    "name": "digits",
    "family": "gmm",
    "model": {"num_components": 10, "covariance_type": "full", "covariance_regularization": 1e-3},
    "data": {"source": "digits", "validation_fraction": 0.1},
    "fit": {"max_iterations": 12, "tolerance": 0.0, "checkpoint_every": 4},
}


def with_workers(num_workers: int) -> dict:
    return {**SPEC, "cluster": {"num_workers": num_workers}}


def sha256(run_dir: Path) -> str:
    return hashlib.sha256((run_dir / "artifact" / "model.safetensors").read_bytes()).hexdigest()


def trace(history) -> list:
    return [{key: value for key, value in record.items() if key != "seconds"} for record in history]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "unbroken"
    gendist.fit(SPEC, run_dir=path)
    return path


def records(path: Path) -> list:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.ray
@pytest.mark.parametrize("num_workers", [1, 2, 4, 8])
def test_any_number_of_workers_gives_the_same_bytes(cluster, unbroken, tmp_path, num_workers):
    run = gendist.fit(with_workers(num_workers), run_dir=tmp_path / "run")
    assert sha256(tmp_path / "run") == sha256(unbroken)
    assert trace(run.history) == trace(records(unbroken))


def test_what_a_run_leaves(unbroken):
    assert {path.name for path in unbroken.iterdir() if not path.name.startswith(".")} == {
        "spec.yaml",
        "manifest.json",
        "metrics.jsonl",
        "checkpoints",
        "artifact",
        "samples.png",
        "components.png",  # the family's own figure
    }
    manifest = json.loads((unbroken / "manifest.json").read_text())
    assert manifest["results"]["num_iterations"] == 12
    assert manifest["results"]["stopped"] == "reached max_iterations"
    assert manifest["versions"]["torch"] == torch.__version__
    assert len(manifest["data"]["fingerprint"]) == 64
    assert [record["iteration"] for record in records(unbroken)] == list(range(1, 13))
    spec = yaml.safe_load((unbroken / "spec.yaml").read_text())
    assert spec["fit"]["init"] == "auto"
    model = gendist.load(unbroken)
    assert model.log_prob(np.zeros((1, 64))).shape == (1,)


def test_a_fit_of_arrays_needs_no_folder(unbroken):
    from sklearn.datasets import load_digits

    run = gendist.fit(SPEC, data=load_digits().data / 16.0)
    assert run.path is None
    assert torch.equal(run.model.means, gendist.load(unbroken).means)
    assert run.history[0]["validation_log_likelihood"] < run.history[0]["log_likelihood"]


RESTARTS = {
    "name": "clusters",
    "family": "gmm",
    "seed": 3,
    "model": {"num_components": 6},
    "data": {"validation_fraction": 0.1},
    "fit": {"max_iterations": 60, "tolerance": 1e-4, "checkpoint_every": 4, "num_restarts": 6, "init": "random"},
}


@pytest.fixture(scope="module")
def clusters() -> np.ndarray:
    """(900, 3) six clusters, of which random rows often miss one."""
    rng = np.random.default_rng(0)
    return (rng.normal(size=(6, 3)) * 4)[rng.integers(0, 6, 900)] + rng.normal(size=(900, 3))


@pytest.fixture(scope="module")
def restarted(clusters, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "restarted"
    gendist.fit(RESTARTS, data=clusters, run_dir=path)
    return path


def test_the_best_restart_is_what_it_is_alone_and_all_are_accounted_for(clusters):
    """No rows are held out here: they would be others for the seed of another restart."""
    spec = {**RESTARTS, "data": {}}
    one = {**spec["fit"], "num_restarts": 1}
    run = gendist.fit(spec, data=clusters)
    results = run.results
    alone = [gendist.fit({**spec, "seed": end["seed"], "fit": one}, data=clusters) for end in results["restarts"]]
    best = results["restart"]
    assert best > 0, "a case in which restarts are of use"
    for name, tensor in alone[best].model.tensors().items():
        assert torch.equal(tensor, run.model.tensors()[name])
    assert trace(alone[best].history) == [{**record, "restart": 0} for record in trace(run.history)]
    highest = max(one.history[-1]["log_likelihood"] for one in alone)
    for end, one in zip(results["restarts"], alone, strict=True):
        if end["stopped"] == one.results["stopped"]:
            assert end["log_likelihood"] == one.history[-1]["log_likelihood"]
            assert end["num_iterations"] == len(one.history)
        else:
            assert "given up" in end["stopped"]
            assert end["num_iterations"] < len(one.history)
            assert one.history[-1]["log_likelihood"] <= highest
    assert any("given up" in end["stopped"] for end in results["restarts"])
    assert results["restarts"][best]["log_likelihood"] == highest
    assert results["restarts"][0]["seed"] == RESTARTS["seed"]


def test_what_a_run_of_several_restarts_leaves(clusters, restarted):
    run = gendist.fit(RESTARTS, data=clusters, run_dir=restarted)
    ends = run.results["restarts"]
    written = records(restarted)
    assert [record["iteration"] for record in written] == sorted(record["iteration"] for record in written)
    for i, end in enumerate(ends):
        history = [record for record in written if record["restart"] == i]
        assert [record["iteration"] for record in history] == list(range(1, end["num_iterations"] + 1))
        assert history[-1]["stopped"] == end["stopped"]
        assert history[-1]["log_likelihood"] == end["log_likelihood"]
    assert run.history == [record for record in written if record["restart"] == run.results["restart"]]
    assert run.results["log_likelihood"] >= max(end["log_likelihood"] for end in ends) - 1e-6


@pytest.mark.ray
@pytest.mark.parametrize("num_workers", [1, 3])
def test_restarts_on_any_number_of_workers_give_the_same_bytes(cluster, clusters, restarted, tmp_path, num_workers):
    gendist.fit({**RESTARTS, "cluster": {"num_workers": num_workers}}, data=clusters, run_dir=tmp_path / "run")
    assert sha256(tmp_path / "run") == sha256(restarted)
    assert trace(records(tmp_path / "run")) == trace(records(restarted))


@pytest.mark.parametrize("stop_at", [1, 6, 11])
def test_restarts_that_are_killed_go_on_to_the_same_bytes(clusters, restarted, tmp_path, stop_at):
    def stop(record):
        if record["iteration"] == stop_at:
            raise Stop

    with pytest.raises(Stop):
        gendist.fit(RESTARTS, data=clusters, run_dir=tmp_path / "run", watch=stop)
    gendist.fit(RESTARTS, data=clusters, run_dir=tmp_path / "run")
    assert sha256(tmp_path / "run") == sha256(restarted)
    assert trace(records(tmp_path / "run")) == trace(records(restarted))


@pytest.mark.parametrize("init", ["kmeans||", "kmeans++", "random", "random_responsibilities"])
def test_one_restart_is_the_first_of_several(blobs, init):
    spec = {**SPEC, "data": {}, "model": {"num_components": 3}}
    seen = {}
    for num_restarts in (1, 3):
        watched = []
        fit = {"max_iterations": 3, "tolerance": 0.0, "init": init, "num_restarts": num_restarts}
        gendist.fit({**spec, "fit": fit}, data=blobs, watch=watched.append)
        seen[num_restarts] = [record for record in trace(watched) if record["restart"] == 0]
    assert seen[1] == seen[3]
    assert len(seen[1]) == 3


def test_restarts_from_one_model_are_refused(unbroken):
    spec = {**SPEC, "fit": {"num_restarts": 2}}
    with pytest.raises(UserError, match="num_restarts is 2, but every restart would begin with the one model") as caught:
        gendist.fit(spec, init=gendist.load(unbroken))
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="num_restarts is 2"):
        gendist.fit({**spec, "fit": {"num_restarts": 2, "init": str(unbroken)}})


def test_a_finished_run_is_left_as_it_is(unbroken):
    before = {path: path.stat().st_mtime_ns for path in unbroken.rglob("*") if path.is_file() and path.name != ".lock"}
    run = gendist.fit(SPEC, run_dir=unbroken)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert len(run.history) == 12
    assert run.results["num_iterations"] == 12


class Stop(Exception):
    pass


@pytest.mark.ray
@pytest.mark.parametrize("kind", ["full", "tied", "diag", "spherical"])
@pytest.mark.parametrize("source", ["parquet", "csv"])
def test_files_weights_and_labels_on_ray_give_the_bytes_of_this_process(cluster, tmp_path, kind, source):
    rng = np.random.default_rng(1)
    frame = pd.DataFrame(rng.normal(size=(3000, 4)) + rng.integers(0, 3, (3000, 1)) * 4, columns=list("abcd"))
    frame["w"] = rng.uniform(0, 2, 3000)
    frame["y"] = np.where(rng.random(3000) < 0.1, np.where(frame.a > 6, "high", "low"), None)
    for i, start in enumerate(range(0, 3000, 1000)):
        part = frame.iloc[start : start + 1000]
        part.to_parquet(tmp_path / f"{i}.parquet", index=False, row_group_size=171)
        part.to_csv(tmp_path / f"{i}.csv", index=False)
    spec = {
        "name": "files",
        "family": "gmm",
        "model": {"num_components": 4, "covariance_type": kind},
        "data": {"path": str(tmp_path / f"*.{source}"), "weight": "w", "label": "y", "validation_fraction": 0.2},
        "fit": {"max_iterations": 4, "tolerance": 0.0},
    }
    here = gendist.fit(spec)
    there = gendist.fit({**spec, "cluster": {"num_workers": 3}})
    assert here.model.labels == there.model.labels == ("high", "low")
    for name, tensor in here.model.tensors().items():
        assert torch.equal(tensor, there.model.tensors()[name])
    assert trace(here.history) == trace(there.history)


@pytest.fixture(params=[1, 2])
def num_threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def wide_fit(num_workers: int, **more) -> gendist.Run:
    """260 features: wide enough for LAPACK to give other bytes with two threads than with one."""
    x = np.random.default_rng(0).normal(size=(1500, 260))
    spec = {
        "name": "wide",
        "family": "gmm",
        "model": {"num_components": 2, "covariance_type": "tied"},
        "fit": {"max_iterations": 3, "tolerance": 0.0, "checkpoint_every": 1, "init": "random"},
        "cluster": {"num_workers": num_workers},
    }
    return gendist.fit(spec, data=x, **more)


def digest(model) -> str:
    content = b"".join(tensor.numpy().tobytes() for _, tensor in sorted(model.tensors().items()))
    return hashlib.sha256(content + model.sample(5, seed=1).numpy().tobytes()).hexdigest()


@pytest.fixture(scope="module")
def wide() -> str:
    return digest(wide_fit(0).model)


@pytest.mark.parametrize("stop_at", [1, 2])
def test_wide_data_resume_to_the_same_bytes_with_any_number_of_threads(num_threads, wide, tmp_path, stop_at):
    def stop(record):
        if record["iteration"] == stop_at:
            raise Stop

    with pytest.raises(Stop):
        wide_fit(0, run_dir=tmp_path / "run", watch=stop)
    wide_fit(0, run_dir=tmp_path / "run")
    assert digest(gendist.load(tmp_path / "run")) == wide


@pytest.mark.ray
def test_wide_data_on_ray_give_the_same_bytes(cluster, num_threads, wide):
    assert digest(wide_fit(2).model) == wide


@pytest.mark.parametrize("num_restarts", [1, 3])
def test_power_cut_at_any_moment_ends_in_the_same_bytes(monkeypatch, blobs, tmp_path, num_restarts):
    """Before every single change that a fit makes to the disk; then the same command again."""
    fit = {"max_iterations": 3, "checkpoint_every": 1, "num_restarts": num_restarts, "init": "random"}
    spec = {**SPEC, "data": {}, "model": {"num_components": 3}, "fit": fit}
    monkeypatch.setattr(em_fitting, "draw_samples", lambda *_: None)
    with monkeypatch.context() as counting:
        calls = cut_power_at(counting, 10**9)
        gendist.fit(spec, data=blobs, run_dir=tmp_path / "unbroken")
    assert calls[0] > 40
    for number in range(1, calls[0] + 1):
        path = tmp_path / str(number)
        with monkeypatch.context() as dying:
            cut_power_at(dying, number)
            with pytest.raises(PowerCut):
                gendist.fit(spec, data=blobs, run_dir=path)
        run = gendist.fit(spec, data=blobs, run_dir=path)
        assert sha256(path) == sha256(tmp_path / "unbroken"), number
        assert trace(records(path)) == trace(records(tmp_path / "unbroken"))
        assert trace(run.history) == [record for record in trace(records(path)) if record["restart"] == run.results["restart"]]


@pytest.mark.parametrize("stop_at", [1, 3, 4, 9, 12])
@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt])
def test_an_interrupted_fit_goes_on_to_the_same_bytes(unbroken, tmp_path, stop_at, error):
    def stop(record):
        if record["iteration"] == stop_at:
            raise error

    with pytest.raises(error):
        gendist.fit(SPEC, run_dir=tmp_path / "run", watch=stop)
    assert not (tmp_path / "run" / "artifact").exists()
    if error is KeyboardInterrupt:  # nothing at all is lost
        assert resume(RunDirectory(tmp_path / "run", gendist.config.load_spec(SPEC))).iteration == stop_at
    run = gendist.fit(SPEC, run_dir=tmp_path / "run")
    assert sha256(tmp_path / "run") == sha256(unbroken)
    assert trace(records(tmp_path / "run")) == trace(records(unbroken)) == trace(run.history)


PROGRAM = """
import os, signal, sys, gendist
def watch(record):
    if record["iteration"] == int(sys.argv[3]):
        os.kill(os.getpid(), getattr(signal, sys.argv[4]))
address = sys.argv[5] if len(sys.argv) > 5 else None
gendist.fit(sys.argv[1], run_dir=sys.argv[2], watch=watch, address=address)
"""


def fit_and_die(tmp_path: Path, spec: dict, iteration: int, how: str, address: str = "") -> int:
    spec_file = tmp_path / "spec.yaml"
    spec_file.write_text(yaml.safe_dump(spec))
    arguments = [sys.executable, "-c", PROGRAM, str(spec_file), str(tmp_path / "run"), str(iteration), how]
    return subprocess.run([*arguments, *([address] if address else [])], timeout=240, capture_output=True).returncode


def test_killed_twice_it_ends_in_the_same_bytes(unbroken, tmp_path):
    assert fit_and_die(tmp_path, SPEC, 3, "SIGKILL") == -signal.SIGKILL
    assert fit_and_die(tmp_path, SPEC, 11, "SIGKILL") == -signal.SIGKILL
    gendist.fit(SPEC, run_dir=tmp_path / "run")
    assert sha256(tmp_path / "run") == sha256(unbroken)


@pytest.mark.ray
def test_a_driver_killed_on_a_cluster_is_resumed_by_other_workers(cluster, unbroken, tmp_path):
    assert fit_and_die(tmp_path, with_workers(2), 6, "SIGKILL", cluster.address) == -signal.SIGKILL
    gendist.fit(with_workers(3), run_dir=tmp_path / "run")
    assert sha256(tmp_path / "run") == sha256(unbroken)


def test_a_checkpoint_that_a_disk_lost_is_passed_over(unbroken, tmp_path):
    assert fit_and_die(tmp_path, SPEC, 9, "SIGKILL") == -signal.SIGKILL
    newest = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1]
    (newest / "0" / "model.safetensors").write_bytes(b"")
    gendist.fit(SPEC, run_dir=tmp_path / "run")
    assert sha256(tmp_path / "run") == sha256(unbroken)


def damaged(unbroken: Path, tmp_path: Path, name: str, content: bytes) -> Path:
    path = tmp_path / "run"
    shutil.copytree(unbroken, path)
    (path / name).write_bytes(content)
    return path


@pytest.mark.parametrize("name", ["spec.yaml", "manifest.json", "metrics.jsonl"])
@pytest.mark.parametrize("content", [b"[", b"[1, 2]\n", b"\xff\xfe"])
def test_a_damaged_run_directory_is_told_in_one_line_and_kept(unbroken, tmp_path, name, content):
    path = damaged(unbroken, tmp_path, name, content)
    with pytest.raises(UserError, match=name) as caught:
        gendist.fit(SPEC, run_dir=path)
    assert "\n" not in str(caught.value)
    assert (path / name).read_bytes() == content


@pytest.mark.parametrize("content", [b"[", b"[{}]", b"[1]", b"{}"])
def test_without_a_checkpoint_that_can_be_read_a_run_begins_again(unbroken, tmp_path, content):
    path = tmp_path / "run"
    shutil.copytree(unbroken, path)
    shutil.rmtree(path / "artifact")
    for folder in (path / "checkpoints").iterdir():
        (folder / "history.json").write_bytes(content)

    def stop(record):
        if record["iteration"] == 6:
            raise Stop

    with pytest.raises(Stop):
        gendist.fit(SPEC, run_dir=path, watch=stop)
    resumed = resume(RunDirectory(path, gendist.config.load_spec(SPEC)))
    assert resumed.iteration == 4, "the damaged checkpoints must not push out the good ones"
    gendist.fit(SPEC, run_dir=path)
    assert sha256(path) == sha256(unbroken)
    assert trace(records(path)) == trace(records(unbroken))


def test_a_spec_of_before_a_new_field_is_the_same_run(unbroken, tmp_path):
    path = tmp_path / "run"
    shutil.copytree(unbroken, path)
    content = yaml.safe_load((path / "spec.yaml").read_text())
    del content["fit"]["time_budget_s"]
    (path / "spec.yaml").write_text(yaml.safe_dump(content))
    assert len(gendist.fit(SPEC, run_dir=path).history) == 12


def test_a_picture_that_cannot_be_drawn_does_not_cost_the_model(tmp_path):
    x = np.full((100, 2), 1.8e19) + np.arange(200).reshape(100, 2)  # too few float64 between them for a histogram
    spec = {**SPEC, "data": {}, "model": {"num_components": 1, "covariance_regularization": 0.0}}
    gendist.fit(spec, data=x, run_dir=tmp_path / "run")
    assert bool(gendist.load(tmp_path / "run").means.isfinite().all())


def test_another_spec_is_refused(unbroken):
    other = {**SPEC, "seed": 1, "fit": {**SPEC["fit"], "max_iterations": 99}}
    with pytest.raises(UserError, match=r"another spec \(different: seed, fit.max_iterations\)"):
        gendist.fit(other, run_dir=unbroken)


def test_other_data_are_refused_in_a_resumed_run(blobs, tmp_path):
    spec = {**SPEC, "data": {}, "model": {"num_components": 3}}

    def stop(record):
        raise Stop

    with pytest.raises(Stop):
        gendist.fit(spec, data=blobs, run_dir=tmp_path / "run", watch=stop)
    with pytest.raises(UserError, match="the data has changed"):
        gendist.fit(spec, data=blobs + 1, run_dir=tmp_path / "run")
    run = gendist.fit(spec, data=blobs, run_dir=tmp_path / "run")
    # Finished, it looks at what Python hands over all the same.
    with pytest.raises(UserError, match="the data has changed"):
        gendist.fit(spec, data=blobs + 1, run_dir=tmp_path / "run")
    with pytest.raises(UserError, match="the model to start from has changed"):
        gendist.fit(spec, data=blobs, init=run.model, run_dir=tmp_path / "run")
    assert torch.equal(gendist.fit(spec, data=blobs, run_dir=tmp_path / "run").model.means, run.model.means)


def test_a_folder_of_something_else_is_refused_and_kept(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="holds files that are not of a run"):
        gendist.fit(SPEC, run_dir=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_mistake_in_the_data_leaves_no_folder(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        gendist.fit({**SPEC, "data": {"path": "nowhere.parquet"}}, run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_mistake_that_the_start_tells_can_be_put_right_in_the_same_folder(blobs, tmp_path):
    frame = pd.DataFrame(blobs, columns=list("abc")).assign(y=pd.Series([None] * len(blobs), dtype=object))
    spec = {**SPEC, "data": {"label": "y", "labels": ["p", "q"]}, "fit": {"init": "labels", "max_iterations": 2}}
    with pytest.raises(UserError, match="no row to fit has a label"):
        gendist.fit(spec, data=frame, run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    spec["fit"]["init"] = "random"
    assert gendist.fit(spec, data=frame, run_dir=tmp_path / "run").path == tmp_path / "run"


def test_two_processes_cannot_work_on_one_run(tmp_path):
    spec = gendist.config.load_spec(SPEC)
    with (
        RunDirectory(tmp_path / "run", spec),
        pytest.raises(UserError, match="another process is at work"),
        RunDirectory(tmp_path / "run", spec),
    ):
        pass


def test_a_fit_may_start_from_a_model_or_an_artifact(unbroken, blobs, tmp_path):
    model = gendist.load(unbroken)
    longer = {**SPEC, "fit": {"max_iterations": 3, "tolerance": 0.0}}
    by_model = gendist.fit(longer, init=model)
    by_path = gendist.fit({**longer, "fit": {**longer["fit"], "init": str(unbroken)}})
    assert torch.equal(by_model.model.means, by_path.model.means)
    assert (
        by_model.history[0]["log_likelihood"]
        > json.loads((unbroken / "manifest.json").read_text())["results"]["log_likelihood"] - 1e-9
    )
    assert by_model.history[0]["repairs"] == []


@pytest.mark.parametrize(
    ("change", "data", "init", "expected"),
    [
        ({}, np.zeros((5, 2)), None, "num_components is 10, but there are only 5 rows"),
        ({}, np.full((50, 2), np.nan), None, "every value of 'x_0', and of 1 other columns, is missing"),
        ({}, np.array([[1.0, 2.0], [np.inf, 1.0]]), None, "infinite in row 1"),
        ({}, {"x": np.zeros((50, 2)), "w": np.zeros(50)}, None, "all 50 rows to fit have weight 0"),
        ({}, {"x": np.zeros((50, 2)), "y": range(50)}, None, "50 different labels, but model.num_components is 10"),
        (
            {"fit": {"init": "kmean++"}},
            np.zeros((50, 2)),
            None,
            "none of auto, kmeans.., kmeans[+][+], random, random_responsibilities, labels, and no artifact",
        ),
        ({}, np.zeros((50, 2)), "nonsense", "init: a str"),
        ({}, np.zeros((50, 2)), "model", "has 1 features"),
        ({"data": {"validation_fraction": 1e-9}}, np.zeros((50, 2)), None, "leaves none to validate on"),
        ({}, np.full((50, 2), 1e200), None, "column 'x' is 1e[+]200, beyond 1e[+]75, in row 0"),
        (
            {},
            np.ma.masked_array(np.zeros((50, 2)), mask=np.tile([False, True], (50, 1))),
            None,
            "every value of 'x_1' is missing",
        ),
        ({}, np.zeros((50, 2), dtype=complex), None, "holds complex128; numbers are needed"),
        ({}, {0: np.zeros((2, 2)), 1: [[1], [2, 3]]}, None, "lists of different lengths .1 to 2."),
        ({}, np.zeros((50, 2)), object, "init: a type"),
        (None, None, None, "spec: a NoneType"),
    ],
)
def test_what_cannot_be_fitted_is_told(change, data, init, expected):
    if init == "model":
        init = GaussianMixture.from_parameters(np.full(10, 0.1), np.zeros((10, 1)), np.ones((10, 1, 1)))
        init = GaussianMixture.from_parameters(init.weights, init.means, init.covariances, covariance_regularization=1e-3)
    columns = {"weight": "w"} if isinstance(data, dict) and "w" in data else {}
    columns |= {"label": "y"} if isinstance(data, dict) and "y" in data else {}
    with pytest.raises(UserError, match=expected) as caught:
        gendist.fit(None if change is None else {**SPEC, "data": columns, **change}, data=data, init=init)
    assert "\n" not in str(caught.value)


def test_an_artifact_of_other_columns_is_no_start(blobs, tmp_path):
    frame = pd.DataFrame(blobs, columns=["a", "b", "c"])
    spec = {**SPEC, "data": {}, "model": {"num_components": 2}}
    gendist.fit(spec, data=frame, run_dir=tmp_path / "run")
    again = {**spec, "fit": {"init": str(tmp_path / "run")}}
    gendist.fit(again, data=frame)
    with pytest.raises(UserError, match="was fitted to"):
        gendist.fit(again, data=frame[["b", "a", "c"]])


def test_labels_and_a_model_to_start_from(blobs):
    """The labels of the data are the model's; a model that has others is refused."""
    labels = np.where(blobs[:, 0] > 3, "b", "a")
    spec = {**SPEC, "data": {"label": "y"}, "model": {"num_components": 3}}
    plain = gendist.fit({**spec, "data": {}}, data=blobs).model
    run = gendist.fit(spec, data={"x": blobs, "y": labels}, init=plain)
    assert run.model.labels == ("a", "b")
    assert gendist.fit({**spec, "data": {}}, data=blobs, init=run.model).model.labels == ("a", "b")
    with pytest.raises(UserError, match="has the labels"):
        gendist.fit(spec, data={"x": blobs, "y": np.where(labels == "a", "c", "d")}, init=run.model)


def test_repairs_of_the_start_survive_a_resume(tmp_path):
    x = np.repeat([[0.0, 0.0], [1.0, 1.0]], 40, axis=0)
    spec = {**SPEC, "data": {}, "model": {"num_components": 4}}

    def stop(record):
        raise Stop

    with pytest.raises(Stop):
        gendist.fit(spec, data=x, run_dir=tmp_path / "run", watch=stop)
    resumed = gendist.fit(spec, data=x, run_dir=tmp_path / "run")
    assert resumed.results["repairs"] == gendist.fit(spec, data=x).results["repairs"] != []


def test_a_model_of_another_shape_is_no_start(unbroken):
    with pytest.raises(UserError, match="num_components 10, the spec"):
        gendist.fit({**SPEC, "model": {**SPEC["model"], "num_components": 4}}, init=gendist.load(unbroken))


def test_a_time_budget_ends_a_fit():
    run = gendist.fit({**SPEC, "fit": {"max_iterations": 10_000, "tolerance": 0.0, "time_budget_s": 1e-6}})
    assert run.results["stopped"] == "used up time_budget_s"
    assert len(run.history) == 1
