"""What a hosted model answers, refuses and computes at once: the bytes of `gendist.load`, in any order and company."""

from __future__ import annotations

import asyncio
import json
import logging
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import gendist
from gendist.artifact import Artifact, save
from gendist.config import family_class
from gendist.data import Schema
from gendist.data.coordinates import Whitened
from gendist.data.transforms import Step, Transforms
from gendist.models.gmm import GaussianMixture
from gendist.models.ops.tiles import TILE
from gendist.protocols import VERBS, UserError
from gendist.serve import checks, trial
from gendist.serve.batcher import Batcher, Left
from gendist.serve.hosted_model import TILE_ROWS, DataCall, HostedModel, InvalidCall, SampleCall, compute, together
from gendist.serve.limits import Limits
from gendist.transformed import Transformed

EVERY_FAMILY = ["labelled_gmm", "gmm", "hmm", "naive_bayes", "labelled_vae", "vae_of_images", "gan"]
JOINING = ["labelled_vae", "vae_of_images", "gan"]
# Networks whose layers are wide enough for rows to be the same bytes wherever in a tile they lie, on the processors known.
WIDE = {
    "wide_vae": ("vae", {"latent_dim": 3, "likelihood": "gaussian", **dict.fromkeys(("encoder", "decoder", "classifier"))}),
    "vae_behind_transforms": ("vae", {"latent_dim": 3, "likelihood": "gaussian", **dict.fromkeys(("encoder", "decoder"))}),
    "wide_gan": ("gan", {"latent_dim": 3, "labels": "condition", **dict.fromkeys(("generator", "discriminator"))}),
}


@pytest.fixture(scope="session")
def hosted_models(artifacts: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, HostedModel]:
    paths, folder = dict(artifacts), tmp_path_factory.mktemp("wide")
    for name, (family, config) in WIDE.items():
        cls: Any = family_class(family)
        own = cls.Config.model_validate(
            {key: {"hidden_sizes": [32]} if value is None else value for key, value in config.items()}
        )
        model, prior = cls.create(own, (24,), ("a", "b"), seed=0), None
        names = tuple(f"x_{i}" for i in range(24))
        if name == "vae_behind_transforms":
            mixture = GaussianMixture.from_parameters([0.3, 0.7], [[0, 1, 2], [2, 1, 0]], [np.eye(3), 0.1 * np.eye(3)])
            prior = Artifact("gmm", mixture, Schema(columns=names[:3], feature_names=names[:3]))
            rotation = torch.from_numpy(np.linalg.qr(np.random.default_rng(1).normal(size=(24, 24)))[0])
            whitened = Whitened(torch.arange(24.0, dtype=torch.float64), rotation, torch.full((24,), 3.0, dtype=torch.float64))
            transforms = Transforms(names, (Step.model_validate("whiten"),), (whitened,))
            model = Transformed(model.with_prior(mixture), transforms)
        save(Artifact(family, model, Schema(columns=names, feature_names=names), prior), folder / name)
        paths[name] = folder / name
    return {name: HostedModel(name, path) for name, path in paths.items()}


@pytest.fixture(params=[*EVERY_FAMILY, *WIDE])
def hosted(request, hosted_models) -> HostedModel:
    return hosted_models[request.param]


def in_bytes(answer: Any) -> list[tuple[str, list[tuple[Any, ...]]]]:
    """All of an answer, comparable."""
    assert not isinstance(answer, Exception), repr(answer)
    return [
        (name, [(each.dtype.str, each.shape, each.tobytes()) for each in (array if isinstance(array, list) else [array])])
        for name, array in sorted(answer.items())
    ]


def rows_of(hosted: HostedModel, num_rows: int, seed: int = 0) -> Any:
    """x that the model may have seen: (N, D), or a list of sequences of 1 to 6 steps."""
    x = np.asarray(hosted.model.sample(num_rows, seed=seed, **({"length": 6} if hosted.takes_sequences else {})), np.float64)
    return [x_TD[: 1 + i % 6] for i, x_TD in enumerate(x)] if hosted.takes_sequences else x


def latents_of(hosted: HostedModel, num_rows: int) -> np.ndarray:
    width = hosted.description()["latent_width"]
    return np.random.default_rng(0).dirichlet(np.ones(width), num_rows)


