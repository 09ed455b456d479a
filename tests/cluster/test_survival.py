"""Whatever happens to the hosts, the network and the driver: the same bytes as where nothing did, or one clear line in time.

Runs are as long as their faults take, on any machine: they are told to end after the last of them, and what they have come to
is held against a run on this machine, undisturbed, of as many iterations or steps.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from survivors import ROOT, Command, all_get_on, is_at, kill_a_worker, trace, wait_until, write_spec
from testbed import Testbed

import gendist

pytestmark = [pytest.mark.ray, pytest.mark.multihost, pytest.mark.timeout(900)]

CUT_S = 12.0  # longer than the cluster needs to give a node up
ENDLESS = 1_000_000
SMALL = {"hidden_sizes": [16]}
EM_FIT = {"max_iterations": ENDLESS, "tolerance": 0.0, "checkpoint_every": 5}
TRAINING_FIT = {"num_steps": ENDLESS, "global_batch_size": 32, "checkpoint_every": 20, "record_every": 5, "ema": 0.05}
VAE = {"family": "vae", "model": {"latent_dim": 2, "likelihood": "gaussian", "encoder": SMALL, "decoder": SMALL}}
GAN = {"family": "gan", "model": {"latent_dim": 2, "generator": SMALL, "discriminator": SMALL}}
DIGITS = {"source": "digits", "validation_fraction": 0.1}
ZERO = {"engine": {"kind": "deepspeed", "zero_stage": 2}}
EM_TASKS = (b"ray::_run_task", b"ray::_load_task")
TRAINING_WORKERS = (b"ray::_RayTrainWorker", b"ray::RayTrainWorker", b"ray::run_train_fn")
REPLICAS = (b"ray::ServeReplica",)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Rows for a mixture, and sequences for a hidden Markov model."""
    import pandas as pd

    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    centers = 4.0 * rng.normal(size=(3, 3))
    np.save(folder / "rows.npy", centers[rng.integers(0, 3, 3_000)] + rng.normal(size=(3_000, 3)))
    states = np.cumsum(rng.random((100, 30)) < 0.1, axis=1) % 3
    steps = rng.normal(size=(100, 30)) + 2.0 * states
    pd.DataFrame({"id": np.repeat(np.arange(100), 30), "x": steps.ravel()}).to_parquet(folder / "steps.parquet")
    return folder


def em_specs(data: Path) -> dict[str, dict]:
    return {
        "gmm": {
            "family": "gmm",
            "model": {"num_components": 3},
            "data": {"path": str(data / "rows.npy")},
            "fit": {**EM_FIT, "init": "random"},
        },
        "hmm": {
            "family": "hmm",
            "model": {"num_states": 3},
            "data": {"path": str(data / "steps.parquet"), "sequence": "id"},
            "fit": EM_FIT,
        },
    }


def fit(bed: Testbed, folder: Path, name: str, spec: dict, num_workers: object = 2, on: int = 0) -> Command:
    path = write_spec(folder, name, {"name": name, **spec, "cluster": {"num_workers": num_workers}})
    out = folder / name
    return Command(bed.hosts[on], folder, "fit", str(path), "--run-dir", str(out), "--address", bed.address, out=out)


