"""Jobs on a real cluster with a dashboard and a token: submitted, attached to, killed, stopped, resumed."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import requests
import yaml

import gendist
from gendist.config import load_spec
from gendist.launch import jobs
from gendist.launch.ray_jobs import RayJobs
from gendist.launch.submission import State
from gendist.protocols import UserError

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parents[2]
MARK = "GENDIST_TEST_HEAD"  # in the environment of the head and of all that it starts
WANDB_KEY = "f" * 40
SPEC = {
    "name": "blobs",
    "family": "gmm",
    "model": {"num_components": 3},
    "data": {"path": "data/*.npy"},  # of the machine that submits
    "fit": {"max_iterations": 30, "tolerance": 0.0, "init": "random", "checkpoint_every": 10},
    "cluster": {"num_workers": 1},
    "tracking": {"wandb": "disabled"},
}


@dataclass(frozen=True)
class Head:
    address: str
    token: str
    mark: str

    def processes(self, of: str = "") -> list[int]:
        """What runs there, whose command line has this text."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                ours = f"{MARK}={self.mark}".encode() in (process / "environ").read_bytes().split(b"\0")
                if ours and of.encode() in (process / "cmdline").read_bytes():
                    found.append(int(process.name))
            except OSError:
                pass
        return found

    def end(self) -> None:
        """Kill all of it."""
        while processes := self.processes():
            for pid in processes:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)


@pytest.fixture(scope="module")
def head(tmp_path_factory) -> Iterator[Head]:
    """A Ray head with two CPUs, of which nothing is left at the end."""
    with_ports = [socket.create_server(("127.0.0.1", 0)) for _ in range(6)]
    port, *others = [each.getsockname()[1] for each in with_ports]
    for each in with_ports:
        each.close()
    names = ("dashboard-port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port", "runtime-env-agent-port")
    names = (*names, "ray-client-server-port")
    mark, token, folder = secrets.token_hex(8), secrets.token_hex(32), f"/tmp/ray-jobs-{os.getpid()}"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # the code comes with the job
    environment |= {MARK: mark, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", f"--port={port}", f"--temp-dir={folder}"]
    command += ["--num-cpus=2", "--object-store-memory=100000000", "--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1"]
    command += [f"--{name}={value}" for name, value in zip(names, others, strict=True)]
    head = Head(f"http://127.0.0.1:{others[0]}", token, mark)
    try:
        begun = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
        if begun.returncode:  # Ray gives itself 30 s, which may be too short on a busy machine
            head.end()
            begun = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
        assert begun.returncode == 0, begun.stdout + begun.stderr
        yield head
    finally:
        head.end()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def here(head, tmp_path, monkeypatch) -> Path:
    """The folder of a person who knows the token, and has a key of Weights & Biases, which is nobody else's business."""
    (tmp_path / "data").mkdir()
    x = np.random.default_rng(0).normal(size=(2000, 3)) + 4.0 * np.random.default_rng(1).integers(0, 3, size=(2000, 1))
    np.save(tmp_path / "data" / "a.npy", x[:1200])
    np.save(tmp_path / "data" / "b.npy", x[1200:])
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(SPEC))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_AUTH_TOKEN", head.token)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", head.address)
    monkeypatch.setenv("WANDB_API_KEY", WANDB_KEY)
    return tmp_path


