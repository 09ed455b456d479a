"""Data as a data set for a family that takes everything, and its rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from gendist.blocks import LocalBlocks
from gendist.data import DataConfig, Dataset, Schema, open_source, source_of
from gendist.data.schema import Takes
from gendist.protocols import Block

EVERYTHING = Takes(categories=True, sparse=True)


def one_run_a_leaf(load, leaves, most, keep):
    return LocalBlocks(load, leaves, 1, keep)


def dataset_of(data: Any = None, make_blocks=LocalBlocks, takes: Takes = EVERYTHING, **config) -> Dataset:
    """Of what Python hands over, or of what `config` names."""
    data_config = DataConfig(**config)
    source = open_source(data_config) if data is None else source_of(data)
    return Dataset.open(source, data_config, Schema.of(source, data_config, takes), make_blocks)


def joined(blocks) -> list[Block]:
    return [block for leaves in blocks.map_runs(lambda _, leaves: list(leaves), None) for block in leaves]


def matrix_of(dataset: Dataset) -> np.ndarray:
    """(N, D) all rows, dense, NaN where an entry is missing."""
    dense = [
        block.x.to_dense() if block.missing is None else block.x.masked_fill(block.missing, torch.nan)
        for block in joined(dataset.blocks())
    ]
    return torch.cat(dense).numpy()


def evidence_of(dataset: Dataset, num_latents: int) -> np.ndarray:
    """(N, L)"""
    return torch.cat([block.evidence for block in joined(dataset.blocks(num_latents))]).numpy()
