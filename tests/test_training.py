"""A whole fit by gradient: any interruption, the same bytes; any number of processes, the same model; and one run directory
for all of them, which tells the truth."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from power_cut import PowerCut, cut_power_at

import gendist
from gendist import training, training_job
from gendist.config import load_spec
from gendist.launch import cli
from gendist.protocols import UserError
from gendist.run_directory import RunDirectory
from gendist.storage import patience
from gendist.train import loop
from gendist.train.checkpoints import newest, read

ROOT = Path(__file__).parents[1]
PROGRAM = Path(__file__).parent / "toy_family.py"
SPEC = {
    "name": "toy",
    "family": "toy",
    "model": {"width": 8},
    "data": {"source": "digits", "validation_fraction": 0.1},
    "fit": {
        "num_steps": 40,
        "global_batch_size": 32,
        "eval_every": 20,
        "checkpoint_every": 10,
        "record_every": 5,
        "ema": 0.05,
        "optimizer": {"learning_rate": 1e-2},
    },
}
TIMES = ("seconds", "samples_per_s")

pytestmark = pytest.mark.usefixtures("toy")


def with_fit(**changes) -> dict:
    return {**SPEC, "fit": {**SPEC["fit"], **changes}}


def sha256(run_dir: Path) -> str:
    return hashlib.sha256((run_dir / "artifact" / "model.safetensors").read_bytes()).hexdigest()


def trace(records) -> list:
    return [{key: value for key, value in record.items() if key not in TIMES} for record in records]


def records(path: Path) -> list:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def steps_kept(path: Path) -> list[int]:
    return sorted(int(folder.name) for folder in (path / "checkpoints").glob("[0-9]*"))


@pytest.fixture(scope="module")
def unbroken(toy, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "unbroken"
    gendist.fit(SPEC, run_dir=path)
    return path


def test_what_a_run_leaves(unbroken):
    assert {path.name for path in unbroken.iterdir() if not path.name.startswith(".")} == {
        "spec.yaml",
        "manifest.json",
        "metrics.jsonl",
        "checkpoints",
        "artifact",
        "samples",
        "samples.png",
    }
    assert [path.name for path in sorted((unbroken / "samples").iterdir())] == ["00000020.png", "00000040.png"]
    results = json.loads((unbroken / "manifest.json").read_text())["results"]
    assert results["stopped"] == "reached num_steps"
    assert results["num_steps"] == 40
    assert [record["step"] for record in records(unbroken)] == list(range(5, 41, 5))
    validated = {
        record["step"]: record["validation/distance"] for record in records(unbroken) if "validation/distance" in record
    }
    assert sorted(validated) == [20, 40]
    assert results["artifact_step"] == min(validated, key=validated.get)
    assert results["validation/distance"] == min(validated.values())
    assert gendist.load(unbroken).sample(3).shape == (3, 64)


def test_the_artifact_holds_the_moving_average(unbroken):
    state = newest(unbroken / "checkpoints").state
    line = gendist.load(unbroken).line.state_dict()
    for name, value in line.items():
        assert torch.equal(value, state[f"line/ema/{name}"])
        assert not torch.equal(value, state[f"line/param/{name}"])


def test_the_artifact_is_that_of_the_best_validation(monkeypatch, unbroken, tmp_path):
    """Where it only gets worse, the first validation is the best, and its checkpoint stays."""
    num_reports = [0]

    def worse_and_worse(self, batch, noise):
        return {"distance": torch.tensor(float(batch.num_rows * num_reports[0]))}

    def watch(record):
        num_reports[0] += 1

    monkeypatch.setattr(type(gendist.load(unbroken).plain), "validate", worse_and_worse)
    run = gendist.fit(with_fit(eval_every=10, keep_last=1), run_dir=tmp_path / "run", watch=watch)
    assert [record["validation/distance"] for record in run.history if "validation/distance" in record] == [1, 3, 5, 7]
    assert run.results["artifact_step"] == 10
    assert run.results["validation/distance"] == 1
    assert steps_kept(tmp_path / "run") == [10, 40]
    state = read(tmp_path / "run" / "checkpoints" / "00000010").state
    assert torch.equal(run.model.scale.weight, state["scale/ema/weight"])


def test_a_fit_of_arrays_needs_no_folder(unbroken):
    from sklearn.datasets import load_digits

    run = gendist.fit(SPEC, data=load_digits().images / 16.0)
    assert run.path is None
    assert trace(run.history) == trace(records(unbroken))
    for name, tensor in run.model.tensors().items():
        assert torch.equal(tensor, gendist.load(unbroken).tensors()[name])


class Stop(Exception):
    pass


def stop_at(step: int, error: type[BaseException] = Stop):
    def stop(record):
        if record["step"] == step:
            raise error

    return stop


@pytest.mark.parametrize("step", range(5, 41, 5))
def test_a_fit_that_fails_anywhere_goes_on_to_the_same_bytes(unbroken, tmp_path, step):
    with pytest.raises(Stop):
        gendist.fit(SPEC, run_dir=tmp_path / "run", watch=stop_at(step))
    assert not (tmp_path / "run" / "artifact").exists()
    seen = []
    run = gendist.fit(SPEC, run_dir=tmp_path / "run", watch=seen.append)
    assert seen[0]["step"] == (step - 1) // 10 * 10 + 5, "it goes on from the newest checkpoint, and from nowhere else"
    assert sha256(tmp_path / "run") == sha256(unbroken)
    assert trace(run.history) == trace(records(tmp_path / "run")) == trace(records(unbroken))


@pytest.fixture
def no_pictures(monkeypatch) -> None:
    """Of samples that are no images, which take longer than to make them."""
    for module in (training, training_job):
        monkeypatch.setattr(module, "draw_samples" if module is training else "samples_picture", lambda *_: None)


def test_power_cut_at_any_moment_ends_in_the_same_bytes(monkeypatch, no_pictures, tmp_path):
    """Before every single change that a fit makes to the disk; then the same command again."""
    x = np.random.default_rng(0).normal(size=(60, 2))
    spec = {**with_fit(num_steps=4, eval_every=2, checkpoint_every=2, record_every=1), "data": {"validation_fraction": 0.2}}
    with monkeypatch.context() as counting:
        calls = cut_power_at(counting, 10**9)
        gendist.fit(spec, data=x, run_dir=tmp_path / "unbroken")
    assert calls[0] > 40
    for number in range(1, calls[0] + 1):
        path = tmp_path / str(number)
        with monkeypatch.context() as dying:
            cut_power_at(dying, number)
            with pytest.raises(PowerCut):
                gendist.fit(spec, data=x, run_dir=path)
        gendist.fit(spec, data=x, run_dir=path)
        assert sha256(path) == sha256(tmp_path / "unbroken"), number
        assert trace(records(path)) == trace(records(tmp_path / "unbroken"))


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[4])
import gendist.models, toy_family
gendist.models.__path__.append(toy_family.FOLDER)
import gendist
def watch(record):
    if record["step"] == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
gendist.fit(sys.argv[1], run_dir=sys.argv[2], watch=watch)
"""


