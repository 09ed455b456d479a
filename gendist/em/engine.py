"""Expectation-maximization (Dempster, Laird & Rubin 1977) of any `StatisticsModel`, over blocks wherever they are."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

from gendist.blocks import Blocks, reduce_each
from gendist.em.config import EMConfig
from gendist.em.convergence import Decision, fell
from gendist.em.restarts import Candidate, settle
from gendist.one_thread import one_thread
from gendist.protocols import EXACT, Block, Compute, Statistics, StatisticsModel, Update, UserError

M = TypeVar("M", bound=StatisticsModel)

MOST_PASSES = 3  # of an iteration


def expectation_maximization(
    candidates: Sequence[Candidate[M]],
    blocks: Blocks[Block],
    total_weight: float,
    config: EMConfig,
    validation: Blocks[Block] | None = None,
    compute: Compute = EXACT,
) -> Iterator[tuple[Candidate[M], ...]]:
    """Iterate, side by side and in the same passes, until a decision to stop each; yields all after every iteration.

    candidates    where to begin, or what a run that is resumed had come to; those that have stopped stay as they are
    total_weight  of the rows, to state the log-likelihood as a mean in nats a row
    validation    rows whose log-likelihood is recorded, and which decide nothing

    A record: iteration, restart (the candidate's index), log_likelihood (the mean a row, of the parameters that the
    iteration began with), gain, least_gain (what the M-step guarantees of the next gain, None if nothing), repairs,
    validation_log_likelihood, seconds (of the iteration, of all candidates together); `fell` where the log-likelihood is
    less than was guaranteed; `final` where every row's latent was known; and `stopped`, the reason, in the last. A candidate
    whose log-likelihood is not finite is lost, and its last record has None for it; UserError where none is left.
    """
    while running := [i for i, candidate in enumerate(candidates) if candidate.decision is Decision.CONTINUE]:
        began = time.monotonic()
        models = [candidates[i].model for i in running]
        iteration = len(candidates[running[0]].history) + 1
        steps = em_steps(partial(_e_step, compute), blocks, models)
        held_out = mean_log_likelihoods(models, validation, compute) if validation is not None else ()
        seconds = time.monotonic() - began
        advanced = list(candidates)
        for place, (i, (total, update)) in enumerate(zip(running, steps, strict=True)):
            history, log_likelihood = candidates[i].history, total / total_weight
            record: dict[str, Any] = {
                "iteration": iteration,
                "restart": i,
                "log_likelihood": None,
                "gain": None,
                "seconds": seconds,
            }
            if update is None:
                record |= {"least_gain": None, "repairs": [], "stopped": Decision.NOT_FINITE.value}
                advanced[i] = replace(candidates[i], history=(*history, record))
                continue
            record |= {
                "log_likelihood": log_likelihood,
                "gain": log_likelihood - history[-1]["log_likelihood"] if history else None,
                # A prior may have come from parameters that it makes impossible, of which no step promises anything.
                "least_gain": update.least_gain / total_weight if math.isfinite(update.least_gain) else None,
                "repairs": list(update.repairs),
            }
            if update.is_final:
                record["final"] = True
            if fell(log_likelihood, history[-1] if history else None, compute.precision):
                record["fell"] = True
            if held_out:
                record["validation_log_likelihood"] = held_out[place]
            advanced[i] = replace(candidates[i], model=update.model, history=(*history, record))
        if not any(math.isfinite(candidate.log_likelihood) for candidate in advanced):
            raise not_finite(steps[0][0])
        candidates = settle(advanced, config)
        yield candidates


def not_finite(log_likelihood: float) -> UserError:
    known = ", or what is known of their latents contradicts it (as labels of states may what model.topology allows)"
    return UserError(
        f"the log-likelihood is {log_likelihood}: the rows are too far from the model for the precision"
        f"{known if log_likelihood == -math.inf else ''}; rescale the columns, take fit.precision: float64, or start from the "
        "data with fit.init"
    )


def em_steps(
    function: Callable[[M, Block], Statistics], blocks: Blocks[Block], models: Sequence[M]
) -> list[tuple[float, Update[M] | None]]:
    """The total log-likelihood under each model, and its update, from one pass of `function`, which is an E-step.

    No update where the log-likelihood is not finite.
    Another pass is made for those whose M-step asks for one.
    """
    steps = _pass(function, blocks, models)
    for _ in range(MOST_PASSES - 1):
        again = {i: update.redo for i, (_, update) in enumerate(steps) if update is not None and update.redo is not None}
        if not again:
            break
        for i, step in zip(again, _pass(function, blocks, list(again.values())), strict=True):
            steps[i] = step
    return steps


def _pass(
    function: Callable[[M, Block], Statistics], blocks: Blocks[Block], models: Sequence[M]
) -> list[tuple[float, Update[M] | None]]:
    steps: list[tuple[float, Update[M] | None]] = []
    for model, statistics in zip(models, reduce_each(function, blocks, models), strict=True):
        with one_thread():
            update = model.m_step(statistics) if math.isfinite(statistics.log_likelihood) else None
        steps.append((statistics.log_likelihood, update))
    return steps


def _e_step(compute: Compute, model: StatisticsModel, block: Block) -> Statistics:
    return model.e_step(block, compute)


@dataclass(frozen=True)
class _LogLikelihood:
    statistics: Statistics
    weight: float

    def merge(self, other: _LogLikelihood) -> _LogLikelihood:
        return _LogLikelihood(self.statistics.merge(other.statistics), self.weight + other.weight)


def mean_log_likelihoods(
    models: Sequence[StatisticsModel], blocks: Blocks[Block], compute: Compute = EXACT
) -> list[float | None]:
    """The weighted mean log-likelihood of a row under each model, in one pass.

    None where it is not finite: some row is impossible under the model.
    """
    values = reduce_each(partial(_log_likelihood, compute), blocks, models)
    means = [value.statistics.log_likelihood / value.weight for value in values]
    return [mean if math.isfinite(mean) else None for mean in means]


def mean_log_likelihood(model: StatisticsModel, blocks: Blocks[Block], compute: Compute = EXACT) -> float | None:
    """The same of one model."""
    return mean_log_likelihoods([model], blocks, compute)[0]


def _log_likelihood(compute: Compute, model: StatisticsModel, block: Block) -> _LogLikelihood:
    return _LogLikelihood(model.log_likelihood_of(block, compute), float(block.weights_or_ones().sum()))
