"""What a call must be like for its model to answer it: told before anything is queued, with the argument at fault."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from gendist.data.matrix import MAX_MAGNITUDE
from gendist.noise import MAX_SEED
from gendist.protocols import UserError
from gendist.serve.calls import Array, Call, InvalidCall, SampleCall
from gendist.serve.limits import Limits
from gendist.serve.trial import OPTIONS, Trial, latent_width
from gendist.transformed import taken_apart

MAX_ROW = 2**53  # of the endless sample: every whole number up to it is one of JSON's, too
MAX_IMPORTANCE_SAMPLES = 1_000  # of a bound
MAX_OVER_CLASSES = 4_000  # of a bound of a row that may be of any class, which has so many of each
MAX_SEEDED_STEPS = 100_000  # of sequences: their noise is counted through them all, so that they are computed at once
MAX_LABEL = 200  # characters
MOST_OF_NETWORKS = float(np.finfo(np.float32).max)  # which compute in float32


class Checks:
    """Those of one model."""

    def __init__(self, model: Any, trial: Trial, image_shape: tuple[int, ...] | None) -> None:
        """image_shape: of a row of x, which then may come as an image"""
        self._model, self._trial, self._image_shape = model, trial, image_shape
        self._within = taken_apart(model)[0]
        self._takes_sequences: bool = getattr(type(self._within), "takes_sequences", False)

    def checked(self, call: Call, limits: Limits) -> Call:
        """The call, with arrays as the model takes them. `InvalidCall` where it has no answer."""
        if reason := self._trial.not_offered.get(call.verb):
            raise InvalidCall(f"{call.verb} is not offered: {reason}", "verb", ", ".join(self._trial.options))
        if isinstance(call, SampleCall):
            self._check_sample(call, limits)
            return call
        assert call.verb in self._trial.options
        if call.verb == "decode":
            x: Any = self._latents(call.x)
        elif self._takes_sequences:
            x = [self._rows(each, f"sequence {index}, step", call.verb) for index, each in enumerate(_sequences(call.x))]
        else:
            x = self._rows(call.x, "row", call.verb)
        field, lengths = ("z" if call.verb == "decode" else "x"), ([len(each) for each in x] if isinstance(x, list) else [])
        if len(x) == 0:
            raise InvalidCall(f"{field} has no rows", field, "1 row or more")
        if max(lengths, default=0) > limits.max_length:
            raise InvalidCall(f"a sequence of {max(lengths)} steps", field, f"1 to {limits.max_length} steps")
        if 0 in lengths:
            raise InvalidCall(f"sequence {lengths.index(0)} has no steps", field, f"1 to {limits.max_length} steps")
        if (num_rows := sum(lengths) or len(x)) > limits.max_rows:
            raise InvalidCall(f"{field} has {num_rows} {'steps' if lengths else 'rows'}", field, f"1 to {limits.max_rows}")
        self._check_options(call.verb, call.options, len(x), limits.max_rows)
        if lengths and call.options.get("seed") is not None and num_rows > MAX_SEEDED_STEPS:
            raise InvalidCall(f"x has {num_rows} steps, too many with a seed", "x", f"1 to {MAX_SEEDED_STEPS} with a seed")
        if call.verb != "decode" and hasattr(self._model, "check_rows"):
            try:
                self._model.check_rows(x)
            except UserError as error:
                raise InvalidCall(str(error), "x", str(error).partition("; ")[2] or None) from None
        return replace(call, x=x)

    def _check_sample(self, call: SampleCall, limits: Limits) -> None:
        length = self._trial.length
        if call.length is not None:
            if length is None:
                raise InvalidCall("length: this is no model of sequences; leave it out", "length")
            length = _check_whole("length", call.length, 1, limits.max_length)
        _check_whole("num_samples", call.num_samples, 1, max(1, limits.max_rows // (length or 1)))
        _check_whole("seed", call.seed, 0, MAX_SEED)
        _check_whole("offset", call.offset, 0, MAX_ROW)
        if call.given is not None:
            self._check_given(call.given)

    def _check_options(self, verb: str, options: Mapping[str, Any], num_rows: int, max_rows: int) -> None:
        """max_rows: that a request may have, where each of the samples of a row is one."""
        has = self._trial.options[verb]
        for name in options:
            if name not in has:
                theirs = [each for each in OPTIONS if each in has]
                allowed = f"options of {verb}: {', '.join(theirs)}" if theirs else f"{verb} has no options"
                raise InvalidCall(f"{name}: not an option of {verb} here", name, allowed)
        if options.get("seed") is not None:
            _check_whole("seed", options["seed"], 0, MAX_SEED)
        if "offset" in options:
            _check_whole("offset", options["offset"], 0, MAX_ROW)
        given = options.get("given")
        if verb in self._trial.num_samples:
            num_classes = len(self._model.labels) if given is None else 0
            most = min(MAX_IMPORTANCE_SAMPLES, MAX_OVER_CLASSES // max(num_classes, 1), max_rows // num_rows)
            _check_whole("num_samples", options.get("num_samples", self._trial.num_samples[verb]), 1, max(most, 1))
        if given is None and verb in self._trial.needs_given:
            raise InvalidCall(f"given: {verb} must be told of which class the rows are", "given", self._conditions())
        if isinstance(given, list | tuple):
            if len(given) != num_rows:
                raise InvalidCall(f"given: {len(given)} labels for {num_rows} rows", "given", "one, or one for each row")
            for label in {str(label): label for label in given}.values():
                self._check_given(label)
        elif given is not None:
            self._check_given(given)

    def _check_given(self, given: Any) -> None:
        """A family knows what it can be given; to draw no row of it costs next to nothing."""
        if not isinstance(given, str | int | float) or len(str(given)) > MAX_LABEL:
            raise InvalidCall("given: not a label", "given", self._conditions())
        draw = getattr(self._within, "sample_classes", None)
        try:
            if draw is not None:
                draw(0, given=given)
            else:
                self._within.sample(0, given=given, **({"length": 1} if self._takes_sequences else {}))
        except UserError as error:
            raise InvalidCall(str(error), "given", self._conditions() or str(error).partition("; ")[2] or None) from None

    def _conditions(self) -> str | None:
        return ", ".join(map(str, getattr(self._model, "conditions", self._model.labels))) or None

    def _rows(self, values: Any, row: str, verb: str) -> Array:
        """(N, D) float64. row: what messages call one."""
        x = _numbers(values, "x").astype(np.float64, copy=False)
        width = self._model.num_features
        if self._image_shape is not None and not self._takes_sequences and x.shape[1:] == self._image_shape:
            x = x.reshape(len(x), width)
        if x.ndim != 2 or x.shape[1] != width:
            shape = f"(T, {width}) of each sequence" if self._takes_sequences else f"(N, {width})"
            raise InvalidCall(f"x has shape {x.shape}", "x", f"shape {shape}")
        if not bool(np.isfinite(x).all()):
            infinite_N, missing_N = np.isinf(x).any(1), np.isnan(x).any(1)
            if infinite_N.any():
                raise InvalidCall(f"x has an infinite entry in {row} {int(infinite_N.argmax())}", "x", "finite numbers")
            if verb not in self._trial.takes_missing:
                message = f"x has a missing entry in {row} {int(missing_N.argmax())}, and {verb} takes complete rows here"
                raise InvalidCall(message, "x", "finite numbers")
        return x

    def _latents(self, values: Any) -> Array:
        """(N, L) float64, or (N,) int64."""
        z = _numbers(values, "z")
        width, is_discrete = latent_width(self._within), hasattr(self._within, "num_latents")
        if not bool(np.isfinite(z).all()):
            bad_N = ~np.isfinite(z).reshape(len(z), -1).all(1)
            raise InvalidCall(f"z has a missing or infinite entry in row {int(bad_N.argmax())}", "z", "finite numbers")
        most = MAX_MAGNITUDE if is_discrete else MOST_OF_NETWORKS
        if bool((too_large := np.abs(z, dtype=np.float64) > most).any()):
            row = np.argwhere(too_large)[0][0]
            raise InvalidCall(f"z has the entry {z[too_large][0]:g} in row {row}", "z", f"numbers from {-most:g} to {most:g}")
        if z.ndim == 1 and is_discrete and width is not None:
            in_range_N = np.isin(z, np.arange(width))
            if not bool(in_range_N.all()):
                row = int((~in_range_N).argmax())
                raise InvalidCall(f"z is {z[row]} in row {row}", "z", f"whole numbers, 0 to {width - 1}")
            return z.astype(np.int64)
        if z.ndim != 2 or (width is not None and z.shape[1] != width):
            numbers = f", or whole numbers below {width}, shape (N,)" if is_discrete else ""
            raise InvalidCall(f"z has shape {z.shape}", "z", f"shape (N, {'L' if width is None else width}){numbers}")
        return z.astype(np.float64, copy=False)


def _numbers(values: Any, field: str) -> Array:
    try:
        array = np.asarray(values)
    except ValueError:
        raise InvalidCall(f"{field}: rows of different widths", field, "an array of numbers") from None
    if array.dtype.kind not in "buif" or array.ndim == 0:
        raise InvalidCall(f"{field}: an array of {array.dtype}", field, "an array of numbers")
    return array


def _sequences(values: Any) -> list[Any]:
    """Of a list of (T, D), or of an array (S, T, D)."""
    if isinstance(values, list | tuple) or (isinstance(values, np.ndarray) and values.ndim == 3):
        return list(values)
    raise InvalidCall("x: this is a model of sequences", "x", "a list of sequences, each an array (T, D)")


def _check_whole(field: str, value: Any, least: int, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise InvalidCall(f"{field}: {str(value)[:80]!r} is no whole number", field, f"{least} to {most}")
    number = int(value)
    if not least <= number <= most:
        said = str(number) if abs(number) <= 10 * MAX_SEED else "far"  # Python puts no number of 5,000 digits into words
        raise InvalidCall(f"{field} {said} is out of range; allowed are {least} to {most}", field, f"{least} to {most}")
    return number
