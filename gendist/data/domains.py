"""Which values there are: what must be known of all rows before any of them becomes numbers. One pass, on any workers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gendist.blocks import Blocks, Leaves, reduce
from gendist.data.evidence import normalised
from gendist.data.matrix import as_texts
from gendist.data.sources import Source
from gendist.protocols import UserError

MAX_LABELS = 10_000
MAX_CATEGORIES = 10_000  # of a column: what has more is rather a name than a category
ROWS_PER_TASK = 1 << 20  # that are read at a time

MakeBlocks = Callable[[Callable[[Sequence[int]], list[Any]], Leaves, int, bool], Blocks[Any]]


@dataclass(frozen=True)
class Domains:
    """What some rows hold.

    labels      the distinct labels
    categories  the distinct values of each column of text
    """

    labels: frozenset[Any] = frozenset()
    categories: Mapping[str, frozenset[str]] = field(default_factory=dict)

    def merge(self, other: Domains) -> Domains:
        categories = {name: values | other.categories[name] for name, values in self.categories.items()}
        return Domains(self.labels | other.labels, categories)


@dataclass(frozen=True)
class Look:
    """What is to be looked for: the values of the label column, where there is one, and of columns of text."""

    source: Source
    label: str | None
    categories: Sequence[str]

    def over(self, make_blocks: MakeBlocks, leaves: Leaves) -> Domains:
        """UserError where a column holds nothing, or more different values than are allowed."""
        leaf_rows = leaves.bounds[1] - leaves.bounds[0]
        found = reduce(_same, make_blocks(self, leaves, max(1, ROWS_PER_TASK // leaf_rows), False), None)
        self._check(found)
        return found

    def __call__(self, bounds: Sequence[int]) -> list[Domains]:
        """One value for a whole run; the other leaves of the run add nothing to it."""
        columns = [*([self.label] if self.label else []), *self.categories]
        table = self.source.read(bounds[0], bounds[-1], list(dict.fromkeys(columns)))
        labels = normalised(table.column(self.label).unique()) if self.label else []
        categories = {name: _distinct_texts(table.column(name)) for name in self.categories}
        found = Domains(frozenset(label for label in labels if label is not None), categories)
        self._check_categories(found)  # before it is more than memory holds
        return [found]

    def _check(self, found: Domains) -> None:
        where = f"{self.source.name}: column '{self.label}'"
        if self.label and not found.labels:
            raise UserError(f"{where} holds no label in any row")
        if len(found.labels) > MAX_LABELS:
            raise UserError(f"{where} holds {len(found.labels):,} labels; up to {MAX_LABELS:,} are allowed")
        self._check_categories(found)
        for name, values in found.categories.items():
            if not values:
                raise UserError(f"{self.source.name}: column '{name}' holds no text in any row; leave it out with data.columns")

    def _check_categories(self, found: Domains) -> None:
        for name, values in found.categories.items():
            if len(values) > MAX_CATEGORIES:
                raise UserError(
                    f"{self.source.name}: column '{name}' holds more than {MAX_CATEGORIES:,} different texts, too many to be "
                    f"categories; leave it out with data.columns, or count its words with data.text.column={name}"
                )


def _distinct_texts(column: Any) -> frozenset[str]:
    return frozenset(text for text in as_texts(column).unique().to_pylist() if text is not None)


def _same(_: None, found: Domains) -> Domains:
    return found