def call_of(hosted: HostedModel, verb: str, num_rows: int, **options: Any) -> Any:
    """A checked call of any verb."""
    if verb == "sample":
        return hosted.check(SampleCall(num_rows, 5))
    if verb in hosted.trial.needs_given:
        options = {"given": hosted.conditions[0], **options}
    x = latents_of(hosted, num_rows) if verb == "decode" else rows_of(hosted, num_rows)
    return hosted.check(DataCall(verb, x, options))


# What it is


def test_its_description_can_be_told_in_json(hosted):
    description = json.loads(json.dumps(hosted.description(), allow_nan=False))
    assert set(description["verbs"]) | set(description["not_offered"]) == set(VERBS)
    assert not set(description["verbs"]) & set(description["not_offered"])
    assert description["num_features"] == len(description["columns"])
    assert description["digest"] == hosted.digest


def test_every_verb_is_offered_or_told_why_not(hosted):
    for verb in VERBS:
        assert (hosted.why_not(verb) is None) == (verb in hosted.verbs)


def test_networks_are_joined_where_the_bytes_are_the_same(hosted_models):
    """For others, and on a processor where they are not, requests are computed one by one, and all the rest holds the same."""
    for name, hosted in hosted_models.items():
        could = hasattr(hosted.model, "sample_together")
        assert could == (name in [*JOINING, *WIDE])
        assert could or not hosted.trial.joined
        for verb, description in hosted.description()["verbs"].items():
            assert description["is_joined"] == (hosted.work_of(call_of(hosted, verb, 2)).key is not None)
    for name, verbs in (("wide_vae", {"sample", "encode", "decode", "classify", "reconstruct"}),
                        ("wide_gan", {"sample", "encode", "decode"})):  # fmt: skip
        assert hosted_models[name].trial.joined in (verbs, set())


@pytest.mark.parametrize("name", JOINING)
def test_where_joined_samples_are_other_bytes_requests_are_computed_one_by_one(name, artifacts, monkeypatch, caplog):
    family = type(HostedModel(name, artifacts[name]).model)
    exact = family.sample_together

    def inexact(model: Any, addresses: Any) -> Any:
        return [x * (1.0 + 2.0**-23) for x in exact(model, addresses)]

    monkeypatch.setattr(family, "sample_together", inexact)
    with caplog.at_level(logging.WARNING, "gendist"):
        hosted = HostedModel(name, artifacts[name])
    assert "one by one" in caplog.text
    assert not hosted.trial.joined
    assert hosted.work_of(SampleCall(3, 0)).key is None
    assert not hosted.description()["verbs"]["sample"]["is_joined"]


def test_a_model_that_makes_no_sample_cannot_be_served(artifacts, monkeypatch):
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of order")

    monkeypatch.setattr(type(gendist.load(artifacts["gmm"]).plain), "sample", broken)
    with pytest.raises(UserError, match="out of order"):
        HostedModel("gmm", artifacts["gmm"])


# Answers


def test_a_sample_is_that_of_the_model_with_what_it_was_drawn_from(hosted):
    answer = hosted.answer(hosted.check(SampleCall(17, 3, offset=5)))
    loaded = hosted.model
    x = np.asarray(loaded.sample(17, seed=3, offset=5))
    assert np.asarray(answer["x"]).tobytes() == x.tobytes()
    assert ("state" in answer) == hosted.takes_sequences
    if "label" in answer:
        assert answer["label"].tolist() == loaded.sample_classes(17, seed=3, offset=5).tolist()
    if "state" in answer:
        assert answer["state"].tolist() == loaded.sample_states(17, seed=3, offset=5).tolist()


def test_a_verb_of_data_is_that_of_the_model(hosted):
    loaded = hosted.model
    for verb in set(hosted.verbs) - {"sample"}:
        call = call_of(hosted, verb, 9)
        expected = getattr(loaded, verb)(call.x, **call.options)
        values = hosted.answer(call)[verb]
        for own, theirs in zip(values, expected, strict=True):
            assert np.asarray(own).tobytes() == np.asarray(theirs).tobytes()


