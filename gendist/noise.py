"""Random numbers that have addresses: each is a function of (seed, purpose, position) and of nothing else.

The position is a row number in sampling and initialisation, so the same rows get the same numbers in one process, in any
task and behind any server. Philox (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") encrypts a counter
with a key: the key is the seed and the purpose, the counter the position. Each row takes a whole number of counters, so
no row's numbers depend on how many rows are drawn at once.
"""

from __future__ import annotations

import hashlib
import threading
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gendist.protocols import UserError

VERSION = 1  # of the scheme; kept in artifacts, since another scheme gives other samples for the same seed

WORDS_PER_COUNTER = 4
MAX_SEED = 2**64 - 1


def derived_seed(seed: int, purpose: str) -> int:
    """A seed for what is to be done once more and otherwise: as far from `seed` as from that of any other purpose."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=8).digest(), "little")


class _Generators(threading.local):
    """A Philox generator for each thread, which is set to a key and a counter: to make one takes longer than a small draw."""

    def __init__(self) -> None:
        self._philox = np.random.Philox(key=0)
        self._state: Any = self._philox.state

    def at(self, key: np.ndarray[Any, Any], counter: int) -> np.random.Philox:
        self._state["state"]["key"][:] = key
        self._state["state"]["counter"][:] = [(counter >> shift) & MAX_SEED for shift in (0, 64, 128, 192)]
        self._state["buffer_pos"] = WORDS_PER_COUNTER  # nothing is left of an earlier counter
        self._philox.state = self._state
        return self._philox


_generators = _Generators()


@dataclass(frozen=True)
class Noise:
    """The numbers that belong to a seed (0 to 2^64 - 1) and a purpose, such as "sample.component"."""

    seed: int
    purpose: str

    def __post_init__(self) -> None:
        if not 0 <= self.seed <= MAX_SEED:
            raise UserError(f"seed {self.seed}; allowed are 0 to 2^64 - 1")

    @cached_property
    def _key(self) -> np.ndarray[Any, Any]:
        digest = hashlib.blake2b(f"{self.seed}/{self.purpose}".encode(), digest_size=16).digest()
        return np.frombuffer(digest, dtype=np.uint64)

    def uniform(self, start: int, num_rows: int, width: int = 1) -> Tensor:
        """(num_rows, width) float64, uniform between 0 and 1, both excluded, for the rows from `start` on."""
        if start < 0 or num_rows < 0:
            raise UserError(f"{num_rows} rows from {start} on; both must be 0 or more")
        counters_per_row = -(-width // WORDS_PER_COUNTER)
        words_per_row = counters_per_row * WORDS_PER_COUNTER
        generator = _generators.at(self._key, start * counters_per_row)
        words = generator.random_raw(num_rows * words_per_row).reshape(num_rows, words_per_row)[:, :width]
        words >>= np.uint64(12)
        # The middle of one of 2^52 equal parts of the unit interval, which float64 holds exactly.
        middles = torch.from_numpy(words.astype(np.float64))
        return middles.add_(0.5).mul_(2.0**-52)

    def normal(self, start: int, num_rows: int, width: int = 1) -> Tensor:
        """(num_rows, width) float64, standard normal (Box & Muller 1958), for the rows from `start` on."""
        pairs = -(-width // 2)
        uniform = self.uniform(start, num_rows, 2 * pairs)
        radius = uniform[:, :pairs].log().mul_(-2.0).sqrt_()
        angle = uniform[:, pairs:] * (2.0 * torch.pi)
        normal = torch.empty(num_rows, width, dtype=torch.float64)
        torch.mul(radius, angle.cos(), out=normal[:, :pairs])
        torch.mul(radius[:, : width - pairs], angle[:, : width - pairs].sin(), out=normal[:, pairs:])
        return normal

    def uniform_of_rows(self, rows: Tensor) -> Tensor:
        """(N,) the uniform number of each of these ascending row numbers."""
        return self.uniforms_of_rows(rows, 1)[:, 0]

    def uniforms_of_rows(self, rows: Tensor, width: int) -> Tensor:
        """(N, width) the uniform numbers of each of these ascending row numbers."""
        if len(rows) == 0:
            return torch.empty(0, width, dtype=torch.float64)
        first, last = int(rows[0]), int(rows[-1])
        return self.uniform(first, last - first + 1, width)[rows - first]
