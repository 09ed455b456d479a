"""How long an iteration of expectation-maximization takes on so many workers, and what travels: pure functions of what a pass
costs. Workers take as many leaves each; what they return is merged on the driver, which then makes the M-step."""

from __future__ import annotations

from dataclasses import dataclass

from gendist.blocks import Leaves
from gendist.planning.machines import Network

# On Ray 2.60, tasks that do nothing (measured: 16 of them 21 ms, 64 66 ms, 128 150 ms).
PASS_S, TASK_S = 4e-3, 1.15e-3


@dataclass(frozen=True)
class Pass:
    """What is known of a fit's passes.

    leaves              where the rows are cut
    max_leaves_per_run  that a task may take
    row_s               of an E-step, a row, on one worker; row_bytes: of what is kept of it
    statistics_bytes    that a leaf's E-step returns; parameters_bytes: of the model
    merge_s             of two statistics; m_step_s: of one
    working_bytes       of a kernel
    share_held_out      of the rows, whose densities are told, too
    num_restarts        in the same passes; num_passes: of an iteration
    """

    leaves: Leaves
    max_leaves_per_run: int
    row_s: float
    row_bytes: float
    statistics_bytes: int
    parameters_bytes: int
    merge_s: float
    m_step_s: float
    working_bytes: float
    share_held_out: float = 0.0
    num_restarts: int = 1
    num_passes: int = 1


@dataclass(frozen=True)
class Iteration:
    """Seconds of its parts, one after the other, and bytes that travel: sent_bytes from workers to the driver, and
    broadcast_bytes from the driver to nodes."""

    num_workers: int
    compute_s: float
    tasks_s: float
    transfer_s: float
    merge_s: float
    m_step_s: float
    sent_bytes: float
    broadcast_bytes: float
    memory_bytes: float

    @property
    def seconds(self) -> float:
        return self.compute_s + self.tasks_s + self.transfer_s + self.merge_s + self.m_step_s


def num_nodes(start: int, stop: int) -> int:
    """Into how many of the reduction's nodes the leaves start to stop merge: see `gendist/blocks/reduction.py`."""
    number = 0
    while start < stop:
        size = start & -start if start else 1 << (stop - start).bit_length() - 1
        while start + size > stop:
            size >>= 1
        start, number = start + size, number + 1
    return number


def iteration(work: Pass, num_workers: int, network: Network) -> Iteration:
    """0 workers: in this process, without Ray."""
    workers = max(1, num_workers)
    bounds = work.leaves.bounds
    runs = work.leaves.runs(workers, work.max_leaves_per_run)
    rows = [bounds[run.stop] - bounds[run.start] for run in runs]
    busiest = max(sum(rows[worker::workers]) for worker in range(workers))
    share = (1.0 - work.share_held_out) + 0.5 * work.share_held_out  # a density is about half an E-step
    often = work.num_restarts * work.num_passes
    compute_s = often * share * busiest * work.row_s
    nodes = sum(num_nodes(run.start, run.stop) for run in runs)
    merge_s = often * work.merge_s * ((nodes - 1) + max(len(run) for run in runs) - 1)
    m_step_s = often * work.m_step_s
    most_levels = max(len(run).bit_length() for run in runs)
    memory_bytes = busiest * work.row_bytes + work.working_bytes + work.num_restarts * (most_levels + 1) * work.statistics_bytes
    if num_workers == 0:
        return Iteration(0, compute_s, 0.0, 0.0, merge_s, m_step_s, 0.0, 0.0, memory_bytes)
    num_machines = -(-workers // network.workers_per_node)
    sent_bytes = float(often * nodes * work.statistics_bytes)
    broadcast_bytes = float(often * num_machines * work.parameters_bytes)
    passes = work.num_passes * (2 if work.share_held_out else 1)
    bytes_per_s, latency_s = network.of(workers)
    travelling = sent_bytes + broadcast_bytes
    transfer_s = travelling / bytes_per_s + 2.0 * travelling / network.serial_bytes_per_s + passes * len(runs) * latency_s
    tasks_s = passes * (PASS_S + TASK_S * len(runs))
    return Iteration(num_workers, compute_s, tasks_s, transfer_s, merge_s, m_step_s, sent_bytes, broadcast_bytes, memory_bytes)
