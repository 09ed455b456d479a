"""What a hidden Markov model's answers must be: by looking at every path of states, and, for longer sequences, in logarithms.

Plain NumPy of log p(x_t | s_t = k), whatever that is of: no word of gendist. Evidence is added to the log-likelihoods.
Legend: T steps, K states, P = K^T paths.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import logsumexp

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Answers:
    """Of one sequence; of one that is impossible the probabilities are 0.

    log_prob     log p(x)
    smoothed     (T, K) p(s_t | all of x)
    filtered     (T, K) p(s_t | x up to t)
    transitions  (K, K) sum over t of p(s_t = i, s_t+1 = j | x)
    most_likely  (T,) the path of the largest p(path, x)
    """

    log_prob: float
    smoothed: Array
    filtered: Array
    transitions: Array
    most_likely: Array


def path_probs(log_initial: Array, log_transition: Array, log_likelihood: Array) -> tuple[Array, Array]:
    """(P, T) every path, and (P,) log p(path, x)."""
    num_steps, num_states = log_likelihood.shape
    paths = np.array(list(itertools.product(range(num_states), repeat=num_steps)), dtype=np.int64)
    paths = paths.reshape(num_states**num_steps, num_steps)
    log_joint = np.zeros(len(paths))
    for t in range(num_steps):
        log_joint += log_initial[paths[:, 0]] if t == 0 else log_transition[paths[:, t - 1], paths[:, t]]
        log_joint += log_likelihood[t, paths[:, t]]
    return paths, log_joint


def by_enumeration(log_initial: Array, log_transition: Array, log_likelihood: Array) -> Answers:
    """Of all K^T paths: for a handful of steps."""
    num_steps, num_states = log_likelihood.shape
    paths, log_joint = path_probs(log_initial, log_transition, log_likelihood)
    log_prob, prob = _normalized(log_joint)
    smoothed, transitions = np.zeros((num_steps, num_states)), np.zeros((num_states, num_states))
    filtered = np.zeros_like(smoothed)
    for t in range(num_steps):
        np.add.at(smoothed[t], paths[:, t], prob)
        if t > 0:
            np.add.at(transitions, (paths[:, t - 1], paths[:, t]), prob)
        so_far, log_so_far = path_probs(log_initial, log_transition, log_likelihood[: t + 1])
        np.add.at(filtered[t], so_far[:, t], _normalized(log_so_far)[1])
    return Answers(log_prob, smoothed, filtered, transitions, paths[np.argmax(log_joint)])


def in_logarithms(log_initial: Array, log_transition: Array, log_likelihood: Array) -> Answers:
    """Forward, backward and Viterbi (Rabiner 1989, eqs. 19-25, 33 and 37) of a sequence of one step or more, which is possible.

    What a message has gained is taken off at each step and summed apart, or else the digits behind the point would be lost to
    the size of the sum.
    """
    num_steps, num_states = log_likelihood.shape
    log_filtered, log_beta = np.empty((num_steps, num_states)), np.zeros((num_steps, num_states))
    best, came_from = np.empty((num_steps, num_states)), np.zeros((num_steps, num_states), dtype=np.int64)
    gains = np.empty(num_steps)
    for t in range(num_steps):
        arriving = best[t - 1][:, None] + log_transition if t else log_initial[None]
        predicted = _log_sum(log_filtered[t - 1][:, None] + log_transition, 0) if t else log_initial
        gains[t] = _log_sum(predicted + log_likelihood[t], 0)
        log_filtered[t] = predicted + log_likelihood[t] - gains[t]
        came_from[t] = arriving.argmax(0)
        best[t] = arriving.max(0) + log_likelihood[t]
        best[t] -= best[t].max()
    for t in range(num_steps - 2, -1, -1):
        log_beta[t] = _log_sum(log_transition + log_likelihood[t + 1] + log_beta[t + 1], 1) - gains[t + 1]
    transitions = np.zeros((num_states, num_states))
    for steps in np.array_split(np.arange(num_steps - 1), max(1, num_steps // 1000)):
        arriving = (log_likelihood + log_beta - gains[:, None])[steps + 1, None, :]
        transitions += np.exp(log_filtered[steps, :, None] + log_transition + arriving).sum(0)
    most_likely = np.empty(num_steps, dtype=np.int64)
    most_likely[-1] = best[-1].argmax()
    for t in range(num_steps - 2, -1, -1):
        most_likely[t] = came_from[t + 1, most_likely[t + 1]]
    smoothed = np.exp(log_filtered + log_beta)
    return Answers(math.fsum(gains), smoothed, np.exp(log_filtered), transitions, most_likely)


def logarithm(values: Any) -> Array:
    """log, of 0 without a warning."""
    with np.errstate(divide="ignore"):
        return np.log(np.asarray(values, dtype=np.float64))


def _normalized(log_joint: Array) -> tuple[float, Array]:
    total = float(logsumexp(log_joint))
    return total, np.exp(log_joint - total) if total > -np.inf else np.zeros_like(log_joint)


def _log_sum(values: Array, axis: int) -> Array:
    """What scipy's logsumexp says, in a tenth of the time for a few numbers."""
    largest = values.max(axis)
    largest = np.where(np.isfinite(largest), largest, 0.0)
    return logarithm(np.exp(values - np.expand_dims(largest, axis)).sum(axis)) + largest
