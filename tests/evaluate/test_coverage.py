"""Likeness of samples to data against loops over all pairs, and what collapse looks like."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gendist.evaluate import coverage
from gendist.evaluate.coverage import likeness
from gendist.evaluate.watch import MAX_ROWS, SAMPLES_AT_ONCE, watch_samples
from gendist.protocols import Block, SampleAddress, UserError


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
    def __init__(self, x: torch.Tensor, weights: torch.Tensor | None = None, evidence: torch.Tensor | None = None) -> None:
        self.x, self.num_rows, self.evidence = x, len(x), evidence
        self.weights = None if weights is None else weights.numpy()

    def take(self, indices: torch.Tensor) -> Block:
        weights = None if self.weights is None else torch.from_numpy(self.weights)[indices]
        return Block(self.x[indices], indices, weights, None if self.evidence is None else self.evidence[indices])


class Model:
    """`rows` is its endless sample; one with `conditions` adds 50 times the class to it."""

    def __init__(self, rows: torch.Tensor, conditions: tuple[str, ...] = (), labels: tuple[str, ...] = ()) -> None:
        self.rows, self.conditions, self.labels, self.num_features = rows, conditions, labels or conditions, rows.shape[1]
        self.asked: list[SampleAddress] = []

    def sample(self, num_samples: int, *, seed: int = 0, offset: int = 0, given: str | None = None) -> torch.Tensor:
        self.asked.append(SampleAddress(num_samples, seed, offset, given))
        shift = 50.0 * self.conditions.index(given) if self.conditions else 0.0
        return self.rows[offset : offset + num_samples] + shift


def test_a_watched_model_says_that_it_has_collapsed():
    x, seen = normal(1500, 0), []
    good = Model(normal(2000, 1))
    found = watch_samples(good, Rows(x), 3, {}, lambda: seen.append(1))
    assert found == {f"samples/{name}": value for name, value in vars(likeness(x[(torch.arange(MAX_ROWS) * 3) // 2],
                                                                              normal(2000, 1)[:MAX_ROWS])).items()}  # fmt: skip
    assert seen
    collapsed = Model(torch.zeros(2000, 3))
    collapsed.advice = lambda record: [record["said"]]
    found = watch_samples(collapsed, Rows(x), 3, {"said": "mine"})
    assert found["warnings"][0] == "mine"
    assert "samples/coverage" in found["warnings"][1]
    assert watch_samples(good, Rows(x[:4]), 3, {}) == {}


def one_hot(classes: torch.Tensor, num_classes: int) -> torch.Tensor:
    return torch.eye(num_classes, dtype=torch.float64)[classes].log()


def test_rows_of_no_weight_are_not_looked_for_among_samples():
    x = torch.cat([normal(300, 0), normal(300, 0) + 50.0])
    weights = torch.ones(600, dtype=torch.float64)
    weights[300:] = 0.0
    good = Model(normal(2000, 1))
    assert watch_samples(good, Rows(x, weights), 3, {}) == watch_samples(good, Rows(x[:300]), 3, {})
    assert watch_samples(good, Rows(x, 0.0 * weights), 3, {}) == {}


def test_rows_come_up_by_their_weights():
    """Of two clusters that weigh 9 to 1 in whatever numbers: what samples of both in these shares cover is what is expected of
    the data's own distribution, and what samples in the shares of the numbers of rows cover is less."""
    x = torch.cat([normal(1000, 0), normal(4000, 2) + 50.0])
    weights = torch.cat([torch.full((1000,), 9.0), torch.full((4000,), 0.25)]).float()
    is_first = torch.rand(2000, generator=torch.Generator().manual_seed(5)) < 0.9
    by_weight = Model(normal(2000, 1) + torch.where(is_first, 0.0, 50.0)[:, None])
    by_number = Model(normal(2000, 1) + torch.where(is_first, 50.0, 0.0)[:, None])
    good, bad = (watch_samples(model, Rows(x, weights), 3, {}) for model in (by_weight, by_number))
    assert good["samples/coverage"] == pytest.approx(1 - 0.5**5, abs=0.03)
    assert good["samples/density"] == pytest.approx(1.0, abs=0.1)
    assert bad["samples/coverage"] < 0.6
    taken = []
    rows = Rows(x, weights)
    rows.take = lambda indices: taken.append(indices) or Rows.take(rows, indices)
    watch_samples(by_weight, rows, 3, {})
    assert int((taken[0] < 1000).sum()) == 900
    assert torch.equal(taken[0], taken[0].unique())


