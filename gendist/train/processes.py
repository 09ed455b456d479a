"""Which process of how many this is, and on which device it computes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

# Its functions take the group of all processes, as it is when the module is imported, for a default: first imported with an
# optimizer, after the group is made, they would keep the group's threads beyond its end, and now and then a process that does
# not get through its exit.
import torch.distributed.nn.functional
from torch import Tensor

from gendist.protocols import UserError

LONG_TIMEOUT = timedelta(days=1)
TIMEOUT_S = 600.0  # of a collective: a process that has gone is noticed then, where its connection does not tell at once


@dataclass(frozen=True)
class Processes:
    """This process among all that train together."""

    rank: int
    world_size: int
    device: torch.device


@contextmanager
def joined(use_gpu: bool, device: torch.device | None = None, timeout_s: float = TIMEOUT_S) -> Iterator[Processes]:
    """`with joined(use_gpu) as processes:` be one of a process group that somebody has made, such as Ray Train; of one that
    torchrun's environment describes, which is made here and left at the end; or a process alone.

    device  where somebody else deals them out; else the GPU of the local rank, or the CPU
    """
    device = device or _device(use_gpu)
    if dist.is_initialized():
        yield Processes(dist.get_rank(), dist.get_world_size(), device)
    elif "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(seconds=timeout_s))
        try:
            yield Processes(dist.get_rank(), dist.get_world_size(), device)
        finally:
            dist.destroy_process_group()
    else:
        yield Processes(0, 1, device)


def begin_gather(values: Tensor, processes: Processes) -> Callable[[], Tensor]:
    """(world_size, n): the values of every process, by rank, from the function that is returned: they travel meanwhile."""
    if processes.world_size == 1:
        return lambda: values[None]
    there = values.to(processes.device)
    gathered = [torch.empty_like(there) for _ in range(processes.world_size)]
    work = dist.all_gather(gathered, there, async_op=True)

    def wait() -> Tensor:
        work.wait()
        return torch.stack(gathered).to(values.device)

    return wait


def begin_sum(values: Tensor, processes: Processes) -> Callable[[], Tensor]:
    """The same of their sum, added in the order of the ranks, so that no algorithm of an all-reduce matters."""
    gathered = begin_gather(values, processes)
    return lambda: gathered().sum(0)


def patient_group(processes: Processes) -> dist.ProcessGroup | None:
    """All processes, who wait for each other for as long as it takes to read the data, say; one that is lost is noticed by its
    connection. None of a process alone."""
    return dist.new_group(backend="gloo", timeout=LONG_TIMEOUT) if processes.world_size > 1 else None


def told_by_first(processes: Processes, function: Callable[[], Any], group: dist.ProcessGroup | None = None) -> Any:
    """What the function returns in rank 0, in every process; a UserError there is one everywhere.

    group  `patient_group`, where it may take long
    """
    told: list[Any] = [None, None]
    if processes.rank == 0:
        try:
            told = [function(), None]
        except UserError as error:
            told = [None, str(error)]
    if processes.world_size > 1:
        device = processes.device if group is None else torch.device("cpu")
        dist.broadcast_object_list(told, src=0, group=group, device=device)
    value, mistake = told
    if mistake is not None:
        raise UserError(mistake)
    return value


def _device(use_gpu: bool) -> torch.device:
    if not use_gpu:
        return torch.device("cpu")
    local_rank, num_gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local_rank >= num_gpus:
        raise UserError(f"cluster.use_gpu: process {local_rank} of this machine finds {num_gpus} GPUs; start as many processes "
                        "as there are, or set use_gpu: false")  # fmt: skip
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device
