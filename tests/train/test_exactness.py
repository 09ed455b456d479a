"""Every engine at every number of processes: ranks against each other, and against plain PyTorch on whole batches.

An engine joins by an entry in `ENGINES`; all cases run in one set of processes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
import worlds
from torch import Tensor
from toys import MODELS, plainly_trained, rows

from gendist.one_thread import one_thread
from gendist.train.config import DeepConfig
from gendist.train.ddp_engine import DdpEngine
from gendist.train.decisions import Progress
from gendist.train.deepspeed_engine import DeepSpeedEngine
from gendist.train.loop import train
from gendist.train.processes import Processes

SEED = 7
NUM_STEPS = 50
HALF = 20  # steps after which one run goes on from a checkpoint
# Of global batches of 20, which three processes do not divide, for a number of accumulation steps and processes.
MICRO_BATCH_SIZES = {(1, 1): 20, (2, 1): 10, (1, 2): 10, (2, 2): 5, (1, 3): 10, (2, 3): 4}
WORLD_SIZES = (1, 2, 3)

ENGINES: dict[str, tuple[Callable[[Processes, DeepConfig], Any], dict[str, Any]]] = {
    "ddp": (DdpEngine, {"kind": "ddp"}),
    **{f"zero {stage}": (DeepSpeedEngine, {"kind": "deepspeed", "zero_stage": stage}) for stage in range(4)},
}
OPTIMIZERS = {
    "adam": {"gradient_clipping": 0.5, "schedule": "cosine", "warmup_steps": 4, "weight_decay": 0.01},
    "sgd": {"kind": "sgd"},
}


@dataclass(frozen=True)
class Case:
    """engine and optimizer are keys of ENGINES and OPTIMIZERS."""

    engine: str
    world_size: int
    num_accumulation_steps: int
    model: str
    optimizer: str = "adam"

    @property
    def config(self) -> DeepConfig:
        return DeepConfig.model_validate({
            "num_steps": NUM_STEPS,
            "global_batch_size": 20,
            "micro_batch_size": MICRO_BATCH_SIZES[self.num_accumulation_steps, self.world_size],
            "engine": ENGINES[self.engine][1],
            "optimizer": {"learning_rate": 0.01, **OPTIMIZERS[self.optimizer]},
            "ema": 0.1,
            "checkpoint_every": HALF,
            "eval_every": HALF,
        })  # fmt: skip


CASES = [
    Case(engine, world_size, num_accumulation_steps, model)
    for engine in ENGINES
    for world_size in WORLD_SIZES
    for num_accumulation_steps in (1, 2)
    for model in MODELS
    # What DeepSpeed does is slow where more processes than cores have little to compute: the more telling cases.
    if engine == "ddp" or (model == "adversarial") == (world_size + num_accumulation_steps != 3)
]
CASES += [Case("ddp", 2, 1, model, "sgd") for model in MODELS] + [Case("zero 2", 2, 1, "regression", "sgd")]
STARTED_ALONE = [Case(engine, world_size, 2, "regression") for engine in ENGINES for world_size in WORLD_SIZES[1:]]
STARTED_ALONE += [Case("ddp", world_size, 2, "adversarial") for world_size in WORLD_SIZES[1:]]


@dataclass
class Outcome:
    """
    state, half  of the engine at the end and after HALF steps; None but on rank 0
    averaged     the parameters inside of `engine.averaged()`
    records      without what a clock measures
    """

    state: dict[str, Tensor] | None
    half: dict[str, Tensor] | None
    averaged: dict[str, Tensor]
    records: list[dict[str, Any]]


def trained(processes: Processes, case: Case, start: tuple[Progress, dict[str, Tensor]] | None = None) -> Outcome:
    model = MODELS[case.model](seed=0 if start is None else 1)
    engine = ENGINES[case.engine][0](processes, case.config)
    progress, state = start or (Progress(), None)
    engine.prepare(model.networks(), state)
    half, records = None, []
    for report in train(model, engine, rows(), case.config, SEED, progress, validation=rows(30)):
        if report.progress.step == HALF:
            half = engine.state()
        records.append({key: value for key, value in report.record.items() if key not in ("seconds", "samples_per_s")})
    with engine.averaged():
        averaged = {
            f"{network}/{name}": value.detach().clone()
            for network, module in model.networks().items()
            for name, value in module.named_parameters()
        }
    return Outcome(engine.state(), half, averaged, records)


def trained_and_resumed(processes: Processes, case: Case) -> tuple[Outcome, Outcome]:
    """An unbroken run, and one that goes on from its state after HALF steps, with networks that began elsewhere."""
    whole = trained(processes, case)
    box = [whole.half]
    dist.broadcast_object_list(box)
    return whole, trained(processes, case, (progress_at_half(whole), box[0]))


def progress_at_half(whole: Outcome) -> Progress:
    """What the report after HALF steps said, of which the record has the value."""
    value = next(record for record in whole.records if record["step"] == HALF).get("validation/squared_error")
    progress = Progress(HALF)
    return progress if value is None else progress.validated(value)


@pytest.fixture(scope="module")
def alone() -> dict[str, tuple[Outcome, list[dict[str, Tensor]]]]:
    """Of each model: our engine on one process, and the parameters after every step of plain PyTorch."""
    this = Processes(0, 1, torch.device("cpu"))
    cases = [Case("ddp", 1, 1, model) for model in MODELS]
    with one_thread():
        return {
            case.model: (trained(this, case), list(plainly_trained(case.model, rows(), case.config, SEED))) for case in cases
        }


@pytest.fixture(scope="module")
def outcomes(alone) -> dict[Any, list[Any]]:
    jobs = [worlds.Job(case, case.world_size, trained_and_resumed, (case,)) for case in CASES]
    for case in STARTED_ALONE:
        start = progress_at_half(alone[case.model][0]), alone[case.model][0].half
        jobs.append(worlds.Job((case, "started alone"), case.world_size, trained, (case, start)))
    return worlds.run(jobs, timeout_s=240.0)


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def assert_close(state: dict[str, Tensor], parameters: dict[str, Tensor], tolerance: float) -> None:
    for name, value in parameters.items():
        torch.testing.assert_close(state[name], value, rtol=0.0, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_is_plain_training_on_whole_batches(case, outcomes, alone):
    (whole, _), *_ = outcomes[case]
    expected = (
        alone[case.model][1] if case.optimizer == "adam" else list(plainly_trained(case.model, rows(), case.config, SEED))
    )
    assert_close(whole.half, expected[HALF - 1], 1e-6)
    assert_close(whole.state, expected[-1], 1e-6)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_all_processes_end_with_the_same_bytes(case, outcomes):
    first, *others = [whole for whole, _ in outcomes[case]]
    assert first.averaged
    for other in others:
        assert_same(first.averaged, other.averaged)
        assert first.records == other.records
        assert other.state is None


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_resumed_run_is_an_unbroken_one_to_the_byte(case, outcomes):
    whole, resumed = outcomes[case][0]
    assert_same(resumed.state, whole.state)
    assert_same(resumed.averaged, whole.averaged)
    assert resumed.records == [record for record in whole.records if record["step"] > HALF]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_records_are_those_of_one_process(case, outcomes, alone):
    (whole, _), *_ = outcomes[case]
    if case.optimizer != "adam":
        return
    for record, expected in zip(whole.records, alone[case.model][0].records, strict=True):
        assert record.keys() == expected.keys()
        numbers = {key: value for key, value in expected.items() if isinstance(value, float)}
        assert {key: record[key] for key in numbers} == pytest.approx(numbers, abs=1e-4)


@pytest.mark.parametrize("case", STARTED_ALONE, ids=str)
def test_more_processes_go_on_from_the_checkpoint_of_one(case, outcomes, alone):
    assert_close(outcomes[case, "started alone"][0].state, alone[case.model][1][-1], 1e-5)


@pytest.mark.parametrize("case", [case for case in CASES if case.optimizer == "adam"], ids=str)
def test_one_process_goes_on_from_the_checkpoint_of_more(case, outcomes, alone):
    whole, _ = outcomes[case][0]
    one = Case("ddp", 1, 1, case.model)
    with one_thread():
        end = trained(Processes(0, 1, torch.device("cpu")), one, (progress_at_half(whole), whole.half))
    assert_close(end.state, alone[case.model][1][-1], 1e-5)