def test_killed_twice_it_ends_in_the_same_bytes(unbroken, tmp_path):
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(SPEC))
    for step in (15, 30):
        arguments = [str(tmp_path / "spec.yaml"), str(tmp_path / "run"), str(step), str(PROGRAM.parent)]
        done = subprocess.run([sys.executable, "-c", KILLED, *arguments], timeout=120, capture_output=True)
        assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    gendist.fit(SPEC, run_dir=tmp_path / "run")
    assert sha256(tmp_path / "run") == sha256(unbroken)
    assert trace(records(tmp_path / "run")) == trace(records(unbroken))


@pytest.mark.parametrize("damage", [b"", b"{}", b"["])
@pytest.mark.parametrize("name", ["training.json", "training.safetensors"])
def test_a_checkpoint_that_a_disk_lost_is_passed_over(unbroken, tmp_path, name, damage):
    with pytest.raises(Stop):
        gendist.fit(SPEC, run_dir=tmp_path / "run", watch=stop_at(35))
    assert steps_kept(tmp_path / "run") == [20, 30]
    (tmp_path / "run" / "checkpoints" / "00000030" / name).write_bytes(damage)
    gendist.fit(SPEC, run_dir=tmp_path / "run")
    assert sha256(tmp_path / "run") == sha256(unbroken)
    assert trace(records(tmp_path / "run")) == trace(records(unbroken))


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_told_to_end_it_leaves_a_checkpoint_and_says_how_to_go_on(tmp_path, how):
    """At a record, however far the next checkpoint is; and the bytes are those of a fit that was left alone."""
    spec = with_fit(num_steps=100_000, checkpoint_every=100_000, eval_every=0, record_every=100)
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec))
    run = tmp_path / "run"
    process = subprocess.Popen([sys.executable, PROGRAM, "fit", "spec.yaml", "--run-dir", "run"], cwd=tmp_path,
                               stderr=subprocess.PIPE, text=True)  # fmt: skip
    try:
        deadline = time.monotonic() + 100
        while not (run / "metrics.jsonl").exists():
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(how)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert err.splitlines()[-1].startswith("error: interrupted; what was reached is kept")
    (step,) = steps_kept(run)
    assert records(run)[-1]["step"] == step, "no step is lost"
    assert newest(run / "checkpoints").progress.step == step
    assert step % 100 == 0
    kept = newest(run / "checkpoints").state
    short = {**spec, "fit": {**spec["fit"], "num_steps": step}}
    gendist.fit(short, run_dir=tmp_path / "alone")
    alone = newest(tmp_path / "alone" / "checkpoints").state
    assert kept.keys() == alone.keys()
    for name, tensor in kept.items():
        assert torch.equal(tensor, alone[name]), name
    assert trace(records(run)) == [
        {key: value for key, value in record.items() if key != "stopped" and not key.startswith("validation/")}
        for record in trace(records(tmp_path / "alone"))
    ]


