"""The token of a Ray of our own, and what is said of a Ray that has another."""

from __future__ import annotations

import logging
import os
import stat

import pytest

from gendist.ray_cluster import Silence, _hearing_of_lost_nodes, refusal, require_token


@pytest.fixture
def without_token(monkeypatch):
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.setenv(name, "")  # which is put back
        monkeypatch.delenv(name)
    return monkeypatch


def test_a_ray_of_our_own_has_a_token_that_others_on_the_machine_cannot_read(without_token, tmp_path):
    file = tmp_path / "home" / ".ray" / "auth_token"
    require_token(file)
    assert os.environ["RAY_AUTH_MODE"] == "token"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    token = file.read_text()
    assert len(token) == 64
    require_token(file)
    assert file.read_text() == token


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


def test_silence_is_counted_from_the_first_of_looks_that_follow_one_another():
    silence = Silence()
    assert silence.heard(True, 0.0) == 0.0
    assert 0.0 < silence.heard(False, 3.0) < 1e-6
    assert silence.heard(False, 13.0) == 10.0
    assert silence.heard(True, 14.0) == 0.0
    assert silence.heard(False, 15.0) < 1e-6
    # The machine slept for an hour: nothing is known of that.
    assert silence.heard(False, 3615.0) < 1e-6
    assert silence.heard(False, 3625.0) == 10.0


def test_lost_nodes_are_a_line_each_and_the_rest_is_rays_until_the_connection_ends(monkeypatch, caplog):
    import ray

    shown = []
    monkeypatch.setattr(ray._private.worker, "print_to_stdstream", lambda data, ignore_prefix: shown.append(data["lines"]))
    rays = ray._private.worker.print_to_stdstream
    with _hearing_of_lost_nodes(), caplog.at_level(logging.WARNING, "gendist"):
        ray._private.worker.print_to_stdstream({"lines": ["a task has no room"]}, ignore_prefix=False)
        lost = "The node with node id: 1, address: 10.0.0.7 and node name: 10.0.0.7 has been marked dead"
        ray._private.worker.print_to_stdstream({"lines": [lost]}, ignore_prefix=False)
    assert shown == [["a task has no room"]]
    assert "the cluster has lost the node 10.0.0.7" in caplog.text
    assert ray._private.worker.print_to_stdstream is rays
