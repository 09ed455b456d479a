"""Networks outside training: rows are computed in tiles of one size, so that each comes out the same whatever its neighbours.

A product of another shape may add in another order. With one shape, one intra-op thread and a place in the tile that depends on
the row's number alone, a row's bytes are a function of the row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from gendist.one_thread import one_thread

TILE = 64  # rows; a request for fewer pays for as many, while larger ones gained nothing on a CPU


@contextmanager
def evaluating(*networks: nn.Module) -> Iterator[None]:
    """The networks as they are used after training, without gradients; in the mode that they had, at the end."""
    in_training = [module for network in networks for module in network.modules() if module.training]
    try:
        with torch.no_grad(), one_thread():
            for network in networks if in_training else ():
                network.eval()
            yield
    finally:
        for module in in_training:
            module.training = True


def rows_in_tiles(function: Callable[[int], Tensor], start: int, num_rows: int) -> Tensor:
    """Rows start.. of an endless sequence; function(first) computes the whole tile `first`, first + 1, ..."""
    stop = start + max(num_rows, 0)
    first = start - start % TILE
    tiles = range(first, max(stop, first + 1), TILE)
    return torch.cat([function(tile)[max(start - tile, 0) : stop - tile].cpu() for tile in tiles])


def map_in_tiles(function: Callable[[int, Tensor], Tensor], x_ND: Tensor, device: torch.device, offset: int = 0) -> Tensor:
    """function(first, tile) of the rows `first`, first + 1, ..., of which x has those from `offset` on."""
    return rows_in_tiles(lambda first: function(first, tile_of(x_ND, first - offset).to(device)), offset, len(x_ND))


def tile_of(values: Tensor, first: int) -> Tensor:
    """(TILE, ...) those of `first`, first + 1, ...; zeros before the beginning, where `first` is negative, and past the end."""
    inside = values[max(first, 0) : max(first + TILE, 0)]
    before = min(max(-first, 0), TILE)
    after = TILE - before - len(inside)
    return torch.cat([values.new_zeros(before, *values.shape[1:]), inside, values.new_zeros(after, *values.shape[1:])])
