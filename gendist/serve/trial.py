"""What a model turns out to do on this machine, tried when it is loaded: that it makes samples at all, whether rows of several
requests may be computed at once, and what its verbs take.

Rows that share a tile of a network come out the same bytes wherever they lie in it, as far as is known; but nobody promises it
of every processor and every network of a user's own. So it is tried, and where it is not so, requests are computed one by one.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from inspect import signature
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gendist.noise import Noise
from gendist.one_thread import one_thread
from gendist.protocols import VERBS, SampleAddress, UserError
from gendist.transformed import taken_apart

SIZES = (1, 3, 37, 64, 5)  # of the requests that are tried together: they begin anywhere in a tile, and cross its end
SEED, OFFSET = 5, 61
LENGTH = 4  # of the sequences
OPTIONS = ("given", "seed", "offset", "num_samples")
INDEPENDENT = ("log_prob", "encode", "decode", "classify", "impute", "reconstruct")  # where no seed is given, row from row

logger = logging.getLogger("gendist")


@dataclass(frozen=True)
class Trial:
    """What came out of it, as names of verbs.

    joined         requests of it may be computed together
    takes_missing  x may have missing entries
    needs_given    `given` must be said
    options        which of `OPTIONS` each verb that is offered has
    num_samples    of each row, that a verb with that option takes where nobody says
    not_offered    the reasons for the others
    length         of a sequence where nobody says, in steps; None of a model of rows
    """

    joined: frozenset[str]
    takes_missing: frozenset[str]
    needs_given: frozenset[str]
    options: Mapping[str, tuple[str, ...]]
    num_samples: Mapping[str, int]
    not_offered: Mapping[str, str]
    length: int | None


def try_out(model: Any) -> Trial:
    """UserError where it makes no sample."""
    with one_thread():
        return _try_out(model)


def _try_out(model: Any) -> Trial:
    within = taken_apart(model)[0]
    takes_sequences = getattr(type(within), "takes_sequences", False)
    not_offered = dict(model.not_offered)
    if not model.labels:
        not_offered.setdefault("classify", "it is fitted without labels")
    offered = [verb for verb in VERBS if verb not in not_offered]
    options = {verb: tuple(name for name in OPTIONS if name in signature(getattr(within, verb)).parameters) for verb in offered}
    num_samples = {
        verb: signature(getattr(within, verb)).parameters["num_samples"].default
        for verb in offered
        if verb != "sample" and "num_samples" in options[verb]
    }
    conditions = getattr(model, "conditions", model.labels)
    try:
        x = model.sample(3, seed=SEED, **({"length": LENGTH} if takes_sequences else {}))
    except Exception as error:
        raise UserError(f"it makes no samples ({type(error).__name__}: {error})") from error
    x = x.to_dense() if x.is_sparse_csr else x
    takes_missing, needs_given = set(), set()
    for verb in offered:
        if verb == "sample":
            continue
        own = {"num_samples": 1} if "num_samples" in options[verb] else {}
        values = _latents(within, 3) if verb == "decode" else x
        if conditions and "given" in options[verb] and not _answers(model, verb, values, own):
            own["given"] = conditions[0]
            if _answers(model, verb, values, own):
                needs_given.add(verb)
        if verb != "decode" and _answers(model, verb, _with_a_gap(x), own):
            takes_missing.add(verb)
    joined = set()
    if hasattr(model, "sample_together") and _sampled_together_is_the_same(model, conditions):
        joined.add("sample")
        rows = {"decode": _latents(within, sum(SIZES))}
        for verb in set(offered) & set(INDEPENDENT):
            # Without a label it is the mean over all, of what comes with one.
            own = {"given": conditions[0]} if conditions and "given" in options[verb] else {}
            x_ND = rows.get(verb)
            if x_ND is None:
                x_ND = rows["encode"] = model.sample(sum(SIZES), seed=SEED)
            if _together_is_the_same(model, verb, x_ND, own):
                joined.add(verb)
    length = model.sample(0).shape[1] if takes_sequences else None
    takes = frozenset(takes_missing), frozenset(needs_given), options, num_samples
    return Trial(frozenset(joined), *takes, not_offered, length)


def latent_width(model: Any) -> int | None:
    """How many numbers `decode` takes for a row; None where nobody knows."""
    width: int | None = getattr(model.config, "latent_dim", getattr(model, "num_latents", None))
    return width


def _latents(model: Any, num_rows: int) -> Tensor | None:
    """(N, L) latents to decode: normal, and so that they sum to 1 where they are probabilities."""
    width = latent_width(model)
    if width is None:
        return None
    z_NL = Noise(SEED, "trial").normal(0, num_rows, width)
    return z_NL.softmax(1) if hasattr(model, "num_latents") else z_NL


def _with_a_gap(x: Tensor) -> Tensor:
    gappy = x.double().clone()
    gappy[0, ..., 0] = torch.nan
    return gappy


def _answers(model: Any, verb: str, values: Tensor | None, options: Mapping[str, Any]) -> bool:
    """Whether the verb makes numbers of this."""
    if values is None:
        return False
    try:
        answer = getattr(model, verb)(values, **options)
    except Exception:  # of a network of the user's own, it may be any
        return False
    return all(not bool(each.isnan().any()) for each in (answer if isinstance(answer, list) else [answer]))


def _sampled_together_is_the_same(model: Any, conditions: tuple[Any, ...]) -> bool:
    givens = [None, *conditions[:2]]
    addresses = [
        SampleAddress(size, SEED + number, OFFSET * number, givens[number % len(givens)]) for number, size in enumerate(SIZES)
    ]
    alone = [model.sample(each.num_samples, seed=each.seed, offset=each.offset, given=each.given) for each in addresses]
    is_same = all(_same_bytes(a, b) for a, b in zip(model.sample_together(addresses), alone, strict=True))
    if not is_same:
        logger.warning("requests are computed one by one: samples made together are not the same bytes on this machine")
    return is_same


def _together_is_the_same(model: Any, verb: str, x_ND: Tensor | None, options: Mapping[str, Any]) -> bool:
    if x_ND is None:
        return False
    bounds = list(pairwise(accumulate(SIZES, initial=0)))
    try:
        together = getattr(model, verb)(x_ND, **options)
        alone = [getattr(model, verb)(x_ND[start:stop], **options) for start, stop in bounds]
    except Exception as error:  # its own samples are no data to it; the verb is there all the same
        logger.warning("%s is computed one by one: it could not be tried (%s)", verb, error)
        return False
    is_same = all(_same_bytes(together[start:stop], own) for (start, stop), own in zip(bounds, alone, strict=True))
    if not is_same:
        logger.warning("%s is computed one by one: rows of several requests are not the same bytes on this machine", verb)
    return is_same


def _same_bytes(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and np.asarray(a).tobytes() == np.asarray(b).tobytes()
