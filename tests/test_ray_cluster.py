"""The token of a Ray of our own, what is said of a Ray that has another, and the room of a cluster; without Ray."""

from __future__ import annotations

import logging
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gendist import ray_cluster
from gendist.protocols import UserError
from gendist.ray_cluster import Silence, _hearing_of_lost_nodes, host_and_port, refusal, require_token

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


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("10.0.0.1:6379", ("10.0.0.1", 6379)),
        ("head:6379", ("head", 6379)),
        ("[::1]:6379", ("::1", 6379)),
        ("ray://[fe80::1]:10001", ("fe80::1", 10001)),
        ("head", None),
        ("head:", None),
        (":6379", None),
        ("[]:6379", None),
        ("head:ray", None),
    ],
)
def test_a_host_and_its_port_are_told_apart(address, expected):
    assert host_and_port(address) == expected


def test_a_head_may_have_an_address_of_ipv6():
    try:
        server = socket.create_server(("::1", 0), family=socket.AF_INET6)
    except OSError as error:
        pytest.skip(f"no IPv6 here: {error}")
    with server:
        address = f"[::1]:{server.getsockname()[1]}"
        assert ray_cluster._answers(address)
        ray_cluster.check_reachable(f"ray://{address}")
    assert not ray_cluster._answers(address)


@pytest.mark.parametrize("address", ["ray://u:hush7Qx@127.0.0.1:1", "u:hush7Qx@127.0.0.1:1", "https://hush7Qx@127.0.0.1:1"])
def test_an_address_with_a_password_is_not_repeated(address):
    with pytest.raises(UserError, match=r"^--address") as told:
        ray_cluster.check_reachable(address)
    assert "hush7Qx" not in str(told.value)


def node(address: str, cpus: float, alive: bool = True, reason: int = 0) -> dict[str, Any]:
    return {"NodeManagerAddress": address, "Alive": alive, "DeathReason": reason, "Resources": {"CPU": cpus} if alive else {}}


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ([node("a", 2), node("b", 4)], 6),
        ([node("a", 2), node("b", 4), node("c", 4, False, 2)], 10),  # lost
        ([node("a", 2), node("b", 4), node("c", 4, False, 1)], 6),  # left
        ([node("a", 2), node("b", 4), node("b", 4, False, 2)], 6),  # lost, and back again
        ([node("a", 0), node("c", 4, False, 2)], sys.maxsize),
        ([node("a", 0)], 0),
    ],
)
def test_a_lost_node_may_come_back(nodes, expected):
    assert ray_cluster.most_room(nodes, ray_cluster.CPU_WORKER) == expected


MANUAL = f"node_{'b10b5baa' * 7}"  # as Ray calls the type of a node that nobody gave one


@pytest.mark.parametrize(
    ("report", "expected"),
    [
        ({"active_nodes": {MANUAL: 1}, "node_type_mapping": {"b10b5baa": MANUAL}}, False),
        ({"active_nodes": {}, "node_type_mapping": {"10.0.0.1": "ray.head.default"}}, True),
        ({"active_nodes": {"headgroup": 1, "workers": 2}}, True),
        ({}, False),
    ],
)
def test_an_autoscaler_is_told_from_a_monitor(report, expected):
    assert ray_cluster.knows_types_of_nodes(report) is expected


class Cluster:
    """Stands in for a cluster, with room for so many workers at each look, and notes what was demanded."""

    def __init__(self, monkeypatch, rooms: list[int], has_autoscaler: bool, is_refused: bool = False):
        self._rooms, self.demanded, self.removed = rooms, [], []
        patched = {
            "room": lambda _: self._rooms.pop(0) if len(self._rooms) > 1 else self._rooms[0],
            "has_autoscaler": lambda: has_autoscaler,
            "is_refused": lambda _: is_refused,
            "LOOK_AT_ROOM_EVERY_S": 0.01,
            "NEW_NODE_LIMIT_S": 0.2,
        }
        for name, value in patched.items():
            monkeypatch.setattr(ray_cluster, name, value)
        monkeypatch.setattr(ray_cluster.ray, "nodes", lambda: [node("a", 0)])
        monkeypatch.setattr(ray_cluster.Lookout, "_head_answers", lambda _: True)
        monkeypatch.setattr(ray_cluster.ray.util, "placement_group", self._demand)
        monkeypatch.setattr(ray_cluster.ray.util, "remove_placement_group", self.removed.append)

    def _demand(self, bundles: list[dict[str, float]]) -> Any:
        self.demanded.append(SimpleNamespace(id=b"demand", bundles=bundles))
        return self.demanded[-1]


def test_an_autoscaler_is_asked_for_nodes_and_waited_for(monkeypatch):
    cluster = Cluster(monkeypatch, [0, 0, 1, 3], has_autoscaler=True)
    ray_cluster.check_room(3, ray_cluster.CPU_WORKER)
    assert [each.bundles for each in cluster.demanded] == [[{"CPU": 1}] * 3]
    assert cluster.removed == cluster.demanded


def test_nodes_that_do_not_come_are_not_waited_for_without_an_end(monkeypatch):
    cluster = Cluster(monkeypatch, [1], has_autoscaler=True)
    with pytest.raises(UserError, match="has had room for 1 of 3 workers for 0 s"):
        ray_cluster.check_room(3, ray_cluster.CPU_WORKER)
    assert cluster.removed == cluster.demanded


@pytest.mark.parametrize("has_autoscaler", [True, False])
def test_what_no_node_will_do_is_refused_at_once(monkeypatch, has_autoscaler):
    cluster = Cluster(monkeypatch, [2], has_autoscaler, is_refused=True)
    with pytest.raises(UserError, match="num_workers is 3, but the cluster has 2 CPUs; ask for at most 2"):
        ray_cluster.check_room(3, ray_cluster.CPU_WORKER)
    assert len(cluster.removed) == len(cluster.demanded) == has_autoscaler


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
