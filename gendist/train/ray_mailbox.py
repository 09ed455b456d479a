"""An actor that carries messages of a training run to its driver."""

from __future__ import annotations

import asyncio
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

WAIT_S = 0.5


class _Mailbox:
    """Keeps what is put into it, in order, until it is taken; and how many checkpoints it was told of."""

    def __init__(self) -> None:
        self._messages: list[Any] = []
        self._arrived = asyncio.Event()
        self._num_checkpoints = 0

    async def put(self, messages: list[Any], num_checkpoints: int = 0) -> None:
        self._messages += messages
        self._num_checkpoints += num_checkpoints
        self._arrived.set()

    async def take(self) -> list[Any]:
        """Everything that came since the last call, as soon as there is something; nothing after a while without."""
        try:
            await asyncio.wait_for(self._arrived.wait(), WAIT_S)
        except TimeoutError:
            return []
        taken, self._messages = self._messages, []
        self._arrived.clear()
        return taken

    async def num_checkpoints(self) -> int:
        return self._num_checkpoints


def new_mailbox() -> Any:
    """On the driver's node, since it is of no use without the driver, and must not be lost with the node of a worker."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0)(_Mailbox).options(scheduling_strategy=here).remote()
