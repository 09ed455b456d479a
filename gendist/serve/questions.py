"""What may be asked of one model: the options and rows of a request become a call that is known to be right, and it is said
what the columns of its answer are called."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from gendist.bulk.parts import Layout, sample_layout
from gendist.noise import MAX_SEED
from gendist.pictures import figure_bytes
from gendist.protocols import VERBS
from gendist.serve.bodies import Take, data_options, sample_body, whole_number
from gendist.serve.calls import DataCall, InvalidCall, SampleCall
from gendist.serve.formats import Described
from gendist.serve.hosted_model import HostedModel
from gendist.serve.limits import Limits
from gendist.serve.media_types import ARROW_FILE, MEDIA_TYPES
from gendist.serve.problems import Problem, listing, named, shortened
from gendist.serve.rows import RowReader, array_of_npy, numbers_of_json

OF_ROWS = ("log_prob", "elbo", "log_prob_bound")  # one number a row
LIKE_X = ("x", "decode", "impute", "reconstruct")
X_ALONE = ("npy", "png")  # formats that have no room for labels and states
LATENTS = "a list of rows of latents, or of numbers of components"


class Questions:
    def __init__(self, hosted: HostedModel, limits: Limits) -> None:
        self.hosted, self._limits = hosted, limits
        self._schema = hosted.artifact.schema
        self._rows = RowReader(self._schema, hosted.model.num_features, hosted.takes_sequences, limits)
        # Who looks at one figure looks at the others of the seed, too, which the model makes all at once.
        self._figures = lru_cache(maxsize=1)(getattr(self.hosted.model, "figures", lambda seed: {}))
        self._layout_of_sample = lru_cache(maxsize=64)(self._sample_layout)

    def check_offered(self, verb: str) -> None:
        """Problem with the family's own reason where it is not."""
        if verb not in VERBS:
            raise Problem(404, f"the verb {shortened(verb)}", "verb", listing(VERBS))
        reason = self.hosted.why_not(verb)
        if reason is not None:
            raise Problem(405, f"{verb}: {reason}", "verb", listing(self.hosted.verbs), headers={"allow": ""})

    # Samples

    def sample(self, content: Mapping[str, Any], format_: str) -> tuple[SampleCall, Described]:
        body = sample_body(content)
        # Below 2^53, so that whoever reads it as a number of JavaScript's has the same one.
        seed = secrets.randbits(53) if body.seed is None else body.seed
        call = SampleCall(body.num_samples, seed, body.offset, body.given, body.length, alone=format_ in X_ALONE)
        self._check(call)
        described = Described(
            name="x",
            num_rows=body.num_samples,
            first_row=body.offset,
            layout=self._layout_of_sample(body.length or self.hosted.trial.length),
            labels=self.hosted.model.labels,
            facts={
                "model": self.hosted.name,
                "digest": self.hosted.digest,
                "seed": seed,
                "offset": body.offset,
                "num_samples": body.num_samples,
                "columns": self._schema.feature_names,
            },
        )
        return call, described

    def _sample_layout(self, num_steps: int | None) -> Layout:
        return sample_layout(self.hosted.model, self._schema, num_steps, with_beside=True)[0]

    # Of data

    def data(
        self, verb: str, content: Mapping[str, Any], kind: str, body: bytes | None, format_: str, take: Take
    ) -> tuple[DataCall, Described]:
        """
        content  the options and, where there is no body, x (of decode z)
        body     an array or a table of the media type `kind`
        take     room for so many bytes, or raises Problem
        """
        name = "z" if verb == "decode" else "x"
        options = {each: value for each, value in content.items() if each != name}
        x: Any
        if body is None:
            if name not in content:
                raise Problem(422, f"{name} is missing", name, LATENTS if name == "z" else self._rows.needs)
            x = self._latents_of_json(content[name]) if name == "z" else self._rows.of_json(content[name])
        elif kind == MEDIA_TYPES["npy"]:
            x = array_of_npy(body, name, take) if name == "z" else self._rows.of_npy(body, take)
        elif kind in (MEDIA_TYPES["arrow"], ARROW_FILE) and name == "x":
            x = self._rows.of_arrow(body, take)
        else:
            raise Problem(415, f"content-type {shortened(kind)}", "content-type", listing(taken(verb)))
        chosen = data_options(options, self.hosted.trial.options[verb])
        call = self._check(DataCall(verb, x, chosen))
        self._check_format(call, format_)
        facts = {"model": self.hosted.name, "digest": self.hosted.digest, **chosen}
        return call, Described(
            name=verb,
            num_rows=len(call.x),
            first_row=0,
            layout=self._layout(verb),
            facts={each: value for each, value in facts.items() if each != "given"},
            after={"labels": self.hosted.model.labels} if verb == "classify" else {},
        )

    def _latents_of_json(self, values: Any) -> Any:
        if not isinstance(values, list) or not values:
            raise Problem(422, f"z is {shortened(values)}", "z", LATENTS)
        return numbers_of_json(values, "z", LATENTS)

    def _check(self, call: Any) -> Any:
        try:
            return self.hosted.check(call, self._limits)
        except InvalidCall as error:
            raise Problem(422, str(error), error.field, error.allowed) from None

    def _check_format(self, call: DataCall, format_: str) -> None:
        is_ragged = isinstance(call.x, list) and len({len(each) for each in call.x}) > 1
        if is_ragged and call.verb not in (*OF_ROWS, "classify") and format_ in ("npy", "npz"):
            raise Problem(406, f"format {format_} of sequences of different lengths", "format", "json, arrow, ndjson")

    def _layout(self, verb: str) -> Layout | None:
        """As in the files of `gendist score` and `gendist encode`; None: columns by their number."""
        if verb in OF_ROWS:
            return Layout((verb,), array=verb, numbered="sequence" if self.hosted.takes_sequences else "row")
        if verb == "classify":
            return Layout(tuple(map(str, self.hosted.model.labels)), array=verb)
        if verb in LIKE_X:
            return Layout(self._schema.feature_names, array=verb, categories=self._schema.categories)
        return None

    # Pictures

    def check_picture(self, described: Described, most: int) -> None:
        if described.name not in LIKE_X or (described.name == "decode" and self.hosted.takes_sequences):
            raise Problem(406, f"{described.name} as a picture", "format", listing([*MEDIA_TYPES][:-1]))
        if described.num_rows > most:
            raise Problem(422, f"a picture of {described.num_rows}", "num_samples", f"up to {most} in one picture")

    def seed_of(self, query: dict[str, str]) -> int:
        for name in query:
            if name != "seed":
                raise Problem(422, f"the parameter {shortened(name)}", named(name), "seed")
        return whole_number("seed", query.get("seed", "0"), MAX_SEED)

    def names_of_figures(self) -> list[str]:
        return list(self._figures(0))

    def figure(self, name: str, seed: int) -> bytes:
        return figure_bytes(self._figures(seed)[name], self._schema)


def taken(verb: str) -> list[str]:
    """Media types of the body of a request."""
    if verb == "sample":
        return [MEDIA_TYPES["json"]]
    return [MEDIA_TYPES["json"], MEDIA_TYPES["npy"], *([] if verb == "decode" else [MEDIA_TYPES["arrow"], ARROW_FILE])]
