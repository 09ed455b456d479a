"""The log density of every row of a data set, in the order of the rows, without holding them all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from gendist.blocks import Blocks
from gendist.data.transforms import RowError
from gendist.protocols import Block, UserError


def score(model: Any, blocks: Blocks[Block]) -> Iterator[tuple[Tensor, Tensor]]:
    """Row numbers (n,) and log p(x) in nats (n,) of consecutive runs of rows."""
    return blocks.map_runs(_score_run, model)


def _score_run(model: Any, leaves: Sequence[Block]) -> tuple[Tensor, Tensor]:
    log_probs = []
    for block in leaves:
        x_ND = block.x if block.missing is None else block.x.masked_fill(block.missing, torch.nan)
        try:
            log_probs.append(model.log_prob(x_ND))
        except RowError as error:
            raise UserError(f"row {int(block.rows[error.row])}: {error.reason}") from None
        except UserError as error:
            rows = block.rows if block.missing is None else block.rows[block.missing.any(1)]
            raise UserError(f"row {int(rows[0])}: {error}") from None
    return torch.cat([block.rows for block in leaves]), torch.cat(log_probs)
