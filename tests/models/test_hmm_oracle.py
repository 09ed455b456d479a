"""Hidden Markov models against every path of states, with densities by SciPy, for every emission.

Legend: S sequences, T steps, K states, D columns.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import pytest
import torch
from hmm_blocks import as_data_set, block_of, pieces_of
from hmm_emissions import KINDS, Emission, drawn, emission_of, gaussian_emission, log_likelihoods, log_normal
from hmm_oracle import Answers, by_enumeration, in_logarithms, logarithm, path_probs
from scipy.special import logsumexp

from gendist.em.engine import em_steps, mean_log_likelihood
from gendist.models.distributions.categorical import Categorical
from gendist.models.distributions.columns import Columns, Group
from gendist.models.hmm import HiddenMarkovModel
from gendist.protocols import EXACT, Block, Compute

NUM_STATES = 3
LENGTHS = (2, 0, 5, 1, 5)
WEIGHTS = (2.0, 1.0, 0.5, 3.0, 0.0)
TOPOLOGIES = {
    "free": np.ones((NUM_STATES, NUM_STATES)),
    "left_to_right": np.triu(np.ones((NUM_STATES, NUM_STATES))),
    "cycle": np.eye(NUM_STATES) + np.roll(np.eye(NUM_STATES), 1, axis=1),
}
COMPUTES = {"float64": (EXACT, 1e-10), "float32": (Compute("float32"), 1e-5)}


def random_chain(topology: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """initial_probs (K,) and transition_matrix (K, K)."""
    rng = np.random.default_rng(seed)
    allowed = TOPOLOGIES[topology]
    transition_matrix = rng.dirichlet(np.ones(NUM_STATES), NUM_STATES) * allowed
    transition_matrix /= transition_matrix.sum(1, keepdims=True)
    return rng.dirichlet(np.ones(NUM_STATES)), transition_matrix


def model_of(initial_probs: Any, transition_matrix: Any, emission: Any) -> HiddenMarkovModel:
    chain = (torch.tensor(np.asarray(each, dtype=np.float64)) for each in (initial_probs, transition_matrix))
    return HiddenMarkovModel.from_parameters(*chain, emission)


def close(actual: Any, expected: Any, tolerance: float = 1e-10) -> None:
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=tolerance, atol=tolerance)


def state_counts(statistics: Any) -> torch.Tensor:
    """(K,) the expected number of steps in each state; of mixtures those of its components together."""
    return statistics.emission.counts.view(NUM_STATES, -1).sum(1)


class Small:
    """A model of an emission, ragged sequences with missing entries and a whole missing step, and their answers."""

    def __init__(self, kind: str, topology: str = "free", seed: int = 0):
        self.emission: Emission = emission_of(kind, NUM_STATES, seed)
        self.initial_probs, self.transition_matrix = random_chain(topology, seed)
        self.model = model_of(self.initial_probs, self.transition_matrix, self.emission.ours)
        self.log_chain = logarithm(self.initial_probs), logarithm(self.transition_matrix)
        rng = np.random.default_rng(seed)
        self.sequences = [drawn(self.emission, rng, length, NUM_STATES, missing=0.2) for length in LENGTHS]
        self.sequences[2][1] = np.nan
        self.log_likelihoods = [log_likelihoods(self.emission, x, NUM_STATES) for x in self.sequences]
        self.evidence = evidence_for(self.sequences)

    @cached_property
    def answers(self) -> list[Answers]:
        return [by_enumeration(*self.log_chain, log_likelihood) for log_likelihood in self.log_likelihoods]

    @cached_property
    def answers_with_evidence(self) -> list[Answers]:
        pairs = zip(self.log_likelihoods, self.evidence, strict=True)
        return [by_enumeration(*self.log_chain, log_likelihood + each) for log_likelihood, each in pairs]


FROM_LEFT_TO_RIGHT = ("gaussian full", "mixture diag", "categorical", "mixed")
SMALL = [f"{kind}, free" for kind in KINDS] + [f"{kind}, left_to_right" for kind in FROM_LEFT_TO_RIGHT]


@pytest.fixture(scope="module", params=SMALL)
def small(request) -> Small:
    kind, topology = request.param.split(", ")
    return Small(kind, topology)


def evidence_for(sequences: list[np.ndarray]) -> list[np.ndarray]:
    """Of some steps nothing, of some a known state, of some a soft label. All the known states are possible: they ascend."""
    evidence = [np.zeros((len(x), NUM_STATES)) for x in sequences]
    evidence[2][1] = np.log([0.2, 0.3, 0.5])
    evidence[2][3] = [-np.inf, -np.inf, 0.0]
    evidence[3][0] = [-np.inf, np.log(0.4), np.log(0.6)]
    evidence[4][0] = [-np.inf, 0.0, -np.inf]
    evidence[4][4] = np.log([0.6, 0.3, 0.1])
    return evidence


def test_the_oracles_agree():
    rng = np.random.default_rng(0)
    for topology in TOPOLOGIES:
        log_initial, log_transition = (logarithm(each) for each in random_chain(topology, 1))
        for num_steps in (1, 2, 6):
            log_likelihood = 3.0 * rng.normal(size=(num_steps, NUM_STATES))
            one, other = (f(log_initial, log_transition, log_likelihood) for f in (by_enumeration, in_logarithms))
            for name, value in vars(one).items():
                close(getattr(other, name), value, 1e-12)


# Inference


def test_log_prob_is_the_sum_over_all_paths(small):
    close(small.model.log_prob(small.sequences), [each.log_prob for each in small.answers])


def test_smoothed_probs(small):
    for ours, each in zip(small.model.encode(small.sequences), small.answers, strict=True):
        close(ours, each.smoothed)


def test_filtered_probs(small):
    for ours, each in zip(small.model.filtered_probs(small.sequences), small.answers, strict=True):
        close(ours, each.filtered)


def test_no_path_is_more_likely(small):
    found = small.model.most_likely_states(small.sequences)
    for ours, log_likelihood in zip(found, small.log_likelihoods, strict=True):
        assert ours.dtype == torch.int64
        paths, log_joint = path_probs(*small.log_chain, log_likelihood)
        close(log_joint[(paths == ours.numpy()).all(1)], [log_joint.max()])


def test_sequences_one_by_one_are_the_ragged_batch(small):
    model, sequences = small.model, small.sequences
    close(torch.cat([model.log_prob([x]) for x in sequences]), model.log_prob(sequences), 1e-12)
    for verb in (model.encode, model.filtered_probs, model.most_likely_states):
        for x, together in zip(sequences, verb(sequences), strict=True):
            close(verb([x])[0], together, 1e-12)


def test_one_array_is_one_sequence_and_three_axes_are_many():
    small = Small("gaussian full")
    first, second = small.sequences[2], small.sequences[4]
    close(small.model.log_prob(first), small.model.log_prob([first]), 0.0)
    close(small.model.log_prob(np.stack([first, second])), small.model.log_prob([first, second]), 0.0)


@pytest.mark.parametrize("precision", COMPUTES)
@pytest.mark.parametrize("has_more", [False, True], ids=["plain", "weights and evidence"])
def test_statistics(small, has_more, precision):
    compute, tolerance = COMPUTES[precision]
    answers = small.answers_with_evidence if has_more else small.answers
    weights, evidence = (WEIGHTS, small.evidence) if has_more else (None, None)
    each_weight = WEIGHTS if has_more else (1.0,) * len(LENGTHS)
    statistics = small.model.e_step(block_of(small.sequences, weights, evidence), compute)
    pairs = list(zip(each_weight, answers, strict=True))
    close(statistics.log_likelihood, sum(w * a.log_prob for w, a in pairs), tolerance)
    close(statistics.initial, sum(w * a.smoothed[0] for w, a in pairs if len(a.smoothed)), tolerance)
    close(statistics.transitions, sum(w * a.transitions for w, a in pairs), tolerance)
    close(state_counts(statistics), sum(w * a.smoothed.sum(0) for w, a in pairs), tolerance)


def test_statistics_of_two_blocks_are_those_of_one():
    small = Small("mixed")
    parts = [small.model.e_step(block_of(small.sequences[rows])) for rows in (slice(0, 2), slice(2, None))]
    together, merged = small.model.e_step(block_of(small.sequences)), parts[0].merge(parts[1])
    for name in ("log_likelihood", "initial", "transitions"):
        close(getattr(merged, name), getattr(together, name), 1e-12)
    close(state_counts(merged), state_counts(together), 1e-12)


def test_log_prob_of_a_block_adds_up_to_that_of_its_sequences(small):
    """Of those that have a weight."""
    block = block_of(small.sequences, WEIGHTS, small.evidence)
    steps = small.model.log_prob_of(block).split([len(x) for x in small.sequences])
    expected = [a.log_prob if w > 0 else 0.0 for a, w in zip(small.answers_with_evidence, WEIGHTS, strict=True)]
    close([float(each.sum()) for each in steps], expected)
    total = sum(w * log_prob for w, log_prob in zip(WEIGHTS, expected, strict=True))
    close(small.model.log_likelihood_of(block).log_likelihood, total)


# A sequence in pieces, each of which lies in a block of its own


@pytest.mark.parametrize("precision", COMPUTES)
@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("kind", ["gaussian full", "mixture diag", "categorical"])
def test_a_sequence_in_pieces_is_the_whole_sequence(kind, topology, precision):
    """All paths of one of 7 steps, with a missing step, evidence and a weight, beside two that lie in blocks of their own."""
    compute, tolerance = COMPUTES[precision]
    small = Small(kind, topology)
    rng = np.random.default_rng(9)
    x = drawn(small.emission, rng, 7, NUM_STATES)
    x[3] = np.nan
    evidence = np.zeros((7, NUM_STATES))
    evidence[1], evidence[5] = np.log([0.5, 0.2, 0.3]), [-np.inf, 0.0, 0.0]
    log_likelihood = log_likelihoods(small.emission, x, NUM_STATES)
    whole, others = block_of([x], [2.0], [evidence]), [block_of(small.sequences[3:]), block_of(small.sequences[:3])]
    answer = by_enumeration(*small.log_chain, log_likelihood + evidence)
    answers = [(2.0, answer), *((1.0, each) for each in small.answers)]
    transitions = sum(w * a.transitions for w, a in answers)
    initial = sum(w * a.smoothed[0] for w, a in answers if len(a.smoothed))
    ((total, expected),) = steps_of(small.model, [others[0], whole, others[1]], compute)
    close(total, sum(w * a.log_prob for w, a in answers), tolerance)
    for cuts in ([3], [1, 2], [1, 2, 3, 4, 5, 6]):
        ((total, update),) = steps_of(small.model, [others[0], *pieces_of(whole, cuts), others[1]], compute)
        close(total, sum(w * a.log_prob for w, a in answers), tolerance)
        close(update.model.initial_probs, initial / initial.sum(), tolerance)
        close(update.model.transition_matrix, transitions / transitions.sum(1, keepdims=True), tolerance)
        for name, tensor in expected.model.emission.tensors().items():
            np.testing.assert_allclose(update.model.emission.tensors()[name], tensor, rtol=10 * tolerance, atol=10 * tolerance)
        log_likelihood_alone = mean_log_likelihood(small.model, as_data_set(pieces_of(whole, cuts)), compute)
        close(log_likelihood_alone, answer.log_prob / 7, tolerance)


def steps_of(model: HiddenMarkovModel, blocks: list[Block], compute: Compute = EXACT) -> list[Any]:
    """The total log-likelihood and the update of one iteration."""
    return em_steps(lambda own, block: own.e_step(block, compute), as_data_set(blocks), [model])


# The M-step


@pytest.mark.parametrize("kind", KINDS)
def test_m_step_is_the_maximum_of_the_expected_log_likelihood(kind):
    """Of sequences of which nothing is missing: weighed means, from the posteriors of all paths."""
    emission = emission_of(kind, NUM_STATES, seed=1)
    initial_probs, transition_matrix = random_chain("cycle" if kind == "poisson" else "free", 1)
    rng, weights = np.random.default_rng(2), (1.0, 2.0, 0.5, 1.5, 1.0, 1.0)
    sequences = [drawn(emission, rng, length, NUM_STATES) for length in (6, 1, 5, 5, 5, 5)]
    log_chain = logarithm(initial_probs), logarithm(transition_matrix)
    answers = [by_enumeration(*log_chain, log_likelihoods(emission, x, NUM_STATES)) for x in sequences]
    pairs = list(zip(weights, answers, strict=True))
    ((_, update),) = steps_of(model_of(initial_probs, transition_matrix, emission.ours), [block_of(sequences, weights)])
    initial, transitions = sum(w * a.smoothed[0] for w, a in pairs), sum(w * a.transitions for w, a in pairs)
    close(update.model.initial_probs, initial / initial.sum())
    close(update.model.transition_matrix, transitions / transitions.sum(1, keepdims=True))
    assert (np.asarray(update.model.transition_matrix)[transition_matrix == 0] == 0).all()
    x, shares = np.concatenate(sequences), np.concatenate([w * a.smoothed for w, a in pairs])
    ours = update.model.emission.tensors()
    for name, values in expected_parameters(kind, emission, x, shares).items():
        np.testing.assert_allclose(ours[name], values, rtol=1e-9, atol=1e-9, err_msg=name)


def expected_parameters(kind: str, emission: Emission, x: np.ndarray, shares: np.ndarray) -> dict[str, np.ndarray]:
    """By the names that the emission's tensors have; shares: (N, K) the posteriors times the weights."""
    family, _, covariance_type = kind.partition(" ")
    if covariance_type:
        if family == "gaussian":
            return gaussian_parameters(x, shares, covariance_type)
        gaussian, weights = emission.ours.gaussian, np.asarray(emission.ours.weights)
        matrices = np.asarray(gaussian.scale if gaussian.has_matrices else torch.diag_embed(gaussian.scale))
        each = np.array(
            [[log_normal(row, m, a @ a.T) for m, a in zip(gaussian.means.numpy(), matrices, strict=True)] for row in x]
        )
        joint = np.exp(each).reshape(len(x), *weights.shape) * weights
        of_components = shares[:, :, None] * joint / joint.sum(2, keepdims=True)
        parameters = gaussian_parameters(x, of_components.reshape(len(x), -1), covariance_type)
        return parameters | {"weights": of_components.sum(0) / shares.sum(0)[:, None]}
    parameters = {}
    for index, group in enumerate(emission.ours.groups):
        own, prefix = x[:, group.columns.numpy()], f"{index}.{group.kind}"
        means = (shares.T @ own) / shares.sum(0)[:, None]
        if group.kind == "gaussian":
            found = gaussian_parameters(own, shares, "diag")
            parameters |= {f"{prefix}.means": found["means"], f"{prefix}.variances": found["covariances"]}
        elif group.kind == "poisson":
            parameters[f"{prefix}.rates"] = np.maximum(means, 1e-30)
        elif group.kind == "bernoulli":
            parameters[f"{prefix}.probs"] = np.clip(means, 1e-15, 1.0 - 1e-15)
        elif group.kind == "multinomial":
            parameters[f"{prefix}.probs"] = means / means.sum(1, keepdims=True)
        else:
            columns = zip(own.T, group.distribution.num_slots.tolist(), strict=True)
            one_hot = np.concatenate([np.eye(size)[values.astype(int)] for values, size in columns], 1)
            parameters[f"{prefix}.probs"] = (shares.T @ one_hot) / shares.sum(0)[:, None]
    return parameters


