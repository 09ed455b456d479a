"""Whole fits of hidden Markov models: sequences of any length, cut or not, on any workers, with labels of steps and of all."""

from __future__ import annotations

import functools
import hashlib
import itertools
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import norm
from sklearn.datasets import load_digits

import gendist
from gendist.config import load_spec
from gendist.models.distributions.gaussian import Gaussian
from gendist.models.distributions.gaussian_emission import GaussianEmission
from gendist.models.hmm import HiddenMarkovModel, HiddenMarkovModelConfig
from gendist.noise import Noise
from gendist.protocols import Block, Compute, UserError

MEANS = np.array([[-4.0, 0.0], [0.0, 3.0], [4.0, 0.0]])
TRANSITIONS = np.array([[0.95, 0.04, 0.01], [0.02, 0.9, 0.08], [0.05, 0.05, 0.9]])
SPEC = {
    "name": "walks",
    "family": "hmm",
    "model": {"num_states": 3},
    "fit": {"max_iterations": 5, "tolerance": 0.0, "checkpoint_every": 2},
}


def walk(length: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """x (T, 2) and the states (T,) of a chain whose parameters are above."""
    rng = np.random.default_rng(seed)
    states, cumulative = np.zeros(length, dtype=int), TRANSITIONS.cumsum(1)
    for t, u in enumerate(rng.random(length - 1)):
        states[t + 1] = min(int(np.searchsorted(cumulative[states[t]], u)), 2)
    return MEANS[states] + rng.normal(size=(length, 2)), states


@pytest.fixture(scope="module")
def walks() -> list[np.ndarray]:
    """One that lies in several blocks, and others that lie in one together, an empty one included."""
    x, _ = walk(330_000, 0)
    return [x[:20_000], x[20_000:320_000], x[:0], x[320_000:320_001], x[320_001:]]


@pytest.fixture(scope="module")
def unbroken(walks, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "unbroken"
    gendist.fit(SPEC, data=walks, run_dir=path)
    return path


def sha256(run_dir: Path) -> str:
    return hashlib.sha256((run_dir / "artifact" / "model.safetensors").read_bytes()).hexdigest()


def test_it_finds_what_made_the_sequences(unbroken, walks):
    run = gendist.load(unbroken)
    order = torch.cdist(torch.from_numpy(MEANS), run.emission.means).argmin(1)
    np.testing.assert_allclose(run.emission.means[order], MEANS, atol=0.03)
    np.testing.assert_allclose(run.transition_matrix[order][:, order], TRANSITIONS, atol=0.01)


def test_what_a_run_says_of_its_sequences_is_what_the_model_says(unbroken, walks):
    """The run has the long one in pieces, the model all of it at once."""
    run = gendist.fit(SPEC, data=walks, run_dir=unbroken)
    total = float(run.model.log_prob(walks).sum())
    assert run.results["log_likelihood"] == pytest.approx(total / 330_000, rel=1e-11)
    assert run.model.length == 1000  # of a sample that nobody says the length of; the sequences are longer
    assert run.results["iterations_that_fell"] == []


@pytest.mark.ray
@pytest.mark.parametrize("num_workers", [1, 2, 4])
def test_any_number_of_workers_gives_the_same_bytes(cluster, walks, unbroken, tmp_path, num_workers):
    gendist.fit({**SPEC, "cluster": {"num_workers": num_workers}}, data=walks, run_dir=tmp_path / "run")
    assert sha256(tmp_path / "run") == sha256(unbroken)


class Stop(Exception):
    pass


@pytest.mark.parametrize("stop_at", [1, 2, 4])
def test_an_interrupted_fit_goes_on_to_the_same_bytes(walks, unbroken, tmp_path, stop_at):
    def stop(record):
        if record["iteration"] == stop_at:
            raise Stop

    with pytest.raises(Stop):
        gendist.fit(SPEC, data=walks, run_dir=tmp_path / "run", watch=stop)
    gendist.fit(SPEC, data=walks, run_dir=tmp_path / "run")
    assert sha256(tmp_path / "run") == sha256(unbroken)


def steps_frame(states: bool = True) -> tuple[pd.DataFrame, np.ndarray]:
    """Twelve sequences, a step a row; of some steps the state is known."""
    x, truth = zip(*(walk(200 + i, i) for i in range(12)), strict=True)
    of = np.repeat(np.arange(12), [len(each) for each in x])
    frame = pd.DataFrame(np.concatenate(x), columns=["a", "b"]).assign(who=of, day=np.arange(len(of)))
    return frame, np.concatenate(truth)


def test_known_states_are_counted():
    frame, truth = steps_frame()
    frame["state"] = truth
    spec = {**SPEC, "data": {"sequence": "who", "order": "day", "label": "state"}, "fit": {}}
    run = gendist.fit(spec, data=frame)
    counts = np.zeros((3, 3))
    np.add.at(counts, (truth[:-1], truth[1:]), frame["who"].to_numpy()[:-1] == frame["who"].to_numpy()[1:])
    np.testing.assert_allclose(run.model.transition_matrix, counts / counts.sum(1, keepdims=True), rtol=1e-12)
    firsts = np.bincount(truth[np.unique(frame["who"], return_index=True)[1]], minlength=3)
    np.testing.assert_allclose(run.model.initial_probs, firsts / 12, rtol=1e-12)
    np.testing.assert_allclose(run.model.emission.means, frame[["a", "b"]].groupby(truth).mean(), rtol=1e-10)
    assert run.results["stopped"].startswith("counted")
    assert run.model.labels == (0, 1, 2)


def test_some_known_states_tell_the_others_apart():
    frame, truth = steps_frame()
    frame["state"] = np.where(np.random.default_rng(0).random(len(truth)) < 0.03, truth, -1)
    frame["state"] = frame["state"].where(frame["state"] >= 0).map({0: "low", 1: "mid", 2: "high"})
    spec = {**SPEC, "data": {"sequence": "who", "label": "state", "labels": ["low", "mid", "high"], "columns": ["a", "b"]}}
    run = gendist.fit({**spec, "fit": {"max_iterations": 30}}, data=frame)
    paths = run.model.most_likely_states([each[["a", "b"]].to_numpy() for _, each in frame.groupby("who")])
    assert float((torch.cat(paths).numpy() == truth).mean()) > 0.97


@pytest.fixture(scope="module")
def digits() -> gendist.Run:
    return gendist.fit(
        load_spec(Path(__file__).parents[1] / "configs" / "hmm_digits.yaml", ["cluster.num_workers=0", "fit.max_iterations=8"])
    )


def test_a_model_for_each_class_tells_digits_apart(digits):
    embedded = load_digits()
    held_out = (Noise(0, "validation").uniform_of_rows(torch.arange(1797)) < 0.1).numpy()
    classified = digits.model.classify(embedded.images[held_out] / 16.0).argmax(1).numpy()
    assert (classified == embedded.target[held_out]).mean() > 0.93
    assert digits.model.sample(3, seed=1, given=7).shape == (3, 8, 8)
    joint = digits.model.joint_log_prob(embedded.images[:5] / 16.0)
    np.testing.assert_allclose(digits.model.log_prob(embedded.images[:5] / 16.0), joint.logsumexp(1), rtol=1e-12)


def test_what_left_to_right_forbids_stays_zero(digits):
    for model in digits.model.models:
        jump = torch.arange(10)[None, :] - torch.arange(10)[:, None]
        assert not bool(model.transition_matrix[(jump < 0) | (jump > 2)].any())
        assert float(model.initial_probs[0]) == 1.0


def test_sequences_without_a_label_take_part():
    """The log-likelihood of a class-conditional fit is that of the labels and sequences that there are."""
    embedded = load_digits()
    chosen = embedded.target < 3
    images, target = embedded.images[chosen] / 16.0, embedded.target[chosen].astype(float)
    target[np.random.default_rng(0).random(len(target)) < 0.8] = np.nan
    spec = {
        "name": "some",
        "family": "hmm",
        "model": {"num_states": 4, "labels": "classes", "emission": {"covariance_regularization": 1e-2}},
        "data": {"label": "label", "columns": ["image"]},
        "fit": {"max_iterations": 6},
    }
    run = gendist.fit(spec, data={"image": images, "label": target})
    joint = run.model.joint_log_prob(images).numpy()
    known = np.where(np.isnan(target), 0, target).astype(int)
    expected = np.where(np.isnan(target), np.logaddexp.reduce(joint, 1), joint[np.arange(len(joint)), known]).sum()
    assert run.results["log_likelihood"] * len(images) * 8 == pytest.approx(expected, rel=1e-10)
    accuracy = (run.model.classify(images).argmax(1).numpy() == embedded.target[chosen]).mean()
    assert accuracy > 0.8


def test_steps_of_different_classes_in_one_sequence_are_told():
    frame, _ = steps_frame()
    frame["kind"] = np.where(frame["who"] < 6, "early", "late")
    frame.loc[3, "kind"] = None
    spec = {**SPEC, "model": {"num_states": 2, "labels": "classes"}}
    with pytest.raises(UserError, match="row 3 has another label than the first step of its sequence, row 0"):
        gendist.fit({**spec, "data": {"sequence": "who", "label": "kind", "columns": ["a", "b"]}}, data=frame)


def test_behind_transforms_the_density_is_that_of_the_data():
    x, _ = walk(2_000, 5)
    sequences = [10.0 * x[:900] + 3.0, 10.0 * x[900:] + 3.0]
    spec = {**SPEC, "fit": {"max_iterations": 20, "tolerance": 0.0}}
    run = gendist.fit({**spec, "data": {"transforms": ["standardize"]}}, data=sequences)
    total = run.results["log_likelihood"] * 2_000
    np.testing.assert_allclose(float(run.model.log_prob(sequences).sum()), total, rtol=1e-10)
    assert run.model.sample(4, length=6).shape == (4, 6, 2)
    z = [run.model.transforms.forward(torch.from_numpy(each)) for each in sequences]
    inner = float(run.model.model.log_prob(z).sum())
    log_scale = float(torch.from_numpy(np.concatenate(sequences)).std(0, correction=0).log().sum())
    np.testing.assert_allclose(total, inner - 2_000 * log_scale, rtol=1e-10)


def test_missing_steps_are_filled_in_from_their_neighbours():
    x, _ = walk(4_000, 6)
    model = gendist.fit({**SPEC, "fit": {"max_iterations": 20}}, data=[x]).model
    gaps = np.random.default_rng(1).random(4_000) < 0.1
    holed = np.where(gaps[:, None], np.nan, x)
    (filled,) = model.impute([holed])
    np.testing.assert_array_equal(filled[~gaps], x[~gaps])
    expected = (model.encode([holed])[0] @ model.emission.means)[gaps]
    np.testing.assert_allclose(filled[gaps], expected, rtol=1e-9)
    (drawn,) = model.impute([holed], seed=1)
    np.testing.assert_array_equal(drawn[~gaps], x[~gaps])
    assert abs(drawn[gaps].numpy() - x[gaps]).mean() < 3.0  # neighbours say most of it
    assert isinstance(model, HiddenMarkovModel)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"model": {"num_states": 3, "topology": [[1, 1, 0], [0, 0, 0], [1, 0, 1]]}}, "state 1 has no exits"),
        ({"model": {"num_states": 3, "topology": [[1, 1], [1, 1]]}}, "3 x 3"),
        ({"model": {"num_states": 3, "topology": [[1, 2, 0], [1, 1, 1], [1, 1, 1]]}}, "matrix of 0"),
        ({"model": {"num_states": 3, "emission": {"kind": "categorical"}}}, "hold 0 and more"),
        ({"model": {"num_states": 3, "emission": {"kind": "gausian"}}}, "kind"),
        ({"model": {"num_states": 3, "emission": {"covariance": "full"}}}, "covariance"),
        ({"model": {"num_states": 3, "frozen": ["emission"]}}, "fit.init"),
        ({"fit": {"unlabelled_weight": 0.5}}, "unlabelled_weight"),
        ({"data": {"weight": "nobody"}}, "nobody"),
    ],
)
def test_what_cannot_be_fitted_is_told(change, expected):
    with pytest.raises(UserError, match=expected) as told:
        gendist.fit({**SPEC, **change}, data=[walk(50, 0)[0]])
    assert "\n" not in str(told.value)


