"""How networks lie in memory and whether they are compiled: it changes speed, and the last bits of a result."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from gendist.protocols import UserError
from gendist.train.config import DeepConfig


def arrange(networks: Mapping[str, torch.nn.Module], device: torch.device, config: DeepConfig) -> None:
    """On the device, laid out and compiled as the spec has it: the same modules and parameters, called as before.

    torch compiles modules of classes of one's own; a bare torch.nn.Sequential it leaves as it is.
    """
    for network in networks.values():
        network.to(device)
        if config.channels_last:
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if config.compile:
            network.compile()


@contextmanager
def explained(config: DeepConfig) -> Iterator[None]:
    """What torch.compile cannot do, in words of the spec."""
    try:
        yield
    except RuntimeError as error:
        if config.compile and ("double backward" in str(error) or "create_graph=False" in str(error)):
            raise UserError(
                "fit.compile: this loss differentiates a gradient, which compiled networks cannot; set it to false, or train "
                "without the penalty"
            ) from error
        raise
