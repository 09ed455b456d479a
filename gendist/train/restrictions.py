"""What could not be exact is refused before the first step, and what depends on the number of processes is said."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.nn.modules.batchnorm import _NormBase

from gendist.protocols import DeepModel, Phase, UserError
from gendist.train.batches import Division
from gendist.train.config import DeepConfig

LOOK_AHEAD = 1000  # steps within which every phase of a model is expected to come up


def phases_ahead(model: DeepModel, step: int, config: DeepConfig) -> list[Phase]:
    """All phases of the steps to come, each once."""
    ahead = range(step, min(config.num_steps, step + LOOK_AHEAD))
    return list(dict.fromkeys(phase for number in ahead for phase in model.phases(number)))


def check(model: DeepModel, step: int, config: DeepConfig, division: Division, num_rows: int) -> None:
    """UserError where the model cannot be trained so that the result does not depend on how batches are divided."""
    networks = model.networks()
    if num_rows < 1:
        raise UserError("there are no rows to train on")
    if unknown := sorted(config.optimizers.keys() - networks.keys()):
        raise UserError(f"fit.optimizers: no network is called {unknown[0]}; there are {', '.join(networks)}")
    if division.global_batch_size < division.world_size:
        raise UserError(
            f"fit.global_batch_size {division.global_batch_size} is less than one sample for each of {division.world_size} "
            "processes; make it larger, or take fewer workers"
        )
    for phase in phases_ahead(model, step, config):
        if phase.network not in networks:
            raise UserError(f"the phase {phase.name} trains {phase.network}; there are {', '.join(networks)}")
        reason = model.needs_whole_batch(phase) or _batch_statistics(networks)
        if reason and division.num_micro_batches * division.world_size > 1:
            raise UserError(
                f"{reason}, so a global batch may not be divided; here it has {division.num_micro_batches} micro-batches on "
                f"each of {division.world_size} processes; train on one, with fit.micro_batch_size left out"
            )


def _batch_statistics(networks: Mapping[str, torch.nn.Module]) -> str | None:
    """Which module, called in training mode, computes with or keeps the moments of a batch."""
    for network, module in networks.items():
        for name, inside in module.named_modules():
            if isinstance(inside, _NormBase) and inside.training:
                per_sample = isinstance(inside, torch.nn.modules.instancenorm._InstanceNorm)
                if inside.track_running_stats or not per_sample:
                    kind = type(inside).__name__
                    return f"{network}.{name} is a {kind}, which takes moments over a batch (a GroupNorm does not)"
    return None
