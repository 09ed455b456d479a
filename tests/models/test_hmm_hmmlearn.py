"""Hidden Markov models against hmmlearn from the same start, and on data that hmmlearn's users lost their fits to.

Legend: S sequences, T steps, K states, D columns, M components of a mixture.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hmm_blocks import block_of, fitted
from hmm_emissions import (
    COVARIANCE_TYPES,
    emission_of,
    gaussian_emission,
    mixture_emission,
    random_gaussians,
)
from hmmlearn import hmm
from scipy.special import gammaln

import gendist
from gendist.models.distributions.categorical import Categorical
from gendist.models.distributions.columns import Columns, Group
from gendist.models.distributions.multinomial import Multinomial
from gendist.models.distributions.poisson import Poisson
from gendist.models.hmm import HiddenMarkovModel
from gendist.protocols import EXACT

NUM_STATES = 3
NUM_ITERATIONS = 5
LENGTHS = (40, 1, 25, 60, 2, 33)
TOLERANCE = 1e-8
INITIAL = np.array([0.5, 0.3, 0.2])
TRANSITIONS = np.array([[0.8, 0.15, 0.05], [0.1, 0.7, 0.2], [0.25, 0.25, 0.5]])

logging.getLogger("hmmlearn").setLevel(logging.ERROR)  # that MultinomialHMM is another one than it was


@dataclass(frozen=True)
class Pair:
    """hmmlearn's estimator and the same model here.

    parameters    model -> arrays, in the order in which `attributes` names hmmlearn's
    constant      (x) -> what hmmlearn's log-likelihood of all rows has beyond ours
    """

    estimator: Any
    model: HiddenMarkovModel
    sequences: list[np.ndarray]
    attributes: tuple[str, ...]
    parameters: Callable[[HiddenMarkovModel], list[Any]]
    constant: Callable[[np.ndarray], float] = lambda x: 0.0

    @property
    def rows(self) -> np.ndarray:
        return np.concatenate(self.sequences)


def configured(estimator: Any, **parameters: Any) -> Any:
    estimator.set_params(n_components=NUM_STATES, init_params="", n_iter=NUM_ITERATIONS)
    estimator.monitor_.tol = -np.inf  # so that it makes all iterations
    for name, value in {"startprob_": INITIAL, "transmat_": TRANSITIONS, **parameters}.items():
        setattr(estimator, name, np.array(value))
    return estimator


def sequences_of(model: HiddenMarkovModel) -> list[np.ndarray]:
    return [model.sample(1, seed=seed, length=length)[0].numpy() for seed, length in enumerate(LENGTHS)]


def model_of(emission: Any) -> HiddenMarkovModel:
    return HiddenMarkovModel.from_parameters(torch.tensor(INITIAL), torch.tensor(TRANSITIONS), emission)


def gaussian_pair(kind: str) -> Pair:
    """With hmmlearn's priors switched off: what is left of its M-step is the maximum of the likelihood. (A weight of the
    covariances of 1 takes nothing from the count that they are divided by.)"""
    means, covariances, _ = random_gaussians(np.random.default_rng(3), NUM_STATES, kind)
    estimator = hmm.GaussianHMM(
        covariance_type=kind, min_covar=0.0, covars_prior=0.0, covars_weight=1.0, means_weight=0.0, means_prior=0.0
    )
    start = model_of(gaussian_emission(means + 0.4, 1.5 * covariances, kind))
    estimator = configured(estimator, means_=means + 0.4)
    estimator.covars_ = 1.5 * covariances
    sequences = sequences_of(model_of(gaussian_emission(means, covariances, kind)))

    def parameters(model: HiddenMarkovModel) -> list[Any]:
        return [model.emission.gaussian.means, as_hmmlearn(model.emission.gaussian.covariances, kind)]

    return Pair(estimator, start, sequences, ("means_", "covars_"), parameters)


def as_hmmlearn(covariances: Any, kind: str) -> np.ndarray:
    """hmmlearn hands out a matrix for each state, whatever the type."""
    covariances, identity = np.asarray(covariances), np.eye(2)
    if kind == "tied":
        return np.stack([covariances] * NUM_STATES)
    if kind == "diag":
        return covariances[:, :, None] * identity
    return covariances if kind == "full" else covariances[:, None, None] * identity


def of_states(estimator: Any, name: str) -> np.ndarray:
    """(K, ...) of a fitted estimator, which repeats a spherical covariance for each column."""
    values = getattr(estimator, name)
    return values[:: len(values) // NUM_STATES]


def columns_of(kind: str, distribution: Any) -> Columns:
    return Columns((Group(kind, torch.arange(distribution.num_features), distribution),))


def categorical_pair() -> Pair:
    rng = np.random.default_rng(4)

    def emission(probs: np.ndarray) -> Columns:
        return columns_of("categorical", Categorical(torch.tensor(probs), torch.tensor([5]), has_unseen=False))

    true, start = rng.dirichlet(np.ones(5), NUM_STATES), rng.dirichlet(np.full(5, 5.0), NUM_STATES)
    sequences = sequences_of(model_of(emission(true)))
    estimator = configured(hmm.CategoricalHMM(n_features=5), emissionprob_=start)
    parameters = lambda model: [model.emission.groups[0].distribution.probs]  # noqa: E731
    return Pair(estimator, model_of(emission(start)), sequences, ("emissionprob_",), parameters)


def multinomial_pair() -> Pair:
    """hmmlearn's density is that of counts, ours of tokens in one order: they differ by the multinomial coefficient, in which
    no parameter occurs."""
    rng = np.random.default_rng(5)

    def emission(probs: np.ndarray) -> Columns:
        return columns_of("multinomial", Multinomial(torch.tensor(probs), torch.tensor(7.0, dtype=torch.float64)))

    true, start = rng.dirichlet(np.ones(4), NUM_STATES), rng.dirichlet(np.full(4, 5.0), NUM_STATES)
    sequences = sequences_of(model_of(emission(true)))
    num_trials = np.concatenate(sequences).sum(1).astype(int)
    estimator = configured(hmm.MultinomialHMM(n_trials=num_trials), emissionprob_=start)
    parameters = lambda model: [model.emission.groups[0].distribution.probs]  # noqa: E731
    coefficient = lambda x: float(gammaln(x.sum(1) + 1).sum() - gammaln(x + 1).sum())  # noqa: E731
    return Pair(estimator, model_of(emission(start)), sequences, ("emissionprob_",), parameters, coefficient)


def poisson_pair() -> Pair:
    def emission(rates: np.ndarray) -> Columns:
        return columns_of("poisson", Poisson(torch.tensor(rates), torch.tensor(rates.mean(0))))

    rates = np.array([[0.5, 8.0], [4.0, 2.0], [9.0, 0.3]])
    sequences = sequences_of(model_of(emission(rates)))
    estimator = configured(hmm.PoissonHMM(lambdas_prior=0.0, lambdas_weight=0.0), lambdas_=rates + 0.7)
    parameters = lambda model: [model.emission.groups[0].distribution.rates]  # noqa: E731
    return Pair(estimator, model_of(emission(rates + 0.7)), sequences, ("lambdas_",), parameters)


PAIRS: dict[str, Callable[[], Pair]] = {
    **{f"gaussian {kind}": (lambda kind=kind: gaussian_pair(kind)) for kind in COVARIANCE_TYPES},
    "categorical": categorical_pair,
    "multinomial": multinomial_pair,
    "poisson": poisson_pair,
}


def whole(x: np.ndarray, estimator: Any) -> np.ndarray:
    """hmmlearn wants whole numbers where it counts."""
    return x if isinstance(estimator, hmm.GaussianHMM | hmm.GMMHMM) else x.astype(int)


def in_two_blocks(pair: Pair) -> Any:
    return fitted(pair.model, [block_of(pair.sequences[:2]), block_of(pair.sequences[2:])], NUM_ITERATIONS)


def assert_same_fit(pair: Pair, fit: Callable[[Pair], Any] = in_two_blocks) -> None:
    """fit: what makes a model and the records of its iterations."""
    estimator = pair.estimator.fit(whole(pair.rows, pair.estimator), [len(x) for x in pair.sequences])
    model, history = fit(pair)
    num_steps = len(pair.rows)
    trace = np.array([record["log_likelihood"] for record in history]) * num_steps + pair.constant(pair.rows)
    np.testing.assert_allclose(trace, np.array(estimator.monitor_.history), rtol=TOLERANCE)
    np.testing.assert_allclose(model.initial_probs, estimator.startprob_, rtol=TOLERANCE, atol=1e-12)
    np.testing.assert_allclose(model.transition_matrix, estimator.transmat_, rtol=TOLERANCE, atol=1e-12)
    for name, ours in zip(pair.attributes, pair.parameters(model), strict=True):
        np.testing.assert_allclose(ours, of_states(estimator, name), rtol=TOLERANCE, atol=1e-12, err_msg=name)
    assert not any(record.get("fell") or record["repairs"] for record in history)


@pytest.mark.parametrize("kind", PAIRS)
def test_parameters_and_trace_are_hmmlearns(kind):
    assert_same_fit(PAIRS[kind]())


@pytest.mark.parametrize("kind", ["gaussian full", "categorical"])
def test_fit_takes_the_same_steps(kind):
    """From a model in memory, with what the spec says of its estimation: no regularization, no pseudocounts."""
    pair = PAIRS[kind]()
    emission: dict[str, Any] = {"kind": "gaussian", "covariance_type": "full", "covariance_regularization": 0.0}
    if kind == "categorical":
        emission = {"kind": "categorical", "pseudocount": 0.0, "unseen_categories": False}
    spec = {
        "name": "like-hmmlearn",
        "family": "hmm",
        "model": {"num_states": NUM_STATES, "emission": emission},
        "fit": {"max_iterations": NUM_ITERATIONS, "tolerance": 0.0},
    }

    def by_gendist(pair: Pair) -> Any:
        run = gendist.fit(spec, data=pair.sequences, init=pair.model)
        return run.model, run.history

    assert_same_fit(pair, by_gendist)


@pytest.mark.parametrize("implementation", ["log", "scaling"])
def test_both_of_hmmlearns_implementations(implementation):
    pair = gaussian_pair("full")
    pair.estimator.set_params(implementation=implementation)
    assert_same_fit(pair)


def test_pseudocounts_are_hmmlearns_priors_less_one():
    pair = gaussian_pair("diag")
    pair.estimator.set_params(startprob_prior=3.0, transmat_prior=1.5)
    config = pair.model.config.model_copy(update={"initial_pseudocount": 2.0, "transition_pseudocount": 0.5})
    assert_same_fit(replace(pair, model=replace(pair.model, config=config)))


def test_self_transition_pseudocount_is_a_prior_of_the_diagonal():
    pair = categorical_pair()
    pair.estimator.set_params(transmat_prior=1.25 + 4.0 * np.eye(NUM_STATES))
    config = pair.model.config.model_copy(update={"transition_pseudocount": 0.25, "self_transition_pseudocount": 4.0})
    assert_same_fit(replace(pair, model=replace(pair.model, config=config)))


@pytest.mark.parametrize("frozen", [("initial_probs",), ("transition_matrix",), ("emission",), ("initial_probs", "emission")])
def test_frozen_parameters(frozen):
    pair = gaussian_pair("diag")
    letters = {"initial_probs": "s", "transition_matrix": "t", "emission": "mc"}
    pair.estimator.set_params(params="".join(letters[name] for name in letters if name not in frozen))
    config = pair.model.config.model_copy(update={"frozen": frozen})
    assert_same_fit(replace(pair, model=replace(pair.model, config=config)))


@pytest.mark.parametrize("kind", PAIRS)
def test_decoded_paths_are_hmmlearns(kind):
    pair = PAIRS[kind]()
    theirs = pair.estimator.predict(whole(pair.rows, pair.estimator), [len(x) for x in pair.sequences])
    assert torch.cat(pair.model.most_likely_states(pair.sequences)).tolist() == theirs.tolist()


@pytest.mark.parametrize("kind", PAIRS)
def test_aic_and_bic_are_hmmlearns(kind):
    pair = PAIRS[kind]()
    x, lengths = whole(pair.rows, pair.estimator), [len(each) for each in pair.sequences]
    found = pair.model.criteria(pair.estimator.score(x, lengths), len(x))
    np.testing.assert_allclose(found["aic"], pair.estimator.aic(x, lengths), rtol=TOLERANCE)
    np.testing.assert_allclose(found["bic"], pair.estimator.bic(x, lengths), rtol=TOLERANCE)


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
def test_the_e_step_of_mixtures_is_hmmlearns(kind):
    """The M-step is not: hmmlearn takes covariances about the old means. Its mixtures are tied within a state, ours all."""
    num_components, rng = 2, np.random.default_rng(6)
    weights = rng.dirichlet(np.full(num_components, 2.0), NUM_STATES)
    means, covariances, _ = random_gaussians(rng, NUM_STATES * num_components, kind)
    model = model_of(mixture_emission(weights, means, covariances, kind))
    sequences = sequences_of(model)
    estimator = hmm.GMMHMM(n_mix=num_components, covariance_type=kind)
    shape = (NUM_STATES, num_components)
    configured(estimator, weights_=weights, means_=means.reshape(*shape, -1))
    if kind == "tied":
        estimator.covars_ = np.stack([covariances] * NUM_STATES)
    else:
        estimator.covars_ = covariances.reshape(*shape, *covariances.shape[1:])
    estimator.n_features = means.shape[1]
    log_prob, posteriors = estimator.score_samples(np.concatenate(sequences), LENGTHS)
    np.testing.assert_allclose(float(model.log_prob(sequences).sum()), log_prob, rtol=TOLERANCE)
    np.testing.assert_allclose(torch.cat(model.encode(sequences)), posteriors, rtol=TOLERANCE, atol=1e-10)


# Estimators of hmmlearn taken over, and handed out


@pytest.mark.parametrize("kind", PAIRS)
def test_a_model_from_hmmlearn_and_back(kind):
    pair = PAIRS[kind]()
    lengths, x = [len(each) for each in pair.sequences], whole(pair.rows, pair.estimator)
    estimator = pair.estimator.fit(x, lengths)
    model = HiddenMarkovModel.from_hmmlearn(estimator)
    log_prob = float(model.log_prob(pair.sequences).sum()) + pair.constant(pair.rows)
    np.testing.assert_allclose(log_prob, estimator.score(x, lengths), rtol=1e-10)
    again = model.to_hmmlearn()
    assert type(again) is type(estimator)
    for name in ("startprob_", "transmat_", *pair.attributes):
        np.testing.assert_allclose(of_states(again, name), of_states(estimator, name), rtol=1e-12)
    if kind == "multinomial":
        again.n_trials = estimator.n_trials
    np.testing.assert_allclose(again.score(x, lengths), estimator.score(x, lengths), rtol=1e-10)
    assert again.predict(x, lengths).tolist() == estimator.predict(x, lengths).tolist()


@pytest.mark.parametrize("kind", ["full", "diag", "spherical"])
def test_a_mixture_from_hmmlearn_and_back(kind):
    weights = np.array([[0.3, 0.7], [0.5, 0.5], [0.9, 0.1]])
    means, covariances, _ = random_gaussians(np.random.default_rng(8), 6, kind)
    sequences = sequences_of(model_of(mixture_emission(weights, means, covariances, kind)))
    estimator = configured(hmm.GMMHMM(n_mix=2, covariance_type=kind), weights_=weights, means_=means.reshape(3, 2, 2))
    estimator.covars_ = covariances.reshape(3, 2, *covariances.shape[1:])
    estimator.n_features = 2
    model = HiddenMarkovModel.from_hmmlearn(estimator)
    score = estimator.score(np.concatenate(sequences), LENGTHS)
    np.testing.assert_allclose(float(model.log_prob(sequences).sum()), score, rtol=1e-10)
    np.testing.assert_allclose(model.to_hmmlearn().score(np.concatenate(sequences), LENGTHS), score, rtol=1e-10)


# Data that left hmmlearn with parameters that are no numbers, rows of transitions that sum to 0, or a likelihood that fell
# while it was called converged (its issues 137, 169, 186 and 410)


def near(values: list[float], num_states: int, **config: Any) -> HiddenMarkovModel:
    """States of one Gaussian column, whose means are these values, all else alike."""
    means = np.resize(np.array(values, dtype=np.float64), (num_states, 1)) + 1e-3 * np.arange(num_states)[:, None]
    emission = gaussian_emission(means, np.ones((num_states, 1)), "diag")
    emission = replace(emission, config=emission.config.model_copy(update={"covariance_regularization": 1e-6}))
    uniform = np.full((num_states, num_states), 1.0 / num_states)
    return HiddenMarkovModel.from_parameters(torch.tensor(uniform[0]), torch.tensor(uniform), emission)


def with_chain(model: HiddenMarkovModel, initial_probs: Any, transition_matrix: Any) -> HiddenMarkovModel:
    chain = (torch.tensor(np.array(each, dtype=np.float64)) for each in (initial_probs, transition_matrix))
    return HiddenMarkovModel.from_parameters(*chain, model.emission)


def column(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float64)[:, None]


BITS = np.random.default_rng(0).integers(0, 2, 60)
NEVER_LEFT = [[0.5, 0.5, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
# A model, its sequences, and whether something cannot be estimated.
PATTERNS: dict[str, tuple[HiddenMarkovModel, list[np.ndarray], bool]] = {
    "zeros and ones": (near([0.0, 1.0], 4), [column(*BITS), column(0, 1, 1, 0)], False),
    "ones, then zeros for ever": (near([1.0, 0.0], 2), [column(*[1.0] * 5, *[0.0] * 40)], False),
    "duplicated points": (near([1.0, 2.0], 3), [np.repeat(column(1.0, 2.0, 5.0), 20, axis=0)] * 3, False),
    "all points the same": (near([7.0], 3), [column(*[7.0] * 30), column(7.0)], False),
    "a state that nothing leads to": (
        with_chain(near([0.0, 3.0, 6.0], 3), [1.0, 0.0, 0.0], NEVER_LEFT),
        [column(0.1, 0.2, 3.1, 2.9), column(-0.1, 0.3, 0.2)],
        True,
    ),
    "a state that is never left": (
        near([0.0, 50.0, 100.0], 3),
        [column(0.0, 0.2, 50.1, 49.8, 0.1, 100.0), column(0.3, 50.3, 100.2)],
        True,
    ),
    "more states than steps": (near([1.0, 2.0, 3.0, 4.0], 9), [column(1.0, 2.0), column(3.5)], False),
    "sequences of one step": (near([0.0, 4.0], 2), [column(0.1), column(3.9), column(4.2), column(-0.2)], True),
    "some sequences without steps": (near([0.0, 4.0], 2), [column(), column(0.1, 3.9, 4.0, 0.2), column(), column(0.0)], False),
    "steps far from every state": (near([0.0, 1.0], 2), [column(1e4, -1e4, 1e4, 0.5), column(0.1, 0.9)], False),
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_no_number_is_lost_and_the_likelihood_never_falls(pattern):
    model, sequences, cannot_be_estimated = PATTERNS[pattern]
    model, history = fitted(model, [block_of(sequences)], 40)
    assert_sound(model, history)
    assert any(record["repairs"] for record in history) or not cannot_be_estimated
    assert all(bool(torch.isfinite(probs).all()) for probs in model.encode(sequences))


@pytest.mark.parametrize("regularization", [1e-6, 0.0])
@pytest.mark.parametrize("pattern", sorted(PATTERNS.keys() - {"more states than steps"}))  # which a fit refuses
def test_a_fit_from_the_data_alone_ends_with_numbers(pattern, regularization):
    """Without regularization a covariance may shrink until there is nothing left of it but rounding: that is told."""
    model, sequences, _ = PATTERNS[pattern]
    emission = {"kind": "gaussian", "covariance_type": "full", "covariance_regularization": regularization}
    spec = {
        "name": "hard",
        "family": "hmm",
        "model": {"num_states": model.num_states, "emission": emission},
        "fit": {"max_iterations": 15, "tolerance": 0.0},
    }
    run = gendist.fit(spec, data=sequences)
    if regularization > 0.0:
        assert_sound(run.model, run.history)
    assert_finite(run.model)
    for before, after in pairwise(run.history):
        assert after["log_likelihood"] >= guaranteed_after(before) or before["repairs"] or after["fell"]
    assert all(bool(probs.isfinite().all()) for probs in run.model.encode(sequences))


def guaranteed_after(record: dict[str, Any]) -> float:
    """What the next log-likelihood is at least, but for rounding."""
    guaranteed: float = record["log_likelihood"] + record["least_gain"]
    return guaranteed - 1e-9 * max(1.0, abs(record["log_likelihood"]), abs(record["least_gain"]))


def assert_finite(model: HiddenMarkovModel) -> None:
    assert all(bool(torch.isfinite(tensor.double()).all()) for tensor in model.tensors().values())
    np.testing.assert_allclose(model.transition_matrix.sum(1), 1.0, rtol=1e-12)
    np.testing.assert_allclose(model.initial_probs.sum(), 1.0, rtol=1e-12)


def assert_sound(model: HiddenMarkovModel, history: tuple[dict[str, Any], ...]) -> None:
    assert_finite(model)
    for before, after in pairwise(history):
        assert after["log_likelihood"] >= guaranteed_after(before)
        assert "fell" not in after


def test_a_constant_column():
    x = np.random.default_rng(1).normal(size=(50, 2))
    x[:, 1] = 3.0
    emission = gaussian_emission(np.array([[-1.0, 3.0], [1.0, 3.0]]), np.ones((2, 2)), "diag")
    emission = replace(emission, config=emission.config.model_copy(update={"covariance_regularization": 1e-6}))
    uniform = torch.full((2, 2), 0.5, dtype=torch.float64)
    model, history = fitted(HiddenMarkovModel.from_parameters(uniform[0], uniform, emission), [block_of([x])], 30)
    assert_sound(model, history)
    np.testing.assert_allclose(model.emission.means[:, 1], 3.0, rtol=1e-12)


def test_symbols_that_no_state_has_seen():
    """Only symbols 0 and 1 occur; of symbol 2 a state knows that it is unlikely, not that it is impossible."""
    emission = emission_of("categorical").ours
    model = model_of(emission)
    sequences = [np.random.default_rng(2).integers(0, 2, (30, 2)).astype(float)]
    model, history = fitted(model, [block_of(sequences)], 20)
    assert_sound(model, history)
    unseen = model.log_prob([np.array([[2.0, 3.0], [0.0, 0.0]])])
    assert bool(unseen.isfinite().all())


def test_sequences_of_weight_zero_say_nothing():
    pair = poisson_pair()
    strange = np.full((7, 2), 90.0)
    with_them = block_of([*pair.sequences, strange], [1.0] * len(LENGTHS) + [0.0])
    weighted, _ = fitted(pair.model, [with_them], 3)
    plain, _ = fitted(pair.model, [block_of(pair.sequences)], 3)
    for name, tensor in plain.tensors().items():
        if name != "length":
            np.testing.assert_allclose(weighted.tensors()[name], tensor, rtol=1e-12, err_msg=name)


def test_a_weight_counts_a_sequence_as_often():
    pair = gaussian_pair("tied")
    weighted = pair.model.e_step(block_of(pair.sequences, [2.0, 1.0, 3.0, 1.0, 1.0, 1.0]), EXACT)
    again = [pair.sequences[0], pair.sequences[2], pair.sequences[2]]
    repeated = pair.model.e_step(block_of([*pair.sequences, *again]), EXACT)
    np.testing.assert_allclose(weighted.log_likelihood, repeated.log_likelihood, rtol=1e-12)
    np.testing.assert_allclose(weighted.transitions, repeated.transitions, rtol=1e-12)
    np.testing.assert_allclose(weighted.emission.counts, repeated.emission.counts, rtol=1e-12)
