"""Several starts side by side: who leads, who goes on, and what is on record."""

from __future__ import annotations

import itertools

from gendist.em.config import EMConfig
from gendist.em.convergence import FAIR_TRIAL, Decision
from gendist.em.restarts import Candidate, all_records, latest_records, leader, restart_seed, settle


def candidate(restart: int, *log_likelihoods: float) -> Candidate:
    gains = [None, *(b - a for a, b in itertools.pairwise(log_likelihoods))]
    return Candidate(
        model=None,
        history=tuple(
            {"iteration": i, "restart": restart, "log_likelihood": value, "gain": gain, "repairs": [], "seconds": 1.0}
            for i, (value, gain) in enumerate(zip(log_likelihoods, gains, strict=False), 1)
        ),
    )


def climb(restart: int, limit: float, num_iterations: int) -> Candidate:
    return candidate(restart, *(limit - 0.5**i for i in range(num_iterations)))


def test_the_first_restart_has_the_seed_of_the_spec_and_no_two_have_the_same():
    assert restart_seed(7, 0) == 7
    assert len({restart_seed(seed, i) for seed in range(3) for i in range(10)}) == 30


def test_the_leader_is_the_first_of_the_highest():
    assert leader([candidate(0, -3.0), candidate(1, -1.0, -2.0), candidate(2, -2.0)]) == 1
    assert leader([candidate(0), candidate(1)]) == 0


def test_every_candidate_is_settled_against_the_best_and_stays_settled():
    config = EMConfig(tolerance=0.0, max_iterations=FAIR_TRIAL + 1)
    before = [climb(0, -500.0, FAIR_TRIAL), climb(1, -1.0, FAIR_TRIAL), climb(2, -2.0, FAIR_TRIAL - 1)]
    after = settle(before, config)
    assert [each.decision for each in after] == [Decision.HOPELESS, Decision.CONTINUE, Decision.CONTINUE]
    assert [each.log_likelihood for each in after] == [each.log_likelihood for each in before]
    assert after[0].history[-1]["stopped"] == Decision.HOPELESS.value
    assert "stopped" not in before[0].history[-1], "what was yielded before is not touched"
    last = settle([after[0], climb(1, -1.0, FAIR_TRIAL + 1)], config)
    assert last[0] is after[0]
    assert last[1].decision is Decision.MAX_ITERATIONS


def test_records_come_iteration_by_iteration():
    candidates = [candidate(0, -3.0, -2.0, -1.0), candidate(1, -3.0), candidate(2, -3.0, -2.0, -2.0)]
    where = [(record["iteration"], record["restart"]) for record in all_records(candidates)]
    assert where == [(1, 0), (1, 1), (1, 2), (2, 0), (2, 2), (3, 0), (3, 2)]
    assert [(record["iteration"], record["restart"]) for record in latest_records(candidates)] == where[-2:]
