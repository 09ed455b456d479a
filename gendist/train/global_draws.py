"""Modules that draw from torch's global generator, such as dropout, under a loop whose random numbers have addresses.

They are given a generator seeded by (seed, phase, position of the micro-batch), so a resumed run repeats what an unbroken
one does. What they draw for a sample depends on its neighbours all the same: with another division of the global batch,
the same samples get other draws.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from gendist.noise import derived_seed
from gendist.protocols import Phase

logger = logging.getLogger("gendist")


class GlobalDraws:
    """Torch's global state is as before, whatever is drawn inside of `addressed`."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self._seed, self._device = seed, device
        self._gpus = [device] if device.type == "cuda" else []
        self._says_so = True

    @contextmanager
    def addressed(self, phase: Phase, start: int) -> Iterator[None]:
        """For the loss of the micro-batch that begins at this position."""
        seed = derived_seed(self._seed, f"train.{phase.name}.global.{start}")
        with torch.random.fork_rng(devices=self._gpus):
            # Not torch.manual_seed, which takes a stack trace for every kind of device that is not there.
            torch.default_generator.manual_seed(seed)
            for gpu in self._gpus:
                torch.cuda.default_generators[gpu.index or 0].manual_seed(seed)
            before = self._states() if self._says_so else []
            yield
            if self._says_so and any(not torch.equal(a, b) for a, b in zip(before, self._states(), strict=True)):
                self._says_so = False
                logger.warning(
                    "a module draws random numbers of its own in the phase %s (dropout, say): a resumed run repeats them, but "
                    "another number of workers or another micro_batch_size gives other ones, and so another model",
                    phase.name,
                )

    def _states(self) -> list[torch.Tensor]:
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state(gpu) for gpu in self._gpus)]
