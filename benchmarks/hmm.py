"""Seconds an EM iteration of a hidden Markov model: gendist in this process and on Ray, hmmlearn, dynamax, in one run.

    python benchmarks/hmm.py [--cases a b c a-categorical c-categorical] [--repeats 3] [--workers 2] [--scale 20]

All get the same data, start and number of iterations, 6. Runs are interleaved; printed is the median with the range. Reading
data, starting Ray and choosing a start are not counted: of gendist's fit, the median `seconds` of the records after the first;
of the others, the time of 6 iterations less that of 1, over 5. hmmlearn runs with implementation="scaling", its priors are
switched off, and it uses one thread; gendist uses one in this process, and one a worker; dynamax, where it is installed, as
many as it likes, in float32. The log-likelihoods of all iterations in float64 must be hmmlearn's, or the run fails.

Then samples a second of 16 states and 100 steps, of gendist and of hmmlearn.
"""

from __future__ import annotations

import importlib.util
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from hmm_cases import CASES, Case, spec, start
from tables import print_machine, print_table, scale_option, with_range

NUM_ITERATIONS = 6
PRECISIONS = ("float64", "float32")
NUM_SAMPLES, NUM_SAMPLES_OF_HMMLEARN, SAMPLE_LENGTH = 50_000, 100, 100


def log_likelihoods_of_hmmlearn(case: Case, x: np.ndarray, num_iterations: int) -> np.ndarray:
    rows, lengths = x.reshape(-1, x.shape[2]), np.full(len(x), x.shape[1])
    return np.array(start(case, x, num_iterations).fit(rows, lengths).monitor_.history)


def seconds_of_hmmlearn(case: Case, x: np.ndarray) -> float:
    return seconds_an_iteration(partial(log_likelihoods_of_hmmlearn, case, x))


def seconds_an_iteration(run: Callable[[int], Any]) -> float:
    """Of what makes so many iterations, without what comes before the first."""
    taken = {}
    for num_iterations in (1, NUM_ITERATIONS):
        began = time.perf_counter()
        run(num_iterations)
        taken[num_iterations] = time.perf_counter() - began
    return (taken[NUM_ITERATIONS] - taken[1]) / (NUM_ITERATIONS - 1)


def fit(case: Case, x: np.ndarray, num_workers: int, precision: str) -> Any:
    import gendist
    from gendist.models.hmm import HiddenMarkovModel

    model = HiddenMarkovModel.from_hmmlearn(start(case, x))
    return gendist.fit(spec(case, NUM_ITERATIONS, num_workers, precision), data=list(x), init=model)


def seconds_of_gendist(case: Case, x: np.ndarray, num_workers: int, precision: str, expected: np.ndarray) -> float:
    """The trace must be as expected, but for rounding."""
    history = fit(case, x, num_workers, precision).history
    trace = np.array([record["log_likelihood"] for record in history])
    np.testing.assert_allclose(trace, expected, rtol=1e-8 if precision == "float64" else 1e-4)
    return statistics.median(record["seconds"] for record in history[1:])


def seconds_of_dynamax(case: Case, x: np.ndarray) -> float:
    """With its own weak priors. Each fit compiles its iteration anew, whatever their number, which is not counted."""
    import jax.numpy as jnp
    from dynamax.hidden_markov_model import CategoricalHMM, DiagonalGaussianHMM

    estimator = start(case, x)
    chain = {"initial_probs": jnp.array(estimator.startprob_), "transition_matrix": jnp.array(estimator.transmat_)}
    if case.num_features:
        model = DiagonalGaussianHMM(case.num_states, case.num_features)
        scales = jnp.array(np.sqrt(estimator.covars_.diagonal(axis1=1, axis2=2)))
        own = {"emission_means": jnp.array(estimator.means_), "emission_scale_diags": scales}
        emissions = jnp.array(x, dtype=jnp.float32)
    else:
        model = CategoricalHMM(case.num_states, 1, estimator.n_features)
        own = {"emission_probs": jnp.array(estimator.emissionprob_)[:, None, :]}
        emissions = jnp.array(x)
    params, props = model.initialize(**chain, **own)
    run = partial(model.fit_em, params, props, emissions, verbose=False)
    return seconds_an_iteration(lambda num_iterations: np.asarray(run(num_iters=num_iterations)[1]))


