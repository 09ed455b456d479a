"""Training on a group of Ray workers: its size, the loss of workers, the end. All of training that knows Ray Train.

A function runs in every worker of the group, in an environment as `torchrun` makes it (RANK, WORLD_SIZE, LOCAL_RANK,
MASTER_ADDR, ...) and with the default process group of torch.distributed, where there is more than one worker. It keeps its
own checkpoints, and goes on from the newest: when a worker is lost, the whole group is started anew, and so is the function.

Nothing goes through `ray.train.report`: it is a barrier without a time limit that every rank must reach equally often, and it
waits for the controller to have read the report before. Here rank 0 alone speaks to the driver, and nobody waits for it.
"""

from __future__ import annotations

import _thread
import fcntl
import logging
import os
import shutil
import signal
import socket
import struct
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchConfig, TorchTrainer

from gendist.protocols import UserError
from gendist.ray_cluster import CPU_WORKER, GPU_WORKER, WORKER_ENVIRONMENT, Lookout, check_room, is_without_head, uninterrupted
from gendist.train.processes import TIMEOUT_S
from gendist.train.ray_line import Line, log_over
from gendist.train.ray_listener import Listener
from gendist.train.ray_mailbox import new_mailbox

NUM_STARTS = 30  # of a group that does not get as far as the function; each waits 10 s for a cluster that is busy
RESIZE_INTERVAL_S = 60.0
CAUSE_FIRST_S = 1.0  # for the death of another worker, which may be why this one failed, to be noticed
ABORT_LIMIT_S = 10.0

# Of Ray Train, which has no other place to say them. It looks after the workers twice a second, so that the end and the loss
# of one are noticed as soon; it tries again soon with another size of group, since for a while after the loss of a node it
# does not know of it; it leaves workers in their working directory; and it does not tell them of nodes that will be taken
# away, since training goes on from its last checkpoint in any case.
SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}

logger = logging.getLogger("gendist")


def train_on_ray(
    function: Callable[[Line], Any],
    num_workers: int | tuple[int, int],
    folder: Path,
    *,
    use_gpu: bool = False,
    resources: Mapping[str, float] | None = None,
    max_failures: int = 3,
    watch: Callable[[dict[str, Any]], None] = lambda record: None,
    silence_limit_s: float = TIMEOUT_S,
    no_room_limit_s: float | None = None,
    resize_interval_s: float = RESIZE_INTERVAL_S,
) -> Any:
    """Run a function in every worker of a group on the cluster this process is connected to; returns what rank 0's returned.

    num_workers    or the least and the most of them: the group has as many as the cluster has room for, is smaller after the
                   loss of a node, and larger once there is room again, which is looked for every `resize_interval_s`
    resources      of the cluster that each worker needs beside a CPU, and with `use_gpu` a GPU
    folder         on this machine, for files of Ray Train's own, which are gone at the end
    max_failures   losses of workers, and exceptions in them, that are recovered from before there is another checkpoint
    watch          called with each record that rank 0 gives to `Line.record`, in a thread of its own
    silence_limit_s  after which a worker that does not call `Line.alive`, or waits for another's part of a sum, is ended

    UserError where the cluster has no room for the workers, where one was raised in a worker, which is not tried again, or
    where too many workers were lost. Ctrl-C ends the workers at once.
    """
    least, most = (num_workers, num_workers) if isinstance(num_workers, int) else num_workers
    each = {**(GPU_WORKER if use_gpu else CPU_WORKER), **(resources or {})}
    check_room(least, each)
    storage = folder / ".ray_train"
    shutil.rmtree(storage, ignore_errors=True)
    mailbox = new_mailbox()

    def work() -> Any:
        return _work(function, mailbox, use_gpu, silence_limit_s)

    trainer = _Trainer(
        work,
        torch_config=_TorchConfig(),
        scaling_config=ScalingConfig(
            num_workers=num_workers if isinstance(num_workers, int) else (least, most),
            use_gpu=use_gpu,
            resources_per_worker=each,
            elastic_resize_monitor_interval_s=resize_interval_s,
        ),
        run_config=RunConfig(
            name="run",
            storage_path=str(storage.absolute()),
            failure_config=FailureConfig(max_failures=-1, controller_failure_limit=NUM_STARTS),  # _Failures decides
            callbacks=[_Failures(mailbox, max_failures)],
            worker_runtime_env={"env_vars": WORKER_ENVIRONMENT},
        ),
    )
    in_main = threading.current_thread() is threading.main_thread()

    def stop() -> None:
        trainer.stop()
        if is_without_head():
            _interrupt(in_main, listener.error)

    listener = Listener(mailbox, watch, Lookout(each, least, no_room_limit_s), stop)
    try:
        with _settings(), listener:
            try:
                result = trainer.fit().return_value
            except (ray.train.TrainingFailedError, ray.exceptions.RayActorError):
                raise
            except BaseException:
                trainer.stop()  # first of all: another Ctrl-C may end whatever comes after it
                raise
        if listener.error is not None:
            raise listener.error
        return result
    except (ray.train.TrainingFailedError, ray.exceptions.RayActorError, KeyboardInterrupt) as error:
        # What the listener met is why Ray fails after it. An interrupt is our own where the head is gone: see `_interrupt`.
        if listener.error is not None and (is_without_head() or not isinstance(error, KeyboardInterrupt)):
            raise listener.error from None
        if isinstance(error, ray.train.TrainingFailedError):
            raise _cause(error) from None
        raise
    finally:
        with uninterrupted():
            if not is_without_head():
                ray.kill(mailbox)
            shutil.rmtree(storage, ignore_errors=True)


