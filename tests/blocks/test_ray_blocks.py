"""The same bytes from Ray as from a plain loop, whatever happens to the tasks."""

from __future__ import annotations

import itertools
import os
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import ray
import torch

from gendist.blocks import Leaves, LocalBlocks, reduce
from gendist.protocols import Block, UserError

pytestmark = pytest.mark.ray

# Workers cannot import a test module: its functions travel whole.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

LEAF_ROWS, NUM_LEAVES, NUM_FEATURES = 64, 37, 5
LEAVES = Leaves(range(0, LEAF_ROWS * NUM_LEAVES + 1, LEAF_ROWS))


class Moments:
    """Sums whose last bits depend on the order of the additions."""

    def __init__(self, values: torch.Tensor):
        self.values = values

    def merge(self, other: Moments) -> Moments:
        return Moments(self.values + other.values)


def load(bounds) -> list[Block]:
    blocks = []
    for start, stop in itertools.pairwise(bounds):
        generator = torch.Generator().manual_seed(start)
        x = torch.randn(stop - start, NUM_FEATURES, dtype=torch.float64, generator=generator).exp()
        blocks.append(Block(x=x, rows=torch.arange(start, stop)))
    return blocks


def moments(scale: torch.Tensor, block: Block) -> Moments:
    scaled = block.x * scale
    return Moments(torch.cat([scaled.sum(0), (scaled.T @ scaled).flatten()]))


SCALE = torch.linspace(0.1, 3.0, NUM_FEATURES, dtype=torch.float64)


@pytest.fixture(scope="module")
def expected() -> torch.Tensor:
    return reduce(moments, LocalBlocks(load, LEAVES), SCALE).values


def test_the_order_of_additions_matters_for_these_numbers(expected):
    one_after_the_other = sum(moments(SCALE, block).values for block in load(LEAVES.bounds))
    assert not torch.equal(one_after_the_other, expected)


@pytest.mark.parametrize("num_workers", [1, 2, 4, 8])
@pytest.mark.parametrize("most", [1, 4, 1 << 30])
def test_any_number_of_workers_and_any_run_give_the_same_bytes(cluster, expected, num_workers, most):
    from gendist.blocks.ray_blocks import RayBlocks

    blocks = RayBlocks(load, LEAVES, num_workers, most)
    for _ in range(2):
        assert torch.equal(reduce(moments, blocks, SCALE).values, expected)


def after_the_next(folder: str, scale: torch.Tensor, block: Block) -> Moments:
    """Finishes only when the leaf behind it has finished, so that tasks complete in reverse."""
    index, result = int(block.rows[0]) // LEAF_ROWS, moments(scale, block)
    following = Path(folder) / str(index + 1)
    deadline = time.monotonic() + 60
    while (index + 1) % 8 != 0 and index + 1 < NUM_LEAVES and not following.exists():
        assert time.monotonic() < deadline, "the following leaf never finished"
        time.sleep(0.002)
    (Path(folder) / str(index)).write_text(str(time.monotonic_ns()))
    return result


def test_completion_in_reverse_order_gives_the_same_bytes(cluster, expected, tmp_path):
    from gendist.blocks.ray_blocks import RayBlocks

    blocks = RayBlocks(load, LEAVES, 8, 1)
    assert torch.equal(reduce(partial(after_the_next, str(tmp_path)), blocks, SCALE).values, expected)
    finished = {int(path.name): int(path.read_text()) for path in tmp_path.iterdir()}
    assert sorted(range(8), key=finished.__getitem__) == list(range(7, -1, -1))


def dies_once(folder: str, scale: torch.Tensor, block: Block) -> Moments:
    """Kills its own process the first time it meets every fifth leaf."""
    index = int(block.rows[0]) // LEAF_ROWS
    marker = Path(folder) / str(index)
    if index % 5 == 0 and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return moments(scale, block)


def test_killed_tasks_are_tried_again_and_change_nothing(cluster, expected, tmp_path):
    from gendist.blocks.ray_blocks import RayBlocks

    blocks = RayBlocks(load, LEAVES, 2, 8)
    assert torch.equal(reduce(partial(dies_once, str(tmp_path)), blocks, SCALE).values, expected)
    assert len(list(tmp_path.iterdir())) == len(range(0, NUM_LEAVES, 5))


