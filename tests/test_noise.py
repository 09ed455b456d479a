"""Numbers with addresses: the same wherever and however many are drawn, and distributed as they should be."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from gendist.noise import MAX_SEED, Noise, derived_seed


@pytest.mark.parametrize("kind", ["uniform", "normal"])
@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 8, 50])
def test_any_piece_equals_the_same_rows_of_the_whole(kind, width):
    draw = getattr(Noise(7, "test"), kind)
    whole = draw(0, 700, width)
    assert whole.shape == (700, width)
    rng = np.random.default_rng(width)
    for _ in range(60):
        start = int(rng.integers(0, 690))
        size = int(rng.integers(0, 700 - start + 1)) if rng.random() < 0.5 else int(rng.integers(0, 10))
        assert torch.equal(draw(start, size, width), whole[start : start + size])


def test_positions_beyond_the_first_few_billion():
    far = 10**15
    assert torch.equal(Noise(0, "a").normal(far, 10, 3)[4:], Noise(0, "a").normal(far + 4, 6, 3))


def test_seed_and_purpose_make_other_numbers():
    draws = [Noise(seed, purpose).uniform(0, 100) for seed in (0, 1, MAX_SEED) for purpose in ("a", "b")]
    for i, first in enumerate(draws):
        for second in draws[:i]:
            assert abs(float(torch.corrcoef(torch.stack([first[:, 0], second[:, 0]]))[0, 1])) < 0.4


def test_uniform_is_uniform_and_excludes_its_ends():
    values = Noise(1, "test").uniform(0, 50_000, 4).flatten()
    assert 0.0 < float(values.min()) < float(values.max()) < 1.0
    assert stats.kstest(values.numpy(), "uniform").pvalue > 1e-3


def test_normal_is_normal_and_its_columns_are_independent():
    values = Noise(1, "test").normal(0, 50_000, 5)
    assert stats.kstest(values.flatten().numpy(), "norm").pvalue > 1e-3
    assert torch.allclose(torch.cov(values.T), torch.eye(5, dtype=torch.float64), atol=0.03)


def test_rows_with_gaps_have_the_numbers_of_their_addresses():
    whole = Noise(3, "rows").uniform(0, 100)[:, 0]
    rows = torch.tensor([5, 6, 40, 99])
    assert torch.equal(Noise(3, "rows").uniform_of_rows(rows), whole[rows])
    assert len(Noise(3, "rows").uniform_of_rows(rows[:0])) == 0


@pytest.mark.parametrize("width", [1, 3, 9])
def test_rows_with_gaps_have_the_numbers_of_their_places(width):
    rows = torch.tensor([2, 3, 11, 40])
    whole = Noise(5, "test").uniform(0, 50, width)
    assert torch.equal(Noise(5, "test").uniforms_of_rows(rows, width), whole[rows])
    assert torch.equal(Noise(5, "test").uniform_of_rows(rows), Noise(5, "test").uniform(0, 50)[rows, 0])
    assert Noise(5, "test").uniforms_of_rows(rows[:0], width).shape == (0, width)


def test_derived_seeds_are_seeds_and_differ():
    seeds = {derived_seed(seed, f"restart.{index}") for seed in (0, 1, MAX_SEED) for index in range(100)}
    assert len(seeds) == 300
    assert all(0 <= seed <= MAX_SEED for seed in seeds)