def test_it_does_not_wait_for_a_record_that_is_far(monkeypatch, unbroken, tmp_path):
    """Then there is a record more, and the rest is what it would have been."""

    def and_after_three_steps_more(path):
        asked = training_job.Asked
        answers = itertools.chain([asked.NOTHING] * 13, itertools.repeat(asked.TO_STOP_NOW))
        return lambda: next(answers)

    with monkeypatch.context() as patched:
        patched.setattr(training_job, "_Asked", and_after_three_steps_more)
        with pytest.raises(KeyboardInterrupt):
            gendist.fit(SPEC, run_dir=tmp_path / "run")
    assert steps_kept(tmp_path / "run") == [10, 13]
    gendist.fit(SPEC, run_dir=tmp_path / "run")
    assert sha256(tmp_path / "run") == sha256(unbroken)
    assert [record["step"] for record in records(tmp_path / "run")] == [5, 10, 13, 15, 20, 25, 30, 35, 40]


def test_asked_to_stop_where_a_checkpoint_stands_it_is_left_alone(monkeypatch, unbroken, tmp_path):
    """Right after it was written, and right after it was gone on from: nothing is put aside to be written once more."""

    def after(num_steps):
        asked = training_job.Asked
        answers = itertools.chain([asked.NOTHING] * num_steps, itertools.repeat(asked.TO_STOP_NOW))
        return lambda path: lambda: next(answers)

    checkpoints = tmp_path / "run" / "checkpoints"
    for num_steps in (10, 0, 0):
        with monkeypatch.context() as patched:
            patched.setattr(training_job, "_Asked", after(num_steps))
            with pytest.raises(KeyboardInterrupt):
                gendist.fit(SPEC, run_dir=tmp_path / "run")
        assert [path.name for path in checkpoints.iterdir()] == ["00000010"]
    gendist.fit(SPEC, run_dir=tmp_path / "run")
    assert sha256(tmp_path / "run") == sha256(unbroken)


@pytest.mark.parametrize(
    ("change", "workers", "expected"),
    [
        ({"global_batch_size": 2}, [1, 3], "1 to 3, of which 3 cannot train: fit.global_batch_size 2 is less than"),
        (
            {"global_batch_size": 7, "micro_batch_size": 1, "engine": {"kind": "deepspeed", "zero_stage": 2}},
            [1, 2],
            "1 to 2, of which 2 cannot train: fit.engine.zero_stage: 2 needs a sample in every micro-batch",
        ),
    ],
)
def test_a_number_of_workers_that_could_not_train_is_told_at_the_start(change, workers, expected, tmp_path):
    """Not in the hour in which a node is lost or comes back."""
    spec = load_spec({**with_fit(**change), "cluster": {"num_workers": workers}})
    with training.kept(spec, RunDirectory(tmp_path / "run", spec)) as begun:
        job = begun.prepare(None)
        with pytest.raises(UserError, match=expected):
            job(training.LocalLine(lambda record: None))


