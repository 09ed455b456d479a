"""Schedules, averages, scales and decisions: pure functions of few numbers."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from gendist.train import ema
from gendist.train.config import DeepConfig, OptimizerConfig
from gendist.train.decisions import MAX_SKIPPED_IN_A_ROW, Decision, Progress, decide, gives_up, is_due, kept
from gendist.train.loss_scale import GROWTH_INTERVAL, LossScale
from gendist.train.schedule import learning_rate


def rates(num_steps: int, **config) -> list[float]:
    return [learning_rate(OptimizerConfig(learning_rate=2.0, **config), step, num_steps) for step in range(num_steps)]


def test_a_constant_rate_and_its_warm_up():
    assert rates(4) == [2.0] * 4
    assert rates(6, warmup_steps=4) == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_rate_falls_from_the_whole_to_nothing(schedule):
    found = rates(1000, schedule=schedule, warmup_steps=100)
    assert found[99] == found[100] == 2.0
    assert all(a > b for a, b in itertools.pairwise(found[100:]))
    assert found[550] == pytest.approx(1.0)  # half of the way, half of the rate
    assert 0.0 < found[-1] < 0.003


def test_the_cosine_is_one():
    found = rates(8, schedule="cosine")
    assert found == pytest.approx([1.0 + math.cos(math.pi * step / 8) for step in range(8)])


def test_the_linear_schedule_is_torchs():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=2.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1e-30, total_iters=10)
    expected = []
    for _ in range(10):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates(10, schedule="linear") == pytest.approx(expected)


@pytest.mark.parametrize("width", [0.01, 0.05, 0.1, 0.2, 0.28])
def test_the_profile_of_an_average_has_its_width(width):
    """The weights of a long average are what the recursion gives, and their spread is the width asked for."""
    num_steps, gamma = 20_000, ema.gamma_of_width(width)
    decays = [ema.decay(gamma, step) for step in range(1, num_steps + 1)]
    assert decays[0] == 0.0
    weights = torch.ones(num_steps, dtype=torch.float64)
    kept_of_later = 1.0
    for step in reversed(range(num_steps)):
        weights[step] = (1.0 - decays[step]) * kept_of_later
        kept_of_later *= decays[step]
    assert float(weights.sum()) == pytest.approx(1.0)
    times = (torch.arange(num_steps, dtype=torch.float64) + 0.5) / num_steps
    mean = float((weights * times).sum())
    assert float((weights * (times - mean) ** 2).sum()) ** 0.5 == pytest.approx(width, rel=1e-3)


def test_the_scale_of_a_loss_halves_at_once_and_doubles_in_time():
    scale = LossScale()
    assert scale.after(False) == LossScale(2.0**15, 0)
    for _ in range(GROWTH_INTERVAL - 1):
        scale = scale.after(True)
    assert scale == LossScale(2.0**16, GROWTH_INTERVAL - 1)
    assert LossScale.from_tensor(scale.tensor()) == scale
    assert scale.after(True) == LossScale(2.0**17, 0)
    assert scale.after(False) == LossScale(2.0**15, 0)


def test_the_best_validation_is_the_first_of_the_lowest():
    progress = Progress()
    for step, value in enumerate([3.0, 1.0, math.nan, 1.0, 2.0], 1):
        progress = Progress(step, progress.best_step, progress.best_value, progress.num_no_better).validated(value)
    assert progress == Progress(5, best_step=2, best_value=1.0, num_no_better=3)
    assert Progress().validated(math.inf) == Progress(num_no_better=1)


def test_training_goes_on_until_its_end_or_until_it_gains_no_more():
    config = DeepConfig(num_steps=10, early_stopping=2)
    assert decide(Progress(9), config) is Decision.CONTINUE
    assert decide(Progress(10), config) is Decision.NUM_STEPS
    assert decide(Progress(5, 3, 1.0, 1), config) is Decision.CONTINUE
    assert decide(Progress(5, 3, 1.0, 2), config) is Decision.EARLY_STOPPING
    assert decide(Progress(5, 3, 1.0, 99), DeepConfig(num_steps=10)) is Decision.CONTINUE


def test_what_is_due_is_due_at_the_end_too():
    config = DeepConfig(num_steps=10)
    assert [step for step in range(1, 11) if is_due(step, 4, config)] == [4, 8, 10]
    assert [step for step in range(1, 11) if is_due(step, 0, config)] == [10]


def test_the_last_checkpoints_and_the_best_stay():
    assert kept([40, 10, 30, 20], 10, 2) == {10, 30, 40}
    assert kept([10, 20], None, 3) == {10, 20}
    assert kept([10, 20], 15, 1) == {20}  # the best one is not on disk


@pytest.mark.parametrize(("on_nan", "precision", "is_loss", "expected"), [
    ("stop", "float32", True, True),
    ("stop", "float32", False, True),
    ("stop", "float16", True, True),
    ("stop", "float16", False, False),
    ("skip_batch", "float32", True, False),
    ("skip_batch", "float16", False, False),
])  # fmt: skip
def test_giving_up(on_nan, precision, is_loss, expected):
    config = DeepConfig(on_nan=on_nan, precision=precision)
    assert gives_up(config, is_loss, 1) is expected
    assert gives_up(config, is_loss, MAX_SKIPPED_IN_A_ROW) is True
