"""Whether to go on: a pure decision on the records of the iterations so far."""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import Enum
from typing import Any

from gendist.em.config import EMConfig

FAIR_TRIAL = 5  # iterations before a candidate may be given up
# A candidate is given up where not even so many times its extrapolated gain makes it the best: EM may rest, and climb again.
DOUBT = 200.0
# Relative, of a log-likelihood. A sum of a million log-densities in float64 is good to about 1e-13; in float32 all of them may
# be off the same way.
ROUNDING = {"float64": 1e-9, "float32": 1e-4}


class Decision(Enum):
    CONTINUE = "continue"
    COUNTED = "counted, since every latent is known,"
    CONVERGED = "converged"
    MAX_ITERATIONS = "reached max_iterations"
    TIME_BUDGET = "used up time_budget_s"
    NOT_FINITE = "lost: its log-likelihood is not finite"
    HOPELESS = "given up: far behind another restart"


def decide(history: Sequence[dict[str, Any]], config: EMConfig, best: float = -math.inf) -> Decision:
    """What to do after these iterations; `best` is the highest log-likelihood that any restart has reached by now.

    The log-likelihood of an iteration is that of the parameters it began with, as in scikit-learn, so both stop after the
    same number of iterations. An iteration that lost likelihood beyond what its M-step allows has not converged.
    """
    if not history:
        return Decision.CONTINUE
    last = history[-1]
    if last.get("final"):
        return Decision.COUNTED
    gain = last["gain"]
    if gain is not None and abs(gain) < config.tolerance and not last.get("fell"):
        return Decision.CONVERGED
    if len(history) >= config.max_iterations:
        return Decision.MAX_ITERATIONS
    if config.time_budget_s is not None and sum(record["seconds"] for record in history) >= config.time_budget_s:
        return Decision.TIME_BUDGET
    if len(history) >= FAIR_TRIAL and last["log_likelihood"] + DOUBT * gain_to_come(history) < best:
        return Decision.HOPELESS
    return Decision.CONTINUE


def gain_to_come(history: Sequence[dict[str, Any]]) -> float:
    """What the log-likelihood will gain still if its gains go on to shrink as the last two did; infinite if they do not.

    Aitken's extrapolation of EM, whose gains shrink geometrically in the end (Boehning et al. 1994, section 3).
    """
    if len(history) < 3:
        return math.inf
    before, gain = history[-2]["gain"], history[-1]["gain"]
    return gain * gain / (before - gain) if 0.0 < gain < before else math.inf


def fell(log_likelihood: float, previous: dict[str, Any] | None, precision: str = "float64") -> bool:
    """Whether the log-likelihood is below what the previous M-step guaranteed; never after a repair."""
    if previous is None or previous["repairs"] or previous["least_gain"] is None:
        return False
    guaranteed: float = previous["log_likelihood"] + previous["least_gain"]
    return log_likelihood < guaranteed - ROUNDING[precision] * (1.0 + abs(guaranteed) + abs(previous["least_gain"]))
