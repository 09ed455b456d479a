"""Training as one would write it down without us: whole global batches, means over them, torch's own optimizers and clipping.

Of ours it takes what is by definition and is tested elsewhere: the order of the rows, the noise of each position, the learning
rate of each step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from gendist.noise import Noise
from gendist.protocols import Block
from gendist.train.batches import Rows
from gendist.train.config import DeepConfig
from gendist.train.order import indices
from gendist.train.schedule import learning_rate


class Plain:
    """What a step of a model is written with; `step` is its index."""

    def __init__(self, networks: dict[str, nn.Module], config: DeepConfig, seed: int) -> None:
        self.step = 0
        self._networks, self._config, self._seed = networks, config, seed
        options = config.optimizer
        self._optimizers = {
            name: torch.optim.SGD(network.parameters(), lr=1.0, weight_decay=options.weight_decay)
            if options.kind == "sgd"
            else torch.optim.AdamW(
                network.parameters(), betas=options.betas, eps=options.epsilon, weight_decay=options.weight_decay
            )
            for name, network in networks.items()
        }

    def normal(self, phase: str, draw: str, width: int) -> Tensor:
        return self._noise(phase, draw).normal(*self._positions, width).float()

    def uniform(self, phase: str, draw: str, width: int = 1) -> Tensor:
        return self._noise(phase, draw).uniform(*self._positions, width).float()

    def update(self, network: str, loss: Tensor) -> None:
        """One step of the network's optimizer."""
        for module in self._networks.values():
            module.zero_grad()
        loss.backward()
        parameters = list(self._networks[network].parameters())
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        options = self._config.optimizer
        if options.gradient_clipping:
            nn.utils.clip_grad_norm_(parameters, options.gradient_clipping)
        self._optimizers[network].param_groups[0]["lr"] = learning_rate(options, self.step, self._config.num_steps)
        self._optimizers[network].step()

    def _noise(self, phase: str, draw: str) -> Noise:
        return Noise(self._seed, f"train.{phase}.{draw}")

    @property
    def _positions(self) -> tuple[int, int]:
        """The first position of the step's global batch, and how many there are."""
        return self.step * self._config.global_batch_size, self._config.global_batch_size


def trained(
    model: Any, one_step: Callable[[Any, Block, Plain], None], data: Rows, config: DeepConfig, seed: int
) -> Iterator[dict[str, Tensor]]:
    """The parameters after each step."""
    networks = dict(model.networks())
    plain = Plain(networks, config, seed)
    for plain.step in range(config.num_steps):
        one_step(model, data.take(indices(data.num_rows, seed, *plain._positions)), plain)
        yield {
            f"{name}/param/{key}": value.detach().clone()
            for name, network in networks.items()
            for key, value in network.named_parameters()
        }
