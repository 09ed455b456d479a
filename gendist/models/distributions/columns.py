"""K distributions over D columns that are independent given the latent, of mixed kinds: each group of columns is of one kind.

Legend: N samples, D columns, K latents, G groups.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gendist.figures import Profiles
from gendist.models.distributions.bernoulli import Bernoulli
from gendist.models.distributions.categorical import Categorical
from gendist.models.distributions.distribution import Distribution, Step
from gendist.models.distributions.multinomial import Multinomial
from gendist.models.distributions.normal import Normal
from gendist.models.distributions.poisson import Poisson
from gendist.models.ops.buffers import buffer
from gendist.models.ops.independent_latent import Kernel
from gendist.noise import Noise
from gendist.protocols import Compute, UserError

KINDS: dict[str, type[Any]] = {
    "gaussian": Normal,
    "multinomial": Multinomial,
    "bernoulli": Bernoulli,
    "categorical": Categorical,
    "poisson": Poisson,
}

SPARSE_KINDS = {"bernoulli", "multinomial", "poisson"}  # where a 0 needs no look


@dataclass(frozen=True, eq=False)
class Group:
    """Columns (their indices, ascending) and the K distributions over them."""

    kind: str
    columns: Tensor
    distribution: Distribution

    def of(self, values_ND: Tensor, num_features: int) -> Tensor:
        """The group's columns of some rows."""
        return values_ND if len(self.columns) == num_features else values_ND[:, self.columns]


@dataclass(frozen=True, eq=False)
class ColumnsStatistics:
    """Those of each group."""

    groups: tuple[Any, ...]

    @property
    def counts(self) -> Tensor:
        """(K,) the weight of each latent."""
        return self.groups[0].counts

    def merge(self, other: ColumnsStatistics) -> ColumnsStatistics:
        return ColumnsStatistics(tuple(a.merge(b) for a, b in zip(self.groups, other.groups, strict=True)))


