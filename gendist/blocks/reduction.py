"""`reduce`: the one way in which anything is computed over a whole data set.

The values of the leaves are merged pairwise in the order of a fixed binary tree: node (level k, index j) covers the leaves
j 2^k up to (j + 1) 2^k, and where there is no right half the left one passes upwards as it is. So the result is the same
to the last bit however the leaves are dealt out to workers, and whatever worker finishes first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

from gendist.protocols import Mergeable

Leaf = TypeVar("Leaf")
LeafOut = TypeVar("LeafOut", covariant=True)
Value = TypeVar("Value", bound=Mergeable)
Result = TypeVar("Result")
Broadcast = TypeVar("Broadcast")


class Blocks(Protocol[LeafOut]):
    """A data set cut into leaves, that functions are sent to: `LocalBlocks` in this process, `RayBlocks` on a cluster."""

    def map_runs(self, function: Callable[[Any, Sequence[Any]], Result], broadcast: Any) -> Iterator[Result]:
        """function(broadcast, leaves) of every run of leaves, in the order of the rows, as results come in."""
        ...


def reduce(function: Callable[[Broadcast, Leaf], Value], blocks: Blocks[Leaf], broadcast: Broadcast) -> Value:
    """function(broadcast, leaf) of every leaf, merged in tree order.

    function   a module-level function or a method (`GaussianMixture.e_step`), so that it can travel to a worker
    broadcast  its first argument, the same for every leaf: a model, for instance
    """
    return merge_in_tree_order(blocks.map_runs(partial(_reduce_run, function), broadcast))


def _reduce_run(function: Callable[[Broadcast, Leaf], Value], broadcast: Broadcast, leaves: Sequence[Leaf]) -> Value:
    return merge_in_tree_order(function(broadcast, leaf) for leaf in leaves)


@dataclass(frozen=True)
class Each(Generic[Value]):
    """Values side by side, each of which is merged with its like."""

    values: tuple[Value, ...]

    def merge(self, other: Each[Value]) -> Each[Value]:
        return Each(tuple(a.merge(b) for a, b in zip(self.values, other.values, strict=True)))


def reduce_each(
    function: Callable[[Broadcast, Leaf], Value], blocks: Blocks[Leaf], broadcasts: Sequence[Broadcast]
) -> tuple[Value, ...]:
    """What `reduce` gives for each of several broadcasts, to the bit, in one pass: every leaf is at hand once for all."""
    return reduce(partial(_each, function), blocks, tuple(broadcasts)).values


def _each(function: Callable[[Broadcast, Leaf], Value], broadcasts: tuple[Broadcast, ...], leaf: Leaf) -> Each[Value]:
    return Each(tuple(function(broadcast, leaf) for broadcast in broadcasts))


def merge_in_tree_order(values: Iterable[Value]) -> Value:
    """Merge the values of consecutive nodes of one level (the last may be partly filled), holding log2 of them at most."""
    waiting: list[Value] = []  # left siblings whose right one has not come yet, the largest first
    for index, value in enumerate(values):
        while index & 1:
            value = waiting.pop().merge(value)
            index >>= 1
        waiting.append(value)
    assert waiting, "a reduction needs at least one value"
    result = waiting.pop()
    while waiting:
        result = waiting.pop().merge(result)
    return result
