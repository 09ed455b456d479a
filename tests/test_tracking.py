"""wandb beside the run directory, offline: quiet, and the same run after a resume. `test_tracking_online.py` has the rest."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from wandb_server import Processes

import gendist
from gendist import tracking

SPEC = {
    "name": "tracked",
    "family": "gmm",
    "model": {"num_components": 2},
    "fit": {"max_iterations": 4, "tolerance": 0.0, "checkpoint_every": 1},
}


@pytest.fixture
def x(monkeypatch) -> np.ndarray:
    monkeypatch.delenv("WANDB_MODE")
    return np.random.default_rng(0).normal(size=(200, 2))


def runs(path: Path) -> list[str]:
    """The ids of wandb's runs in a run directory."""
    return [file.name.removeprefix("run-").removesuffix(".wandb") for file in path.glob("wandb/offline-run-*/run-*.wandb")]


def history(path: Path) -> list[dict[str, str]]:
    """All records that wandb has in a run directory, the oldest first."""
    from wandb.proto import wandb_internal_pb2

    found = []
    for file in sorted(path.glob("wandb/offline-run-*/run-*.wandb")):
        for content in leveldb_log(file.read_bytes()[7:]):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(content)
            if record.HasField("history"):
                found.append({item.key or ".".join(item.nested_key): item.value_json for item in record.history.item})
    return found


def leveldb_log(content: bytes) -> list[bytes]:
    """The records of a log of LevelDB, in which wandb writes: blocks of 32 KiB, less the seven bytes before the first, of
    pieces with a checksum (4 bytes), a length (2) and a type (1): whole, first, middle or last of a record."""
    records, place, begun = [], 0, b""
    while place + 7 <= len(content):
        left = 32768 - (place + 7) % 32768
        if left < 7:
            place += left
            continue
        length, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        begun += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            records.append(begun)
            begun = b""
    return records


class Stop(Exception):
    pass


def test_offline_it_continues_the_same_run_and_leaves_no_process(x, tmp_path, caplog, monkeypatch):
    def stop(record):
        if record["iteration"] == 2:
            raise Stop

    processes = Processes(monkeypatch)
    with pytest.raises(Stop):
        gendist.fit(SPEC, data=x, run_dir=tmp_path / "run", watch=stop)
    run = gendist.fit(SPEC, data=x, run_dir=tmp_path / "run")
    (run_id,) = set(runs(tmp_path / "run"))
    assert run_id in (tmp_path / "run" / "manifest.json").read_text()
    logged = {int(record["iteration"]): float(record["log_likelihood"]) for record in history(tmp_path / "run")}
    assert logged == {record["iteration"]: record["log_likelihood"] for record in run.history}
    assert len(processes.started) == 2
    processes.wait_until_gone()
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("how", ["the spec", "the environment"])
def test_disabled_nothing_is_begun(x, monkeypatch, tmp_path, how):
    begun = []
    monkeypatch.setattr(tracking._Sender, "_send", lambda self: begun.append(1))
    if how == "the environment":
        monkeypatch.setenv("WANDB_MODE", "disabled")
    mode = "disabled" if how == "the spec" else "online"
    gendist.fit({**SPEC, "tracking": {"wandb": mode}}, data=x, run_dir=tmp_path / "run")
    assert begun == []
    assert not (tmp_path / "run" / "wandb").exists()
    monkeypatch.delenv("WANDB_MODE", raising=False)
    gendist.fit(SPEC, data=x, run_dir=tmp_path / "tracked")
    assert begun == [1]


def test_without_wandb_only_who_asks_for_it_is_told(x, monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: None)
    gendist.fit(SPEC, data=x, run_dir=tmp_path / "offline")
    assert "wandb" not in caplog.text
    gendist.fit({**SPEC, "tracking": {"wandb": "online"}}, data=x, run_dir=tmp_path / "online")
    assert "wandb is not installed: pip install 'gendist[wandb]'" in caplog.text


def test_numbers_of_restarts_do_not_stand_for_each_other():
    record = {"iteration": 3, "restart": 0, "gain": 0.5, "repairs": [], "stopped": "x", "fell": True, "inside": {"a": 1}}
    assert tracking._numbers(record) == {"iteration": 3, "gain": 0.5, "inside.a": 1}
    assert tracking._numbers({**record, "restart": 2})["restart_2.gain"] == 0.5
