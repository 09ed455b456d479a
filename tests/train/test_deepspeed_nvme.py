"""Offload to NVMe: in files or in memory, training is the same, and the files are nobody else's.

What needs DeepSpeed's operator is exhaustive, since to build it takes minutes, and libaio, which not every machine has.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import plain
import pytest
import torch
import torch.distributed as dist
import toys
import worlds
from test_loop import ALONE, SEED, config
from torch import nn

from gendist.one_thread import one_thread
from gendist.protocols import UserError
from gendist.train.ddp_engine import DdpEngine
from gendist.train.deepspeed_engine import DeepSpeedEngine
from gendist.train.deepspeed_host import check_lock, check_space, own_folder
from gendist.train.loop import train

NUM_STEPS, HALF = 9, 4
SUB_GROUP_SIZE = 200_000  # entries on a process: several sub-groups, of which the last are too small to be swapped

exhaustive = pytest.mark.exhaustive


@pytest.fixture(scope="module", autouse=True)
def _alone():
    with one_thread():
        yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture(scope="session")
def operator():
    """Of DeepSpeed, which every process loads once it is built."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible():
        pytest.skip("no libaio or no C++ compiler here: install libaio-dev and g++")
    AsyncIOBuilder().load(verbose=False)


class Wide(toys.Adversarial):
    """With layers that are large enough to be swapped on one process or two, and a parameter that no loss reaches. Sizes are
    multiples of 16, so that parameters are aligned in whatever memory they lie: a product depends on it."""

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.generator = wide([3, 560, 960, 576, 4], generator)
        self.generator.register_parameter("unused", nn.Parameter(torch.ones(48)))
        self.discriminator = wide([4, 560, 960, 1], generator)


def wide(sizes, generator):
    layers = []
    for fan_in, fan_out in itertools.pairwise(sizes):
        layers += [nn.Linear(fan_in, fan_out), nn.Tanh()]
    network = nn.Sequential(*layers[:-1])
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
    return network


OPTIMIZERS = {
    "adam": {"gradient_clipping": 0.3, "weight_decay": 0.1, "epsilon": 0.1},
    "sgd": {"kind": "sgd", "gradient_clipping": 0.3, "weight_decay": 0.1},
}


def spec(path=None, block=None, **changes):
    """Of stage 3 with a user's own file, or of plain data parallelism."""
    engine = {"kind": "ddp"}
    if path is not None:
        file = path / "zero.json"
        file.write_text(json.dumps({"zero_optimization": {"sub_group_size": SUB_GROUP_SIZE, **block}}))
        engine = {"kind": "deepspeed", "zero_stage": 3, "config": str(file)}
    options = {"num_steps": NUM_STEPS, "micro_batch_size": 6, "ema": 0.1, "optimizer": OPTIMIZERS["adam"]}
    return config(**{**options, **changes, "engine": engine, "checkpoint_every": HALF})


def swapped(path, block, device="nvme"):
    """The block of a user's file, where all of it goes to files, or stays in the memory of the host."""
    place = {"device": device, **({"nvme_path": str(path)} if device == "nvme" else {})}
    return {key: {**place, **value} if key.startswith("offload") else value for key, value in block.items()}


