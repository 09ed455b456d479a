"""The state of a fit by expectation-maximization in its run directory, to go on from."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from gendist.artifact import Artifact, load_artifact, save
from gendist.atomic import new_folder, write_atomically
from gendist.data import Schema
from gendist.protocols import GenerativeModel
from gendist.run_directory import RunDirectory, parse
from gendist.storage.patience import patiently

KEEP_CHECKPOINTS = 2  # the newest, and the one before in case a disk loses the newest

logger = logging.getLogger("gendist")


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
        for old in _folders(directory)[:-KEEP_CHECKPOINTS]:
            shutil.rmtree(old)

    patiently(str(folder), write)
    directory.checkpoint_written(folder.name, lambda iterations: set(iterations[-KEEP_CHECKPOINTS:]))


def resume(directory: RunDirectory) -> Checkpoint[Any] | None:
    """The newest checkpoint that can be read, with the metrics cut back to it; None where there is none."""
    directory.fetch_newest()
    for folder in reversed(_folders(directory)):
        try:
            content = parse(folder / "history.json", (folder / "history.json").read_bytes())
            repairs = tuple(tuple(lines) for lines in content["repairs_of_start"])
            models = tuple(load_artifact(folder / str(index)).model for index in range(len(repairs)))
            state = Checkpoint(models, tuple(content["records"]), repairs)
            if not models or state.iteration != int(folder.name):
                raise ValueError(f"{folder}: not the records of {int(folder.name)} iterations")
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("a checkpoint cannot be read and is put aside: %s", error)
            folder.rename(folder.with_name(f".{folder.name}.unreadable"))
            continue
        directory.write_metrics(state.records)
        directory.last_written = folder.name
        return state
    directory.metrics_file.unlink(missing_ok=True)
    return None


def _folders(directory: RunDirectory) -> list[Path]:
    """Every checkpoint, the newest last."""
    there = directory.checkpoints
    return sorted(path for path in there.glob("[0-9]*") if path.is_dir()) if there.exists() else []
