"""Which values there are: what must be known of all rows before any of them becomes numbers. One pass, on any workers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gendist.blocks import Blocks, Leaves, reduce
from gendist.data.column_types import as_texts
from gendist.data.evidence import normalised
from gendist.data.sources import Source
from gendist.data.sparse import widest
from gendist.data.tokens import TextConfig, count_tokens
from gendist.protocols import UserError

MAX_LABELS = 10_000
MAX_CATEGORIES = 10_000  # of a column: what has more is rather a name than a category
FEW_ENTRIES, MANY_ENTRIES = 1 << 20, 1 << 16  # rows that are read at a time, of one entry a column or of whole texts

MakeBlocks = Callable[[Callable[[Sequence[int]], list[Any]], Leaves, int, bool], Blocks[Any]]


@dataclass(frozen=True)
class Domains:
    """What some rows hold.

    labels      the distinct labels
    categories  the distinct values of each column of text
    tokens      how often each token occurs
    width       the number of features that sparse rows say, or need
    """

    labels: frozenset[Any] = frozenset()
    categories: Mapping[str, frozenset[str]] = field(default_factory=dict)
    tokens: Counter[str] = field(default_factory=Counter)
    width: int = 0

    def merge(self, other: Domains) -> Domains:
        categories = {name: values | other.categories[name] for name, values in self.categories.items()}
        return Domains(self.labels | other.labels, categories, self.tokens + other.tokens, max(self.width, other.width))


@dataclass(frozen=True)
class Look:
    """What is to be looked for.

    label       the column of labels
    categories  columns of text
    text        whose tokens are features
    sparse      the column of sparse rows
    """

    source: Source
    label: str | None = None
    categories: Sequence[str] = ()
    text: TextConfig | None = None
    sparse: str | None = None

    @property
    def columns(self) -> list[str]:
        named = (self.label, *self.categories, self.text.column if self.text else None, self.sparse)
        return list(dict.fromkeys(name for name in named if name is not None))

    def over(self, make_blocks: MakeBlocks, leaves: Leaves) -> Domains:
        """UserError where a column holds nothing, or more different values than are allowed."""
        leaf_rows = leaves.max_leaf_rows
        rows_at_once = MANY_ENTRIES if self.text or self.sparse else FEW_ENTRIES
        found = reduce(_same, make_blocks(self, leaves, max(1, rows_at_once // leaf_rows), False), None)
        self._check(found)
        return found

    def __call__(self, bounds: Sequence[int]) -> list[Domains]:
        """One value for a whole run; the other leaves of the run add nothing to it."""
        table = self.source.read(bounds[0], bounds[-1], self.columns)
        where = f"{self.source.name}: column"
        labels = normalised(table.column(self.label).unique(), f"{where} '{self.label}'") if self.label else []
        categories = {name: _distinct_texts(table.column(name)) for name in self.categories}
        tokens = count_tokens(table.column(self.text.column), self.text) if self.text else Counter()
        width = widest(table.column(self.sparse), bounds[0], f"{where} '{self.sparse}'") if self.sparse else 0
        found = Domains(frozenset(label for label in labels if label is not None), categories, tokens, width)
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