def test_equal_weights_are_none():
    x, model = normal(1700, 0), Model(normal(2000, 1))
    plain = watch_samples(model, Rows(x), 3, {})
    for weight in (1.0, 0.1, 3.0):
        assert watch_samples(model, Rows(x, torch.full((1700,), weight)), 3, {}) == plain


def test_samples_have_the_classes_of_the_rows():
    """Naeem et al. 2020, as above: the coverage of samples that are distributed as the data are."""
    classes = torch.where(torch.arange(1500) % 10 == 0, 1 + torch.arange(1500) % 3, 0)
    x = normal(1500, 0) + 50.0 * classes[:, None]
    model = Model(normal(2000, 1), conditions=("a", "b", "c", "d"))
    found = watch_samples(model, Rows(x, evidence=one_hot(classes, 4)), 3, {})
    assert found["samples/coverage"] == pytest.approx(1 - 0.5**5, abs=0.03)
    assert found["samples/density"] == pytest.approx(1.0, abs=0.1)
    numbers = dict.fromkeys(model.conditions, 0)
    for each in model.asked:
        numbers[each.given] += each.num_samples
    taken = classes[torch.arange(MAX_ROWS) * 3 // 2]
    assert list(numbers.values()) == taken.bincount(minlength=4).tolist()
    ranges = [range(each.offset, each.offset + each.num_samples) for each in model.asked]
    assert [place for each in ranges for place in each] == list(range(MAX_ROWS))
    assert {each.seed for each in model.asked} == {3}


def test_samples_of_several_classes_are_asked_for_together_where_that_is_less_work():
    classes = torch.arange(600) % 4
    rows = Rows(normal(600, 0) + 50.0 * classes[:, None], evidence=one_hot(classes, 4))
    one_by_one, together = (Model(normal(2000, 1), conditions=("a", "b", "c", "d")) for _ in range(2))
    calls = []

    def sample_together(addresses: list[SampleAddress]) -> list[torch.Tensor]:
        calls.append(sum(each.num_samples for each in addresses))
        return [together.sample(each.num_samples, seed=each.seed, offset=each.offset, given=each.given) for each in addresses]

    together.sample_together = sample_together
    assert watch_samples(together, rows, 3, {}) == watch_samples(one_by_one, rows, 3, {})
    assert together.asked == one_by_one.asked
    assert sum(calls) == 600
    assert max(calls) <= SAMPLES_AT_ONCE


def test_a_soft_label_is_drawn_and_one_that_the_model_is_not_given_plays_no_part():
    evidence = torch.tensor([[0.7, 0.3]], dtype=torch.float64).log().expand(1000, 2)
    model = Model(normal(2000, 1), conditions=("a", "b"))
    watch_samples(model, Rows(normal(1000, 0), evidence=evidence), 3, {})
    assert sum(each.num_samples for each in model.asked if each.given == "a") == pytest.approx(700, abs=60)
    asked = list(model.asked)
    model.asked.clear()
    watch_samples(model, Rows(normal(1000, 0), evidence=evidence), 3, {})
    assert model.asked == asked
    semi_supervised = Model(normal(2000, 1), labels=("a", "b"))
    watch_samples(semi_supervised, Rows(normal(1000, 0), evidence=evidence), 3, {})
    assert {each.given for each in semi_supervised.asked} == {None}


def test_samples_in_the_middle_of_the_data_are_told_by_their_recall():
    blurred = Model(0.05 * normal(1000, 1, width=30))
    found = watch_samples(blurred, Rows(normal(500, 0, width=30)), 3, {})
    assert found["samples/coverage"] > 0.5
    (warning,) = found["warnings"]
    assert "samples/recall 0.0%" in warning
    assert "cover" not in warning


def test_samples_that_are_not_finite_are_told():
    broken = normal(2000, 1)
    broken[7, 1] = torch.nan
    broken[9] = torch.inf
    found = watch_samples(Model(broken), Rows(normal(500, 0)), 3, {})
    (warning,) = found.pop("warnings")
    assert "2 of 500 samples are not finite" in warning
    assert found == {}