def test_chunks_make_up_the_answer(hosted):
    """A sample exactly; of other verbs what a row comes to may depend, in its last digits, on where the chunk is cut, but never
    on anything beside the call."""
    many = 2 * hosted.chunk_rows + 3 if hosted.chunk_rows < 1000 else 700
    options = {"length": 3} if hosted.takes_sequences else {}
    call = hosted.check(SampleCall(many, 11, offset=7, **options))
    whole = np.asarray(hosted.model.sample(many, seed=11, offset=7, **options))
    answer = together([hosted.answer(chunk) for chunk in hosted.chunks(call)])
    assert answer["x"].tobytes() == whole.tobytes()
    assert sum(chunk.num_samples for chunk in hosted.chunks(call)) == many


@pytest.mark.parametrize("name", JOINING)
def test_chunks_of_data_are_whole_tiles_and_rows_keep_their_noise(name, hosted_models):
    hosted = hosted_models[name]
    assert hosted.chunk_rows % TILE == 0
    num_rows = 2 * hosted.chunk_rows + 5
    for verb in set(hosted.verbs) - {"sample"}:
        extra = {option: 3 for option in ("seed", "offset", "num_samples") if option in hosted.trial.options[verb]}
        call = call_of(hosted, verb, num_rows, **extra)
        chunks = list(hosted.chunks(call))
        step = TILE if "num_samples" in extra else hosted.chunk_rows
        assert [len(chunk.x) for chunk in chunks] == [min(step, num_rows - first) for first in range(0, num_rows, step)]
        answer = together([hosted.answer(chunk) for chunk in chunks])
        assert in_bytes(answer) == in_bytes(hosted.answer(call))


def test_a_label_for_each_row_goes_with_its_row(hosted_models):
    hosted = hosted_models["labelled_vae"]
    num_rows = hosted.chunk_rows + 9
    labels = [hosted.conditions[i % 3] for i in range(num_rows)]
    call = hosted.check(DataCall("encode", rows_of(hosted, num_rows), {"given": labels}))
    answer = together([hosted.answer(chunk) for chunk in hosted.chunks(call)])
    assert answer["encode"].tobytes() == hosted.model.encode(call.x, given=labels).numpy().tobytes()


def test_sequences_of_unequal_lengths_come_back_as_they_are(hosted_models):
    hosted = hosted_models["hmm"]
    sequences = rows_of(hosted, 7)
    gappy = [x.copy() for x in sequences]
    gappy[5][2, 1] = np.nan
    filled = hosted.answer(hosted.check(DataCall("impute", gappy)))["impute"]
    assert [each.shape for each in filled] == [each.shape for each in sequences]
    assert np.isfinite(np.concatenate(filled)).all()
    assert hosted.answer(hosted.check(DataCall("log_prob", sequences)))["log_prob"].shape == (7,)


def test_a_long_list_of_sequences_is_cut_by_its_steps(hosted_models, monkeypatch):
    hosted = hosted_models["hmm"]
    monkeypatch.setattr("gendist.serve.hosted_model.CHUNK_VALUES", 20)  # 10 steps of 2 features
    sequences = rows_of(hosted, 13)
    call = hosted.check(DataCall("log_prob", sequences))
    chunks = list(hosted.chunks(call))
    assert len(chunks) > 1
    assert all(sum(map(len, chunk.x)) <= 10 for chunk in chunks)
    answer = together([hosted.answer(chunk) for chunk in chunks])
    np.testing.assert_allclose(answer["log_prob"], hosted.model.log_prob(sequences), rtol=1e-12)


def test_images_are_taken_as_images(hosted_models):
    hosted = hosted_models["vae_of_images"]
    x = rows_of(hosted, 3)
    images = hosted.check(DataCall("encode", x.reshape(3, *hosted.description()["image_shape"])))
    assert in_bytes(hosted.answer(images)) == in_bytes(hosted.answer(hosted.check(DataCall("encode", x))))


def test_components_and_responsibilities_can_be_decoded(hosted_models):
    hosted = hosted_models["gmm"]
    numbers = hosted.answer(hosted.check(DataCall("decode", [1.0, 0.0])))["decode"]
    np.testing.assert_array_equal(numbers, hosted.model.means[[1, 0]])


# In company


