"""Several starts of one fit, side by side: what each has come to, which one leads, and which go on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from gendist.em.config import EMConfig
from gendist.em.convergence import Decision, decide
from gendist.noise import derived_seed
from gendist.protocols import StatisticsModel

M = TypeVar("M", bound=StatisticsModel)


@dataclass(frozen=True)
class Candidate(Generic[M]):
    """One start and what has come of it.

    model             after the last iteration
    history           the records of its iterations; the last one says why it `stopped`, where it did
    repairs_of_start  what had to be repaired where it began
    """

    model: M
    history: tuple[dict[str, Any], ...] = ()
    repairs_of_start: tuple[str, ...] = ()

    @property
    def decision(self) -> Decision:
        return Decision(self.history[-1].get("stopped", Decision.CONTINUE)) if self.history else Decision.CONTINUE

    @property
    def log_likelihood(self) -> float:
        """Of the parameters that its last iteration began with, the mean a row; -inf before the first, and once it is lost."""
        value = self.history[-1]["log_likelihood"] if self.history else None
        return -math.inf if value is None else value


def restart_seed(seed: int, restart: int) -> int:
    """The seed of the restart with this index. The first has the spec's own, so that it is what a single start would be."""
    return seed if restart == 0 else derived_seed(seed, f"restart.{restart}")


def leader(candidates: Sequence[Candidate[Any]]) -> int:
    """The index of the candidate with the highest log-likelihood; the first of equals."""
    return max(range(len(candidates)), key=lambda i: candidates[i].log_likelihood)


def settle(candidates: Sequence[Candidate[M]], config: EMConfig) -> tuple[Candidate[M], ...]:
    """The candidates after an iteration, with the reason why it stops in the last record of each that does."""
    best = max(candidate.log_likelihood for candidate in candidates)
    return tuple(
        replace(candidate, history=_with_reason(candidate.history, decide(candidate.history, config, best)))
        if candidate.decision is Decision.CONTINUE
        else candidate
        for candidate in candidates
    )


def _with_reason(history: tuple[dict[str, Any], ...], decision: Decision) -> tuple[dict[str, Any], ...]:
    return history if decision is Decision.CONTINUE else (*history[:-1], {**history[-1], "stopped": decision.value})


def latest_records(candidates: Sequence[Candidate[Any]]) -> list[dict[str, Any]]:
    """Those of the newest iteration, one a candidate that took part in it."""
    newest = max(len(candidate.history) for candidate in candidates)
    return [candidate.history[-1] for candidate in candidates if len(candidate.history) == newest]


def all_records(candidates: Sequence[Candidate[Any]]) -> list[dict[str, Any]]:
    """Iteration by iteration, as they came."""
    records = (record for candidate in candidates for record in candidate.history)
    return sorted(records, key=lambda record: record["iteration"])
