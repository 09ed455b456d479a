"""The large configuration in small: its shape, checkpointing and offload over two processes are plain training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import worlds
from toys import TensorRows

from gendist.config import Spec, family_class, load_spec
from gendist.dry_run import sizes
from gendist.one_thread import one_thread
from gendist.train.loop import train
from gendist.train.memory import bytes_per_parameter
from gendist.train.processes import Processes
from gendist.training_job import make_engine

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "vae_1b.yaml"
SMALL = [
    "model.latent_dim=3",
    "model.encoder.channels=[4,4,8]",
    "model.decoder.channels=[8,4,4]",
    "model.encoder.num_blocks=2",
    "model.decoder.num_blocks=2",
    "data.image_shape=[16,16,3]",
    "fit.num_steps=2",
    "fit.global_batch_size=4",
    "fit.micro_batch_size=1",
    "fit.optimizer.warmup_steps=0",
    "fit.optimizer.epsilon=1e-3",
    "fit.precision=float32",
    "fit.eval_every=0",
    f"fit.engine.config={ROOT / 'configs' / 'vae_1b_deepspeed.json'}",
]


def small(*overrides: str) -> Spec:
    return load_spec(CONFIG, [*SMALL, *overrides])


def rows() -> TensorRows:
    return TensorRows(torch.rand(8, 16 * 16 * 3, generator=torch.Generator().manual_seed(0)), torch.ones(8).double())


def ended(processes: Processes, spec: Spec) -> dict[str, torch.Tensor] | None:
    model = family_class(spec.family).create(spec.model, spec.data.image_shape, (), spec.seed)
    engine = make_engine(processes, spec.fit)
    engine.prepare(model.networks())
    for _ in train(model, engine, rows(), spec.fit, spec.seed):
        pass
    return engine.state()


def sharded(processes: Processes) -> Any:
    return ended(processes, small())


def test_a_scaled_down_run_with_offload_on_two_processes_is_plain_training():
    with one_thread():
        expected = ended(Processes(0, 1, torch.device("cpu")), small("fit.engine={kind: ddp}", "fit.micro_batch_size=4"))
        first = family_class("vae").create(small().model, (16, 16, 3), (), 0).networks()["autoencoder"].state_dict()
    (state, nothing) = worlds.run([worlds.Job("small", 2, sharded)], timeout_s=200.0)["small"]
    assert nothing is None
    assert state.keys() == expected.keys()
    moved = {name.removeprefix("autoencoder/param/"): value for name, value in expected.items() if "/param/" in name}
    assert sum(not torch.equal(value, first[name]) for name, value in moved.items()) > 0.9 * len(moved)
    for name, value in expected.items():
        torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_it_is_too_large_for_one_card_and_a_dry_run_says_how_large():
    spec = load_spec(CONFIG)
    line, _ = sizes(spec)  # and that the data are not here
    num_parameters = int(line.split()[1].replace(",", ""))
    assert 0.9e9 < num_parameters < 1.2e9
    plain = load_spec(CONFIG, ["fit.engine={kind: ddp}"]).fit
    # The comment's bytes of activations, in units of 1e9.
    activations = 0.31 * spec.fit.micro_batch_size
    assert num_parameters * bytes_per_parameter(plain, "autoencoder", 8) / 1e9 + activations > 86  # 80 GiB
    assert num_parameters * bytes_per_parameter(spec.fit, "autoencoder", 8) / 1e9 + activations < 80


def test_the_formula_is_that_of_whole_and_shared_parts():
    def of(engine: str, num_processes: int, *more: str) -> float:
        return bytes_per_parameter(small(f"fit.engine={engine}", "fit.ema=0", *more).fit, "autoencoder", num_processes)

    for num_processes in (1, 2, 8):
        assert of("{kind: ddp}", num_processes) == of("{kind: deepspeed, zero_stage: 0}", num_processes) == 16
        for stage in (1, 2):
            assert of(f"{{kind: deepspeed, zero_stage: {stage}}}", num_processes) == 4 + 16 / num_processes
        assert of("{kind: deepspeed, zero_stage: 3}", num_processes) == 20 / num_processes
    assert of("{kind: ddp}", 1, "fit.optimizer.kind=sgd") == 8
    assert of("{kind: ddp}", 1, "fit.ema=0.1") == 20