class _Fails:
    """A payload's model that computes nothing."""

    def __init__(self, hosted: HostedModel) -> None:
        self._hosted = hosted

    def answers(self, calls: Sequence[Any]) -> Any:
        raise ValueError("out of memory")

    def answer(self, call: Any) -> Any:
        return self._hosted.answer(call)


def test_where_calls_cannot_be_computed_together_only_the_one_at_fault_fails(hosted_models):
    """LitServe #340, seen from the model."""
    hosted = hosted_models["labelled_vae"]
    calls = [hosted.check(SampleCall(3, seed)) for seed in (1, 2)]
    bad = SampleCall(3, 1, given="nobody")  # which no check would let through
    answers = compute(("labelled_vae", "sample"), [(hosted, each) for each in (calls[0], bad, calls[1])])
    assert isinstance(answers[1], UserError)
    assert [in_bytes(answers[0]), in_bytes(answers[2])] == [in_bytes(hosted.answer(call)) for call in calls]
    broken: Any = _Fails(hosted)
    again = compute(("labelled_vae", "sample"), [(broken, call) for call in calls])
    assert [in_bytes(each) for each in again] == [in_bytes(hosted.answer(call)) for call in calls]


def some_call(hosted: HostedModel, rng: random.Random, x: Any) -> Any:
    seed, offset, num_rows = rng.choice([3, 2**64 - 1, rng.getrandbits(40)]), rng.choice([0, 61, 2**40]), rng.randrange(1, 25)
    given = rng.choice([None, *hosted.conditions])
    if rng.random() < 0.7:
        length = rng.choice([None, 1, 4]) if hosted.takes_sequences else None
        return hosted.check(SampleCall(num_rows, seed, offset, given, length))
    verb = rng.choice([verb for verb in hosted.verbs if verb != "sample"])
    start = rng.randrange(40)
    return call_of(hosted, verb, num_rows) if verb == "decode" else hosted.check(
        DataCall(verb, x[start : start + num_rows], {"given": hosted.conditions[0]} if verb in hosted.trial.needs_given else {})
    )  # fmt: skip


def test_a_thousand_requests_in_any_order_and_company_are_the_bytes_of_each_alone(hosted_models):
    rng = random.Random(0)
    x = {name: rows_of(hosted, 64) for name, hosted in hosted_models.items()}
    calls = [
        (hosted_models[name], some_call(hosted_models[name], rng, x[name]))
        for name in rng.choices([*EVERY_FAMILY, *WIDE], k=1000)
    ]
    alone = [in_bytes(hosted.answer(call)) for hosted, call in calls]
    left: list[Left] = []

    async def all_at_once(order: Sequence[int], num_clients: int) -> dict[int, Any]:
        batcher, answers, todo = Batcher(compute, Limits(queue_rows=10**6), left.append), {}, iter(order)

        async def client() -> None:
            for index in todo:
                hosted, call = calls[index]
                answers[index] = in_bytes(await batcher.result(hosted.work_of(call)))

        await asyncio.wait_for(asyncio.gather(*(client() for _ in range(num_clients))), 120.0)
        await batcher.close()
        return answers

    for num_clients, num_calls in ((9, 300), (200, 1000)):
        order = rng.sample(range(len(calls)), num_calls)
        answers = asyncio.run(all_at_once(order, num_clients))
        assert all(answers[index] == alone[index] for index in order)
    if any(hosted.trial.joined for hosted in hosted_models.values()):
        assert max(each.num_works for each in left if each.key is not None) > 4  # they were in company


# Checks