def ended(engine_class, this, processes=ALONE, start=None):
    """The states after HALF steps and at the end, and the averaged parameters."""
    model = Wide(seed=0 if start is None else 1)
    engine = engine_class(processes, this)
    engine.prepare(model.networks(), start and start[0])
    half = None
    for report in train(model, engine, toys.rows(), this, SEED, **({"progress": start[1]} if start else {})):
        if report.progress.step == HALF:
            half = engine.state(), report.progress
    with engine.averaged():
        averaged = {
            f"{name}/ema/{key}": value.detach().clone()
            for name, network in model.networks().items()
            for key, value in network.named_parameters()
        }
    return half, engine.state(), averaged


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def assert_close(state, expected, tolerance=1e-6):
    for name, value in expected.items():
        torch.testing.assert_close(state[name], value, rtol=0.0, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")


def plainly_trained(this):
    *_, last = plain.trained(Wide(), toys.adversarial_step, toys.rows(), this, SEED)
    return last


NONE_IN_MEMORY = {"max_in_cpu": 0}
BLOCKS = {
    "optimizer": {"offload_optimizer": {}},
    "all as one sub-group": {"offload_optimizer": {}, "sub_group_size": 10**9},
    "read ahead": {"offload_optimizer": {"pipeline_read": True}},
    "written behind": {"offload_optimizer": {"pipeline_write": True}},
    "read ahead and written behind": {"offload_optimizer": {"pipeline_read": True, "pipeline_write": True}},
    "optimizer and parameters": {"offload_optimizer": {}, "offload_param": NONE_IN_MEMORY},
    "parameters": {"offload_param": NONE_IN_MEMORY},
    "parameters through one buffer": {"offload_param": {**NONE_IN_MEMORY, "buffer_count": 1}},
    "some of the parameters": {"offload_optimizer": {}, "offload_param": {"max_in_cpu": 700_000}},
    "parameters let go of at once": {"offload_param": NONE_IN_MEMORY, "stage3_max_live_parameters": 0},
    "parameters that persist": {"offload_param": NONE_IN_MEMORY, "stage3_param_persistence_threshold": 10**7},
}


@pytest.fixture(scope="module")
def expected():
    return plainly_trained(spec()), ended(DdpEngine, spec())


@exhaustive
@pytest.mark.timeout(1200)  # of which the first test waits for the compiler
@pytest.mark.parametrize("name", BLOCKS)
def test_files_change_no_byte_and_training_is_plain(name, operator, expected, tmp_path):
    this = spec(tmp_path, swapped(tmp_path, BLOCKS[name]))
    half, end, averaged = ended(DeepSpeedEngine, this)
    assert_close(end, expected[0])
    assert_close(end, expected[1][1])
    in_memory = ended(DeepSpeedEngine, spec(tmp_path, swapped(tmp_path, BLOCKS[name], "cpu")))
    assert_same(end, in_memory[1])
    assert_same(averaged, in_memory[2])
    assert_same(averaged, {name: value for name, value in end.items() if "/ema/" in name})
    this = spec(tmp_path, swapped(tmp_path, BLOCKS[name]))
    resumed = ended(DeepSpeedEngine, this, start=half)
    assert_same(resumed[1], end)
    assert_same(resumed[2], averaged)


@exhaustive
@pytest.mark.parametrize("name", ["optimizer", "optimizer and parameters"])
def test_a_state_goes_to_and_from_files(name, operator, expected, tmp_path):
    this = spec(tmp_path, swapped(tmp_path, BLOCKS[name]))
    half, end, _ = ended(DeepSpeedEngine, this)
    assert_close(ended(DdpEngine, spec(), start=half)[1], end)
    assert_close(ended(DeepSpeedEngine, this, start=expected[1][0])[1], end)


@exhaustive
@pytest.mark.parametrize("ema", [0.0, 0.1])
def test_sgd_which_keeps_no_moments(ema, operator, tmp_path):
    changes = {"optimizer": OPTIMIZERS["sgd"], "ema": ema}
    this = spec(tmp_path, swapped(tmp_path, BLOCKS["optimizer and parameters"]), **changes)
    half, end, _ = ended(DeepSpeedEngine, this)
    assert_close(end, plainly_trained(spec(**changes)))
    assert_same(ended(DeepSpeedEngine, this, start=half)[1], end)


@exhaustive
def test_a_step_that_is_not_finite_and_a_parameter_that_is_never_trained(operator, tmp_path):
    network = wide([4, 600, 620, 600, 1], torch.Generator().manual_seed(0))
    network[2].weight.requires_grad_(False)
    was = network[2].weight.detach().clone()
    this = spec(tmp_path, swapped(tmp_path, BLOCKS["optimizer and parameters"]))
    engine = DeepSpeedEngine(ALONE, this)
    engine.prepare({"network": network})

    def stepped(factor):
        engine.begin_phase("network")
        engine.begin_micro_batch("network", is_last=True)
        engine.backward("network", network(torch.ones(2, 4)).sum() * factor)
        return engine.step("network", 0.1)

    stepped(1.0)
    before = engine.state()
    assert not math.isfinite(stepped(math.inf))
    assert not math.isfinite(stepped(math.nan))
    assert_same(engine.state(), before)
    assert math.isfinite(stepped(1.0))
    after = engine.state()
    assert torch.equal(after["network/param/2.weight"], was)
    assert not torch.equal(after["network/param/4.weight"], before["network/param/4.weight"])
    assert int(after["network/step"]) == 2


@exhaustive
def test_what_is_large_is_in_files_while_a_run_lasts(operator, tmp_path):
    model = Wide()
    this = spec(tmp_path, swapped(tmp_path, BLOCKS["optimizer and parameters"]))
    held = [
        DeepSpeedEngine.memory(this, name, [p.numel() for p in network.parameters()], 1)
        for name, network in model.networks().items()
    ]
    engine = DeepSpeedEngine(ALONE, this)
    engine.prepare(model.networks())
    files = list(tmp_path.glob("gendist-swapped-*/**/*.swp"))
    for kind in ("exp_avg-", "exp_avg_sq-", "ema-"):
        assert sum(file.name.startswith(kind) for file in files) == 3  # two sub-groups of one network, one of the other
    assert sum(file.name.endswith("_param.tensor.swp") for file in files) == 3
    on_disk = sum(file.stat().st_size for file in files)
    assert 0 <= on_disk - sum(each.on_disk for each in held) < 1024 * len(files)  # a block of a file
    for trained in engine._trained.values():
        for shard, moments in trained.engine.basic_optimizer.state.items():
            sizes = {value.numel() for name, value in (("", shard), *moments.items()) if name != "step"}
            assert len(sizes) == 1
            assert max(sizes) * 4 < 2**20
    other = DeepSpeedEngine(ALONE, spec(tmp_path, swapped(tmp_path, BLOCKS["optimizer"])))
    other.prepare(Wide().networks())  # takes nothing of the first one's
    assert {file for file in files if not file.exists()} == set()
    del engine, trained
    assert {file for file in files if file.exists()} == set()
    assert len(list(tmp_path.glob("gendist-swapped-*"))) == 2  # the other one's


def of_two_processes(processes, path, block, start):
    return ended(DeepSpeedEngine, spec(path, block, micro_batch_size=3), processes, start)


def whole_and_resumed(processes, path, block):
    whole = of_two_processes(processes, path / str(processes.rank), block, None)
    box = [whole[0]]
    dist.broadcast_object_list(box)
    return whole, of_two_processes(processes, path / str(processes.rank), block, box[0])


WITH_TWO = ("optimizer", "read ahead and written behind", "optimizer and parameters", "parameters through one buffer")


@pytest.fixture(scope="module")
def of_two(operator, tmp_path_factory):
    path = tmp_path_factory.mktemp("two")
    for rank in range(2):
        (path / str(rank)).mkdir()
    jobs = [
        worlds.Job((name, device), 2, whole_and_resumed, (path, swapped(path, BLOCKS[name], device)))
        for name in WITH_TWO
        for device in ("nvme", "cpu")
    ]
    results = worlds.run(jobs, timeout_s=280.0)
    assert list(path.glob("gendist-swapped-*")) == []
    return results


@exhaustive
@pytest.mark.parametrize("name", WITH_TWO)
def test_two_processes(name, of_two, expected):
    (whole, resumed), (other, _) = of_two[name, "nvme"]
    assert_close(whole[1], expected[0])
    assert_same(whole[1], of_two[name, "cpu"][0][0][1])
    assert_same(resumed[1], whole[1])
    assert_same(resumed[2], whole[2])
    assert_same(other[2], whole[2])
    assert other[1] is None


class Owner:
    pass


def test_a_folder_is_one_owners_and_goes_with_it(tmp_path):
    owner, other = Owner(), Owner()
    folder, others = own_folder(str(tmp_path), owner), own_folder(str(tmp_path), other)
    assert folder != others
    (Path(folder) / "zero_stage_3").mkdir()
    del owner
    assert sorted(tmp_path.iterdir()) == [Path(others)]


KILLED = """
import os, signal, sys
from gendist.train.deepspeed_host import own_folder
own_folder(sys.argv[1], os)
own_folder(sys.argv[1], os)
if sys.argv[2] == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize(("how", "left"), [("ends", 0), ("killed", 2)])
def test_what_a_process_leaves_is_removed_by_itself_or_by_the_next(tmp_path, how, left):
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), how], timeout=60, check=how == "ends")
    assert len(list(tmp_path.iterdir())) == left
    owner = Owner()
    assert list(tmp_path.iterdir()) == [] or own_folder(str(tmp_path), owner)
    assert len(list(tmp_path.iterdir())) == bool(left)


def test_a_folder_that_is_none_is_one_line(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    for path in (tmp_path / "missing", file):
        with pytest.raises(UserError, match="nvme_path") as raised:
            own_folder(str(path), Owner())
        assert str(path) in str(raised.value)
        assert "\n" not in str(raised.value)


def test_without_the_operator_what_to_install_is_named(tmp_path, monkeypatch):
    engine = DeepSpeedEngine(ALONE, spec(tmp_path, swapped(tmp_path, BLOCKS["optimizer"])))
    from deepspeed.ops.op_builder import AsyncIOBuilder, PinMemoryBuilder
    from deepspeed.ops.op_builder.builder import OpBuilder

    monkeypatch.setattr(OpBuilder, "_loaded_ops", {})
    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda *_, **__: False)
    monkeypatch.setattr(PinMemoryBuilder, "load", lambda *_, **__: None)
    with pytest.raises(UserError, match="libaio-dev") as raised:
        engine.prepare(Wide().networks())
    assert "\n" not in str(raised.value)
    assert list(tmp_path.glob("gendist-swapped-*")) == []


def test_buffers_that_may_not_be_locked_are_one_line():
    with pytest.raises(UserError, match="ulimit -l") as raised:
        check_lock(2**62)
    assert "\n" not in str(raised.value)
    check_lock(4096)


def test_a_disk_that_is_too_small_is_one_line(tmp_path):
    with pytest.raises(UserError, match="GB left") as raised:
        check_space({str(tmp_path)}, 2.0**62)
    assert "\n" not in str(raised.value)
    check_space({str(tmp_path)}, 1.0)
