"""A fit by expectation-maximization: what to begin with, the iterations, and what is kept of them."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

from gendist.artifact import Artifact
from gendist.blocks import Blocks
from gendist.class_conditional import ClassConditional
from gendist.config import Spec
from gendist.data import Dataset, Schema, as_rows, as_sequences, open_source, source_of
from gendist.data.schema import Takes
from gendist.data.survey import Summary, survey
from gendist.data.transforms import Transforms
from gendist.em.config import STARTS, WITHOUT_DISTANCES, EMConfig
from gendist.em.convergence import Decision
from gendist.em.engine import expectation_maximization, mean_log_likelihood
from gendist.em.restarts import Candidate, all_records, latest_records, leader, restart_seed
from gendist.em.start import start_from_data
from gendist.em_checkpoints import Checkpoint, resume, save_checkpoint
from gendist.execution import execution
from gendist.fitted_model import FittedModel
from gendist.model_to_start_from import ModelToStartFrom
from gendist.one_thread import one_thread
from gendist.pictures import draw_figures, draw_samples
from gendist.protocols import Block, Compute, Feature, GenerativeModel, StatisticsModel, Update, UserError
from gendist.rows_to_fit import manifest_of, parts_of, survey_parts
from gendist.run import Run, Watch
from gendist.run_directory import RunDirectory, finished
from gendist.storage.patience import StorageError
from gendist.tracking import tracked
from gendist.transformed import taken_apart, transformed

logger = logging.getLogger("gendist")
Candidates = tuple[Candidate[StatisticsModel], ...]


def estimate(
    spec: Spec,
    family: type[StatisticsModel],
    data: Any,
    init: Any,
    directory: RunDirectory | None,
    address: str | None,
    watch: Watch,
) -> Run:
    """What `gendist.fit` does with a family of this kind."""
    with directory or nullcontext():
        # The spec says nothing of what Python hands over, so that a finished run must look at it, too.
        if directory and directory.is_finished and data is None and init is None:
            return finished(directory)
        assert isinstance(spec.fit, EMConfig)
        if spec.fit.unlabelled_weight != 1.0 and spec.data.label is None:
            raise UserError(
                f"fit.unlabelled_weight is {spec.fit.unlabelled_weight:g}, but no row has a label; name their column with "
                "data.label, or leave it out"
            )
        of_steps = getattr(family, "takes_sequences", False) and not issubclass(family, ClassConditional)
        if spec.fit.unlabelled_weight != 1.0 and of_steps:
            raise UserError(
                f"fit.unlabelled_weight is {spec.fit.unlabelled_weight:g}, but all steps of a sequence weigh the same; leave "
                "it out, or let labels be those of whole sequences (model.labels: classes)"
            )
        start = _model_to_start_from(spec, spec.fit, family, init)
        opened = source_of(data) if data is not None else open_source(spec.data)
        source = (as_sequences if getattr(family, "takes_sequences", False) else as_rows)(opened, spec.data)
        schema = Schema.of(source, spec.data, Takes.of(family), start.schema if start else None)
        if start:
            start.check_columns(schema)
        with execution(spec.cluster, address) as make_blocks, tracked(directory, watch) as watch:
            cuts_sequences = getattr(family, "cuts_sequences", True)
            dataset = Dataset.open(source, spec.data, schema, make_blocks, cuts_sequences)
            try:
                return EMFitting(spec, spec.fit, family, dataset, start, directory, watch).run()
            except StorageError as error:
                raise (directory.explained(error) if directory else error) from error


@dataclass(frozen=True)
class EMFitting:
    """One fit.

    start  None: the data say where to begin

    A model stands behind the transforms everywhere but in the engine.
    """

    spec: Spec
    config: EMConfig
    family: type[StatisticsModel]
    dataset: Dataset
    start: ModelToStartFrom | None
    directory: RunDirectory | None
    watch: Watch

    @property
    def compute(self) -> Compute:
        return Compute(self.config.precision, "cuda" if self.spec.cluster.use_gpu else "cpu")

    def run(self) -> Run:
        began = time.monotonic()
        spec, directory, dataset = self.spec, self.directory, self.dataset
        training, validation = self._parts(dataset)
        logger.info("reading %s: %d rows, %d features", dataset.source.name, dataset.source.num_rows,
                    dataset.schema.num_features)  # fmt: skip
        summary, held_out_summary = survey_parts(spec, dataset, training, validation)
        if self.start:
            self.start.check_data(dataset.schema, dataset.labels)
        init = self.start.digest() if self.start else self.config.init
        manifest = manifest_of(spec, dataset.labels, summary, held_out_summary, init)
        if directory:
            directory.check_same_data(manifest)
            if directory.is_finished:
                return finished(directory)
        resumed = resume(directory) if directory else None
        if resumed:
            logger.info("resuming after iteration %d", resumed.iteration)
        transforms = self._transforms(resumed, training, summary)
        log_abs_det = {"training": 0.0, "validation": 0.0}
        if transforms.steps:
            log_abs_det["training"] = transforms.mean_log_abs_det(training)
            if validation:
                log_abs_det["validation"] = transforms.mean_log_abs_det(validation)
            del training, validation  # so that the rows are not held twice: as they are and transformed
            training, validation = self._parts(replace(dataset, transforms=transforms))
            summary = survey(training)
        summary = replace(summary, features=self._features(transforms))
        self.family.check(spec.model, summary, dataset.labels)
        found = self.family.find_kinds(spec.model, summary) if hasattr(self.family, "find_kinds") else None
        if found:
            logger.info("%s", found)
            for remark in found.remarks:
                logger.warning("%s: %s", dataset.source.name, remark)
        # Before anything is written: a mistake that the start tells can be put right in the same folder.
        candidates = _candidates(resumed) if resumed else self._begin(training, summary)
        if directory:
            manifest = directory.begin(manifest)
            if not resumed:
                self._save(candidates, transforms)
        iterations = expectation_maximization(candidates, training, summary.total_weight, self.config, validation, self.compute)
        try:
            # Models and records of an iteration come as one value, so that an interrupt finds them together.
            for candidates in iterations:
                records = latest_records(candidates)
                if directory:
                    directory.append_metrics(records)
                    stopped = all(candidate.decision is not Decision.CONTINUE for candidate in candidates)
                    if stopped or records[-1]["iteration"] % self.config.checkpoint_every == 0:
                        self._save(candidates, transforms)
                for record in records:
                    self.watch(record)
        except KeyboardInterrupt:
            if directory:
                directory.write_metrics(all_records(candidates))  # the last line may be half-written
            self._save(candidates, transforms)
            raise
        results = self._results(candidates, training, validation, summary, log_abs_det)
        if transforms.steps:
            results["log_abs_det"] = log_abs_det["training"]
        if found:
            results["description"] = [str(found), *found.remarks, *results.get("description", ())]
        best = candidates[results["restart"]]
        model = transformed(best.model, transforms)
        if directory:
            draw_samples(model, dataset.schema, directory.path / "samples.png", spec.seed)
            draw_figures(model, dataset.schema, directory.path, spec.seed)
            manifest |= {"results": results, "wall_time_s": time.monotonic() - began}
            directory.finish(model, all_records(candidates), self.dataset.schema, manifest)
        fitted = FittedModel(Artifact(spec.family, model, dataset.schema))
        return Run(fitted, list(best.history), directory.place if directory else None, results)

    def _parts(self, dataset: Dataset) -> tuple[Blocks[Block], Blocks[Block] | None]:
        num_latents = self.family.count_latents(self.spec.model, dataset.labels)
        return parts_of(self.spec, dataset, num_latents, self.config.unlabelled_weight)

    def _transforms(self, resumed: Checkpoint[Any] | None, blocks: Blocks[Block], summary: Summary) -> Transforms:
        """Those that the model to go on from stands behind, since it means nothing behind others; else fitted now."""
        names = self.dataset.schema.feature_names
        model = resumed.models[0] if resumed else self.start and self.start.model
        if model is None:
            return Transforms.fit(self.spec.data.transforms, names, blocks, summary)
        transforms = taken_apart(model)[1]
        return Transforms(names) if transforms is None else replace(transforms, source_names=names)

    def _features(self, transforms: Transforms) -> tuple[Feature, ...]:
        """What x holds behind the transforms: numbers, where they do not leave a feature as it was."""
        own, left = {feature.name: feature for feature in self.dataset.schema.features}, transforms.left_names
        return tuple(
            own[name] if name in left else Feature(name, own[name].column if name in own else name)
            for name in transforms.feature_names
        )

    def _adopted(self, summary: Summary) -> StatisticsModel:
        """The given model, estimated from here on as the spec says."""
        assert self.start
        model = taken_apart(self.start.model)[0]
        return self.family.adopt(self.spec.model, summary, model, self.dataset.labels or model.labels)

    def _begin(self, blocks: Blocks[Block], summary: Summary) -> Candidates:
        """The models to set out from."""
        updates = [self._first_parameters(i, blocks, summary) for i in range(self.config.num_restarts)]
        return tuple(Candidate(update.model, (), update.repairs) for update in updates)

    def _first_parameters(self, restart: int, blocks: Blocks[Block], summary: Summary) -> Update[StatisticsModel]:
        if self.start is not None:
            return Update(self._adopted(summary))
        fit = self.config
        labels, method = self.dataset.labels, fit.init
        if method == "auto":
            method = self.family.default_start(self.spec.model, labels)
        schema = self.dataset.schema
        if schema.is_sparse and method not in WITHOUT_DISTANCES:
            raise UserError(
                f"fit.init: {method}: column '{schema.columns[0]}' makes sparse rows, among which no centers are looked for; "
                f"allowed are {', '.join(WITHOUT_DISTANCES)}, or a model to start from"
            )
        logger.info("choosing where to start (%s, %d of %d)", method, restart + 1, fit.num_restarts)
        seed = restart_seed(self.spec.seed, restart)
        if issubclass(self.family, ClassConditional):
            return self.family.start_from_data(self.spec.model, blocks, summary, labels, method, seed)
        return start_from_data(self.family, self.spec.model, blocks, summary, labels, method, seed)

    def _save(self, candidates: Candidates, transforms: Transforms) -> None:
        if self.directory:
            models = tuple(transformed(candidate.model, transforms) for candidate in candidates)
            repairs = tuple(candidate.repairs_of_start for candidate in candidates)
            save_checkpoint(self.directory, Checkpoint(models, tuple(all_records(candidates)), repairs), self.dataset.schema)

    def _results(
        self,
        candidates: Candidates,
        training: Blocks[Block],
        validation: Blocks[Block] | None,
        summary: Summary,
        log_abs_det: Mapping[str, float],
    ) -> dict[str, Any]:
        """Of the best restart, by one pass more with its final parameters: the records hold those that each iteration
        began with; and how all restarts ended.

        Log-likelihoods are those of the rows as the data have them: log_abs_det, the transforms' mean a row, is what the
        records, which are of the transformed rows, lack.
        """
        restart = leader(candidates)
        model, history = candidates[restart].model, candidates[restart].history
        # Where all was counted, the start had counted it, too, unless it was given: the last record is of these parameters.
        # Not so of sequences, whose start does not count transitions.
        start_counts = self.start is None and not getattr(self.family, "takes_sequences", False)
        counted = history[-1] if candidates[restart].decision is Decision.COUNTED and start_counts else None
        mean = counted["log_likelihood"] if counted else mean_log_likelihood(model, training, self.compute)
        log_likelihood = _shifted(mean, log_abs_det["training"])
        results: dict[str, Any] = {
            "stopped": candidates[restart].decision.value,
            "num_iterations": len(history),
            "log_likelihood": log_likelihood,
            **({} if log_likelihood is None else model.criteria(log_likelihood * summary.total_weight, summary.total_weight)),
            "repairs": [*candidates[restart].repairs_of_start, *(line for record in history for line in record["repairs"])],
            "iterations_that_fell": [record["iteration"] for record in history if record.get("fell")],
        }
        if validation is not None:
            validated = (
                counted["validation_log_likelihood"] if counted else mean_log_likelihood(model, validation, self.compute)
            )
            results["validation_log_likelihood"] = _shifted(validated, log_abs_det["validation"])
        ends = [
            {
                "seed": restart_seed(self.spec.seed, i),
                "log_likelihood": candidate.history[-1]["log_likelihood"],
                "num_iterations": len(candidate.history),
                "stopped": candidate.decision.value,
            }
            for i, candidate in enumerate(candidates)
        ]
        if described := getattr(model, "described", None):
            results["description"] = described(self.dataset.schema.categories)
        return results | {"restart": restart, "restarts": ends}


def _candidates(resumed: Checkpoint[GenerativeModel]) -> Candidates:
    """What an interrupted run had come to."""
    return tuple(
        Candidate(taken_apart(model)[0], tuple(record for record in resumed.records if record["restart"] == i), repairs)
        for i, (model, repairs) in enumerate(zip(resumed.models, resumed.repairs_of_start, strict=True))
    )


def _shifted(log_likelihood: float | None, log_abs_det: float) -> float | None:
    return None if log_likelihood is None else log_likelihood + log_abs_det


def _model_to_start_from(spec: Spec, config: EMConfig, family: type[StatisticsModel], init: Any) -> ModelToStartFrom | None:
    """The given model or estimator, or the artifact that `fit.init` names; None where the data are to say. UserError on a
    misfit."""
    if init is None and config.init in STARTS:
        return None
    start = ModelToStartFrom.of(init)
    if init is None:
        start = ModelToStartFrom.of_artifact(config.init, f"none of {', '.join(STARTS)}, and ")
    if config.num_restarts > 1:
        raise UserError(
            f"fit.num_restarts is {config.num_restarts}, but every restart would begin with the one model that is given; "
            f"leave it at 1, or start from the data with fit.init: {', '.join(STARTS)}"
        )
    model = taken_apart(start.model)[0]
    if start.schema is None and not isinstance(model, family) and hasattr(family, "from_estimator"):
        if not hasattr(model, "get_params"):
            raise UserError(f"init: a {type(model).__name__}; give a {family.__name__} or an estimator of scikit-learn's kind")
        try:
            with one_thread():
                start = ModelToStartFrom(family.from_estimator(model))
        except ValueError as error:
            raise UserError(f"init: {error}") from error
    start.check(spec, family)
    return start
