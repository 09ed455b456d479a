"""`plan`: from a spec, and what is known of the cluster, to what each worker will hold, send and take, and what to do about it.

Nothing is paid for: no row is read but for what the sizes of the data need, and no network has values unless it is small.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from gendist.config import Spec, family_class, is_trained
from gendist.planning.answer import Answer
from gendist.planning.deep_plan import deep_plan
from gendist.planning.em_plan import em_plan
from gendist.planning.machines import GPUS, Machine, Network, network, this_machine
from gendist.planning.sizes import Sizes, sizes_of
from gendist.protocols import UserError

BEND = 1.5  # doubling the workers should make it so much faster


@dataclass(frozen=True)
class Where:
    """What is said of the cluster. gpus_per_node 0: workers are cores of this machine's kind, workers_per_node to a node."""

    workers: int
    gpus_per_node: int = 0
    gpu: str = "h100"
    workers_per_node: int = 0
    memory_gb: float | None = None
    network_gbits: float | None = None
    latency_us: float | None = None


@dataclass(frozen=True)
class Plan:
    """The answer. bend: beyond so many workers, twice as many are not BEND times as fast; None: not within the curve."""

    spec: Spec
    machine: Machine
    network: Network
    sizes: Sizes
    found: Answer
    efficiency: list[float]
    bend: int | None
    advice: list[str]

    @property
    def assumptions(self) -> list[str]:
        said = self.network
        per_node = f"{said.workers_per_node} workers a node"
        return [
            *self.found.assumptions,
            f"network: {per_node}, inside {said.inside_bytes_per_s / 1e9:g} GB/s and {said.inside_latency_s * 1e6:g} us "
            f"a message; between nodes {said.between_bytes_per_s / 1e9:g} GB/s and {said.between_latency_s * 1e6:g} us",
            f"{self.machine.memory_bytes / 1e9:.3g} GB for each worker",
            *self.sizes.assumed,
        ]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for programs."""
        return {
            "name": self.spec.name,
            "family": self.spec.family,
            "num_rows": self.sizes.num_rows,
            "num_features": self.sizes.num_features,
            "machine": asdict(self.machine),
            "network": asdict(self.network),
            "curve": [each.as_dict() for each in self.found.curve],
            "efficiency": self.efficiency,
            "bend": self.bend,
            "advice": self.advice,
            "assumptions": self.assumptions,
            **self.found.as_dict(),
        }


def plan_of(spec: Spec, where: Where, num_rows: int | None = None, num_features: int | None = None) -> Plan:
    """UserError where the spec could not be fitted so, or too little is known of its data."""
    family = family_class(spec.family)
    if where.gpus_per_node and where.gpu not in GPUS:
        raise UserError(f"--gpu {where.gpu}: not in the table; there are {', '.join(GPUS)}")
    sizes = sizes_of(spec, family, num_rows, num_features)
    if spec.data.label is not None and not sizes.labels:
        raise UserError("what this takes depends on the number of classes: say them, such as data.labels=[0,1,2,3,4,5,6,7,8,9]")
    machine = GPUS[where.gpu] if where.gpus_per_node else this_machine()
    if where.memory_gb is not None:
        machine = replace(machine, memory_bytes=where.memory_gb * 1e9)
    per_node = where.gpus_per_node or where.workers_per_node or os.cpu_count() or 1
    wires = network(per_node, bool(where.gpus_per_node), where.network_gbits, where.latency_us)
    counts = sorted({*(2**i for i in range(max(where.workers * 2, 16).bit_length())), max(1, where.workers)})
    make: Callable[..., Answer] = deep_plan if is_trained(family) else em_plan
    found = make(spec, sizes, sizes.labels, machine, wires, where.workers, counts)
    numbers, seconds = [each.num_workers for each in found.curve], [each.seconds for each in found.curve]
    bend = bend_of(numbers, seconds)
    pays = (
        f"beyond {bend} workers, twice as many are less than {BEND:g} times as fast"
        if bend is not None
        else "so many workers and twice as many pay"
    )
    return Plan(spec, machine, wires, sizes, found, efficiency(numbers, seconds), bend, [*found.advice(machine), pays])


def efficiency(numbers: Sequence[int], seconds: Sequence[float]) -> list[float]:
    """Of each number of workers, the first of which is 1: the time of one, by how many times as many worked how long."""
    return [seconds[0] / (number * each) for number, each in zip(numbers, seconds, strict=True)]


def bend_of(numbers: Sequence[int], seconds: Sequence[float]) -> int | None:
    by_number = dict(zip(numbers, seconds, strict=True))
    for number in numbers:
        if 2 * number in by_number and by_number[number] < BEND * by_number[2 * number]:
            return number
    return None
