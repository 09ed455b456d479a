"""A run on disk: its spec, manifest, metrics, checkpoints and, in the end, its artifact.

A run is new, unfinished or finished. It is finished when its artifact stands there, which appears whole or not at all; the
newest checkpoint is what an unfinished one goes on from.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from gendist.artifact import Artifact, load_artifact, save
from gendist.atomic import new_folder, write_atomically
from gendist.config import Spec, load_spec
from gendist.data import Schema
from gendist.folder_lock import locked
from gendist.protocols import GenerativeModel, UserError
from gendist.run import Run

logger = logging.getLogger("gendist")


@dataclass
class RunDirectory:
    """Used as `with RunDirectory(path, spec) as run:`, which one process at a time may do.

    UserError where the folder holds a run of another spec, or something that is no run.
    """

    path: Path
    spec: Spec
    _held: ExitStack = field(default_factory=ExitStack, repr=False)

    def __enter__(self) -> RunDirectory:
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path}: a file; a run directory is a folder")
        self._check_what_is_there()
        if self.is_finished:
            return self  # there is nothing to write, and reading needs no lock
        with ExitStack() as held:
            held.enter_context(locked(self.path))
            self._check_what_is_there()  # again: another process may have begun a run in between
            self._held = held.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._held.close()

    def _check_what_is_there(self) -> None:
        """UserError unless there is nothing, or a run of the same spec."""
        if not (self.path / "spec.yaml").exists():
            if self.path.exists() and any(not file.name.startswith(".") for file in self.path.iterdir()):
                raise UserError(f"{self.path}: holds files that are not of a run; choose another folder with --run-dir")
            return
        # Read as a spec, so that a field that this gendist added has its default.
        different = _differences(load_spec(self.path / "spec.yaml").identity(), self.spec.identity())
        if different:
            raise UserError(
                f"{self.path}: holds a run of another spec (different: {', '.join(different)}); "
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
                        f"{self.path}: {what} since this run began ({_brief(earlier.get(key))} then, "
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
        write_atomically(self.path / "spec.yaml", self.spec.to_yaml())
        self.write_manifest(manifest)
        return manifest

    def read_manifest(self) -> dict[str, Any]:
        """The manifest; empty before the run began."""
        file = self.path / "manifest.json"
        if not file.exists():
            return {}
        return parse(file, file.read_bytes())

    def write_manifest(self, manifest: dict[str, Any]) -> None:
        write_atomically(self.path / "manifest.json", json.dumps(manifest, indent=2) + "\n")

    def append_metrics(self, records: Iterable[dict[str, Any]], sync: bool = False) -> None:
        """sync: wait until the disk has them, as before a checkpoint that does not hold them itself."""
        with self.metrics_file.open("a", encoding="utf-8") as file:
            file.write(_lines(records))
            if sync:
                file.flush()
                os.fsync(file.fileno())

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
        with new_folder(self.path / "artifact") as inside:
            save(Artifact(self.spec.family, model, schema), inside)

    def write_metrics(self, records: Iterable[dict[str, Any]]) -> None:
        write_atomically(self.metrics_file, _lines(records))


def finished(directory: RunDirectory) -> Run:
    """What a finished run has left."""
    logger.info("%s is finished; nothing to do", directory.path)
    return read_run(directory)


def read_run(directory: RunDirectory) -> Run:
    results = directory.read_manifest().get("results", {})
    history = [record for record in directory.read_metrics() if record.get("restart") == results.get("restart")]
    return Run(load_artifact(directory.path).model, history, directory.path, results)


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