def told_to_end(command: Command) -> Path:
    """The checkpoint that it leaves."""
    command.process.send_signal(signal.SIGTERM)
    assert command.end() == 130, command.said()[-3000:]
    assert "Traceback" not in command.said()
    return max((command.out / "checkpoints").glob("[0-9]*"))


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("gmm", "cut"),
        ("hmm", "killed"),
        pytest.param("gmm", "killed", marks=pytest.mark.exhaustive),
        pytest.param("hmm", "cut", marks=pytest.mark.exhaustive),
    ],
)
def test_em_survives_a_killed_worker_and_driver_and_a_host_that_is_cut_or_killed(bed, data, tmp_path, name, fault):
    command = fit(bed, tmp_path, name, em_specs(data)[name])
    command.start()
    all_get_on([command])
    kill_a_worker(bed, EM_TASKS)
    all_get_on([command])
    if fault == "cut":
        bed.cut(bed.hosts[1])
    else:
        bed.kill(bed.hosts[1])
    mended_at = time.monotonic() + CUT_S
    command.kill()
    command.start()  # while the cluster does not know yet, or just begins to
    while time.monotonic() < mended_at:
        time.sleep(0.1)
    if fault == "cut":
        bed.mend(bed.hosts[1])
    else:
        bed.restart(bed.hosts[1])
    all_get_on([command])
    assert "resuming after iteration" in command.said()
    reached = told_to_end(command)
    spec = yaml.safe_load((tmp_path / f"{name}.yaml").read_text())
    spec |= {"fit": spec["fit"] | {"max_iterations": int(reached.name)}, "cluster": {"num_workers": 0}}
    undisturbed = gendist.fit(spec, run_dir=tmp_path / f"undisturbed-{name}").path
    expected = (undisturbed / "artifact" / "model.safetensors").read_bytes()
    assert (reached / "0" / "model.safetensors").read_bytes() == expected
    assert without_end(trace(command.out)) == without_end(trace(undisturbed))


def without_end(records: list[dict]) -> list[dict]:
    """Without what is said of why a run stopped."""
    return [{key: value for key, value in record.items() if key != "stopped"} for record in records]


def undisturbed_by_torchrun(folder: Path, spec: dict, num_steps: int) -> Path:
    """The checkpoint of a run of as many steps by two processes on this machine."""
    name = f"undisturbed-{spec['name']}"
    spec = {**spec, "fit": {**spec["fit"], "num_steps": num_steps}, "cluster": {"num_workers": 0}}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(spec))
    program = [str(ROOT / "launch.py"), "fit", f"{name}.yaml", "--run-dir", name]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *program]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / name / "checkpoints" / f"{num_steps:08d}"


def assert_as_undisturbed(command: Command, reached: Path, folder: Path) -> None:
    """Parameters, moments and averages are equal to the byte."""
    spec = yaml.safe_load((folder / f"{command.out.name}.yaml").read_text())
    expected = undisturbed_by_torchrun(folder, spec, int(reached.name))
    assert (reached / "training.safetensors").read_bytes() == (expected / "training.safetensors").read_bytes()


