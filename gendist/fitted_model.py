"""A fitted model that knows what the columns of its data are called: what `gendist.load` returns, and a run has.

Legend: N rows, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any

import pyarrow as pa
from torch import Tensor

from gendist.artifact import Artifact, load_artifact, save
from gendist.atomic import new_folder
from gendist.data.named_rows import has_names, rows_by_name
from gendist.data.schema import Schema
from gendist.protocols import UserError, as_tensor
from gendist.storage import path_here
from gendist.transformed import taken_apart

# Those whose first arguments are rows or sequences, as the data hold them.
VERBS_OF_ROWS = (
    "active_units",
    "check_rows",
    "classify",
    "cluster",
    "draw_latents",
    "elbo",
    "encode",
    "filtered_probs",
    "forecast",
    "forecast_states",
    "impute",
    "interpolate",
    "joint_log_prob",
    "log_prob",
    "log_prob_bound",
    "most_likely_states",
    "reconstruct",
    "sample_posterior_states",
    "traverse",
)


class FittedModel:
    """A `GenerativeModel` with all that the one within has, whose verbs take rows by the names of their columns, too.

    artifact  what it is on disk: the family, the model, the schema of its rows
    """

    def __init__(self, artifact: Artifact) -> None:
        self.artifact = artifact

    @property
    def plain(self) -> Any:
        """The model within, of arrays alone: one of the family, or a `Transformed`."""
        return self.artifact.model

    @property
    def schema(self) -> Schema:
        return self.artifact.schema

    @property
    def column_names(self) -> tuple[str, ...]:
        """The columns of a table that the verbs take; (x,) where the data had no names."""
        return self.schema.columns

    @property
    def feature_names(self) -> tuple[str, ...]:
        """(D,) of the columns of x: a column of lists has one for each entry."""
        return self.schema.feature_names

    @property
    def categories(self) -> Mapping[str, tuple[str, ...]]:
        """Of each column of text the values whose indices x has."""
        return dict(self.schema.categories)

    @property
    def kinds(self) -> Mapping[str, str]:
        """Of what distribution each column is, where the family has columns of several kinds; behind transforms of those that
        they make."""
        within, transforms = taken_apart(self.plain)
        return dict(zip(transforms.feature_names if transforms else self.feature_names, within.kinds, strict=True))

    def sample_table(
        self, num_samples: int, *, seed: int = 0, offset: int = 0, given: Any = None, length: int | None = None
    ) -> pa.Table:
        """The table that `gendist sample` writes: a column for each feature, with texts and labels as they are called; of
        sequences a row for each step. The arguments are those of `sample`."""
        from gendist.bulk import sample_table  # only what is needed is imported

        return sample_table(self.plain, self.schema, num_samples, seed=seed, offset=offset, given=given, length=length)

    def table(self, x_ND: Any) -> pa.Table:
        """Rows as the verbs take and make them, such as what `impute` returns, with a column for each feature and texts as they
        are called; what is none of these texts is missing."""
        from gendist.bulk.parts import Layout

        x = as_tensor(self.rows(x_ND))
        if x.ndim != 2 or x.shape[1] != self.num_features:
            raise UserError(f"x has shape {tuple(x.shape)}; (N, {self.num_features}) is needed")
        return Layout(self.feature_names, array="x", categories=self.categories).table(x.numpy(), 0)

    def save(self, path: str | Path) -> None:
        """Write an artifact: a folder that `gendist.load` and the command line take. UserError where something stands there."""
        folder = path_here(path, "save")
        if folder.exists():
            raise UserError(f"{path}: stands there already; choose another folder")
        with new_folder(folder) as inside:
            save(self.artifact, inside)

    def rows(self, x: Any) -> Any:
        """x as the model within takes it: rows with names by these, all else as it is."""
        return rows_by_name(x, self.schema) if has_names(x) else x

    # What the model within has

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        """Of the model within, so that isinstance tells the family."""
        return type(self.artifact.model)

    @property
    def Config(self) -> Any:
        return self.plain.Config

    @property
    def not_offered(self) -> Mapping[str, str]:
        return self.plain.not_offered

    @property
    def config(self) -> Any:
        return self.plain.config

    @property
    def labels(self) -> tuple[Any, ...]:
        return self.plain.labels

    @property
    def num_features(self) -> int:
        """D."""
        return self.plain.num_features

    def tensors(self) -> dict[str, Tensor]:
        return self.plain.tensors()

    def from_tensors(self, config: Any, tensors: Mapping[str, Tensor], labels: tuple[Any, ...]) -> Any:
        return self.plain.from_tensors(config, tensors, labels)

    def sample(self, num_samples: int, **options: Any) -> Any:
        return self.plain.sample(num_samples, **options)

    def __getattr__(self, name: str) -> Any:
        if "artifact" not in self.__dict__:  # as where it is being copied
            raise AttributeError(name)
        value = getattr(self.artifact.model, name)
        if name in VERBS_OF_ROWS:
            return self._by_name(value)
        if name == "with_prior":
            return self._with_prior
        return value

    def _by_name(self, verb: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(verb)
        def of_rows(*arguments: Any, **options: Any) -> Any:
            named = {name: self.rows(value) for name, value in options.items()}
            return verb(*map(self.rows, arguments), **named)

        return of_rows

    def _with_prior(self, prior: Any) -> Any:
        """Where the prior has an artifact, the result keeps it."""
        if type(prior) is not FittedModel:
            return self.plain.with_prior(prior)
        return FittedModel(replace(self.artifact, model=self.plain.with_prior(prior.plain), prior=prior.artifact))

    def __dir__(self) -> list[str]:
        return sorted({*dir(FittedModel), *dir(self.plain)})

    def __repr__(self) -> str:
        return repr(self.plain)

    def __reduce__(self) -> tuple[Any, ...]:
        return FittedModel, (self.artifact,)


def load(path: str | Path) -> Any:
    """The model in a run directory or an artifact, of whatever family. UserError where there is none that can be read.

    It is a `FittedModel`: its verbs take arrays, and tables by the names of their columns. Behind `data.transforms` it takes
    and makes rows as the data have them, and `.model` is the one within.
    """
    return FittedModel(load_artifact(path))
