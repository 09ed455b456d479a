"""Images a second in training: gendist's loop and `fit` on Ray, plain PyTorch, DistributedDataParallel, pythae, in one run.

    python benchmarks/deep.py [--cases vae gan] [--parts loop ray] [--repeats 3] [--seconds 12] [--mnist FOLDER]

All train the same networks on MNIST's images, 128 a step over all processes, with Adam and one thread a process, under the
malloc settings of `gendist.ray_cluster.WORKER_ENVIRONMENT`. Starting and the first steps are not counted.

loop  gendist's loop against loops that are written by hand (`deep_cases.py`), in one process and in two, and against pythae's
      trainer in one. The contenders take turns in the same processes, 10 steps of the VAE or 5 of the GAN each, so that
      whatever else the machine does meets all alike: a ratio is the median over the turns of one run; printed is the median
      (range) over the runs. Ratios of processor time are disturbed less by what others do on the machine
ray   `gendist.fit` on Ray with one and two workers (the median `samples_per_s` of its records) against
      DistributedDataParallel in as many processes, started as torchrun does; and pythae's trainer as it comes, with as many
      threads as there are cores and without malloc settings, since it trains in one process only on CPUs. Runs are interleaved
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import socket
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from deep_cases import BATCH_SIZE, CASES, Case, gendist_loop, images, plain_loop, pythae_trainer, random_images
from gmm_cases import MNIST
from tables import print_machine, print_table, with_range

NUM_WARM_UP = 2  # turns
CONTENDERS = {"gendist": gendist_loop, "plain": plain_loop, "pythae": pythae_trainer}
ANSWER_TIMEOUT_S = 600.0
WARM_UP_RECORDS = 3
STEPS_OF_A_FIT = {"vae": 300, "gan": 60}


@contextmanager
def environment(values: Mapping[str, str], without: Sequence[str] = ()) -> Iterator[None]:
    """What processes that are started inside find in theirs."""
    before = dict(os.environ)
    os.environ.update(values)
    for name in without:
        os.environ.pop(name, None)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def in_processes(num_processes: int, function: Callable[..., Any], *arguments: Any) -> Any:
    """What function(*arguments, rank, num_processes) returns in rank 0 of new processes, of one thread each and with gendist's
    malloc settings, in the environment of torchrun."""
    from gendist.ray_cluster import WORKER_ENVIRONMENT

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torchrun = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(num_processes)}
    context, pipes, processes = multiprocessing.get_context("spawn"), [], []
    for rank in range(num_processes):
        receiver, sender = context.Pipe(duplex=False)
        with environment({**WORKER_ENVIRONMENT, **torchrun, "OMP_NUM_THREADS": "1", "RANK": str(rank)}):
            process = context.Process(target=_answer, args=(sender, function, arguments, rank, num_processes), daemon=True)
            process.start()
        sender.close()  # so that the end of the process is the end of the pipe
        pipes.append(receiver)
        processes.append(process)
    return _answers(pipes, processes)[0]


def as_it_comes(function: Callable[..., Any], *arguments: Any) -> Any:
    """The same in one new process, with the threads and the memory that the system gives it."""
    from gendist.ray_cluster import WORKER_ENVIRONMENT

    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    with environment({}, without=[*WORKER_ENVIRONMENT, "OMP_NUM_THREADS", "RANK", "WORLD_SIZE"]):
        process = context.Process(target=_answer, args=(sender, function, arguments, 0, 1), daemon=True)
        process.start()
    sender.close()
    return _answers([receiver], [process])[0]


def _answers(pipes: Sequence[Any], processes: Sequence[Any]) -> list[Any]:
    try:
        for pipe in pipes:
            if not pipe.poll(ANSWER_TIMEOUT_S):
                raise TimeoutError(f"a process did not answer in {ANSWER_TIMEOUT_S:g} s")
        return [pipe.recv() for pipe in pipes]
    finally:
        for process in processes:
            process.join(10.0)
            process.kill()


def _answer(sender: Any, function: Callable[..., Any], arguments: Sequence[Any], rank: int, world_size: int) -> None:
    sys.stderr = open(os.devnull, "w") if rank else sys.stderr  # noqa: SIM115
    sender.send(function(*arguments, rank, world_size))


def race(
    names: Sequence[str], case: Case, x_NHW: np.ndarray, seconds: float, is_wrapped: bool, rank: int, world_size: int
) -> dict[str, list[tuple[float, float]]]:
    """Of each contender the seconds of every turn, by the clock and of processor time in rank 0. They take turns until all
    have had `seconds` together.

    is_wrapped  whether a plain loop is that of DistributedDataParallel, as it is of several processes
    """
    import torch

    if is_wrapped:
        torch.distributed.init_process_group("gloo")
    contenders = {name: CONTENDERS[name](case, x_NHW, rank, world_size) for name in names}
    for contender in contenders.values():
        for _ in range(NUM_WARM_UP):
            next(contender)
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    is_over = torch.zeros(1)
    while not is_over:
        for name, contender in contenders.items():
            began, began_cpu = time.perf_counter(), time.process_time()
            next(contender)
            taken[name].append((time.perf_counter() - began, time.process_time() - began_cpu))
        is_over += sum(by_clock for turns in taken.values() for by_clock, _ in turns) > seconds
        if is_wrapped:
            torch.distributed.broadcast(is_over, 0)
    if is_wrapped:
        torch.distributed.destroy_process_group()
    return taken


def images_per_s(case: Case, turns: Sequence[tuple[float, float]]) -> float:
    return case.steps_at_once * BATCH_SIZE / statistics.median(by_clock for by_clock, _ in turns)


def compare_loops(case: Case, x_NHW: np.ndarray, repeats: int, seconds: float, num_processes: int, with_pythae: bool) -> None:
    names = ["gendist", "plain"] + ["pythae"] * (with_pythae and num_processes == 1 and case.family == "vae")
    plain = "plain PyTorch" if num_processes == 1 else "plain PyTorch, DistributedDataParallel"
    titles = {"gendist": "gendist's loop", "plain": plain, "pythae": "pythae's trainer"}
    rates: dict[str, list[float]] = {name: [] for name in names}
    by_clock: dict[str, list[float]] = {name: [] for name in names}
    by_cpu: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(repeats):
        taken = in_processes(num_processes, race, names, case, x_NHW, seconds, num_processes > 1)
        for name in names:
            rates[name].append(images_per_s(case, taken[name]))
            turns = list(zip(taken["gendist"], taken[name], strict=True))
            for kind, ratios in enumerate((by_clock, by_cpu)):
                ratios[name].append(statistics.median(theirs[kind] / ours[kind] for ours, theirs in turns))
    title = f"{case.title}; {num_processes} process{'es' * (num_processes > 1)} of one thread"
    rows = [[titles[name], *map(with_range, (rates[name], by_clock[name], by_cpu[name]), (0, 3, 3))] for name in names]
    print_table([title, "images/s", "gendist's speed, of this one's", "by processor time"], rows)


def rate_on_ray(case: Case, x_NHW: np.ndarray, num_steps: int, num_workers: int) -> float:
    import gendist

    run = gendist.fit(case.spec(num_steps, num_workers), data=x_NHW)
    return statistics.median(record["samples_per_s"] for record in run.history[WARM_UP_RECORDS:])


def rate_alone(name: str, case: Case, x_NHW: np.ndarray, seconds: float, num_processes: int) -> float:
    """Of DistributedDataParallel, in one process too; or of pythae as it comes."""
    if name == "pythae":
        return images_per_s(case, as_it_comes(race, [name], case, x_NHW, seconds, False)[name])
    return images_per_s(case, in_processes(num_processes, race, [name], case, x_NHW, seconds, True)[name])


def compare_on_ray(case: Case, x_NHW: np.ndarray, repeats: int, seconds: float, workers: Sequence[int], pythae: bool) -> None:
    num_steps = STEPS_OF_A_FIT[case.family]
    contenders: dict[tuple[str, int], Callable[[], float]] = {}
    for number in workers:
        contenders["gendist.fit on Ray", number] = partial(rate_on_ray, case, x_NHW, num_steps, number)
        contenders["DistributedDataParallel", number] = partial(rate_alone, "plain", case, x_NHW, seconds, number)
    if pythae and case.family == "vae":
        contenders["pythae's trainer as it comes", os.cpu_count() or 1] = partial(rate_alone, "pythae", case, x_NHW, seconds, 1)
    rates: dict[tuple[str, int], list[float]] = {who: [] for who in contenders}
    for _ in range(repeats):
        for who, measure in contenders.items():
            rates[who].append(measure())
    rows = []
    for (who, number), values in rates.items():
        ratios = [
            with_range([ours / theirs for ours, theirs in zip(rates["gendist.fit on Ray", each], values, strict=True)], 2)
            for each in workers
        ]
        kind = "threads" if who.startswith("pythae") else "one-thread processes"
        rows.append([f"{who}, {number} {kind}", with_range(values, 0), *ratios])
    print_table([case.title, "images/s", *(f"fit's speed with {each}, of this one's" for each in workers)], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--parts", nargs="+", choices=("loop", "ray"), default=["loop", "ray"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=12.0, help="that are measured in each run")
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--mnist", type=Path, default=MNIST, help="folder of MNIST's Parquet files, as on the Hugging Face hub")
    arguments = parser.parse_args()
    print_machine(1)
    try:
        x_NHW = images(arguments.mnist)
    except FileNotFoundError as error:
        print(f"random images instead of MNIST's: {error}")
        x_NHW = random_images()
    has_pythae = find_spec("pythae") is not None
    if not has_pythae:
        print("pythae is left out: it is not installed (pip install pythae)")
    print(f"Medians (range) of {arguments.repeats} runs; load when started {os.getloadavg()[0]:.1f}", flush=True)
    for case in (CASES[name] for name in arguments.cases):
        if "loop" in arguments.parts:
            for number in arguments.processes:
                compare_loops(case, x_NHW, arguments.repeats, arguments.seconds, number, has_pythae)
        if "ray" in arguments.parts:
            compare_on_ray(case, x_NHW, arguments.repeats, arguments.seconds, arguments.processes, has_pythae)


if __name__ == "__main__":
    main()