@pytest.mark.parametrize("worker_killed", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_ddp_survives_a_cut_network_and_lost_packets(bed, tmp_path, worker_killed):
    command = fit(bed, tmp_path, "ddp", {**VAE, "data": DIGITS, "fit": TRAINING_FIT})
    command.start()
    all_get_on([command])
    at_work = [host for host in bed.hosts[1:] if workers_of_training(host)]
    assert len(at_work) == 2, "one host has one worker"
    bed.cut(at_work[1])
    mended_at = time.monotonic() + CUT_S
    while time.monotonic() < mended_at:
        assert command.is_running(), command.said()
        time.sleep(0.1)
    bed.mend(at_work[1])
    all_get_on([command], by=40)
    if worker_killed:
        kill_a_worker(bed, TRAINING_WORKERS)
        all_get_on([command], by=40)
    for host in bed.hosts[1:]:
        bed.lossy(host, loss=0.02)
    all_get_on([command], by=20)
    assert_as_undisturbed(command, told_to_end(command), tmp_path)


def workers_of_training(host) -> list[int]:
    return [pid for pid in host.pids() if is_at(pid, TRAINING_WORKERS)]


def test_zero_survives_a_killed_host_and_a_killed_driver(bed, tmp_path):
    command = fit(bed, tmp_path, "zero", {**GAN, "data": DIGITS, "fit": {**TRAINING_FIT, **ZERO}})
    command.start()
    all_get_on([command])
    at_work = [host for host in bed.hosts[1:] if workers_of_training(host)]
    bed.kill(at_work[0])
    all_get_on([command], by=20)
    command.kill()
    command.start()
    all_get_on([command], by=20)
    assert_as_undisturbed(command, told_to_end(command), tmp_path)


@pytest.mark.exhaustive
def test_elastic_training_uses_a_host_that_is_added_and_sees_the_same_samples(bed, tmp_path):
    for host in bed.hosts[2:]:
        bed.kill(host)
        bed.wait_until_lost(host)
    fit_block = {**TRAINING_FIT, "num_steps": ENDLESS}
    command = fit(bed, tmp_path, "elastic", {**VAE, "data": DIGITS, "fit": fit_block}, [1, 3])
    command.start()
    all_get_on([command])
    assert "training with 1 worker\n" in plain(command.said())
    bed.add_host()
    wait_until(lambda: "training with 2 workers" in command.said(), "training with 2 workers")
    all_get_on([command], by=20)
    reached = told_to_end(command)
    records = trace(command.out)
    steps = [record["step"] for record in records if not record.get("stopped")]
    assert steps == sorted(set(steps)), "no step is taken twice"
    assert steps[:-1] == list(range(5, 5 * len(steps), 5))[: len(steps) - 1]
    spec = yaml.safe_load((tmp_path / "elastic.yaml").read_text())
    expected = undisturbed_by_torchrun(tmp_path, spec, int(reached.name))
    progress, as_progress = (json.loads((path / "training.json").read_text())["progress"] for path in (reached, expected))
    assert progress["step"] == as_progress["step"]
    by_step = {record["step"]: record for record in trace(expected.parents[1])}
    for record in records:
        if record["step"] % 5 == 0:
            loss = by_step[record["step"]]["autoencoder/loss"]
            assert record["autoencoder/loss"] == pytest.approx(loss, rel=1e-3)


def plain(text: str) -> str:
    """Without what a progress bar leaves."""
    return "\n".join(line.rstrip() for line in text.replace("\r", "\n").splitlines()) + "\n"


@pytest.mark.exhaustive
def test_samples_are_written_and_served_while_hosts_and_workers_are_killed(bed, data, tmp_path):
    from gendist.bulk.work import sample
    from gendist.serve.client import Client

    spec = em_specs(data)["gmm"]
    spec = {"name": "served", **spec, "fit": {**spec["fit"], "max_iterations": 5}}
    model = gendist.fit(spec, run_dir=tmp_path / "served").model
    (tmp_path / "tokens").write_text("a-token-of-the-test\n")
    port = 8123
    server = Command(bed.hosts[0], tmp_path, "serve", str(tmp_path / "served"), "--host", "0.0.0.0", "--port", str(port),
                     "--replicas", "2", "--token-file", str(tmp_path / "tokens"), "--address", bed.address,
                     out=tmp_path / "server")  # fmt: skip
    server.start()
    head = bed.hosts[0].address
    answers, wrong, ended = [0], [], threading.Event()

    def ask() -> None:
        number = 0
        while not ended.is_set():
            try:
                with Client(f"http://{head}:{port}", "a-token-of-the-test") as client:
                    while not ended.is_set():
                        number += 1
                        x = client.sample("served", 50, seed=number).x
                        if not np.array_equal(np.asarray(x), model.sample(50, seed=number).numpy()):
                            wrong.append(number)
                        answers[0] += 1
            except Exception:
                time.sleep(0.2)  # it is not there yet, or lost replicas: no answer is a wrong one

    asking = threading.Thread(target=ask)
    asking.start()

    def answered_more(by: int = 20) -> None:
        before = answers[0]
        wait_until(lambda: answers[0] >= before + by or not server.is_running(), f"{by} answers more than {before}", 240)
        assert server.is_running(), server.said()[-3000:]

    try:
        answered_more()
        writing = Command(bed.hosts[0], tmp_path, "sample", str(tmp_path / "served"), "-n", "8000000", "--seed", "5", "--out",
                          str(tmp_path / "rows"), "--address", bed.address, "cluster.num_workers=1",
                          out=tmp_path / "rows")  # fmt: skip
        writing.start()
        all_get_on([writing], by=1)
        kill_a_worker(bed, (b"ray::_run_task",))
        all_get_on([writing], by=1)
        replicas = [host for host in bed.hosts[1:] if any(is_at(pid, REPLICAS) for pid in host.pids())]
        bed.kill(replicas[0])
        answered_more()
        writing.kill()
        bed.restart(replicas[0])
        kill_a_worker(bed, REPLICAS)
        for host in bed.hosts[1:]:
            if host.number != replicas[0].number:
                bed.lossy(host, loss=0.02)
        answered_more()
        writing.start()
        assert writing.end(300) == 0, writing.said()[-3000:]
        answered_more()
    finally:
        ended.set()
        asking.join()
        server.process.send_signal(signal.SIGTERM)
    assert server.end() == 0, server.said()[-3000:]
    assert not wrong
    sample(tmp_path / "served", 8_000_000, tmp_path / "undisturbed", seed=5)
    parts = sorted(path.name for path in (tmp_path / "undisturbed").glob("part-*"))
    assert parts == sorted(path.name for path in (tmp_path / "rows").glob("part-*"))
    for part in parts:
        assert (tmp_path / "rows" / part).read_bytes() == (tmp_path / "undisturbed" / part).read_bytes()


# The command line with less patience than it has: with a cluster that has no room, and with a head that does not answer.
IMPATIENT = """
import sys
from gendist import ray_cluster
ray_cluster.NO_ROOM_LIMIT_S = ray_cluster.HEAD_LIMIT_S = 5.0
from gendist.launch.cli import main
sys.argv = ["gendist", *sys.argv[1:]]
main()
"""


@pytest.mark.exhaustive
def test_a_cluster_that_never_recovers_ends_a_run_with_a_line_and_a_checkpoint(bed, data, tmp_path):
    commands = [
        fit(bed, tmp_path, "gmm", em_specs(data)["gmm"], 1),
        fit(bed, tmp_path, "vae", {**VAE, "data": DIGITS, "fit": TRAINING_FIT}),
    ]
    (tmp_path / "impatient.py").write_text(IMPATIENT)
    for command in commands:
        command.program = str(tmp_path / "impatient.py")
        command.start()
    all_get_on(commands, by=25)
    for host in bed.hosts[1:]:
        bed.cut(host)
    for command in commands:
        assert command.end(120) == 2, command.said()[-3000:]
        last = plain(command.said()).strip().splitlines()[-1]
        assert last.startswith("error: the cluster has had room for 0 of "), command.said()[-3000:]
        assert "Traceback" not in command.said()
        assert list((command.out / "checkpoints").glob("[0-9]*"))


@pytest.mark.exhaustive
def test_a_driver_whose_head_is_gone_ends_with_a_line_and_a_checkpoint(data, tmp_path):
    """On a bed of its own, which ends with its head."""
    with Testbed(num_hosts=2, num_cpus=2, head_cpus=0) as bed:
        bed.start_ray()
        commands = [
            fit(bed, tmp_path, "gmm", em_specs(data)["gmm"], 1, on=1),
            fit(bed, tmp_path, "vae", {**VAE, "data": DIGITS, "fit": TRAINING_FIT}, 1, on=1),
        ]
        (tmp_path / "impatient.py").write_text(IMPATIENT)
        for command in commands:
            command.program = str(tmp_path / "impatient.py")
            command.start()
        all_get_on(commands, by=25)
        bed.kill(bed.hosts[0])
        for command in commands:
            assert command.end(120) == 2, command.said()[-3000:]
            last = plain(command.said()).strip().splitlines()[-1]
            assert last.startswith("error: the head of the cluster ("), command.said()[-3000:]
            assert list((command.out / "checkpoints").glob("[0-9]*"))
