"""The engine fits anything that keeps the protocol: here a model of one number that no family knows."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import pytest
import torch

from gendist.blocks import Leaves, LocalBlocks
from gendist.em.config import EMConfig
from gendist.em.convergence import Decision
from gendist.em.engine import expectation_maximization, mean_log_likelihood
from gendist.em.restarts import Candidate, leader
from gendist.protocols import EXACT, Block, Compute, LogLikelihood, Update, UserError


@dataclass(frozen=True)
class Counts:
    log_likelihood: float
    first: float
    total: float

    def merge(self, other: Counts) -> Counts:
        return Counts(self.log_likelihood + other.log_likelihood, self.first + other.first, self.total + other.total)


@dataclass(frozen=True)
class TwoCoins:
    """A share of the tosses come from a fair coin, the others from one that always shows heads (x = 1)."""

    share: float
    step: float = 1.0

    def e_step(self, block: Block, compute: Compute = EXACT) -> Counts:
        probability = self.log_prob_of(block).exp()
        fair = 0.5 * self.share / probability
        return Counts(float(probability.log().sum()), float(fair.sum()), float(len(fair)))

    def log_prob_of(self, block: Block, compute: Compute = EXACT) -> torch.Tensor:
        return (0.5 * self.share + (1 - self.share) * block.x[:, 0]).log()

    def log_likelihood_of(self, block: Block, compute: Compute = EXACT) -> LogLikelihood:
        return LogLikelihood(block.weighted_sum(self.log_prob_of(block)))

    def m_step(self, statistics: Counts) -> Update[TwoCoins]:
        exact = statistics.first / statistics.total
        return Update(TwoCoins(self.share + self.step * (exact - self.share), self.step))


def blocks(num_heads: int = 700, num_tails: int = 300) -> LocalBlocks:
    x = torch.cat([torch.ones(num_heads), torch.zeros(num_tails)]).double()[:, None]

    def load(bounds):
        return [Block(x=x[a:b], rows=torch.arange(a, b)) for a, b in itertools.pairwise(bounds)]

    return LocalBlocks(load, Leaves.of_shape(len(x), 1))


def run(*candidates, validation=None, data=None, **config):
    candidates = candidates or (Candidate(TwoCoins(0.1)),)
    return list(expectation_maximization(candidates, data or blocks(), 1000.0, EMConfig(**config), validation))


def trace(candidate: Candidate) -> list:
    return [{key: value for key, value in record.items() if key not in ("seconds", "restart")} for record in candidate.history]


def test_it_ends_at_the_maximum_of_the_likelihood():
    (candidate,) = run(max_iterations=500, tolerance=1e-12)[-1]
    assert candidate.decision is Decision.CONVERGED
    assert candidate.model.share == pytest.approx(0.6, abs=1e-4)  # 0.3 of the tosses are tails, half a fair coin's
    log_likelihoods = [record["log_likelihood"] for record in candidate.history]
    assert log_likelihoods == sorted(log_likelihoods)
    assert not any(record.get("fell") for record in candidate.history)


def test_it_does_exactly_as_many_iterations_as_it_may():
    iterations = run(max_iterations=7, tolerance=0.0)
    assert len(iterations) == 7
    assert iterations[-1][0].decision is Decision.MAX_ITERATIONS


STARTS = (0.1, 0.9, 0.6, 0.3)  # the third begins where the likelihood is highest, and stops at once


@pytest.mark.parametrize("shares", [STARTS[:1], STARTS])
def test_a_resumed_run_goes_on_as_if_it_had_never_stopped(shares):
    whole = run(*(Candidate(TwoCoins(share)) for share in shares), max_iterations=20, tolerance=1e-9)
    rest = run(*whole[9], max_iterations=20, tolerance=1e-9)
    assert len(rest) == 10
    for resumed, unbroken in zip(rest, whole[10:], strict=True):
        assert [candidate.model for candidate in resumed] == [candidate.model for candidate in unbroken]
        assert [trace(candidate) for candidate in resumed] == [trace(candidate) for candidate in unbroken]
    assert run(*whole[-1], max_iterations=20, tolerance=1e-9) == []


def test_each_candidate_is_what_it_is_alone_and_costs_nothing_once_it_has_stopped():
    evaluated = []

    @dataclass(frozen=True)
    class Watched(TwoCoins):
        def e_step(self, block: Block, compute: Compute = EXACT) -> Counts:
            evaluated.append(self)
            return super().e_step(block)

        def m_step(self, statistics: Counts) -> Update[Watched]:
            return Update(Watched(super().m_step(statistics).model.share))

    class Passes:
        num_passes = 0

        def map_runs(self, function, broadcast):
            self.num_passes += 1
            return blocks().map_runs(function, broadcast)

    data = Passes()
    together = run(*(Candidate(Watched(share)) for share in STARTS), data=data, max_iterations=60, tolerance=1e-9)[-1]
    assert data.num_passes == max(len(candidate.history) for candidate in together)
    num_leaves = len(evaluated) / sum(len(candidate.history) for candidate in together)
    assert num_leaves == len(list(Leaves.of_shape(1000, 1).bounds)) - 1
    for index, share in enumerate(STARTS):
        (alone,) = run(Candidate(TwoCoins(share)), max_iterations=60, tolerance=1e-9)[-1]
        length = len(together[index].history)
        assert length == len(alone.history) or together[index].decision is Decision.HOPELESS
        assert trace(together[index])[: length - 1] == trace(alone)[: length - 1]
        assert [record["restart"] for record in together[index].history] == [index] * length
        if together[index].decision is not Decision.HOPELESS:
            assert trace(together[index]) == trace(alone)
            assert together[index].model.share == alone.model.share


@dataclass(frozen=True)
class Lost(TwoCoins):
    """Its parameters make the third likelihood no number."""

    num_steps: int = 0

    def e_step(self, block: Block, compute: Compute = EXACT) -> Counts:
        counts = super().e_step(block)
        return counts if self.num_steps < 2 else replace(counts, log_likelihood=float("nan"))

    def m_step(self, statistics: Counts) -> Update[Lost]:
        return Update(Lost(super().m_step(statistics).model.share, num_steps=self.num_steps + 1))


def test_a_restart_whose_likelihood_is_not_finite_is_lost_alone():
    lost, kept = run(Candidate(Lost(0.9)), Candidate(TwoCoins(0.8)), max_iterations=5, tolerance=0.0)[-1]
    assert lost.decision is Decision.NOT_FINITE
    assert [record["log_likelihood"] is None for record in lost.history] == [False, False, True]
    (alone,) = run(Candidate(TwoCoins(0.8)), max_iterations=5, tolerance=0.0)[-1]
    assert kept.model == alone.model
    assert leader((lost, kept)) == 1


def test_where_no_restart_is_left_the_fit_is_given_up():
    with pytest.raises(UserError, match="log-likelihood is nan"):
        run(Candidate(Lost(0.9)), Candidate(Lost(0.8)), max_iterations=5, tolerance=0.0)


def test_a_step_that_loses_likelihood_is_recorded():
    (candidate,) = run(Candidate(TwoCoins(0.59, step=-30.0)), max_iterations=2, tolerance=0.0)[-1]
    assert candidate.history[-1]["fell"] is True


def test_validation_is_recorded_and_decides_nothing():
    starts = [Candidate(TwoCoins(share)) for share in STARTS]
    plain, watched = run(*starts, max_iterations=5), run(*starts, validation=blocks(30, 70), max_iterations=5)
    for one, other in zip(plain, watched, strict=True):
        assert [candidate.model for candidate in one] == [candidate.model for candidate in other]
    for share, candidate in zip(STARTS, watched[0], strict=True):
        expected = mean_log_likelihood(TwoCoins(share), blocks(30, 70))
        assert candidate.history[0]["validation_log_likelihood"] == expected
