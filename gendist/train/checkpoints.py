"""Checkpoints of training: a folder for each, which any engine and any number of processes may go on from.

00000100/training.json         how far training had come
00000100/training.safetensors  the tensors of `Engine.state`

A folder appears whole or not at all. Writing happens in a thread of its own, beside the steps that follow; where storage
fails for a while, training goes on meanwhile, but no further than the next checkpoint.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import zlib
from collections import deque
from collections.abc import Callable, Mapping, Set
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

import safetensors.torch
from torch import Tensor

from gendist.atomic import new_folder, sync_file, write
from gendist.protocols import UserError
from gendist.storage.patience import first_whole, patiently, reason
from gendist.train.decisions import Progress, kept

FORMAT_VERSION = 1

logger = logging.getLogger("gendist")


@dataclass(frozen=True)
class TrainingCheckpoint:
    """
    progress  how far training had come
    state     as `Engine.state` returned it
    """

    progress: Progress
    state: Mapping[str, Tensor]


Kept = Callable[[list[int]], Set[int]]


def name_of(step: int) -> str:
    """Of the checkpoint after so many steps."""
    return f"{step:08d}"


class CheckpointWriter:
    """Used as `with CheckpointWriter(folder, keep_last) as writer:`, by one process; at the end all is on disk.

    written  called in the thread, where a checkpoint is on disk, with its name and what tells which steps are to stay

    What cannot be written raises UserError at the next call, or at the end, and nothing is written after it; what was before it
    stays.
    """

    def __init__(self, folder: Path, keep_last: int, written: Callable[[str, Kept], None] = lambda name, kept: None) -> None:
        self._folder, self._keep_last, self._written = folder, keep_last, written
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._begun: deque[Future[None]] = deque()
        self._saving: Future[None] | None = None
        self._has_failed = False

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._thread.shutdown(wait=True)
        if error is None:
            self.wait()

    def save(self, checkpoint: TrainingCheckpoint) -> None:
        """Begin to write; returns at once, unless the checkpoint before is being written still."""
        if self._saving is not None:
            self._saving.result()
        self._saving = self.submit(lambda: self._save(checkpoint))

    def submit(self, act: Callable[[], object]) -> Future[None]:
        """Write something else, after all that was begun before."""
        self._begun.append(self._thread.submit(self._do, act))
        return self._begun[-1]

    def check(self) -> None:
        """Raise what went wrong in the meantime, without waiting."""
        while self._begun and self._begun[0].done():
            self._begun.popleft().result()

    def wait(self) -> None:
        """Until what was begun is on disk."""
        while self._begun:
            self._begun.popleft().result()

    def _do(self, act: Callable[[], object]) -> None:
        if self._has_failed:
            return
        try:
            act()
        except BaseException:
            self._has_failed = True
            raise

    def _save(self, checkpoint: TrainingCheckpoint) -> None:
        path, best = self._folder / name_of(checkpoint.progress.step), checkpoint.progress.best_step

        def kept_of(steps: list[int]) -> Set[int]:
            return kept(steps, best, self._keep_last)

        try:
            patiently(str(path), lambda: _write(path, checkpoint, kept_of))
        except (OSError, safetensors.SafetensorError) as error:
            raise UserError(
                f"{path}: the checkpoint cannot be written ({error}); those before it are whole: make room, and run again"
            ) from error
        self._written(path.name, kept_of)


def _write(path: Path, checkpoint: TrainingCheckpoint, kept: Kept) -> None:
    folder = path.parent
    for other in _folders(folder):
        if int(other.name) >= checkpoint.progress.step:  # passed over as unreadable, or training would not have come here again
            shutil.rmtree(other.with_name(f".{other.name}.unreadable"), ignore_errors=True)
            other.rename(other.with_name(f".{other.name}.unreadable"))
    with new_folder(path) as inside:
        tensors = inside / "training.safetensors"
        _save_tensors(checkpoint.state, tensors)
        sync_file(tensors)
        description = {
            "format_version": FORMAT_VERSION,
            "progress": asdict(checkpoint.progress),
            "crc32": _crc32(tensors),
        }
        write(inside / "training.json", (json.dumps(description, indent=2) + "\n").encode())
    steps = {int(path.name): path for path in _folders(folder)}
    for old in steps.keys() - kept(sorted(steps)):
        shutil.rmtree(steps[old])


def _save_tensors(state: Mapping[str, Tensor], path: Path) -> None:
    try:
        safetensors.torch.save_file(dict(state), path)
    except safetensors.SafetensorError as error:
        raise _as_os_error(error) from error


def _as_os_error(error: safetensors.SafetensorError) -> Exception:
    """What safetensors says of a disk is text that names the system's number of the error."""
    found = re.search(r"\(os error (\d+)\)", str(error))
    return OSError(int(found[1]), os.strerror(int(found[1]))) if found else error


def _crc32(path: Path) -> int:
    digest = 0
    with path.open("rb") as file:
        while part := file.read(2**22):
            digest = zlib.crc32(part, digest)
    return digest


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("[0-9]*") if path.is_dir())


def newest(folder: Path) -> TrainingCheckpoint | None:
    """The newest checkpoint that is whole; None where there is none. What is damaged stays and is said.

    UserError where one may be whole, but cannot be read now, or by this gendist.
    """
    found = first_whole(reversed(_folders(folder)), read)
    return found[1] if found else None


def read(path: Path) -> TrainingCheckpoint:
    """The checkpoint in a folder."""
    description = json.loads((path / "training.json").read_bytes())
    if description["format_version"] > FORMAT_VERSION:
        raise UserError(
            f"{path}: written by a newer gendist (format {description['format_version']}; this one reads up to "
            f"{FORMAT_VERSION}); upgrade gendist to go on from it"
        )
    progress = Progress(**description["progress"])
    if progress.step != int(path.name):
        raise ValueError(f"of step {progress.step}")
    tensors = path / "training.safetensors"
    if _crc32(tensors) != description["crc32"]:
        raise ValueError("training.safetensors has other bytes than were written")
    try:
        return TrainingCheckpoint(progress, safetensors.torch.load_file(tensors))
    except safetensors.SafetensorError as error:
        said = _as_os_error(error)
        raise said if isinstance(said, OSError) else ValueError(reason(error)) from error