def gaussian_parameters(x: np.ndarray, shares: np.ndarray, covariance_type: str) -> dict[str, np.ndarray]:
    """PRML 13.20 and 13.21, for each latent its own scatter about its own mean."""
    counts = shares.sum(0)
    means = (shares.T @ x) / counts[:, None]
    away = x[:, None, :] - means
    scatters = np.einsum("nk,nki,nkj->kij", shares, away, away)
    covariances = scatters.sum(0) / counts.sum() if covariance_type == "tied" else scatters / counts[:, None, None]
    if covariance_type in ("diag", "spherical"):
        covariances = covariances.diagonal(axis1=1, axis2=2)
    return {"means": means, "covariances": covariances.mean(1) if covariance_type == "spherical" else covariances}


# Where the largest likelihood of a step belongs to a state that cannot be reached


def far_apart(gap: float, num_states: int = NUM_STATES) -> tuple[Any, Any]:
    """Gaussians of one column with standard deviation 1 at distances of `gap`, and their log-likelihoods of x (T, 1)."""
    means = gap * np.arange(num_states, dtype=np.float64)
    log_density = lambda x: -0.5 * (x - means) ** 2 - 0.5 * np.log(2.0 * np.pi)  # noqa: E731
    return gaussian_emission(means[:, None], np.ones((num_states, 1)), "diag"), log_density


