"""Rows a second that a Gaussian mixture draws, in one large call and in many small ones: gendist and scikit-learn.

    python benchmarks/gmm_sampling.py [--repeats 3] [--scale 10]

64 components, 50 features, full covariances, float64, in this process; runs are interleaved; printed is the median with the
range. gendist's rows are addressed (row i of a seed is the same in whatever call it is drawn), scikit-learn's are not.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import numpy as np
from gmm_cases import random_clusters
from tables import print_machine, print_table, scale_option, with_range

NUM_COMPONENTS, NUM_FEATURES = 64, 50
NUM_ROWS = 1_000_000
ROWS_A_CALL, NUM_CALLS = 16, 30


def main() -> None:
    parser = scale_option(__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    from gendist.models.gmm import GaussianMixture

    print_machine(arguments.scale)
    means, factors = random_clusters(np.random.default_rng(0), NUM_FEATURES, NUM_COMPONENTS)
    weights = np.full(NUM_COMPONENTS, 1.0 / NUM_COMPONENTS)
    model = GaussianMixture.from_parameters(weights, means, factors @ factors.transpose(0, 2, 1), covariance_type="full")
    estimator = model.to_sklearn()
    contenders: dict[str, Callable[[int], object]] = {"scikit-learn": estimator.sample, "gendist": model.sample}
    num_rows = NUM_ROWS // arguments.scale
    rows_per_s: dict[str, list[float]] = {who: [] for who in contenders}
    calls_per_s: dict[str, list[float]] = {who: [] for who in contenders}
    for draw in contenders.values():
        draw(ROWS_A_CALL)
    for _ in range(arguments.repeats):
        for who, draw in contenders.items():
            began = time.perf_counter()
            draw(num_rows)
            rows_per_s[who].append(num_rows / (time.perf_counter() - began))
            began = time.perf_counter()
            for _ in range(NUM_CALLS):
                draw(ROWS_A_CALL)
            calls_per_s[who].append(NUM_CALLS / (time.perf_counter() - began))
    rows = []
    for who in contenders:
        times = [median(values[who]) / median(values["scikit-learn"]) for values in (rows_per_s, calls_per_s)]
        million_rows, calls = [rate / 1e6 for rate in rows_per_s[who]], calls_per_s[who]
        rows.append([who, with_range(million_rows), f"{times[0]:.1f}", with_range(calls, 0), f"{times[1]:.1f}"])
    header = [f"{NUM_COMPONENTS} components x {NUM_FEATURES}, full", f"million rows/s of {num_rows:,} in a call", "times"]
    print_table([*header, f"calls/s of {ROWS_A_CALL} rows", "times scikit-learn"], rows)


if __name__ == "__main__":
    main()
