"""What an E-step of a chain keeps, and how the pieces of a sequence that lies in several blocks learn of each other.

Legend: K states, S segments.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor

from gendist.models.ops.chain import ChainStatistics, Messages


@dataclass(frozen=True, eq=False)
class Piece:
    """A piece of a sequence that lies in several blocks.

    first_row      the number of its first row
    log_transfers  (segments, K, K) log p(x of a segment, its last state = j | the state before it = i)
    begins         whether the sequence does so with it
    """

    first_row: int
    log_transfers: Tensor
    begins: bool
    weight: float


@dataclass(frozen=True, eq=False)
class HiddenMarkovStatistics:
    """What an E-step keeps.

    log_likelihood_of_whole  of sequences that lie in one block, and of pieces that know of each other
    pieces                   of the others, in order
    num_sequences            that begin, of any weight
    num_unknown              steps of positive weight whose state was guessed
    """

    log_likelihood_of_whole: float
    chain: ChainStatistics
    emission: Any
    pieces: tuple[Piece, ...] = ()
    num_sequences: int = 0
    num_steps: int = 0
    num_unknown: int = 0

    @property
    def initial(self) -> Tensor:
        return self.chain.initial

    @property
    def transitions(self) -> Tensor:
        return self.chain.transitions

    @property
    def log_likelihood(self) -> float:
        of_pieces = [pieces[0].weight * log_prob for pieces, _, log_prob in self.joined]
        return sum(of_pieces, self.log_likelihood_of_whole)

    @cached_property
    def joined(self) -> list[tuple[list[Piece], Messages, float]]:
        """The pieces of each sequence, the messages to their segments, and its log p."""
        return [
            (pieces, *Messages.between(torch.cat([each.log_transfers for each in pieces]))) for pieces in self.cut_sequences
        ]

    @property
    def cut_sequences(self) -> list[list[Piece]]:
        """The pieces of each sequence."""
        sequences: list[list[Piece]] = []
        for piece in self.pieces:
            if piece.begins or not sequences:
                sequences.append([])
            sequences[-1].append(piece)
        return sequences

    def merge(self, other: HiddenMarkovStatistics) -> HiddenMarkovStatistics:
        return HiddenMarkovStatistics(
            self.log_likelihood_of_whole + other.log_likelihood_of_whole,
            self.chain.merge(other.chain),
            self.emission.merge(other.emission),
            self.pieces + other.pieces,
            self.num_sequences + other.num_sequences,
            self.num_steps + other.num_steps,
            self.num_unknown + other.num_unknown,
        )


@dataclass(frozen=True, eq=False)
class Relay:
    """What a second pass over pieces of sequences knows of the first.

    messages  of each piece, by its first row
    found     the statistics of all other sequences, which are added where the first piece lies; None: find them again
    """

    messages: Mapping[int, Messages]
    found: HiddenMarkovStatistics | None

    @classmethod
    def of(cls, statistics: HiddenMarkovStatistics) -> Self:
        """From a first pass, whose pieces yielded their transfers."""
        found: dict[int, Messages] = {}
        for pieces, messages, _ in statistics.joined:
            sizes = [len(piece.log_transfers) for piece in pieces]
            parts = zip(pieces, messages.before.split(sizes), messages.after.split(sizes), strict=True)
            found |= {piece.first_row: Messages(before_SK, after_SK) for piece, before_SK, after_SK in parts}
        return cls(found, replace(statistics, pieces=()))
