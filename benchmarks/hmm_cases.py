"""What the benchmarks of hidden Markov models share: the cases, and where every contender starts.

Legend: S sequences, T steps, K states, D features, C symbols.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

STAY = 0.9  # the probability of a state to last, in the data and where all contenders begin
NUM_SYMBOLS = 50


@dataclass(frozen=True)
class Case:
    """num_features is 0 where the emissions are categorical."""

    num_sequences: int
    num_steps: int
    num_states: int
    num_features: int

    def data(self, scale: int = 1) -> np.ndarray:
        """(S, T, D) float64, of categories (S, T, 1) int64: of a scale, fewer sequences, or where there is one, fewer steps."""
        num_sequences, num_steps = max(self.num_sequences // scale, 1), self.num_steps
        if self.num_sequences == 1:
            num_steps //= scale
        rng = np.random.default_rng(0)
        states = sticky_states(rng, num_sequences, num_steps, self.num_states)
        if self.num_features == 0:
            cumulative = rng.dirichlet(np.full(NUM_SYMBOLS, 0.3), self.num_states).cumsum(1)
            u = rng.random((*states.shape, 1))
            return (cumulative[states, :-1] <= u * cumulative[states, -1:]).sum(2)[:, :, None]
        x = rng.normal(size=(*states.shape, self.num_features))
        x += 1.5 * rng.normal(size=(self.num_states, self.num_features))[states]
        return x

    def title(self, x: np.ndarray) -> str:
        what = f"{x.shape[2]} features, diag" if self.num_features else f"{NUM_SYMBOLS} symbols"
        return f"{x.shape[0]:,} x {x.shape[1]:,} steps, {what}, {self.num_states} states"


CASES = {
    "a": Case(2_000, 500, 16, 8),
    "b": Case(1, 1_000_000, 8, 8),
    "c": Case(20_000, 50, 32, 8),
    "a-categorical": Case(2_000, 500, 16, 0),
    "c-categorical": Case(20_000, 50, 32, 0),
}


def sticky_states(rng: np.random.Generator, num_sequences: int, num_steps: int, num_states: int) -> np.ndarray:
    """(S, T) states that last with probability `STAY`, and else jump to any."""
    jumps = rng.random((num_sequences, num_steps)) >= STAY
    jumps[:, 0] = True
    drawn = rng.integers(0, num_states, jumps.shape)
    latest_jump = np.maximum.accumulate(np.where(jumps, np.arange(num_steps), 0), axis=1)
    return np.take_along_axis(drawn, latest_jump, 1)


def start(case: Case, x: np.ndarray, num_iterations: int = 1) -> Any:
    """hmmlearn's estimator where all contenders begin: means of random steps, the variances of the data; or random symbols. It
    maximises the likelihood alone, and makes all its iterations."""
    from hmmlearn import hmm

    rng, num_states = np.random.default_rng(1), case.num_states
    shared = {"implementation": "scaling", "n_iter": num_iterations, "init_params": ""}
    if case.num_features:
        estimator = hmm.GaussianHMM(num_states, covariance_type="diag", min_covar=0.0, covars_prior=0.0, **shared)
        rows = x.reshape(-1, x.shape[2])
        estimator.means_ = rows[rng.choice(len(rows), num_states, replace=False)]
        estimator.covars_ = np.tile(rows.var(0), (num_states, 1))
        estimator.n_features = rows.shape[1]
    else:
        estimator = hmm.CategoricalHMM(num_states, n_features=NUM_SYMBOLS, **shared)
        estimator.emissionprob_ = rng.dirichlet(np.full(NUM_SYMBOLS, 5.0), num_states)
    estimator.startprob_ = np.full(num_states, 1.0 / num_states)
    stays = np.eye(num_states)
    estimator.transmat_ = STAY * stays + (1.0 - STAY) / max(num_states - 1, 1) * (1.0 - stays)
    estimator.monitor_.tol = -np.inf
    return estimator


def spec(case: Case, num_iterations: int, num_workers: int, precision: str = "float64", **data: Any) -> dict[str, Any]:
    """What gendist is to fit; `data` is the spec's data: block."""
    emission: dict[str, Any] = {"kind": "categorical", "pseudocount": 0.0, "unseen_categories": False}
    if case.num_features:
        emission = {"kind": "gaussian", "covariance_type": "diag", "covariance_regularization": 0.0}
    return {
        "name": "benchmark",
        "family": "hmm",
        "model": {"num_states": case.num_states, "emission": emission},
        "data": data,
        "fit": {"max_iterations": num_iterations, "tolerance": 0.0, "precision": precision},
        "cluster": {"num_workers": num_workers},
    }
