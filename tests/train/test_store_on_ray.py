"""Training on a group of Ray workers, with the run in a store: workers are killed, and the bytes are those of a folder."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

import gendist

pytestmark = pytest.mark.ray

SMALL = {"hidden_sizes": [16]}
SPEC = {
    "name": "gan",
    "family": "gan",
    "model": {"latent_dim": 2, "generator": SMALL, "discriminator": SMALL},
    "data": {"source": "digits"},
    "fit": {"num_steps": 400, "global_batch_size": 32, "checkpoint_every": 20, "record_every": 5, "max_failures": 1},
    "cluster": {"num_workers": 2},
}


def trace(path: Path) -> list[dict]:
    records = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key not in ("seconds", "samples_per_s")} for record in records]


def test_killed_workers_change_nothing_of_a_run_in_a_store(cluster, store, tmp_path):
    killed = []

    def kill_all(record):
        if not killed and record["step"] >= 50:
            from ray._private.state import actors

            killed.extend(
                actor["Pid"] for actor in actors().values() if "RayTrainWorker" in str(actor) and actor["State"] == "ALIVE"
            )
            for pid in killed:
                os.kill(pid, signal.SIGKILL)

    gendist.fit(SPEC, run_dir=tmp_path / "folder")
    run = gendist.fit(SPEC, run_dir=f"{store}/run", watch=kill_all)
    assert len(killed) == 2
    assert run.path == f"{store}/run"
    in_store, folder = tmp_path / "store" / "run", tmp_path / "folder"
    model = Path("artifact") / "model.safetensors"
    assert (in_store / model).read_bytes() == (folder / model).read_bytes()
    assert trace(in_store) == trace(folder)
    assert (in_store / "samples.png").exists()
    assert not [path for path in in_store.iterdir() if path.name.startswith(".")]
