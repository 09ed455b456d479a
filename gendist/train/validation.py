"""What a model is worth on rows that it was not trained on: the same bytes for any number of processes."""

from __future__ import annotations

import torch

from gendist.protocols import DeepModel
from gendist.train.batches import Rows, moved, noise
from gendist.train.config import DeepConfig
from gendist.train.engine import Engine

MAX_ROWS = 256  # at once, where the spec does not say how many samples fit


def validate(model: DeepModel, engine: Engine, rows: Rows, config: DeepConfig, seed: int) -> dict[str, float]:
    """The means of `model.validate` over the rows, of weight where they have weights, with the averaged networks.

    The rows are cut into blocks that do not depend on the number of processes; the sums of all blocks are brought together
    and added in their order. The noise of a row is the same at every validation.
    """
    size = config.micro_batch_size or min(config.global_batch_size, MAX_ROWS)
    starts = range(0, rows.num_rows, size)
    mine = starts[engine.rank :: engine.world_size]
    networks = list(model.networks().values())
    sums: dict[int, dict[str, float]] = {}
    with engine.averaged(), torch.no_grad():
        for network in networks:
            network.eval()
        for start in mine or starts[:1]:  # a process without a block of its own learns from the first what there is to sum
            block = rows.take(torch.arange(start, min(start + size, rows.num_rows)))
            drawn = noise(seed, "validation", model.validation_draws(), start, block.num_rows)
            drawn = {name: value.to(engine.device) for name, value in drawn.items()}
            with engine.precision():
                values = model.validate(moved(block, engine.device), drawn)
            sums[start] = {name: float(value) for name, value in values.items()}
            sums[start][""] = float(block.weights_or_ones().sum())
        for network in networks:
            network.train()
    names = list(next(iter(sums.values())))
    table = torch.zeros(len(starts), len(names), dtype=torch.float64)
    for start in mine:
        table[start // size] = torch.tensor([sums[start][name] for name in names], dtype=torch.float64)
    totals = dict(zip(names, engine.sum(table.flatten()).view_as(table).sum(0).tolist(), strict=True))
    weight = totals.pop("")
    return {name: total / weight for name, total in totals.items()}
