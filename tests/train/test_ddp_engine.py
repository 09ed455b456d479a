"""What the matrix of exactness does not meet: many buckets, processes without a sample in a micro-batch, and refusals."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
import worlds
from toys import Adversarial, Regression, plainly_trained, rows

from gendist.protocols import Phase, UserError
from gendist.train import ddp_engine
from gendist.train.config import DeepConfig
from gendist.train.ddp_engine import DdpEngine
from gendist.train.loop import train
from gendist.train.processes import Processes, joined

SEED = 2
ALONE = Processes(0, 1, torch.device("cpu"))


def config(**changes) -> DeepConfig:
    return DeepConfig.model_validate({"num_steps": 20, "global_batch_size": 8, "optimizer": {"learning_rate": 0.01}, **changes})


MANY_BUCKETS = config()
FEW_SAMPLES = config(global_batch_size=4, micro_batch_size=1)  # of two steps of accumulation, two processes sit one out


def trained(processes: Processes, config: DeepConfig, bucket_bytes: int) -> tuple[dict, int]:
    before, ddp_engine.BUCKET_BYTES = ddp_engine.BUCKET_BYTES, bucket_bytes
    try:
        model, engine = Adversarial(), DdpEngine(processes, config)
        engine.prepare(model.networks())
        for _ in train(model, engine, rows(), config, SEED):
            pass
        num_buckets = len(engine._trained["discriminator"].gradients._buckets)
    finally:
        ddp_engine.BUCKET_BYTES = before
    return {name: value.detach().clone() for name, value in model.discriminator.named_parameters()}, num_buckets


def refused(processes: Processes) -> str:
    """Networks that differ between processes."""
    try:
        DdpEngine(processes, config()).prepare(Regression(seed=processes.rank).networks())
    except UserError as error:
        return str(error)
    return "no error"


def reached_twice(processes: Processes) -> str:
    """A parameter whose gradient comes in two parts."""
    layer = torch.nn.Linear(2, 1)
    torch.nn.init.ones_(layer.weight)
    torch.nn.init.ones_(layer.bias)
    engine = DdpEngine(processes, config())
    engine.prepare({"layer": layer})
    engine.begin_phase("layer")
    engine.begin_micro_batch("layer", is_last=True)
    engine.backward("layer", layer(torch.ones(1, 2)).sum())
    try:
        engine.backward("layer", layer(torch.ones(1, 2)).sum())
    except UserError as error:
        return str(error)
    finally:
        engine.step("layer", 0.0)  # what has set out must arrive
    return "no error"


def held_between_passes(processes: Processes) -> tuple[int, float]:
    """Bytes of gradients and buckets after the first of two backward passes, and what the engine says of them."""
    layer, this = torch.nn.Linear(30, 20), config(micro_batch_size=1)
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    engine = DdpEngine(processes, this)
    engine.prepare({"layer": layer})
    engine.begin_phase("layer")
    engine.begin_micro_batch("layer", is_last=False)
    engine.backward("layer", layer(torch.ones(1, 30)).sum())
    buckets = [bucket.memory for bucket in engine._trained["layer"].gradients._buckets]
    memory = [value.untyped_storage() for value in (*(p.grad for p in layer.parameters()), *buckets)]
    held = sum({each.data_ptr(): each.nbytes() for each in memory}.values())
    sizes = [parameter.numel() for parameter in layer.parameters()]
    return held, engine.memory(this, "layer", sizes, processes.world_size).gradients


def group_of_another(processes: Processes) -> tuple[int, int, bool]:
    with joined(use_gpu=False) as found:
        pass
    return found.rank, found.world_size, dist.is_initialized()


@pytest.fixture(scope="module")
def results() -> dict:
    jobs = [
        worlds.Job("many buckets", 2, trained, (MANY_BUCKETS, 100)),
        worlds.Job("few samples", 3, trained, (FEW_SAMPLES, 100)),
        worlds.Job("refused", 2, refused),
        worlds.Job("reached twice", 2, reached_twice),
        worlds.Job("held between passes", 2, held_between_passes),
        worlds.Job("group of another", 3, group_of_another),
    ]
    return worlds.run(jobs, timeout_s=150.0)


@pytest.mark.parametrize(("key", "config"), [("many buckets", MANY_BUCKETS), ("few samples", FEW_SAMPLES)])
def test_the_layout_of_buckets_and_empty_micro_batches_change_nothing(key, config, results):
    *_, expected = plainly_trained("adversarial", rows(), config, SEED)
    first, num_buckets = results[key][0]
    assert num_buckets > 2
    for found, _ in results[key]:
        for name, value in found.items():
            assert torch.equal(value, first[name])
            torch.testing.assert_close(value, expected[f"discriminator/param/{name}"], rtol=0.0, atol=1e-6)


def test_processes_that_begin_with_other_networks_are_refused(results):
    for message in results["refused"]:
        assert "the processes begin with networks that differ" in message


def test_a_gradient_in_two_parts_is_refused(results):
    for message in results["reached twice"]:
        assert "use_reentrant" in message


def test_gradients_of_several_micro_batches_take_no_more_memory_than_is_said(results):
    for held, said in results["held between passes"]:
        assert held == said == 4 * (30 * 20 + 20)


def test_a_group_that_somebody_made_is_joined_and_left_as_it_is(results):
    assert results["group of another"] == [(rank, 3, True) for rank in range(3)]


def test_a_process_alone_needs_no_group(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with joined(use_gpu=False) as found:
        assert found == ALONE
        assert not dist.is_initialized()


def test_the_environment_of_torchrun_makes_a_group_for_as_long_as_it_is_used(monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setitem(os.environ, name, str(value))
    with joined(use_gpu=False, timeout_s=20.0) as found:
        assert found == ALONE
        assert dist.is_initialized()
    assert not dist.is_initialized()


def test_no_thread_of_a_group_outlives_it(tmp_path):
    """Those of gloo want the interpreter: where it ends before they do, the process aborts or never ends."""
    program = """