def symbols(impossible: float = 1e-30) -> tuple[Any, Any]:
    """Each state its own symbol and no other."""
    probs = np.full((NUM_STATES, NUM_STATES), impossible) + (1.0 - NUM_STATES * impossible) * np.eye(NUM_STATES)
    distribution = Categorical(torch.tensor(probs), torch.tensor([NUM_STATES]), has_unseen=False)
    emission = Columns((Group("categorical", torch.tensor([0]), distribution),))
    return emission, lambda x: np.log(probs)[:, x[:, 0].astype(int)].T


UNIFORM = np.full(NUM_STATES, 1.0 / NUM_STATES)
LEFT_TO_RIGHT = np.array([[0.7, 0.3, 0.0], [0.0, 0.6, 0.4], [0.0, 0.0, 1.0]])
STICKY = np.full((NUM_STATES, NUM_STATES), 1e-9) + (1.0 - NUM_STATES * 1e-9) * np.eye(NUM_STATES)
CYCLE = np.array([[0.5, 0.5, 0.0], [0.0, 0.5, 0.5], [0.5, 0.0, 0.5]])
FREE = np.full((NUM_STATES, NUM_STATES), 1.0 / NUM_STATES)
FIRST = np.array([1.0, 0.0, 0.0])

# initial_probs, transition_matrix, (emission, log density), x of one column
ADVERSARIAL = {
    "left to right, first at the last state's mean": (FIRST, LEFT_TO_RIGHT, far_apart(12.0), [24.0, 0.0, 12.0, 24.0]),
    "left to right, last at the first state's mean": (FIRST, LEFT_TO_RIGHT, far_apart(12.0), [0.0, 12.0, 24.0, 0.0, 0.0]),
    "left to right, all at the last state's mean": (FIRST, LEFT_TO_RIGHT, far_apart(12.0), [24.0] * 4),
    "left to right, 40 sigma": (FIRST, LEFT_TO_RIGHT, far_apart(40.0), [80.0, 0.0, 40.0, 0.0, 80.0, 40.0]),
    "free, first state known, another's mean": (FIRST, FREE, far_apart(20.0), [40.0, 20.0, 0.0, 40.0]),
    "sticky, 12 sigma jumps": (UNIFORM, STICKY, far_apart(12.0), [0.0, 24.0, 0.0, 12.0, 24.0, 24.0]),
    "sticky, half way": (UNIFORM, STICKY, far_apart(12.0), [6.0, 18.0, 6.0, 6.0, 18.0]),
    "cycle, the wrong way": (UNIFORM, CYCLE, far_apart(12.0), [24.0, 12.0, 0.0, 24.0, 12.0, 0.0]),
    "cycle, far beyond all": (UNIFORM, CYCLE, far_apart(12.0), [300.0, -300.0, 300.0, 12.0]),
    "impossible symbols, left to right": (FIRST, LEFT_TO_RIGHT, symbols(), [2.0, 1.0, 0.0, 2.0, 1.0, 0.0]),
    "impossible symbols, cycle": (UNIFORM, CYCLE, symbols(), [2.0, 1.0, 0.0, 2.0, 0.0, 1.0]),
    "impossible symbols, sticky": (UNIFORM, STICKY, symbols(), [0.0, 1.0, 2.0, 0.0]),
}


