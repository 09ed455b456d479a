"""The log density of every row of some blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gendist.data.transforms import RowError
from gendist.protocols import Block, UserError


def log_prob_of_rows(model: Any, blocks: Sequence[Block]) -> Tensor:
    """(N,) log p(x) in nats of the blocks' rows, one block after the other. UserError names the row that has none."""
    log_probs = []
    for block in blocks:
        x_ND = block.x if block.missing is None else block.x.masked_fill(block.missing, torch.nan)
        try:
            log_probs.append(model.log_prob(x_ND))
        except RowError as error:
            raise UserError(f"row {int(block.rows[error.row])}: {error.reason}") from None
        except UserError as error:
            rows = block.rows if block.missing is None else block.rows[block.missing.any(1)]
            raise UserError(f"row {int(rows[0])}: {error}") from None
    return torch.cat(log_probs)
