"""When EM stops: a table of cases, no model needed."""

from __future__ import annotations

import pytest

from gendist.em.config import EMConfig
from gendist.em.convergence import Decision, decide, fell


def record(log_likelihood=0.0, gain=None, least_gain=0.0, seconds=1.0, repairs=(), **more):
    return {
        "log_likelihood": log_likelihood,
        "gain": gain,
        "least_gain": least_gain,
        "seconds": seconds,
        "repairs": list(repairs),
        **more,
    }


@pytest.mark.parametrize(
    ("history", "config", "expected"),
    [
        ([], {}, Decision.CONTINUE),
        ([record()], {}, Decision.CONTINUE),
        ([record(), record(gain=1.0)], {"tolerance": 1e-3}, Decision.CONTINUE),
        ([record(), record(gain=1e-4)], {"tolerance": 1e-3}, Decision.CONVERGED),
        ([record(), record(gain=-1e-4)], {"tolerance": 1e-3}, Decision.CONVERGED),
        ([record(), record(gain=-1e-4, fell=True)], {"tolerance": 1e-3}, Decision.CONTINUE),
        ([record(), record(gain=0.0)], {"tolerance": 0.0}, Decision.CONTINUE),
        ([record(), record(gain=0.0)], {"tolerance": 0.0, "max_iterations": 2}, Decision.MAX_ITERATIONS),
        ([record(), record(gain=0.0)], {"tolerance": 1e-3, "max_iterations": 2}, Decision.CONVERGED),
        ([record(seconds=5.0), record(gain=1.0, seconds=5.0)], {"time_budget_s": 10.0}, Decision.TIME_BUDGET),
        ([record(seconds=5.0), record(gain=1.0, seconds=4.0)], {"time_budget_s": 10.0}, Decision.CONTINUE),
    ],
)
def test_decision(history, config, expected):
    assert decide(history, EMConfig(**config)) is expected


@pytest.mark.parametrize(
    ("log_likelihood", "previous", "expected"),
    [
        (-1.0, None, False),
        (-1.0, record(-1.1), False),
        (-1.1, record(-1.0), True),
        (-1.0 - 1e-12, record(-1.0), False),
        (-1.1, record(-1.0, least_gain=-0.2), False),
        (-1.3, record(-1.0, least_gain=-0.2), True),
        (-1.0, record(-1.0, least_gain=0.1), True),
        (-1.1, record(-1.0, repairs=["component 3 is empty"]), False),
    ],
)
def test_a_fall_is_measured_against_what_the_step_guaranteed(log_likelihood, previous, expected):
    assert fell(log_likelihood, previous) is expected
