"""What a plan takes for the speed of machines and of the network between them: measured here for a second, or stated."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from gendist.cost import Traffic
from gendist.one_thread import one_thread

GEMM_SIDE = 768
TRIALS_S = 0.2
GPU_ACHIEVED = 0.2  # on an H200 in bfloat16 residual networks with group norm came to 10 %, a DCGAN to 32 % (docs/measured.md)


@dataclass(frozen=True)
class Machine:
    """What one worker computes on.

    flops_per_s         of large products, by precision
    memory_bytes_per_s  of a stream
    memory_bytes        that a worker has to itself
    achieved            the share of the flops a second that a network's step reaches, where it is not tried
    """

    name: str
    flops_per_s: Mapping[str, float]
    memory_bytes_per_s: float
    memory_bytes: float
    achieved: float
    is_gpu: bool


def _gpu(name: str, flops_per_s: float, half_flops_per_s: float, memory_bytes_per_s: float, memory_bytes: float) -> Machine:
    rates = dict.fromkeys(("float64", "float32"), flops_per_s) | dict.fromkeys(("bfloat16", "float16"), half_flops_per_s)
    rates["tfloat32"] = half_flops_per_s / 2
    return Machine(name, rates, memory_bytes_per_s, memory_bytes, achieved=GPU_ACHIEVED, is_gpu=True)


# NVIDIA's data sheets, SXM: dense products; float64 and float16 kinds on tensor cores, float32 without TF32.
GPUS: Mapping[str, Machine] = {
    "a100": _gpu("A100", 19.5e12, 312e12, 2.0e12, 80e9),
    "h100": _gpu("H100", 67e12, 989e12, 3.35e12, 80e9),
    "h200": _gpu("H200", 67e12, 989e12, 4.8e12, 141e9),
}


@dataclass(frozen=True)
class Network:
    """Latency and bandwidth (Hockney 1994): a message of b bytes takes latency_s + b / bytes_per_s.

    workers_per_node  that share a node, within which `inside` counts; a ring through several nodes crosses each node's one
                      connection to the others once, so that its slowest part is `between`
    serial_bytes_per_s  at which statistics and models become bytes and are made from them
    """

    workers_per_node: int
    inside_bytes_per_s: float
    inside_latency_s: float
    between_bytes_per_s: float
    between_latency_s: float
    serial_bytes_per_s: float = 1e9

    def of(self, num_workers: int) -> tuple[float, float]:
        """Bytes a second and latency of the slowest part."""
        if num_workers <= self.workers_per_node:
            return self.inside_bytes_per_s, self.inside_latency_s
        slowest = min(self.inside_bytes_per_s, self.between_bytes_per_s)
        return slowest, max(self.inside_latency_s, self.between_latency_s)

    def seconds(self, traffic: Traffic, num_workers: int) -> float:
        if num_workers <= 1:
            return 0.0
        bytes_per_s, latency_s = self.of(num_workers)
        return traffic.sent_bytes / bytes_per_s + traffic.num_rounds * latency_s


def network(workers_per_node: int, is_gpu: bool, gbits: float | None = None, latency_us: float | None = None) -> Network:
    """The one that is assumed: between nodes 200 Gbit/s of GPUs, 10 of CPUs, unless somebody knows better."""
    inside = (200e9, 10e-6) if is_gpu else (1.0e9, 50e-6)  # NVLink; gloo over loopback
    bytes_per_s, latency_s = (25e9, 20e-6) if is_gpu else (1.25e9, 100e-6)
    if gbits is not None:
        bytes_per_s = gbits * 1e9 / 8
    if latency_us is not None:
        latency_s = latency_us * 1e-6
    return Network(workers_per_node, *inside, bytes_per_s, latency_s)


def this_machine() -> Machine:
    """A core of it, as one worker has it, measured in less than a second."""
    with one_thread():
        rates = {}
        for name in ("float64", "float32"):
            a = torch.ones(GEMM_SIDE, GEMM_SIDE, dtype=getattr(torch, name))
            rates[name] = 2.0 * GEMM_SIDE**3 / usual_s(partial(torch.mm, a, a, out=a.clone()))
        stream = torch.ones(8 * 2**20)
        bytes_per_s = 2.0 * stream.nbytes / usual_s(partial(stream.add_, 1.0))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory_bytes = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    # Half precision is emulated, at about half the speed of single.
    rates |= dict.fromkeys(("bfloat16", "float16"), rates["float32"] / 2)
    return Machine("a core of this machine", rates, bytes_per_s, memory_bytes / cores, achieved=0.5, is_gpu=False)


def usual_s(function: Callable[[], object]) -> float:
    """Of some calls in this thread."""
    seconds: list[float] = []
    began = time.perf_counter()
    while len(seconds) < 3 or time.perf_counter() - began < TRIALS_S:
        start = time.thread_time()
        function()
        seconds.append(time.thread_time() - start)
    return quickest_quarter(seconds)


def quickest_quarter(seconds: Sequence[float]) -> float:
    """A quarter of the times are no longer: near the median on a machine that does nothing else, and less than this swayed by
    others at work, who take the caches away from CPU time, too."""
    return sorted(seconds)[len(seconds) // 4]
