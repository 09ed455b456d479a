"""How long an iteration of expectation-maximization takes on so many workers, and what travels: pure functions of what a pass
costs. Workers take as many leaves each; what they return is merged on the driver, which then makes the M-step."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from gendist.blocks import Leaves
from gendist.planning.answer import OnWorkers
from gendist.planning.machines import Network

# On Ray 2.60, tasks that do nothing (measured: 16 of them 21 ms, 64 66 ms, 128 150 ms).
PASS_S, TASK_S = 4e-3, 1.15e-3


@dataclass(frozen=True)
class Trial:
    """What one thread takes of an iteration, all its passes together.

    row_s          of a row; once_s: of a task besides, for what it makes of new parameters
    merge_s        of two statistics; m_step_s: of one, and of whatever else the driver does
    working_bytes  of a kernel
    num_passes     of an iteration
    """

    row_s: float
    merge_s: float
    m_step_s: float
    working_bytes: float
    how: str
    once_s: float = 0.0
    num_passes: int = 1


@dataclass(frozen=True)
class Pass:
    """What is known of a fit's passes.

    leaves              where the rows are cut
    max_leaves_per_run  that a task may take
    row_bytes           of what is kept of a row
    statistics_bytes    that a leaf's E-step returns; parameters_bytes: of the model
    share_held_out      of the rows, whose densities are told, too
    num_restarts        in the same passes
    """

    leaves: Leaves
    max_leaves_per_run: int
    trial: Trial
    row_bytes: float
    statistics_bytes: int
    parameters_bytes: int
    share_held_out: float = 0.0
    num_restarts: int = 1


@dataclass(frozen=True, kw_only=True)
class Iteration(OnWorkers):
    """sent_bytes travel from workers to the driver, and broadcast_bytes from the driver to nodes."""

    PARTS: ClassVar = {
        "compute": "compute_s",
        "tasks": "tasks_s",
        "transfer": "transfer_s",
        "merge": "merge_s",
        "M-step": "m_step_s",
    }

    compute_s: float
    tasks_s: float = 0.0
    transfer_s: float = 0.0
    merge_s: float
    m_step_s: float
    broadcast_bytes: float = 0.0


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
    workers, trial, restarts = max(1, num_workers), work.trial, work.num_restarts
    bounds = work.leaves.bounds
    runs = work.leaves.runs(workers, work.max_leaves_per_run)
    rows = [bounds[run.stop] - bounds[run.start] for run in runs]
    busiest = max(sum(rows[worker::workers]) for worker in range(workers))
    share = (1.0 - work.share_held_out) + 0.5 * work.share_held_out  # a density is about half an E-step
    nodes = sum(num_nodes(run.start, run.stop) for run in runs)
    often = restarts * trial.num_passes
    most_levels = max(len(run).bit_length() for run in runs)
    own = Iteration(
        num_workers=num_workers,
        compute_s=restarts * (share * busiest * trial.row_s + -(-len(runs) // workers) * trial.once_s),
        merge_s=often * trial.merge_s * ((nodes - 1) + max(len(run) for run in runs) - 1),
        m_step_s=restarts * trial.m_step_s,
        sent_bytes=0.0,
        memory_bytes=busiest * work.row_bytes + trial.working_bytes + restarts * (most_levels + 1) * work.statistics_bytes,
    )
    if num_workers == 0:
        return own
    num_machines = -(-workers // network.workers_per_node)
    sent_bytes = float(often * nodes * work.statistics_bytes)
    broadcast_bytes = float(often * num_machines * work.parameters_bytes)
    passes = trial.num_passes * (2 if work.share_held_out else 1)
    bytes_per_s, latency_s = network.of(workers)
    travelling = sent_bytes + broadcast_bytes
    return replace(
        own,
        tasks_s=passes * (PASS_S + TASK_S * len(runs)),
        transfer_s=travelling / bytes_per_s + 2.0 * travelling / network.serial_bytes_per_s + passes * len(runs) * latency_s,
        sent_bytes=sent_bytes,
        broadcast_bytes=broadcast_bytes,
    )
