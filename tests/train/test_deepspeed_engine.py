"""What is DeepSpeed's own: second derivatives, what a loss does not reach, offload, precision, and what it is silent about."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import worlds
from test_loop import ALONE, SEED, config
from torch import nn
from toys import Adversarial, mlp, rows, squared_slope

from gendist.one_thread import one_thread
from gendist.protocols import UserError
from gendist.train.ddp_engine import DdpEngine
from gendist.train.deepspeed_engine import DeepSpeedEngine
from gendist.train.loop import train
from gendist.train.loss_scale import LossScale
from gendist.train.processes import Processes

STAGES = (0, 1, 2, 3)
NUM_STEPS, HALF = 9, 4


@pytest.fixture(scope="module", autouse=True)
def _alone():
    with one_thread():
        yield
    if dist.is_initialized():
        dist.destroy_process_group()


def zero(stage, **changes):
    engine = {"kind": "deepspeed", "zero_stage": stage, **changes.pop("engine", {})}
    optimizer = {"gradient_clipping": 0.3, "weight_decay": 0.1}
    options = {"num_steps": NUM_STEPS, "checkpoint_every": HALF, "micro_batch_size": 6, "ema": 0.1, "optimizer": optimizer}
    return config(**{**options, **changes, "engine": engine})


def ended(engine_class, this, start=None, processes=ALONE):
    """The states after HALF steps and at the end."""
    model = Adversarial(seed=0 if start is None else 1)
    engine = engine_class(processes, this)
    engine.prepare(model.networks(), start and start[0])
    half = None
    for report in train(model, engine, rows(), this, SEED, **({"progress": start[1]} if start else {})):
        if report.progress.step == HALF:
            half = engine.state(), report.progress
    return half, engine.state()


@pytest.fixture(scope="module")
def expected():
    return ended(DdpEngine, zero(0))


def assert_close(state, other, tolerance=1e-6):
    assert state.keys() == other.keys()
    for name, value in state.items():
        torch.testing.assert_close(value, other[name], rtol=0.0, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("stage", STAGES)
def test_a_state_goes_from_any_engine_to_any_other(stage, expected):
    half, end = ended(DeepSpeedEngine, zero(stage))
    assert_close(end, expected[1])
    assert_close(ended(DeepSpeedEngine, zero((stage + 2) % 4), half)[1], end)
    assert_close(ended(DdpEngine, zero(0), half)[1], end)
    assert_close(ended(DeepSpeedEngine, zero(stage), expected[0])[1], end)


OFFLOAD = {
    1: {"offload_optimizer": {"device": "cpu"}},
    2: {"offload_optimizer": {"device": "cpu"}},
    3: {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}},
}


@pytest.mark.parametrize("stage", OFFLOAD)
def test_offload_to_the_cpu_changes_no_number(stage, expected, tmp_path):
    path = tmp_path / "zero.json"
    path.write_text(json.dumps({"zero_optimization": OFFLOAD[stage]}))
    half, end = ended(DeepSpeedEngine, zero(stage, engine={"config": str(path)}))
    assert_close(end, expected[1])
    assert_close(ended(DeepSpeedEngine, zero(stage, engine={"config": str(path)}), half)[1], end)


@pytest.mark.parametrize("stage", [1, 3])
def test_small_buckets_change_no_number(stage, expected, tmp_path):
    path = tmp_path / "zero.json"
    path.write_text(json.dumps({"zero_optimization": {"reduce_bucket_size": 30, "allgather_bucket_size": 30}}))
    assert_close(ended(DeepSpeedEngine, zero(stage, engine={"config": str(path)}))[1], expected[1])


def test_what_deepspeed_refuses_of_a_users_file_is_one_line(tmp_path):
    path = tmp_path / "zero.json"
    path.write_text(json.dumps({"zero_optimization": {"reduce_bucket_size": "large"}}))
    engine = DeepSpeedEngine(ALONE, zero(1, engine={"config": str(path)}))
    with pytest.raises(UserError, match="reduce_bucket_size") as raised:
        engine.prepare(Adversarial().networks())
    assert "\n" not in str(raised.value)


def convolutional(generator):
    network = nn.Sequential(
        nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 3, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(12, 1)
    )
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    return network


CRITICS = {"deep": lambda generator: mlp([4, 8, 8, 8, 1], generator), "convolutional": convolutional}


def test_a_loss_that_reaches_nothing_is_refused_where_processes_would_wait_for_each_other():
    for stage in (2, 3):
        engine = DeepSpeedEngine(ALONE, zero(stage))
        engine.prepare({"network": mlp([4, 3, 1], torch.Generator().manual_seed(0))})
        engine.begin_phase("network")
        engine.begin_micro_batch("network", is_last=True)
        with pytest.raises(UserError, match="depends on network"):
            engine.backward("network", torch.zeros(()))


@pytest.mark.parametrize("critic", CRITICS)
@pytest.mark.parametrize("stage", STAGES)
def test_a_loss_of_second_derivatives_alone(stage, critic):
    this = config(engine={"kind": "deepspeed", "zero_stage": stage}, optimizer={"kind": "sgd"})
    network, plain = (CRITICS[critic](torch.Generator().manual_seed(0)) for _ in range(2))
    engine = DeepSpeedEngine(ALONE, this)
    engine.prepare({"critic": network})
    for step in range(4):
        x = torch.randn(12, 4, generator=torch.Generator().manual_seed(step))
        engine.begin_phase("critic")
        for number, part in enumerate(x.split(6)):
            engine.begin_micro_batch("critic", is_last=number == 1)
            engine.backward("critic", squared_slope(network, part).sum())
        engine.step("critic", 0.01)
        squared_slope(plain, x).sum().backward()
        with torch.no_grad():
            for parameter in plain.parameters():
                # The gradient of the last bias is 0.
                parameter -= 0.01 * (torch.zeros(()) if parameter.grad is None else parameter.grad)
        plain.zero_grad()
    state = engine.state()
    for name, value in plain.named_parameters():
        torch.testing.assert_close(state[f"critic/param/{name}"], value.detach(), rtol=0.0, atol=1e-6)


@pytest.mark.parametrize("stage", STAGES)
def test_a_gradient_that_is_not_finite_changes_nothing(stage):
    network = mlp([4, 3, 1], torch.Generator().manual_seed(0))
    engine = DeepSpeedEngine(ALONE, config(engine={"kind": "deepspeed", "zero_stage": stage}, ema=0.1))
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
    after = engine.state()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert math.isfinite(stepped(1.0))
    assert int(engine.state()["network/step"]) == 2


@pytest.mark.parametrize("stage", STAGES)
def test_the_scale_of_the_loss_changes_neither_step_nor_norm(stage):
    """float16 itself needs a GPU; its scale does not."""

    def ended(scale):
        network = mlp([4, 3, 1], torch.Generator().manual_seed(0))
        this = config(engine={"kind": "deepspeed", "zero_stage": stage}, optimizer={"kind": "sgd", "gradient_clipping": 0.2})
        engine = DeepSpeedEngine(ALONE, this)
        engine.prepare({"network": network})
        trained = engine._trained["network"]
        trained.scales_loss, trained.loss_scale = scale != 1.0, LossScale(scale)
        engine.begin_phase("network")
        engine.begin_micro_batch("network", is_last=True)
        engine.backward("network", network(torch.ones(2, 4)).square().sum())
        return engine.step("network", 0.1), engine.state()["network/param/0.weight"]

    norm, weight = ended(1.0)
    scaled_norm, scaled_weight = ended(1024.0)
    assert scaled_norm == pytest.approx(norm, rel=1e-6)
    torch.testing.assert_close(scaled_weight, weight, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("stage", STAGES)
def test_bfloat16_keeps_parameters_and_moments_in_float32(stage, expected):
    end = ended(DeepSpeedEngine, zero(stage, precision="bfloat16"))[1]
    plain = ended(DdpEngine, zero(0, precision="bfloat16"))[1]
    assert {value.dtype for name, value in end.items() if not name.endswith("/step")} == {torch.float32}
    assert_close(end, plain, 1e-3)
    assert not all(torch.allclose(value, expected[1][name], atol=1e-6) for name, value in end.items())


@pytest.mark.parametrize("stage", STAGES)
def test_a_parameter_that_is_never_trained_stays_and_is_kept(stage):
    network = mlp([4, 3, 1], torch.Generator().manual_seed(0))
    network[0].weight.requires_grad_(False)
    was = network[0].weight.detach().clone()
    engine = DeepSpeedEngine(ALONE, config(engine={"kind": "deepspeed", "zero_stage": stage}))
    engine.prepare({"network": network})
    for _ in range(2):
        engine.begin_phase("network")
        engine.begin_micro_batch("network", is_last=True)
        engine.backward("network", network(torch.ones(2, 4)).sum())
        engine.step("network", 0.1)
    state = engine.state()
    assert torch.equal(state["network/param/0.weight"], was)
    assert "network/exp_avg/0.weight" not in state
    assert state["network/exp_avg/2.weight"].abs().sum() > 0


def trained_with_an_observer(processes, stage):
    """Process 0 alone looks at the averaged networks along the way; the state at the end, and what it saw."""
    this = zero(stage, num_steps=6, micro_batch_size=None)
    model = Adversarial()
    engine = DeepSpeedEngine(processes, this)
    engine.prepare(model.networks())
    seen = []
    for _ in train(model, engine, rows(), this.model_copy(update={"record_every": 2}), SEED):
        with engine.averaged(), torch.no_grad():
            if processes.rank == 0:
                seen.append(model.discriminator.eval()(model.generator(torch.ones(2, 3))))
            model.discriminator.train()
            dist.barrier()
    return engine.state(), seen


def trained_with_a_process_that_has_nothing(processes, stage):
    return ended(DeepSpeedEngine, zero(stage, global_batch_size=5, micro_batch_size=1), processes=processes)[1]


@pytest.fixture(scope="module")
def of_two():
    jobs = [worlds.Job(("observed", stage), 2, trained_with_an_observer, (stage,)) for stage in STAGES]
    jobs += [worlds.Job(("nothing", stage), 2, trained_with_a_process_that_has_nothing, (stage,)) for stage in STAGES[:2]]
    return worlds.run(jobs, timeout_s=120.0)


@pytest.mark.parametrize("stage", STAGES)
def test_one_process_may_call_the_averaged_networks_alone(stage, of_two):
    (state, seen), _ = of_two["observed", stage]
    this = zero(0, num_steps=6, micro_batch_size=None)
    assert_close(state, ended(DdpEngine, this)[1])
    for one, other in zip(seen, of_two["observed", 0][0][1], strict=True):
        torch.testing.assert_close(one, other, rtol=0.0, atol=1e-5)


@pytest.mark.parametrize("stage", STAGES[:2])
def test_a_process_without_a_sample_in_a_micro_batch(stage, of_two):
    assert_close(of_two["nothing", stage][0], ended(DdpEngine, zero(0, global_batch_size=5, micro_batch_size=1))[1])


@pytest.mark.parametrize(
    ("stage", "changes", "num_processes", "words"),
    [
        (0, {"precision": "float16"}, 1, ["float16", "GPU"]),
        (1, {"channels_last": True}, 1, ["channels_last", "ddp"]),
        (3, {"compile": True}, 1, ["compile", "stage 2"]),
        (2, {"global_batch_size": 5, "micro_batch_size": 1}, 2, ["5", "2", "stage 1"]),
    ],
)
def test_what_a_stage_cannot_do_is_refused(stage, changes, num_processes, words):
    with pytest.raises(UserError) as raised:
        DeepSpeedEngine(Processes(0, num_processes, torch.device("cpu")), zero(stage, **changes))
    assert all(word in str(raised.value) for word in words)
    assert "\n" not in str(raised.value)


def test_without_deepspeed_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(UserError, match=r"pip install 'gendist\[deepspeed\]'"):
        DeepSpeedEngine(ALONE, zero(2))


QUIET = """
from test_deepspeed_engine import DeepSpeedEngine, ended, zero
for stage in (1, 3):
    ended(DeepSpeedEngine, zero(stage))
"""


def test_nothing_is_printed():
    done = subprocess.run(
        [sys.executable, "-c", QUIET], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=120, check=True
    )
    assert (done.stdout, done.stderr) == ("", "")


def test_whole_weights_are_multiplied_as_if_there_were_no_deepspeed():
    """Whatever this process computes beside, or after, what is sharded: the same kernels, and the same bytes."""
    DeepSpeedEngine(ALONE, zero(3)).prepare(Adversarial().networks())
    layer, x = nn.Linear(3, 2), torch.ones(4, 3)
    assert type(layer(x).grad_fn) is type(torch.addmm(layer.bias, x, layer.weight.T).grad_fn)
