"""The contract of an engine: what makes calls of plain networks safe on one process or many.

A network is called as itself, through no wrapper. The engine synchronizes gradients, shards and clips, steps the
optimizers, and gathers state that does not depend on how many processes there are.

For each phase of each step the loop calls, in this order:

    engine.begin_phase(network)                  the others are frozen: requires_grad False, no buffer moves
    for each micro-batch:
        engine.begin_micro_batch(network, is_last)
        loss = model.loss(...)                   inside engine.precision()
        engine.backward(network, loss)           the gradient of a sum over all micro-batches and processes
    norm = engine.step(network, learning_rate)   clips, steps, clears the gradients
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor

from gendist.cost import StateBytes, Traffic
from gendist.train.config import DeepConfig
from gendist.train.processes import Processes


class Engine(Protocol):
    """One for each process of a training run."""

    rank: int
    world_size: int
    device: torch.device

    @classmethod
    def check(cls, processes: Processes, config: DeepConfig) -> None:
        """UserError where it cannot train with so many processes, on such a device; called of each size a run may have."""
        ...

    @classmethod
    def memory(cls, config: DeepConfig, network: str, sizes: Sequence[int], num_processes: int) -> StateBytes:
        """What each process will hold of a network whose parameters have so many entries, beside activations."""
        ...

    @classmethod
    def traffic(
        cls, config: DeepConfig, network: str, sizes: Sequence[int], num_processes: int, num_micro_batches: int
    ) -> Traffic:
        """What each process will send in an optimizer step of such a network."""
        ...

    def prepare(self, networks: Mapping[str, torch.nn.Module], state: Mapping[str, Tensor] | None = None) -> None:
        """Take over the networks, the same on every process, which stay where and what they are for the caller; and, where
        given, go on from what `state` returned (of any engine, with any number of processes)."""
        ...

    def begin_phase(self, network: str) -> None: ...

    def begin_micro_batch(self, network: str, is_last: bool) -> None: ...

    def precision(self) -> AbstractContextManager[None]:
        """What losses are computed inside of."""
        ...

    def backward(self, network: str, loss: Tensor) -> None:
        """Add the gradient of `loss`; what is stepped along is the sum over micro-batches and processes."""
        ...

    def step(self, network: str, learning_rate: float) -> float:
        """Clip, step, clear; returns the norm of the gradient before it was clipped (infinite or NaN: nothing was changed)."""
        ...

    def begin_sum(self, values: Tensor) -> Callable[[], Tensor]:
        """(n,) float64: the sum over all processes, the same bytes on each, when the function is called that is returned."""
        ...

    def sum(self, values: Tensor) -> Tensor:
        """The same at once."""
        ...

    def state(self) -> dict[str, Tensor] | None:
        """Topology-free: parameters, buffers, moments of the optimizers, EMA, by name, on the CPU; on rank 0, else None.
        Every process must call it."""
        ...

    def averaged(self) -> AbstractContextManager[None]:
        """The networks hold the EMA of their parameters inside; whole on every process. The plain ones without an EMA."""
        ...
