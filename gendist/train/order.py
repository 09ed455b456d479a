"""Which rows the global batch of a step holds: a function of (seed, step).

The samples form one endless sequence: epoch after epoch a permutation of the training rows, by (seed, epoch). The global
batch of step s holds the positions s G up to (s + 1) G of it. Where each batch is to hold so many rows with a label, there
are two such sequences, of the rows with and of those without one, and their turns alternate as evenly as can be, so that every
micro-batch has its share of both.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from gendist.noise import Noise, derived_seed
from gendist.protocols import UserError

QUICKLY_SORTED = 2**12  # rows whose permutation is not worth keeping
SORTED_UP_TO = 2**20  # rows whose permutation is made as a whole, 8 bytes a row; beyond, each index is computed by itself
ROUNDS = 8


@dataclass(frozen=True, eq=False)
class Order:
    """
    num_rows             of the training rows
    seed                 of the permutations
    global_batch_size    G
    labelled_batch_size  how many of these have a label; None: as it comes
    labelled             (L,) the places of the rows that have one, where that is asked for
    """

    num_rows: int
    seed: int
    global_batch_size: int
    labelled_batch_size: int | None = None
    labelled: Tensor | None = None

    def __post_init__(self) -> None:
        if self.labelled_batch_size is None:
            return
        assert self.labelled is not None
        num_labelled = len(self.labelled)
        said = f"fit.labelled_batch_size is {self.labelled_batch_size} of {self.global_batch_size}"
        if num_labelled == 0:
            raise UserError(f"{said}, but no row has a label; name their column with data.label, or leave it out")
        if num_labelled == self.num_rows and self.labelled_batch_size < self.global_batch_size:
            raise UserError(f"{said}, but every row has a label; leave it out")

    def rows(self, step: int, positions: range) -> Tensor:
        """(B,) int64: the rows at these positions, 0 to G, of the step's global batch."""
        if self.labelled_batch_size is None:
            start = step * self.global_batch_size + positions.start
            return indices(self.num_rows, self.seed, start, len(positions))
        assert self.labelled is not None
        # Position p is a labelled one where p L / G passes an integer.
        before = np.arange(positions.start, positions.stop + 1) * self.labelled_batch_size // self.global_batch_size
        is_labelled = torch.from_numpy(np.diff(before) > 0)
        rows = torch.empty(len(positions), dtype=torch.int64)
        first = step * self.labelled_batch_size + int(before[0])
        rows[is_labelled] = self.labelled[self._turns("labelled", len(self.labelled), first, is_labelled)]
        first = step * (self.global_batch_size - self.labelled_batch_size) + positions.start - int(before[0])
        rows[~is_labelled] = self._unlabelled(
            self._turns("unlabelled", self.num_rows - len(self.labelled), first, ~is_labelled)
        )
        return rows

    def _turns(self, which: str, num_rows: int, first: int, are_theirs: Tensor) -> Tensor:
        """Whose turn it is, of the rows with or those without a label, at the positions that are theirs."""
        num_turns = int(are_theirs.sum())
        if num_turns == 0:
            return torch.empty(0, dtype=torch.int64)
        return indices(num_rows, derived_seed(self.seed, f"train.order.{which}"), first, num_turns)

    def _unlabelled(self, chosen: Tensor) -> Tensor:
        """The rows without a label with these numbers among them."""
        assert self.labelled is not None
        # Before the i-th labelled row stand labelled[i] - i rows without a label.
        return chosen + torch.searchsorted(self.labelled - torch.arange(len(self.labelled)), chosen, right=True)


def indices(num_rows: int, seed: int, start: int, num_samples: int) -> Tensor:
    """(num_samples,) int64: the row of each position from `start` on."""
    positions = np.arange(start, start + num_samples, dtype=np.int64)
    parts = []
    for epoch in range(start // num_rows, (start + num_samples - 1) // num_rows + 1):
        inside = positions[(positions >= epoch * num_rows) & (positions < (epoch + 1) * num_rows)] - epoch * num_rows
        parts.append(_permuted(num_rows, derived_seed(seed, f"train.order.{epoch}"), inside))
    return torch.from_numpy(np.concatenate(parts)) if parts else torch.empty(0, dtype=torch.int64)


def _permuted(num_rows: int, seed: int, places: np.ndarray) -> np.ndarray:
    """What stands at these places of the permutation that belongs to the seed."""
    if num_rows <= SORTED_UP_TO:
        make = _sorted_permutation if num_rows > QUICKLY_SORTED else _sorted_permutation.__wrapped__
        order: np.ndarray = make(num_rows, seed)[places]
        return order
    return _feistel_permutation(num_rows, seed, places)


@lru_cache(maxsize=4)  # a global batch may end one epoch and begin the next, of rows with a label and of the others
def _sorted_permutation(num_rows: int, seed: int) -> np.ndarray:
    return np.argsort(Noise(seed, "permutation").uniform(0, num_rows)[:, 0].numpy(), kind="stable")


def _feistel_permutation(num_rows: int, seed: int, places: np.ndarray) -> np.ndarray:
    """A Feistel network permutes the numbers of an even number of bits (Luby & Rackoff 1988); to stay within num_rows, it is
    applied until it comes back there, which keeps it a permutation (Black & Rogaway 2002, cycle walking)."""
    half = np.uint64((int(num_rows - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << int(half)) - 1)
    keys = np.frombuffer(hashlib.blake2b(f"{seed}/permutation".encode(), digest_size=8 * ROUNDS).digest(), dtype=np.uint64)
    values = places.astype(np.uint64)
    outside = np.ones(len(values), dtype=bool)
    while outside.any():
        left, right = values[outside] >> half, values[outside] & mask
        for key in keys:
            left, right = right, left ^ (_mixed(right ^ key) & mask)
        values[outside] = (left << half) | right
        outside = values >= num_rows
    return values.astype(np.int64)


def _mixed(values: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64 (Steele, Lea & Flood 2014): every bit of the result depends on every bit of the value."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