def submitted(here: Path, *arguments: str) -> subprocess.Popen:
    """The command, with the run kept in `run`."""
    command = [sys.executable, str(ROOT / "launch.py"), "submit", "spec.yaml", *arguments, "--run-dir", str(here / "run")]
    return subprocess.Popen(command, cwd=here, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(command: subprocess.Popen, code: int = 0) -> tuple[str, str]:
    """What it has said, once it has ended."""
    try:
        out, err = command.communicate(timeout=150)
    finally:
        command.kill()
    assert command.returncode == code, out + err
    return out, err


def until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 100
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def num_records(run: Path) -> int:
    return (run / "metrics.jsonl").read_bytes().count(b"\n") if (run / "metrics.jsonl").exists() else 0


def check_same_as_here(here: Path, *overrides: str) -> None:
    """The run on the cluster is that of this process, to the byte, with every record once."""
    spec = load_spec(SPEC, ["cluster.num_workers=0", *overrides])
    gendist.fit(spec, run_dir=here / "local")
    for name in ("model.json", "model.safetensors"):
        assert (here / "run" / "artifact" / name).read_bytes() == (here / "local" / "artifact" / name).read_bytes()
    records = [
        [json.loads(line) | {"seconds": 0} for line in (here / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("run", "local")
    ]
    assert records[0] == records[1]


def test_pressed_twice_at_once_it_is_one_job_with_the_bytes_of_a_local_fit(head, here, capsys):
    commands = [submitted(here), submitted(here)]
    said = [ended(command)[0] for command in commands]
    for out in said:
        assert "blobs: reached max_iterations after 30 iterations" in out
        assert f"sample {here / 'run'} -n 64" in out
    assert sum("submitted gendist-blobs-" in out for out in said) == 1
    assert sum("; attached" in out for out in said) == 1
    (attempt,) = RayJobs.at(None).attempts()
    assert attempt.state is State.FINISHED
    check_same_as_here(here)

    # Once more: it is finished, and nothing is done.
    before = (here / "run" / "manifest.json").read_bytes()
    assert jobs.submit(load_spec(here / "spec.yaml"), str(here / "run"), None, False, False, print) == 0
    out = capsys.readouterr().out
    assert f"{attempt.submission_id} is finished" in out
    assert "blobs: reached max_iterations after 30 iterations" in out
    assert RayJobs.at(None).attempts() == [attempt]
    assert (here / "run" / "manifest.json").read_bytes() == before

    # What anybody may see who reaches the cluster, and what its files say: no secret.
    kept = json.dumps(requests.get(f"{head.address}/api/jobs/", headers={"Authorization": f"Bearer {head.token}"}).json())
    kept += RayJobs.at(None).log(attempt.submission_id)
    kept += "".join(file.read_text(errors="replace") for file in (here / "run").rglob("*") if file.is_file())
    assert "gendist-blobs-" in kept
    assert head.token not in kept
    assert WANDB_KEY not in kept

    (row,) = [line for line in jobs.status(None, None) if attempt.submission_id in line]
    assert row.split()[:3] == ["blobs", "finished", "1"]
    assert "iteration 30/30" in row
    assert jobs.logs("blobs", None, False, print) == 0
    assert '{"iteration": 30' in capsys.readouterr().out.replace('"restart": 0, ', "")
    assert jobs.stop("blobs", None, print) == 0
    assert "is finished; nothing to do" in capsys.readouterr().out


@pytest.mark.timeout(600)  # four processes one after the other, each of which has to import torch
def test_killed_and_stopped_it_ends_in_the_same_bytes(head, here, capsys):
    overrides = ["name=long", "fit.max_iterations=1000"]
    command = submitted(here, *overrides)
    until(lambda: num_records(here / "run") > 15)
    for how in (signal.SIGKILL, signal.SIGTERM):  # as whoever ends processes where memory is short; it was not the user
        (driver,) = head.processes(of="gendist.launch.job_driver")
        os.kill(driver, how)  # another one takes its place
        until(lambda: head.processes(of="gendist.launch.job_driver") not in ([], [driver]))  # noqa: B023
        reached = num_records(here / "run")
        until(lambda: num_records(here / "run") > reached + 20)  # noqa: B023
    (keeper,) = head.processes(of="gendist.launch.job_keeper")
    os.kill(keeper, signal.SIGKILL)  # as with its node: the command that waits for it submits another attempt
    until(lambda: head.processes(of="gendist.launch.job_keeper") not in ([], [keeper]))
    reached = num_records(here / "run")
    until(lambda: num_records(here / "run") > reached + 20)
    assert jobs.stop("long", None, print) == 0
    assert "is stopped; submitted again, it goes on" in capsys.readouterr().out
    out, err = ended(command, 130)
    assert "was ended by SIGKILL; another one goes on from the newest checkpoint" in err
    assert "was told to stop by something else than this job; another one goes on from the newest checkpoint" in err
    assert "was lost with its node or process" in err
    assert "-2 goes on in" in out
    assert "was stopped; what was reached is kept" in err
    assert not head.processes(of="gendist.launch")

    # No iteration is lost: told to stop, it left a checkpoint of the last one.
    checkpoints = [int(folder.name) for folder in (here / "run" / "checkpoints").glob("[0-9]*")]
    assert max(checkpoints) == num_records(here / "run") < 1000

    spec = load_spec(here / "spec.yaml", overrides)
    assert jobs.submit(spec, str(here / "run"), None, False, False, print) == 0
    out = capsys.readouterr().out
    assert "-2 was stopped" in out
    assert "-3 goes on in" in out
    check_same_as_here(here, *overrides)
    assert [line.split()[1:3] for line in jobs.status("long", None)[1:4]] == [
        ["lost", "1"],
        ["stopped", "2"],
        ["finished", "3"],
    ]


def test_what_the_cluster_has_not_is_told_in_one_line(head, here):
    _, err = ended(submitted(here, "cluster.num_workers=99", "name=greedy"), 2)
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "cluster.num_workers is 99, but the cluster has 2 CPUs; ask for at most 2" in line
    assert "Traceback" not in err
    assert not (here / "run").exists()
    assert not head.processes(of="gendist.launch")


def test_what_is_refused_before_anything_is_sent(head, here, monkeypatch):
    spec, before = load_spec(SPEC), RayJobs.at(None).attempts()

    def refused(said: str, *overrides: str, run_dir: str | None = "/shared/run", address: str | None = None) -> None:
        with pytest.raises(UserError, match=said):
            jobs.submit(load_spec(spec.model_dump(), overrides), run_dir, address, False, False, print)

    refused("no run directory: give --run-dir", run_dir=None)
    refused("a relative path means nothing on a cluster", run_dir="runs/x")
    refused("cluster.num_workers is 0", "cluster.num_workers=0")
    refused("data.path: nowhere.npy: no such file here", "data.path=nowhere.npy")
    refused("nothing answers there", address="http://127.0.0.1:1")
    with monkeypatch.context() as patched:
        patched.setattr(jobs, "versions", lambda: {"ray": "2.1.0", "python": "3.14.0"})
        refused(r"ray is 2\.1\.0 here and 2\.\d+\.\d+ there, python is 3\.14\.0 here and 3\.\d+\.\d+ there")
    with monkeypatch.context() as patched:
        patched.setenv("RAY_AUTH_TOKEN", "0" * 64)
        refused("that which was found is not its own")
    with monkeypatch.context() as patched:
        patched.delenv("RAY_AUTH_TOKEN")
        patched.setenv("HOME", str(here))
        refused("asks for a token, and none was found")
    assert RayJobs.at(None).attempts() == before
