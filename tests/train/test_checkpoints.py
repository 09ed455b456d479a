"""Checkpoints on disk: whole or not at all, beside the work, and none lost that was there."""

from __future__ import annotations

import json
import logging
import shutil
import threading

import pytest
import safetensors.torch
import torch
from power_cut import PowerCut, cut_power_at
from toys import Regression, mlp

from gendist.protocols import UserError
from gendist.storage import patience
from gendist.train import checkpoints
from gendist.train.checkpoints import CheckpointWriter, TrainingCheckpoint, newest
from gendist.train.config import DeepConfig
from gendist.train.ddp_engine import DdpEngine
from gendist.train.decisions import Progress
from gendist.train.processes import Processes

ALONE = Processes(0, 1, torch.device("cpu"))


def checkpoint(step: int, best_step: int | None = None) -> TrainingCheckpoint:
    state = {"net/param/weight": torch.full((3, 2), float(step)), "net/step": torch.tensor(step)}
    value = None if best_step is None else 0.5
    return TrainingCheckpoint(Progress(step, best_step, value), state)


def write(folder, *steps: int, keep_last: int = 2, best_step: int | None = None) -> None:
    with CheckpointWriter(folder, keep_last) as writer:
        for step in steps:
            writer.save(checkpoint(step, best_step))


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_read_is_what_was_written(tmp_path):
    write(tmp_path / "checkpoints", 7, best_step=3)
    found = newest(tmp_path / "checkpoints")
    expected = checkpoint(7, 3)
    assert found.progress == expected.progress
    assert found.state.keys() == expected.state.keys()
    for name, value in expected.state.items():
        assert found.state[name].dtype == value.dtype
        assert torch.equal(found.state[name], value)
    assert newest(tmp_path / "nothing") is None


def test_the_same_state_gives_the_same_bytes(tmp_path):
    write(tmp_path / "a", 5)
    write(tmp_path / "b", 5)
    for name in ("training.json", "training.safetensors"):
        assert (tmp_path / "a" / "00000005" / name).read_bytes() == (tmp_path / "b" / "00000005" / name).read_bytes()


def test_the_last_ones_and_the_best_stay(tmp_path):
    write(tmp_path, 10, 20, 30, 40, keep_last=2, best_step=10)
    assert names(tmp_path) == ["00000010", "00000030", "00000040"]
    write(tmp_path, 50, keep_last=1, best_step=50)
    assert names(tmp_path) == ["00000050"]