def test_a_worker_is_alive_while_it_validates_and_a_checkpoint_is_told_once_it_is_whole(tmp_path):
    spec, told, heard = load_spec(SPEC), [], [0]
    validated_from = []

    class Line(training.LocalLine):
        def alive(self) -> None:
            heard[0] += 1

        def checkpoint(self) -> None:
            told.append(newest(tmp_path / "run" / "checkpoints").progress.step)

    def validate(*arguments, **options):
        before = heard[0]
        values = loop_validate(*arguments, **options)
        validated_from.append(heard[0] - before)
        return values

    loop_validate = loop.validate
    with pytest.MonkeyPatch.context() as patched, training.kept(spec, RunDirectory(tmp_path / "run", spec)) as begun:
        patched.setattr(loop, "validate", validate)
        assert begun.prepare(None)(Line(lambda record: None))
    assert told == [10, 20, 30, 40]
    assert len(validated_from) == 2
    assert min(validated_from) > 0


def test_two_processes_of_torchrun_share_one_run_directory(unbroken, tmp_path):
    """Rank 0 alone writes. Killed and started again, they come to what one process comes to."""
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(SPEC))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", PROGRAM]
    command += ["fit", "spec.yaml", "--run-dir", "run"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    first = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 240
        while not (tmp_path / "run" / "checkpoints" / "00000010").exists():
            assert time.monotonic() < deadline
            assert first.poll() is None, first.stderr.read()
            time.sleep(0.02)
        children = subprocess.run(["pgrep", "-P", str(first.pid), "-f", "toy_family"], capture_output=True, text=True)
        for child in children.stdout.split():
            os.kill(int(child), signal.SIGKILL)
        first.communicate(timeout=60)
    finally:
        first.kill()
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("next:") == 1, "one process alone speaks"
    assert trace(records(tmp_path / "run"))[-1]["step"] == 40
    alone = gendist.load(unbroken).tensors()
    for name, tensor in gendist.load(tmp_path / "run").tensors().items():
        torch.testing.assert_close(tensor, alone[name], rtol=1e-5, atol=1e-5)


VAE = {
    "name": "digits",
    "family": "vae",
    "model": {"latent_dim": 2, "encoder": {"hidden_sizes": [16]}, "decoder": {"hidden_sizes": [16]}},
    "data": {"source": "digits", "validation_fraction": 0.1},
    # Steps enough for word of one of the first to come back while there are others, and so small that rounding stays rounding.
    "fit": {
        **SPEC["fit"],
        "num_steps": 1500,
        "eval_every": 500,
        "checkpoint_every": 250,
        "optimizer": {"kind": "sgd", "learning_rate": 1e-4},
    },
}


@pytest.mark.ray
def test_workers_of_ray_come_to_what_one_process_comes_to(cluster, tmp_path):
    """Two at first, which are told to stop; then one, then none at all: the same run directory serves them all."""
    alone = gendist.fit(VAE, run_dir=tmp_path / "alone")
    path = tmp_path / "run"
    seen = []

    def ask_to_stop(record):
        seen.append(record)
        if record["step"] == 15:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        gendist.fit({**VAE, "cluster": {"num_workers": 2}}, run_dir=path, watch=ask_to_stop)
    reached = max(steps_kept(path))
    assert 15 <= reached < 1500
    assert seen[0]["step"] == 5
    run = gendist.fit({**VAE, "cluster": {"num_workers": [1, 1]}}, run_dir=path)
    for name, tensor in run.model.tensors().items():
        torch.testing.assert_close(tensor, alone.model.tensors()[name], rtol=1e-4, atol=1e-5)
    assert records(path)[-1]["step"] == 1500
    again = gendist.fit(VAE, run_dir=path)
    assert again.results == run.results


def test_torchrun_beside_workers_of_ray_is_refused(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(UserError, match="num_workers is 2, but torchrun has started"):
        gendist.fit({**SPEC, "cluster": {"num_workers": 2}})


def test_a_finished_run_is_left_as_it_is(unbroken):
    before = {path: path.stat().st_mtime_ns for path in unbroken.rglob("*") if path.is_file() and path.name != ".lock"}
    run = gendist.fit(SPEC, run_dir=unbroken)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert len(run.history) == 8


def test_what_may_change_between_a_run_and_its_resume(unbroken, tmp_path):
    with pytest.raises(Stop):
        gendist.fit(SPEC, run_dir=tmp_path / "run", watch=stop_at(25))
    changed = with_fit(micro_batch_size=8, keep_last=1, max_failures=0)
    gendist.fit({**changed, "tracking": {"wandb": "disabled"}}, run_dir=tmp_path / "run")
    ours, alone = gendist.load(tmp_path / "run").tensors(), gendist.load(unbroken).tensors()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, alone[name], rtol=1e-5, atol=1e-5)
    for change in ({"global_batch_size": 64}, {"num_steps": 99}, {"ema": 0.1}):
        with pytest.raises(UserError, match=rf"another spec \(different: fit.{next(iter(change))}\)"):
            gendist.fit(with_fit(**change), run_dir=unbroken)


def test_other_data_are_refused_in_a_resumed_run(no_pictures, tmp_path):
    x = np.random.default_rng(0).normal(size=(200, 3))
    spec = {**SPEC, "data": {}}
    with pytest.raises(Stop):
        gendist.fit(spec, data=x, run_dir=tmp_path / "run", watch=stop_at(25))
    with pytest.raises(UserError, match="the data has changed"):
        gendist.fit(spec, data=x + 1, run_dir=tmp_path / "run")
    gendist.fit(spec, data=x, run_dir=tmp_path / "run")
    with pytest.raises(UserError, match="the data has changed"):
        gendist.fit(spec, data=x + 1, run_dir=tmp_path / "run")


def test_labels_and_weights_reach_the_loss(no_pictures, tmp_path):
    """Rows of weight 0 are as if they were not there: the mean that is learned is that of the others."""
    x = np.concatenate([np.full((100, 2), 3.0), np.full((100, 2), -50.0)])
    data = {"x": x, "w": np.repeat([1.0, 0.0], 100), "y": np.repeat(["a", "b"], 100)}
    spec = {**with_fit(num_steps=300, ema=0.0, eval_every=0), "data": {"weight": "w", "label": "y"}}
    model = gendist.fit(spec, data=data).model
    assert model.labels == ("a", "b")
    assert float((model.sample(50) - 3.0).abs().max()) < 1.0


def test_behind_transforms(no_pictures, tmp_path):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 4)) * [1, 10, 100, 1000] + 5000.0
    spec = {**SPEC, "data": {"transforms": ["standardize"], "validation_fraction": 0.2}}
    with pytest.raises(Stop):
        gendist.fit(spec, data=x, run_dir=tmp_path / "run", watch=stop_at(25))
    run = gendist.fit(spec, data=x, run_dir=tmp_path / "run")
    alone = gendist.fit(spec, data=x)
    assert torch.equal(run.model.sample(10), alone.model.sample(10))
    assert bool(((run.model.sample(200).mean(0) - 5000.0).abs() < torch.tensor(x.std(0)) * 2).all())


