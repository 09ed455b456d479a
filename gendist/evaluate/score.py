"""What a model says of every row of some blocks, or of every sequence: the log density, or the tightest bound of it that the
family has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from gendist.data.transforms import RowError
from gendist.protocols import Block, UserError, csr_from_arrays

DENSITIES = ("log_prob", "log_prob_bound", "elbo")  # the best first


def density_of(model: Any) -> str:
    """The verb that scores rows; UserError, with the model's reason, where it offers none."""
    for verb in DENSITIES:
        if verb not in model.not_offered:
            return verb
    raise UserError(f"score: {model.not_offered[DENSITIES[0]]}")


def scores_of_rows(model: Any, blocks: Sequence[Block]) -> Tensor:
    """(N,) log p(x) in nats of the blocks' rows, or its bound, one block after the other. UserError names the row that has
    none. What a bound draws is addressed by row number, so a row's score does not depend on the block that it lies in."""
    verb = density_of(model)
    score = getattr(model, verb)
    if verb == "log_prob":
        return rows_through(score, blocks)
    return rows_through(score, blocks, addressed=True)


def rows_through(verb: Callable[..., Tensor], blocks: Sequence[Block], addressed: bool = False) -> Tensor:
    """(N, ...) what a verb says of the blocks' rows, one block after the other. UserError names the row that it refuses.

    addressed  whether it also takes `offset`, the number of its first row
    """
    results = []
    for block in blocks:
        x_ND = block.x if block.missing is None else block.x.masked_fill(block.missing, torch.nan)
        of_rows = partial(verb, offset=int(block.rows[0])) if addressed else verb
        try:
            results.append(of_rows(x_ND))
        except RowError as error:
            raise UserError(f"row {int(block.rows[error.row])}: {error.reason}") from None
        except UserError as error:
            row, reason = _first_refused(of_rows, x_ND, error)
            raise UserError(f"row {int(block.rows[row])}: {reason}") from None
    return torch.cat(results)


def scores_of_sequences(model: Any, blocks: Sequence[Block], first: int = 0) -> Tensor:
    """(S,) log p(x) in nats of the blocks' sequences, which are whole. The arguments are those of `sequences_through`."""
    return sequences_through(model.log_prob, blocks, first)


def sequences_through(verb: Callable[..., Tensor], blocks: Sequence[Block], first: int = 0) -> Tensor:
    """(S, ...) what a verb says of the blocks' sequences, which are whole; UserError names the one that it refuses.

    first  the number of the first
    """
    results = []
    for block in blocks:
        assert block.sequence_bounds is not None
        x_ND = block.x if block.missing is None else block.x.masked_fill(block.missing, torch.nan)
        sequences = [x_ND[start:stop] for start, stop in pairwise(block.sequence_bounds.tolist())]
        try:
            results.append(verb(sequences))
        except UserError as error:
            for s, x_TD in enumerate(sequences):
                try:
                    verb([x_TD])
                except UserError as own:
                    reason = own.reason if isinstance(own, RowError) else str(own).removeprefix("sequence 0 ")
                    step = f", step {own.row}" if isinstance(own, RowError) else ""
                    raise UserError(f"sequence {first + s}{step}: {reason}") from None
            raise error
        first += len(sequences)
    return torch.cat(results)


def _first_refused(score: Callable[[Tensor], Tensor], x_ND: Tensor, reason: UserError) -> tuple[int, UserError]:
    """The position of the first row that is refused, and why, of rows that together are refused for this reason."""
    num_taken, num_refused = 0, x_ND.shape[0]
    while num_refused - num_taken > 1:
        middle = (num_taken + num_refused) // 2
        try:
            score(_first_rows(x_ND, middle))
            num_taken = middle
        except UserError as error:
            num_refused, reason = middle, error
    return num_refused - 1, reason


def _first_rows(x_ND: Tensor, number: int) -> Tensor:
    if x_ND.layout is not torch.sparse_csr:
        return x_ND[:number]
    crow, columns, values = (part.numpy() for part in (x_ND.crow_indices(), x_ND.col_indices(), x_ND.values()))
    stop = crow[number]
    return csr_from_arrays(crow[: number + 1], columns[:stop], values[:stop], (number, x_ND.shape[1]))