def where_loaded(path: str, bounds) -> list[Block]:
    """Blocks large enough to live in their node's object store, with a note of the node that loaded them; none before two nodes
    are at it, however long the processes of one take to start."""
    node, nodes = ray.get_runtime_context().get_node_id(), Path(path) / "nodes"
    (nodes / node).touch()
    deadline = time.monotonic() + 60.0
    while len(list(nodes.iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    with (Path(path) / "loads" / str(bounds[0])).open("a") as file:
        file.write(node + "\n")
    return [Block(x=block.x.repeat(1, 400), rows=block.rows) for block in load(bounds)]


def wide_moments(_: None, block: Block) -> Moments:
    return Moments(block.x.sum(0))


def test_a_lost_node_is_made_up_for(cluster, tmp_path):
    """The blocks that a dead node held are loaded again, by lineage, and the sums are the same to the last bit."""
    from gendist.blocks.ray_blocks import RayBlocks

    node, noted = cluster.add_node(num_cpus=8, object_store_memory=200_000_000), tmp_path / "loads"
    for folder in (noted, tmp_path / "nodes"):
        folder.mkdir()
    try:
        cluster.wait_for_nodes(timeout=60)
        blocks = RayBlocks(partial(where_loaded, str(tmp_path)), LEAVES, 16, 2)
        before = reduce(wide_moments, blocks, None).values
        loads = [path.read_text().split() for path in noted.iterdir()]
        lost = sum(nodes[-1] == node.node_id for nodes in loads)
        assert 0 < lost < len(loads), "both nodes should hold blocks"
        cluster.remove_node(node, allow_graceful=False)
        node = None
        after = reduce(wide_moments, blocks, None).values
        assert torch.equal(before, after)
        again = [path.read_text().split() for path in noted.iterdir()]
        assert sum(len(nodes) for nodes in again) - sum(len(nodes) for nodes in loads) == lost
        assert int(ray.cluster_resources()["CPU"]) == 8
    finally:
        if node is not None:
            cluster.remove_node(node)


def complain(_: None, block: Block) -> Moments:
    raise UserError(f"row {int(block.rows[0])} is wrong")


def test_a_mistake_found_in_a_task_arrives_without_wrapping(cluster):
    from gendist.blocks.ray_blocks import RayBlocks

    with pytest.raises(UserError, match=r"^row 0 is wrong$") as caught:
        reduce(complain, RayBlocks(load, LEAVES, 2), None)
    assert type(caught.value) is UserError


def test_more_workers_than_cpus_are_refused_with_both_numbers(cluster):
    from gendist.ray_cluster import ray_cluster

    with pytest.raises(UserError, match=r"num_workers is 9, but the cluster has 8 CPUs"), ray_cluster(9, None):
        pass


def test_one_process_is_on_one_cluster(cluster):
    from gendist.ray_cluster import ray_cluster

    with ray_cluster(1, cluster.address):
        pass
    loopback = "127.0.0.1:" + cluster.address.rpartition(":")[2]  # answers, and is called otherwise
    with pytest.raises(UserError, match=f"is connected to Ray at {cluster.address}"), ray_cluster(1, loopback):
        pass


def test_a_port_that_listens_and_never_answers_is_refused(monkeypatch):
    from gendist import ray_cluster

    monkeypatch.setattr(ray_cluster, "ANSWER_TIMEOUT_S", 3.0)
    with socket.create_server(("127.0.0.1", 0)) as deaf, pytest.raises(UserError, match="no Ray head"):
        ray_cluster.check_reachable(f"127.0.0.1:{deaf.getsockname()[1]}")


def test_a_cluster_of_mixed_machines_is_warned_about(caplog):
    from gendist.ray_cluster import warn_if_mixed

    warn_if_mixed([{"cpu": "A", "torch": "2"}, {"cpu": "A", "torch": "2"}])
    assert not caplog.records
    warn_if_mixed([{"cpu": "A", "torch": "2"}, {"cpu": "B", "torch": "2"}])
    assert "cpu A, torch 2; cpu B, torch 2" in caplog.text


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nonsense", "127.0.0.1:99999", "host.invalid:6379"])
def test_an_address_that_does_not_answer_is_refused(address):
    from gendist.ray_cluster import check_reachable

    began = time.monotonic()
    with pytest.raises(UserError, match=address):
        check_reachable(address)
    assert time.monotonic() - began < 30


@pytest.mark.exhaustive
@pytest.mark.timeout(300)
def test_tasks_that_memory_never_suffices_for_are_given_up(tmp_path):
    """A Ray that takes every machine for full, on which each task is killed."""
    full = {"RAY_memory_usage_threshold": "0.001", "RAY_memory_monitor_refresh_ms": "100", "RAY_task_oom_retries": "1"}
    root = Path(__file__).parents[2]
    command = [
        sys.executable,
        str(root / "launch.py"),
        "fit",
        str(root / "configs" / "gmm_digits.yaml"),
        "cluster.num_workers=1",
    ]
    environment = {**os.environ, **full, "RAY_ADDRESS": "local"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 2, done.stderr
    assert "running low on memory" in done.stderr.splitlines()[-1]