def compare(case: Case, x: np.ndarray, num_workers: int, repeats: int, with_dynamax: bool) -> None:
    """Print the seconds of an iteration of every contender."""
    expected = log_likelihoods_of_hmmlearn(case, x, NUM_ITERATIONS) / (x.shape[0] * x.shape[1])
    contenders: dict[str, Callable[[], float]] = {"hmmlearn, scaling": partial(seconds_of_hmmlearn, case, x)}
    for precision in PRECISIONS:
        for who, workers in (("this process", 0), (f"Ray, {num_workers} workers", num_workers)):
            name = f"gendist, {who}, {precision}"
            contenders[name] = partial(seconds_of_gendist, case, x, workers, precision, expected)
    if with_dynamax:
        contenders["dynamax, float32"] = partial(seconds_of_dynamax, case, x)
    taken: dict[str, list[float]] = {who: [] for who in contenders}
    for _ in range(repeats):
        for who, measure in contenders.items():
            taken[who].append(measure())
    medians = {who: statistics.median(values) for who, values in taken.items()}
    rows = [[who, with_range(taken[who]), f"{medians['hmmlearn, scaling'] / medians[who]:.1f}"] for who in taken]
    print_table([case.title(x), "s/iteration", "times hmmlearn's speed"], rows)


def compare_samples(repeats: int, scale: int) -> None:
    """Print sequences a second, observations and all, of one model."""
    from gendist.models.hmm import HiddenMarkovModel

    case = CASES["a"]
    estimator = start(case, case.data(1000))
    model, num_samples = HiddenMarkovModel.from_hmmlearn(estimator), max(NUM_SAMPLES // scale, 1000)
    rates: dict[str, list[float]] = {"hmmlearn": [], f"gendist, {num_samples:,} a call": []}
    theirs, ours = rates.values()
    model.sample(1000, length=SAMPLE_LENGTH)  # what the first call does once is no part of it
    estimator.sample(SAMPLE_LENGTH, random_state=0)
    for seed in range(repeats):
        began = time.perf_counter()
        for each in range(NUM_SAMPLES_OF_HMMLEARN):
            estimator.sample(SAMPLE_LENGTH, random_state=NUM_SAMPLES_OF_HMMLEARN * seed + each)
        theirs.append(NUM_SAMPLES_OF_HMMLEARN / (time.perf_counter() - began))
        began = time.perf_counter()
        model.sample(num_samples, seed=seed, length=SAMPLE_LENGTH)
        ours.append(num_samples / (time.perf_counter() - began))
    title = f"samples of {SAMPLE_LENGTH} steps, {case.num_features} features, {case.num_states} states"
    baseline = statistics.median(theirs)
    rows = [[who, with_range(values, 0), f"{statistics.median(values) / baseline:.0f}"] for who, values in rates.items()]
    print_table([title, "sequences/s", "times hmmlearn's speed"], rows)


def main() -> None:
    parser = scale_option(__doc__)
    parser.add_argument("--cases", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1))
    arguments = parser.parse_args()
    print_machine(arguments.scale)
    with_dynamax = importlib.util.find_spec("dynamax") is not None
    if not with_dynamax:
        print("dynamax is not installed and is left out")
    seconds_of_hmmlearn(CASES["a"], CASES["a"].data(1000))  # its first fit imports
    print(
        f"Seconds an EM iteration: medians (range) of {arguments.repeats} interleaved runs of {NUM_ITERATIONS} iterations each"
    )
    for name in arguments.cases:
        case = CASES[name]
        compare(case, case.data(arguments.scale), arguments.workers, arguments.repeats, with_dynamax)
    compare_samples(arguments.repeats, arguments.scale)


if __name__ == "__main__":
    main()
