"""The order of additions is that of one fixed tree, however the leaves are dealt out."""

from __future__ import annotations

import itertools
import random

import pytest

from gendist.blocks import Leaves, LocalBlocks, reduce, reduce_each


class Expression(str):
    """Merging writes down which two things were merged."""

    def merge(self, other: Expression) -> Expression:
        return Expression(f"({self} {other})")


def level_by_level(values: list[Expression]) -> Expression:
    """The definition: merge neighbours, level by level; one without a neighbour passes upwards."""
    while len(values) > 1:
        values = [values[i].merge(values[i + 1]) if i + 1 < len(values) else values[i] for i in range(0, len(values), 2)]
    return values[0]


def rows_of_leaves(bounds) -> list[Expression]:
    return [Expression(start) for start in bounds[:-1]]


def same(_, leaf):
    return leaf


class AnyRuns(LocalBlocks):
    """Leaves dealt out in runs that a test chooses."""

    def __init__(self, leaves, runs):
        super().__init__(rows_of_leaves, leaves)
        self._runs = runs


@pytest.mark.parametrize("num_leaves", [*range(1, 35), 63, 64, 65, 100])
def test_runs_of_any_size_give_the_tree_of_the_definition(num_leaves):
    leaves = Leaves(range(num_leaves + 1))
    expected = level_by_level([Expression(i) for i in range(num_leaves)])
    for leaves_a_run in (1, 2, 3, 4, 5, 7, 8, 13, 16, 32, 33, 64, 128):
        assert reduce(same, LocalBlocks(rows_of_leaves, leaves, leaves_a_run), None) == expected


def test_runs_of_uneven_sizes_give_the_tree_of_the_definition():
    rng = random.Random(0)
    for _ in range(300):
        num_leaves = rng.randrange(2, 70)
        cuts = sorted(rng.sample(range(1, num_leaves), rng.randrange(0, min(8, num_leaves))))
        runs = [range(start, stop) for start, stop in itertools.pairwise([0, *cuts, num_leaves])]
        expected = level_by_level([Expression(i) for i in range(num_leaves)])
        assert reduce(same, AnyRuns(Leaves(range(num_leaves + 1)), runs), None) == expected


def test_nothing_to_merge_is_an_error():
    with pytest.raises(AssertionError):
        reduce(same, AnyRuns(Leaves(range(2)), []), None)


@pytest.mark.parametrize(
    ("num_rows", "num_features"), [(1, 1), (63, 3), (64, 3), (1797, 64), (10**6, 16), (10**9, 50), (1000, 10**6)]
)
def test_leaves_cover_every_row_once_and_depend_on_the_shape_alone(num_rows, num_features):
    leaves = Leaves.of_shape(num_rows, num_features)
    assert leaves == Leaves.of_shape(num_rows, num_features)
    sizes = {stop - start for start, stop in zip(leaves.bounds[:-1], leaves.bounds[1:], strict=True)}
    assert leaves.bounds[0] == 0
    assert leaves.bounds[-1] == num_rows
    assert min(sizes) > 0
    whole = max(sizes)
    assert whole & (whole - 1) == 0 or leaves.num_leaves == 1


@pytest.mark.parametrize("num_workers", [1, 2, 3, 4, 8, 64])
@pytest.mark.parametrize("num_leaves", [1, 2, 7, 29, 123, 1000, 61_036])
@pytest.mark.parametrize("most", [1, 2, 5, 1 << 30])
def test_runs_cover_the_leaves_and_keep_the_workers_evenly_busy(num_leaves, num_workers, most):
    runs = Leaves(range(num_leaves + 1)).runs(num_workers, most)
    assert [leaf for run in runs for leaf in run] == list(range(num_leaves))
    sizes = {len(run) for run in runs}
    assert 1 <= min(sizes) <= max(sizes) <= most
    assert max(sizes) - min(sizes) <= 1
    assert len(runs) == num_leaves or len(runs) % num_workers == 0


def test_several_broadcasts_in_one_pass_give_what_each_gives_alone():
    class Passes(LocalBlocks):
        num_passes = 0

        def map_runs(self, function, broadcast):
            self.num_passes += 1
            return super().map_runs(function, broadcast)

    def named(name, leaf):
        return Expression(f"{name}{leaf}")

    blocks = Passes(rows_of_leaves, Leaves(range(14)), 4)
    values = reduce_each(named, blocks, ["a", "b", "c"])
    assert blocks.num_passes == 1
    assert values == tuple(reduce(named, blocks, name) for name in "abc")
