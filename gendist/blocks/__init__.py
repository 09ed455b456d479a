"""The lowest layer: fixed runs of rows, and `reduce(function, blocks, broadcast)` over them in tree order."""

from gendist.blocks.leaves import Leaves, Run
from gendist.blocks.local import LocalBlocks
from gendist.blocks.reduction import Blocks, Each, reduce, reduce_each

__all__ = ["Blocks", "Each", "Leaves", "LocalBlocks", "Run", "reduce", "reduce_each"]
