"""What every process of a training run does alike, wherever it was started: here, by torchrun, or by Ray Train.

The run directory is what they share: each reads the newest checkpoint there, and rank 0 writes records, checkpoints and
pictures, in a thread of its own. A process that is lost costs the steps since the newest checkpoint, and no more.
"""

from __future__ import annotations

import fcntl
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, Protocol

import torch
from torch import Tensor

from gendist.config import Spec, family_class, load_spec
from gendist.data import Dataset
from gendist.data.rows import RowSet, RowsOnDisk
from gendist.evaluate.watch import watch_samples
from gendist.models.ops.networks import load
from gendist.pictures import samples_picture
from gendist.protocols import DeepModel, LabelCounts, UserError
from gendist.run_directory import RunDirectory
from gendist.storage.patience import StorageError, patiently
from gendist.train import restrictions
from gendist.train.arithmetic import arranged
from gendist.train.batches import Division
from gendist.train.checkpoints import CheckpointWriter, Kept, TrainingCheckpoint, name_of, read
from gendist.train.config import DeepConfig
from gendist.train.decisions import Asked, Decision, Progress, decide, is_due
from gendist.train.engine import Engine
from gendist.train.loop import NotFinite, Report, train
from gendist.train.processes import Processes, joined, told_by_first
from gendist.transformed import transformed

SAMPLES = "samples"  # in the run directory: the pictures along the way
RECORD_WITHIN_S = 5.0  # for the next record, at which a run that is resumed goes on as if it had not been stopped
WRITER_TIMEOUT_S = 150.0  # for a process of the same run that is about to end; one on a host that is cut off needs a minute

FirstWeights = Mapping[str, Mapping[str, Tensor]]  # by network, by name

logger = logging.getLogger("gendist")


class Line(Protocol):
    """What a process says to whoever started it (`gendist.train.ray_line.Line`, say); rank 0 alone is heard."""

    def record(self, record: Mapping[str, Any]) -> None: ...

    def checkpoint(self) -> None:
        """A checkpoint stands."""
        ...

    def alive(self) -> None:
        """Called by every process, at least once in a step."""
        ...


@dataclass(frozen=True)
class TrainingJob:
    """A function of one argument, which travels to the processes.

    spec   as plain values, since the class of a spec is made when it is needed
    place  of the run directory, which every process must see: a path, or a URL
    rows   what is trained on, and held out
    start  by network, the weights to set out from; None: those that the seed tells
    """

    spec: Mapping[str, Any]
    place: str
    rows: RowsOnDisk
    start: FirstWeights | None = None

    def __call__(self, line: Line) -> bool:
        """Train from the newest checkpoint on, until there is nothing left to do, which is True, or somebody asks to stop."""
        spec = load_spec(self.spec)
        with RunDirectory(self.place, spec).seen() as directory, joined(spec.cluster.use_gpu) as processes:
            assert isinstance(spec.fit, DeepConfig)
            with arranged(spec.fit.precision, processes.device, spec.fit.deterministic), self.rows.opened(line.alive) as rows:
                return _Process(spec, directory, self.rows.dataset, processes, line, self.start).train(rows)


def new_model(spec: Spec, dataset: Dataset, start: FirstWeights | None = None) -> Any:
    """With its first weights. UserError where the configuration does not fit the data, or those weights the configuration."""
    names = dataset.transforms.feature_names if dataset.transforms else dataset.schema.feature_names
    shape = None if dataset.transforms else dataset.schema.image_shape
    model = family_class(spec.family).create(spec.model, shape or (len(names),), dataset.labels, spec.seed)
    for name, network in model.networks().items() if start else ():
        try:
            load(network, (start or {})[name])
        except (KeyError, ValueError) as error:
            raise UserError(f"init: {name} is another network than that of this spec ({error})") from error
    return model


def weights_of(model: Any) -> FirstWeights:
    return {name: network.state_dict() for name, network in model.networks().items()}


