"""How long an iteration of expectation-maximization takes on so many workers, and what travels: a pure function of what a pass
costs. Workers take as many leaves each; what they return is merged on the driver, which then makes the M-step."""

from __future__ import annotations

from dataclasses import dataclass

from gendist.blocks import Leaves
from gendist.cost import PassCost
from gendist.planning.answer import OnWorkers
from gendist.planning.machines import Network

# On Ray 2.60, tasks that do nothing (measured: 16 of them 21 ms, 64 66 ms, 128 150 ms).
PASS_S, TASK_S = 4e-3, 1.15e-3


@dataclass(frozen=True)
class Work:
    """What is known of a fit's iterations; times are of one thread, and of all passes of an iteration together.

    leaves          where the rows are cut; max_leaves_per_run: that a task may take
    row_bytes       of what is kept of a row; working_bytes: of a kernel
    row_s           of a row; once_s: of a task besides, for what it makes of new parameters
    merge_s         of two statistics; m_step_s: of one, and of whatever else the driver does
    num_passes      of an iteration; num_restarts: in the same passes
    share_held_out  of the rows, whose densities are told, too
    """

    leaves: Leaves
    max_leaves_per_run: int
    cost: PassCost
    row_bytes: float
    working_bytes: float
    row_s: float
    merge_s: float
    m_step_s: float
    once_s: float = 0.0
    num_passes: int = 1
    num_restarts: int = 1
    share_held_out: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Iteration(OnWorkers):
    """sent_bytes travel from workers to the driver, and broadcast_bytes from the driver to nodes."""

    compute_s: float
    tasks_s: float
    transfer_s: float
    merge_s: float
    m_step_s: float
    broadcast_bytes: float


def num_nodes(start: int, stop: int) -> int:
    """Into how many of the reduction's nodes the leaves start to stop merge: see `gendist/blocks/reduction.py`."""
    number = 0
    while start < stop:  # the next one has a power of two of them, which divides where it starts
        size = 1 << (stop - start).bit_length() - 1
        start, number = start + min(size, start & -start or size), number + 1
    return number


def iteration(work: Work, num_workers: int, network: Network) -> Iteration:
    """0 workers: in this process, without Ray."""
    workers, restarts, bounds = max(1, num_workers), work.num_restarts, work.leaves.bounds
    runs = work.leaves.runs(workers, work.max_leaves_per_run)
    rows = [bounds[run.stop] - bounds[run.start] for run in runs]
    busiest = max(sum(rows[worker::workers]) for worker in range(workers))
    share = 1.0 - 0.5 * work.share_held_out  # a density is about half an E-step
    nodes, longest = sum(num_nodes(run.start, run.stop) for run in runs), max(map(len, runs))
    often = restarts * work.num_passes
    sent_bytes = broadcast_bytes = tasks_s = transfer_s = 0.0
    if num_workers:
        passes = work.num_passes * (2 if work.share_held_out else 1)
        sent_bytes = float(often * nodes * work.cost.statistics_bytes)
        broadcast_bytes = float(often * -(-workers // network.workers_per_node) * work.cost.parameters_bytes)
        tasks_s = passes * (PASS_S + TASK_S * len(runs))
        bytes_per_s, latency_s = network.of(workers)
        byte_s = 1.0 / bytes_per_s + 2.0 / network.serial_bytes_per_s
        transfer_s = (sent_bytes + broadcast_bytes) * byte_s + passes * len(runs) * latency_s
    held_bytes = restarts * (longest.bit_length() + 1) * work.cost.statistics_bytes
    return Iteration(
        num_workers=num_workers,
        sent_bytes=sent_bytes,
        broadcast_bytes=broadcast_bytes,
        memory_bytes=busiest * work.row_bytes + work.working_bytes + held_bytes,
        compute_s=restarts * (share * busiest * work.row_s + -(-len(runs) // workers) * work.once_s),
        tasks_s=tasks_s,
        transfer_s=transfer_s,
        merge_s=often * work.merge_s * (nodes + longest - 2),
        m_step_s=restarts * work.m_step_s,
    )
