"""A fit by gradient: what is checked and written before the processes start, where they run, and what is kept at the end."""

from __future__ import annotations

import logging
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gendist.blocks import LocalBlocks
from gendist.config import Spec, model_class
from gendist.data import Dataset, Schema, as_rows, open_source, source_of
from gendist.data.dataset import Part
from gendist.data.rows import RowsOnDisk
from gendist.data.transforms import Transforms
from gendist.execution import check_gpu_here
from gendist.model_to_start_from import ModelToStartFrom
from gendist.pictures import draw_figures, draw_samples
from gendist.protocols import UserError
from gendist.rows_to_fit import manifest_of, parts_of, survey_parts
from gendist.run import Run, Watch
from gendist.run_directory import RunDirectory, finished, read_run
from gendist.secrets_in_urls import without_secrets
from gendist.started_by import is_by_torchrun
from gendist.storage.patience import PATIENCE_S, StorageError, patiently
from gendist.tracking import tracked
from gendist.train.checkpoints import TrainingCheckpoint, name_of, read
from gendist.train.config import DeepConfig
from gendist.train.state_entries import AVERAGE, PARAMETER, entry, load_networks, part
from gendist.training_job import TrainingJob, new_model, weights_of
from gendist.transformed import taken_apart, transformed

NO_RESULTS = ("seconds", "samples_per_s", "gradient_norm", "learning_rate")  # of the last record
INSIST_S = 2.0  # after a first Ctrl-C, another one ends the process at once; torchrun sends SIGTERM right behind it

logger = logging.getLogger("gendist")


def train(
    spec: Spec, family: type[Any], data: Any, init: Any, directory: RunDirectory | None, address: str | None, watch: Watch
) -> Run:
    """What `gendist.fit` does with a family of this kind."""
    from gendist.torchrun import train_in_all

    if is_by_torchrun():
        return train_in_all(spec, data, init, directory, address, watch)
    with kept(spec, directory) as inside:
        prepared = inside.prepare(data, init)
        if isinstance(prepared, Run):
            return prepared
        with tracked(directory, watch) as watch, held_back(inside.directory):
            has_ended = inside.run(prepared, address, watch)
            if not has_ended:
                raise KeyboardInterrupt
        return inside.finish()


@contextmanager
def kept(spec: Spec, directory: RunDirectory | None) -> Iterator[Training]:
    """A fit in its run directory; where none was asked for, in one that is gone at the end."""
    if directory is not None:
        with directory:
            try:
                yield Training(spec, directory, is_asked_for=True)
            finally:
                with suppress(UserError, OSError), directory.quickly():
                    directory.forget_to_stop()
        return
    with tempfile.TemporaryDirectory(prefix="gendist-") as folder, RunDirectory(Path(folder) / "run", spec) as nowhere:
        yield Training(spec, nowhere, is_asked_for=False)


