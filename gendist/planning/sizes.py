"""How many rows and features a spec's data have: as the files' own metadata say, or as whoever plans says."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import numpy as np
import torch

from gendist.blocks import Leaves, LocalBlocks
from gendist.config import Spec, is_trained
from gendist.data import Dataset, Schema, as_rows, as_sequences, open_source
from gendist.data.schema import Takes
from gendist.data.sequence_source import SequenceSource
from gendist.protocols import Block, Feature, UserError, csr_from_arrays

MAX_LOOK_ROWS = 1_000_000  # that are looked at for labels, categories and tokens, where nobody says how many there are
NUM_CATEGORIES = 50  # of a column of texts
ENTRIES_PER_ROW = 100  # of sparse rows
SEQUENCE_LENGTH = 100


@dataclass(frozen=True)
class Sizes:
    """
    num_rows    0: nobody knows, and nothing depends on it
    x_shape     of a row behind the transforms: an image's, or (D,)
    length      the mean length of sequences; 0 where rows are independent
    assumed     lines about what nobody said
    """

    num_rows: int
    features: tuple[Feature, ...]
    x_shape: tuple[int, ...]
    leaves: Leaves
    labels: tuple[Any, ...] = ()
    length: int = 0
    is_sparse: bool = False
    assumed: list[str] = field(default_factory=list)

    @property
    def num_features(self) -> int:
        return len(self.features)

    @property
    def row_bytes(self) -> float:
        return 16.0 * ENTRIES_PER_ROW if self.is_sparse else 8.0 * (self.num_features + 1)

    @property
    def is_cut(self) -> bool:
        """Whether sequences are longer than a leaf."""
        return self.length > self.leaves.max_leaf_rows

    def trial_blocks(self, number: int, num_rows: int, kind: str) -> list[Block]:
        """Leaves of noise, of such a shape. kind: "normal" numbers, or whole ones, "categories", from 0 on."""
        generator = torch.Generator().manual_seed(0)
        make = self._sparse if self.is_sparse else self._dense
        bounds = torch.tensor([*range(0, num_rows, self.length), num_rows]) if self.length else None
        return [
            Block(
                make(num_rows, kind, generator),
                torch.arange(index * num_rows, (index + 1) * num_rows),
                sequence_bounds=bounds,
                open_ends=(index * num_rows, (number - 1 - index) * num_rows) if self.is_cut else (0, 0),
            )
            for index in range(number)
        ]

    def _sparse(self, num_rows: int, kind: str, generator: torch.Generator) -> torch.Tensor:
        entries = min(ENTRIES_PER_ROW, self.num_features)
        apart = self.num_features // entries
        columns = torch.randint(apart, (num_rows, entries), generator=generator) + torch.arange(entries) * apart
        ends, ones = np.arange(num_rows + 1) * entries, np.ones(num_rows * entries)
        return csr_from_arrays(ends, columns.flatten().numpy(), ones, (num_rows, self.num_features))

    def _dense(self, num_rows: int, kind: str, generator: torch.Generator) -> torch.Tensor:
        x = torch.randn(num_rows, self.num_features, generator=generator, dtype=torch.float64)
        for d, feature in enumerate(self.features):
            if kind == "categories" or feature.type != "real":
                x[:, d] = torch.randint(feature.num_categories or 2, (num_rows,), generator=generator).double()
        return x


def sizes_of(spec: Spec, family: Any, num_rows: int | None, num_features: int | None) -> Sizes:
    """What is said goes before what is found; UserError where neither tells."""
    data, cuts = spec.data, getattr(family, "cuts_sequences", True)
    takes_sequences = getattr(family, "takes_sequences", False)
    labels = data.labels or (data.label if isinstance(data.label, tuple) else ())
    assumed: list[str] = []
    try:
        source = (as_sequences if takes_sequences else as_rows)(open_source(data), data)
        schema = Schema.of(source, data, Takes.of(family))
    except UserError as error:
        shape = data.image_shape
        width = num_features or (prod(shape[1:] if takes_sequences else shape) if shape else None)
        if num_rows is None and is_trained(family):
            num_rows = 0  # a step does not depend on how many there are
        if num_rows is None or width is None:
            raise UserError(f"{error}; without the data say how large they are: --rows and --features") from None
        length = min(num_rows, shape[0] if shape else SEQUENCE_LENGTH) if takes_sequences else 0
        if length:
            assumed.append(f"sequences of {length} steps")
        leaves = _sequence_leaves(num_rows, length, width, cuts) if length else Leaves.of_shape(num_rows, width)
        x_shape = shape if shape and not num_features else (width,)
        return Sizes(num_rows, _numbered(width), x_shape, leaves, labels, length, assumed=assumed)

    unknown = schema.columns_to_survey or schema.needs_features or (data.label is not None and not labels)
    if unknown and num_features is None and source.num_rows <= MAX_LOOK_ROWS:
        dataset = Dataset.open(source, data, schema, LocalBlocks, cuts)
        schema, labels = dataset.schema, dataset.labels
    if schema.needs_features and num_features is None:
        raise UserError(f"{source.name}: how many features its texts have takes a pass over them to tell: say --features")
    features = _numbered(num_features or 0) if schema.needs_features else schema.features
    if any(feature.type == "category" and not feature.num_categories for feature in features):
        assumed.append(f"{NUM_CATEGORIES} categories in each column of texts")
        features = tuple(
            replace(f, num_categories=f.num_categories or NUM_CATEGORIES * (f.type == "category")) for f in features
        )
    if schema.is_sparse:
        assumed.append(f"{ENTRIES_PER_ROW} entries in each sparse row")
    for pca in (step.pca for step in data.transforms if step.pca is not None):
        if not isinstance(pca.num_components, int):
            raise UserError("data.transforms: how many columns pca leaves depends on the data; plan with a whole number")
        features = _numbered(pca.num_components)

    rows, length = num_rows or source.num_rows, 0
    leaves = Leaves.of_sparse_rows(rows) if schema.is_sparse else Leaves.of_shape(rows, len(features))
    if isinstance(source, SequenceSource):
        length = round(source.num_rows / source.num_sequences)
        leaves = _sequence_leaves(rows, length, len(features), cuts)
        if num_rows is None:
            leaves = Leaves.of_sequences(source.bounds, len(features), cuts)
    x_shape = (not data.transforms and schema.image_shape) or (len(features),)
    return Sizes(rows, features, x_shape, leaves, labels, length, schema.is_sparse, assumed)


def _numbered(number: int) -> tuple[Feature, ...]:
    return tuple(Feature(f"x_{d}", f"x_{d}") for d in range(number))


def _sequence_leaves(num_rows: int, length: int, num_features: int, cuts: bool) -> Leaves:
    """Of sequences that are all as long."""
    return Leaves.of_sequences(np.array([*range(0, num_rows, length), num_rows]), num_features, cuts)
