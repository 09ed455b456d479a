"""A run in a store, and the working copy of it on this machine, in which a process reads and writes as in any run directory.

What is complete goes to the store: a checkpoint with the list of its files last, an artifact with its model.json last. What is
not complete there is passed over, whoever was killed while writing it.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Set
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

from gendist.errors import UserError
from gendist.storage.lease import Lease, Taken
from gendist.storage.objects import Storage
from gendist.storage.patience import patiently

LIST = ".files.json"  # of what a checkpoint consists, with the length and the check sum of each file
DESCRIPTIONS = ("spec.yaml", "manifest.json")
METRICS = "metrics.jsonl"  # of the run up to a checkpoint: in its folder, and for people in the run's
WHOLE = "model.json"  # of an artifact: written last
STOP_POLL_S = 5.0

logger = logging.getLogger("gendist")


@dataclass
class Mirror:
    """
    local   the working copy
    writer  who must still be the one that writes, when something is brought to the store, or removed there
    """

    storage: Storage
    local: Path
    writer: Lease | None = None
    _pushed: dict[str, int] = field(default_factory=dict)
    _damaged: set[str] = field(default_factory=set)  # checkpoints that were looked at and could not be read

    @property
    def url(self) -> str:
        return self.storage.url

    def pull_run(self) -> None:
        """What tells which run this is and, of a finished one, what it has left. UserError where something else is there."""
        for name in (*DESCRIPTIONS, METRICS):
            self._pull(name)
        if not (self.local / "spec.yaml").exists() and (others := [name for name in self.storage.names() if _is_seen(name)]):
            raise UserError(f"{self.url}: holds files that are not of a run ({others[0]}); choose another place with --run-dir")
        if _is_json(self.storage.read(f"artifact/{WHOLE}")):
            for name in self.storage.names("artifact"):
                self._pull(name)

    def push(self, *names: str) -> None:
        """Files of the working copy, in this order; those that have not changed since stay as they are."""
        for name in names:
            path = self.local / name
            if path.is_file() and self._pushed.get(name) != (stamp := path.stat().st_mtime_ns):
                self._check_writer()
                self.storage.upload(path, name)
                self._pushed[name] = stamp

    def push_folder(self, folder: str, last: str | None = None) -> None:
        """All files below a folder of the working copy."""
        names = [path.relative_to(self.local).as_posix() for path in sorted((self.local / folder).rglob("*")) if path.is_file()]
        ending = [f"{folder}/{last}"] if last else []
        self.push(*(name for name in names if name not in ending), *ending)

    def push_artifact(self) -> None:
        """With it the run is finished."""
        self.push_folder("artifact", last=WHOLE)

    def push_checkpoint(self, name: str, kept: Callable[[list[int]], Set[int]]) -> None:
        """One that is complete here, with the metrics so far; then remove those that need not be kept."""
        folder, here = f"checkpoints/{name}", self.local / "checkpoints" / name
        self._remove(step for step in self.steps() if step in self._damaged or step == name)

        def read() -> dict[str, list[int]]:
            if (metrics := self.local / METRICS).exists():
                shutil.copyfile(metrics, here / f".{METRICS}")
            files = [path for path in sorted(here.rglob("*")) if path.is_file() and path.name != LIST]
            return {path.relative_to(here).as_posix(): _stamp(path) for path in files}

        contents = patiently(str(here), read)
        for path in (*DESCRIPTIONS, *(f"{folder}/{path}" for path in contents)):
            if (self.local / path).exists():
                self._check_writer()
                self.storage.upload(self.local / path, path)
        self._check_writer()
        self.storage.write(f"{folder}/{LIST}", json.dumps(contents).encode())
        self.push(METRICS)
        steps = {int(step): step for step in self.steps() if int(step) <= int(name)}
        self._remove(steps[step] for step in sorted(steps.keys() - kept(sorted(steps))))

    def newest_first(self) -> Iterator[Path]:
        """The checkpoints that are whole, in the working copy, with the metrics up to there in place of what was here. Whoever
        asks for the next one could not read the one before."""
        (self.local / METRICS).unlink(missing_ok=True)
        for name in reversed(self.steps()):
            here = self.local / "checkpoints" / name
            if self.pull_checkpoint(name):
                if (metrics := here / f".{METRICS}").exists():
                    shutil.copyfile(metrics, self.local / METRICS)
                yield here
                (self.local / METRICS).unlink(missing_ok=True)
                shutil.rmtree(here, ignore_errors=True)
            self._damaged.add(name)

    def pull_checkpoint(self, name: str) -> bool:
        """Whether it is there and whole; then it is in the working copy."""
        folder, here = f"checkpoints/{name}", self.local / "checkpoints" / name
        listed = self.storage.read(f"{folder}/{LIST}")
        shutil.rmtree(here, ignore_errors=True)
        try:
            contents = json.loads(listed or b"")
            for path, stamp in contents.items():
                self.storage.download(f"{folder}/{path}", here / path)
                if _stamp(here / path) != stamp:
                    raise ValueError(f"{path} has other bytes than were written")
        except (ValueError, AttributeError, FileNotFoundError) as error:
            if isinstance(error, UserError):
                raise
            if listed is not None:
                logger.warning("%s/%s cannot be read and is passed over (%s)", self.url, folder, error)
            shutil.rmtree(here, ignore_errors=True)
            return False
        return True

    def forget(self, names: Iterable[str]) -> None:
        self._check_writer()
        self.storage.remove(names)
        for name in names:
            self._pushed.pop(name, None)

    def _pull(self, name: str) -> None:
        try:
            self.storage.download(name, self.local / name)
            self._pushed[name] = (self.local / name).stat().st_mtime_ns
        except FileNotFoundError:
            (self.local / name).unlink(missing_ok=True)

    def steps(self) -> list[str]:
        """The names of all checkpoints, whole or not, the newest last."""
        names = {name.split("/")[1] for name in self.storage.names("checkpoints") if name.count("/") >= 2}
        return sorted(name for name in names if name.isdigit())

    def _remove(self, steps: Iterable[str]) -> None:
        for step in steps:
            self._check_writer()
            folder = f"checkpoints/{step}"
            self.storage.remove([f"{folder}/{LIST}"])  # first, so that what is left is none
            self.storage.remove(self.storage.names(folder))
            self._damaged.discard(step)

    def _check_writer(self) -> None:
        if self.writer:
            self.writer.check(self.storage.is_patient)


class StopSign:
    """Whether there is an object that asks a run to stop, or somebody else is its writer by now; looked for now and then and
    beside the work."""

    def __init__(self, storage: Storage, name: str, writer: Lease | None = None) -> None:
        self._storage, self._name, self._writer = replace(storage, is_patient=False), name, writer
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="stop-sign")
        self._looking: Future[bool] | None = None
        self._looked_at = -STOP_POLL_S
        self._is_there = False

    def __call__(self) -> bool:
        now = time.monotonic()
        if self._looking is not None and self._looking.done():
            self._is_there, self._looking, self._looked_at = self._looking.result(), None, now
        if self._looking is None and now - self._looked_at >= STOP_POLL_S:
            self._looking = self._thread.submit(self._look)
        return self._is_there

    def _look(self) -> bool:
        try:
            if self._writer:
                self._writer.check(is_patient=False)
            return self._storage.read(self._name) is not None
        except Taken:
            return True
        except UserError:  # whoever writes says so
            return self._is_there


def _stamp(path: Path) -> list[int]:
    """The length of a file, and its check sum."""
    length, digest = 0, 0
    with path.open("rb") as file:
        while part := file.read(2**22):
            length, digest = length + len(part), zlib.crc32(part, digest)
    return [length, digest]


def _is_seen(name: str) -> bool:
    return not any(part.startswith(".") for part in name.split("/"))


def _is_json(content: bytes | None) -> bool:
    try:
        return content is not None and isinstance(json.loads(content), dict)
    except ValueError:
        return False
