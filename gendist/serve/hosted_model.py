"""An artifact as a server holds it: which verbs it answers, what a request must be like, and what is computed at once.

The same rows come out the same bytes whatever is computed beside them. Where a model cannot promise that on this machine for
requests that are joined, which is tried when it is loaded, each is computed by itself.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gendist.artifact import Artifact, digest, load_artifact
from gendist.one_thread import one_thread
from gendist.protocols import VERBS
from gendist.serve.batcher import Work
from gendist.transformed import taken_apart

Answer = Mapping[str, np.ndarray[Any, Any]]
"""By name, (N, ...) each: "x", and of samples "label" or "state" beside it; of the other verbs one array of the verb's name."""


@dataclass(frozen=True)
class SampleCall:
    num_samples: int
    seed: int
    offset: int = 0
    given: Any = None
    length: int | None = None


@dataclass(frozen=True, eq=False)
class DataCall:
    """A verb of rows. x (N, D) float64, NaN where an entry is missing; of a model of sequences a list of (T, D)."""

    verb: str
    x: Any
    options: Mapping[str, Any]


class HostedModel:
    def __init__(self, name: str, path: str) -> None:
        self.name = name
        self.artifact: Artifact = load_artifact(path)
        self.model: Any = self.artifact.model
        self.digest = digest(path)

    @property
    def takes_sequences(self) -> bool:
        return getattr(type(taken_apart(self.model)[0]), "takes_sequences", False)

    def why_not(self, verb: str) -> str | None:
        """The reason why a verb is not offered, or None."""
        assert verb in VERBS
        reason: str | None = self.model.not_offered.get(verb)
        return reason

    def work_of(self, call: SampleCall | DataCall) -> Work:
        """One piece of work; `chunks` cuts a large call into such."""
        rows = call.num_samples if isinstance(call, SampleCall) else len(call.x)
        return Work(key=None, num_rows=rows, num_bytes=8 * rows * self.model.num_features, payload=(self, call))

    def answer(self, call: SampleCall | DataCall) -> Answer:
        with one_thread():
            if isinstance(call, SampleCall):
                options = {} if call.length is None else {"length": call.length}
                x = self.model.sample(call.num_samples, seed=call.seed, offset=call.offset, given=call.given, **options)
                return {"x": x.numpy()}
            return {call.verb: getattr(self.model, call.verb)(call.x, **call.options).numpy()}


def compute(key: Hashable, payloads: Sequence[tuple[HostedModel, SampleCall | DataCall]]) -> list[Any]:
    """What the batcher runs: an answer for each, or the exception that it raised."""
    answers: list[Any] = []
    for hosted, call in payloads:
        try:
            answers.append(hosted.answer(call))
        except Exception as error:
            answers.append(error)
    return answers
