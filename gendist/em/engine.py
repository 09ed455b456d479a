"""Expectation-maximization (Dempster, Laird & Rubin 1977) of any `StatisticsModel`, over blocks wherever they are."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

from gendist.blocks import Blocks, reduce
from gendist.em.config import EMConfig
from gendist.em.convergence import Decision, decide, fell
from gendist.one_thread import one_thread
from gendist.protocols import EXACT, Block, Compute, StatisticsModel, Update, UserError

M = TypeVar("M", bound=StatisticsModel)


@dataclass(frozen=True)
class Iteration(Generic[M]):
    """What an iteration leaves: the model after it, the records of all iterations so far, and whether to go on."""

    model: M
    history: tuple[dict[str, Any], ...]
    decision: Decision


def expectation_maximization(
    model: M,
    blocks: Blocks[Block],
    total_weight: float,
    config: EMConfig,
    validation: Blocks[Block] | None = None,
    history: Sequence[dict[str, Any]] = (),
    compute: Compute = EXACT,
) -> Iterator[Iteration[M]]:
    """Iterate from `model` until a decision to stop.

    total_weight  of the rows, to state the log-likelihood as a mean in nats a row
    validation    rows whose log-likelihood is recorded, and which decide nothing
    history       the records of the iterations before, of a run that is resumed; nothing is done where they decide to stop

    A record: iteration, log_likelihood (the mean a row, of the parameters that the iteration began with), gain,
    least_gain (what the M-step guarantees of the next gain), validation_log_likelihood, repairs, seconds; and `fell`
    where the log-likelihood is less than was guaranteed.
    """
    records = list(history)
    decision = decide(records, config)
    while decision is Decision.CONTINUE:
        began = time.monotonic()
        previous = records[-1] if records else None
        statistics, update = em_step(partial(_e_step, compute), blocks, model)
        log_likelihood = statistics.log_likelihood / total_weight
        if not math.isfinite(log_likelihood):
            raise UserError(
                f"the log-likelihood is {log_likelihood} in iteration {len(records) + 1}: the rows are too far from the model "
                "for float64; rescale the columns, or start from the data with fit.init"
            )
        record: dict[str, Any] = {
            "iteration": len(records) + 1,
            "log_likelihood": log_likelihood,
            "gain": log_likelihood - previous["log_likelihood"] if previous else None,
            "least_gain": update.least_gain / total_weight,
            "repairs": list(update.repairs),
        }
        if fell(log_likelihood, previous, compute.precision):
            record["fell"] = True
        if validation is not None:
            record["validation_log_likelihood"] = mean_log_likelihood(model, validation, compute)
        record["seconds"] = time.monotonic() - began
        records.append(record)
        model = update.model
        decision = decide(records, config)
        yield Iteration(model, tuple(records), decision)


def em_step(function: Callable[[M, Block], Any], blocks: Blocks[Block], model: M) -> tuple[Any, Update[M]]:
    """One pass and what follows from its statistics; a second pass where the first had too few digits for the outcome."""
    statistics = reduce(function, blocks, model)
    with one_thread():
        update: Update[M] = model.m_step(statistics)
    if update.redo is None:
        return statistics, update
    statistics = reduce(function, blocks, update.redo)
    with one_thread():
        return statistics, update.redo.m_step(statistics)


def _e_step(compute: Compute, model: StatisticsModel, block: Block) -> Any:
    return model.e_step(block, compute)


@dataclass(frozen=True)
class _LogLikelihood:
    total: float
    weight: float

    def merge(self, other: _LogLikelihood) -> _LogLikelihood:
        return _LogLikelihood(self.total + other.total, self.weight + other.weight)


def mean_log_likelihood(model: StatisticsModel, blocks: Blocks[Block], compute: Compute = EXACT) -> float | None:
    """The weighted mean log-likelihood of a row; None where it is not finite: some row is impossible under the model."""
    value = reduce(partial(_log_likelihood, compute), blocks, model)
    return value.total / value.weight if math.isfinite(value.total) else None


def _log_likelihood(compute: Compute, model: StatisticsModel, block: Block) -> _LogLikelihood:
    return _LogLikelihood(model.log_likelihood(block, compute), float(block.weights_or_ones().sum()))