@pytest.mark.parametrize(
    ("change", "data", "expected"),
    [
        ({"model": {"width": 2000}}, np.zeros((50, 2)), "model.width is 2000; a toy is small"),
        ({}, np.array([[1.0, np.nan]] * 50), "50 entries are missing, 50 of them in 'x_1'; the family toy takes none"),
        ({}, np.full((50, 2), 1e60), "row 0: feature 0 is 1e[+]60, which float32 does not hold"),
        ({}, np.zeros((0, 2)), "the data set is empty"),
        (with_fit(optimizers={"lime": {}}), np.zeros((50, 2)), "no network is called lime; there are line, scale"),
        (with_fit(precision="float16"), np.zeros((50, 2)), "float16 needs a GPU"),
        (
            {"fit": {**SPEC["fit"], "early_stopping": 2}},
            np.zeros((50, 2)),
            "fit.early_stopping: nothing is validated to stop by",
        ),
        ({"cluster": {"use_gpu": True}}, np.zeros((50, 2)), "torch finds no GPU"),
    ],
)
def test_what_cannot_be_trained_is_told_and_leaves_no_folder(tmp_path, change, data, expected):
    with pytest.raises(UserError, match=expected) as caught:
        gendist.fit({**SPEC, "data": {}, **change}, data=data, run_dir=tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


STILL = {"kind": "sgd", "learning_rate": 1e-30}  # moves nothing


@pytest.mark.parametrize("is_in_memory", [False, True])
def test_the_first_weights_are_those_of_the_run_to_start_from(unbroken, no_pictures, tmp_path, is_in_memory):
    spec = with_fit(num_steps=12, ema=0.0, optimizer=STILL)
    if is_in_memory:
        run = gendist.fit(spec, init=gendist.load(unbroken), run_dir=tmp_path / "run")
    else:
        run = gendist.fit({**spec, "fit": {**spec["fit"], "init": str(unbroken)}}, run_dir=tmp_path / "run")
    fresh = gendist.fit(spec).model.tensors()
    for name, tensor in gendist.load(unbroken).tensors().items():
        assert torch.equal(run.model.tensors()[name], tensor)
    assert any(not torch.equal(run.model.tensors()[name], tensor) for name, tensor in fresh.items())


def test_a_run_that_goes_on_from_a_checkpoint_starts_from_no_model(unbroken, no_pictures, tmp_path):
    spec = with_fit(init=str(unbroken), num_steps=30)
    with pytest.raises(Stop):
        gendist.fit(spec, run_dir=tmp_path / "run", watch=stop_at(25))
    gendist.fit(spec, run_dir=tmp_path / "run")
    alone = gendist.fit(spec, run_dir=tmp_path / "alone")
    assert sha256(tmp_path / "run") == sha256(alone.path)


def test_a_model_to_start_from_brings_its_transforms(no_pictures, tmp_path):
    x = np.random.default_rng(0).normal(size=(300, 4)) * [1, 10, 100, 1000] + 5000.0
    spec = {**SPEC, "data": {"transforms": ["standardize"]}}
    first = gendist.fit(spec, data=x, run_dir=tmp_path / "first")
    still = with_fit(num_steps=5, ema=0.0, optimizer=STILL, init=str(first.path))
    run = gendist.fit({**spec, "fit": still["fit"]}, data=2.0 * x)
    assert torch.equal(run.model.sample(10), first.model.sample(10))
    with pytest.raises(UserError, match="was fitted behind other transforms"):
        gendist.fit({**SPEC, "data": {}, "fit": still["fit"]}, data=x)


def test_a_model_to_start_from_that_does_not_fit_is_told_and_leaves_no_folder(unbroken, no_pictures, tmp_path):
    for change, data, expected in (
        ({"model": {"width": 9}}, None, "is another network than that of this spec"),
        ({"data": {}}, np.zeros((50, 2)), "has 64 features, the data 2"),
        (
            {"family": "vae", "model": {"latent_dim": 2}, "fit": {"num_steps": 2}},
            None,
            "this one makes a VariationalAutoencoder",
        ),
    ):
        with pytest.raises(UserError, match=expected):
            gendist.fit({**SPEC, **change}, data=data, init=gendist.load(unbroken), run_dir=tmp_path / "run")
        assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="'nowhere': no artifact that exists"):
        gendist.fit(with_fit(init="nowhere"), run_dir=tmp_path / "run")


