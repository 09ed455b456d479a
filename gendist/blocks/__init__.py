"""The lowest layer: fixed runs of rows, and `reduce(function, blocks, broadcast)` over them in tree order."""

from gendist.blocks.leaves import Leaves
from gendist.blocks.local import LocalBlocks
from gendist.blocks.reduction import Blocks, merge_in_tree_order, reduce

__all__ = ["Blocks", "Leaves", "LocalBlocks", "merge_in_tree_order", "reduce"]
