"""The columns of a sample beside its features: of its class, of sequences of their states, and of what a row is. Where a
feature is called so, their names are longer."""

from __future__ import annotations

from collections.abc import Collection

LABEL, STATE, SEQUENCE, STEP = "label", "state", "sequence", "step"


def label_name(others: Collection[str]) -> str:
    return _not_among(LABEL, "of the class", others)


def state_name(others: Collection[str]) -> str:
    return _not_among(STATE, "of the sequence", others)


def step_names(others: Collection[str]) -> tuple[str, str]:
    """Of the numbers of the sequence and of its step."""
    return _not_among(SEQUENCE, "of the sample", others), _not_among(STEP, "of the sequence", others)


def _not_among(name: str, more: str, others: Collection[str]) -> str:
    """The name of a column, made longer where another is called so."""
    while name in others:
        name = f"{name} {more}"
    return name