def test_a_sequence_that_is_not_the_models_is_told(unbroken):
    model = gendist.load(unbroken)
    for wrong, expected in (
        ([np.zeros((3, 2)), np.zeros((4, 3))], "sequence 1 has shape"),
        ([np.array([[np.inf, 0.0]])], "infinite"),
        (np.zeros((2, 3, 4)), "sequence 0"),
    ):
        with pytest.raises(UserError, match=expected):
            model.log_prob(wrong)
    with pytest.raises(UserError, match="length 0"):
        model.sample(3, length=0)
    with pytest.raises(UserError, match="horizon"):
        model.forecast([np.zeros((3, 2))], horizon=0)


@pytest.mark.parametrize("precision", ["float64", "float32"])
@pytest.mark.parametrize("topology", ["left_to_right", "banded"])
def test_cut_sequences_never_reach_what_cannot_be_reached(topology, precision):
    """States lie 8 standard deviations apart, and the data go back, which the chain may not: all of it rests on states that
    the fast recursions have lost."""
    gaussian = Gaussian(torch.tensor([[0.0], [8.0], [16.0]]).double(), torch.ones(3, 1).double(), "diag")
    transitions = [[0.9, 0.1, 0.0], [0.0 if topology == "left_to_right" else 0.1, 0.8, 0.1], [0.0, 0.0, 1.0]]
    transitions = (np.array(transitions) / np.sum(transitions, 1, keepdims=True)).tolist()
    emission = GaussianEmission.of(gaussian)
    config = HiddenMarkovModelConfig(num_states=3, topology=topology, emission=emission.config)
    model = HiddenMarkovModel.from_parameters([1.0, 0.0, 0.0], transitions, emission, config)
    x = torch.from_numpy(np.random.default_rng(0).normal(size=40) + 8 * np.repeat([0, 1, 2, 1], 10))[:, None]
    compute = Compute(precision)

    def block(start: int, stop: int) -> Block:
        bounds = torch.tensor([0, stop - start])
        return Block(x[start:stop], torch.arange(start, stop), sequence_bounds=bounds, open_ends=(start, 40 - stop))

    def e_step(of, cuts):
        parts = [of.e_step(block(start, stop), compute) for start, stop in itertools.pairwise(cuts)]
        return functools.reduce(lambda a, b: a.merge(b), parts)

    whole = e_step(model, [0, 40])
    for cuts in ([0, 20, 40], [0, 15, 30, 40]):
        first = e_step(model, cuts)
        second = e_step(model.m_step(first).redo, cuts)
        tolerance = 1e-9 if precision == "float64" else 1e-4
        assert second.log_likelihood == pytest.approx(whole.log_likelihood, rel=tolerance)
        np.testing.assert_allclose(second.transitions, whole.transitions, atol=tolerance * 40)
        np.testing.assert_allclose(second.emission.counts, whole.emission.counts, atol=tolerance * 40)


