"""Which buffers move in a phase: those of the network that is trained, once a step, however it is divided."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class Buffers:
    """The buffers of all networks, such as the vectors of spectral norms, held at where a phase found them.

    Every micro-batch sets out from the same values, so the step of a phase moves them as one batch would; those of frozen
    networks, which are called in training mode too, are put back.
    """

    def __init__(self, networks: Mapping[str, torch.nn.Module]) -> None:
        self._buffers = {name: list(network.buffers()) for name, network in networks.items()}
        self._found: dict[str, list[Tensor]] = {}

    def begin_phase(self) -> None:
        with torch.no_grad():
            self._found = {name: [buffer.clone() for buffer in buffers] for name, buffers in self._buffers.items()}

    def begin_micro_batch(self) -> None:
        for name in self._buffers:
            self._put_back(name)

    def end_phase(self, trained: str | None) -> None:
        """Leave the buffers of the `trained` network as they have become; None where its step was not taken."""
        for name in self._buffers:
            if name != trained:
                self._put_back(name)

    def _put_back(self, network: str) -> None:
        with torch.no_grad():
            for buffer, found in zip(self._buffers[network], self._found[network], strict=True):
                buffer.copy_(found)
