"""What several tests share: one Ray cluster for the whole session, and small data."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["WANDB_MODE"] = "disabled"  # where it is installed, every fit would start it; its tests do without this
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the cores are taken by the processes beside this one

# An object store that fsspec finds by itself, here and in every process that a test starts.
sys.path.insert(0, str(Path(__file__).parent / "stores"))
os.environ["PYTHONPATH"] = os.pathsep.join([sys.path[0], *filter(None, [os.environ.get("PYTHONPATH")])])

import numpy as np
import pytest

NUM_CPUS = 8
FIRST = ("ray", "multihost", "test_exactness.py")  # of the groups of tests that a process has to itself


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of processes that share the tests (`--dist loadgroup`), one has all that need the cluster and one, which may be the same,
    those of several hosts; else a file is one process's, as are its fixtures. Both of these take long, and begin first."""
    if "exhaustive" not in config.option.markexpr:
        left_out = [item for item in items if item.get_closest_marker("exhaustive")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
    groups = {item: _group_of(item) for item in items}
    for item, group in groups.items():
        item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=lambda item: FIRST.index(groups[item]) if groups[item] in FIRST else len(FIRST))


def _group_of(item: pytest.Item) -> str:
    if item.get_closest_marker("multihost"):
        return "multihost"
    return "ray" if "cluster" in item.fixturenames else item.path.name  # type: ignore[attr-defined]


@pytest.fixture(scope="session")
def cluster() -> Iterator:
    """A Ray cluster of one node with 8 CPUs, to which a test may add nodes of its own; this process is connected to it."""
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": NUM_CPUS,
            "include_dashboard": False,
            "object_store_memory": 400_000_000,
            # A lost node is noticed within seconds.
            "_system_config": {"health_check_period_ms": 500, "health_check_timeout_ms": 1000},
        },
    )
    ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture(scope="session")
def blobs() -> np.ndarray:
    """(600, 3) three separated clusters of different shapes."""
    rng = np.random.default_rng(0)
    means = np.array([[0.0, 0.0, 0.0], [6.0, 0.0, 1.0], [0.0, 5.0, -4.0]])
    factors = rng.normal(size=(3, 3, 3)) * 0.5 + np.eye(3)
    which = rng.integers(0, 3, 600)
    return means[which] + np.einsum("nij,nj->ni", factors[which], rng.normal(size=(600, 3)))


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """The URL of an empty object store (`tests/stores`), in which nobody waits for others that come at the same moment."""
    from object_store import ObjectStore

    from gendist.storage import lease

    monkeypatch.setattr(lease, "SETTLE_S", 0.0)
    monkeypatch.setattr(lease, "QUICK_S", 60.0)
    monkeypatch.setattr(ObjectStore, "calls", [])
    monkeypatch.setattr(ObjectStore, "dies_at", None)
    return f"objects://{tmp_path}/store"


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The name of a small family that is fitted by gradient, which is among the families for the tests of a module; the rows
    that it is trained on lie in a folder of their own."""
    from toy_family import FOLDER

    import gendist.models

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(gendist.models, "__path__", [*gendist.models.__path__, FOLDER])
        patched.setenv("TMPDIR", str(tmp_path_factory.mktemp("rows")))
        patched.setattr(tempfile, "tempdir", None)  # which is looked up again
        yield "toy"


@pytest.fixture(scope="module")
def counter() -> Iterator[str]:
    """The name of a small family that is fitted by EM and takes texts and sparse rows, which is among the families."""
    from toy_family import FOLDER

    import gendist.models

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(gendist.models, "__path__", [*gendist.models.__path__, FOLDER])
        yield "counter"