@dataclass(frozen=True)
class _Process:
    """One of them."""

    spec: Spec
    directory: RunDirectory
    dataset: Dataset
    processes: Processes
    line: Line
    start: FirstWeights | None

    @property
    def config(self) -> DeepConfig:
        assert isinstance(self.spec.fit, DeepConfig)
        return self.spec.fit

    @property
    def is_first(self) -> bool:
        return self.processes.rank == 0

    def train(self, rows: Mapping[Any, Any]) -> bool:
        model: DeepModel = new_model(self.spec, self.dataset, self.start)
        _check_labels(model, [rows["training"]])
        if "validation" in rows:  # they are not learned from, but looked at
            _check_labels(model, [rows["training"], rows["validation"]])
        if self.config.early_stopping and not (
            self.config.eval_every and "validation" in rows and model.validation_objective is not None
        ):
            raise UserError(
                "fit.early_stopping: nothing is validated to stop by; it needs fit.eval_every, data.validation_fraction and a "
                f"family that says which of two is better, as vae does; leave it out of this {self.spec.family}"
            )
        self._check_sizes(model, rows["training"].num_rows)
        with _only_writer(self.directory) if self.is_first else nullcontext():
            resumed = self._newest()
            progress = resumed.progress if resumed else Progress()
            saved = progress.step if resumed else None
            if self.is_first:
                _cut_back(self.directory, progress.step)
            engine = make_engine(self.processes, self.config)
            engine.prepare(model.networks(), resumed.state if resumed else None)
            del resumed
            validation = _Heard(rows["validation"], self.line) if "validation" in rows else None
            reports = train(
                model,
                engine,
                _Heard(rows["training"], self.line),
                self.config,
                self.spec.seed,
                progress,
                validation,
                _Asked(self.directory.stop_sign()) if self.is_first else _nothing,
            )

            def written(name: str, kept: Kept) -> None:
                self.directory.checkpoint_written(name, kept)
                self.line.checkpoint()

            writer = CheckpointWriter(self.directory.checkpoints, self.config.keep_last, written) if self.is_first else None
            try:
                with writer or nullcontext(), closing(reports):
                    for report in reports:
                        if report.progress.step == saved:  # asked to stop where it has just saved, or begun
                            report = replace(report, is_checkpoint_due=False)
                        self._keep(report, model, engine, writer, rows.get("validation") or rows["training"])
                        if report.is_checkpoint_due:
                            progress, saved = report.progress, report.progress.step
                    return decide(progress, self.config) is not Decision.CONTINUE
            except NotFinite as error:
                kept = f"that of step {progress.step} in {self.directory.place}/checkpoints" if progress.step else "none yet"
                raise UserError(f"{error}; the last good checkpoint is {kept}") from error
            except StorageError as error:
                raise self.directory.explained(error) from error

    def _check_sizes(self, model: DeepModel, num_rows: int) -> None:
        """UserError where a run whose number of workers may change could not go on with one of them, hours from now."""
        given, config = self.spec.cluster.num_workers, self.config
        if isinstance(given, int):
            return
        for size in range(given[0], given[1] + 1):
            try:
                division = Division(config.global_batch_size, size, config.micro_batch_size)
                restrictions.check(model, 0, config, division, num_rows)
                engine_class(config).check(replace(self.processes, world_size=size), config)
            except UserError as error:
                raise UserError(
                    f"cluster.num_workers: {given[0]} to {given[1]}, of which {size} cannot train: {error}"
                ) from error

    def _newest(self) -> TrainingCheckpoint | None:
        """The newest checkpoint that is whole, the same one in all processes, whatever an earlier worker writes meanwhile. What
        this one cannot have of it is no mistake of the user's: the group starts anew."""
        found: TrainingCheckpoint | None = None

        def look() -> str | None:
            nonlocal found
            found = self.directory.newest(read)
            return name_of(found.progress.step) if found else None

        name = told_by_first(self.processes, look)
        if name is None or self.is_first:
            return found
        path = self.directory.fetch(name)
        try:
            return patiently(str(path), lambda: read(path))
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, UserError):
                raise
            raise OSError(f"{path}: {error}") from error

    def _keep(self, report: Report, model: DeepModel, engine: Engine, writer: CheckpointWriter | None, held_out: Any) -> None:
        """What is due after a step; every process takes part."""
        record = report.record
        if record and is_due(report.progress.step, self.config.eval_every, self.config):
            record = record | self._look_at_samples(report, model, engine, held_out, writer)
        if writer and record:
            writer.submit(lambda: self.directory.append_metrics([record], sync=report.is_checkpoint_due))
            self.line.record(record)
        if report.is_checkpoint_due:
            state = engine.state()
            if writer:
                assert state is not None
                writer.save(TrainingCheckpoint(report.progress, state))
        if writer:
            writer.check()

    def _look_at_samples(
        self, report: Report, model: DeepModel, engine: Engine, held_out: Any, writer: CheckpointWriter | None
    ) -> dict[str, Any]:
        """Samples of always the same noise, from the averaged networks, as a picture and, where no validation tells how good
        they are, beside rows that were held out, or of training where none were. What is found is returned, on rank 0."""
        step, networks = report.progress.step, list(model.networks().values())
        found: dict[str, Any] = {}
        with engine.averaged(), torch.no_grad():
            for network in networks:
                network.eval()
            if writer:
                pictured = transformed(model, self.dataset.transforms)
                picture = samples_picture(pictured, self.dataset.schema, f"{name_of(step)}.png", self.spec.seed)
                if picture is not None:
                    writer.submit(lambda: _keep_picture(self.directory, f"{SAMPLES}/{name_of(step)}.png", picture))
                if model.validation_objective is None:
                    try:
                        found = watch_samples(model, held_out, self.spec.seed, report.record, self.line.alive)
                    except Exception as error:  # training is not lost to a look at it
                        logger.warning("step %d: samples could not be held beside data (%s)", step, error)
            for network in networks:
                network.train()
        for line in found.get("warnings", ()):
            logger.warning("step %d: %s", step, line)
        return found


