"""A run on disk: its spec, manifest, metrics, checkpoints and, in the end, its artifact.

A run is new, unfinished or finished. It is finished when its artifact stands there, which appears whole or not at all; the
newest checkpoint is what an unfinished one goes on from.

It lies in a folder, or in a store that a URL names: then the folder is a working copy of this process, and what is complete in
it is brought to the store (`gendist.storage.mirror`).
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Set
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from gendist.artifact import Artifact, load_artifact, save
from gendist.atomic import new_folder, write_atomically
from gendist.config import Spec, load_spec
from gendist.data import Schema
from gendist.fitted_model import FittedModel
from gendist.folder_lock import locked
from gendist.protocols import GenerativeModel, UserError
from gendist.run import Run
from gendist.started_by import is_in_a_job
from gendist.storage import Storage, place_of
from gendist.storage.check import MARK
from gendist.storage.lease import Holder, Lease
from gendist.storage.mirror import Mirror, StopSign
from gendist.storage.patience import StorageError, first_whole, patiently
from gendist.storage.working_copy import working_copy

STOP = ".stop"  # while it is there, whoever fits is asked to leave a checkpoint and stop
LEASE, WRITER = ".lease.json", ".writer.json"  # in a store: of the process that began the run, and of the one that writes to it

# Set by Ray in the process of a job. An attempt there follows one whose host was lost: for a while, its lock or its lease may
# not have been (NFS keeps a lock for 90 s, and a host that is cut off from the cluster may still reach the store).
JOB_WAIT_S = 180.0

T = TypeVar("T")
logger = logging.getLogger("gendist")


@dataclass
class RunDirectory:
    """Used as `with RunDirectory(place, spec) as run:`, which one process at a time may do.

    place         as people call it: a path, or a URL
    path          of the folder; of a URL that of the working copy, which is there inside of the `with` block alone
    wait_s        how long another process that works there is waited for
    last_written  the name of the newest checkpoint that was written or gone on from here

    UserError where the place holds a run of another spec, or something that is no run.
    """

    place: Path | str
    spec: Spec
    wait_s: float = field(default_factory=lambda: JOB_WAIT_S if is_in_a_job() else 0.0)
    path: Path = field(init=False)
    mirror: Mirror | None = field(default=None, init=False)
    last_written: str | None = field(default=None, init=False)
    _held: ExitStack = field(default_factory=ExitStack, init=False, repr=False)

    def __post_init__(self) -> None:
        self.place = place_of(self.place)
        self.storage = Storage(self.place) if isinstance(self.place, str) else None
        self.path = self.place if isinstance(self.place, Path) else Path("a working copy that was not made")

    def __enter__(self) -> RunDirectory:
        with ExitStack() as held:
            if self.storage:
                self.mirror = self._copied(held, self.storage)
                with self.quickly():  # so that a mistake is told at once
                    self.mirror.pull_run()
            if self.path.exists() and not self.path.is_dir():
                raise UserError(f"{self.place}: a file; a run directory is a folder")
            self._check_what_is_there()
            if self.is_finished:  # there is nothing to write, and reading needs no lock
                self._tidy()
            else:
                if self.mirror:
                    self.mirror.writer = held.enter_context(Lease(self.mirror.storage, LEASE).held(self.wait_s))
                    self.mirror.pull_run()
                else:
                    held.enter_context(locked(self.path, self.wait_s))
                held.callback(self._leave_nothing_behind)
                self._check_what_is_there()  # again: another process may have begun a run in between
            self._held = held.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._held.close()

    @contextmanager
    def seen(self) -> Iterator[RunDirectory]:
        """`with directory.seen():` read what another process has begun. UserError where this machine does not see it."""
        with ExitStack() as held:
            if self.storage:
                self.mirror = self._copied(held, self.storage)
                self.mirror.pull_run()
            if not (self.path / "spec.yaml").exists():
                raise UserError(
                    f"{self.place}: {os.uname().nodename} does not see the run directory; choose one with --run-dir that all "
                    "machines share"
                )
            yield self

    @contextmanager
    def quickly(self) -> Iterator[None]:
        """A store that fails is not waited for."""
        if self.mirror is None:
            yield
            return
        patient = self.mirror.storage
        self.mirror.storage = replace(patient, is_patient=False)
        try:
            yield
        finally:
            self.mirror.storage = patient

    def _copied(self, held: ExitStack, storage: Storage) -> Mirror:
        self.path = held.enter_context(working_copy())
        return Mirror(storage, self.path)

    def _tidy(self) -> None:
        """Take away the lease of a process that was killed when it had finished the run."""
        if self.mirror:
            with suppress(UserError), self.quickly():
                holder = Holder.parse(self.mirror.storage.read(LEASE))
                if holder is not None and holder.is_known_dead():
                    self.mirror.forget([LEASE, WRITER, STOP])

    def _leave_nothing_behind(self) -> None:
        """Of what only a run that is at work needs, or a look that was killed; and bring what wandb has left in the working
        copy. Whoever has lost the run by now changes nothing of it."""
        with suppress(UserError, OSError), self.quickly():
            if self.mirror:
                try:
                    self.mirror.push_folder("wandb")
                except (StorageError, OSError) as error:
                    logger.warning("%s: what wandb has kept did not get there (%s)", self.place, error)
                marks = [name for name in self.mirror.storage.names() if name.startswith(MARK)]
                self.mirror.forget([WRITER, STOP, *marks])
            else:
                for mark in self.path.glob(f"{MARK}*"):
                    mark.unlink(missing_ok=True)

    def _check_what_is_there(self) -> None:
        """UserError unless there is nothing, or a run of the same spec."""
        if not (self.path / "spec.yaml").exists():
            if self.path.exists() and any(not file.name.startswith(".") for file in self.path.iterdir()):
                raise UserError(f"{self.place}: holds files that are not of a run; choose another folder with --run-dir")
            return
        # Read as a spec, so that a field that this gendist added has its default.
        different = _differences(load_spec(self.path / "spec.yaml").identity(), self.spec.identity())
        if different:
            raise UserError(
                f"{self.place}: holds a run of another spec (different: {', '.join(different)}); "
                "choose another folder with --run-dir (fit.init=OLD_FOLDER starts from what was fitted here)"
            )

    @property
    def is_finished(self) -> bool:
        return (self.path / "artifact" / "model.json").is_file()

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """The folder of what an unfinished run goes on from; what stands in it is the affair of whoever fits."""
        return self.path / "checkpoints"

    def check_same_data(self, manifest: dict[str, Any]) -> None:
        """UserError where the run that stands here began on other data, or from another model."""
        earlier = self.read_manifest()
        if earlier:
            for key, what in (("data", "the data has changed"), ("init", "the model to start from has changed")):
                if earlier.get(key) != manifest.get(key):
                    raise UserError(
                        f"{self.place}: {what} since this run began ({_brief(earlier.get(key))} then, "
                        f"{_brief(manifest.get(key))} now); restore it, or choose another folder with --run-dir"
                    )

    def begin(self, manifest: dict[str, Any]) -> dict[str, Any]:
        """Write spec and manifest before the work starts; returns the manifest, which of a resumed run has its beginning."""
        self.check_same_data(manifest)
        earlier = self.read_manifest()
        if earlier:
            manifest = {**manifest, "started": earlier["started"], "run_id": earlier.get("run_id", manifest["run_id"])}
            if earlier["machine"] != manifest["machine"]:
                logger.warning("this run began on %s and goes on on %s: its last bits may differ from those of an "
                               "unbroken run", earlier["machine"], manifest["machine"])  # fmt: skip
        self._write("spec.yaml", self.spec.to_yaml())
        self.write_manifest(manifest)
        if self.mirror:
            self.mirror.push("spec.yaml", "manifest.json")
        return manifest

    def abandon(self) -> None:
        """Take away what `begin` wrote, of a run that has come nowhere."""
        for name in ("spec.yaml", "manifest.json", ".writer.lock"):
            (self.path / name).unlink(missing_ok=True)
        if self.mirror:
            self.mirror.forget(["manifest.json", "spec.yaml"])

    def read_manifest(self) -> dict[str, Any]:
        """The manifest; empty before the run began."""
        file = self.path / "manifest.json"
        if not file.exists():
            return {}
        return parse(file, file.read_bytes())

    def write_manifest(self, manifest: dict[str, Any]) -> None:
        self._write("manifest.json", json.dumps(manifest, indent=2) + "\n")

    def append_metrics(self, records: Iterable[dict[str, Any]], sync: bool = False) -> None:
        """sync: wait until the disk has them, as before a checkpoint that does not hold them itself.

        UserError where it is known that somebody else has the run by now.
        """
        if self.mirror and self.mirror.writer and self.mirror.writer.lost:
            raise self.mirror.writer.lost
        text, ends_at = _lines(records).encode(), None

        def append() -> None:
            nonlocal ends_at
            with self.metrics_file.open("ab") as file:
                if ends_at is None:
                    ends_at = file.tell()
                else:
                    file.truncate(ends_at)  # what an attempt before left, which may be a part
                file.write(text)
                if sync:
                    file.flush()
                    os.fsync(file.fileno())

        patiently(str(self.metrics_file), append)

    def read_metrics(self) -> list[dict[str, Any]]:
        if not self.metrics_file.exists():
            return []
        lines = self.metrics_file.read_bytes().splitlines()
        return [parse(self.metrics_file, line) for line in lines]

    def cut_metrics(self, step: int) -> None:
        """Take away the records of later steps, and a last line that was not written to its end."""
        if self.metrics_file.exists():
            lines = [line for line in self.metrics_file.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
            records = [parse(self.metrics_file, line) for line in lines]
            self.write_metrics(record for record in records if record["step"] <= step)

    def finish(
        self, model: GenerativeModel, records: Iterable[dict[str, Any]], schema: Schema, manifest: dict[str, Any]
    ) -> None:
        """Write the artifact, last of all: with it the run is finished."""
        self.write_manifest(manifest)
        self.write_metrics(records)
        artifact = self.path / "artifact"

        def write() -> None:
            if not artifact.exists():
                with new_folder(artifact) as inside:
                    save(Artifact(self.spec.family, model, schema), inside)

        patiently(str(artifact), write)
        if self.mirror:
            pictures = [path.name for path in sorted(self.path.glob("*.png"))]
            self.mirror.push("manifest.json", self.metrics_file.name, *pictures)
            self.mirror.push_artifact()

    def write_metrics(self, records: Iterable[dict[str, Any]]) -> None:
        self._write(self.metrics_file.name, _lines(records))

    def _write(self, name: str, content: str) -> None:
        patiently(str(self.path / name), lambda: write_atomically(self.path / name, content))

    def newest(self, read: Callable[[Path], T]) -> T | None:
        """What the newest checkpoint that is whole holds, of a store with the metrics up to it; None where there is none.

        UserError where one may be whole, but cannot be read now, or by this gendist.
        """
        found = first_whole(self.mirror.newest_first() if self.mirror else newest_first(self.checkpoints), read)
        self.last_written = found[0].name if found else None
        return found[1] if found else None

    def has_checkpoints(self) -> bool:
        """Whether there are any, whole or not."""
        return bool(self.mirror.steps() if self.mirror else newest_first(self.checkpoints))

    def fetch(self, name: str) -> Path:
        """The folder of one of the checkpoints. FileNotFoundError where a store has it no more, or not whole."""
        if self.mirror and not self.mirror.pull_checkpoint(name):
            raise FileNotFoundError(f"{self.place}/checkpoints/{name}: is not there any more, or not whole")
        return self.checkpoints / name

    def checkpoint_written(self, name: str, kept: Callable[[list[int]], Set[int]]) -> None:
        """One is complete in the folder.

        kept  of the numbers of checkpoints, those that are to stay
        """
        if self.mirror:
            self.mirror.push_checkpoint(name, kept)
        self.last_written = name

    def bring(self, name: str) -> None:
        """Of a store, bring it a file that is complete in the working copy, such as a picture."""
        if self.mirror:
            self.mirror.push(name)

    def explained(self, error: StorageError) -> StorageError:
        """What is to be said when storage has failed for too long."""
        kept = f"checkpoints/{self.last_written}" if self.last_written else "none yet"
        return StorageError(f"{error}; the last good checkpoint is {kept} in {self.place}: mend the storage, and run again")

    def ask_to_stop(self) -> None:
        """Whoever fits, on whatever machine."""
        if self.storage:
            if self.mirror and self.mirror.writer:
                self.mirror.writer.check()  # whoever has lost the run stops nobody else's
            self.storage.write(STOP, b"")
        else:
            (self.path / STOP).touch()

    def forget_to_stop(self) -> None:
        if self.mirror:
            self.mirror.forget([STOP])
        else:
            (self.path / STOP).unlink(missing_ok=True)

    def stop_sign(self) -> Callable[[], bool]:
        """What tells whether somebody has asked to stop."""
        if self.storage:
            return StopSign(self.storage, STOP, self.mirror.writer if self.mirror else None)
        return (self.path / STOP).exists

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Be the one process that writes to a store. Whoever started the run holds it, but a worker that was given up may still
        be about to end, and is shut out from here on."""
        assert self.mirror
        self.mirror.writer = Lease(self.mirror.storage, WRITER)
        self.mirror.writer.seize()
        yield


