"""`reduce`: the one way in which anything is computed over a whole data set.

The values of the leaves are merged pairwise in the order of a fixed binary tree: node (level k, index j) covers the leaves
j 2^k up to (j + 1) 2^k, and where there is no right half the left one passes upwards as it is. A run of leaves is merged to
the largest nodes that lie wholly in it, and the tree is finished from those. So the result is the same to the last bit
however the leaves are dealt out to workers, and whatever worker finishes first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

from gendist.blocks.leaves import Run
from gendist.protocols import Mergeable

Leaf = TypeVar("Leaf")
LeafOut = TypeVar("LeafOut", covariant=True)
Value = TypeVar("Value", bound=Mergeable)
Result = TypeVar("Result")
Broadcast = TypeVar("Broadcast")


class Blocks(Protocol[LeafOut]):
    """A data set cut into leaves, that functions are sent to: `LocalBlocks` in this process, `RayBlocks` on a cluster."""

    def map_runs(self, function: Callable[[Any, Run[Any]], Result], broadcast: Any) -> Iterator[Result]:
        """function(broadcast, leaves) of every run of leaves, in the order of the rows, as results come in."""
        ...


def reduce(function: Callable[[Broadcast, Leaf], Value], blocks: Blocks[Leaf], broadcast: Broadcast) -> Value:
    """function(broadcast, leaf) of every leaf, merged in tree order.

    function   a module-level function or a method (`GaussianMixture.e_step`), so that it can travel to a worker
    broadcast  its first argument, the same for every leaf: a model, for instance
    """
    runs = blocks.map_runs(partial(_reduce_run, function), broadcast)
    nodes = _merge_siblings(node for run in runs for node in run)
    assert nodes, "a reduction needs at least one value"
    value = nodes.pop().value
    while nodes:  # no right half is to come: the left ones pass upwards, the smallest first
        value = nodes.pop().value.merge(value)
    return value


@dataclass(frozen=True)
class _Node(Generic[Value]):
    """The value of the 2^level leaves from number `first` on."""

    first: int
    level: int
    value: Value


def _reduce_run(function: Callable[[Broadcast, Leaf], Value], broadcast: Broadcast, run: Run[Leaf]) -> list[_Node[Value]]:
    return _merge_siblings(_Node(first, 0, function(broadcast, leaf)) for first, leaf in enumerate(run, run.first))


def _merge_siblings(nodes: Iterable[_Node[Value]]) -> list[_Node[Value]]:
    """The largest nodes that these, which follow one another, make up: about 2 log2 of them at most."""
    merged: list[_Node[Value]] = []
    for node in nodes:
        while merged and merged[-1].level == node.level and merged[-1].first % (2 << node.level) == 0:
            left = merged.pop()
            node = _Node(left.first, node.level + 1, left.value.merge(node.value))
        merged.append(node)
    return merged


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