BAD_SAMPLES = [
    ("labelled_gmm", SampleCall(0, 1), "num_samples", "1 to 1000000"),
    ("labelled_gmm", SampleCall(10**12, 1), "num_samples", "1 to 1000000"),
    ("labelled_gmm", SampleCall(1, -1), "seed", str(2**64 - 1)),
    ("labelled_gmm", SampleCall(1, 2**64), "seed", str(2**64 - 1)),
    ("labelled_gmm", SampleCall(1, 10**5000), "seed", str(2**64 - 1)),
    ("labelled_gmm", SampleCall(1, True), "seed", str(2**64 - 1)),
    ("labelled_gmm", SampleCall(1, 1, offset=2**60), "offset", str(2**53)),
    ("labelled_gmm", SampleCall(1, 1, given="nobody"), "given", "left, right"),
    ("labelled_gmm", SampleCall(1, 1, given=["left"]), "given", "left, right"),
    ("labelled_gmm", SampleCall(1, 1, given="x" * 10**6), "given", "left, right"),
    ("labelled_gmm", SampleCall(1, 1, length=3), "length", None),
    ("gmm", SampleCall(1, 1, given=2), "given", "0 to 1"),
    ("hmm", SampleCall(1, 1, length=0), "length", "1 to 100000"),
    ("hmm", SampleCall(1, 1, length=100_001), "length", "1 to 100000"),
    ("hmm", SampleCall(20, 1, length=100_000), "num_samples", "1 to 10"),
    ("hmm", SampleCall(1, 1, given="nobody"), "given", None),
    ("vae_of_images", SampleCall(1, 1, given=0), "given", None),
    ("gan", SampleCall(1, 1, given="nobody"), "given", "a, b"),
]


@pytest.mark.parametrize(("name", "call", "field", "allowed"), BAD_SAMPLES)
def test_a_sample_that_cannot_be_is_refused_with_what_is_allowed(name, call, field, allowed, hosted_models):
    with pytest.raises(InvalidCall) as refused:
        hosted_models[name].check(call)
    assert refused.value.field == field
    assert len(str(refused.value)) < 500
    if allowed is not None:
        assert allowed in refused.value.allowed


NAN, INF = float("nan"), float("inf")
BAD_DATA = [
    ("gmm", DataCall("log_prob", [[1.0, 2.0, 3.0]]), "x", "(N, 2)"),
    ("gmm", DataCall("log_prob", [[1.0, 2.0], [INF, 1.0]]), "x", "finite"),
    ("gmm", DataCall("log_prob", [[1.0, 2.0], [3.0]]), "x", "numbers"),
    ("gmm", DataCall("log_prob", [["a", "b"]]), "x", "numbers"),
    ("gmm", DataCall("log_prob", [[10**30, 1]]), "x", "numbers"),
    ("gmm", DataCall("log_prob", []), "x", "(N, 2)"),
    ("gmm", DataCall("log_prob", np.zeros((0, 2))), "x", "1 row"),
    ("gmm", DataCall("log_prob", 3.0), "x", "numbers"),
    ("gmm", DataCall("log_prob", [[1.0, 2.0]], {"seed": 1}), "seed", "no options"),
    ("gmm", DataCall("impute", [[1.0, NAN]], {"seed": 2**64}), "seed", str(2**64 - 1)),
    ("gmm", DataCall("impute", [[1.0, NAN]], {"given": 0}), "given", "seed, offset"),
    ("gmm", DataCall("decode", [[1.0, 0.0, 0.0]]), "z", "(N, 2)"),
    ("gmm", DataCall("decode", [0, 2]), "z", "0 to 1"),
    ("gmm", DataCall("decode", [[NAN, 1.0]]), "z", "finite"),
    ("gmm", DataCall("decode", [[1.0, 0.0], [1e308, 1e308]]), "z", "-1e+75 to 1e+75"),
    ("vae_of_images", DataCall("decode", [[0.0, -1e39, 0.0]]), "z", "to 3.40282e+38"),
    ("gmm", DataCall("reconstruct", [[1.0, 2.0]]), "verb", "log_prob"),
    ("hmm", DataCall("log_prob", [[[1.0, 2.0, 3.0]]]), "x", "(T, 2)"),
    ("hmm", DataCall("log_prob", [[[1.0, 2.0]], np.zeros((0, 2))]), "x", "steps"),
    ("hmm", DataCall("log_prob", [np.zeros((100_001, 2))]), "x", "100000"),
    ("hmm", DataCall("log_prob", np.zeros((3, 2))), "x", "sequences"),
    ("vae_of_images", DataCall("encode", np.full((2, 24), NAN)), "x", "finite"),
    ("labelled_vae", DataCall("log_prob_bound", np.zeros((1, 4)), {"num_samples": 0}), "num_samples", "1 to 1000"),
    ("labelled_vae", DataCall("log_prob_bound", np.zeros((1, 4)), {"num_samples": 10**9}), "num_samples", "1 to 1000"),
    ("labelled_vae", DataCall("log_prob_bound", np.zeros((1001, 4)), {"num_samples": 1000}), "num_samples", "1 to 999"),
    ("labelled_vae", DataCall("log_prob_bound", np.zeros((20_000, 4))), "num_samples", "1 to 50"),  # where 100 is usual
    ("hmm", DataCall("impute", [np.zeros((60_000, 2))] * 2, {"seed": 1}), "x", "1 to 100000"),
    ("labelled_vae", DataCall("elbo", np.zeros((1, 4)), {"offset": -1}), "offset", "0 to"),
    ("labelled_vae", DataCall("encode", np.zeros((2, 4)), {"given": ["0"]}), "given", "one for each"),
    ("labelled_vae", DataCall("encode", np.zeros((2, 4)), {"given": ["0", "nobody"]}), "given", "0, 1, 2"),
    ("gan", DataCall("decode", np.zeros((2, 3))), "given", "a, b"),
]