@pytest.mark.parametrize("case", ADVERSARIAL)
@pytest.mark.parametrize("precision", COMPUTES)
def test_a_state_that_cannot_be_reached_may_be_the_likeliest(case, precision):
    initial_probs, transition_matrix, (emission, log_density), values = ADVERSARIAL[case]
    compute, tolerance = COMPUTES[precision]
    x = np.array(values)[:, None]
    model = model_of(initial_probs, transition_matrix, emission)
    expected = by_enumeration(logarithm(initial_probs), logarithm(transition_matrix), log_density(x))
    # A density has the digits of its precision: what is far away costs those behind the point.
    tolerance *= max(1.0, float(np.abs(log_density(x)).max()) / 100.0)
    ordinary = drawn_from(model, 8)
    for sequences in ([x], [ordinary, x, x[:2], ordinary]):
        others = [each for each in sequences if each is not x]
        of_others = model.e_step(block_of(others), compute) if others else None
        statistics = model.e_step(block_of(sequences), compute)
        # Of others in the same block the answers are what they are without it.
        rest = 0.0 if of_others is None else of_others.log_likelihood
        close(statistics.log_likelihood - rest, expected.log_prob, tolerance)
        for name, value in {"initial": expected.smoothed[0], "transitions": expected.transitions}.items():
            rest = 0.0 if of_others is None else getattr(of_others, name)
            np.testing.assert_allclose(getattr(statistics, name) - rest, value, rtol=0.0, atol=tolerance * len(sequences))
    if precision == "float64":
        close(model.log_prob([x]), [expected.log_prob])
        close(model.encode([x])[0], expected.smoothed)
        close(model.filtered_probs([x])[0], expected.filtered)
        assert model.most_likely_states([x])[0].tolist() == expected.most_likely.tolist() or _is_as_likely(
            initial_probs, transition_matrix, log_density(x), model.most_likely_states([x])[0].numpy(), expected
        )


