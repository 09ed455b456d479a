"""The engine fits anything that keeps the protocol: here a model of one number that no family knows."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch

from gendist.blocks import Leaves, LocalBlocks
from gendist.em.config import EMConfig
from gendist.em.convergence import Decision
from gendist.em.engine import expectation_maximization, mean_log_likelihood
from gendist.protocols import EXACT, Block, Compute, Update


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
        heads = block.x[:, 0]
        fair = torch.full_like(heads, 0.5 * self.share)
        probability = fair + (1 - self.share) * heads
        return Counts(float(probability.log().sum()), float((fair / probability).sum()), float(len(heads)))

    def log_likelihood(self, block: Block, compute: Compute = EXACT) -> float:
        return self.e_step(block).log_likelihood

    def m_step(self, statistics: Counts) -> Update[TwoCoins]:
        exact = statistics.first / statistics.total
        return Update(TwoCoins(self.share + self.step * (exact - self.share), self.step))


def blocks(num_heads: int = 700, num_tails: int = 300) -> LocalBlocks:
    x = torch.cat([torch.ones(num_heads), torch.zeros(num_tails)]).double()[:, None]

    def load(bounds):
        return [Block(x=x[a:b], rows=torch.arange(a, b)) for a, b in itertools.pairwise(bounds)]

    return LocalBlocks(load, Leaves.of_shape(len(x), 1))


def run(model=TwoCoins(0.1), validation=None, history=(), **config):
    return list(expectation_maximization(model, blocks(), 1000.0, EMConfig(**config), validation, history))


def test_it_ends_at_the_maximum_of_the_likelihood():
    iterations = run(max_iterations=500, tolerance=1e-12)
    assert iterations[-1].decision is Decision.CONVERGED
    assert iterations[-1].model.share == pytest.approx(0.6, abs=1e-4)  # 0.3 of the tosses are tails, half a fair coin's
    trace = [record["log_likelihood"] for record in iterations[-1].history]
    assert trace == sorted(trace)
    assert not any(record.get("fell") for record in iterations[-1].history)


def test_it_does_exactly_as_many_iterations_as_it_may():
    assert len(run(max_iterations=7, tolerance=0.0)) == 7


def test_a_resumed_run_goes_on_as_if_it_had_never_stopped():
    whole = run(max_iterations=20, tolerance=0.0)
    half = whole[9]
    rest = run(half.model, history=half.history, max_iterations=20, tolerance=0.0)
    assert rest[-1].model == whole[-1].model
    assert [iteration.model for iteration in rest] == [iteration.model for iteration in whole[10:]]
    assert run(whole[-1].model, history=whole[-1].history, max_iterations=20, tolerance=0.0) == []


def test_a_step_that_loses_likelihood_is_recorded():
    iterations = run(TwoCoins(0.59, step=-30.0), max_iterations=2, tolerance=0.0)
    assert iterations[-1].history[-1]["fell"] is True


def test_validation_is_recorded_and_decides_nothing():
    plain, watched = run(max_iterations=5), run(validation=blocks(30, 70), max_iterations=5)
    assert [iteration.model for iteration in plain] == [iteration.model for iteration in watched]
    first = watched[0].history[0]
    assert first["validation_log_likelihood"] == mean_log_likelihood(TwoCoins(0.1), blocks(30, 70))
