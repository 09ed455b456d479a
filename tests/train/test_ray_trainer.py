"""A group of Ray workers ends in the same bytes, whatever happens to them; mistakes and hangs come to an end."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import ray

from gendist.protocols import UserError

pytestmark = pytest.mark.ray

# Workers cannot import a test module: its functions travel whole.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

NUM_STEPS = 40
SLOT = {"slot": 1}


def step_of(x: np.ndarray, step: int, rows: range) -> np.ndarray:
    """What a toy of training adds for some rows of a global batch of 12: whole numbers, whose sums are exact."""
    return np.array([(step * 31 + row * 7) % 11 for row in rows], dtype=np.float64).sum() * np.arange(1.0, 5.0)


def train(folder: Path, incidents: dict, line) -> dict:
    """The toy: sums over all ranks, a checkpoint after every step; it goes on from the newest. Incidents happen once each."""
    import torch
    import torch.distributed as dist

    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    (folder / f"setting-{rank}").write_text(json.dumps([dict(os.environ), os.getcwd(), torch.get_num_threads()]))
    with (folder / "starts").open("a") as file:
        file.write(f"{rank} {world_size} {os.getpid()}\n")
    checkpoint = folder / "checkpoint.npz"
    start, x = 0, np.zeros(4)
    if checkpoint.exists():
        stored = np.load(checkpoint)
        start, x = int(stored["step"]) + 1, stored["x"]
    per_rank = 12 // world_size
    for step in range(start, NUM_STEPS):
        line.alive()
        incident = incidents.get((step, rank))
        marker = folder / f"happened-{step}-{rank}"
        if incident and not marker.exists():
            marker.touch()
            incident(folder)
        part = torch.from_numpy(step_of(x, step, range(rank * per_rank, (rank + 1) * per_rank)))
        if world_size > 1:
            dist.all_reduce(part)
        x = x + part.numpy()
        if rank == 0:
            with (folder / "new.npz").open("wb") as file:
                np.savez(file, step=step, x=x)
            (folder / "new.npz").replace(checkpoint)
            line.record({"step": step, "x": x.tolist()})
        line.checkpoint()
    return {"x": x.tobytes()}


def hang(folder: Path) -> None:
    time.sleep(1000)


def complain(folder: Path) -> None:
    raise UserError("row 7 is wrong")


def fail(folder: Path) -> None:
    raise KeyError("a bug of ours")


def expected(num_steps: int) -> np.ndarray:
    x = np.zeros(4)
    for step in range(num_steps):
        x = x + step_of(x, step, range(12))
    return x


def run(folder: Path, incidents: dict, num_workers=2, **options) -> dict:
    from gendist.train.ray_trainer import train_on_ray

    def function(line):
        return train(folder, incidents, line)

    return train_on_ray(function, num_workers, folder, **options)


def starts(folder: Path) -> list[tuple[int, int]]:
    """Rank and world size of everything that started."""
    return [tuple(map(int, line.split()[:2])) for line in (folder / "starts").read_text().splitlines()]


@pytest.fixture
def leaves_nothing(cluster, tmp_path):
    """All CPUs are free at the end, and no file of Ray Train's is left."""
    before = ray.cluster_resources()["CPU"]
    yield
    until = time.monotonic() + 30
    while ray.available_resources().get("CPU", 0) < before and time.monotonic() < until:
        time.sleep(0.1)
    assert ray.available_resources()["CPU"] >= before
    assert not (tmp_path / ".ray_train").exists()


