"""The log density of every row of some blocks, or the tightest bound of it that the family has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gendist.data.transforms import RowError
from gendist.protocols import Block, UserError

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
    scores = []
    for block in blocks:
        x_ND = block.x if block.missing is None else block.x.masked_fill(block.missing, torch.nan)
        options = {} if verb == "log_prob" else {"offset": int(block.rows[0])}
        try:
            scores.append(getattr(model, verb)(x_ND, **options))
        except RowError as error:
            raise UserError(f"row {int(block.rows[error.row])}: {error.reason}") from None
        except UserError as error:
            rows = block.rows if block.missing is None else block.rows[block.missing.any(1)]
            raise UserError(f"row {int(rows[0])}: {error}") from None
    return torch.cat(scores)
