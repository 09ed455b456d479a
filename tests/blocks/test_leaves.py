"""Leaves of sequences: every sequence once and in order, whole or in equal pieces, as a function of the lengths alone."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from gendist.blocks import Leaves
from gendist.blocks import leaves as leaves_module
from gendist.blocks.leaves import pack, sequence_leaf_rows
from gendist.data.leaf_sequences import LeafSequences

RNG = np.random.default_rng(0)


def bounds_of(lengths) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def ragged() -> list[np.ndarray]:
    """Bounds of sequences of many shapes, a good deal of them empty."""
    made = [
        bounds_of(RNG.integers(0, longest, size) * (RNG.random(size) < share))
        for size in (1, 2, 5, 30)
        for longest in (2, 6, 40, 150)
        for share in (0.3, 0.6, 1.0)
        for _ in range(10)
    ]
    return [bounds for bounds in made if bounds[-1] > 0]


@pytest.mark.parametrize("cut", [True, False])
def test_every_sequence_is_there_once_and_in_order(monkeypatch, cut):
    monkeypatch.setattr(leaves_module, "MIN_SEQUENCE_LEAF_ROWS", 16)
    num_cut = 0
    for bounds in ragged():
        most = sequence_leaf_rows(int(bounds[-1]), 3)
        leaves = Leaves.of_sequences(bounds, 3, cut)
        assert (leaves.bounds[0], leaves.bounds[-1]) == (0, bounds[-1])
        begun, lengths = [], np.zeros(len(bounds) - 1, dtype=int)
        for start, stop in pairwise(leaves.bounds):
            own = LeafSequences.of_rows(bounds, start, stop)
            assert own.bounds[-1] == stop - start
            assert len(own.bounds) == len(own.numbers) + 1
            assert stop - start <= most or (not cut and len(own.numbers[np.diff(own.bounds) > 0]) == 1)
            if any(own.open_ends):
                assert cut
                assert len(own.numbers) == 1, "a piece is alone in its leaf"
                num_cut += 1
            inside = LeafSequences.of_rows(bounds, start, stop).open_ends
            assert inside == ((start - bounds[own.numbers[0]], bounds[own.numbers[0] + 1] - stop) if any(inside) else (0, 0))
            begun += own.numbers[own.open_ends[0] > 0 :].tolist()
            np.add.at(lengths, own.numbers, np.diff(own.bounds))
        assert begun == list(range(len(bounds) - 1))
        np.testing.assert_array_equal(lengths, np.diff(bounds))
    assert cut == (num_cut > 100)


def test_a_long_sequence_is_cut_into_equal_pieces_whatever_lies_about_it():
    for before, after in (([], []), ([5, 0, 7], [3]), ([0], [0, 0])):
        leaves = Leaves.of_sequences(bounds_of([*before, 1_000_000, *after]), 2)
        first = sum(before)
        pieces = np.diff([row for row in leaves.bounds if first <= row <= first + 1_000_000])
        pieces = pieces[pieces > 0]
        assert len(pieces) == 8
        assert pieces.sum() == 1_000_000
        assert pieces.max() - pieces.min() <= 1


def test_small_data_are_few_leaves_and_wide_rows_small_ones():
    equal = bounds_of([100] * 10_000)
    assert 8 <= Leaves.of_sequences(equal, 4).num_leaves <= 9
    assert Leaves.of_sequences(equal[:41], 4).num_leaves == 1
    assert Leaves.of_sequences(equal, 1000).max_leaf_rows <= 2 * 524_288 // 1000
    assert Leaves.of_sequences(bounds_of([100] * 30_000), 1).max_leaf_rows <= 131_072
    assert Leaves.of_sequences(bounds_of([3, 4]), 10**7).num_leaves == 7  # rows that are larger than a leaf may be


def test_what_is_packed_is_all_there_is():
    for bounds in ragged():
        cuts = pack(bounds, 20)
        assert cuts[0] == 0
        assert cuts[-1] == len(bounds) - 1
        for first, last in pairwise(cuts):
            assert first < last
            assert bounds[last] - bounds[first] <= 20 or last == first + 1
