"""Which kind each column of the data is, what a column of a kind may hold, and where its distributions begin.

Legend: D columns, K latents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from gendist.cost import PassCost, tensor_bytes
from gendist.models.distributions.bernoulli import Bernoulli
from gendist.models.distributions.categorical import Categorical
from gendist.models.distributions.columns import Columns, Group
from gendist.models.distributions.gaussian import Gaussian
from gendist.models.distributions.gaussian_statistics import pass_cost as gaussian_pass_cost
from gendist.models.distributions.multinomial import Multinomial
from gendist.models.distributions.normal import Normal
from gendist.models.distributions.poisson import Poisson
from gendist.protocols import DataSummary, Feature, UserError

Kind = Literal["gaussian", "multinomial", "bernoulli", "categorical", "poisson"]

MAX_CATEGORIES = 10_000  # of a column of whole numbers
MAX_DISPERSION = 10.0  # variance of counts, in their means, which it equals where they are of a Poisson distribution
MIN_MEAN = 10.0  # of whole numbers that may be measured: below it most are 0, for which a Gaussian has no room
MAX_DISTINCT = 0.5  # texts of a column of categories, in rows: where there are more they are names
MIN_NAMES = 50
NUM_SHOWN = 8  # columns of each kind


class ColumnsConfig(BaseModel):
    """How columns that are independent given a latent are distributed.

    kind                       of all columns; or "mixed": each its own, by `columns` or else by what the data hold: text is
                               categorical, 0 and 1 alone (true and false) bernoulli, whole numbers from 0 on poisson, other
                               numbers gaussian; so are whole numbers too far apart to be counts, of a mean of 10 and more and
                               a variance of more than 10 times that, such as incomes
    columns                    of kind mixed: the kinds of columns by name
    pseudocount                what is taken to have been seen for each latent: tokens of each kind (multinomial), samples of
                               each value (bernoulli, categorical), samples like the mean of all (poisson)
    unseen_categories          whether categories that the data do not have keep a probability, that of one category more
    covariance_regularization  is added to the variances of gaussian columns
    covariance_floor           no variance of theirs is below this
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["gaussian", "multinomial", "bernoulli", "categorical", "poisson", "mixed"]
    columns: dict[str, Kind] = {}
    pseudocount: float = Field(default=1.0, ge=0.0, allow_inf_nan=False)
    unseen_categories: bool = True
    covariance_regularization: float = Field(default=1e-9, ge=0.0, allow_inf_nan=False)
    covariance_floor: float = Field(default=0.0, ge=0.0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _kinds_are_for_mixed_columns(self) -> Self:
        if self.columns and self.kind != "mixed":
            raise ValueError(f"columns: of kind mixed alone; every column is {self.kind} here")
        return self

    def kinds_of(self, summary: DataSummary) -> list[str]:
        """The kind of each column."""
        ranges = zip(summary.minimum.tolist(), summary.maximum.tolist(), summary.all_integers.tolist(), strict=True)
        are_measured = (_dispersion(summary) > MAX_DISPERSION) & (summary.mean >= MIN_MEAN)
        each = zip(summary.features, ranges, are_measured.tolist(), strict=True)
        return [self._kind_of(feature, *range_, is_measured) for feature, range_, is_measured in each]

    def declared(self, feature: Feature) -> str | None:
        return self.columns.get(feature.column, self.columns.get(feature.name))

    def settled(self, summary: DataSummary) -> Self:
        """The same for some of these rows as for all: of kind mixed each column is declared to be what all rows make it."""
        if self.kind != "mixed":
            return self
        kinds = zip(summary.features, self.kinds_of(summary), strict=True)
        return self.model_copy(update={"columns": {feature.name: kind for feature, kind in kinds}})

    def _kind_of(self, feature: Feature, least: float, most: float, is_whole: bool, is_measured: bool) -> str:
        if self.kind != "mixed":
            return self.kind
        declared = self.declared(feature)
        if declared is not None:
            return declared
        if feature.type == "category":
            return "categorical"
        # By the numbers and not by their type, of which files of other formats know nothing.
        if is_whole and least >= 0:
            return "bernoulli" if most <= 1 else "gaussian" if is_measured else "poisson"
        return "gaussian"


def _dispersion(summary: DataSummary) -> Tensor:
    """(D,) the variance in means: 1 of a Poisson distribution."""
    return summary.variance / summary.mean.clamp_min(torch.finfo(torch.float64).tiny)


@dataclass(frozen=True)
class FoundKinds:
    """What the data have decided of columns of kind mixed.

    kinds    of each column
    remarks  lines about columns of which something else may have been meant
    """

    kinds: Mapping[str, str]
    remarks: tuple[str, ...]

    def __str__(self) -> str:
        """Such as "columns taken as gaussian: income, age; categorical: city"."""
        of_kind: dict[str, list[str]] = {}
        for name, kind in self.kinds.items():
            of_kind.setdefault(kind, []).append(name)
        return "columns taken as " + "; ".join(f"{kind}: {listing(names, NUM_SHOWN)}" for kind, names in of_kind.items())

    @classmethod
    def of(cls, config: ColumnsConfig, summary: DataSummary) -> FoundKinds | None:
        """None where all columns are of a kind that is declared."""
        if config.kind != "mixed":
            return None
        kinds, num_rows = config.kinds_of(summary), summary.num_weighted_rows
        remarks, spread = [], dict[str, list[float]]()  # by column, which may have many features
        for feature, kind, dispersion in zip(summary.features, kinds, _dispersion(summary).tolist(), strict=True):
            if config.declared(feature) is not None:
                continue
            if kind == "poisson" and dispersion > MAX_DISPERSION:
                spread.setdefault(feature.column, []).append(dispersion)
            if kind == "categorical" and feature.num_categories > max(MAX_DISTINCT * num_rows, MIN_NAMES):
                remarks.append(
                    f"column '{feature.name}' is taken as categorical, but has {feature.num_categories:,} different texts in "
                    f"{num_rows:,} rows: where they are names or ids, leave it out with data.columns"
                )
        for column, dispersions in spread.items():
            of_it = f"{len(dispersions)} features of column '{column}' are" if len(dispersions) > 1 else f"column '{column}' is"
            remarks.append(
                f"{of_it} taken as poisson, but a variance is up to {max(dispersions):.3g} times its mean, where counts have "
                f"about 1: unless classes differ so much, declare it with model.columns: {{{column}: gaussian}}"
            )
        return cls({feature.name: kind for feature, kind in zip(summary.features, kinds, strict=True)}, tuple(remarks))


def blank_columns(config: ColumnsConfig, summary: DataSummary, centers_KD: Tensor) -> Columns:
    """What all rows together suggest, the same for each latent but for the centers of gaussian columns."""
    members: dict[tuple[str, str], list[int]] = {}
    for index, (feature, kind) in enumerate(zip(summary.features, config.kinds_of(summary), strict=True)):
        # Of mixed kinds, a column of lists that is multinomial is a bag of tokens of its own; numbers are one together.
        is_bag = kind == "multinomial" and config.kind == "mixed" and feature.name != feature.column
        members.setdefault((kind, feature.column if is_bag else ""), []).append(index)
    groups = [_blank(config, kind, torch.tensor(indices), summary, centers_KD) for (kind, _), indices in members.items()]
    return Columns(tuple(groups))


def _blank(config: ColumnsConfig, kind: str, columns: Tensor, summary: DataSummary, centers_KD: Tensor) -> Group:
    """What all rows together suggest of some columns of one kind, the same for each class."""
    num_classes, mean_D = len(centers_KD), summary.mean[columns]
    pseudocount = config.pseudocount
    distribution: Any
    if kind == "gaussian":
        variance_D = summary.variance[columns] + config.covariance_regularization
        variance_D = torch.where(variance_D > 0, variance_D, 1.0)  # a constant column, no regularization
        gaussian = Gaussian(centers_KD[:, columns], variance_D.repeat(num_classes, 1), "diag")
        distribution = Normal(gaussian, config.covariance_regularization, config.covariance_floor)
    elif kind == "bernoulli":
        distribution = Bernoulli(mean_D.clamp(1e-3, 1.0 - 1e-3).repeat(num_classes, 1), pseudocount)
    elif kind == "poisson":
        distribution = Poisson(mean_D.clamp_min(1e-3).repeat(num_classes, 1), mean_D, pseudocount)
    elif kind == "multinomial":
        length = mean_D.sum()
        smooth_D = mean_D + 1e-3 * torch.where(length > 0, length, 1.0) / len(columns)
        distribution = Multinomial((smooth_D / smooth_D.sum()).repeat(num_classes, 1), length, pseudocount)
    else:
        num_slots = torch.tensor(_num_slots(config, summary, columns.tolist()))
        probs_F = torch.repeat_interleave(1.0 / num_slots.to(torch.float64), num_slots)
        distribution = Categorical(probs_F.repeat(num_classes, 1), num_slots, pseudocount, config.unseen_categories)
    return Group(kind, columns, distribution)


def _num_slots(config: ColumnsConfig, summary: DataSummary, columns: Sequence[int]) -> list[int]:
    """How many categories each of these columns has, with one for those that are not seen if there is to be one."""
    more = int(config.unseen_categories)
    return [(summary.features[d].num_categories or int(summary.maximum[d]) + 1) + more for d in columns]


def pass_cost(config: ColumnsConfig, summary: DataSummary, num_latents: int) -> PassCost:
    """Of an E-step in which nothing is missing, by the shapes of the statistics of each kind."""
    cost = PassCost(0.0, 0, 0)
    kinds = config.kinds_of(summary)
    for kind in set(kinds):
        columns = [d for d, other in enumerate(kinds) if other == kind]
        if kind == "gaussian":
            cost += gaussian_pass_cost("diag", num_latents, len(columns))
            continue
        width = len(columns) if kind != "categorical" else sum(_num_slots(config, summary, columns))
        kept = {"counts": (num_latents,), "sums": (num_latents, width), "present": (num_latents, 1)}
        parameters = tensor_bytes({"probs": (num_latents, width), "columns": (len(columns),)})
        cost += PassCost(4.0 * num_latents * len(columns), tensor_bytes(kept), parameters)
    return cost


# What columns of a kind may hold


def check_columns(config: ColumnsConfig, summary: DataSummary) -> None:
    """UserError where a column holds nothing, or what its kind does not allow."""
    names = [feature.name for feature in summary.features]
    known = {*names, *(feature.column for feature in summary.features)}
    for name in config.columns:
        if name not in known:
            raise UserError(f"model.columns: '{name}' is no column that is fitted; these are {listing(names)}")
    for feature, is_empty in zip(summary.features, (summary.feature_weight <= 0).tolist(), strict=True):
        if is_empty:
            raise UserError(f"column '{feature.name}' has no value in any row; leave it out of data.columns")
    kinds = config.kinds_of(summary)
    if kinds.count("multinomial") == 1:
        name = summary.features[kinds.index("multinomial")].name
        raise UserError(f"column '{name}' is the only one of kind multinomial, of which it says nothing; declare it poisson")
    ranges = (summary.minimum.tolist(), summary.maximum.tolist(), summary.all_integers.tolist())
    for feature, kind, least, most, is_whole in zip(summary.features, kinds, *ranges, strict=True):
        name = feature.name
        if feature.type == "category" and kind != "categorical":
            raise UserError(f"column '{name}' holds text, which is not {kind}; declare it categorical, or leave it out")
        if kind != "gaussian" and least < 0:
            raise UserError(f"column '{name}' holds {least:g}, but {kind} columns hold 0 and more; declare it gaussian")
        if kind in ("categorical", "poisson", "bernoulli") and not is_whole:
            raise UserError(f"column '{name}' does not hold whole numbers alone, as {kind} columns do; declare it gaussian")
        if kind == "bernoulli" and most > 1:
            raise UserError(f"column '{name}' holds {most:g}, but bernoulli columns hold 0 and 1; declare it categorical")
        if kind == "categorical" and feature.type == "category":
            if most >= feature.num_categories and not config.unseen_categories:
                raise UserError(
                    f"column '{name}' holds texts that are no category of the model to start from; allow them with "
                    "model.unseen_categories"
                )
        elif kind == "categorical" and most >= MAX_CATEGORIES:
            raise UserError(
                f"column '{name}' holds {most:g}, but categorical columns number their categories, 0 to "
                f"{MAX_CATEGORIES - 1:,} at most; declare it poisson, or make it a column of text"
            )


def check_values(group: Group, values: Tensor) -> None:
    """UserError where values cannot be of the group's kind."""
    if group.kind == "gaussian" or values.numel() == 0:
        return
    if bool((values < 0).any()):
        raise UserError(f"x has the entry {float(values.min()):g}; {group.kind} columns hold 0 and more")
    if group.kind in ("categorical", "poisson", "bernoulli") and not bool((values == values.round()).all()):
        raise UserError(f"x has entries that are no whole numbers, in {group.kind} columns")
    if group.kind == "bernoulli" and bool((values > 1).any()):
        raise UserError(f"x has the entry {float(values.max()):g}; bernoulli columns hold 0 and 1")
    if isinstance(group.distribution, Categorical) and not group.distribution.has_unseen:
        beyond = values > group.distribution.num_slots - 1
        if bool(beyond.any()):
            raise UserError(f"x has the category {float(values[beyond][0]):g}, which the fit did not see; allow it with "
                            "model.unseen_categories")  # fmt: skip


def listing(names: Sequence[str], most: int = 12) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
