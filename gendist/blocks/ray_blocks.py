"""Blocks on a Ray cluster: each run of leaves is the output of one load task, and each pass is one task a run."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import ray

from gendist.blocks.leaves import Leaves, Run
from gendist.one_thread import one_thread
from gendist.protocols import UserError
from gendist.ray_cluster import CPU_WORKER, GPU_WORKER, Lookout

Result = TypeVar("Result")

MAX_RETRIES = 8  # of a task whose worker or node died; an exception of the task's own is not tried again
MAX_RELOADS = 100  # of what the cluster holds through all passes, and may lose in any of them
LEAVES_PER_LOAD = 4  # what is read is held several times while it is made into leaves: little at a time
RUNS_AHEAD = 4  # runs a worker may be ahead of the one that is waited for, so that results do not pile up
LOOK_EVERY_S = 5.0  # at whether there is a cluster left
WAITING_S = 30.0  # after which it is said that nothing gets done, and again
logger = logging.getLogger("gendist")


@ray.remote(max_retries=MAX_RELOADS, scheduling_strategy="SPREAD")
def _load_task(load: Callable[[Sequence[int]], list[Any]], bounds: Sequence[int]) -> list[Any]:
    return load(bounds)


@ray.remote(max_retries=MAX_RETRIES)
def _run_task(function: Callable[[Any, Run[Any]], Any], broadcast: Any, first: int, *loads: list[Any]) -> Any:
    with one_thread():
        return function(broadcast, Run([leaf for leaves in loads for leaf in leaves], first))


class RayBlocks:
    """load(bounds) returns the leaves between these row numbers; it runs in tasks, and its output stays with the cluster.

    keep   whether the cluster holds on to what was loaded, for the next pass
    num_gpus   that each task of a pass has to itself

    Leaves are return values of tasks, so Ray rebuilds them where a node is lost. `num_workers` bounds the tasks of a pass at
    work at one time.
    """

    def __init__(
        self,
        load: Callable[[Sequence[int]], list[Any]],
        leaves: Leaves,
        num_workers: int,
        max_leaves_per_run: int = 1 << 30,
        keep: bool = True,
        num_gpus: int = 0,
    ):
        self._keep = keep
        self._task = _run_task.options(num_gpus=num_gpus)
        self._lookout = Lookout(GPU_WORKER if num_gpus else CPU_WORKER)
        self._looked_at = time.monotonic()
        self._num_workers = num_workers
        self._load = ray.put(load)
        self._leaves = leaves
        self._runs = leaves.runs(num_workers, max_leaves_per_run)
        self._loaded: dict[int, list[ray.ObjectRef]] = {}

    def map_runs(self, function: Callable[[Any, Run[Any]], Result], broadcast: Any) -> Iterator[Result]:
        function_ref, broadcast_ref = ray.put(function), ray.put(broadcast)
        at_work: dict[ray.ObjectRef, int] = {}
        done: dict[int, ray.ObjectRef] = {}
        submitted = 0
        for index in range(len(self._runs)):
            while index not in done:
                last = min(len(self._runs), index + RUNS_AHEAD * self._num_workers)
                while submitted < last and len(at_work) < self._num_workers:
                    loads, first = self._loads_of(submitted), self._runs[submitted].start
                    at_work[self._task.remote(function_ref, broadcast_ref, first, *loads)] = submitted
                    submitted += 1
                if time.monotonic() - self._looked_at > LOOK_EVERY_S:
                    # Without its head a cluster does go on, for a minute, after which Ray ends this process.
                    self._lookout.look()
                    self._looked_at = time.monotonic()
                for ref in _wait_for_some(list(at_work), self._lookout):
                    done[at_work.pop(ref)] = ref
            yield _get(done.pop(index), self._lookout)
        # Tasks of a pass that is given up are left to finish: cancelling one that is about to can abort this process
        # (a check in Ray 2.60's task_manager.cc).

    def _loads_of(self, index: int) -> list[ray.ObjectRef]:
        """The leaves of a run, some to an object."""
        loads = self._loaded.get(index)
        if loads is None:
            run = self._runs[index]
            parts = [run[start : start + LEAVES_PER_LOAD] for start in range(0, len(run), LEAVES_PER_LOAD)]
            loads = [_load_task.remote(self._load, self._leaves.bounds_of(part)) for part in parts]
        if self._keep:
            self._loaded[index] = loads
        return loads


def _wait_for_some(refs: list[ray.ObjectRef], lookout: Lookout) -> list[ray.ObjectRef]:
    """The refs that are done, at least one. UserError once the cluster has had no worker for a while."""
    told_at = time.monotonic()
    while True:
        done, waiting = ray.wait(refs, num_returns=1, timeout=LOOK_EVERY_S, fetch_local=False)
        if done:
            more, _ = ray.wait(waiting, num_returns=len(waiting), timeout=0, fetch_local=False) if waiting else ([], [])
            return done + more
        lookout.look()
        if time.monotonic() - told_at >= WAITING_S:
            told_at = time.monotonic()
            if ray.available_resources().get("CPU", 0) < 1:
                logger.info("waiting for a free CPU, or for tasks that take long: the cluster has none free at the moment")


def _get(ref: ray.ObjectRef, lookout: Lookout) -> Any:
    """The value of a task, which is made again where its node is lost; or the mistake of the user's that it met, without Ray's
    wrapping."""
    while True:
        try:
            return ray.get(ref, timeout=LOOK_EVERY_S)
        except ray.exceptions.GetTimeoutError:
            lookout.look()
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise error.cause from None
            raise
        except ray.exceptions.RayError as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"a task was lost {MAX_RETRIES} times over and given up ({reason}); see the logs of Ray; the same command goes "
                "on from what was reached"
            ) from error