def drawn_from(model: HiddenMarkovModel, length: int) -> np.ndarray:
    return model.sample(1, seed=3, length=length)[0].numpy()


def _is_as_likely(initial_probs, transition_matrix, log_likelihood, path, expected) -> bool:
    paths, log_joint = path_probs(logarithm(initial_probs), logarithm(transition_matrix), log_likelihood)
    best = log_joint[(paths == expected.most_likely).all(1)]
    return bool(np.isclose(log_joint[(paths == path).all(1)], best, rtol=1e-12).all())


@pytest.mark.parametrize("transition_matrix", [LEFT_TO_RIGHT, FREE], ids=["no way back", "no such beginning"])
def test_an_impossible_sequence_is_impossible_and_no_number_is_lost(transition_matrix):
    """The evidence demands to begin in the last state, or to go back to the first."""
    emission, log_density = far_apart(2.0)
    model = model_of(FIRST, transition_matrix, emission)
    possible, impossible = np.array([[0.0], [2.0], [4.0]]), np.array([[4.0], [0.0]])
    evidence = [np.zeros((3, NUM_STATES)), np.array([[-np.inf, -np.inf, 0.0], [0.0, -np.inf, -np.inf]])]
    statistics = model.e_step(block_of([possible, impossible], None, evidence))
    assert statistics.log_likelihood == -np.inf
    expected = by_enumeration(logarithm(FIRST), logarithm(transition_matrix), log_density(possible))
    close(statistics.transitions, expected.transitions)
    close(statistics.initial, expected.smoothed[0])
    close(state_counts(statistics), expected.smoothed.sum(0))


