"""Seconds an EM iteration of a Gaussian mixture: gendist in this process and on Ray, scikit-learn, Spark MLlib, in one run.

    python benchmarks/gmm.py [--cases a b b-diag c] [--repeats 3] [--workers 2] [--scale 10] [--spark a]

All get the same data and number of iterations, 6, and but for Spark, which takes no initial model, the same start: random
rows, the covariance of the data, equal weights. Runs are interleaved; printed is the median with the range. Reading data,
starting Ray and choosing a start are not counted: of gendist's fit, the median `seconds` of the records after the first; of
the others, the time of 6 iterations less that of 1, over 5. scikit-learn uses as many threads as there are cores; gendist
uses one in this process, and one a worker.

Then, of the iteration on Ray: the share that is not kernel, the share of the machine's peak of matrix products, and weak
scaling (twice the rows on twice the workers).
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from gmm_cases import CASES, MNIST, Case, spec, start
from gmm_spark import SparkMixture, spark_session, what_spark_lacks
from tables import print_machine, print_table, scale_option, with_range

NUM_ITERATIONS = 6
PRECISIONS = ("float64", "float32")
PRODUCT_SIZE = 1024  # rows and columns of the matrices whose product is the machine's peak
NUM_PASSES = 5
ANSWER_TIMEOUT_S = 600.0


def seconds_of_sklearn(case: Case, x: np.ndarray) -> float:
    taken = {}
    for num_iterations in (1, NUM_ITERATIONS):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it did not converge
            began = time.perf_counter()
            start(case, x, num_iterations).fit(x)
            taken[num_iterations] = time.perf_counter() - began
    return (taken[NUM_ITERATIONS] - taken[1]) / (NUM_ITERATIONS - 1)


def fit(case: Case, x: np.ndarray, num_workers: int, precision: str) -> Any:
    import gendist

    return gendist.fit(spec(case, NUM_ITERATIONS, num_workers, precision), data=x, init=start(case, x))


def seconds_of_gendist(case: Case, x: np.ndarray, num_workers: int, precision: str = "float64") -> float:
    return statistics.median(record["seconds"] for record in fit(case, x, num_workers, precision).history[1:])


def at_once(prepare: Callable[..., Callable[[], Any]], arguments: list[tuple[Any, ...]]) -> float:
    """Seconds of prepare(*arguments)() in as many processes as there are tuples of arguments, each with one thread: the
    mean over the processes of the median of some passes, which all begin together. What two cores share (memory, caches,
    perhaps one core's units) shows in the difference between one process and two."""
    context = multiprocessing.get_context("spawn")
    barrier, answers = context.Barrier(len(arguments)), context.Queue()
    processes = [context.Process(target=_passes, args=(barrier, answers, prepare, each), daemon=True) for each in arguments]
    for process in processes:
        process.start()
    seconds = [answers.get(timeout=ANSWER_TIMEOUT_S) for _ in processes]
    for process in processes:
        process.join(ANSWER_TIMEOUT_S)
    return statistics.mean(seconds)


def _passes(barrier: Any, answers: Any, prepare: Callable[..., Callable[[], Any]], arguments: tuple[Any, ...]) -> None:
    from gendist.one_thread import one_thread

    with one_thread():
        work = prepare(*arguments)
        work()
        seconds = []
        for _ in range(NUM_PASSES):
            barrier.wait(ANSWER_TIMEOUT_S)
            began = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - began)
    answers.put(statistics.median(seconds))


def kernel_pass(x: np.ndarray, model: Any, precision: str) -> Callable[[], Any]:
    """The E-step over the blocks that a fit makes of x, merged, and nothing else."""
    from gendist.blocks import LocalBlocks, reduce
    from gendist.data import Dataset, Schema, source_of
    from gendist.data.sources import DataConfig
    from gendist.protocols import Compute

    source, config = source_of(x), DataConfig()
    blocks = Dataset.open(source, config, Schema.of(source, config), LocalBlocks).blocks()
    model = getattr(model, "plain", model)
    return partial(reduce, partial(type(model).e_step, compute=Compute(precision)), blocks, model)


def matrix_product(precision: str) -> Callable[[], Any]:
    import torch

    a = torch.rand(PRODUCT_SIZE, PRODUCT_SIZE, dtype=getattr(torch, precision))
    out = torch.empty_like(a)
    return lambda: [torch.mm(a, a, out=out) for _ in range(8)]


def peak_flops(precision: str, num_processes: int) -> float:
    """Of one of so many processes at work at once, each with one thread."""
    return 8 * 2 * PRODUCT_SIZE**3 / at_once(matrix_product, [(precision,)] * num_processes)


def useful_flops(case: Case, x: np.ndarray) -> int:
    """Of an iteration: the products that give densities and moments from the F sufficient statistics of a row, 2 N K F each."""
    num_samples, num_features = x.shape
    num_statistics = 2 * num_features if case.covariance_type == "diag" else num_features * (num_features + 3) // 2
    return 4 * num_samples * case.num_components * num_statistics


