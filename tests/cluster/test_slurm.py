"""cluster/slurm.sh, run for real over two hosts of the test bed, with SLURM's own programs faked."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import fake_slurm
import pytest
import yaml

from gendist import load

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "cluster" / "slurm.sh"
sys.path.insert(0, str(ROOT / "cluster"))
import testbed  # noqa: E402

SECRETS = {"WANDB_API_KEY": "c0ffee" * 6 + "cafe", "AWS_SECRET_ACCESS_KEY": "plantedSecretOfS3/0123456789"}


def test_it_is_a_script_of_bash():
    subprocess.run(["bash", "-n", SCRIPT], check=True, timeout=60)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", SCRIPT], check=True, timeout=60)


def test_what_it_asks_of_slurm_lets_a_job_stop_in_time_and_begin_again():
    asked = [line.split(maxsplit=1)[1].strip() for line in SCRIPT.read_text().splitlines() if line.startswith("#SBATCH")]
    assert {"--signal=B:TERM@300", "--requeue", "--open-mode=append", "--ntasks-per-node=1"} <= set(asked)
    first_command = next(line for line in SCRIPT.read_text().splitlines() if line and not line.startswith("#"))
    assert SCRIPT.read_text().rindex("#SBATCH") < SCRIPT.read_text().index(first_command)  # SLURM reads no further


def test_without_a_spec_it_says_how_it_is_called(tmp_path):
    done = subprocess.run(["bash", SCRIPT], capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.returncode != 0
    assert "usage: sbatch" in done.stderr


@pytest.mark.parametrize("arguments", [["nowhere.yaml"], ["spec.yaml", "model.num_component=3"]])
def test_a_mistake_in_the_spec_ends_the_job_before_any_node_is_asked_for_anything(tmp_path, arguments):
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump({"name": "a", "family": "gmm", "model": {"num_components": 2}}))
    slurm = fake_slurm.installed(tmp_path, {"node0": None})
    (tmp_path / "bin" / "srun").write_text(f"#!/bin/sh\ntouch {tmp_path}/asked\n")
    environment = {**os.environ, **slurm, "RUNS": str(tmp_path / "runs"), "ENVIRONMENT": str(environment_of_python(tmp_path))}
    done = subprocess.run(
        ["bash", SCRIPT, *arguments], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert not (tmp_path / "asked").exists()
    assert not (tmp_path / "requeued").exists()


@pytest.mark.ray
@pytest.mark.multihost
@pytest.mark.exhaustive
@pytest.mark.timeout(900)
def test_a_job_that_is_told_to_stop_is_queued_again_and_goes_on_to_the_same_end(tmp_path):
    if reason := testbed.why_not():
        pytest.skip(reason)
    spec = {
        "name": "in-slurm",
        "family": "gmm",
        "model": {"num_components": 8},
        "data": {"source": "digits"},
        "fit": {"max_iterations": 40, "tolerance": 0.0, "checkpoint_every": 1000},
        "cluster": {"num_workers": 2},
    }
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec))
    with testbed.Testbed(num_hosts=2) as bed:
        slurm = fake_slurm.installed(tmp_path, {f"node{host.number}": host.name for host in bed.hosts})
        settings = {
            "RUNS": str(tmp_path / "runs"),
            "ENVIRONMENT": str(environment_of_python(tmp_path)),
            "NODE_FOLDER": str(bed.folder),
            "OBJECT_STORE_BYTES": "100000000",
            "START_TIMEOUT_S": "270",
            **SECRETS,
        }

        def job(log: Path, **more: str) -> subprocess.Popen[str]:
            with log.open("w") as file:
                environment = {**slurm, **settings, **more}
                return bed.hosts[0].popen(
                    "bash", str(SCRIPT), "spec.yaml", env=environment, cwd=tmp_path, stdout=file, stderr=file
                )

        first = job(tmp_path / "first.log", KEEP_RAY_LOGS="yes")
        run = tmp_path / "runs" / "in-slurm"
        await_(lambda: (run / "manifest.json").exists() and "iteration" in (tmp_path / "first.log").read_text(), first)
        first.send_signal(signal.SIGTERM)
        assert first.wait(120) == 130, (tmp_path / "first.log").read_text()
        assert (tmp_path / "requeued").read_text() == slurm["SLURM_JOB_ID"]
        assert not (run / "artifact").exists()
        assert list((run / "checkpoints").iterdir())
        assert bed.hosts[1].pids() == []

        second = job(tmp_path / "second.log")
        assert second.wait(400) == 0, (tmp_path / "second.log").read_text()
        assert not any(host.pids() for host in bed.hosts)
        assert len(list(bed.folder.glob("ray-*"))) >= 2  # those of the first job, which were to be kept
        kept = b"".join(path.read_bytes() for path in bed.folder.glob("ray-*/session_*/logs/*") if path.is_file())
    iterations = [json.loads(line)["iteration"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert iterations == list(range(iterations[0], 41))
    assert load(run).num_components == 8
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert kept
    for secret in SECRETS.values():
        assert secret.encode() not in written + kept


def environment_of_python(folder: Path) -> Path:
    """As one where gendist is installed: its own `gendist`, and Python and Ray of the environment that this runs in."""
    environment = folder / "environment"
    (environment / "bin").mkdir(parents=True)
    for name, command in {
        "gendist": f'"{sys.executable}" "{ROOT / "launch.py"}"',
        "python": f'"{sys.executable}"',
        "ray": f'"{sys.executable}" -m ray.scripts.scripts',
    }.items():
        script = environment / "bin" / name
        script.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
        script.chmod(0o755)
    return environment


def await_(condition, process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 280
    while not condition():
        assert process.poll() is None, f"it has ended with {process.returncode}"
        assert time.monotonic() < until
        time.sleep(0.05)