# Longer than can be enumerated


class Long:
    """Gaussians at distances of 3 standard deviations, ragged sequences of a free chain's states, and their answers."""

    def __init__(self, topology: str):
        self.initial_probs, self.transition_matrix = random_chain(topology, 2)
        emission, log_density = far_apart(3.0)
        self.model = model_of(self.initial_probs, self.transition_matrix, emission)
        rng = np.random.default_rng(0)
        self.sequences = [3.0 * rng.integers(0, 3, (length, 1)) + rng.normal(size=(length, 1)) for length in (5_000, 700, 3)]
        log_chain = logarithm(self.initial_probs), logarithm(self.transition_matrix)
        self.answers = [in_logarithms(*log_chain, log_density(x)) for x in self.sequences]


@pytest.fixture(scope="module", params=["free", "cycle"])
def long(request) -> Long:
    return Long(request.param)


@pytest.mark.parametrize("precision", COMPUTES)
def test_statistics_of_thousands_of_steps(long, precision):
    compute, tolerance = COMPUTES[precision]
    statistics, answers = long.model.e_step(block_of(long.sequences), compute), long.answers
    close(statistics.log_likelihood, sum(a.log_prob for a in answers), tolerance)
    close(statistics.initial, sum(a.smoothed[0] for a in answers), tolerance)
    close(statistics.transitions, sum(a.transitions for a in answers), tolerance)
    close(state_counts(statistics), sum(a.smoothed.sum(0) for a in answers), tolerance)


