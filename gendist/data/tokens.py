"""The tokens of texts, and texts as sparse counts of them: data.text."""

from __future__ import annotations

import hashlib
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, field_validator

from gendist.data.column_types import entry_type, is_list, is_text
from gendist.data.sparse import csr_rows
from gendist.protocols import UserError

TOKEN = r"(?u)\b\w\w+\b"  # scikit-learn's: two and more letters, digits or underlines


class TextConfig(BaseModel):
    """The `data.text:` block: a column whose tokens are counted, one feature a token; of a family of sequences, a column of
    which each text is the sequence of its tokens.

    column          of texts, or of lists of tokens, which are taken as they are
    max_vocabulary  the most frequent tokens that are kept; of equally frequent ones the first in the alphabet
    min_count       how often a token must occur in all rows
    hash_buckets    0, or as many features, which tokens are dealt to by a hash: without a vocabulary, of which a pass over
                    all rows would have to hold every token, and without names that say which token was counted
    lowercase       whether texts are written small
    pattern         a regular expression: its matches in a text are the tokens. Where left out, two and more letters, digits or
                    underlines are one
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    column: str
    max_vocabulary: int = Field(default=50_000, ge=1)
    min_count: int = Field(default=1, ge=1)
    hash_buckets: int = Field(default=0, ge=0, le=2**24)
    lowercase: bool = True
    pattern: str = TOKEN

    @field_validator("pattern")
    @classmethod
    def _matches_something(cls, pattern: str) -> str:
        try:
            expression = re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{pattern!r} is no regular expression ({error})") from error
        if expression.search("") is not None:
            raise ValueError(f"{pattern!r} matches where there is nothing; a token has one letter at least")
        return pattern


def holds_tokens(type_: pa.DataType) -> bool:
    """Texts, or lists of them; a column that is missing throughout may have been either."""
    return is_text(type_) or (is_list(type_) and is_text(entry_type(type_))) or bool(pa.types.is_null(type_))


def tokens_of(column: Any, config: TextConfig) -> Iterator[list[str]]:
    """The tokens of each row: none where it is missing."""
    if is_list(column.type):
        for tokens in column.to_pylist():
            yield [token for token in tokens or () if token is not None]
        return
    expression = re.compile(config.pattern)
    for text in column.to_pylist():
        # Not by findall, which of an expression with groups returns these.
        tokens = [match[0] for match in expression.finditer(text.lower() if config.lowercase else text)] if text else []
        if "" in tokens:
            raise UserError(
                f"data.text.pattern: {config.pattern!r} matches no letter in {text[:40]!r}; a token has one letter at least"
            )
        yield tokens


def count_tokens(column: Any, config: TextConfig) -> Counter[str]:
    counts: Counter[str] = Counter()
    for tokens in tokens_of(column, config):
        counts.update(tokens)
    return counts


def vocabulary(counts: Mapping[str, int], config: TextConfig, where: str) -> tuple[str, ...]:
    """The tokens that are features, in the order of the alphabet."""
    frequent = [token for token, count in counts.items() if count >= config.min_count]
    if not frequent:
        raise UserError(
            f"{where} has no token that occurs {config.min_count} times in all rows"
            + (
                f" (of {len(counts):,}); lower data.text.min_count"
                if counts
                else f"; a token of a text is what data.text.pattern matches ({config.pattern})"
            )
        )
    return tuple(sorted(sorted(frequent, key=lambda token: (-counts[token], token))[: config.max_vocabulary]))


def bucket(token: str, num_buckets: int) -> int:
    """The same on every machine and in every process."""
    digest = hashlib.blake2b(token.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") % num_buckets


def feature_of(config: TextConfig, feature_names: Iterable[str]) -> Callable[[str], int | None]:
    """token -> the index of its feature; None where it has none."""
    if not config.hash_buckets:
        return {name: index for index, name in enumerate(feature_names)}.get
    known: dict[str, int] = {}  # a token comes more than once

    def index_of(token: str) -> int:
        if token not in known:
            known[token] = bucket(token, config.hash_buckets)
        return known[token]

    return index_of


def to_counts(column: Any, config: TextConfig, feature_names: tuple[str, ...]) -> Any:
    """(N, D) csr_array: how often each row has each token."""
    index_of = feature_of(config, feature_names)
    lengths: list[int] = []
    columns = array("q")
    for tokens in tokens_of(column, config):
        before = len(columns)
        columns.extend([index for token in tokens if (index := index_of(token)) is not None])
        lengths.append(len(columns) - before)
    rows = np.repeat(np.arange(len(lengths)), lengths)
    shape = (len(column), len(feature_names))
    return csr_rows(rows, np.array(columns, dtype=np.int64), np.ones(len(rows)), shape)