def test_from_left_to_right_a_long_sequence_begins_in_equal_parts_of_all_of_it():
    """As many steps as lie in several blocks: the parts are of the sequence, not of a block."""
    x = np.random.default_rng(0).normal(size=80_000) + np.repeat([0.0, 3.0, 0.0, 3.0], 20_000)
    spec = {**SPEC, "model": {"num_states": 4, "topology": "left_to_right"}, "fit": {"max_iterations": 10}}
    run = gendist.fit(spec, data=[x[:, None]])
    np.testing.assert_allclose(run.model.emission.means[:, 0], [0.0, 3.0, 0.0, 3.0], atol=0.1)


def test_a_frozen_zero_under_a_prior_leaves_a_promise_of_what_a_step_gains():
    emission = GaussianEmission.of(Gaussian(torch.tensor([[-1.0], [1.0]]).double(), torch.ones(2, 1).double(), "diag"))
    start = HiddenMarkovModel.from_parameters([1.0, 0.0], [[0.5, 0.5], [0.5, 0.5]], emission)
    sequences = [np.random.default_rng(i).normal(size=(30, 1)) for i in range(5)]
    model = {"num_states": 2, "initial_pseudocount": 1.0, "emission": {"covariance_type": "diag"}}
    for frozen, first in ((["initial_probs"], False), ([], True)):
        run = gendist.fit({**SPEC, "model": {**model, "frozen": frozen}}, data=sequences, init=start)
        gains = [record["least_gain"] for record in run.history]
        assert (gains[0] is None) == first
        assert all(np.isfinite(gain) for gain in gains[1:])


