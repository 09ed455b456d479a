"""Likeness of samples to data against loops over all pairs, and what collapse looks like."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from gendist.evaluate import coverage
from gendist.evaluate.coverage import likeness
from gendist.evaluate.watch import MAX_ROWS, watch_samples
from gendist.protocols import Block, UserError


def normal(num_rows: int, seed: int, width: int = 3) -> torch.Tensor:
    return torch.randn(num_rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def radius(points: np.ndarray, i: int, k: int) -> float:
    others = np.delete(points, i, axis=0)
    return np.sort(np.linalg.norm(others - points[i], axis=1))[k - 1]


@pytest.mark.parametrize("k", [1, 4])
def test_likeness_is_that_of_loops_over_all_pairs(monkeypatch, k):
    monkeypatch.setattr(coverage, "ROWS_AT_ONCE", 7)
    data, samples = normal(30, 0).numpy(), 1.5 * normal(23, 1).numpy() + 0.5
    near = [[np.linalg.norm(x - y) < radius(data, i, k) for y in samples] for i, x in enumerate(data)]
    recalled = [[np.linalg.norm(x - y) < radius(samples, j, k) for j, y in enumerate(samples)] for x in data]
    found = likeness(data, samples, k)
    assert found.coverage == pytest.approx(np.mean([any(row) for row in near]))
    assert found.precision == pytest.approx(np.mean([any(column) for column in zip(*near, strict=True)]))
    assert found.density == pytest.approx(np.sum(near) / (k * len(samples)))
    assert found.recall == pytest.approx(np.mean([any(row) for row in recalled]))
    assert 0.0 < found.coverage < 1.0
    assert 0.0 < found.recall < 1.0


def test_samples_of_the_datas_own_distribution_are_like_them():
    """Naeem et al. 2020: the expected coverage is 1 - (N - 1) ... (N - k) / ((2N - 1) ... (2N - k))."""
    size, k = 800, 5
    found = likeness(normal(size, 0), normal(size, 1), k)
    expected = 1 - np.prod([(size - i) / (2 * size - i) for i in range(1, k + 1)])
    assert found.coverage == pytest.approx(expected, abs=0.03)
    assert found.density == pytest.approx(1.0, abs=0.1)


def test_samples_that_are_all_alike_cover_next_to_nothing():
    data = normal(400, 0)
    found = likeness(data, data[:1] + 1e-3 * normal(400, 1))
    assert found.coverage < 0.05
    assert found.precision == 1.0
    assert found.recall < 0.05


@pytest.mark.parametrize(
    ("data", "samples", "k", "match"),
    [
        (normal(9, 0), normal(9, 0, width=2), 3, "rows of 3 numbers, samples of 2"),
        (normal(5, 0), normal(9, 0), 5, "5 rows and 9 samples"),
        (normal(9, 0), normal(9, 0), 0, "1 or more"),
    ],
)
def test_mistakes_are_one_line(data, samples, k, match):
    with pytest.raises(UserError, match=match):
        likeness(data, samples, k)


class Rows:
    def __init__(self, x: torch.Tensor) -> None:
        self.x, self.num_rows = x, len(x)

    def take(self, indices: torch.Tensor) -> Block:
        return Block(self.x[indices], indices)


def test_a_watched_model_says_that_it_has_collapsed():
    x, seen = normal(1500, 0), []
    good = SimpleNamespace(num_features=3, sample=lambda size, seed, offset: normal(2000, 1)[offset : offset + size])
    found = watch_samples(good, Rows(x), 3, {}, lambda: seen.append(1))
    assert found == {f"samples/{name}": value for name, value in vars(likeness(x[(torch.arange(MAX_ROWS) * 3) // 2],
                                                                              normal(2000, 1)[:MAX_ROWS])).items()}  # fmt: skip
    assert seen
    collapsed = SimpleNamespace(
        num_features=3, sample=lambda size, seed, offset: torch.zeros(size, 3), advice=lambda record: [record["said"]]
    )
    found = watch_samples(collapsed, Rows(x), 3, {"said": "mine"})
    assert found["warnings"][0] == "mine"
    assert "samples/coverage" in found["warnings"][1]
    assert watch_samples(good, Rows(x[:4]), 3, {}) == {}


def test_rows_of_no_weight_are_not_looked_for_among_samples():
    x = torch.cat([normal(300, 0), normal(300, 0) + 50.0])
    weights = torch.ones(600, dtype=torch.float64)
    weights[300:] = 0.0
    good = SimpleNamespace(num_features=3, sample=lambda size, seed, offset: normal(2000, 1)[offset : offset + size])
    weighted = SimpleNamespace(num_rows=600, take=lambda indices: Block(x[indices], indices, weights[indices]))
    assert watch_samples(good, weighted, 3, {}) == watch_samples(good, Rows(x[:300]), 3, {})


def test_samples_in_the_middle_of_the_data_are_told_by_their_recall():
    blurred = SimpleNamespace(num_features=30, sample=lambda size, seed, offset: 0.05 * normal(size, offset, width=30))
    found = watch_samples(blurred, Rows(normal(500, 0, width=30)), 3, {})
    assert found["samples/coverage"] > 0.5
    assert "samples/recall 0.0%" in found["warnings"][0]
