"""The learning rate of a step: a function of its number alone."""

from __future__ import annotations

import math

from gendist.train.config import OptimizerConfig


def learning_rate(config: OptimizerConfig, step: int, num_steps: int) -> float:
    """Of the step with this index, 0 to num_steps - 1.

    During warm-up it rises along a line and is whole at the last of those steps; then the schedule begins with the whole rate
    and would reach 0 with the step after the last one.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps)
    left = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}[config.schedule]
    return config.learning_rate * left