def test_what_is_said_of_counted_sequences_is_of_the_fitted_model():
    frame, truth = steps_frame()
    frame["state"] = truth
    spec = {**SPEC, "data": {"sequence": "who", "label": "state", "columns": ["a", "b"]}, "fit": {}}
    run = gendist.fit(spec, data=frame)
    log_emission = np.log(np.maximum(run.model.transition_matrix.numpy(), 1e-300))
    same = frame["who"].to_numpy()[1:] == frame["who"].to_numpy()[:-1]
    x, means = frame[["a", "b"]].to_numpy(), run.model.emission.gaussian.means.numpy()
    variances = run.model.emission.gaussian.covariances.numpy()
    joint = norm.logpdf(x, means[truth], np.sqrt(variances[truth])).sum()
    joint += log_emission[truth[:-1], truth[1:]][same].sum()
    joint += np.log(run.model.initial_probs.numpy()[truth[np.unique(frame["who"], return_index=True)[1]]]).sum()
    assert run.results["log_likelihood"] * len(frame) == pytest.approx(joint, rel=1e-10)


def test_mixed_columns_of_numbers_find_their_states():
    x, _ = walk(3_000, 3)
    spec = {**SPEC, "model": {"num_states": 3, "emission": {"kind": "mixed"}}, "fit": {"max_iterations": 20}}
    plain = gendist.fit({**spec, "model": {"num_states": 3}}, data=[x])
    mixed = gendist.fit(spec, data=[x])
    assert mixed.results["log_likelihood"] == pytest.approx(plain.results["log_likelihood"], abs=1e-2)


