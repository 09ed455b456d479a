"""When EM stops: a table of cases, no model needed."""

from __future__ import annotations

import pytest

from gendist.em.config import EMConfig
from gendist.em.convergence import DOUBT, FAIR_TRIAL, Decision, decide, fell, gain_to_come


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


def climb(limit: float, rate: float, num_iterations: int, size: float = 1.0) -> list:
    """The records of a log-likelihood that approaches its limit geometrically."""
    values = [limit - size * rate**i for i in range(num_iterations)]
    return [record(value, gain=None if i == 0 else value - values[i - 1]) for i, value in enumerate(values)]


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9, 0.99])
def test_the_gain_to_come_of_a_geometric_climb_is_known(rate):
    history = climb(-2.0, rate, 6)
    assert history[-1]["log_likelihood"] + gain_to_come(history) == pytest.approx(-2.0)


@pytest.mark.parametrize("gains", [[], [1.0], [1.0, 1.0], [1.0, 2.0], [1.0, -0.1], [-1.0, -0.5], [0.0, 0.0]])
def test_without_gains_that_shrink_anything_may_come(gains):
    assert gain_to_come([record(), *(record(gain=gain) for gain in gains)]) == float("inf")


def test_a_restart_is_given_up_when_it_is_behind_beyond_doubt_and_not_before():
    config = EMConfig(tolerance=0.0)
    history = climb(-2.0, 0.5, FAIR_TRIAL)
    now, hope = history[-1]["log_likelihood"], DOUBT * gain_to_come(history)
    assert decide(history, config, now + hope + 1e-9) is Decision.HOPELESS
    assert decide(history, config, now + hope - 1e-9) is Decision.CONTINUE
    assert decide(history, config, now) is Decision.CONTINUE, "the leader itself"
    assert decide(history[:-1], config, 100.0) is Decision.CONTINUE, "too early to tell"
    assert decide([*history[:-1], record(now, gain=5.0)], config, 100.0) is Decision.CONTINUE, "it gains more and more"
    assert decide(history, EMConfig(tolerance=0.5), now + hope + 1e-9) is Decision.CONVERGED
