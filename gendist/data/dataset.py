"""A data set, cut into blocks: which rows make which block, read by whoever needs them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch

from gendist.blocks import Blocks, Leaves, reduce
from gendist.data.matrix import MAX_MAGNITUDE, to_matrix
from gendist.data.schema import Schema
from gendist.data.sources import DataConfig, Source
from gendist.data.transforms import Transforms
from gendist.noise import Noise
from gendist.protocols import Block, UserError

MAX_RUN_BYTES = 256 * 2**20  # what one task holds of x at a time
MAX_PASSING_BYTES = 32 * 2**20  # the same where rows are read again in every pass: it is held several times while it is read
MAX_LABELS = 10_000

Array = np.ndarray[Any, np.dtype[np.float64]]
Part = Literal["all", "training", "validation"]
MakeBlocks = Callable[[Callable[[Sequence[int]], list[Any]], Leaves, int, bool], Blocks[Any]]


@dataclass(frozen=True)
class Dataset:
    """A source and what its columns mean.

    make_blocks  (load, leaves, max_leaves_per_run, keep) -> Blocks: where the reading and computing is done
    labels       the distinct labels in order; empty where `data.label` is not given
    transforms   fitted ones, which the rows of blocks have behind them; None: rows are as the source has them
    """

    source: Source
    config: DataConfig
    schema: Schema
    leaves: Leaves
    make_blocks: MakeBlocks
    labels: tuple[Any, ...] = ()
    transforms: Transforms | None = None

    @classmethod
    def open(cls, source: Source, config: DataConfig, schema: Schema, make_blocks: MakeBlocks) -> Dataset:
        """Look at all labels, where there are any. UserError where they are none."""
        leaves = Leaves.of_shape(source.num_rows, schema.num_features)
        dataset = cls(source, config, schema, leaves, make_blocks)
        if config.label is None:
            return dataset
        label_type = source.schema.field(config.label).type
        if pa.types.is_nested(label_type) or isinstance(label_type, pa.BaseExtensionType):
            raise UserError(f"{source.name}: column '{config.label}' holds {label_type}; a label is a number or a text")
        found = reduce(_same, make_blocks(_LabelLoader(source, config.label), leaves, 1 << 30, False), None).labels
        if not found:
            raise UserError(f"{source.name}: column '{config.label}' holds no label in any row")
        if len(found) > MAX_LABELS:
            raise UserError(
                f"{source.name}: column '{config.label}' holds {len(found):,} labels; up to {MAX_LABELS:,} are allowed"
            )
        return replace(dataset, labels=tuple(sorted(found, key=lambda label: (isinstance(label, str), label))))

    def blocks(self, num_latents: int = 0, part: Part = "all", seed: int = 0, keep: bool = True) -> Blocks[Block]:
        """The rows of one part as blocks. The parts are told apart by seed and row number alone.

        num_latents   the width of the evidence that labels become
        keep          whether to hold on to the blocks for more than one pass, if `data.cache` allows it
        """
        keep = keep and self.config.cache == "memory"
        load = self._loader(num_latents, part, seed)
        width = self.schema.num_features + (num_latents if self.labels else 0)
        leaf_bytes = 8 * width * (self.leaves.bounds[1] - self.leaves.bounds[0])
        most = MAX_RUN_BYTES if keep else MAX_PASSING_BYTES
        return self.make_blocks(load, self.leaves, max(1, most // leaf_bytes), keep)

    def parts(self, parts: Leaves) -> Blocks[Sequence[Block]]:
        """All rows for one pass, in parts that begin and end with leaves: each is the list of its blocks, one a leaf."""
        leaf_rows = self.leaves.bounds[1] - self.leaves.bounds[0]
        return self.make_blocks(_PartLoader(self._loader(0, "all", 0), leaf_rows), parts, 1, False)

    def _loader(self, num_latents: int, part: Part, seed: int) -> _BlockLoader:
        return _BlockLoader(self.source, self.config, self.schema, self.labels, num_latents, part, seed, self.transforms)


@dataclass(frozen=True)
class _BlockLoader:
    source: Source
    config: DataConfig
    schema: Schema
    labels: tuple[Any, ...]
    num_latents: int
    part: Part
    seed: int
    transforms: Transforms | None

    def __call__(self, bounds: Sequence[int]) -> list[Block]:
        """One block a leaf, of the rows bounds[i] to bounds[i + 1] that belong to the part."""
        extra = [name for name in (self.config.label, self.config.weight) if name is not None]
        table = self.source.read(bounds[0], bounds[-1], list(dict.fromkeys([*self.schema.columns, *extra])))
        matrix = to_matrix(table, self.schema.columns, bounds[0], self.source.name)
        if matrix.shape[1] != self.schema.num_features:
            raise UserError(
                f"{self.source.name}: {matrix.shape[1]} features in rows {bounds[0]} to {bounds[-1] - 1}, but "
                f"{self.schema.num_features} in row 0"
            )
        columns = (matrix, self._weights(table, bounds[0]), self._evidence(table))
        return [self._leaf(start, stop, bounds[0], columns) for start, stop in pairwise(bounds)]

    def _leaf(self, start: int, stop: int, first_row: int, columns: Sequence[Array | None]) -> Block:
        """The block of rows start..stop of the part; columns begin at first_row. Its tensors own their memory."""
        rows = torch.arange(start, stop)
        if self.part != "all" and self.config.validation_fraction > 0.0:
            held_out = Noise(self.seed, "validation").uniform_of_rows(rows) < self.config.validation_fraction
            rows = rows[held_out if self.part == "validation" else ~held_out]
        index = slice(start - first_row, stop - first_row) if len(rows) == stop - start else rows.numpy() - first_row
        x, weights, evidence = (None if values is None else torch.from_numpy(np.array(values[index])) for values in columns)
        assert x is not None
        missing = x.isnan()
        any_missing = bool(missing.any())
        block = Block(
            x=x.masked_fill_(missing, 0.0) if any_missing else x,
            rows=rows,
            weights=weights,
            evidence=evidence,
            missing=missing if any_missing else None,
        )
        return block if self.transforms is None else self.transforms.apply(block)

    def _weights(self, table: pa.Table, first_row: int) -> Array | None:
        if self.config.weight is None:
            return None
        where = f"{self.source.name}: column '{self.config.weight}'"
        if pa.types.is_nested(table.column(self.config.weight).type):
            raise UserError(f"{where} holds lists; a weight is one number")
        weights = to_matrix(table, [self.config.weight], first_row, self.source.name)[:, 0]
        tiny = (weights > 0) & (weights < 1 / MAX_MAGNITUDE)
        for wrong, what in ((np.isnan(weights), "missing"), (weights < 0, "negative"), (tiny, "too small for float64")):
            if wrong.any():
                raise UserError(f"{where} is {what} in row {first_row + int(np.argmax(wrong))}; weights are 0 or more")
        return weights

    def _evidence(self, table: pa.Table) -> Array | None:
        """(N, num_latents): a labelled row excludes every latent but the label's; a row without label excludes none."""
        if not self.labels or not self.num_latents:
            return None
        index = {label: i for i, label in enumerate(self.labels)}
        latent_N = np.array([index.get(label, -1) for label in _normalised(table.column(self.config.label))])
        evidence = np.where(latent_N[:, None] < 0, 0.0, np.full((1, self.num_latents), -np.inf))
        labelled = np.flatnonzero(latent_N >= 0)
        evidence[labelled, latent_N[labelled]] = 0.0
        return evidence