def _keep_picture(directory: RunDirectory, name: str, picture: bytes) -> None:
    def write() -> None:
        path = directory.path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(picture)

    patiently(str(directory.path / name), write)
    directory.bring(name)


def _check_labels(model: Any, parts: Sequence[RowSet]) -> None:
    """UserError where the family cannot be trained on rows with these labels, such as none of one class."""
    if hasattr(model, "check_labels") and (counts := [part.label_counts() for part in parts if part.evidence is not None]):
        model.check_labels(reduce(LabelCounts.merge, counts))


@dataclass(frozen=True)
class _Heard:
    """Rows that are taken in every step, which is how a process shows that it is alive."""

    rows: Any
    line: Line

    @property
    def num_rows(self) -> int:
        return self.rows.num_rows

    def take(self, indices: torch.Tensor) -> Any:
        self.line.alive()
        return self.rows.take(indices)

    def labelled(self) -> torch.Tensor:
        return self.rows.labelled()


@dataclass
class _Asked:
    """To stop, while there is a sign."""

    is_there: Callable[[], bool]
    _since: float | None = None

    def __call__(self) -> Asked:
        if not self.is_there():
            return Asked.NOTHING
        self._since = self._since or time.monotonic()
        return Asked.TO_STOP_NOW if time.monotonic() - self._since > RECORD_WITHIN_S else Asked.TO_STOP_AT_A_RECORD


def _nothing() -> Asked:
    return Asked.NOTHING


def make_engine(processes: Processes, config: DeepConfig) -> Engine:
    """The engine that `fit.engine` names, of one process."""
    return engine_class(config)(processes, config)


def engine_class(config: DeepConfig) -> Any:
    """The class of it, which knows what it costs."""
    if config.engine.kind == "deepspeed":
        try:
            from gendist.train.deepspeed_engine import DeepSpeedEngine
        except ImportError as error:
            raise UserError(
                f"fit.engine.kind: deepspeed cannot be imported ({error}); pip install 'gendist[deepspeed]', or take ddp"
            ) from error
        return DeepSpeedEngine
    from gendist.train.ddp_engine import DdpEngine

    return DdpEngine


def _cut_back(directory: RunDirectory, step: int) -> None:
    """Take away what an earlier process left behind the checkpoint that is gone on from: records, pictures, and checkpoints,
    which are those that could not be read."""
    directory.cut_metrics(step)
    for path in directory.checkpoints.glob("[0-9]*"):
        if int(path.name) > step:
            aside = path.with_name(f".{path.name}.unreadable")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
    for picture in (directory.path / SAMPLES).glob("[0-9]*.png"):
        if int(picture.stem) > step:
            picture.unlink()


@contextmanager
def _only_writer(directory: RunDirectory) -> Iterator[None]:
    """Be the one process that writes into the folder. Whoever started the run holds it, but a worker that was given up may
    still be about to end."""
    if directory.mirror:
        with directory.writing():
            yield
        return
    began = time.monotonic()
    with (directory.path / ".writer.lock").open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() - began > WRITER_TIMEOUT_S:
                    raise UserError(f"{directory.place}: an earlier worker of this run still writes there") from None
                time.sleep(0.1)
            except OSError:  # a file system without locks
                break
        yield
