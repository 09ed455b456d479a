"""What a run or an artifact holds is data. Nothing that is read is executed, whoever wrote it."""

from __future__ import annotations

import ast
import logging
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import gendist
from gendist.config import load_spec
from gendist.protocols import UserError

ROOT = Path(__file__).parents[1]
MODULES = sorted((ROOT / "gendist").rglob("*.py"))
EXECUTING_MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "jsonpickle"}
EXECUTING_CALLS = {"torch.load", "pandas.read_pickle", "pd.read_pickle", "yaml.load", "yaml.unsafe_load", "yaml.full_load",
                   "yaml.load_all", "eval", "exec"}  # fmt: skip
IMPORTING_CALLS = {"importlib.import_module", "import_module", "__import__", "exec_module"}


def name_of(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{name_of(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def calls(path: Path) -> list[tuple[str, ast.Call]]:
    return [(name_of(node.func), node) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_reads_what_executes(path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not {name.split(".")[0] for name in names} & EXECUTING_MODULES
    for name, call in calls(path):
        assert name not in EXECUTING_CALLS, f"line {call.lineno}: {name}"
        for keyword in call.keywords:
            if keyword.arg in ("allow_pickle", "trust_remote_code"):
                assert ast.unparse(keyword.value) == "False", f"line {call.lineno}"


def test_modules_are_imported_by_name_in_three_places_alone():
    """Of which one takes the name from a spec or an artifact: that of a user's own network, `package.module:Class`."""
    where = {str(path.relative_to(ROOT)) for path in MODULES for name, _ in calls(path) if name in IMPORTING_CALLS}
    assert where == {"gendist/__init__.py", "gendist/config.py", "gendist/models/ops/networks.py"}


@pytest.mark.parametrize("family", ["../evil", "os", "evil.module", "gmm:Model", "ops"])
def test_a_family_is_one_of_those_that_there_are(family):
    with pytest.raises(UserError, match="family"):
        load_spec({"name": "a", "family": family, "model": {}})


class Malicious:
    """Makes a file where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


SPECS = {
    "gmm": {"name": "a", "family": "gmm", "model": {"num_components": 2}, "data": {"transforms": ["standardize"]},
            "fit": {"max_iterations": 3, "tolerance": 0.0, "checkpoint_every": 1}},
    "vae": {"name": "a", "family": "vae", "model": {"latent_dim": 2, "encoder": {"hidden_sizes": [4]},
                                                    "decoder": {"hidden_sizes": [4]}},
            "fit": {"num_steps": 4, "global_batch_size": 8, "checkpoint_every": 1}},
}  # fmt: skip
X = np.random.default_rng(0).random((40, 4))


@pytest.fixture(scope="module", autouse=True)
def no_pictures() -> Iterator[None]:
    """Which take longest, and of which nothing is read."""
    with pytest.MonkeyPatch.context() as patched:
        for module in ("em_fitting", "training", "training_job"):
            for name in ("draw_figures", "draw_samples"):
                patched.setattr(f"gendist.{module}.{name}", lambda *_, **__: None, raising=False)
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """A finished run of each, with its checkpoints."""
    folder = tmp_path_factory.mktemp("runs")
    for family, spec in SPECS.items():
        gendist.fit(spec, data=X, run_dir=folder / family)
        assert list((folder / family / "checkpoints").rglob("*.safetensors"))
    return {family: folder / family for family in SPECS}


@pytest.mark.parametrize("is_finished", [True, False], ids=["finished", "unfinished"])
@pytest.mark.parametrize("family", list(SPECS))
def test_a_pickle_in_place_of_any_file_of_a_run_is_not_executed_and_told_in_one_line(
    runs, family, is_finished, tmp_path, caplog
):
    mark = tmp_path / "executed"
    evil = pickle.dumps(Malicious(mark))
    pickle.loads(evil)
    mark.rmdir()  # it works where it is unpickled
    names = sorted(path.relative_to(runs[family]) for path in runs[family].rglob("*") if path.is_file())
    names = [name for name in names if not name.name.startswith(".") and name.suffix != ".png"]
    # Nobody reads the checkpoints of a finished run, and of an unfinished one the newest comes first.
    newest = max(path.name for path in (runs[family] / "checkpoints").iterdir() if path.name.isdigit())
    unread = {name for name in names if name.parts[0] == "checkpoints" and (is_finished or name.parts[1] != newest)}
    unread |= set() if is_finished else {Path("metrics.jsonl")}  # which a checkpoint may hold, too
    if not is_finished:
        names = [name for name in names if name.parts[0] != "artifact"]
    assert len(set(names) - unread) > 3
    for number, name in enumerate(names):
        run = tmp_path / str(number)
        shutil.copytree(runs[family], run)
        if not is_finished:
            shutil.rmtree(run / "artifact")
        (run / name).write_bytes(evil)
        caplog.clear()
        with caplog.at_level(logging.WARNING, "gendist"):
            told = [one_line_of(lambda run=run: gendist.fit(SPECS[family], data=X, run_dir=run))]
            if is_finished:
                told.append(one_line_of(lambda run=run: gendist.load(run)))
        assert not mark.exists(), name
        assert all("\n" not in line for line in told), name
        # Of a checkpoint that cannot be read, the one before is taken, with a warning.
        assert any(told) or "cannot be read" in caplog.text or name in unread, name


def one_line_of(attempt: Callable[[], object]) -> str:
    """What the user is told; nothing where it goes well."""
    try:
        attempt()
    except UserError as error:
        return str(error)
    return ""