def _interrupt(in_main: bool, error: BaseException | None) -> None:
    # The driver waits for Ray, which never answers it without a head.
    heeded = [number for number in (signal.SIGINT, signal.SIGTERM) if callable(signal.getsignal(number))]
    if in_main and heeded:
        _thread.interrupt_main(heeded[0])
    else:
        logger.error("%s", error)  # Ray ends this process, and says nothing


def _work(function: Callable[[Line], Any], mailbox: Any, use_gpu: bool, silence_limit_s: float) -> Any:
    """In the worker: the function, and around it what a process of the group needs."""
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    if not use_gpu:
        torch.set_num_threads(1)
    with Line(mailbox, rank, silence_limit_s) as line, log_over(line):
        line.started(world_size)
        try:
            if world_size > 1:
                timeout = timedelta(seconds=silence_limit_s)
                torch.distributed.init_process_group("nccl" if use_gpu else "gloo", timeout=timeout)
            result = function(line)
        except UserError:
            raise
        except Exception as error:
            # Ray Train hands on the exception without its traceback, and those of all ranks in no order.
            error.add_note(f"in the worker of rank {rank}:\n{traceback.format_exc()}")
            error.failed_at = time.time()  # type: ignore[attr-defined]
            time.sleep(CAUSE_FIRST_S)
            raise
        # Not where something was raised: the others would fail, too, and which of them was the first would be hard to tell.
        if world_size > 1:
            torch.distributed.destroy_process_group()
        return result


@dataclass
class _TorchConfig(TorchConfig):
    @property
    def backend_cls(self) -> type[Any]:
        return _Backend


class _Backend(TorchConfig().backend_cls):  # type: ignore[misc]
    """The environment of torchrun. The process group is made where the function runs, and not here, so that the loss of a
    worker meanwhile is one like any other; and nobody waits for a group that is about to be ended."""

    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        address, port = worker_group.execute_single(0, _address_and_free_port)
        worker_group.execute(_set_environment, address, port)

    def on_shutdown(self, worker_group: Any, backend_config: TorchConfig) -> None:
        pass


def _address_and_free_port() -> tuple[str, int]:
    with socket.socket() as free:
        free.bind(("", 0))
        return ray.util.get_node_ip_address(), free.getsockname()[1]