@dataclass
class Training:
    """The part of a fit that one process does: the driver, or rank 0 of torchrun."""

    spec: Spec
    directory: RunDirectory
    is_asked_for: bool

    def __post_init__(self) -> None:
        self._began = time.monotonic()
        assert isinstance(self.spec.fit, DeepConfig)
        self.config = self.spec.fit

    def prepare(self, data: Any, init: Any = None) -> TrainingJob | Run:
        """Look at the data and begin the run directory; what every process is to do, or what a finished run has left.

        init  a model to start from, in place of `fit.init`

        UserError where the spec, the data or the run directory do not allow the fit; then nothing is begun.
        """
        spec, directory = self.spec, self.directory
        if directory.is_finished and data is None and init is None:
            return finished(directory)
        start = self._model_to_start_from(init)
        source = as_rows(source_of(data) if data is not None else open_source(spec.data), spec.data)
        schema = Schema.of(source, spec.data)
        if start:
            start.check_columns(schema)
        dataset = Dataset.open(source, spec.data, schema, LocalBlocks).decoding_once()
        if start:
            start.check_data(dataset.schema, dataset.labels)
        logger.info("reading %s: %d rows, %d features", source.name, source.num_rows, schema.num_features)
        num_labels = len(dataset.labels)
        training, validation = parts_of(spec, dataset, num_labels)
        summary, held_out = survey_parts(spec, dataset, training, validation)
        num_missing = summary.num_missing + (held_out.num_missing if held_out else 0)
        if int(num_missing.sum()):
            column = schema.feature_names[int(num_missing.argmax())]
            raise UserError(
                f"{source.name}: {int(num_missing.sum())} entries are missing, {int(num_missing.max())} of them in '{column}'; "
                f"the family {spec.family} takes none: leave out these columns (data.columns) or rows"
            )
        if start:
            dataset = replace(dataset, transforms=taken_apart(start.model)[1])
        elif spec.data.transforms:
            transforms = Transforms.fit(spec.data.transforms, schema.feature_names, training, summary)
            dataset = replace(dataset, transforms=transforms)
        del training, validation
        manifest = manifest_of(spec, dataset.labels, summary, held_out, start.digest() if start else "seed")
        directory.check_same_data(manifest)
        if directory.is_finished:
            return finished(directory)
        first = weights_of(taken_apart(start.model)[0]) if start else None
        new_model(spec, dataset, first)  # a configuration that does not fit the data is told before anything is written
        directory.forget_to_stop()
        self._dataset, self._manifest = dataset, directory.begin(manifest)
        fingerprints: dict[Part, bytes] = {"training": summary.fingerprint}
        if held_out is not None:
            fingerprints["validation"] = held_out.fingerprint
        rows = RowsOnDisk(dataset, num_labels, spec.seed, fingerprints)
        place = directory.place if directory.storage else directory.path.absolute()
        return TrainingJob(spec.model_dump(mode="json"), str(place), rows, first)

    def _model_to_start_from(self, init: Any) -> ModelToStartFrom | None:
        if init is None and self.config.init is None:
            return None
        start = ModelToStartFrom.of(init) if init is not None else ModelToStartFrom.of_artifact(str(self.config.init))
        start.check(self.spec, model_class(self.spec.family, self.spec.model))
        return start

    def run(self, job: TrainingJob, address: str | None, watch: Watch) -> bool:
        """Do the job in this process or on Ray; whether it came to its end. Where nothing was reached, no trace stays."""
        cluster = self.spec.cluster
        try:
            if cluster.num_workers == 0:
                if address is not None:
                    shown = without_secrets(address)
                    raise UserError(f"--address {shown}: cluster.num_workers is 0, which computes here; set it to 1 or more")
                if cluster.use_gpu:
                    check_gpu_here()
                return job(LocalLine(watch))
            from gendist.ray_cluster import ray_cluster
            from gendist.storage.ray_check import check_storage
            from gendist.train.ray_trainer import train_on_ray

            least = cluster.num_workers if isinstance(cluster.num_workers, int) else cluster.num_workers[0]
            with ray_cluster(least, address, 1 if cluster.use_gpu else 0):
                check_storage(job.place, cluster.use_gpu)
                return train_on_ray(
                    job,
                    cluster.num_workers,
                    self.directory.path,
                    use_gpu=cluster.use_gpu,
                    max_failures=self.config.max_failures,
                    watch=watch,
                )
        except UserError:
            self.undo()
            raise

    def undo(self) -> None:
        """Of a run that has come nowhere, as when the first step is refused, nothing stays, so that a spec that is put right
        may have its folder."""
        with suppress(UserError, OSError), self.directory.quickly():
            if not self.directory.has_checkpoints() and not self.directory.metrics_file.exists():
                self.directory.abandon()

    def finish(self) -> Run:
        """The artifact, of the best checkpoint where there are validations, else of the last one."""
        try:
            return self._finish()
        except StorageError as error:
            raise self.directory.explained(error) from error

    def _finish(self) -> Run:
        directory = self.directory
        last = directory.newest(read)
        assert last is not None, "training ends with a checkpoint"
        chosen = self._best(last)
        model = self._averaged_model(chosen)
        fitted = transformed(model, self._dataset.transforms)
        records = directory.read_metrics()
        if not records:
            raise UserError(
                f"{directory.metrics_file}: damaged (no record in it); restore it, or remove the run directory and fit again"
            )
        at_best = next((record for record in records if record["step"] == chosen.progress.step), records[-1])
        results = {
            "stopped": records[-1]["stopped"],
            "num_steps": last.progress.step,
            "artifact_step": chosen.progress.step,
            **{key: value for key, value in records[-1].items() if isinstance(value, float) and not key.endswith(NO_RESULTS)},
            **{key: value for key, value in at_best.items() if key.startswith("validation/")},
        }
        for remark in model.remarks(results) if hasattr(model, "remarks") else ():
            logger.warning("%s: %s", directory.place, remark)
        draw_samples(fitted, self._dataset.schema, directory.path / "samples.png", self.spec.seed)
        draw_figures(fitted, self._dataset.schema, directory.path, self.spec.seed)
        self._manifest |= {"results": results, "wall_time_s": time.monotonic() - self._began}
        directory.finish(fitted, records, self._dataset.schema, self._manifest)
        run = read_run(directory)
        return run if self.is_asked_for else replace(run, path=None)

    def _best(self, last: TrainingCheckpoint) -> TrainingCheckpoint:
        """The checkpoint of the best validation; the last one where there was none, or the disk has lost it."""
        best_step = last.progress.best_step
        if best_step is None or best_step == last.progress.step:
            return last
        try:
            path = self.directory.fetch(name_of(best_step))
            return patiently(str(path), lambda: read(path))
        except StorageError:
            raise
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("the checkpoint of the best validation cannot be read, and the last one is taken (%s)", error)
            return last

    def _averaged_model(self, checkpoint: TrainingCheckpoint) -> Any:
        """The model with the moving average of the parameters, where there is one, else with the parameters."""
        model = new_model(self.spec, self._dataset)
        state = dict(checkpoint.state)
        for network in model.networks():
            for name, average in part(state, network, AVERAGE).items():
                state[entry(network, PARAMETER, name)] = average
        load_networks(model.networks(), state)
        return model