import os, torch
from pathlib import Path
from gendist.train.processes import joined

def of_gloo():
    names = [(task / "comm").read_text() for task in Path("/proc/self/task").iterdir()]
    return sum("gloo" in name for name in names)

with joined(use_gpu=False, timeout_s=20.0):
    torch.optim.Adam([torch.nn.Parameter(torch.ones(3))])
    during = of_gloo()
print(during, of_gloo())
"""
    variables = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, **variables}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    during, after = map(int, done.stdout.split())
    assert during > 0
    assert after == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_one_line():
    with pytest.raises(UserError, match=r"cluster.use_gpu: process 0 of this machine finds 0 GPUs"), joined(use_gpu=True):
        pass


def test_frozen_networks_get_no_gradient_and_move_no_buffer():
    model, engine = Adversarial(), DdpEngine(ALONE, config())
    engine.prepare(model.networks())
    before = {name: value.clone() for name, value in model.discriminator.state_dict().items()}
    phase = Phase("generator", "generator")
    engine.begin_phase("generator")
    engine.begin_micro_batch("generator", is_last=True)
    noise = {"latent": torch.ones(4, 3)}
    engine.backward("generator", model.loss(phase, rows().take(torch.arange(4)), noise, 0).terms["logistic"])
    assert all(parameter.grad is None for parameter in model.discriminator.parameters())
    assert engine.step("generator", 0.1) > 0.0
    for name, value in model.discriminator.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(parameter.requires_grad for parameter in model.discriminator.parameters())


class Wrapped(torch.nn.Module):
    """A class of ours around a Sequential: torch does not compile a bare one."""

    def __init__(self, inside: torch.nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inside(x)


@pytest.fixture
def _without_code_generation(monkeypatch):
    """Compiled as far as autograd goes, which needs no C++ compiler."""
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compile_module(module, backend="aot_eager"))


@pytest.mark.usefixtures("_without_code_generation")
def test_compiled_networks_learn_the_same():
    this, model = config(compile=True, num_steps=5), Regression()
    model.network = Wrapped(model.network)
    engine = DdpEngine(ALONE, this)
    engine.prepare(model.networks())
    for _ in train(model, engine, rows(), this, SEED):
        pass
    assert "Compiled" in type(model.network(torch.ones(2, 4)).grad_fn).__name__
    *_, expected = plainly_trained("regression", rows(), this, SEED)
    state = engine.state()
    for name, value in expected.items():
        found = state[name.replace("/param/", "/param/inside.")]
        torch.testing.assert_close(found, value, rtol=0.0, atol=1e-6)


@pytest.mark.usefixtures("_without_code_generation")
def test_a_penalty_on_a_gradient_cannot_be_compiled_and_says_so():
    this, model = config(compile=True), Adversarial()
    model.discriminator = Wrapped(model.discriminator)
    engine = DdpEngine(ALONE, this)
    engine.prepare(model.networks())
    with pytest.raises(UserError, match=r"fit.compile: this loss differentiates a gradient.*set it to false"):
        list(train(model, engine, rows(), this, SEED))
