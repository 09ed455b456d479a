"""The token of a Ray of our own, and what is said of a Ray that has another."""

from __future__ import annotations

import logging
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from gendist.ray_cluster import refusal, require_token

ROOT = Path(__file__).parents[1]


@pytest.fixture
def without_token(monkeypatch):
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.setenv(name, "")  # which is put back
        monkeypatch.delenv(name)
    return monkeypatch


def test_a_ray_of_our_own_has_a_token_that_others_on_the_machine_cannot_read(without_token, tmp_path):
    file = tmp_path / "home" / ".ray" / "auth_token"
    require_token(file)
    assert "RAY_AUTH_MODE" not in os.environ  # Ray sets it, and it would not look again
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    token = file.read_text()
    assert len(token) == 64
    file.chmod(0o644)
    require_token(file)
    assert file.read_text() == token
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [path.name for path in file.parent.iterdir()] == ["auth_token"]


@pytest.mark.ray
def test_a_fit_on_a_ray_of_its_own_needs_nothing_in_the_environment(tmp_path):
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    call = [sys.executable, ROOT / "launch.py", "fit", ROOT / "configs" / "gmm_digits.yaml"]
    call += ["cluster.num_workers=1", "fit.max_iterations=1", "--run-dir", tmp_path / "run"]
    done = subprocess.run(call, env=clean, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "artifact" / "model.json").exists()


def test_a_token_that_is_there_is_used(without_token, tmp_path):
    without_token.setenv("RAY_AUTH_TOKEN", "a" * 64)
    require_token(tmp_path / "auth_token")
    assert not (tmp_path / "auth_token").exists()


def test_without_a_home_the_token_is_of_this_process_alone(without_token, tmp_path):
    (tmp_path / "file").write_text("")
    require_token(tmp_path / "file" / ".ray" / "auth_token")
    assert len(os.environ["RAY_AUTH_TOKEN"]) == 64


def test_who_says_that_no_token_is_needed_is_warned(without_token, tmp_path, caplog):
    without_token.setenv("RAY_AUTH_MODE", "disabled")
    with caplog.at_level(logging.WARNING, "gendist"):
        require_token(tmp_path / "auth_token")
    assert "whoever reaches this machine" in caplog.text
    assert not (tmp_path / "auth_token").exists()


@pytest.mark.parametrize(
    ("said", "match"),
    [
        (
            "ray.exceptions.AuthenticationError: RPC error: InvalidAuthToken: Authentication token is missing",
            "RAY_AUTH_TOKEN_PATH",
        ),
        ("Token authentication is enabled but no authentication token was found", "RAY_AUTH_TOKEN_PATH"),
        ("ConnectionError: Could not read b'CLUSTER_METADATA'", "no Ray head of this version"),
        ("", "no Ray head of this version"),
    ],
)
def test_a_ray_with_another_token_is_told_from_what_is_no_ray(said, match):
    assert match in refusal(said)
