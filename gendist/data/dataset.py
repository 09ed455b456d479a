"""A data set, cut into blocks: which rows make which block, read by whoever needs them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch

from gendist.blocks import Blocks, Leaves
from gendist.data.domains import Look, MakeBlocks
from gendist.data.evidence import known_evidence, soft_evidence
from gendist.data.matrix import MAX_MAGNITUDE, to_matrix
from gendist.data.schema import Schema
from gendist.data.sources import DataConfig, Source
from gendist.data.sparse import to_csr
from gendist.data.tokens import to_counts
from gendist.data.transforms import Transforms
from gendist.noise import Noise
from gendist.protocols import Block, UserError, as_matrix, is_labelled

MAX_RUN_BYTES = 256 * 2**20  # what one task holds of x at a time
MAX_PASSING_BYTES = 32 * 2**20  # the same where rows are read again in every pass: it is held several times while it is read
ROWS_TO_GUESS_FROM = 256

Array = np.ndarray[Any, np.dtype[np.float64]]
Part = Literal["all", "training", "validation"]


@dataclass(frozen=True)
class Dataset:
    """A source and what its columns mean.

    make_blocks  (load, leaves, max_leaves_per_run, keep) -> Blocks: where the reading and computing is done
    schema       complete: with the values of every column of text, and all features
    labels       the declared labels, or the distinct ones that there are, in order; empty where `data.label` is not given
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
        """Look at all rows, once, for what is not known: labels, values of columns of text, features of sparse rows.

        UserError where there are none, or too many.
        """
        dataset = cls(source, config, schema, schema.leaves(source.num_rows), make_blocks)
        for name in config.label_columns:
            label_type = source.schema.field(name).type
            if pa.types.is_nested(label_type) or isinstance(label_type, pa.BaseExtensionType):
                raise UserError(f"{source.name}: column '{name}' holds {label_type}; a label is a number or a text")
        labels = config.label if isinstance(config.label, tuple) else config.labels or ()
        look_for_labels = config.label is not None and not labels
        if look_for_labels or schema.columns_to_survey or schema.needs_features:
            look = Look(
                source,
                label=config.label_columns[0] if look_for_labels else None,
                categories=schema.columns_to_survey,
                text=schema.text if schema.needs_features else None,
                sparse=schema.columns[0] if schema.needs_features and schema.text is None else None,
            )
            found = look.over(make_blocks, dataset.leaves)
            schema = schema.completed(found, f"{source.name}: column '{schema.columns[0]}'")
            if look_for_labels:
                labels = tuple(sorted(found.labels, key=lambda label: (isinstance(label, str), label)))
        return replace(dataset, schema=schema, labels=labels)

    def blocks(
        self,
        num_latents: int = 0,
        part: Part = "all",
        seed: int = 0,
        keep: bool = True,
        unlabelled_weight: float = 1.0,
    ) -> Blocks[Block]:
        """The rows of one part as blocks. The parts are told apart by seed and row number alone.

        num_latents        the width of the evidence that labels become
        keep               whether to hold on to the blocks for more than one pass, if `data.cache` allows it
        unlabelled_weight  what multiplies the weight of a row whose label is not known
        """
        keep = keep and self.config.cache == "memory"
        load = self._loader(num_latents, part, seed, unlabelled_weight)
        leaf_rows = self.leaves.bounds[1] - self.leaves.bounds[0]
        leaf_bytes = self._x_bytes(leaf_rows) + 8 * leaf_rows * (num_latents if self.labels else 0)
        most = MAX_RUN_BYTES if keep else MAX_PASSING_BYTES
        return self.make_blocks(load, self.leaves, max(1, most // leaf_bytes), keep)

    def parts(self, parts: Leaves) -> Blocks[Sequence[Block]]:
        """All rows for one pass, in parts that begin and end with leaves: each is the list of its blocks, one a leaf."""
        leaf_rows = self.leaves.bounds[1] - self.leaves.bounds[0]
        return self.make_blocks(_PartLoader(self._loader(0, "all", 0), leaf_rows), parts, 1, False)

    def _x_bytes(self, leaf_rows: int) -> int:
        """Of a leaf; where rows are sparse, as many entries as the first rows have."""
        if not self.schema.is_sparse:
            return 8 * self.schema.num_features * leaf_rows
        first = replace(self, transforms=None)._loader(0, "all", 0)([0, min(ROWS_TO_GUESS_FROM, self.source.num_rows)])[0]
        return leaf_rows * (8 + 16 * int(first.x.values().numel()) // first.num_rows)

    def _loader(self, num_latents: int, part: Part, seed: int, unlabelled_weight: float = 1.0) -> _BlockLoader:
        return _BlockLoader(
            self.source,
            self.config,
            self.schema,
            self.labels,
            num_latents,
            part,
            seed,
            unlabelled_weight,
            self.transforms,
        )


@dataclass(frozen=True)
class _BlockLoader:
    source: Source
    config: DataConfig
    schema: Schema
    labels: tuple[Any, ...]
    num_latents: int
    part: Part
    seed: int
    unlabelled_weight: float
    transforms: Transforms | None

    def __call__(self, bounds: Sequence[int]) -> list[Block]:
        """One block a leaf, of the rows bounds[i] to bounds[i + 1] that belong to the part."""
        extra = [name for name in (*self.config.label_columns, self.config.weight) if name is not None]
        table = self.source.read(bounds[0], bounds[-1], list(dict.fromkeys([*self.schema.columns, *extra])))
        weights, evidence = self._weights(table, bounds[0]), self._evidence(table, bounds[0])
        if evidence is not None and self.unlabelled_weight != 1.0:
            factors = np.where(is_labelled(evidence), 1.0, self.unlabelled_weight)
            weights = factors if weights is None else weights * factors
        matrix = self._sparse_matrix(table, bounds[0]) if self.schema.is_sparse else self._matrix(table, bounds)
        columns = (matrix, weights, evidence)
        return [self._leaf(start, stop, bounds[0], columns) for start, stop in pairwise(bounds)]

    def _matrix(self, table: pa.Table, bounds: Sequence[int]) -> Array:
        matrix = to_matrix(table, self.schema.columns, bounds[0], self.source.name, self.schema.categories)
        if matrix.shape[1] != self.schema.num_features:
            raise UserError(
                f"{self.source.name}: {matrix.shape[1]} features in rows {bounds[0]} to {bounds[-1] - 1}, but "
                f"{self.schema.num_features} in row 0"
            )
        return matrix

    def _sparse_matrix(self, table: pa.Table, first_row: int) -> Any:
        (name,), schema = self.schema.columns, self.schema
        if schema.text is not None:
            return to_counts(table.column(name), schema.text, schema.feature_names)
        return to_csr(table, name, schema.num_features, first_row, self.source.name)

    def _leaf(self, start: int, stop: int, first_row: int, columns: Sequence[Any]) -> Block:
        """The block of rows start..stop of the part; columns begin at first_row. Its tensors own their memory."""
        rows = torch.arange(start, stop)
        if self.part != "all" and self.config.validation_fraction > 0.0:
            held_out = Noise(self.seed, "validation").uniform_of_rows(rows) < self.config.validation_fraction
            rows = rows[held_out if self.part == "validation" else ~held_out]
        index = slice(start - first_row, stop - first_row) if len(rows) == stop - start else rows.numpy() - first_row
        matrix, *others = columns
        weights, evidence = (None if values is None else torch.from_numpy(np.array(values[index])) for values in others)
        if self.schema.is_sparse:
            return Block(as_matrix(matrix[index]), rows, weights, evidence)
        x = torch.from_numpy(np.array(matrix[index]))
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

    def _evidence(self, table: pa.Table, first_row: int) -> Array | None:
        """(N, num_latents)"""
        if not self.labels or not self.num_latents:
            return None
        label, name = self.config.label, self.source.name
        if isinstance(label, tuple):
            return soft_evidence(table, label, self.num_latents, first_row, name)
        assert label is not None
        return known_evidence(table.column(label), self.labels, self.num_latents, first_row, f"{name}: column '{label}'")


@dataclass(frozen=True)
class _PartLoader:
    load: _BlockLoader
    leaf_rows: int

    def __call__(self, bounds: Sequence[int]) -> list[list[Block]]:
        """One list of blocks a part, of the rows bounds[i] to bounds[i + 1]."""
        return [self.load([*range(start, stop, self.leaf_rows), stop]) for start, stop in pairwise(bounds)]