def test_inference_in_thousands_of_steps(long):
    model, sequences = long.model, long.sequences
    close(model.log_prob(sequences), [answer.log_prob for answer in long.answers])
    for smoothed, answer in zip(model.encode(sequences), long.answers, strict=True):
        close(smoothed, answer.smoothed)
    # What is filtered knows nothing of what comes later.
    for filtered, answer in zip(model.filtered_probs([x[:1500] for x in sequences]), long.answers, strict=True):
        close(filtered, answer.filtered[:1500])
    for states, answer in zip(model.most_likely_states(sequences[1:]), long.answers[1:], strict=True):
        assert states.tolist() == answer.most_likely.tolist()


# Draws


def assert_frequencies(counts: np.ndarray, probs: np.ndarray) -> None:
    """Counts of independent draws lie within 5 standard deviations of what is expected, and what cannot be is not."""
    expected = counts.sum() * probs
    assert (np.abs(counts - expected) <= 5.0 * np.sqrt(expected * (1.0 - probs) + 1.0) * (probs > 0)).all()


@pytest.mark.parametrize("topology", ["free", "cycle"])
def test_states_drawn_from_the_posterior(topology):
    small, num_draws = Small("gaussian full", topology), 8_000
    x, log_likelihood = small.sequences[2][:4], small.log_likelihoods[2][:4]
    paths, log_joint = path_probs(*small.log_chain, log_likelihood)
    draws = torch.stack(small.model.sample_posterior_states([x] * num_draws, seed=1)).numpy()
    place = (draws * NUM_STATES ** np.arange(4)[::-1]).sum(1)  # in the order of `paths`
    np.testing.assert_array_equal(paths[place], draws)
    assert_frequencies(np.bincount(place, minlength=len(paths)), np.exp(log_joint - logsumexp(log_joint)))


def test_draws_from_the_posterior_belong_to_their_sequence_and_seed():
    small = Small("poisson")
    whole = small.model.sample_posterior_states(small.sequences * 2, seed=4)
    parts = small.model.sample_posterior_states((small.sequences * 2)[:3], seed=4)
    parts += small.model.sample_posterior_states((small.sequences * 2)[3:], seed=4, offset=sum(LENGTHS[:3]))
    assert [each.tolist() for each in whole] == [each.tolist() for each in parts]
    other = small.model.sample_posterior_states([small.sequences[2]] * 50, seed=5)
    same = small.model.sample_posterior_states([small.sequences[2]] * 50, seed=6)
    assert [each.tolist() for each in other] != [each.tolist() for each in same]


