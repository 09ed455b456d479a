"""A data set, cut into blocks: which rows make which block, read by whoever needs them.

Legend: N rows, S sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch

from gendist.blocks import Blocks, Leaves
from gendist.blocks.leaves import pack, sequence_leaf_rows
from gendist.data.column_types import is_image
from gendist.data.decoded_images import DecodedImages
from gendist.data.domains import Look, MakeBlocks
from gendist.data.evidence import known_evidence, soft_evidence
from gendist.data.leaf_sequences import LeafSequences
from gendist.data.matrix import MAX_MAGNITUDE, as_intensities, decode_images, to_matrix
from gendist.data.schema import Schema
from gendist.data.sequence_source import SequenceSource
from gendist.data.sources import DataConfig, Source
from gendist.data.sparse import to_csr
from gendist.data.tokens import to_counts
from gendist.data.transforms import Transforms
from gendist.data.weightless import silenced
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
    decoded      where rows are images: those of them that were decoded before; None: they are decoded whenever they are read
    """

    source: Source
    config: DataConfig
    schema: Schema
    leaves: Leaves
    make_blocks: MakeBlocks
    labels: tuple[Any, ...] = ()
    transforms: Transforms | None = None
    decoded: DecodedImages | None = None

    @classmethod
    def open(
        cls, source: Source, config: DataConfig, schema: Schema, make_blocks: MakeBlocks, cuts_sequences: bool = True
    ) -> Dataset:
        """Look at all rows, once, for what is not known: labels, values of columns of text, features of sparse rows.

        cuts_sequences  False: a long sequence is not cut into pieces

        UserError where there are none, or too many.
        """
        leaves = schema.leaves(source.num_rows)
        dataset = cls(source, config, schema, leaves, make_blocks)
        if isinstance(source, SequenceSource):
            dataset = replace(dataset, leaves=Leaves.of_sequences(source.bounds, schema.num_features, cuts_sequences))
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
            found = look.over(make_blocks, leaves)
            schema = schema.completed(found, f"{source.name}: column '{schema.columns[0]}'")
            if look_for_labels:
                labels = tuple(sorted(found.labels, key=lambda label: (isinstance(label, str), label)))
        return replace(dataset, schema=schema, labels=labels)

    def decoding_once(self) -> Dataset:
        """The same, which keeps images that it has decoded for as long as this process lives."""
        are_images = [is_image(self.source.schema.field(name).type) for name in self.schema.columns]
        if are_images != [True] or self.schema.is_sequence:
            return self
        return replace(self, decoded=DecodedImages(self.source.num_rows, self.schema.num_features))

    def blocks(
        self,
        num_latents: int = 0,
        part: Part = "all",
        seed: int = 0,
        keep: bool = True,
        unlabelled_weight: float = 1.0,
    ) -> Blocks[Block]:
        """The rows of one part as blocks. The parts are told apart by seed and row number alone, or the number of the sequence.

        num_latents        the width of the evidence that labels become
        keep               whether to hold on to the blocks for more than one pass, if `data.cache` allows it
        unlabelled_weight  what multiplies the weight of a row whose label is not known, or of a sequence without any label
        """
        keep = keep and self.config.cache == "memory"
        load = self._loader(num_latents, part, seed, unlabelled_weight)
        leaf_rows = self.leaves.max_leaf_rows
        leaf_bytes = self._x_bytes(leaf_rows) + 8 * leaf_rows * (num_latents if self.labels else 0)
        most = MAX_RUN_BYTES if keep else MAX_PASSING_BYTES
        return self.make_blocks(load, self.leaves, max(1, most // leaf_bytes), keep)

    def parts(self, parts: Leaves) -> Blocks[Sequence[Block]]:
        """All rows for one pass, in parts that begin and end with leaves: each is the list of its blocks, one a leaf, with the
        evidence of a class where there are labels."""
        return self.make_blocks(
            _PartLoader(self._loader(len(self.labels), "all", 0), self.leaves.max_leaf_rows), parts, 1, False
        )

    def sequence_parts(self, parts: Leaves) -> Blocks[tuple[int, Sequence[Block]]]:
        """All sequences for one pass, in parts: each is the number of its first sequence, and the list of its blocks, of whole
        sequences.

        parts  in numbers of sequences, not of rows
        """
        assert isinstance(self.source, SequenceSource)
        most = sequence_leaf_rows(self.source.num_rows, self.schema.num_features)
        loader = _SequencePartLoader(self._loader(0, "all", 0), self.source.bounds, most)
        return self.make_blocks(loader, parts, 1, False)

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
            self.decoded,
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
    decoded: DecodedImages | None

    def __call__(self, bounds: Sequence[int]) -> list[Block]:
        """One block a leaf, of the rows bounds[i] to bounds[i + 1] that belong to the part."""
        if not isinstance(self.source, SequenceSource):
            return self.blocks(bounds, [None] * (len(bounds) - 1))
        return self.blocks(bounds, [LeafSequences.of_rows(self.source.bounds, *leaf) for leaf in pairwise(bounds)])

    def blocks(self, bounds: Sequence[int], sequences: Sequence[LeafSequences | None]) -> list[Block]:
        """The same, of leaves whose sequences are known."""
        # Leaves of empty sequences have no row, but a row says how wide they are.
        first = min(bounds[0], self.source.num_rows - 1)
        stop = max(bounds[-1], first + 1)
        extra = [name for name in (*self.config.label_columns, self.config.weight) if name is not None]
        pixels = None if self.decoded is None else self.decoded.get(first, stop)
        columns = list(dict.fromkeys([*(self.schema.columns if pixels is None else ()), *extra]))
        table = self.source.read(first, stop, columns) if columns else pa.table({})
        weights, evidence = self._weights(table, first), self._evidence(table, first)
        if weights is not None and isinstance(self.source, SequenceSource):
            self._check_one_weight_each(self.source.bounds, weights, first)
        if evidence is not None and self.unlabelled_weight != 1.0:
            factors = np.where(self._is_labelled(evidence, first), 1.0, self.unlabelled_weight)
            weights = factors if weights is None else weights * factors
        if pixels is not None:
            matrix: Any = as_intensities(pixels)
        else:
            matrix = self._sparse_matrix(table, first) if self.schema.is_sparse else self._matrix(table, first, stop)
        values = (matrix, weights, evidence)
        leaves = zip(pairwise(bounds), sequences, strict=True)
        return [self._leaf(start, stop, first, values, own) for (start, stop), own in leaves]

    def _matrix(self, table: pa.Table, start: int, stop: int) -> Array:
        image_shape = None if self.schema.is_sequence else self.schema.image_shape
        if self.decoded is not None:
            return self._intensities(table.column(self.schema.columns[0]), start, self.decoded)
        matrix = to_matrix(table, self.schema.columns, start, self.source.name, self.schema.categories, image_shape)
        if matrix.shape[1] != self.schema.num_features:
            raise UserError(
                f"{self.source.name}: {matrix.shape[1]} features in rows {start} to {stop - 1}, but "
                f"{self.schema.num_features} in row 0"
            )
        return matrix

    def _intensities(self, column: pa.ChunkedArray, start: int, decoded: DecodedImages) -> Array:
        """(N, D) 0..1, the pixels of images, which are kept."""
        where = f"{self.source.name}: column '{self.schema.columns[0]}'"
        pixels = decode_images(column, where, start, self.schema.image_shape)
        if pixels.dtype == np.uint8:
            decoded.put(start, pixels)
        return as_intensities(pixels)

    def _sparse_matrix(self, table: pa.Table, first_row: int) -> Any:
        (name,), schema = self.schema.columns, self.schema
        if schema.text is not None:
            return to_counts(table.column(name), schema.text, schema.feature_names)
        return to_csr(table, name, schema.num_features, first_row, self.source.name)

    def _leaf(self, start: int, stop: int, first_row: int, columns: Sequence[Any], sequences: LeafSequences | None) -> Block:
        """The block of rows start..stop of the part; columns begin at first_row. Its tensors own their memory."""
        rows = torch.arange(start, stop)
        if self.part != "all" and self.config.validation_fraction > 0.0:
            # A sequence is held out whole, by its number.
            drawn = rows if sequences is None else torch.from_numpy(sequences.numbers)
            held_out = self._is_held_out(drawn)
            keep = held_out if self.part == "validation" else ~held_out
            rows = rows[keep if sequences is None else torch.from_numpy(sequences.row_flags(keep.numpy()))]
            sequences = sequences and sequences.kept(keep.numpy())
        index = slice(start - first_row, stop - first_row) if len(rows) == stop - start else rows.numpy() - first_row
        matrix, *others = columns
        weights, evidence = (None if values is None else torch.from_numpy(np.array(values[index])) for values in others)
        if self.schema.is_sparse:
            counted = matrix[index]
            if weights is not None and bool((weights == 0).any()):
                counted = counted.multiply((weights > 0).numpy()[:, None]).tocsr()
            return Block(as_matrix(counted), rows, weights, evidence)
        x = torch.from_numpy(np.array(matrix[index]))
        missing = x.isnan()
        x.masked_fill_(missing, 0.0)
        if weights is not None:
            x, missing = silenced(x, weights, missing)
        block = Block(
            x=x,
            rows=rows,
            weights=weights,
            evidence=evidence,
            missing=missing if bool(missing.any()) else None,
            sequence_bounds=None if sequences is None else torch.from_numpy(sequences.bounds),
            open_ends=(0, 0) if sequences is None else sequences.open_ends,
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

    def _check_one_weight_each(self, bounds: Any, weights_N: Array, first_row: int) -> None:
        """UserError where the weight of a sequence changes from a step to the next."""
        assert self.config.weight is not None
        if bounds[np.searchsorted(bounds, first_row)] != first_row:  # the step before is in another leaf
            before = self._weights(self.source.read(first_row - 1, first_row, [self.config.weight]), first_row - 1)
            weights_N, first_row = np.concatenate([before, weights_N]), first_row - 1
        changed = np.flatnonzero(np.diff(weights_N)) + first_row + 1
        within = changed[bounds[np.searchsorted(bounds, changed)] != changed]
        if len(within):
            row = int(within[0])
            raise UserError(
                f"{self.source.name}: column '{self.config.weight}' is {weights_N[row - first_row]:g} in row {row}, and "
                f"{weights_N[row - first_row - 1]:g} in the step before; a weight is that of a whole sequence: make them equal"
            )

    def _is_labelled(self, evidence_NL: Array, first_row: int) -> Any:
        """(N,) bool: whether the label of a row is known, or of any step of its sequence."""
        labelled_N = is_labelled(evidence_NL)
        if not isinstance(self.source, SequenceSource):
            return labelled_N
        bounds, stop = self.source.bounds, first_row + len(labelled_N)
        first, last = np.searchsorted(bounds, [first_row, stop - 1], side="right") - 1
        own = bounds[first : last + 2].clip(first_row, stop) - first_row
        count_N = np.concatenate([[0], np.cumsum(labelled_N)])
        is_labelled_S = count_N[own[1:]] > count_N[own[:-1]]
        for s in {first, last}:
            start, end = int(bounds[s]), int(bounds[s + 1])
            if start < first_row or end > stop:  # other steps of it are in other leaves
                evidence = self._evidence(self.source.read(start, end, self.config.label_columns), start)
                is_labelled_S[s - first] = is_labelled(evidence).any()
        return np.repeat(is_labelled_S, np.diff(own))

    def _evidence(self, table: pa.Table, first_row: int) -> Array | None:
        """(N, num_latents)"""
        if not self.labels or not self.num_latents:
            return None
        label, name = self.config.label, self.source.name
        if isinstance(label, tuple):
            evidence = soft_evidence(table, label, self.num_latents, first_row, name)
        else:
            assert label is not None
            evidence = known_evidence(
                table.column(label), self.labels, self.num_latents, first_row, f"{name}: column '{label}'"
            )
        if self.config.label_fraction < 1.0:
            evidence[~self._keep_their_labels(np.arange(first_row, first_row + len(evidence)))] = 0.0
        return evidence

    def _keep_their_labels(self, rows: Any) -> Any:
        """(N,) bool: the share that does, and all that are held out. A sequence does as a whole."""
        numbers = np.searchsorted(self.source.bounds, rows, "right") - 1 if isinstance(self.source, SequenceSource) else rows
        distinct, which = np.unique(numbers, return_inverse=True)
        drawn = torch.from_numpy(distinct)
        keeps = Noise(self.seed, "labels").uniform_of_rows(drawn) < self.config.label_fraction
        return (keeps if self.part == "all" else keeps | self._is_held_out(drawn)).numpy()[which]

    def _is_held_out(self, numbers: torch.Tensor) -> torch.Tensor:
        """(N,) bool, of rows, or of sequences, which are held out whole."""
        return Noise(self.seed, "validation").uniform_of_rows(numbers) < self.config.validation_fraction


@dataclass(frozen=True)
class _PartLoader:
    load: _BlockLoader
    leaf_rows: int

    def __call__(self, bounds: Sequence[int]) -> list[list[Block]]:
        """One list of blocks a part, of the rows bounds[i] to bounds[i + 1]."""
        return [self.load([*range(start, stop, self.leaf_rows), stop]) for start, stop in pairwise(bounds)]


@dataclass(frozen=True)
class _SequencePartLoader:
    """bounds: of all sequences. leaf_rows: as many as a block may have, unless it has one sequence alone."""

    load: _BlockLoader
    bounds: Any
    leaf_rows: int

    def __call__(self, parts: Sequence[int]) -> list[tuple[int, list[Block]]]:
        """Of each part, which is the sequences parts[i] to parts[i + 1], the first of them and its blocks."""
        return [(first, self._part(first, last)) for first, last in pairwise(parts)]

    def _part(self, first: int, last: int) -> list[Block]:
        cuts = (first + pack(self.bounds[first : last + 1], self.leaf_rows)).tolist()
        sequences = [LeafSequences.whole(self.bounds, *leaf) for leaf in pairwise(cuts)]
        return self.load.blocks(self.bounds[cuts].tolist(), sequences)