@pytest.mark.parametrize(("name", "call", "field", "allowed"), BAD_DATA)
def test_data_that_cannot_be_are_refused_with_what_is_allowed(name, call, field, allowed, hosted_models):
    with pytest.raises(InvalidCall) as refused:
        hosted_models[name].check(call)
    assert refused.value.field == field
    assert allowed in refused.value.allowed


def test_the_row_of_a_bad_entry_is_told(hosted_models):
    x = np.zeros((5, 24))
    x[3, 1] = NAN
    with pytest.raises(InvalidCall, match="row 3"):
        hosted_models["vae_of_images"].check(DataCall("encode", x))
    with pytest.raises(InvalidCall, match="sequence 1, step 2"):
        hosted_models["hmm"].check(DataCall("log_prob", [np.zeros((2, 2)), np.array([[0.0, 0], [0, 0], [INF, 0]])]))


@pytest.mark.parametrize(
    ("name", "entry", "allowed"),
    [
        ("vae_of_images", 7.0, "0 to 1"),
        ("naive_bayes", -1.0, "0 and more"),
        ("naive_bayes", 0.5, None),  # of the column of categories
        ("labelled_vae", 1e39, "complete rows"),  # infinite in the network's float32
        ("gan", -1.0, "0 to 1"),
        ("logarithms", -2.0, None),
    ],
)
def test_a_row_that_is_none_of_the_models_is_refused_before_anything_is_computed(name, entry, allowed, hosted_models, tmp_path):
    if name == "logarithms":
        frame = pd.DataFrame({"a": np.arange(1.0, 30.0), "b": np.arange(30.0, 1.0, -1.0)})
        spec = {"name": name, "family": "gmm", "model": {"num_components": 1}, "data": {"transforms": ["log1p"]}}
        gendist.fit(spec, data=frame, run_dir=tmp_path)
        hosted = HostedModel(name, tmp_path)
    else:
        hosted = hosted_models[name]
    x = rows_of(hosted, hosted.chunk_rows + 2)
    for verb in set(hosted.verbs) - {"sample", "decode"}:
        options = {"given": hosted.conditions[0]} if verb in hosted.trial.needs_given else {}
        hosted.check(DataCall(verb, x, options))
        bad = x.copy()
        bad[-1, 0] = entry  # in the second chunk
        with pytest.raises(InvalidCall) as refused:
            hosted.check(DataCall(verb, bad, options))
        assert refused.value.field == "x"
        assert allowed is None or allowed in refused.value.allowed