def compare(case: Case, x: np.ndarray, num_workers: int, repeats: int, with_spark: bool) -> dict[str, float]:
    """Print the seconds of an iteration of every contender; return those on Ray by precision."""
    contenders: dict[str, Callable[[], float]] = {"scikit-learn": partial(seconds_of_sklearn, case, x)}
    on_ray = {precision: f"gendist, Ray, {num_workers} workers, {precision}" for precision in PRECISIONS}
    for precision in PRECISIONS:
        contenders[f"gendist, this process, {precision}"] = partial(seconds_of_gendist, case, x, 0, precision)
        contenders[on_ray[precision]] = partial(seconds_of_gendist, case, x, num_workers, precision)
    with ExitStack() as stack:
        if with_spark:
            spark = SparkMixture(stack.enter_context(spark_session(num_workers)), case, x)
            stack.callback(spark.close)
            contenders[f"Spark MLlib, local[{num_workers}]"] = partial(spark.seconds_per_iteration, NUM_ITERATIONS)
        taken: dict[str, list[float]] = {who: [] for who in contenders}
        for _ in range(repeats):
            for who, measure in contenders.items():
                taken[who].append(measure())
    medians = {who: statistics.median(values) for who, values in taken.items()}
    rows = [[who, with_range(taken[who]), f"{medians['scikit-learn'] / medians[who]:.1f}"] for who in taken]
    print_table([case.title(x), "s/iteration", "times scikit-learn's speed"], rows)
    return {precision: medians[who] for precision, who in on_ray.items()}


def take_apart(case: Case, x: np.ndarray, num_workers: int, on_ray: dict[str, float]) -> None:
    """Print what of an iteration on Ray is the kernel, and how near the kernel is to the machine's matrix products."""
    model = fit(case, x, 0, "float64").model
    flops, rows = useful_flops(case, x), []
    for precision, seconds in on_ray.items():
        for num_processes in sorted({1, num_workers}):
            parts = np.array_split(x, num_processes)
            kernel_seconds = at_once(kernel_pass, [(part, model, precision) for part in parts]) * num_processes / num_workers
            peak = num_workers * peak_flops(precision, num_processes)
            row = [
                f"{precision}, {num_processes}",
                f"{kernel_seconds:.3f}",
                f"{seconds:.3f}",
                f"{1 - kernel_seconds / seconds:.1%}",
            ]
            rows.append([*row, f"{peak / 1e9:.0f}", f"{flops / peak / kernel_seconds:.0%}", f"{flops / peak / seconds:.0%}"])
    kernel_columns = [
        "kernel alone, in so many processes",
        "s/workers",
        "s/iteration on Ray",
        "not kernel (Ray, merging, M-step)",
    ]
    print_table([*kernel_columns, "peak Gflop/s x workers", "kernel's share of it", "iteration's share"], rows)


def weak_scaling(case: Case, x: np.ndarray, num_workers: int, repeats: int) -> None:
    """Print an iteration of a part of the rows on one worker, and of all on all workers; and of the kernel, without Ray."""
    part = x[: len(x) // num_workers]
    ones, alls = [], []
    for _ in range(repeats):
        ones.append(seconds_of_gendist(case, part, 1))
        alls.append(seconds_of_gendist(case, x, num_workers))
    model = fit(case, part, 0, "float64").model
    alone = at_once(kernel_pass, [(part, model, "float64")])
    together = at_once(kernel_pass, [(part, model, "float64")] * num_workers)
    ratio = statistics.median(ones) / statistics.median(alls)
    print_table(
        ["weak scaling, float64", f"{len(part):,} rows, 1 worker", f"{len(x):,} rows, {num_workers} workers", "efficiency"],
        [
            ["gendist on Ray, s/iteration", with_range(ones), with_range(alls), f"{ratio:.0%}"],
            ["kernel without Ray, s (what the machine allows)", f"{alone:.3f}", f"{together:.3f}", f"{alone / together:.0%}"],
        ],
    )


def main() -> None:
    parser = scale_option(__doc__)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--spark", nargs="*", choices=CASES, default=["a"], help="cases that Spark is measured on, too")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--mnist", type=Path, default=MNIST, help="folder of MNIST's Parquet files, as on the Hugging Face hub")
    arguments = parser.parse_args()
    print_machine(arguments.scale)
    seconds_of_sklearn(CASES["a"], CASES["a"].data(1000))  # its first fit imports, and starts threads
    print(
        f"Seconds an EM iteration: medians (range) of {arguments.repeats} interleaved runs of {NUM_ITERATIONS} iterations each"
    )
    spark_lacks = what_spark_lacks()
    if spark_lacks and arguments.spark:
        print(spark_lacks)
    for name in arguments.cases:
        case = CASES[name]
        try:
            x = case.data(arguments.scale, arguments.mnist)
        except FileNotFoundError as error:
            print(f"case {name} is left out: {error}")
            continue
        on_ray = compare(case, x, arguments.workers, arguments.repeats, name in arguments.spark and not spark_lacks)
        take_apart(case, x, arguments.workers, on_ray)
        if name == "a":
            weak_scaling(case, x, arguments.workers, arguments.repeats)


if __name__ == "__main__":
    main()
