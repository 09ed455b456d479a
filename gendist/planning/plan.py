"""`plan`: from a spec, and what is known of the cluster, to what each worker will hold, send and take, and what to do about it.

Nothing is paid for: no row is read but for what the sizes of the data need, and no network has values unless it is small.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, replace

from rich.markup import escape

from gendist.config import Spec, family_class, is_trained
from gendist.data.sources import missing_data
from gendist.planning.answer import Plan, duration, size, table
from gendist.planning.deep_plan import deep_plan
from gendist.planning.em_plan import em_plan
from gendist.planning.machines import GPUS, network, this_machine
from gendist.planning.sizes import sizes_of
from gendist.protocols import UserError

BEND = 1.5  # doubling the workers should make it so much faster


def plan_of(
    spec: Spec,
    workers: int,
    *,
    gpus_per_node: int = 0,
    gpu: str = "h100",
    workers_per_node: int = 0,
    memory_gb: float | None = None,
    network_gbits: float | None = None,
    latency_us: float | None = None,
    num_rows: int | None = None,
    num_features: int | None = None,
) -> Plan:
    """gpus_per_node 0: workers are cores of this machine's kind, workers_per_node to a node; else each has a GPU of its own.

    UserError where the spec could not be fitted so, or too little is known of its data.
    """
    family = family_class(spec.family)
    if gpus_per_node and gpu not in GPUS:
        raise UserError(f"--gpu {gpu}: not in the table; there are {', '.join(GPUS)}")
    if gpus_per_node and workers_per_node not in (0, gpus_per_node):
        raise UserError(
            f"--workers-per-node {workers_per_node} beside --gpus-per-node {gpus_per_node}: each worker has a GPU of its own; "
            "leave one of them out"
        )
    sizes = sizes_of(spec, family, num_rows, num_features)
    if spec.data.label is not None and not sizes.labels:
        missing = missing_data(spec.data)
        raise UserError(
            f"{missing + '; without the data, ' if missing else ''}what this takes depends on the number of classes: say them, "
            "such as data.labels=[0,1,2,3,4,5,6,7,8,9]"
        )
    machine = GPUS[gpu] if gpus_per_node else this_machine()
    if memory_gb is not None:
        machine = replace(machine, memory_bytes=memory_gb * 1e9)
    per_node = gpus_per_node or workers_per_node or os.cpu_count() or 1
    wires = network(per_node, machine.is_gpu, network_gbits, latency_us)
    counts = sorted({*(2**i for i in range(max(workers * 2, 16).bit_length())), max(1, workers)})
    found = (deep_plan if is_trained(family) else em_plan)(spec, sizes, machine, wires, workers, counts)

    numbers, seconds = [each.num_workers for each in found.curve], [each.seconds for each in found.curve]
    shares, bend = efficiency(numbers, seconds), bend_of(numbers, seconds)
    rows = []
    for each, share in zip(found.curve, shares, strict=True):
        held = f"{size(each.memory_bytes)}{'' if each.memory_bytes <= machine.memory_bytes else ' (!)'}"
        bends = " < bends" if each.num_workers == bend else ""
        times = map(duration, (each.seconds, *each.parts_s.values()))
        rows.append((f"{each.num_workers}", *times, held, f"{share:.0%}{bends}"))
    parts = [name.replace("m_step", "M-step") for name in found.chosen.parts_s]
    columns = ("workers", "total", *parts, "a worker holds", "efficiency")
    advice = list(found.advice)
    if bend is not None:
        advice.append(f"beyond {bend} workers, twice as many are less than {BEND:g} times as fast")
    elif len(numbers) > 1:
        advice.append(f"up to {numbers[-1]} workers, twice as many pay")
    inside = f"inside {wires.inside_bytes_per_s / 1e9:g} GB/s and {wires.inside_latency_s * 1e6:g} us a message"
    between = f"between nodes {wires.between_bytes_per_s / 1e9:g} GB/s and {wires.between_latency_s * 1e6:g} us"
    assumptions = [
        *found.assumptions,
        f"network: {per_node} workers a node, {inside}; {between}",
        f"{machine.memory_bytes / 1e9:.3g} GB for each worker",
        *sizes.assumed,
    ]
    how_many = f"{sizes.num_rows:,} " if sizes.num_rows else ""
    what = f"{escape(spec.name)}: family {spec.family}, {how_many}rows of {sizes.num_features:,} features"
    return replace(
        found,
        summary=[what, *found.summary],
        tables=[*found.tables, table("by the number of workers", columns, rows)],
        advice=advice,
        assumptions=assumptions,
        facts={
            "name": spec.name,
            "family": spec.family,
            "num_rows": sizes.num_rows,
            "num_features": sizes.num_features,
            "machine": asdict(machine),
            "network": asdict(wires),
            "curve": [each.as_dict() for each in found.curve],
            "efficiency": shares,
            "bend": bend,
            "advice": advice,
            "assumptions": assumptions,
            **found.facts,
        },
    )


def efficiency(numbers: Sequence[int], seconds: Sequence[float]) -> list[float]:
    """Of each number of workers, the first of which is 1: the time of one, by how many times as many worked how long."""
    return [seconds[0] / (number * each) for number, each in zip(numbers, seconds, strict=True)]


def bend_of(numbers: Sequence[int], seconds: Sequence[float]) -> int | None:
    """Beyond how many workers twice as many are not BEND times as fast; None: not within the curve."""
    by_number = dict(zip(numbers, seconds, strict=True))
    return next((n for n in numbers if 2 * n in by_number and by_number[n] < BEND * by_number[2 * n]), None)
