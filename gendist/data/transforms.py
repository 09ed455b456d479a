"""Transforms of the columns that a spec declares: fitted over blocks, kept in the artifact, applied both ways.

    transforms: [log1p, standardize, {whiten: {regularization: 1.0e-6}}, {pca: {num_components: 50, whiten: false}}]

A step of the list is a declaration until it is fitted, and then `Coordinates`. Each is fitted to what the steps before it
make of the rows.

Legend: N rows, D features before the transforms, E after them.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, Any, ClassVar

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_serializer, model_validator
from torch import Tensor

from gendist.blocks import Blocks, reduce
from gendist.data.coordinates import Coordinates, LogPlusOne, Names, PrincipalAxes, Standard, StandardOfSome, Whitened
from gendist.data.principal_axes import Spread
from gendist.data.survey import Summary, summarize
from gendist.one_thread import one_thread
from gendist.protocols import Block, UserError, as_tensor

ENTRIES_AT_ONCE = 1 << 15  # of rows that are transformed back: they stay in cache while direction after direction is added
EPS = torch.finfo(torch.float64).eps

logger = logging.getLogger("gendist")


class RowError(UserError):
    """A row that cannot be transformed: its position among those given, and the reason."""

    def __init__(self, row: int, reason: str):
        super().__init__(row, reason)
        self.row, self.reason = row, reason

    def __str__(self) -> str:
        return f"row {self.row}: {self.reason}"


# Declared


class _Declaration(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


Columns = Annotated[tuple[str, ...], Field(min_length=1)] | None


class Log1p(_Declaration):
    """columns: the features that are replaced by log(1 + x); all where left out."""

    columns: Columns = None

    coordinates: ClassVar[type[Coordinates]] = LogPlusOne

    def fit(self, rows: RowsSoFar) -> Coordinates:
        return LogPlusOne(_chosen("log1p", self.columns, rows.feature_names))


class Standardize(_Declaration):
    """Mean 0 and variance 1 (biased, as scikit-learn's StandardScaler); a constant column is only centred.

    columns: the features of which this is done; all where left out
    """

    columns: Columns = None

    @model_serializer
    def _as_written(self) -> dict[str, Any]:
        return {} if self.columns is None else {"columns": list(self.columns)}

    @property
    def coordinates(self) -> type[Coordinates]:
        return Standard if self.columns is None else StandardOfSome

    def fit(self, rows: RowsSoFar) -> Coordinates:
        chosen = _chosen("standardize", self.columns, rows.feature_names)
        moments = rows.summary()
        constant = chosen & (moments.variance == 0)
        if bool(constant.any()):
            which = [name for name, is_constant in zip(rows.feature_names, constant, strict=True) if is_constant]
            logger.warning("standardize: %s constant, and only centred: %s%s", "1 column is" if len(which) == 1 else
                           f"{len(which)} columns are", ", ".join(which[:12]), ", ..." if len(which) > 12 else "")  # fmt: skip
        mean = torch.where(chosen, moments.mean, 0.0)
        scale = torch.where(chosen & ~constant, moments.variance.sqrt(), 1.0)
        return Standard(mean, scale) if self.columns is None else StandardOfSome(mean, scale, chosen)


def _chosen(step: str, columns: Columns, names: Names) -> Tensor:
    """(D,) bool: which of the features are named; all where none is."""
    for name in columns or ():
        if name not in names:
            shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
            raise UserError(f"data.transforms: {step}.columns has '{name}'; the features there are {shown}")
    return torch.tensor([columns is None or name in columns for name in names])


class Whiten(_Declaration):
    """Uncorrelated columns of variance 1: z = (covariance + regularization I)^(-1/2) (x - mean).

    The symmetric root ("ZCA") is, of all that whiten, the one that leaves the rows closest to where they were, and it does
    not depend on the order of the columns, as Cholesky's does (Kessy, Lewin & Strimmer 2018): a feature keeps its name.
    """

    regularization: float = Field(default=0.0, ge=0.0, allow_inf_nan=False)

    coordinates: ClassVar[type[Coordinates]] = Whitened

    def fit(self, rows: RowsSoFar) -> Coordinates:
        mean_D, directions_DD, deviation_D = rows.principal_axes()
        num_flat = int((~_varies(deviation_D)).sum())
        if self.regularization == 0.0 and num_flat:
            raise UserError(
                f"data.transforms: whiten: {num_flat} of {len(deviation_D)} directions have no variance; give "
                "{whiten: {regularization: 1.0e-6}}, leave out constant and dependent columns, or use pca"
            )
        return Whitened(mean_D, directions_DD, (deviation_D.square() + self.regularization).sqrt())


class Pca(_Declaration):
    """The principal components, of the largest variance first; in each direction the largest entry is positive.

    num_components  how many, or, below 1, what share of the variance they have at least
    whiten          whether to divide each by its standard deviation (biased)
    """

    num_components: int | float
    whiten: bool = False

    coordinates: ClassVar[type[Coordinates]] = PrincipalAxes

    @field_validator("num_components", mode="before")
    @classmethod
    def _count_or_share(cls, given: Any) -> Any:
        is_count = isinstance(given, int) and not isinstance(given, bool) and given >= 1
        if not is_count and not (isinstance(given, float) and 0.0 < given < 1.0):
            raise ValueError("give a whole number from 1 on, or a share of the variance between 0 and 1")
        return given

    def fit(self, rows: RowsSoFar) -> Coordinates:
        mean_D, directions_DD, deviation_D = rows.principal_axes()
        num_varying = int(_varies(deviation_D).sum())
        if isinstance(self.num_components, int):
            size = self.num_components
        else:
            share_D = deviation_D.square().cumsum(0) / deviation_D.square().sum()
            size = min(int(torch.searchsorted(share_D, self.num_components, right=True)) + 1, max(num_varying, 1))
        most = num_varying if self.whiten else len(mean_D)
        if size > most:
            what = "directions have any variance, which pca.whiten needs" if self.whiten else "features are there"
            raise UserError(f"data.transforms: pca.num_components is {size}, but only {most} {what}; ask for {most} or fewer")
        scale_E = deviation_D[:size] if self.whiten else torch.ones(size, dtype=torch.float64)
        return PrincipalAxes(mean_D, directions_DD[:size], scale_E)


def _varies(deviation_D: Tensor) -> Tensor:
    """Which of these standard deviations, the largest first, are more than rounding."""
    return deviation_D > EPS * len(deviation_D) * deviation_D[0]


def _a_name_or_an_object(schema: dict[str, Any]) -> None:
    content = dict(schema)
    schema.clear()
    schema["anyOf"] = [{"enum": list(content["properties"])}, {**content, "minProperties": 1, "maxProperties": 1}]


class Step(_Declaration):
    """One transform: its name, or its name with options. What can be declared is what stands here."""

    model_config = ConfigDict(json_schema_extra=_a_name_or_an_object)

    log1p: Log1p | None = None
    standardize: Standardize | None = None
    whiten: Whiten | None = None
    pca: Pca | None = None

    @model_validator(mode="before")
    @classmethod
    def _one(cls, given: Any) -> Any:
        given = {given: {}} if isinstance(given, str) else given
        if not isinstance(given, Mapping) or len(given) != 1:
            raise ValueError("a step is one name, such as standardize, or {name: options}, such as {pca: {num_components: 50}}")
        return {name: {} if options is None else options for name, options in given.items()}

    @model_serializer
    def _as_written(self) -> Any:
        (name,) = self.model_fields_set
        options = self.declaration.model_dump(mode="json")
        return {name: options} if options else name

    def obstacle_to_texts(self, column: str) -> str:
        """Why this cannot be done where a column of texts is among the features; empty where it leaves that as it is."""
        (name,) = self.model_fields_set
        if not hasattr(self.declaration, "columns"):
            return f"{name} mixes with others; leave one of both out"
        columns = self.declaration.columns
        if columns is None:
            return f"{name} cannot transform; name the columns of numbers that it is of, as in {{{name}: {{columns: [a, b]}}}}"
        return f"{name} cannot transform; leave it out of {name}.columns" if column in columns else ""

    @property
    def declaration(self) -> Any:
        (name,) = self.model_fields_set
        return getattr(self, name)


def _a_list(given: Any) -> Any:
    if not isinstance(given, list | tuple):
        raise ValueError("a list is needed, such as [standardize, {pca: {num_components: 50}}]")
    return given


Steps = Annotated[tuple[Step, ...], BeforeValidator(_a_list)]


# All of them


@dataclass(frozen=True, eq=False)
class Transforms:
    """Fitted transforms, one after the other; none at all leave the rows as they are.

    source_names  what the features are called before the first
    declared      how each was declared
    steps         the same, fitted
    """

    source_names: Names
    declared: Steps = ()
    steps: tuple[Coordinates, ...] = ()

    def __post_init__(self) -> None:
        for step, names in zip(self.steps, self._names, strict=False):
            if step.num_features != len(names):
                raise ValueError(f"a transform of {step.num_features} features, where there are {len(names)}")

    @cached_property
    def _names(self) -> list[Names]:
        """The features before each step, and after the last."""
        names = [self.source_names]
        for step in self.steps:
            names.append(step.rename(names[-1]))
        return names

    @property
    def feature_names(self) -> Names:
        """What the features are called after the last."""
        return self._names[-1]

    @property
    def left_names(self) -> frozenset[str]:
        """Those features that every step has left as they were."""
        left = set(self.source_names)
        for step, names in zip(self.steps, self._names[1:], strict=True):
            left &= {name for name, is_left in zip(names, step.leaves.tolist(), strict=True) if is_left}
        return frozenset(left)

    @property
    def num_kept(self) -> int | None:
        """How many coordinates the last pca that drops directions keeps; None where none drops any: x has a density."""
        return next((step.num_coordinates for step in reversed(self.steps) if step.drops), None)

    def forward(self, x_ND: Any) -> Tensor:
        """(N, E) from x (N, D), where NaN is a missing entry. RowError where a row cannot be transformed."""
        return self.map(x_ND)[0]

    def log_abs_det(self, x_ND: Any) -> Tensor:
        """(N,) log |det dz/dx|: what log p(z) lacks of log p(x).

        Where a pca drops directions, it is the Jacobian from the coordinates along those that it keeps (of the last such
        pca, before its whitening): with it, log p(z) becomes the log density of these principal coordinates.
        """
        return self.map(x_ND)[1]

    def map(self, x_ND: Any) -> tuple[Tensor, Tensor]:
        """`forward` and `log_abs_det`, for the price of one."""
        z = self._matrix(x_ND, self.source_names)
        log_abs_det_N = torch.zeros(len(z), dtype=torch.float64)
        with one_thread():
            for step, names in zip(self.steps, self._names, strict=False):
                outside = step.outside(z).nonzero()
                if len(outside):
                    row, column = outside[0].tolist()
                    value = float(z[row, column])
                    what = "is missing" if math.isnan(value) else f"is {value:g}"
                    raise RowError(row, f"column '{names[column]}' {what}; {step.takes}")
                log_abs_det_N = step.log_abs_det(z) + (0.0 if step.drops else log_abs_det_N)
                z = step.forward(z)
        return z, log_abs_det_N

    def inverse(self, z_NE: Any) -> Tensor:
        """(N, D) from z (N, E). Of forward(x) it is x, or the projection of x where a pca drops directions."""
        z_NE = self._matrix(z_NE, self.feature_names)
        parts = []
        with one_thread():
            for part in z_NE.split(max(1, ENTRIES_AT_ONCE // len(self.source_names))):
                for step in reversed(self.steps):
                    part = step.inverse(part)
                parts.append(part)
        return torch.cat(parts)

    @property
    def matrix(self) -> Tensor | None:
        """(E, D) where inverse(z) is z @ matrix and a constant; None where a step is not linear."""
        if not all(step.is_linear for step in self.steps):
            return None
        num_coordinates = len(self.feature_names)
        origin_1D = self.inverse(torch.zeros(1, num_coordinates, dtype=torch.float64))
        return self.inverse(torch.eye(num_coordinates, dtype=torch.float64)) - origin_1D

    def _matrix(self, values: Any, names: Names) -> Tensor:
        values = as_tensor(values)
        if values.ndim != 2 or values.shape[1] != len(names):
            raise UserError(f"x has shape {tuple(values.shape)}; (N, {len(names)}) is needed")
        return values

    # Blocks

    def map_block(self, block: Block) -> tuple[Tensor, Tensor]:
        """`map` of a block's rows; UserError, with the row's number, where one cannot be transformed."""
        try:
            return self.map(block.x if block.missing is None else block.x.masked_fill(block.missing, torch.nan))
        except RowError as error:
            raise UserError(f"row {int(block.rows[error.row])}: {error.reason}") from None

    def apply(self, block: Block) -> Block:
        """The block with its rows transformed."""
        if not self.steps:
            return block
        z_NE = self.map_block(block)[0]
        if block.missing is None:
            return replace(block, x=z_NE)
        missing = z_NE.isnan()
        return replace(block, x=z_NE.masked_fill(missing, 0.0), missing=missing)

    def mean_log_abs_det(self, blocks: Blocks[Block]) -> float:
        """The weighted mean of log_abs_det over the rows of blocks that are not transformed yet."""
        value = reduce(_sum_of_log_abs_det, blocks, self)
        return value.total / value.weight

    @classmethod
    def fit(cls, declared: Steps, source_names: Names, blocks: Blocks[Block], summary: Summary) -> Transforms:
        """Fit each step to what those before it make of the rows.

        blocks   of the rows to fit, not transformed; passed over once for each step that has something to fit, but for a
                 standardize that comes first
        summary  the survey of the blocks
        """
        transforms = cls(source_names)
        for step in declared:
            fitted = step.declaration.fit(RowsSoFar(transforms, blocks, summary))
            transforms = cls(source_names, (*transforms.declared, step), (*transforms.steps, fitted))
        return transforms

    # Tensors

    def tensors(self) -> dict[str, Tensor]:
        """What was fitted, as `0.mean` of the first step."""
        return {f"{i}.{name}": tensor for i, step in enumerate(self.steps) for name, tensor in step.tensors().items()}

    @classmethod
    def from_tensors(cls, source_names: Names, declared: Steps, tensors: Mapping[str, Tensor]) -> Transforms:
        """The inverse of `tensors`; ValueError, KeyError or TypeError where their names, shapes or values do not fit."""
        of_step: dict[str, dict[str, Tensor]] = {str(i): {} for i in range(len(declared))}
        for key, tensor in tensors.items():
            index, _, name = key.partition(".")
            of_step[index][name] = tensor
        steps = [step.declaration.coordinates(**of_step[str(i)]) for i, step in enumerate(declared)]
        return cls(source_names, declared, tuple(steps))


# What is computed over blocks


@dataclass(frozen=True)
class RowsSoFar:
    """The rows that a transform is fitted to: those of the blocks, after the transforms before it.

    source_summary  the survey of the blocks
    """

    transforms: Transforms
    blocks: Blocks[Block]
    source_summary: Summary

    @property
    def feature_names(self) -> Names:
        return self.transforms.feature_names

    def summary(self) -> Summary:
        """The columns' moments; missing entries do not count."""
        return reduce(_summary, self.blocks, self.transforms) if self.transforms.steps else self.source_summary

    def principal_axes(self) -> tuple[Tensor, Tensor, Tensor]:
        """mean (D,), directions (D, D), one a row, and standard deviations along them (D,), the largest first."""
        spread = reduce(_spread, self.blocks, self.transforms)
        return spread.mean, *spread.axes()


def _summary(transforms: Transforms, block: Block) -> Summary:
    return summarize(None, transforms.apply(block))


def _spread(transforms: Transforms, block: Block) -> Spread:
    block = transforms.apply(block)
    if block.missing is not None:
        row, column = block.missing.nonzero()[0].tolist()
        where = f"row {int(block.rows[row])}: column '{transforms.feature_names[column]}'"
        raise UserError(f"{where} is missing; {PrincipalAxes.takes}")
    return Spread.of(block)


@dataclass(frozen=True)
class _Sum:
    total: float
    weight: float

    def merge(self, other: _Sum) -> _Sum:
        return _Sum(self.total + other.total, self.weight + other.weight)


def _sum_of_log_abs_det(transforms: Transforms, block: Block) -> _Sum:
    weights_N = block.weights_or_ones()
    log_abs_det_N = transforms.map_block(block)[1]
    return _Sum(float((weights_N * log_abs_det_N).sum()), float(weights_N.sum()))