def newest_first(folder: Path) -> list[Path]:
    """Of the checkpoints in a folder."""
    return sorted((path for path in folder.glob("[0-9]*") if path.is_dir()), reverse=True)


def finished(directory: RunDirectory) -> Run:
    """What a finished run has left."""
    logger.info("%s is finished; nothing to do", directory.place)
    return read_run(directory)


def read_run(directory: RunDirectory) -> Run:
    results = directory.read_manifest().get("results", {})
    history = [record for record in directory.read_metrics() if record.get("restart") == results.get("restart")]
    return Run(FittedModel(load_artifact(directory.path)), history, directory.place, results)


def _lines(records: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def parse(file: Path, text: bytes) -> dict[str, Any]:
    """The JSON object that a file of a run, or a line of it, holds."""
    try:
        content = json.loads(text)
        if not isinstance(content, dict):
            raise ValueError("not a JSON object")
        return content
    except ValueError as error:
        raise UserError(f"{file}: damaged ({error}); restore it, or remove the run directory and fit again") from error


def _brief(value: Any) -> str:
    """A value of the manifest, with fingerprints cut short."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_brief(inside)}" for key, inside in value.items())
    return f"{value:.12}..." if isinstance(value, str) and len(value) == 64 else str(value)


def _differences(there: Any, here: Any, prefix: str = "") -> list[str]:
    """The dotted keys in which two specs differ."""
    if not isinstance(there, dict) or not isinstance(here, dict):
        return [] if there == here else [prefix]
    keys = [*here, *(key for key in there if key not in here)]
    return [
        key
        for name in keys
        for key in _differences(there.get(name), here.get(name), f"{prefix}.{name}" if prefix else str(name))
    ]
