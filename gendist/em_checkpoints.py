"""The state of a fit by expectation-maximization in its run directory, to go on from."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from gendist.artifact import Artifact, NotThisGendist, load_artifact, save
from gendist.atomic import new_folder, write_atomically
from gendist.data import Schema
from gendist.protocols import GenerativeModel, UserError
from gendist.run_directory import RunDirectory, newest_first
from gendist.storage.patience import patiently

KEEP_CHECKPOINTS = 2  # the newest, and the one before in case a disk loses the newest

M = TypeVar("M", bound=GenerativeModel)


@dataclass(frozen=True)
class Checkpoint(Generic[M]):
    """The models that are fitted side by side, and all that is to be known to go on from them.

    records           of the iterations or steps that led to them, as metrics.jsonl holds them
    repairs_of_start  what had to be repaired where each model began
    """

    models: tuple[M, ...]
    records: tuple[dict[str, Any], ...]
    repairs_of_start: tuple[tuple[str, ...], ...]

    @property
    def iteration(self) -> int:
        return self.records[-1]["iteration"] if self.records else 0


def save_checkpoint(directory: RunDirectory, state: Checkpoint[Any], schema: Schema) -> None:
    """Keep a state for an interrupted run to go on from; the oldest checkpoints are removed."""
    folder = directory.checkpoints / f"{state.iteration:08d}"
    if folder.name == directory.last_written:
        return

    def write() -> None:
        if not folder.exists():
            with new_folder(folder) as inside:
                for index, model in enumerate(state.models):
                    save(Artifact(directory.spec.family, model, schema), inside / str(index))
                content = {"records": state.records, "repairs_of_start": state.repairs_of_start}
                write_atomically(inside / "history.json", json.dumps(content))
        for old in newest_first(directory.checkpoints)[KEEP_CHECKPOINTS:]:
            shutil.rmtree(old)

    patiently(str(folder), write)
    directory.checkpoint_written(folder.name, lambda iterations: set(iterations[-KEEP_CHECKPOINTS:]))


def resume(directory: RunDirectory) -> Checkpoint[Any] | None:
    """The newest checkpoint that can be read, with the metrics cut back to it; None where there is none. Those that are damaged
    are put aside.

    UserError where one may be whole, but cannot be read now, or by this gendist.
    """
    state = directory.newest(_read)
    for folder in newest_first(directory.checkpoints):
        if state is None or int(folder.name) > state.iteration:
            aside = folder.with_name(f".{folder.name}.unreadable")
            shutil.rmtree(aside, ignore_errors=True)  # of an earlier time
            folder.rename(aside)
    if state is None:
        directory.metrics_file.unlink(missing_ok=True)
    else:
        directory.write_metrics(state.records)
    return state


def _read(folder: Path) -> Checkpoint[Any]:
    content = json.loads((folder / "history.json").read_bytes())
    repairs = tuple(tuple(lines) for lines in content["repairs_of_start"])
    try:
        models = tuple(load_artifact(folder / str(index)).model for index in range(len(repairs)))
    except NotThisGendist:
        raise
    except UserError as error:
        if isinstance(error.__cause__, OSError):  # which may pass
            raise error.__cause__ from None
        raise ValueError(str(error)) from error
    state = Checkpoint(models, tuple(content["records"]), repairs)
    if not models or state.iteration != int(folder.name):
        raise ValueError(f"not the records of {int(folder.name)} iterations")
    return state
