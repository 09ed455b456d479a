"""Every engine at every number of processes: ranks against each other, and against plain PyTorch on whole batches.

An engine joins by an entry in `ENGINES`; all cases run in one set of processes. `pytest -m exhaustive` runs those that are left
out otherwise.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import families
import pytest
import torch
import torch.distributed as dist
import toys
import worlds
from torch import Tensor
from toys import MODELS, TensorRows

from gendist.one_thread import one_thread
from gendist.train.config import DeepConfig
from gendist.train.ddp_engine import DdpEngine
from gendist.train.decisions import Progress
from gendist.train.deepspeed_engine import DeepSpeedEngine
from gendist.train.loop import train
from gendist.train.processes import Processes

CPU = torch.device("cpu")
SEED = 7
NUM_STEPS = 50
LATE = 40  # steps after which a run is left, to go on from a checkpoint
# Of global batches of 20, which three processes do not divide, for a number of accumulation steps and processes.
MICRO_BATCH_SIZES = {(1, 1): 20, (2, 1): 10, (1, 2): 10, (2, 2): 5, (1, 3): 10, (2, 3): 4}
WORLD_SIZES = (1, 2, 3)

ENGINES: dict[str, tuple[Callable[[Processes, DeepConfig], Any], dict[str, Any]]] = {
    "ddp": (DdpEngine, {"kind": "ddp"}),
    **{f"zero {stage}": (DeepSpeedEngine, {"kind": "deepspeed", "zero_stage": stage}) for stage in range(4)},
}
ADAM = {
    "learning_rate": 0.01,
    "epsilon": 1e-4,
    "gradient_clipping": 0.5,
    "schedule": "cosine",
    "warmup_steps": 4,
    "weight_decay": 0.01,
}
# Epsilons are large, since Adam divides a gradient by its own size: where there is none but for rounding, that is what it steps
# along, as far as along any other. With the Wasserstein loss, and with hinge while all are within the margin, the gradient of
# the discriminator's last bias is the share of the samples less that of the data, 1 - 1. With an epsilon of 1e-8 all else
# agrees within 2e-6 there, and that bias ends anywhere; with one that is larger than rounding, it agrees as well.
DAMPED = {**ADAM, "learning_rate": 0.03, "epsilon": 0.1}
# So it is with a classifier whose loss weighs little and is of few rows. Of residual networks that bias has more rounding.
OPTIMIZERS = dict.fromkeys(("gan, wasserstein", "gan, hinge", "vae, semi-supervised"), DAMPED)
OPTIMIZERS |= {"gan, residual": {**DAMPED, "learning_rate": 0.01}}


# The first test waits for all that the processes do; where they do all that there is, for hours.
pytestmark = pytest.mark.timeout(1200)
EXHAUSTIVE = (pytest.mark.exhaustive, pytest.mark.timeout(4 * 3600))
S_PER_JOB = 30.0


@dataclass(frozen=True)
class Case:
    """engine is a key of ENGINES, model of `toys.MODELS` or of `families.CONFIGS`."""

    engine: str
    world_size: int
    num_accumulation_steps: int
    model: str
    is_sgd: bool = False
    precision: str = "float32"

    @property
    def config(self) -> DeepConfig:
        optimizer = {"kind": "sgd", "learning_rate": 0.01} if self.is_sgd else OPTIMIZERS.get(self.model, ADAM)
        return DeepConfig.model_validate({
            "num_steps": NUM_STEPS,
            "global_batch_size": 20,
            "micro_batch_size": MICRO_BATCH_SIZES[self.num_accumulation_steps, self.world_size],
            "engine": ENGINES[self.engine][1],
            "optimizer": optimizer,
            "precision": self.precision,
            "ema": 0.1,
            "checkpoint_every": LATE,
            "eval_every": LATE,
        })  # fmt: skip


FAMILIES, TOYS = list(families.CONFIGS), list(MODELS)
ONCE = ("gan, residual", "gan, conditional", "vae, semi-supervised")
EVERYWHERE = list(itertools.product(ENGINES, WORLD_SIZES, (1, 2)))


def is_chosen(case: Case) -> bool:
    """DDP meets every family everywhere. Each stage of DeepSpeed, which is slow where each of more processes than cores has
    next to nothing to compute, meets every family on one process and on two or three, and at every number of processes and of
    accumulation steps some of them. All meet both toys, which have what the families lack: terms of different counts,
    parameters that no loss reaches, buffers that move, lazy penalties. What is another of these families with more to it meets
    DDP and the stage that shards parameters, once."""
    if case.is_sgd:
        return True
    where = (case.world_size, case.num_accumulation_steps)
    if case.model in TOYS:
        return (case.model, *where) in (("regression", 3, 2), ("adversarial", 2, 2))
    if case.model in ONCE:
        return case.engine in ("ddp", "zero 3") and where == (2, 2)
    if case.engine == "ddp":
        return True
    kind = FAMILIES.index(case.model) + list(ENGINES).index(case.engine)
    return case.num_accumulation_steps == 1 + kind // 2 % 2 and case.world_size in (1, 2 + kind % 2)


CASES = [Case(*where, model) for where in EVERYWHERE for model in (*FAMILIES, *TOYS)]
CASES += [Case("ddp", 2, 1, model, is_sgd=True) for model in TOYS] + [Case("zero 2", 2, 1, "regression", is_sgd=True)]
# A run that is left and resumed: of one network, and of two with second derivatives.
RESUMED = [case for case in CASES if case.model in ("vae", *TOYS) or (case.model, case.world_size) == ("gan, r1", 3)]
STARTED_ALONE = [Case(engine, 3, 2, "gan, r1") for engine in ENGINES]
STARTED_ALONE += [Case("ddp", 2, 2, model) for model in TOYS]


def each(cases: list[Case]) -> Any:
    """All of them by `-m exhaustive`, of which those that are chosen come without being asked for."""
    params = [pytest.param(case, marks=() if is_chosen(case) else EXHAUSTIVE, id=str(case)) for case in cases]
    return pytest.mark.parametrize("case", params)


@dataclass
class Outcome:
    """
    state, late  of the engine at the end and after LATE steps; None but on rank 0
    averaged     the parameters inside of `engine.averaged()`
    records      without what a clock measures
    """

    state: dict[str, Tensor] | None
    late: dict[str, Tensor] | None
    averaged: dict[str, Tensor]
    records: list[dict[str, Any]]


def model_of(case: Case, seed: int = 0) -> Any:
    return MODELS[case.model](seed) if case.model in MODELS else families.create(case.model, seed)


def rows_of(case: Case, num_rows: int = 50) -> TensorRows:
    return toys.rows(num_rows) if case.model in MODELS else families.rows(case.model, num_rows)


def plainly_trained(case: Case, device: torch.device = CPU) -> list[dict[str, Tensor]]:
    """The parameters after every step of plain PyTorch."""
    if case.model in MODELS:
        return list(toys.plainly_trained(case.model, toys.rows(), case.config, SEED, device))
    return list(families.plainly_trained(case.model, case.config, SEED, device))


def trained(processes: Processes, case: Case, start: tuple[Progress, dict[str, Tensor]] | None = None) -> Outcome:
    model = model_of(case, seed=0 if start is None else 1)
    engine = ENGINES[case.engine][0](processes, case.config)
    progress, state = start or (Progress(), None)
    engine.prepare(model.networks(), state)
    late, records = None, []
    for report in train(model, engine, rows_of(case), case.config, SEED, progress, validation=rows_of(case, 30)):
        if report.progress.step == LATE:
            late = engine.state()
        records.append({key: value for key, value in report.record.items() if key not in ("seconds", "samples_per_s")})
    with engine.averaged():
        averaged = {
            f"{network}/{name}": value.detach().clone()
            for network, module in model.networks().items()
            for name, value in module.named_parameters()
        }
    return Outcome(engine.state(), late, averaged, records)


def trained_and_resumed(processes: Processes, case: Case) -> tuple[Outcome, Outcome]:
    """An unbroken run, and one that goes on from its state after LATE steps, with networks that began elsewhere."""
    whole = trained(processes, case)
    box = [whole.late]
    dist.broadcast_object_list(box)
    return whole, trained(processes, case, (progress_when_left(case, whole), box[0]))


def progress_when_left(case: Case, whole: Outcome) -> Progress:
    """What the report after LATE steps said, of which the record has the value."""
    progress, objective = Progress(LATE), model_of(case).validation_objective
    if objective is None:
        return progress
    return progress.validated(next(record[f"validation/{objective}"] for record in whole.records if record["step"] == LATE))


@pytest.fixture(scope="module")
def alone() -> dict[str, tuple[Outcome, list[dict[str, Tensor]]]]:
    """Of each model: our engine on one process, and plain PyTorch."""
    this = Processes(0, 1, CPU)
    cases = [Case("ddp", 1, 1, model) for model in (*families.CONFIGS, *MODELS)]
    with one_thread():
        return {case.model: (trained(this, case), plainly_trained(case)) for case in cases}


@pytest.fixture(scope="module")
def outcomes(request, alone) -> dict[Any, list[Any]]:
    """Of each case of the tests that are to be run, the unbroken run; under (case, "resumed"), as a pair, the two; under
    (case, "started alone") what goes on from the state of one process."""
    params = [item.callspec.params for item in request.session.items if item.path == request.path]
    jobs: list[worlds.Job] = []
    for case in dict.fromkeys(param["case"] for param in params if "case" in param):
        if case in RESUMED:
            jobs.append(worlds.Job((case, "resumed"), case.world_size, trained_and_resumed, (case,)))
        else:
            jobs.append(worlds.Job(case, case.world_size, trained, (case,)))
    for case in [param["more"] for param in params if "more" in param]:
        start = progress_when_left(case, alone[case.model][0]), alone[case.model][0].late
        jobs.append(worlds.Job((case, "started alone"), case.world_size, trained, (case, start)))
    results = worlds.run(jobs, timeout_s=max(1100.0, S_PER_JOB * len(jobs)))
    return results | {
        key[0]: [whole for whole, _ in pairs]
        for key, pairs in results.items()
        if isinstance(key, tuple) and key[1] == "resumed"
    }


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def assert_close(state: dict[str, Tensor], parameters: dict[str, Tensor], tolerance: float) -> None:
    for name, value in parameters.items():
        torch.testing.assert_close(state[name], value, rtol=0.0, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")


@each(CASES)
def test_it_is_plain_training_on_whole_batches(case, outcomes, alone):
    whole, expected = outcomes[case][0], plainly_trained(case) if case.is_sgd else alone[case.model][1]
    assert_close(whole.late, expected[LATE - 1], 1e-6)
    assert_close(whole.state, expected[-1], 1e-6)


@each(CASES)
def test_all_processes_end_with_the_same_bytes(case, outcomes):
    first, *others = outcomes[case]
    assert first.averaged
    for other in others:
        assert_same(first.averaged, other.averaged)
        assert first.records == other.records
        assert other.state is None


@each(RESUMED)
def test_a_resumed_run_is_an_unbroken_one_to_the_byte(case, outcomes):
    whole, resumed = outcomes[case, "resumed"][0]
    assert_same(resumed.state, whole.state)
    assert_same(resumed.averaged, whole.averaged)
    assert resumed.records == [record for record in whole.records if record["step"] > LATE]


@each([case for case in CASES if not case.is_sgd])
def test_the_records_are_those_of_one_process(case, outcomes, alone):
    for record, expected in zip(outcomes[case][0].records, alone[case.model][0].records, strict=True):
        assert record.keys() == expected.keys()
        numbers = {key: value for key, value in expected.items() if isinstance(value, float)}
        assert {key: record[key] for key in numbers} == pytest.approx(numbers, abs=1e-4)


@each([case for case in CASES if case.model == "vae"])
def test_what_is_watched_is_weighed_as_the_loss_is(case, outcomes):
    """With the plain ELBO the loss is the negative ELBO."""
    for record in outcomes[case][0].records:
        assert record["autoencoder/negative_elbo"] == pytest.approx(record["autoencoder/loss"], rel=1e-5)


@pytest.mark.parametrize("more", STARTED_ALONE, ids=str)
def test_more_processes_go_on_from_the_checkpoint_of_one(more, outcomes, alone):
    assert_close(outcomes[more, "started alone"][0].state, alone[more.model][1][-1], 1e-5)


@each([case for case in RESUMED if not case.is_sgd])
def test_one_process_goes_on_from_the_checkpoint_of_more(case, outcomes, alone):
    whole, one = outcomes[case][0], Case("ddp", 1, 1, case.model)
    with one_thread():
        end = trained(Processes(0, 1, CPU), one, (progress_when_left(case, whole), whole.late))
    assert_close(end.state, alone[case.model][1][-1], 1e-5)