def test_a_loss_that_is_not_finite_names_the_last_good_checkpoint(tmp_path):
    spec = {**SPEC, "model": {"explode_at": 17}}
    with pytest.raises(
        UserError, match=rf"the last good checkpoint is that of step 10 in {tmp_path}/run/checkpoints"
    ) as caught:
        gendist.fit(spec, run_dir=tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert steps_kept(tmp_path / "run") == [10]


def test_a_batch_that_was_skipped_is_skipped_again_after_a_resume(tmp_path):
    spec = {**with_fit(on_nan="skip_batch"), "model": {"explode_at": 17}}
    alone = gendist.fit(spec)
    assert [record["skipped"] for record in alone.history if "skipped" in record] == [
        [{"step": 17, "phase": "place"}, {"step": 17, "phase": "spread"}]
    ]
    with pytest.raises(Stop):
        gendist.fit(spec, run_dir=tmp_path / "run", watch=stop_at(20))
    again = gendist.fit(spec, run_dir=tmp_path / "run")
    assert trace(again.history) == trace(alone.history)


def test_a_full_disk_loses_nothing(unbroken, tmp_path):
    """A limit on the size of files stands for it: at first for the rows, then for the records."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    path = tmp_path / "run"
    for limit, expected in ((100_000, "no room for the rows"), (500_000, None)):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            if expected:
                with pytest.raises(UserError, match=expected):
                    gendist.fit(SPEC, run_dir=path)
                assert not path.exists()
            else:
                gendist.fit(SPEC, run_dir=path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert sha256(path) == sha256(unbroken)


def test_a_disk_without_room_for_records_or_checkpoints_is_told_in_one_line(monkeypatch, unbroken, tmp_path):
    import safetensors.torch

    full = OSError(28, "No space left on device")

    def no_room(*_, **__):
        raise full

    for number, (module, name) in enumerate([(safetensors.torch, "save_file"), (training_job.RunDirectory, "append_metrics")]):
        path = tmp_path / str(number)
        with pytest.raises(Stop):
            gendist.fit(SPEC, run_dir=path, watch=stop_at(15))
        with monkeypatch.context() as patched:
            patched.setattr(module, name, no_room)
            patched.setattr(patience, "PATIENCE_S", 0.2)
            with pytest.raises((UserError, OSError), match="No space left") as caught:
                gendist.fit(SPEC, run_dir=path)
        assert "\n" not in str(caught.value)
        gendist.fit(SPEC, run_dir=path)
        assert sha256(path) == sha256(unbroken)


def test_a_bar_of_training_shows_losses_and_what_is_left(unbroken):
    from rich.console import Console

    from gendist.launch import progress

    lines = []
    console = Console(file=open(os.devnull, "w"), force_terminal=False)  # noqa: SIM115
    console.print = lambda line, **_: lines.append(line)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(progress, "SECONDS_A_LINE", -1.0)
        with progress.fit_progress(console, load_spec(SPEC).fit) as watch:
            for record in records(unbroken):
                watch({**record, "samples_per_s": 16.0})
    first, half = records(unbroken)[0], lines[3]
    assert lines[0].startswith(f"step 5/40  place {first['place/loss']:.4g}  spread {first['spread/loss']:.4g}")
    # 20 steps of 32 samples at 16 a second
    assert half.endswith(f"validation/distance {records(unbroken)[3]['validation/distance']:.4g}  16 samples/s  0:00:40 left")


def test_samples_of_float32_are_written_as_any_others(monkeypatch, unbroken, tmp_path):
    monkeypatch.chdir(tmp_path)
    for out in ("samples.parquet", "samples.npy"):
        monkeypatch.setattr(sys, "argv", ["gendist", "sample", str(unbroken), "-n", "20", "--out", out])
        cli.main()
    expected = gendist.load(unbroken).sample(20)
    assert expected.dtype == torch.float32
    np.testing.assert_array_equal(np.load("samples.npy"), expected)
    np.testing.assert_array_equal(pd.read_parquet("samples.parquet").to_numpy(), expected)


def test_it_is_scored_by_the_bound_that_it_has(monkeypatch, capsys, unbroken, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["gendist", "score", str(unbroken), "digits", "--out", "scores.npz"])
    cli.main()
    out, _ = capsys.readouterr()
    assert "log_prob_bound: a lower bound of the log density" in out
    from sklearn.datasets import load_digits

    expected = gendist.load(unbroken).log_prob_bound(load_digits().data / 16.0)
    np.testing.assert_array_equal(np.load("scores.npz")["log_prob_bound"], expected)


def test_a_score_of_a_family_without_density_says_why(monkeypatch, capsys, unbroken, tmp_path):
    monkeypatch.chdir(tmp_path)
    model = type(gendist.load(unbroken).plain)
    monkeypatch.setattr(model, "not_offered", {**model.not_offered, "log_prob_bound": "nor that"})
    monkeypatch.setattr(sys, "argv", ["gendist", "score", str(unbroken), "digits", "--out", "scores.npz"])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == 2
    assert capsys.readouterr().err == "error: score: a toy has a bound of its density alone\n"
