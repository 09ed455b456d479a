"""A fit in processes that torchrun started: `torchrun --nproc-per-node 2 launch.py fit SPEC`.

Rank 0 looks at the data and holds the run directory; the others learn from it what to do, and what went wrong.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from gendist.config import Spec
from gendist.protocols import UserError
from gendist.run import Run, Watch
from gendist.run_directory import RunDirectory
from gendist.tracking import tracked
from gendist.train.processes import joined, patient_group, told_by_first
from gendist.training import LocalLine, Training, held_back, kept


def train_in_all(spec: Spec, data: Any, init: Any, directory: RunDirectory | None, address: str | None, watch: Watch) -> Run:
    """What each of the processes calls; all return the same. Only rank 0 looks at `data` and `init`, and calls `watch`."""
    if spec.cluster.num_workers != 0 or address is not None:
        given = f"--address {address}" if address else f"cluster.num_workers is {spec.cluster.num_workers}"
        raise UserError(f"{given}, but torchrun has started the processes; set cluster.num_workers=0, or leave torchrun out")
    with joined(spec.cluster.use_gpu) as processes, ExitStack() as held:
        training: list[Training] = []

        def begin() -> Any:
            training.append(held.enter_context(kept(spec, directory)))
            return training[0].prepare(data, init)

        patient = patient_group(processes)
        prepared = told_by_first(processes, begin, patient)
        if isinstance(prepared, Run):
            return prepared
        held.enter_context(held_back(training[0].directory if training else RunDirectory(prepared.place, spec)))
        if training:
            watch = held.enter_context(tracked(directory, watch))
        try:
            has_ended = prepared(LocalLine(watch))
        except UserError:
            if training:
                training[0].undo()
            raise
        if not has_ended:
            raise KeyboardInterrupt
        run: Run = told_by_first(processes, lambda: training[0].finish(), patient)
        return run
