"""A job that trains: a module of the user's own and data of the machine that submits, two workers on two hosts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from survivors import ROOT, kill_a_worker, trace, wait_until, write_spec
from test_survival import TRAINING_WORKERS, undisturbed_by_torchrun
from testbed import Testbed

pytestmark = [pytest.mark.ray, pytest.mark.multihost, pytest.mark.timeout(900)]

NUM_STEPS = 4000
MODULE = """
from torch import nn

class Encoder(nn.Sequential):
    def __init__(self, input_shape, output_shape, width):
        super().__init__(nn.Linear(*input_shape, width), nn.Tanh(), nn.Linear(width, *output_shape))
"""
SPEC = {
    "family": "vae",
    "model": {
        "latent_dim": 2,
        "likelihood": "gaussian",
        "encoder": {"module": "my_networks:Encoder", "options": {"width": 8}},
        "decoder": {"hidden_sizes": [8]},
    },
    "data": {"path": "data/rows.npy"},
    "fit": {"num_steps": NUM_STEPS, "global_batch_size": 32, "checkpoint_every": 50, "record_every": 10},
}


@pytest.mark.exhaustive
def test_a_training_job_with_a_module_of_the_users_own_survives_killed_processes(bed: Testbed, tmp_path: Path):
    run = tmp_path / "run"
    write_spec(tmp_path, "trained", {**SPEC, "cluster": {"num_workers": 2}})
    (tmp_path / "my_networks.py").write_text(MODULE)
    (tmp_path / "data").mkdir()
    np.save(tmp_path / "data" / "rows.npy", np.random.default_rng(0).normal(size=(500, 3)).astype(np.float32))
    command = [sys.executable, str(ROOT / "launch.py"), "submit", "trained.yaml", "--run-dir", str(run)]
    environment = {**os.environ, "RAY_API_SERVER_ADDRESS": bed.jobs_address, "RAY_AUTH_TOKEN": bed.token or ""}

    def submitted() -> subprocess.Popen[str]:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(command, cwd=tmp_path, env=environment, **pipes)

    def records() -> int:
        path = run / "metrics.jsonl"
        return path.read_text().count("\n") if path.exists() else 0

    process = submitted()
    try:
        wait_until(lambda: records() > 4 or process.poll() is not None, "records")
        assert process.poll() is None, process.communicate()[0]
        kill_a_worker(bed, TRAINING_WORKERS)
        reached = records()
        wait_until(lambda: records() > reached + 4 or process.poll() is not None, "records after a killed worker")
        drivers = [pid for pid in bed.hosts[0].pids() if b"gendist.launch.job_driver" in command_of(pid)]
        for pid in drivers:
            os.kill(pid, 9)
        said = process.communicate(timeout=400)[0]
    finally:
        process.kill()
    assert process.returncode == 0, said
    assert drivers, "the job was at its end before its driver could be killed"
    assert "was ended by SIGKILL; another one goes on from the newest checkpoint" in said
    again = submitted()
    assert "is finished" in again.communicate(timeout=200)[0]

    expected = undisturbed_by_torchrun(tmp_path, {**json.loads(json.dumps(SPEC)), "name": "trained"}, NUM_STEPS).parents[1]
    assert trace(run) == trace(expected)
    for name in ("model.json", "model.safetensors"):
        assert (run / "artifact" / name).read_bytes() == (expected / "artifact" / name).read_bytes()


def command_of(pid: int) -> bytes:
    try:
        return (Path("/proc") / str(pid) / "cmdline").read_bytes()
    except OSError:
        return b""
