"""What is asked of a model and what it answers, as arrays: the border between HTTP and the models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gendist.protocols import UserError

Array = np.ndarray[Any, Any]

Answer = Mapping[str, Array | list[Array]]
"""By name, of as many rows each. Of samples "x" (N, D) or, of sequences, (N, T, D); beside it "label" (N,), indices of the
labels, and "state" (N, T), where the family has them. Of any other verb one array of the verb's name, as the model returns it:
where each sequence has its own length, a list."""


class InvalidCall(UserError):
    """A call that its model cannot answer. field: the argument at fault; allowed: what it may be, where that can be said."""

    def __init__(self, message: str, field: str, allowed: str | None = None) -> None:
        super().__init__(message)
        self.field, self.allowed = field, allowed


@dataclass(frozen=True)
class SampleCall:
    """Rows, or sequences, offset..offset + num_samples of the endless sample that belongs to the seed.

    given   a label or a component to draw from alone
    length  of each sequence, in steps; None: what the model says. Of models of sequences alone
    alone   without labels and states, which are drawn anew to be told
    """

    num_samples: int
    seed: int
    offset: int = 0
    given: Any = None
    length: int | None = None
    alone: bool = False

    @property
    def verb(self) -> str:
        return "sample"


@dataclass(frozen=True, eq=False)
class DataCall:
    """Any other verb.

    x        (N, D) float64, NaN where an entry is missing; of a model of sequences a list of (T, D). Of `decode` latents:
             (N, L), or (N,) integers, which are numbers of components, classes or states
    options  of the verb's arguments given, seed, offset and num_samples those that were said
    """

    verb: str
    x: Any
    options: Mapping[str, Any] = field(default_factory=dict)


Call = SampleCall | DataCall


def together(answers: Sequence[Answer]) -> Answer:
    """The answer to a call, from those to its chunks, in their order."""
    if len(answers) == 1:
        return answers[0]
    joined: dict[str, Array | list[Array]] = {}
    for name, first in answers[0].items():
        if isinstance(first, list):
            joined[name] = [array for answer in answers for array in answer[name]]
        else:
            joined[name] = np.concatenate([np.asarray(answer[name]) for answer in answers])
    return joined
