"""Secrets of the environment stay there: not in what a run writes, not in what it says, not in what Ray keeps of it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PLANTED = {
    "WANDB_API_KEY": "c0ffee" * 6 + "cafe",  # 40 characters, as theirs
    "RAY_AUTH_TOKEN": "badf00d1" * 8,
    "AWS_ACCESS_KEY_ID": "AKIAPLANTEDKEYID",
    "AWS_SECRET_ACCESS_KEY": "plantedSecretOfS3/0123456789abcdefghij",
    "HF_TOKEN": "hf_plantedTokenOfTheHub",
    "GENDIST_TOKENS": "plantedTokenOfAServer",
}
SPEC = {"name": "planted", "data": {"source": "digits"}, "tracking": {"wandb": "offline"}}
EM = {**SPEC, "family": "gmm", "model": {"num_components": 2}, "fit": {"max_iterations": 2}, "cluster": {"num_workers": 1}}
DEEP = {
    **SPEC,
    "family": "vae",
    "model": {"latent_dim": 2, "encoder": {"hidden_sizes": [4]}, "decoder": {"hidden_sizes": [4]}},
    "fit": {"num_steps": 2, "global_batch_size": 8, "checkpoint_every": 1},
}


def leaks(folder: Path, *said: bytes) -> list[str]:
    """Where a planted secret stands: in a file under a folder, in its name, or in what was said."""
    contents = {str(path): path.read_bytes() + str(path).encode() for path in folder.rglob("*") if path.is_file()}
    contents |= {f"output {number}": each for number, each in enumerate(said)}
    return [f"{name} in {where}" for where, all_of_it in contents.items() for name, secret in PLANTED.items()
            if secret.encode() in all_of_it]  # fmt: skip


@pytest.mark.ray
@pytest.mark.parametrize("spec", [EM, DEEP], ids=["em", "deep"])
def test_no_secret_is_written_or_said(spec: dict[str, Any], tmp_path: Path):
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec))
    with tempfile.TemporaryDirectory(prefix="gs-", dir="/tmp") as ray_folder:  # a short path, for sockets
        environment = {**os.environ, **PLANTED, "RAY_AUTH_MODE": "token", "RAY_TMPDIR": ray_folder, "WANDB_MODE": "offline"}
        program = [sys.executable, str(ROOT / "launch.py"), "fit", "spec.yaml", "--run-dir", "run"]
        done = subprocess.run(program, cwd=tmp_path, env=environment, capture_output=True, timeout=280)
        assert done.returncode == 0, done.stderr.decode()
        assert list(tmp_path.glob("run/wandb/offline-run-*/*.wandb"))
        is_on_ray = spec["cluster"]["num_workers"] > 0 if "cluster" in spec else False
        assert bool(list(Path(ray_folder).rglob("*.log"))) == is_on_ray
        assert leaks(tmp_path, done.stdout, done.stderr) == []
        assert leaks(Path(ray_folder)) == []


def test_what_a_cluster_is_told_of_a_job_is_nothing_of_the_environment(monkeypatch):
    """The runtime environment of a job is shown to everybody who may look at the cluster."""
    from gendist import ray_cluster

    for name, secret in PLANTED.items():
        monkeypatch.setenv(name, secret)
    told: dict[str, Any] = {}
    monkeypatch.setattr(ray_cluster.ray, "init", lambda **options: told.update(options))
    monkeypatch.setattr(ray_cluster, "check_reachable", lambda address: None)
    monkeypatch.setattr(ray_cluster, "_warn_of_mixed_machines", lambda: None)
    ray_cluster._connect(1, "10.0.0.1:6379")
    assert told["runtime_env"]["env_vars"] == ray_cluster.WORKER_ENVIRONMENT
    assert not any(secret in repr(told) for secret in PLANTED.values())