@dataclass(frozen=True)
class LocalLine:
    """What a process says where it was started by nobody else."""

    watch: Watch

    def record(self, record: Mapping[str, Any]) -> None:
        self.watch(dict(record))

    def checkpoint(self) -> None:
        pass

    def alive(self) -> None:
        pass


@contextmanager
def held_back(directory: RunDirectory) -> Iterator[None]:
    """Ctrl-C and SIGTERM ask the processes of the run in this directory to leave a checkpoint and stop, at the next record or
    in a few seconds. Asked again, after a while, this process ends at once."""
    asked_at: list[float] = []
    asking: list[threading.Thread] = []

    def put_up_sign() -> None:
        try:
            directory.ask_to_stop()
        except (OSError, UserError) as error:
            logger.warning("the run cannot be asked to stop (%s); another Ctrl-C ends at once", error)

    def ask(number: int, frame: Any) -> None:
        if asked_at and time.monotonic() - asked_at[0] > INSIST_S:
            raise KeyboardInterrupt
        if not asked_at:
            logger.info("stopping at the next record, or in a few seconds; another Ctrl-C, in a while, ends at once")
        asked_at.append(time.monotonic())
        # A store takes its time, which a handler of signals has not.
        asking.append(threading.Thread(target=put_up_sign, name="ask-to-stop", daemon=True))
        asking[-1].start()

    signals = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, ask) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for thread in asking:
            thread.join(PATIENCE_S)  # so that the sign is not set up when it has been taken down
