"""`fit`: from a spec to a fitted model. Chooses the family, the data and the place of work, and keeps the run on disk."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gendist.artifact import load_artifact
from gendist.blocks import Blocks
from gendist.config import Spec, family_class, load_spec
from gendist.data import Dataset, Schema, open_source, source_of
from gendist.data.survey import Summary, survey
from gendist.em.config import STARTS
from gendist.em.convergence import Decision, decide
from gendist.em.engine import expectation_maximization, mean_log_likelihood
from gendist.em.start import start_from_data
from gendist.execution import execution
from gendist.machine import machine_type, versions
from gendist.one_thread import one_thread
from gendist.pictures import save_picture
from gendist.protocols import Block, GenerativeModel, StatisticsModel, Update, UserError
from gendist.run_directory import Checkpoint, RunDirectory

NUM_PICTURED = 100

logger = logging.getLogger("gendist")
Watch = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Run:
    """What a fit leaves.

    model    the fitted model
    history  the records of metrics.jsonl: one dict an iteration
    path     the run directory, or None where none was asked for
    results  the manifest's: why it stopped, the log-likelihood of the fitted model and what follows from it, and every repair
    """

    model: Any = field(repr=False)
    history: list[dict[str, Any]] = field(repr=False)
    path: Path | None
    results: dict[str, Any]


def fit(
    spec: str | Path | Mapping[str, Any] | Spec,
    *,
    data: Any = None,
    init: Any = None,
    run_dir: str | Path | None = None,
    address: str | None = None,
    watch: Watch | None = None,
) -> Run:
    """Fit the model that a spec describes.

    spec      a path to a YAML file, or a dict
    data      an array, a mapping of arrays, a DataFrame, an Arrow table or a datasets.Dataset, instead of the spec's
    init      a model to start from, or an estimator that the family's `from_sklearn` understands
    run_dir   where the run is kept, and resumed from where it is unfinished; None keeps nothing
    address   of a Ray cluster, for `cluster.num_workers` of 1 and more
    watch     called with each record as it is written

    UserError (a ValueError) where the spec, the data or the run directory do not allow it.
    """
    spec = load_spec(spec)
    family: type[StatisticsModel] = family_class(spec.family)
    directory = RunDirectory(Path(run_dir), spec) if run_dir is not None else None
    with directory or nullcontext():
        # The spec says nothing of what Python hands over, so that a finished run must look at it, too.
        if directory and directory.is_finished and data is None and init is None:
            return _finished(directory)
        start, start_features = _model_to_start_from(spec, family, init)
        source = source_of(data) if data is not None else open_source(spec.data)
        schema = Schema.of(source, spec.data)
        if start_features not in (None, schema.feature_names):
            there, here = ", ".join(start_features[:8]), ", ".join(schema.feature_names[:8])
            raise UserError(f"{spec.fit.init}: was fitted to other columns ({there}) than these ({here})")
        with execution(spec.cluster, address) as make_blocks:
            dataset = Dataset.open(source, spec.data, schema, make_blocks)
            return _Fitting(spec, family, dataset, start, directory, watch or (lambda record: None)).run()


@dataclass(frozen=True)
class _Fitting:
    """One fit by expectation-maximization: what to begin with, the iterations, and what is kept of them."""

    spec: Spec
    family: type[StatisticsModel]
    dataset: Dataset
    start: StatisticsModel | None
    directory: RunDirectory | None
    watch: Watch

    def run(self) -> Run:
        began = time.monotonic()
        spec, directory = self.spec, self.directory
        num_latents = self.family.count_latents(spec.model, self.dataset.labels)
        held_out = spec.data.validation_fraction > 0.0
        blocks = self.dataset.blocks(num_latents, "training" if held_out else "all", spec.seed)
        validation = self.dataset.blocks(num_latents, "validation", spec.seed) if held_out else None
        logger.info("reading %s: %d rows, %d features", self.dataset.source.name, self.dataset.source.num_rows,
                    self.dataset.schema.num_features)  # fmt: skip
        summary, held_out_summary = survey(blocks), survey(validation) if validation else None
        self._check(summary, held_out_summary)
        manifest = self._manifest(summary, held_out_summary)
        if directory and directory.is_finished:
            directory.check_same_data(manifest)
            return _finished(directory)
        if directory:
            manifest = directory.begin(manifest)
        state = self._begin(blocks, summary)
        try:
            for iteration in expectation_maximization(
                state.model, blocks, summary.total_weight, spec.fit, validation, state.history
            ):
                # One assignment, so that an interrupt finds model and history of the same iteration.
                state = Checkpoint(iteration.model, iteration.history, state.repairs_of_start)
                if directory:
                    directory.append_metrics(state.history[-1])
                    if len(state.history) % spec.fit.checkpoint_every == 0 or iteration.decision is not Decision.CONTINUE:
                        self._save(state)
                self.watch(state.history[-1])
        except KeyboardInterrupt:
            self._save(state)
            if directory:
                directory.write_metrics(state.history)  # the last line may be half-written
            raise
        results = self._results(state, blocks, validation, summary)
        if directory:
            self._draw(state.model, directory.path / "samples.png")
            manifest |= {"results": results, "wall_time_s": time.monotonic() - began}
            directory.finish(state, self.dataset.schema, manifest)
        return Run(state.model, list(state.history), directory.path if directory else None, results)

    def _draw(self, model: GenerativeModel, path: Path) -> None:
        try:
            save_picture(model.sample(NUM_PICTURED, seed=self.spec.seed), self.dataset.schema, path)
        except Exception as error:  # a fit of hours is not lost to a plot of odd numbers
            logger.warning("samples.png could not be drawn (%s)", error)

    def _check(self, summary: Summary, held_out: Summary | None) -> None:
        name, fraction = self.dataset.source.name, self.spec.data.validation_fraction
        for part, purpose in ((summary, "to fit"), (held_out, "to validate on")):
            if part is not None and part.num_rows == 0:
                raise UserError(
                    f"{name}: data.validation_fraction {fraction} of {self.dataset.source.num_rows} rows leaves none {purpose}"
                )
            if part is not None and part.total_weight <= 0.0:
                raise UserError(f"{name}: all {part.num_rows} rows {purpose} have weight 0")
        self.family.check(self.spec.model, summary, self.dataset.schema.feature_names)
        if self.start is not None:
            features, labels = self.dataset.schema.num_features, self.dataset.labels
            if self.start.num_features != features:
                raise UserError(f"the model to start from has {self.start.num_features} features, the data {features}")
            if labels and self.start.labels not in ((), labels):
                raise UserError(f"the model to start from has the labels {self.start.labels}, the data {labels}")

    def _begin(self, blocks: Blocks[Block], summary: Summary) -> Checkpoint[StatisticsModel]:
        """The model and records to go on from."""
        resumed = self.directory.resume() if self.directory else None
        if resumed is not None:
            logger.info("resuming after iteration %d", len(resumed.history))
            return resumed
        if self.start is not None:
            labels = self.dataset.labels or self.start.labels
            update = Update(self.family.from_tensors(self.start.config, self.start.tensors(), labels))
        else:
            logger.info("choosing where to start (%s)", self.spec.fit.init)
            update = start_from_data(
                self.family, self.spec.model, blocks, summary, self.dataset.labels, self.spec.fit.init, self.spec.seed
            )
        state = Checkpoint(update.model, (), update.repairs)
        self._save(state)
        return state

    def _save(self, state: Checkpoint[StatisticsModel]) -> None:
        if self.directory:
            self.directory.save_checkpoint(state, self.dataset.schema)

    def _manifest(self, summary: Summary, held_out: Summary | None) -> dict[str, Any]:
        data: dict[str, Any] = {"num_rows": summary.num_rows, "fingerprint": summary.fingerprint.hex()}
        if held_out is not None:
            data |= {"num_validation_rows": held_out.num_rows, "validation_fingerprint": held_out.fingerprint.hex()}
        if self.dataset.labels:
            data |= {"labels": list(self.dataset.labels)}
        return {
            "name": self.spec.name,
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "seed": self.spec.seed,
            "data": data,
            "init": _digest(self.start) if self.start is not None else self.spec.fit.init,
            "machine": machine_type(),
            "versions": versions(),
        }

    def _results(
        self,
        state: Checkpoint[StatisticsModel],
        blocks: Blocks[Block],
        validation: Blocks[Block] | None,
        summary: Summary,
    ) -> dict[str, Any]:
        """One pass more, with the final parameters: the records hold those that each iteration began with."""
        model, history = state.model, state.history
        log_likelihood = mean_log_likelihood(model, blocks)
        results: dict[str, Any] = {
            "stopped": decide(history, self.spec.fit).value,
            "num_iterations": len(history),
            "log_likelihood": log_likelihood,
            **({} if log_likelihood is None else model.criteria(log_likelihood * summary.total_weight, summary.total_weight)),
            "repairs": [*state.repairs_of_start, *(line for record in history for line in record["repairs"])],
            "iterations_that_fell": [record["iteration"] for record in history if record.get("fell")],
        }
        if validation is not None:
            results["validation_log_likelihood"] = mean_log_likelihood(model, validation)
        return results


def _model_to_start_from(
    spec: Spec, family: type[StatisticsModel], init: Any
) -> tuple[StatisticsModel | None, tuple[str, ...] | None]:
    """The given model or the artifact that `fit.init` names, or None where the data are to say; and the names of its
    features where they are known. UserError on a misfit."""
    features = None
    if init is None:
        if spec.fit.init in STARTS:
            return None, None
        if not Path(spec.fit.init).exists():
            raise UserError(f"fit.init '{spec.fit.init}': neither {' nor '.join(STARTS)}, nor an artifact that exists")
        artifact = load_artifact(spec.fit.init)
        init, features = artifact.model, artifact.schema.feature_names
    elif not isinstance(init, family) and hasattr(family, "from_sklearn"):
        if not hasattr(init, "get_params"):
            raise UserError(f"init: a {type(init).__name__}; give a {family.__name__} or a scikit-learn estimator")
        try:
            with one_thread():
                init = family.from_sklearn(init)
        except ValueError as error:
            raise UserError(f"init: {error}") from error
    if not isinstance(init, family):
        raise UserError(f"init: a {type(init).__name__}, but the spec is of family {spec.family}")
    if init.config != spec.model:
        given, wanted = init.config.model_dump(), spec.model.model_dump()
        different = ", ".join(f"{key} {given[key]} instead of {wanted[key]}" for key in given if given[key] != wanted[key])
        raise UserError(f"the model to start from does not fit the spec's model block: {different}")
    return init, features


def _finished(directory: RunDirectory) -> Run:
    logger.info("%s is finished; nothing to do", directory.path)
    results = directory.read_manifest().get("results", {})
    return Run(load_artifact(directory.path).model, directory.read_metrics(), directory.path, results)


def _digest(model: GenerativeModel) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.tensors().items()):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
