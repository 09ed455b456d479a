"""Whole fits by gradient on a group of Ray workers: whatever happens to the workers and to the driver, the same bytes as two
processes of torchrun, which nobody disturbs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import yaml

import gendist

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parents[2]
FIT = {"global_batch_size": 32, "checkpoint_every": 20, "record_every": 5, "ema": 0.05, "max_failures": 1}
NUM_STEPS = {"gan": 600, "vae": 2000}  # so many that a fast machine is not at the end before it is told to stop
SMALL = {"hidden_sizes": [16]}
MODELS = {
    "vae": {"latent_dim": 2, "likelihood": "gaussian", "encoder": SMALL, "decoder": SMALL},
    "gan": {"latent_dim": 2, "generator": SMALL, "discriminator": SMALL},
}


def spec_of(family: str, num_workers) -> dict:
    return {
        "name": family,
        "family": family,
        "model": MODELS[family],
        "data": {"source": "digits", "validation_fraction": 0.1},
        "fit": {**FIT, "num_steps": NUM_STEPS[family]},
        "cluster": {"num_workers": num_workers},
        "tracking": {"wandb": "disabled"},
    }


def trace(path: Path) -> list[dict]:
    """The records of a run, without what a clock says."""
    records = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key not in ("seconds", "samples_per_s")} for record in records]


def weights(path: Path) -> bytes:
    return (path / "artifact" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def by_torchrun(tmp_path_factory) -> Path:
    """A run of each family by two processes that torchrun started."""
    folder = tmp_path_factory.mktemp("torchrun")
    program = (
        "import sys, gendist\nfrom gendist.train.processes import joined\n"
        "with joined(use_gpu=False):\n"
        "    for family in sys.argv[1:]: gendist.fit(family + '.yaml', run_dir=family)\n"
    )
    (folder / "fit.py").write_text(program)
    for family in MODELS:
        (folder / f"{family}.yaml").write_text(yaml.safe_dump(spec_of(family, 0)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "fit.py", *MODELS]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return folder


def worker_pids() -> list[int]:
    """Of the workers of the group that is at work on the cluster of this process, which is on this machine."""
    from ray._private.state import actors

    return [actor["Pid"] for actor in actors().values() if "RayTrainWorker" in str(actor) and actor["State"] == "ALIVE"]


def test_killed_workers_change_nothing(cluster, by_torchrun, tmp_path):
    """First one of them, then all."""
    killed: list[list[int]] = []

    def watch(record):
        if record["step"] >= (10, 250, 1 << 30)[len(killed)]:
            pids = worker_pids()
            killed.append(pids[:1] if not killed else pids)
            for pid in killed[-1]:
                os.kill(pid, signal.SIGKILL)

    gendist.fit(spec_of("gan", 2), run_dir=tmp_path / "run", watch=watch)
    assert [len(pids) for pids in killed] == [1, 2]
    assert weights(tmp_path / "run") == weights(by_torchrun / "gan")
    assert trace(tmp_path / "run") == trace(by_torchrun / "gan")
    assert not (tmp_path / "run" / ".ray_train").exists()


def processes_with(variable: str, value: str) -> list[int]:
    """Everything that was started with this in its environment, and what that started in turn."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"{variable}={value}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
        except OSError:  # it has ended
            continue
    return found


def name_of(pid: int) -> str:
    try:
        return (Path("/proc") / str(pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


@pytest.mark.timeout(600)
def test_a_driver_that_is_killed_or_told_to_end_leaves_a_run_that_goes_on(by_torchrun, tmp_path):
    """On a Ray of its own. Three times the same command: killed, told to end, left alone; and nothing is left behind."""
    (tmp_path / "vae.yaml").write_text(yaml.safe_dump(spec_of("vae", 2)))
    command = [sys.executable, str(ROOT / "launch.py"), "fit", "vae.yaml", "--run-dir", "run"]
    temporary = Path(tempfile.mkdtemp(prefix="t"))  # of a short name, since Ray makes sockets in it
    environment = {**os.environ, "TMPDIR": str(temporary), "GENDIST_TEST": str(tmp_path)}
    checkpoints = tmp_path / "run" / "checkpoints"

    def start() -> subprocess.Popen:
        return subprocess.Popen(
            command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def newest() -> int:
        return max((int(path.name) for path in checkpoints.glob("[0-9]*")), default=0)

    def wait_for_the_end() -> None:
        """Of everything but Ray's own agents, which notice a minute later that the driver was killed."""
        deadline = time.monotonic() + 60
        while left := [name for pid in processes_with("GENDIST_TEST", str(tmp_path)) if "Agent" not in (name := name_of(pid))]:
            assert time.monotonic() < deadline, left
            time.sleep(0.05)

    try:
        reached = 0
        for how in (signal.SIGKILL, signal.SIGTERM):
            driver = start()
            deadline = time.monotonic() + 120
            while newest() == reached:
                assert driver.poll() is None, driver.communicate()
                assert time.monotonic() < deadline
                time.sleep(0.01)
            driver.send_signal(how)
            out, err = driver.communicate(timeout=60)
            wait_for_the_end()
            assert not (tmp_path / "run" / "artifact").exists()
            reached = newest()
        assert driver.returncode == 130
        assert err.splitlines()[-1].startswith("error: interrupted; what was reached is kept")
        driver = start()
        out, err = driver.communicate(timeout=240)
        assert driver.returncode == 0, err
        assert "Traceback" not in out + err
        assert weights(tmp_path / "run") == weights(by_torchrun / "vae")
        # A run that was told to end has a record of the step at which it did, in between.
        assert trace(tmp_path / "run")[-1] == trace(by_torchrun / "vae")[-1]
        wait_for_the_end()
        assert not list(temporary.glob("gendist*/*"))
    finally:
        for pid in processes_with("GENDIST_TEST", str(tmp_path)):
            os.kill(pid, signal.SIGKILL)
        shutil.rmtree(temporary, ignore_errors=True)