def test_known_states_that_the_topology_forbids_are_told():
    frame, truth = steps_frame()
    frame["state"] = truth
    spec = {**SPEC, "model": {"num_states": 3, "topology": "left_to_right"}, "data": {"sequence": "who", "label": "state"}}
    with pytest.raises(UserError, match=r"what is known of their latents contradicts it .*model\.topology"):
        gendist.fit(spec, data=frame)


def test_of_an_impossible_sequence_nothing_is_no_number():
    emission = GaussianEmission.of(Gaussian(torch.tensor([[0.0], [1.0]]).double(), torch.ones(2, 1).double(), "diag"))
    model = HiddenMarkovModel.from_parameters([0.5, 0.5], [[0.9, 0.1], [0.1, 0.9]], emission)
    for length in (3, 5_000):
        x = np.zeros((length, 1))
        x[1] = 1e200
        for values in (model.encode([x])[0], model.filtered_probs([x])[0], model.forecast([x], 2), model.log_prob([x])):
            assert not bool(values.isnan().any())


def test_verbs_of_sequences_are_there_behind_transforms():
    x, _ = walk(1_000, 8)
    run = gendist.fit({**SPEC, "data": {"transforms": ["standardize"]}, "fit": {"max_iterations": 20}}, data=[10 * x])
    z = run.model.transforms.forward(torch.from_numpy(10 * x))
    assert torch.equal(run.model.most_likely_states([10 * x])[0], run.model.model.most_likely_states([z])[0])
    inside = run.model.model.forecast([z], 3)
    np.testing.assert_allclose(run.model.forecast([10 * x], 3)[0], run.model.transforms.inverse(inside[0]), rtol=1e-12)
    with pytest.raises(AttributeError, match="behind transforms"):
        _ = run.model.transition_matrix


def test_a_start_that_the_topology_does_not_allow_is_refused(walks):
    emission = GaussianEmission.of(Gaussian(torch.zeros(2, 2).double(), torch.ones(2, 2).double(), "diag"))
    model = HiddenMarkovModel.from_parameters([0.0, 1.0], [[1.0, 0.0], [0.0, 1.0]], emission)
    with pytest.raises(UserError, match="begin in"):
        gendist.fit({**SPEC, "model": {"num_states": 2, "topology": "left_to_right"}}, data=[walks[4]], init=model)


@pytest.mark.parametrize(
    ("model", "match"),
    [
        ({"num_states": 50}, "model.num_states is 50, but there are only 40 steps of positive weight to fit; ask for fewer"),
        ({"num_states": 8, "emission": {"num_components": 6}}, "model.num_states is 8, with model.emission.num_components 6"),
    ],
)
def test_more_states_than_steps_are_refused(model, match):
    x = np.random.default_rng(0).normal(size=(60, 2))
    data = {"x": x, "n": np.where(np.arange(60) < 40, 1.0, 0.0), "id": np.arange(60) // 20}
    with pytest.raises(UserError, match=match):
        gendist.fit({**SPEC, "model": model, "data": {"weight": "n", "sequence": "id"}}, data=data)
