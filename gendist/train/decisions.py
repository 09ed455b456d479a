"""What to do after a step: pure decisions on how far training has come."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import Enum, IntEnum

from gendist.train.config import DeepConfig

MAX_SKIPPED_IN_A_ROW = 50  # updates of one network, after which on_nan: skip_batch gives up too


class Asked(IntEnum):
    """What one of the processes may be asked from outside."""

    NOTHING = 0
    TO_STOP_AT_A_RECORD = 1
    TO_STOP_NOW = 2


class Decision(Enum):
    CONTINUE = "continue"
    NUM_STEPS = "reached num_steps"
    EARLY_STOPPING = "no better validation for early_stopping of them"


@dataclass(frozen=True)
class Progress:
    """How far training has come; part of every checkpoint.

    step          steps done
    best_step     steps done at the best validation, and its value, the lowest; None before the first that is a number
    num_no_better validations since the best one
    """

    step: int = 0
    best_step: int | None = None
    best_value: float | None = None
    num_no_better: int = 0

    def advanced(self) -> Progress:
        return replace(self, step=self.step + 1)

    def validated(self, value: float) -> Progress:
        """After a validation at this step. A value that is not a number is never the best."""
        if math.isfinite(value) and (self.best_value is None or value < self.best_value):
            return replace(self, best_step=self.step, best_value=value, num_no_better=0)
        return replace(self, num_no_better=self.num_no_better + 1)


def decide(progress: Progress, config: DeepConfig) -> Decision:
    """Whether to go on."""
    if progress.step >= config.num_steps:
        return Decision.NUM_STEPS
    if config.early_stopping and progress.num_no_better >= config.early_stopping:
        return Decision.EARLY_STOPPING
    return Decision.CONTINUE


def gives_up(config: DeepConfig, is_loss: bool, num_in_a_row: int) -> bool:
    """Whether to stop after an update that was not finite, the num_in_a_row-th; is_loss: the loss itself was not.

    In float16 a gradient alone may overflow as a matter of course: the next step has a smaller scale.
    """
    if num_in_a_row >= MAX_SKIPPED_IN_A_ROW:
        return True
    return config.on_nan == "stop" and (is_loss or config.precision != "float16")


def is_due(step: int, every: int, config: DeepConfig) -> bool:
    """Whether what is done every so many steps (0: only at the end) is to be done after this many."""
    return step == config.num_steps or (every > 0 and step % every == 0)


def kept(steps: list[int], best_step: int | None, keep_last: int) -> set[int]:
    """Of the checkpoints after these steps, those that stay: the last ones and the best."""
    return {*sorted(steps)[-keep_last:], *(step for step in steps if step == best_step)}
