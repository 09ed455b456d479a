"""Training of any `DeepModel` by gradient: batches -> phases -> counts -> losses -> engine -> records.

The loop knows no family, no disk and nobody who started it. Every process runs it, and all see the same reports.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gendist.protocols import DeepModel, Phase, UserError
from gendist.train import optimizers, restrictions
from gendist.train.batches import Division, MicroBatch, MicroBatches, Rows, for_device
from gendist.train.config import DeepConfig
from gendist.train.decisions import MAX_SKIPPED_IN_A_ROW, Asked, Decision, Progress, decide, gives_up, is_due
from gendist.train.engine import Engine
from gendist.train.global_draws import GlobalDraws
from gendist.train.networks import explained
from gendist.train.order import Order
from gendist.train.records import Sums, Window
from gendist.train.schedule import learning_rate
from gendist.train.validation import validate

START = Progress()


class NotFinite(UserError):
    """A loss or a gradient is NaN or infinite in the step with index `step`; nothing of that phase was applied."""

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


@dataclass(frozen=True)
class Report:
    """What is yielded after a step at which something is due, with the same values on every process.

    record             of the steps since the last report; see `train`. Empty where there were none
    progress           from which to go on
    decision           whether training goes on
    is_checkpoint_due  the caller is to keep `engine.state()`, which every process must ask for, and the progress
    is_best            there was a validation, and none was better
    """

    record: dict[str, Any]
    progress: Progress
    decision: Decision
    is_checkpoint_due: bool
    is_best: bool


def train(
    model: DeepModel,
    engine: Engine,
    rows: Rows,
    config: DeepConfig,
    seed: int,
    progress: Progress = START,
    validation: Rows | None = None,
    asked: Callable[[], Asked] = lambda: Asked.NOTHING,
) -> Generator[Report, None, None]:
    """Train the networks that `engine.prepare` was given, from `progress` on, until a decision to stop.

    asked  called once for each step, while the one before is made; where one process, and no more, is asked to stop, all end
           with a report to go on from. What is stopped between two records has one record more than an unbroken run; nothing
           else is changed

    A record: step (how many are done); PHASE/TERM and PHASE/WATCHED, means over samples by weight, and PHASE/loss, what is
    minimised; PHASE/gradient_norm before clipping; PHASE/learning_rate of the last step; validation/NAME, means over held-out
    rows; skipped, a list of {step (its index), phase} of which nothing was applied; seconds and samples_per_s of these steps;
    `stopped`, the reason, in the last one. A mean that is not finite is None.

    UserError before the first step where the model cannot be trained exactly this way; NotFinite where `on_nan` is stop.
    """
    division = Division(config.global_batch_size, engine.world_size, config.micro_batch_size)
    for network in model.networks().values():
        network.train()
    restrictions.check(model, progress.step, config, division, rows.num_rows)
    labelled = None if config.labelled_batch_size is None else rows.labelled()
    order = Order(rows.num_rows, seed, config.global_batch_size, config.labelled_batch_size, labelled)
    global_draws = GlobalDraws(seed, engine.device)
    window, num_skipped = Window(), Counter[str]()
    micro_batches = MicroBatches(model, rows, order, division, engine.rank, seed)
    with for_device(micro_batches, engine.device) as batches_at:
        upcoming = _begun(model, engine, progress.step, batches_at, asked()) if progress.step < config.num_steps else None
        while upcoming and decide(progress, config) is Decision.CONTINUE:
            step, this = progress.step, upcoming
            upcoming = _begun(model, engine, step + 1, batches_at, asked()) if step + 1 < config.num_steps else None
            counts, total_weight, request = this.totals()
            if request >= Asked.TO_STOP_NOW or (request and not window.num_steps):
                if upcoming:
                    upcoming.totals()
                yield Report(window.record(step, engine) if window.num_steps else {}, progress, Decision.CONTINUE, True, False)
                return
            batches = [batch.on_device() for batch in this.batches]
            for phase in this.phases:
                sums = Sums(counts[phase], total_weight)
                engine.begin_phase(phase.network)
                for number, batch in enumerate(batches, 1):
                    engine.begin_micro_batch(phase.network, is_last=number == len(batches))
                    if batch.block.num_rows == 0:
                        continue
                    with global_draws.addressed(phase, batch.start), explained(config):
                        with engine.precision():
                            loss = model.loss(phase, batch.block, batch.noise[phase], step)
                        engine.backward(phase.network, sums.add(loss))
                rate = learning_rate(optimizers.config_of(config, phase.network), step, config.num_steps)
                norm = engine.step(phase.network, rate)
                if math.isfinite(norm):
                    num_skipped[phase.name] = 0
                    window.add_phase(phase, sums, norm, rate)
                else:
                    num_skipped[phase.name] += 1
                    not_finite = sums.not_finite(engine)
                    if gives_up(config, bool(not_finite), num_skipped[phase.name]):
                        raise NotFinite(_explanation(step, phase, not_finite, norm, config), step)
                    window.skip_phase(step, phase)
            del batches, this  # those of the next steps are there already
            window.add_step(config.global_batch_size)
            progress = progress.advanced()
            is_checkpoint_due, is_evaluation_due, is_record_due = (
                is_due(progress.step, every, config)
                for every in (config.checkpoint_every, config.eval_every, config.record_every)
            )
            if is_checkpoint_due or is_evaluation_due or is_record_due:
                record = window.record(progress.step, engine)
                if is_evaluation_due and validation is not None:
                    values = validate(model, engine, validation, config, seed)
                    record |= {f"validation/{name}": value for name, value in values.items()}
                    if model.validation_objective is not None:
                        progress = progress.validated(values[model.validation_objective])
                decision, is_best = decide(progress, config), progress.best_step == progress.step
                if decision is not Decision.CONTINUE:
                    record["stopped"] = decision.value
                is_checkpoint_due |= is_best or decision is not Decision.CONTINUE
                yield Report(record, progress, decision, is_checkpoint_due, is_best)
                window = Window()
        if upcoming:
            upcoming.totals()  # so that no process ends while another one listens to it


@dataclass(frozen=True)
class _Step:
    """A step to come, of which processes tell each other what they have of it while they are at work on the one before.

    names  of each count that is summed, the phase and the term
    sums   the counts, the weight of the rows and what is asked, once they have come
    """

    phases: Sequence[Phase]
    batches: Sequence[MicroBatch]
    names: Sequence[tuple[Phase, str]]
    sums: Callable[[], Tensor]

    def totals(self) -> tuple[dict[Phase, dict[str, float]], float, float]:
        """Of each term of each phase, over how many samples of the global batch it is a sum; the weight of that batch; and what
        is asked of any process."""
        *totals, weight, request = self.sums().tolist()
        counts: dict[Phase, dict[str, float]] = {phase: {} for phase in self.phases}
        for (phase, name), total in zip(self.names, totals, strict=True):
            counts[phase][name] = total
        return counts, weight, request


def _begun(
    model: DeepModel, engine: Engine, step: int, batches_at: Callable[[int], Sequence[MicroBatch]], asked: Asked
) -> _Step:
    phases, batches = model.phases(step), batches_at(step)
    mine = {phase: Counter[str]() for phase in phases}
    for phase, counts in mine.items():
        for batch in batches:
            counts.update(model.counts(phase, batch.block))
    names = [(phase, name) for phase, counts in mine.items() for name in counts]
    weight = sum(float(batch.block.weights_or_ones().sum()) for batch in batches)
    values = [*(mine[phase][name] for phase, name in names), weight, float(asked)]
    return _Step(phases, batches, names, engine.begin_sum(torch.tensor(values, dtype=torch.float64)))


def _explanation(step: int, phase: Phase, not_finite: Mapping[str, float], norm: float, config: DeepConfig) -> str:
    what = ", ".join(f"{phase.name}/{name} is {value}" for name, value in not_finite.items())
    advice = (
        "lower the learning rate, clip the gradient (fit.optimizer.gradient_clipping), scale columns that are large "
        "(data.transforms), or set fit.on_nan: skip_batch"
    )
    if config.on_nan == "skip_batch":
        advice = f"{MAX_SKIPPED_IN_A_ROW} batches in a row were skipped: lower the learning rate, or look at the data"
    return f"at the step with index {step}: {what or f'the gradient of {phase.name} has the norm {norm}'}; {advice}"
