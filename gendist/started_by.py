"""Who has started this process, as its environment tells."""

from __future__ import annotations

import os


def is_in_a_job() -> bool:
    """Whether it is the process of a job that was submitted to Ray."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def is_by_torchrun() -> bool:
    """Whether it is one of several that torchrun started, which are to train together."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def is_first() -> bool:
    """Whether it speaks: of those that torchrun started rank 0 alone does."""
    return os.environ.get("RANK", "0") == "0"
