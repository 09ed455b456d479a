"""Several real processes for a test: as many as the largest world asks for, started once for all jobs.

A job is a module-level function of a test module, called as function(processes, *arguments) on every process of its world;
what it returns, plain values and tensors on the CPU, comes back as a list by rank. Worlds of several sizes follow each
other in the same processes, each with a process group of its own.
"""

from __future__ import annotations

import gc
import multiprocessing
import multiprocessing.connection
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from gendist.train.processes import Processes

COLLECTIVE_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Job:
    """One thing to be done by every process of a world; `key` is the name of its results."""

    key: Hashable
    world_size: int
    function: Callable[..., Any]
    arguments: tuple[Any, ...] = ()


def run(jobs: Sequence[Job], timeout_s: float, environment: dict[str, str] | None = None) -> dict[Hashable, list[Any]]:
    """The results of all jobs, by key and rank. AssertionError with the trace where a process failed or took too long.

    environment  variables of the processes, set before the first job
    """
    assert len({job.key for job in jobs}) == len(jobs)
    # Forked from a process that has no threads and has imported what takes seconds, for each of them at once.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch._dynamo", "torch.distributed"])
    with tempfile.TemporaryDirectory() as folder:
        size = max(job.world_size for job in jobs)
        children = [context.Process(target=_work, args=(rank, jobs, folder, environment or {})) for rank in range(size)]
        deadline = time.monotonic() + timeout_s
        try:
            for child in children:
                child.start()
            while any(child.is_alive() for child in children) and not any(child.exitcode for child in children):
                multiprocessing.connection.wait([child.sentinel for child in children if child.is_alive()],
                                                timeout=max(0.0, deadline - time.monotonic()))  # fmt: skip
                if time.monotonic() >= deadline:
                    break
            codes = [child.exitcode for child in children]
        finally:
            for child in children:
                if child.is_alive():
                    os.kill(child.pid, signal.SIGKILL)
                if child.pid:
                    child.join(10.0)
        traces = [path.read_text() for path in sorted(Path(folder).glob("*.trace"))]
        assert codes == [0] * size, f"exit codes {codes} (None: still at work after {timeout_s} s)\n" + "\n".join(traces)
        of_rank = [torch.load(Path(folder) / f"{rank}.results", weights_only=False) for rank in range(size)]
    return {job.key: [of_rank[rank][job.key] for rank in _members(job.world_size, size)] for job in jobs}


def _members(world_size: int, num_processes: int) -> range:
    """The processes of a world. What is done alone is done by the last one, while a world of some others is at work."""
    return range(num_processes - 1, num_processes) if world_size == 1 else range(world_size)


def _work(process: int, jobs: Sequence[Job], folder: str, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    size = max(job.world_size for job in jobs)
    torch.set_num_threads(1)
    results: dict[Hashable, Any] = {}
    try:
        # The largest first, so that all processes of a world have done the same before: DeepSpeed numbers modules for as long
        # as a process lives, and compares the numbers.
        for world_size in sorted({job.world_size for job in jobs}, reverse=True):
            members = _members(world_size, size)
            if process in members:
                rank = members.index(process)
                # What is there by now stays: DeepSpeed collects garbage whenever it is set up.
                gc.collect()
                gc.freeze()
                store = f"file://{folder}/store-{world_size}"
                timeout = timedelta(seconds=COLLECTIVE_TIMEOUT_S)
                dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size, timeout=timeout)
                for job in jobs:
                    if job.world_size == world_size:
                        processes = Processes(rank, world_size, torch.device("cpu"))
                        results[job.key] = job.function(processes, *job.arguments)
                dist.barrier()
                dist.destroy_process_group()
        torch.save(results, Path(folder) / f"{process}.results")
    except BaseException:
        (Path(folder) / f"{process}.trace").write_text(f"process {process}:\n{traceback.format_exc()}")
        raise
