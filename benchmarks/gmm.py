"""Seconds an EM iteration of a Gaussian mixture: gendist in this process, gendist on Ray, and scikit-learn, in one run.

    python benchmarks/gmm.py [--cases a b] [--repeats 3] [--workers 2]

All get the same data, the same start and the same number of iterations in float64; runs are interleaved, and the median
is printed with the range. Reading data, starting Ray and choosing a start are not counted: of gendist's fit, the median
`seconds` of the records after the first; of scikit-learn, the time of 6 iterations less that of 1, over 5.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
import warnings
from dataclasses import dataclass

import numpy as np

NUM_ITERATIONS = 6


@dataclass(frozen=True)
class Case:
    num_samples: int
    num_features: int
    num_components: int
    covariance_type: str

    def data(self) -> np.ndarray:
        """Overlapping clusters of random shapes."""
        rng = np.random.default_rng(0)
        means = 3.0 * rng.normal(size=(self.num_components, self.num_features))
        factors = rng.normal(size=(self.num_components, self.num_features, self.num_features)) / self.num_features**0.5
        which = np.sort(rng.integers(0, self.num_components, self.num_samples))
        x = rng.normal(size=(self.num_samples, self.num_features))
        for k in range(self.num_components):
            x[which == k] = means[k] + x[which == k] @ (factors[k] + np.eye(self.num_features))
        return rng.permutation(x)


CASES = {
    "a": Case(1_000_000, 16, 16, "full"),
    "b": Case(200_000, 64, 32, "full"),
    "b-diag": Case(200_000, 64, 32, "diag"),
}


def estimator(case: Case, x: np.ndarray, num_iterations: int):
    """scikit-learn's, at a start that all share: random rows, the covariance of the data."""
    from sklearn.mixture import GaussianMixture

    rng = np.random.default_rng(1)
    inverse = np.linalg.inv(np.cov(x.T)) if case.covariance_type == "full" else 1.0 / x.var(0)
    return GaussianMixture(
        case.num_components,
        covariance_type=case.covariance_type,
        weights_init=np.full(case.num_components, 1.0 / case.num_components),
        means_init=x[rng.choice(len(x), case.num_components, replace=False)],
        precisions_init=np.stack([inverse] * case.num_components),
        max_iter=num_iterations,
        tol=0.0,
    )


def seconds_of_sklearn(case: Case, x: np.ndarray) -> float:
    taken = {}
    for num_iterations in (1, NUM_ITERATIONS):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it did not converge
            began = time.perf_counter()
            estimator(case, x, num_iterations).fit(x)
            taken[num_iterations] = time.perf_counter() - began
    return (taken[NUM_ITERATIONS] - taken[1]) / (NUM_ITERATIONS - 1)


def seconds_of_gendist(case: Case, x: np.ndarray, num_workers: int) -> float:
    import gendist

    run = gendist.fit(
        {
            "name": "benchmark",
            "family": "gmm",
            "model": {"num_components": case.num_components, "covariance_type": case.covariance_type},
            "fit": {"max_iterations": NUM_ITERATIONS, "tolerance": 0.0},
            "cluster": {"num_workers": num_workers},
        },
        data=x,
        init=estimator(case, x, 1),
    )
    return statistics.median(record["seconds"] for record in run.history[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    from gendist.machine import machine_type, versions

    print(f"{machine_type()}, {os.cpu_count()} cores, {platform.system()}; {versions()}")
    print(f"{'case':<8}{'who':<24}{'s/iteration':>12}{'range':>18}{'times scikit-learn':>20}")
    for name in arguments.cases:
        case, x = CASES[name], CASES[name].data()
        contenders = {
            "scikit-learn": lambda case=case, x=x: seconds_of_sklearn(case, x),
            "gendist, this process": lambda case=case, x=x: seconds_of_gendist(case, x, 0),
            f"gendist, Ray, {arguments.workers} workers": lambda case=case, x=x: seconds_of_gendist(case, x, arguments.workers),
        }
        taken: dict[str, list[float]] = {who: [] for who in contenders}
        for _ in range(arguments.repeats):
            for who, measure in contenders.items():
                taken[who].append(measure())
        reference = statistics.median(taken["scikit-learn"])
        for who, values in taken.items():
            median = statistics.median(values)
            spread = f"{min(values):.3f} to {max(values):.3f}"
            print(f"{name:<8}{who:<24}{median:>12.3f}{spread:>18}{reference / median:>20.2f}")


if __name__ == "__main__":
    main()
