"""An artifact as a server holds it: which verbs it answers, what a request must be like, and what is computed at once.

The same rows come out the same bytes whatever is computed beside them, and whatever else the server does: what is cut into
chunks is cut where the call and the model say, and what is joined was tried before (see `trial`).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from gendist.artifact import Artifact, load_with_digest
from gendist.bulk.parts import sample_layout
from gendist.one_thread import one_thread
from gendist.protocols import VERBS, SampleAddress, UserError
from gendist.serve.batcher import Work
from gendist.serve.calls import Answer, Array, Call, DataCall, InvalidCall, SampleCall, together
from gendist.serve.checks import Checks
from gendist.serve.limits import Limits
from gendist.serve.trial import latent_width, try_out
from gendist.transformed import taken_apart

__all__ = ["Answer", "Call", "DataCall", "HostedModel", "InvalidCall", "SampleCall", "compute", "together"]

CHUNK_ROWS = 256  # where rows are computed in tiles: whole tiles, and few enough that others are soon served
TILE_ROWS = 64  # of which a part takes as long as all
MOST_CHUNK_ROWS, CHUNK_VALUES = 4_096, 2**20  # elsewhere
DENSITIES = ("log_prob", "elbo", "log_prob_bound")


class HostedModel:
    def __init__(self, name: str, path: str | Path, device: str = "cpu", digest: str | None = None) -> None:
        """
        path    of a run directory or an artifact
        device  where its networks compute, as torch names it
        digest  of the artifact that it is to be; None: whatever lies there

        A sample is made and every verb is tried, so that a model which is there is one that answers. UserError where it is not.
        """
        self.name = name
        self.artifact: Artifact
        self.artifact, self.digest = load_with_digest(path, digest)
        self.model: Any = self.artifact.model
        self._within = taken_apart(self.model)[0]
        for network in self._within.networks().values() if hasattr(self._within, "networks") else ():
            network.to(device).eval()
        try:
            self.trial = try_out(self.model)
        except UserError as error:
            raise UserError(f"{path}: cannot be served: {error}") from error
        self._checks = Checks(self.model, self.trial, self.artifact.schema.image_shape)

    # What it is

    @property
    def takes_sequences(self) -> bool:
        return getattr(type(self._within), "takes_sequences", False)

    @property
    def verbs(self) -> tuple[str, ...]:
        """Those that it offers."""
        return tuple(self.trial.options)

    def why_not(self, verb: str) -> str | None:
        """The reason why a verb is not offered, or None."""
        assert verb in VERBS
        return self.trial.not_offered.get(verb)

    @property
    def columns(self) -> tuple[str, ...]:
        """Of x, one a feature."""
        return self.artifact.schema.feature_names

    @property
    def conditions(self) -> tuple[Any, ...]:
        """The labels that `given` may be."""
        return tuple(getattr(self.model, "conditions", self.model.labels))

    @property
    def chunk_rows(self) -> int:
        """Rows of a chunk; of sequences how many of the length that the model says."""
        return self._chunk_rows(self.trial.length)

    @property
    def num_bytes(self) -> int:
        """Of its parameters."""
        models = [self.model, *([self.artifact.prior.model] if self.artifact.prior is not None else [])]
        return sum(tensor.nbytes for model in models for tensor in model.tensors().values())

    def _beside(self) -> dict[str, str]:
        """Of the table of a sample, the columns of labels and states, where it has them."""
        of_verbs = sample_layout(self.model, self.artifact.schema, self.trial.length, with_beside=True)[1]
        verbs = {"label": "sample_classes", "state": "sample_states"}
        return {name: of_verbs[verb] for name, verb in verbs.items() if verb in of_verbs}

    def description(self) -> dict[str, Any]:
        """All this, for JSON."""
        schema = self.artifact.schema
        return {
            "name": self.name,
            "family": self.artifact.family,
            "digest": self.digest,
            "config": self.model.config.model_dump(mode="json"),
            "num_features": self.model.num_features,
            "columns": list(self.columns),
            "beside": self._beside(),
            "categories": {column: list(values) for column, values in schema.categories.items()},
            "image_shape": None if schema.image_shape is None else list(schema.image_shape),
            "labels": list(self.model.labels),
            "conditions": list(self.conditions),
            "takes_sequences": self.takes_sequences,
            "length": self.trial.length,
            "latent_width": latent_width(self._within),
            "has_free_latents": latent_width(self._within) is not None and not hasattr(self._within, "num_latents"),
            "has_prior": self.artifact.prior is not None,
            "density": getattr(self.model, "density", None) or None,
            "verbs": {
                verb: {
                    "options": list(options),
                    "needs_given": verb in self.trial.needs_given,
                    "takes_missing": verb in self.trial.takes_missing,
                    "is_joined": verb in self.trial.joined,
                }
                for verb, options in self.trial.options.items()
            },
            "not_offered": dict(self.trial.not_offered),
            "chunk_rows": self.chunk_rows,
            "num_bytes": self.num_bytes,
        }

    # What is asked of it

    def check(self, call: Call, limits: Limits | None = None) -> Call:
        """The call with arrays as the model takes them; `InvalidCall` where it has no answer."""
        return self._checks.checked(call, limits or Limits())

    def chunks(self, call: Call) -> Iterator[Call]:
        """A checked call, cut into some whose answers make up its own (`together`); where, it and the model alone say."""
        if isinstance(call, SampleCall):
            step = self._chunk_rows(call.length or self.trial.length)
            for first in range(0, call.num_samples, step):
                yield replace(call, num_samples=min(step, call.num_samples - first), offset=call.offset + first)
            return
        bounds = self._bounds(call)
        if len(bounds) == 2:
            yield call
            return
        for start, stop in pairwise(bounds):
            options = dict(call.options)
            if "offset" in self.trial.options[call.verb]:
                options["offset"] = options.get("offset", 0) + start
            if isinstance(options.get("given"), list | tuple):
                options["given"] = options["given"][start:stop]
            yield DataCall(call.verb, call.x[start:stop], options)

    def work_of(self, call: Call) -> Work:
        """A chunk, for the batcher. Of sequences a row is a step; of a bound, each of a row's samples is one."""
        if isinstance(call, SampleCall):
            num_steps = call.length or self.trial.length or 1
            rows = call.num_samples * num_steps
            num_bytes = 8 * rows * self.model.num_features
        else:
            num_steps = max(map(len, call.x)) if isinstance(call.x, list) else 1
            rows = sum(map(len, call.x)) if isinstance(call.x, list) else len(call.x)
            num_bytes = 8 * rows * (self._width_in(call) + self._width_out(call.verb))
            rows *= self._samples_of_row(call)
        # The steps of a sequence are taken one after the other, its rows at once.
        cost = (self.name, call.verb, rows.bit_length(), num_bytes.bit_length(), num_steps.bit_length())
        return Work(self._key(call), rows, num_bytes, (self, call), cost)

    def answer(self, call: Call) -> Answer:
        """What the model makes of a chunk: of a verb of data what `gendist.load(...)` would return."""
        with one_thread():
            if isinstance(call, SampleCall):
                options = {} if call.length is None else {"length": call.length}
                x = self.model.sample(call.num_samples, seed=call.seed, offset=call.offset, given=call.given, **options)
                return self._sampled(call, x)
            return {call.verb: self._of_data(call.verb, call.x, call.options)}

    def answers(self, calls: Sequence[Call]) -> list[Answer]:
        """What `answer` makes of each, of calls of one key, computed together."""
        first = calls[0]
        with one_thread():
            if isinstance(first, SampleCall):
                samples = [call for call in calls if isinstance(call, SampleCall)]
                addresses = [SampleAddress(call.num_samples, call.seed, call.offset, call.given) for call in samples]
                x = self.model.sample_together(addresses)
                return [self._sampled(call, own) for call, own in zip(samples, x, strict=True)]
            x_of_all = [call.x for call in calls if isinstance(call, DataCall)]
            values = self._of_data(first.verb, np.concatenate(x_of_all), first.options)
            assert isinstance(values, np.ndarray)
            bounds = np.cumsum([len(x) for x in x_of_all])[:-1]
            return [{first.verb: own} for own in np.split(values, bounds)]

    def _key(self, call: Call) -> Hashable:
        """Calls of one key are computed together; None: by itself."""
        if call.verb not in self.trial.joined:
            return None
        if isinstance(call, SampleCall):
            return (self.name, "sample")
        given = call.options.get("given")
        if call.options.keys() - {"given", "offset"} or isinstance(given, list | tuple):
            return None  # a row's noise is told by its number, and its label by its place
        return (self.name, call.verb, call.x.ndim, None if given is None else str(given))

    def _chunk_rows(self, length: int | None) -> int:
        if "sample" in self.trial.joined or hasattr(self.model, "sample_together"):
            return CHUNK_ROWS
        return max(1, min(MOST_CHUNK_ROWS, CHUNK_VALUES // (self.model.num_features * (length or 1))))

    def _bounds(self, call: DataCall) -> list[int]:
        """Where the rows or sequences of a call are cut."""
        if not isinstance(call.x, list):
            step = self._chunk_rows(None)
            if (many := self._samples_of_row(call)) > 1:
                step = min(step, max(step // many // TILE_ROWS, 1) * TILE_ROWS)
            return [*range(0, len(call.x), step), len(call.x)]
        if call.options.get("seed") is not None:
            return [0, len(call.x)]  # the noise of a sequence belongs to steps and sequences that are counted from the first
        bounds, steps = [0], 0
        for index, x_TD in enumerate(call.x):
            if index > bounds[-1] and (
                steps + len(x_TD) > CHUNK_VALUES // self.model.num_features or index - bounds[-1] >= MOST_CHUNK_ROWS
            ):
                bounds.append(index)
                steps = 0
            steps += len(x_TD)
        return [*bounds, len(call.x)]

    def _samples_of_row(self, call: DataCall) -> int:
        return int(call.options.get("num_samples", self.trial.num_samples.get(call.verb, 1)))

    def _width_in(self, call: DataCall) -> int:
        if call.verb == "decode":
            return 1 if call.x.ndim == 1 else int(call.x.shape[1])
        return int(self.model.num_features)

    def _width_out(self, verb: str) -> int:
        if verb in DENSITIES:
            return 1
        if verb == "classify":
            return len(self.model.labels)
        return latent_width(self._within) or 1 if verb == "encode" else int(self.model.num_features)

    def _sampled(self, call: SampleCall, x: Tensor) -> Answer:
        """x and what it was drawn from. Sparse rows become dense ones, which the size of a chunk has room for."""
        which: dict[str, Any] = {"seed": call.seed, "offset": call.offset, "given": call.given}
        answer = {"x": (x.to_dense() if x.is_sparse_csr else x).numpy()}
        if call.alone:
            return answer
        if self.model.labels and hasattr(self._within, "sample_classes"):
            answer["label"] = self._within.sample_classes(call.num_samples, **which).numpy()
        if self.takes_sequences and hasattr(self._within, "sample_states"):
            answer["state"] = self._within.sample_states(call.num_samples, length=x.shape[1], **which).numpy()
        return answer

    def _of_data(self, verb: str, x: Any, options: Mapping[str, Any]) -> Array | list[Array]:
        try:
            values = getattr(self.model, verb)(x, **options)
        except InvalidCall:
            raise
        except UserError as error:  # x is of the right shape, and yet none of this model's
            raise InvalidCall(str(error), "z" if verb == "decode" else "x") from error
        return [each.numpy() for each in values] if isinstance(values, list) else values.numpy()


def compute(key: Hashable, payloads: Sequence[tuple[HostedModel, Call]]) -> list[Any]:
    """What the batcher runs: an answer for each, or the exception that it raised. Where those of a key cannot be computed
    together, each is by itself, so that the one at fault fails alone."""
    if key is not None and len(payloads) > 1:
        try:
            return list(payloads[0][0].answers([call for _, call in payloads]))
        except Exception:
            pass
    answers: list[Any] = []
    for hosted, call in payloads:
        try:
            answers.append(hosted.answer(call))
        except Exception as error:
            answers.append(error)
    return answers