@pytest.mark.parametrize("damage", ["flipped", "cut", "no json", "half a json", "of another step", "empty"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, damage, caplog):
    write(tmp_path, 10, 20)
    tensors, description = tmp_path / "00000020" / "training.safetensors", tmp_path / "00000020" / "training.json"
    content = bytearray(tensors.read_bytes())
    if damage == "flipped":
        content[-1] ^= 1
        tensors.write_bytes(content)
    elif damage == "cut":
        tensors.write_bytes(content[:-5])
    elif damage == "no json":
        description.unlink()
    elif damage == "half a json":
        description.write_text(description.read_text()[:40])
    elif damage == "of another step":
        (tmp_path / "00000020").rename(tmp_path / "00000030")
    else:
        shutil.rmtree(tmp_path / "00000020")
        (tmp_path / "00000020").mkdir()
    with caplog.at_level(logging.WARNING):
        assert newest(tmp_path).progress.step == 10
    assert "passed over" in caplog.text
    # Training goes on from 10; what was passed over is not counted among the last, and is no longer in the way.
    write(tmp_path, 15, 20, keep_last=3)
    assert newest(tmp_path).progress.step == 20
    assert [name for name in names(tmp_path) if not name.startswith(".")] == ["00000010", "00000015", "00000020"]


def test_a_power_cut_at_any_moment_loses_no_earlier_checkpoint(tmp_path, monkeypatch):
    write(tmp_path, 10, 20)
    for number in range(1, 100):
        folder = tmp_path / f"run-{number}"
        shutil.copytree(tmp_path, folder, ignore=shutil.ignore_patterns("run-*"))
        with monkeypatch.context() as patch:
            cut_power_at(patch, number)
            try:
                write(folder, 30)
                survived = True
            except PowerCut:
                survived = False
        assert newest(folder).progress.step in ((30,) if survived else (20, 30))
        write(folder, 30)
        assert [name for name in names(folder) if not name.startswith(".")] == ["00000020", "00000030"]
        if survived:
            break
    assert 6 < number < 99


def test_the_caller_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    may_write, calls = threading.Event(), []
    original = safetensors.torch.save_file

    def held_up(tensors, path):
        calls.append(threading.current_thread())
        assert may_write.wait(20)
        original(tensors, path)

    monkeypatch.setattr(safetensors.torch, "save_file", held_up)
    with CheckpointWriter(tmp_path, 2) as writer:
        writer.save(checkpoint(1))
        writer.check()
        assert newest(tmp_path) is None
        may_write.set()
        writer.save(checkpoint(2))
        assert newest(tmp_path).progress.step >= 1  # one at a time: the first is on disk before the second begins
    assert newest(tmp_path).progress.step == 2
    assert threading.main_thread() not in calls


def test_a_full_disk_is_told_and_loses_nothing(tmp_path, monkeypatch):
    write(tmp_path, 10)
    monkeypatch.setattr(patience, "PATIENCE_S", 0.0)

    def full(tensors, path):
        path.write_bytes(b"some")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", full)
        with CheckpointWriter(tmp_path, 2) as writer:
            writer.save(checkpoint(20))
            with pytest.raises(UserError, match=r"00000020.*No space left on device, for 0 s"):
                writer.wait()
        with pytest.raises(UserError, match="No space left"), CheckpointWriter(tmp_path, 2) as writer:
            writer.save(checkpoint(20))
    assert names(tmp_path) == ["00000010"]
    write(tmp_path, 20)
    assert newest(tmp_path).progress.step == 20


def test_a_newer_format_is_refused(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "FORMAT_VERSION", 2)
        write(tmp_path, 10)
    with pytest.raises(UserError, match="newer gendist"):
        newest(tmp_path)


def prepared(network, state=None, **config) -> DdpEngine:
    engine = DdpEngine(ALONE, DeepConfig.model_validate(config))
    engine.prepare({"network": network}, state)
    return engine


@pytest.mark.parametrize(("sizes", "config", "message"), [
    ([4, 10, 7], {}, r"network/param/0\.bias is \[9\], not \[10\] \(and 8 more\);"),
    ([4, 9, 9, 7], {}, r"network/param/4\.bias is missing \(and 5 more\)"),
    ([4, 9], {}, r"network/param/2\.bias is unknown here \(and 5 more\)"),
    ([4, 9, 7], {"ema": 0.1}, r"network/ema/0\.bias is missing \(and 3 more\)"),
    ([4, 9, 7], {"optimizer": {"kind": "sgd"}}, r"network/exp_avg/0\.bias is unknown here \(and 7 more\)"),
])  # fmt: skip
def test_a_checkpoint_of_another_model_is_refused_in_one_line(sizes, config, message):
    state = prepared(mlp([4, 9, 7], torch.Generator())).state()
    network = mlp(sizes, torch.Generator())
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(UserError, match=message) as raised:
        prepared(network, state, **config)
    assert "\n" not in str(raised.value)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_the_state_of_an_engine_survives_the_disk(tmp_path):
    engine = DdpEngine(ALONE, DeepConfig(ema=0.1))
    engine.prepare(Regression().networks())
    state = engine.state()
    with CheckpointWriter(tmp_path, 1) as writer:
        writer.save(TrainingCheckpoint(Progress(3), state))
    found = newest(tmp_path).state
    assert found.keys() == state.keys()
    again = DdpEngine(ALONE, DeepConfig(ema=0.1))
    again.prepare(Regression(seed=8).networks(), found)
    for name, value in again.state().items():
        assert torch.equal(value, state[name]), name


def test_the_description_is_plain_json(tmp_path):
    write(tmp_path, 4, best_step=2)
    description = json.loads((tmp_path / "00000004" / "training.json").read_text())
    assert description["progress"] == {"step": 4, "best_step": 2, "best_value": 0.5, "num_no_better": 0}
