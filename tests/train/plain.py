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
from gendist.train.batches import Rows, moved
from gendist.train.config import DeepConfig
from gendist.train.order import indices
from gendist.train.schedule import learning_rate

CPU = torch.device("cpu")


class Plain:
    """What a step of a model is written with; `step` is its index."""

    def __init__(self, networks: dict[str, nn.Module], config: DeepConfig, seed: int, device: torch.device) -> None:
        self.step = 0
        self._networks, self._config, self._seed, self._device = networks, config, seed, device
        self._scalers = {name: torch.amp.GradScaler(device.type, enabled=config.precision == "float16") for name in networks}
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
        return self._noise(phase, draw).normal(*self._positions, width).float().to(self._device)

    def uniform(self, phase: str, draw: str, width: int = 1) -> Tensor:
        return self._noise(phase, draw).uniform(*self._positions, width).float().to(self._device)

    def update(self, network: str, loss: Tensor) -> None:
        """One step of the network's optimizer."""
        for module in self._networks.values():
            module.zero_grad()
        optimizer, scaler = self._optimizers[network], self._scalers[network]
        scaler.scale(loss).backward()
        parameters = list(self._networks[network].parameters())
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        options = self._config.optimizer
        scaler.unscale_(optimizer)
        if options.gradient_clipping:
            nn.utils.clip_grad_norm_(parameters, options.gradient_clipping)
        optimizer.param_groups[0]["lr"] = learning_rate(options, self.step, self._config.num_steps)
        scaler.step(optimizer)
        scaler.update()

    def _noise(self, phase: str, draw: str) -> Noise:
        return Noise(self._seed, f"train.{phase}.{draw}")

    @property
    def _positions(self) -> tuple[int, int]:
        """The first position of the step's global batch, and how many there are."""
        return self.step * self._config.global_batch_size, self._config.global_batch_size


def trained(
    model: Any, one_step: Callable[[Any, Block, Plain], None], data: Rows, config: DeepConfig, seed: int, device: torch.device
) -> Iterator[dict[str, Tensor]]:
    """The parameters after each step."""
    networks = {name: network.to(device) for name, network in model.networks().items()}
    plain = Plain(networks, config, seed, device)
    is_whole = config.precision == "float32"
    dtype = None if is_whole else getattr(torch, config.precision)
    for plain.step in range(config.num_steps):
        batch = moved(data.take(indices(data.num_rows, seed, *plain._positions)), device)
        # A step changes weights, of which no cast may be kept.
        with torch.autocast(device.type, dtype, enabled=not is_whole, cache_enabled=False):
            one_step(model, batch, plain)
        yield {
            f"{name}/param/{key}": value.detach().clone()
            for name, network in networks.items()
            for key, value in network.named_parameters()
        }