def test_losses_hangs_and_exceptions_are_recovered_from_and_mistakes_are_not(cluster, tmp_path, caplog, leaves_nothing):
    records = []
    incidents = {(8, 1): hang, (16, 1): fail, (24, 1): complain}
    with caplog.at_level(logging.INFO, "gendist"), pytest.raises(UserError, match=r"^row 7 is wrong$"):
        # Two are more than one, but there are checkpoints between them.
        run(tmp_path, incidents, max_failures=1, watch=records.append, silence_limit_s=6.0)
    stored = np.load(tmp_path / "checkpoint.npz")
    assert stored["step"] == 23
    assert stored["x"].tobytes() == expected(24).tobytes()
    assert sorted(starts(tmp_path)) == sorted([(0, 2), (1, 2)] * 3)
    assert sorted({record["step"] for record in records}) == list(range(24))
    assert caplog.text.count("training with 2 workers") == 3
    assert caplog.text.count("a worker was lost; going on from the last checkpoint (1 of 1)") == 1
    assert caplog.text.count("a worker failed (KeyError: 'a bug of ours'); going on from the last checkpoint (1 of 1)") == 1
    for rank in range(2):
        assert_set_up_as_by_torchrun(rank, *json.loads((tmp_path / f"setting-{rank}").read_text()))


def assert_set_up_as_by_torchrun(rank: int, environment: dict[str, str], folder: str, num_threads: int) -> None:
    from gendist.train.ray_trainer import interface_of

    assert (num_threads, folder) == (1, os.getcwd())
    address = ray.util.get_node_ip_address()
    assert environment["MASTER_ADDR"] == address
    assert (environment["RANK"], environment["WORLD_SIZE"], environment["LOCAL_RANK"]) == (str(rank), "2", str(rank))
    assert environment["GLOO_SOCKET_IFNAME"] == environment["NCCL_SOCKET_IFNAME"] == interface_of(address)
    assert environment["MALLOC_TRIM_THRESHOLD_"] == "4000000000"


def test_the_group_shrinks_with_the_cluster(cluster, tmp_path, caplog):
    nodes = [cluster.add_node(num_cpus=1, resources={"slot": 1}, object_store_memory=80_000_000) for _ in range(2)]
    cluster.wait_for_nodes()
    records = []

    def watch(record):
        records.append(record)
        if record["step"] == 8 and len(nodes) == 2:
            cluster.remove_node(nodes.pop())

    def wait(folder: Path) -> None:
        time.sleep(60)

    try:
        with caplog.at_level(logging.INFO, "gendist"):
            result = run(tmp_path, {(9, 0): wait, (9, 1): wait}, num_workers=(1, 2), resources=SLOT, watch=watch)
    finally:
        for node in nodes:
            cluster.remove_node(node)
    assert result["x"] == expected(NUM_STEPS).tobytes()
    assert starts(tmp_path)[-1] == (0, 1)
    assert sorted({record["step"] for record in records}) == list(range(NUM_STEPS))


def test_more_workers_than_the_cluster_has_room_for_are_refused_with_both_numbers(cluster, tmp_path):
    began = time.monotonic()
    with pytest.raises(UserError, match=r"num_workers is 9, but the cluster has 8 CPUs; ask for at most 8"):
        run(tmp_path, {}, num_workers=9)
    with pytest.raises(UserError, match=r"num_workers is 10, but the cluster has 8 CPUs"):
        run(tmp_path, {}, num_workers=(10, 12))
    with pytest.raises(UserError, match=r"num_workers is 1, but the cluster has 0 GPUs .* or leave cluster.use_gpu out"):
        run(tmp_path, {}, num_workers=1, use_gpu=True)
    assert time.monotonic() - began < 10
    assert not (tmp_path / "starts").exists()


def test_of_what_the_workers_met_the_cause_is_told():
    from gendist.train.ray_trainer import first_failure

    def at(error: Exception, failed_at: float) -> Exception:
        error.failed_at = failed_at
        return error

    closed, bug, mistake, death = at(RuntimeError(), 2.0), at(KeyError(), 1.0), at(UserError(), 3.0), OSError()
    assert first_failure({0: closed, 1: bug}) is bug
    assert first_failure({0: closed, 1: bug, 2: death}) is death
    assert first_failure({0: closed, 1: bug, 2: death, 3: mistake}) is mistake


def test_the_interface_that_carries_an_address():
    from gendist.train.ray_trainer import interface_of

    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("203.0.113.77") is None
