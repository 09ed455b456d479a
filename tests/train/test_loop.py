"""The loop on one process, against the same training written out in plain PyTorch."""

from __future__ import annotations

import pytest
import torch
from toys import MODELS, plainly_trained, rows

from gendist.train.config import DeepConfig
from gendist.train.ddp_engine import DdpEngine
from gendist.train.loop import Report, train
from gendist.train.processes import Processes

ALONE = Processes(0, 1, torch.device("cpu"))
SEED = 3


def config(**changes) -> DeepConfig:
    optimizer = {"learning_rate": 0.01, **changes.pop("optimizer", {})}
    return DeepConfig.model_validate({"num_steps": 50, "global_batch_size": 12, "optimizer": optimizer, **changes})


def trained(model, config: DeepConfig, *, data=None, state=None, **options) -> tuple[list[Report], dict[str, torch.Tensor]]:
    engine = DdpEngine(ALONE, config)
    engine.prepare(model.networks(), state)
    reports = list(train(model, engine, data or rows(), config, SEED, **options))
    return reports, engine.state()


def parameters(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in state.items() if "/param/" in name}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


OPTIMIZERS = {
    "adam": {},
    "clipped": {"gradient_clipping": 0.3, "weight_decay": 0.1, "schedule": "cosine", "warmup_steps": 5},
    "sgd": {"kind": "sgd", "gradient_clipping": 1.0},
}


@pytest.mark.parametrize("micro_batch_size", [None, 4, 1])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", MODELS)
def test_it_is_plain_training_whatever_the_micro_batches(name, optimizer, micro_batch_size):
    this = config(optimizer=OPTIMIZERS[optimizer], micro_batch_size=micro_batch_size)
    _, state = trained(MODELS[name](), this)
    *_, expected = plainly_trained(name, rows(), this, SEED)
    assert parameters(state).keys() == expected.keys()
    moved = 0
    start = {f"{network}/param/{key}": value for network, module in MODELS[name]().networks().items()
             for key, value in module.named_parameters()}  # fmt: skip
    for key, value in expected.items():
        torch.testing.assert_close(state[key], value, rtol=0.0, atol=1e-6)
        moved += not torch.allclose(value, start[key], atol=1e-3)
    assert moved > len(expected) / 2


@pytest.mark.parametrize("name", MODELS)
def test_a_resumed_run_is_an_unbroken_one_to_the_byte(name):
    this = config(ema=0.1, checkpoint_every=20, optimizer={"gradient_clipping": 0.5, "schedule": "linear"})
    engine = DdpEngine(ALONE, this)
    model = MODELS[name]()
    engine.prepare(model.networks())
    for report in train(model, engine, rows(), this, SEED):
        if report.progress.step == 20:
            assert report.is_checkpoint_due
            half, progress = engine.state(), report.progress
    resumed, end = trained(MODELS[name](seed=5), this, state=half, progress=progress)
    assert resumed[-1].progress.step == 50
    assert same(end, engine.state())