@pytest.mark.parametrize("is_by_class", [False, True])
def test_a_step_that_is_none_of_the_models_is_refused_before_anything_is_computed(is_by_class, tmp_path):
    frame = pd.DataFrame({"letter": list("abcab" * 6), "id": np.arange(30) // 5})
    frame["y"] = frame["id"] % 2
    model = {"num_states": 2, "emission": {"kind": "categorical"}, **({"labels": "classes"} if is_by_class else {})}
    data = {"columns": ["letter"], "sequence": "id", **({"label": "y"} if is_by_class else {})}
    spec = {"name": "letters", "family": "hmm", "model": model, "data": data, "fit": {"max_iterations": 2}}
    gendist.fit(spec, data=frame, run_dir=tmp_path)
    hosted = HostedModel("letters", tmp_path)
    x = rows_of(hosted, 40)
    hosted.check(DataCall("log_prob", x))
    x[-1] = np.full_like(x[-1], -1.0)
    with pytest.raises(InvalidCall) as refused:
        hosted.check(DataCall("log_prob", x))
    assert (refused.value.field, refused.value.allowed) == ("x", "categorical columns hold 0 and more")


def test_a_limit_on_rows_is_one_on_steps_of_sequences(hosted_models):
    limits = Limits(max_rows=10)
    for name, x in (("gmm", np.zeros((11, 2))), ("hmm", [np.zeros((6, 2)), np.zeros((5, 2))])):
        with pytest.raises(InvalidCall, match="11"):
            hosted_models[name].check(DataCall("log_prob", x), limits)


def test_missing_entries_are_taken_where_the_family_takes_them(hosted):
    for verb in set(hosted.verbs) - {"sample", "decode"}:
        x = rows_of(hosted, 3)
        x[0][..., 0] = np.nan
        options = {"given": hosted.conditions[0]} if verb in hosted.trial.needs_given else {}
        if verb in hosted.trial.takes_missing:
            assert len(hosted.answer(hosted.check(DataCall(verb, x, options)))[verb]) == 3
        else:
            with pytest.raises(InvalidCall, match="complete rows"):
                hosted.check(DataCall(verb, x, options))
    assert ("impute" in hosted.trial.takes_missing) == ("impute" in hosted.verbs)


def test_a_work_counts_steps_of_sequences_and_bytes_in_and_out(hosted_models):
    gmm, hmm = hosted_models["gmm"], hosted_models["hmm"]
    assert gmm.work_of(SampleCall(7, 0)).num_rows == 7
    assert gmm.work_of(SampleCall(7, 0)).num_bytes == 7 * 2 * 8
    assert hmm.work_of(SampleCall(7, 0, length=11)).num_rows == 77
    at_once, one_by_one = (hmm.work_of(SampleCall(n, 0, length=length)) for n, length in ((40, 1), (1, 40)))
    assert at_once.num_rows == one_by_one.num_rows
    assert at_once.cost != one_by_one.cost, "steps are taken one after the other"
    work = hmm.work_of(hmm.check(DataCall("log_prob", [np.zeros((3, 2)), np.zeros((4, 2))])))
    assert (work.num_rows, work.num_bytes) == (7, 7 * 3 * 8)


@pytest.mark.parametrize(("options", "many"), [({"num_samples": 3}, 3), ({"num_samples": 70}, 70), ({}, 100)])
def test_a_bound_is_cut_and_counted_by_the_samples_of_its_rows(options, many, hosted_models):
    hosted = hosted_models["labelled_vae"]
    call = hosted.check(DataCall("log_prob_bound", rows_of(hosted, 200), {"seed": 3, **options}))
    chunks = list(hosted.chunks(call))
    for chunk in chunks:
        assert hosted.work_of(chunk).num_rows == len(chunk.x) * many
        assert len(chunk.x) * many <= hosted.chunk_rows or len(chunk.x) <= TILE
    assert hosted.chunk_rows % TILE_ROWS == 0
    assert TILE_ROWS == TILE
    assert in_bytes(together([hosted.answer(chunk) for chunk in chunks])) == in_bytes(hosted.answer(call))


def test_a_bound_over_many_classes_has_fewer_samples_of_each(hosted_models, monkeypatch):
    monkeypatch.setattr(checks, "MAX_OVER_CLASSES", 1500)
    hosted, options = hosted_models["labelled_vae"], {"num_samples": 1000}
    with pytest.raises(InvalidCall) as refused:
        hosted.check(DataCall("log_prob_bound", rows_of(hosted, 1), options))
    assert refused.value.allowed == "1 to 500"
    hosted.check(DataCall("log_prob_bound", rows_of(hosted, 1), {**options, "given": 0}))


def test_it_was_tried_with_requests_that_share_tiles_and_cross_them():
    assert sum(trial.SIZES) > TILE
    assert any(start % TILE + size > TILE for start, size in zip(np.cumsum((0, *trial.SIZES)), trial.SIZES, strict=False))