@dataclass(frozen=True, eq=False)
class Columns:
    """The groups, which share out all columns among them."""

    groups: tuple[Group, ...]

    def __post_init__(self) -> None:
        columns = torch.cat([group.columns for group in self.groups]).sort().values
        if not torch.equal(columns, torch.arange(len(columns))):
            raise ValueError("groups of columns: each column must belong to one")
        if len({group.distribution.num_latents for group in self.groups}) != 1:
            raise ValueError("groups of columns: all need as many latents")

    @property
    def num_latents(self) -> int:
        return self.groups[0].distribution.num_latents

    @property
    def num_features(self) -> int:
        return sum(len(group.columns) for group in self.groups)

    @property
    def num_parameters(self) -> int:
        return sum(group.distribution.num_parameters for group in self.groups)

    @property
    def kinds(self) -> tuple[str, ...]:
        """(D,) of each column."""
        kinds = {d: group.kind for group in self.groups for d in group.columns.tolist()}
        return tuple(kinds[d] for d in range(self.num_features))

    @property
    def means(self) -> Tensor:
        """(K, D)"""
        return self._together([group.distribution.means for group in self.groups])

    def profiles(self, names: tuple[str, ...]) -> Profiles:
        """What to draw of them; names: of the latents."""
        variances_KD = self._together([group.distribution.variances for group in self.groups])
        probs: dict[int, Tensor] = {}
        for group in self.groups:
            if isinstance(group.distribution, Categorical):
                probs |= dict(zip(group.columns.tolist(), group.distribution.probs_of_columns, strict=True))
        return Profiles(self.means, variances_KD, names, probs)

    def _together(self, parts: list[Tensor]) -> Tensor:
        """(N, D) of the (N, d) of each group."""
        together = torch.empty(len(parts[0]), self.num_features, dtype=torch.float64)
        for group, part in zip(self.groups, parts, strict=True):
            together[:, group.columns] = part
        return together

    def kernel(self, compute: Compute) -> ColumnsKernel:
        return ColumnsKernel(self, compute)

    def log_prob_of_counted(self, statistics: ColumnsStatistics) -> float:
        pairs = zip(self.groups, statistics.groups, strict=True)
        return sum(group.distribution.log_prob_of_counted(own) for group, own in pairs)

    def m_step(self, statistics: ColumnsStatistics) -> Step[Columns]:
        steps = [g.distribution.m_step(own) for g, own in zip(self.groups, statistics.groups, strict=True)]
        redo = None
        if any(step.redo is not None for step in steps):
            redo = self._with([step.redo or g.distribution for g, step in zip(self.groups, steps, strict=True)])
        repairs = tuple(line for step in steps for line in step.repairs)
        return Step(self._with([step.distribution for step in steps]), repairs, redo, all(step.is_final for step in steps))

    def _with(self, distributions: list[Distribution]) -> Columns:
        groups = zip(self.groups, distributions, strict=True)
        return Columns(tuple(replace(group, distribution=distribution) for group, distribution in groups))

    def log_prior(self, statistics: ColumnsStatistics) -> float:
        return sum(g.distribution.log_prior(own) for g, own in zip(self.groups, statistics.groups, strict=True))

    def sample(self, latent_N: Tensor, seed: int, purpose: str, start: int) -> Tensor:
        """(N, D) a sample of each latent, of the rows from `start` on of what belongs to seed and purpose."""
        parts = []
        for index, group in enumerate(self.groups):
            draw = getattr(Noise(seed, f"{purpose}.{index}"), group.distribution.noise)
            parts.append(group.distribution.sample(latent_N, draw(start, len(latent_N), len(group.columns))))
        return self._together(parts)

    def impute(self, responsibilities_NK: Tensor) -> Tensor:
        """(N, D)"""
        return self._together([group.distribution.impute(responsibilities_NK) for group in self.groups])

    def adopted(self, blank: Columns, config: Any) -> Columns:
        """The same parameters, estimated from here on as `config` says and with the priors of `blank`, which the data suggest;
        UserError where those are other kinds of columns or categories."""
        given, own = self.tensors(), blank.tensors()
        same_shapes = {name: tensor.shape for name, tensor in given.items()} == {name: own[name].shape for name in own}
        layout = [name for name in own if name.endswith((".columns", ".num_slots"))]
        if not same_shapes or not all(torch.equal(given[name], own[name]) for name in layout):
            raise UserError("the model to start from has other kinds of columns or categories than the spec and the data")
        priors = {name: tensor for name, tensor in own.items() if name.endswith(".prior_rates")}
        return Columns.from_tensors(given | priors, config)

    def tilted(self, size: float) -> Columns:
        """With the differences between the latents of each category made so large, of log p, where they are smaller."""
        groups = []
        for group in self.groups:
            distribution = group.distribution
            if isinstance(distribution, Categorical):
                group = replace(group, distribution=distribution.tilted(size))
            groups.append(group)
        return Columns(tuple(groups))

    def tensors(self) -> dict[str, Tensor]:
        """`0.gaussian.means` of the first group, and `0.gaussian.columns`."""
        tensors = {}
        for index, group in enumerate(self.groups):
            for name, tensor in {"columns": group.columns, **group.distribution.tensors()}.items():
                tensors[f"{index}.{group.kind}.{name}"] = tensor
        return tensors

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], config: Any) -> Columns:
        """The inverse of `tensors`; ValueError or KeyError where they do not fit."""
        found: dict[tuple[int, str], dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            index, _, rest = key.partition(".")
            kind, _, name = rest.partition(".")
            if not index.isdigit() or kind not in KINDS:
                raise ValueError(f"tensor {key}; such as 0.gaussian.means are needed")
            found.setdefault((int(index), kind), {})[name] = tensor
        if not found:
            raise ValueError("no tensors of columns; such as 0.gaussian.means are needed")
        groups = []
        for (_, kind), own in sorted(found.items()):
            columns = own.pop("columns")
            distribution = KINDS[kind].from_tensors(own, config)
            if distribution.num_features != len(columns):
                raise ValueError(f"{len(columns)} columns of kind {kind}, but parameters of {distribution.num_features}")
            groups.append(Group(kind, columns, distribution))
        return cls(tuple(groups))


class ColumnsKernel:
    """The `Kernel` of `ops/independent_latent.py`: those of the groups side by side."""

    def __init__(self, columns: Columns, compute: Compute):
        self._columns, self._compute = columns, compute
        self._kernels: list[Kernel] = [group.distribution.kernel(compute) for group in columns.groups]

    def portions(self, x_ND: Tensor, missing_ND: Tensor | None) -> Iterator[slice]:
        """As the group with the smallest ones, of which each takes any rows. UserError where rows are sparse and cannot be."""
        if x_ND.layout is torch.sparse_csr:
            kinds = sorted({group.kind for group in self._columns.groups})
            if len(self._columns.groups) > 1 or not set(kinds) <= SPARSE_KINDS:
                raise UserError(
                    f"sparse rows, but columns of kind {', '.join(kinds)}; sparse rows are of one kind, "
                    f"{', '.join(sorted(SPARSE_KINDS))}"
                )
        sizes = [next(iter(kernel.portions(x_ND, missing_ND))) for kernel in self._kernels]
        size = max(min(rows.stop for rows in sizes if isinstance(rows, slice)), 1)
        return (slice(start, min(start + size, len(x_ND))) for start in range(0, max(len(x_ND), 1), size))

    def load(self, x_ND: Tensor, missing_ND: Tensor | None) -> None:
        num_features = self._columns.num_features
        for group, kernel in zip(self._columns.groups, self._kernels, strict=True):
            missing = None if missing_ND is None else group.of(missing_ND, num_features)
            kernel.load(group.of(x_ND, num_features), missing)

    def log_prob(self, offset_K: Tensor) -> Tensor:
        first, *others = self._kernels
        log_prob_KN = first.log_prob(offset_K)
        if others:  # whose buffers may be the same
            total = buffer("log_prob columns", tuple(log_prob_KN.shape), log_prob_KN.dtype, log_prob_KN.device)
            log_prob_KN = total.copy_(log_prob_KN)
            for kernel in others:
                log_prob_KN += kernel.log_prob(torch.zeros_like(offset_K))
        return log_prob_KN

    def add(self, responsibilities_KN: Tensor) -> None:
        for kernel in self._kernels:
            kernel.add(responsibilities_KN)

    def count(self, latent_N: Tensor) -> None:
        for kernel in self._kernels:
            kernel.count(latent_N)

    def statistics(self) -> ColumnsStatistics:
        return ColumnsStatistics(tuple(kernel.statistics() for kernel in self._kernels))
