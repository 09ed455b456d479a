"""Seconds a fit of naive Bayes with known classes: gendist in this process and on Ray, and scikit-learn, in one run.

    python benchmarks/naive_bayes.py [--cases gaussian multinomial sparse] [--repeats 3] [--workers 2] [--scale 10]

5,000,000 rows of 50 columns and 10 classes; sparse: 500,000 rows of 20,000 columns with 100 tokens each and 20 classes. All
get the same data and are interleaved; printed is the median with the range. Reading data and starting Ray are not counted:
of gendist it is the one pass that counts (`seconds` of the record), with the log-likelihood, of scikit-learn `fit`; and, for
what else a fit takes, the whole call on Ray, data from this process included. gendist uses one thread in this process, and
one a worker.

Then the share of the machine's memory bandwidth: the bytes of x by the seconds, against what as many processes reach that
only add up an array.
"""

from __future__ import annotations

import multiprocessing
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse
from sklearn.naive_bayes import GaussianNB, MultinomialNB
from tables import print_machine, print_table, scale_option, with_range

NUM_CLASSES = 10
READ_BYTES = 1 << 30
ANSWER_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Case:
    kind: str
    num_rows: int
    num_columns: int
    num_classes: int = NUM_CLASSES
    num_tokens: int = 0  # of a row, where x is sparse

    def data(self, scale: int) -> tuple[Any, np.ndarray]:
        """x, and the class of each row."""
        rng, num_rows = np.random.default_rng(0), self.num_rows // scale
        y = rng.integers(0, self.num_classes, num_rows)
        if self.num_tokens:
            common = rng.zipf(1.3, num_rows * self.num_tokens) % (self.num_columns // 2)
            columns = (common + np.repeat(y, self.num_tokens) * 50) % self.num_columns
            bounds = np.arange(0, num_rows * self.num_tokens + 1, self.num_tokens)
            x = scipy.sparse.csr_matrix((np.ones(len(columns)), columns, bounds), (num_rows, self.num_columns))
            x.sum_duplicates()
            return x, y
        centers = rng.normal(size=(self.num_classes, self.num_columns))
        x = np.empty((num_rows, self.num_columns))
        for start in range(0, num_rows, 100_000):
            rows = slice(start, start + 100_000)
            x[rows] = centers[y[rows]] + rng.normal(size=x[rows].shape)
            if self.kind == "multinomial":
                x[rows] = np.floor(np.exp(0.5 * x[rows]))
        return x, y

    def title(self, x: Any) -> str:
        return (
            f"{self.kind}{', sparse' if self.num_tokens else ''}, {x.shape[0]:,} x {x.shape[1]:,}, {self.num_classes} classes"
        )


CASES = {
    "gaussian": Case("gaussian", 5_000_000, 50),
    "multinomial": Case("multinomial", 5_000_000, 50),
    "sparse": Case("multinomial", 500_000, 20_000, num_classes=20, num_tokens=100),
}


def seconds_of_sklearn(case: Case, x: Any, y: np.ndarray) -> tuple[float, Any]:
    estimator = GaussianNB(var_smoothing=0.0) if case.kind == "gaussian" else MultinomialNB()
    began = time.perf_counter()
    estimator.fit(x, y)
    return time.perf_counter() - began, estimator


def seconds_of_gendist(case: Case, x: Any, y: np.ndarray, num_workers: int, precision: str) -> tuple[float, float, Any]:
    """Of the pass that counts, and of the whole call."""
    import gendist

    spec = {
        "name": "benchmark",
        "family": "naive_bayes",
        "model": {"kind": case.kind, "covariance_regularization": 0.0},
        "data": {"label": "y", "columns": ["x"]},
        "fit": {"precision": precision},
        "cluster": {"num_workers": num_workers},
    }
    began = time.perf_counter()
    run = gendist.fit(spec, data={"x": x, "y": y})
    return run.history[0]["seconds"], time.perf_counter() - began, run.model


def read_bytes_per_s(num_processes: int) -> float:
    """What processes of one thread reach together that add up arrays of their own."""
    context = multiprocessing.get_context("spawn")
    barrier, answers = context.Barrier(num_processes), context.Queue()
    processes = [context.Process(target=_read, args=(barrier, answers), daemon=True) for _ in range(num_processes)]
    for process in processes:
        process.start()
    seconds = [answers.get(timeout=ANSWER_TIMEOUT_S) for _ in processes]
    for process in processes:
        process.join(ANSWER_TIMEOUT_S)
    return num_processes * READ_BYTES / max(seconds)


def _read(barrier: Any, answers: Any) -> None:
    import torch

    torch.set_num_threads(1)
    values = torch.ones(READ_BYTES // 8, dtype=torch.float64)
    taken = []
    for _ in range(3):
        barrier.wait(ANSWER_TIMEOUT_S)
        began = time.perf_counter()
        values.sum()
        taken.append(time.perf_counter() - began)
    answers.put(min(taken))


def measure(case: Case, scale: int, repeats: int, num_workers: int, bandwidths: dict[int, float]) -> None:
    x, y = case.data(scale)
    contenders = {
        "gendist, this process, float64": (0, "float64"),
        f"gendist, Ray, {num_workers} workers, float64": (num_workers, "float64"),
        f"gendist, Ray, {num_workers} workers, float32": (num_workers, "float32"),
    }
    taken: dict[str, list[float]] = {"scikit-learn": [], **{name: [] for name in contenders}}
    whole: dict[str, list[float]] = {name: [] for name in taken}
    for _ in range(repeats):
        seconds, estimator = seconds_of_sklearn(case, x, y)
        taken["scikit-learn"].append(seconds)
        whole["scikit-learn"].append(seconds)
        for name, (workers, precision) in contenders.items():
            counting, total, model = seconds_of_gendist(case, x, y, workers, precision)
            taken[name].append(counting)
            whole[name].append(total)
            if precision == "float64":
                expected = estimator.predict_joint_log_proba(x[:1000])
                np.testing.assert_allclose(model.joint_log_prob(x[:1000]), expected, rtol=1e-8, atol=1e-6)
    num_bytes = x.data.nbytes + x.indices.nbytes if scipy.sparse.issparse(x) else x.nbytes
    baseline = float(np.median(taken["scikit-learn"]))
    rows = []
    for name, values in taken.items():
        workers = contenders[name][0] or 1 if name in contenders else None
        share = "" if workers is None else f"{num_bytes / np.median(values) / bandwidths[workers]:.0%}"
        rows.append([name, with_range(values), f"{baseline / np.median(values):.1f}", share, f"{np.median(whole[name]):.1f}"])
    print_table([case.title(x), "s/fit", "times scikit-learn's speed", "share of bandwidth", "whole call, s"], rows)


def main() -> None:
    parser = scale_option(__doc__)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    print_machine(arguments.scale)
    bandwidths = {num: read_bytes_per_s(num) for num in {1, arguments.workers}}
    print(
        "memory bandwidth: " + ", ".join(f"{num} processes {each / 1e9:.1f} GB/s" for num, each in sorted(bandwidths.items()))
    )
    for name in arguments.cases:
        measure(CASES[name], arguments.scale, arguments.repeats, arguments.workers, bandwidths)


if __name__ == "__main__":
    main()
