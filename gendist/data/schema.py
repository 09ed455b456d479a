"""What the columns of a source mean: which make x, what the features are called, whether they are the pixels of an image."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from difflib import get_close_matches
from math import prod
from typing import Self

from pydantic import BaseModel, ConfigDict, model_validator

from gendist.data.matrix import entry_shape, is_image, is_numeric
from gendist.data.sources import DataConfig, Source
from gendist.protocols import Feature, UserError


class Schema(BaseModel):
    """What makes a row of x; kept in the artifact, so that `score` reads the same columns and `sample` names them.

    columns        columns of the source, in order; a column may hold a list or an image
    feature_names  one a feature
    image_shape    (height, width[, channels]) where x is the pixels of one image
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    columns: tuple[str, ...]
    feature_names: tuple[str, ...]
    image_shape: tuple[int, ...] | None = None

    @model_validator(mode="after")
    def _image_has_the_features(self) -> Self:
        if self.image_shape is not None and prod(self.image_shape) != self.num_features:
            raise ValueError(f"an image of shape {self.image_shape} does not have {self.num_features} pixels")
        return self

    @property
    def num_features(self) -> int:
        return len(self.feature_names)

    @property
    def features(self) -> tuple[Feature, ...]:
        """What each column of x is."""
        return tuple(Feature(name, name) for name in self.feature_names)

    @classmethod
    def of(cls, source: Source, config: DataConfig) -> Schema:
        """The schema that the source's columns, its first row and the `data:` block make."""
        if source.num_rows == 0:
            raise UserError(f"{source.name}: the data set is empty")
        for what, given in (("columns", source.schema.names), ("data.columns", list(config.columns or ()))):
            twice = [name for name, count in Counter(given).items() if count > 1]
            if twice:
                raise UserError(f"{source.name}: {what} with the same name: {_listing(twice)}; each may stand there once")
        for name in (config.label, config.weight, *(config.columns or ())):
            if name is not None:
                _require_column(source, name)
        columns = config.columns or _default_columns(source, config)
        first_row = source.read(0, 1, columns)
        names: list[str] = []
        shapes = [entry_shape(first_row, name, source.name) for name in columns]
        for name, shape in zip(columns, shapes, strict=True):
            names += [name] if shape == () else [f"{name}_{i}" for i in range(prod(shape))]
        twice = [name for name, count in Counter(names).items() if count > 1]
        if twice:
            raise UserError(f"{source.name}: two features would be called {_listing(twice)}; rename a column")
        if not names:
            raise UserError(f"{source.name}: column '{columns[0]}' holds empty lists; there is nothing to fit")
        image_shape = None
        if len(columns) == 1:
            image_shape = source.image_shape if not is_image(source.schema.field(columns[0]).type) else shapes[0]
            if image_shape is not None and prod(image_shape) != len(names):
                image_shape = None
        return cls(columns=tuple(columns), feature_names=tuple(names), image_shape=image_shape)


def _require_column(source: Source, name: str) -> None:
    if name not in source.schema.names:
        near = get_close_matches(name, source.schema.names, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"there are {_listing(source.schema.names)}"
        raise UserError(f"{source.name}: no column '{name}'; {hint}")


def _default_columns(source: Source, config: DataConfig) -> tuple[str, ...]:
    """Every column but label and weight; the image column alone where there is one."""
    names = [name for name in source.schema.names if name not in (config.label, config.weight)]
    images = [name for name in names if is_image(source.schema.field(name).type)]
    if source.image_shape is not None:
        images = names[:1]
    if len(images) == 1:
        return (images[0],)
    if not names:
        raise UserError(f"{source.name}: no column is left to fit")
    numeric = [name for name in names if is_numeric(source.schema.field(name).type)]
    for name in names:
        if name not in numeric:
            kind = source.schema.field(name).type
            hint = f"such as data.columns=[{','.join(numeric[:12])}]" if numeric else "but none is"
            raise UserError(f"{source.name}: column '{name}' is not numeric ({kind}); choose columns that are, {hint}")
    return tuple(names)


def _listing(names: Sequence[str], most: int = 12) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
