"""What several tests share: one Ray cluster for the whole session, and small data."""

from __future__ import annotations

import ast
import os
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
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
FIRST = ("cluster", "multihost", "tests/train/test_exactness.py")  # of the groups of tests: they take longest


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """Of processes that share the tests, one has all that need the cluster, and one, which may be the same, those of several
    hosts; else a file is one process's, as are its fixtures."""
    from xdist.scheduler import LoadScopeScheduling

    class OneCluster(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    config.option.loadscopereorder = False  # the order is that of the collection
    return OneCluster(config, log)


def group_of(nodeid: str) -> str:
    file, _, name = nodeid.partition("::")
    functions = _functions_of(file)
    if functions is None:
        return "multihost"
    return "cluster" if _needs_cluster(name.partition("[")[0], functions) else file


@cache
def _functions_of(file: str) -> dict[str, set[str]] | None:
    """The arguments of each function of a file, a test's or a fixture's; None where its tests are of several hosts."""
    text = (Path(__file__).parents[1] / file).read_text()
    if "pytest.mark.multihost" in text:
        return None
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
    return {function.name: {argument.arg for argument in function.args.args} for function in functions}


def _needs_cluster(name: str, functions: dict[str, set[str]]) -> bool:
    needed = functions.get(name, set())
    return "cluster" in needed or any(_needs_cluster(fixture, functions) for fixture in needed - {name})


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "exhaustive" not in config.option.markexpr:
        left_out = [item for item in items if item.get_closest_marker("exhaustive")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
    if "PYTEST_XDIST_WORKER" in os.environ:
        groups = {item: group_of(item.nodeid) for item in items}
        items.sort(key=lambda item: FIRST.index(groups[item]) if groups[item] in FIRST else len(FIRST))


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