@pytest.mark.parametrize("kind", KINDS)
def test_samples_have_the_models_own_moments(kind):
    """Of each state, means of x and of products of its columns, against as many draws by NumPy; and counts of transitions."""
    small, num_samples, length = Small(kind, "left_to_right"), 500, 6
    x = small.model.sample(num_samples, seed=2, length=length).numpy()
    states = small.model.sample_states(num_samples, seed=2, length=length).numpy()
    assert x.shape == (num_samples, length, small.emission.num_columns)
    assert states.shape == (num_samples, length)
    assert_frequencies(np.bincount(states[:, 0], minlength=NUM_STATES), small.initial_probs)
    for state in range(NUM_STATES):
        left = states[:, 1:][states[:, :-1] == state]
        assert_frequencies(np.bincount(left, minlength=NUM_STATES), small.transition_matrix[state])
    rng = np.random.default_rng(7)
    for state in range(NUM_STATES):
        ours = x[states == state]
        theirs = np.array([small.emission.draw(rng, state) for _ in range(500)])
        assert len(ours) > 50
        one, other = (np.concatenate([v, (v[:, :, None] * v[:, None, :]).reshape(len(v), -1)], 1) for v in (ours, theirs))
        spread = np.sqrt(one.var(0) / len(one) + other.var(0) / len(other))
        assert (np.abs(one.mean(0) - other.mean(0)) < 5.0 * spread + 1e-12).all()


@pytest.mark.parametrize("kind", KINDS)
def test_samples_are_parts_of_one_endless_sample(kind):
    model = Small(kind).model
    for sample in (model.sample, model.sample_states):
        whole = sample(100, seed=5, length=3)
        assert torch.equal(whole, torch.cat([sample(40, seed=5, length=3), sample(60, seed=5, offset=40, length=3)]))
        assert torch.equal(whole, sample(100, seed=5, length=5)[:, :3])
        assert not torch.equal(whole, sample(100, seed=6, length=3))


# Forecasts


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("categorical", "mixed")])
def test_forecasts(kind):
    small, horizon = Small(kind, "cycle"), 3
    states = small.model.forecast_states(small.sequences, horizon)
    means = small.model.forecast(small.sequences, horizon)
    assert states.shape == (len(LENGTHS), horizon, NUM_STATES)
    for ours, our_means, log_likelihood in zip(states, means, small.log_likelihoods, strict=True):
        nothing_seen = np.zeros((horizon, NUM_STATES))
        expected = by_enumeration(*small.log_chain, np.concatenate([log_likelihood, nothing_seen])).smoothed[-horizon:]
        close(ours, expected)
        close(our_means, expected @ small.emission.means)


# Rabiner 1989, section II: the weather is rain (0), clouds (1) or sun (2), today it is sunny


WEATHER = np.array([[0.4, 0.3, 0.3], [0.2, 0.6, 0.2], [0.1, 0.1, 0.8]])


def test_rabiners_weather_that_is_seen():
    emission, _ = symbols()
    model = model_of([0.0, 0.0, 1.0], WEATHER, emission)
    days = np.array([2.0, 2.0, 2.0, 0.0, 0.0, 2.0, 1.0, 2.0])
    close(model.log_prob(days[:, None]).exp(), [1.536e-4])
    # It stays the same for d days with probability a^(d - 1) (1 - a), on average for 1 / (1 - a): 5 days of sun.
    num_days = model.sample_states(4000, seed=0, length=60).numpy()
    ends = (num_days != 2).argmax(1)
    assert abs(ends.mean() - 5.0) < 5.0 * ends.std() / np.sqrt(len(ends))


def test_rabiners_weather_behind_a_window():
    """Whether somebody carries an umbrella tells of the weather outside."""
    umbrella = np.array([0.9, 0.4, 0.05])
    distribution = Categorical(torch.tensor(np.stack([1 - umbrella, umbrella], 1)), torch.tensor([2]), has_unseen=False)
    model = model_of([0.2, 0.3, 0.5], WEATHER, Columns((Group("categorical", torch.tensor([0]), distribution),)))
    seen = np.array([1, 1, 0, 1, 0, 0, 0, 1])
    log_likelihood = np.log(np.where(seen[:, None] == 1, umbrella, 1 - umbrella))
    expected = by_enumeration(np.log([0.2, 0.3, 0.5]), np.log(WEATHER), log_likelihood)
    x = seen[:, None].astype(float)
    close(model.log_prob(x), [expected.log_prob])
    close(model.encode(x)[0], expected.smoothed)
    assert model.most_likely_states(x)[0].tolist() == expected.most_likely.tolist()
