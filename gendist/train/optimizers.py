"""The optimizer of a network, as the spec has it."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from gendist.train.config import DeepConfig, OptimizerConfig

MOMENTS = {"adam": ("exp_avg", "exp_avg_sq"), "sgd": ()}  # what each keeps of every parameter, by torch's names


def config_of(config: DeepConfig, network: str) -> OptimizerConfig:
    """The network's own optimizer, or the one for all."""
    return config.optimizers.get(network, config.optimizer)


def make(config: OptimizerConfig, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """A plain torch optimizer. The learning rate is set anew before every step.

    The fused kernels make one pass over the memory where torch's defaults on a CPU make ten.
    """
    if config.kind == "sgd":
        return torch.optim.SGD(parameters, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True)
    return torch.optim.AdamW(
        parameters,
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        fused=True,
    )
