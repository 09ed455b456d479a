"""The model that a fit sets out from, where one is given or `fit.init` names one, and whether it is of these data."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gendist.artifact import load_artifact
from gendist.config import Spec
from gendist.data import Schema
from gendist.fitted_model import FittedModel
from gendist.protocols import GenerativeModel, UserError
from gendist.storage import is_url
from gendist.transformed import taken_apart


@dataclass(frozen=True)
class ModelToStartFrom:
    """
    model   behind its transforms
    names   of the features that it was fitted to; empty where they are not known
    schema  of the rows that it was fitted to; None where it is not known, or need not be that of the data
    name    of the artifact
    """

    model: GenerativeModel
    schema: Schema | None = None
    name: str = "init"
    names: tuple[str, ...] = ()

    @classmethod
    def of(cls, init: Any) -> ModelToStartFrom:
        """A model in memory. Its columns may be called otherwise, as those of arrays are; its categories are of these texts."""
        if type(init) is not FittedModel:
            return cls(init)
        return cls(init.plain, init.schema if init.schema.categories else None, names=init.feature_names)

    @classmethod
    def of_artifact(cls, name: str, else_allowed: str = "") -> ModelToStartFrom:
        """UserError where there is none, which may be one of the words of `fit.init` that are else allowed."""
        if not is_url(name) and not Path(name).exists():
            raise UserError(f"fit.init '{name}': {else_allowed}no artifact that exists")
        artifact = load_artifact(name)
        return cls(artifact.model, artifact.schema, name)

    def check(self, spec: Spec, family: type[Any]) -> None:
        """UserError on another family, or other transforms: a model means nothing behind others."""
        model, transforms = taken_apart(self.model)
        if not isinstance(model, family):
            kind = type(model).__name__
            raise UserError(
                f"init: a {kind}; a spec of family {spec.family} like this one makes a {family.__name__}: give such"
            )
        declared = transforms.declared if transforms else ()
        if declared != spec.data.transforms:
            there, here = ([step.model_dump() for step in steps] for steps in (declared, spec.data.transforms))
            raise UserError(
                f"the model to start from was fitted behind other transforms ({there}) than data.transforms ({here}); declare "
                "the same"
            )

    def check_columns(self, schema: Schema) -> None:
        """UserError where it was fitted to others than the data have, or to the same in another order."""
        names = self.schema.feature_names if self.schema is not None else self.names
        is_same_set = set(names) == set(schema.feature_names)
        if names != schema.feature_names and (self.schema is not None or is_same_set):
            there, here = (", ".join(of[:8]) for of in (names, schema.feature_names))
            raise UserError(f"{self.name}: was fitted to other columns ({there}) than these ({here})")

    def check_data(self, schema: Schema, labels: tuple[Any, ...]) -> None:
        """UserError where the model is of other data."""
        if self.schema is None and schema.categories:
            raise UserError(
                "init: a model of arrays does not say which texts its categories are (column "
                f"'{next(iter(schema.categories))}'); name its run or artifact in fit.init instead"
            )
        if self.model.num_features != schema.num_features:
            raise UserError(f"the model to start from has {self.model.num_features} features, the data {schema.num_features}")
        if labels and self.model.labels not in ((), labels):
            raise UserError(f"the model to start from has the labels {self.model.labels}, the data {labels}")

    def digest(self) -> str:
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.tensors().items()):
            digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()