@dataclass(frozen=True)
class _PartLoader:
    load: _BlockLoader
    leaf_rows: int

    def __call__(self, bounds: Sequence[int]) -> list[list[Block]]:
        """One list of blocks a part, of the rows bounds[i] to bounds[i + 1]."""
        return [self.load([*range(start, stop, self.leaf_rows), stop]) for start, stop in pairwise(bounds)]


@dataclass(frozen=True)
class _LabelSet:
    labels: frozenset[Any]

    def merge(self, other: _LabelSet) -> _LabelSet:
        return _LabelSet(self.labels | other.labels)


@dataclass(frozen=True)
class _LabelLoader:
    source: Source
    label: str

    def __call__(self, bounds: Sequence[int]) -> list[_LabelSet]:
        column = self.source.read(bounds[0], bounds[-1], [self.label]).column(self.label)
        found = {label for label in _normalised(column.unique()) if label is not None}
        # One set for the whole run; the other leaves of the run add nothing to it.
        return [_LabelSet(frozenset(found))]


def _same(_: None, labels: _LabelSet) -> _LabelSet:
    return labels


def _normalised(column: Any) -> list[Any]:
    """Labels as str, int or None where missing; 3.0 (an integer column with missing entries, in pandas) is 3."""
    return [_normal_label(label) for label in column.to_pylist()]


def _normal_label(label: Any) -> Any:
    if isinstance(label, float):
        if np.isnan(label):
            return None
        return int(label) if label.is_integer() else str(label)
    if isinstance(label, bool):
        return int(label)
    if label is None or isinstance(label, (int, str)):
        return label
    return str(label)