def _set_environment(master_address: str, master_port: int) -> None:
    context = ray.train.get_context()
    values = {
        "MASTER_ADDR": master_address,
        "MASTER_PORT": master_port,
        "RANK": context.get_world_rank(),
        "WORLD_SIZE": context.get_world_size(),
        "LOCAL_RANK": context.get_local_rank(),
        "LOCAL_WORLD_SIZE": context.get_local_world_size(),
        "GROUP_RANK": context.get_node_rank(),
    }
    os.environ.update({name: str(value) for name, value in values.items()})
    # Where the name of a host resolves to 127.0.0.1, gloo and NCCL would tell others to look for it there.
    interface = interface_of(ray.util.get_node_ip_address())
    if interface is not None:
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(name, interface)


def interface_of(address: str) -> str | None:
    """The network interface of this machine that carries an IPv4 address; None where there is none, or it cannot be told."""
    get_address = 0x8915  # SIOCGIFADDR of linux/sockios.h
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(asking, get_address, struct.pack("256s", name.encode()))
            except OSError:  # an interface without an address, or not Linux
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None


class _Trainer(TorchTrainer):
    """Whoever runs it handles the interrupts: Ray's handler would stay after the end, and see Ctrl-C, but not SIGTERM."""

    _controller: Any = None

    def _create_default_callbacks(self) -> list[Any]:
        """Without that of Ray Data, which is not used, but would have a process, and be imported by every worker."""
        return [each for each in super()._create_default_callbacks() if type(each).__name__ != "DatasetsCallback"]

    def _register_sigint_handler(self, controller: Any) -> None:
        self._controller = controller

    def stop(self) -> None:
        """End the workers; `fit`, if it still runs, raises RayActorError."""
        if self._controller is None or is_without_head():
            return
        with uninterrupted():
            try:
                ray.get(self._controller.abort.remote(), timeout=ABORT_LIMIT_S)
            except ray.exceptions.GetTimeoutError:
                ray.kill(self._controller)  # it is starting workers, which end with it
            except ray.exceptions.RayActorError:
                pass  # it has ended, as it was told to


class _Failures(UserCallback):
    """In the controller: what it raises ends the run, whatever Ray Train's own policy says; else the group is started anew."""

    def __init__(self, mailbox: Any, max_failures: int):
        self._mailbox, self._max_failures = mailbox, max_failures
        self._num_failures, self._num_checkpoints = 0, 0

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        num_checkpoints = ray.get(self._mailbox.num_checkpoints.remote())
        self._num_failures = self._num_failures + 1 if num_checkpoints == self._num_checkpoints else 1
        self._num_checkpoints = num_checkpoints
        error = first_failure(worker_exceptions)
        lost = not hasattr(error, "failed_at") and not isinstance(error, UserError)
        if isinstance(error, UserError) or (self._num_failures > self._max_failures and not lost):
            raise error
        if lost:
            text = "a worker was lost"
        else:
            text = f"a worker failed ({type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]})"
        if self._num_failures > self._max_failures:
            raise UserError(
                f"{text}, as happened {self._max_failures} times since the last checkpoint; memory may be short, and the logs "
                "of Ray may tell; the same command goes on from the last checkpoint"
            )
        text += f"; going on from the last checkpoint ({self._num_failures} of {self._max_failures})"
        self._mailbox.put.remote([("lost", text)])


def first_failure(exceptions: Mapping[int, Exception]) -> Exception:
    """Of what the workers of a group met, the cause of the rest: a mistake of the user's, the death of a worker, or what was
    raised first."""
    return min(
        exceptions.values(), key=lambda error: (not isinstance(error, UserError), getattr(error, "failed_at", float("-inf")))
    )


def _cause(error: Exception) -> Exception:
    """What to tell the user: what `_Failures` raised, or one line where Ray Train gave up by itself."""
    cause = getattr(error, "controller_failure", error)
    if isinstance(cause, UserError) or hasattr(cause, "failed_at"):
        return cause
    reason = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
    return UserError(f"no workers could be started ({reason}); see the logs of Ray; the same command goes on where it can")


@contextmanager
def _settings() -> Iterator[None]:
    """Those of Ray Train that are not set, for a while."""
    ours = {name: value for name, value in SETTINGS.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name, None)
