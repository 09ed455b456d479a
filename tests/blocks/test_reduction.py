"""The order of additions is that of one fixed tree, however the leaves are dealt out."""

from __future__ import annotations

import pytest

from gendist.blocks import Leaves, LocalBlocks, merge_in_tree_order, reduce, reduce_each
from gendist.blocks.leaves import leaves_per_run


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


@pytest.mark.parametrize("num_leaves", [*range(1, 35), 63, 64, 65, 100])
def test_every_aligned_run_gives_the_tree_of_the_definition(num_leaves):
    leaves = Leaves(range(num_leaves + 1))
    expected = level_by_level([Expression(i) for i in range(num_leaves)])
    for leaves_a_run in (1, 2, 4, 8, 16, 32, 64, 128):
        blocks = LocalBlocks(rows_of_leaves, leaves, leaves_a_run)
        assert reduce(same, blocks, None) == expected


def test_a_run_that_is_not_a_power_of_two_is_refused():
    with pytest.raises(AssertionError):
        Leaves(range(10)).runs(3)


def test_nothing_to_merge_is_an_error():
    with pytest.raises(AssertionError):
        merge_in_tree_order([])


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
def test_runs_keep_the_workers_evenly_busy(num_leaves, num_workers):
    size = leaves_per_run(num_leaves, num_workers, 1 << 30)
    assert size & (size - 1) == 0
    num_runs = -(-num_leaves // size)
    busiest = min(-(-num_runs // num_workers) * size, num_leaves)
    assert size == 1 or busiest * num_workers <= 1.15 * num_leaves or num_runs >= 64 * num_workers
    assert leaves_per_run(num_leaves, num_workers, 2) <= 2


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
