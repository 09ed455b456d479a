"""`plan`: from a spec, and what is known of the cluster, to what each worker will hold, send and take, and what to do about it.

Nothing is paid for: no row is read but for what the sizes of the data need, and no network has values unless it is small.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from gendist.config import Spec, family_class, is_trained
from gendist.planning import deep_plan as deep
from gendist.planning import em_plan as em
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
    found: em.EMPlan | deep.DeepPlan
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
        found = self.found
        shared = {
            "name": self.spec.name,
            "family": self.spec.family,
            "num_rows": self.sizes.num_rows,
            "num_features": self.sizes.num_features,
            "machine": asdict(self.machine),
            "network": asdict(self.network),
            "efficiency": self.efficiency,
            "bend": self.bend,
            "advice": self.advice,
            "assumptions": self.assumptions,
        }
        if isinstance(found, em.EMPlan):
            own = {"iteration": em.as_dict(found.chosen), "curve": [em.as_dict(each) for each in found.curve]}
            return {**shared, **own, "pass_cost": asdict(found.cost), "num_leaves": found.work.leaves.num_leaves}
        stages = {name: each if isinstance(each, str) else deep.as_dict(each) for name, each in found.stages.items()}
        return {
            **shared,
            "num_parameters": found.networks.num_parameters,
            "phases": [asdict(cost) for cost in found.networks.phases],
            "step": deep.as_dict(found.chosen),
            "stages": stages,
            "largest_micro_batch": found.micro_batch,
            "curve": [deep.as_dict(each) for each in found.curve],
        }


def plan_of(spec: Spec, where: Where, num_rows: int | None = None, num_features: int | None = None) -> Plan:
    """UserError where the spec could not be fitted so, or too little is known of its data."""
    family = family_class(spec.family)
    machine, wires = _machine(where), _network(where)
    sizes = sizes_of(spec, family, num_rows, num_features)
    labels = sizes.labels
    _check_labels(spec, labels)
    counts = sorted({*(2**i for i in range(max(where.workers * 2, 16).bit_length())), max(1, where.workers)})
    if is_trained(family):
        found: em.EMPlan | deep.DeepPlan = deep.deep_plan(spec, sizes, labels, machine, wires, where.workers, counts)
    else:
        found = em.em_plan(spec, sizes, labels, machine, wires, where.workers, counts)
    seconds = [each.seconds for each in found.curve]
    numbers = [each.num_workers for each in found.curve]
    bend = bend_of(numbers, seconds)
    return Plan(spec, machine, wires, sizes, found, efficiency(numbers, seconds), bend, _advice(spec, machine, found, bend))


def efficiency(numbers: Sequence[int], seconds: Sequence[float]) -> list[float]:
    """Of each number of workers, the first of which is 1: the time of one, by how many times as many worked how long."""
    return [seconds[0] / (number * each) for number, each in zip(numbers, seconds, strict=True)]


def bend_of(numbers: Sequence[int], seconds: Sequence[float]) -> int | None:
    by_number = dict(zip(numbers, seconds, strict=True))
    for number in numbers:
        if 2 * number in by_number and by_number[number] < BEND * by_number[2 * number]:
            return number
    return None


def _machine(where: Where) -> Machine:
    if where.gpus_per_node and where.gpu not in GPUS:
        raise UserError(f"--gpu {where.gpu}: not in the table; there are {', '.join(GPUS)}")
    machine = GPUS[where.gpu] if where.gpus_per_node else this_machine()
    if where.memory_gb is None:
        return machine
    return Machine(**{**vars(machine), "memory_bytes": where.memory_gb * 1e9})


def _network(where: Where) -> Network:
    import os

    per_node = where.gpus_per_node or where.workers_per_node or os.cpu_count() or 1
    return network(per_node, bool(where.gpus_per_node), where.network_gbits, where.latency_us)


def _check_labels(spec: Spec, labels: tuple[Any, ...]) -> None:
    """UserError where what it takes depends on how many there are, and nobody says it."""
    if spec.data.label is not None and not labels:
        raise UserError("what this takes depends on the number of classes: say them, such as data.labels=[0,1,2,3,4,5,6,7,8,9]")


def _advice(spec: Spec, machine: Machine, found: em.EMPlan | deep.DeepPlan, bend: int | None) -> list[str]:
    lines = []
    if isinstance(found, em.EMPlan):
        leaves = found.work.leaves
        lines.append(
            f"a block is {leaves.max_leaf_rows:,} rows, by the shape of the data: results hang on blocks, not on workers; "
            f"{leaves.num_leaves:,} blocks keep as many workers busy, and no more"
        )
        if found.chosen.memory_bytes > machine.memory_bytes:
            lines.append("a worker's share of the rows does not fit into its memory: more workers, or data.cache=none")
        biggest = max(("compute", found.chosen.compute_s), ("the driver's part", found.chosen.seconds - found.chosen.compute_s),
                      key=lambda part: part[1])  # fmt: skip
        lines.append(f"most of an iteration is {biggest[0]}")
    else:
        fitting = [name for name in deep.ENGINES if found.micro_batch.get(name)]
        is_in_full = [
            name
            for name in fitting
            if not isinstance(found.stages[name], str) and found.stages[name].memory_bytes <= machine.memory_bytes  # type: ignore[union-attr]
        ]
        chosen_fits = found.chosen.memory_bytes <= machine.memory_bytes
        lines.append("as the spec says it fits" if chosen_fits else "as the spec says it does not fit")
        if is_in_full:
            lines.append(f"the plainest engine that fits with these micro-batches: {is_in_full[0]}")
        elif fitting:
            name = fitting[0]
            lines.append(f"{name} fits with fit.micro_batch_size={found.micro_batch[name]}")
        else:
            lines.append("no engine fits without offload: more workers, or fit.engine.config with offload_optimizer to cpu")
        if largest := found.micro_batch["as said"]:
            lines.append(f"the largest micro-batch that fits and divides the global batch: fit.micro_batch_size={largest}")
    lines.append(
        f"beyond {bend} workers, twice as many are less than {BEND:g} times as fast"
        if bend is not None
        else "so many workers and twice as many pay"
    )
    return lines
