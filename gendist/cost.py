"""What families and engines say of their own cost, as values; whoever plans a run makes times and gigabytes of them.

FLOPs are those of products and convolutions, two for a multiplication with its addition; the rest of a kernel is small beside
them, or told by a trial of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple, dataclass
from math import prod
from operator import add
from typing import Self

from torch import Tensor


class _Summed:
    """Dataclasses whose values are added field by field."""

    def __add__(self, other: Self) -> Self:
        return type(self)(*map(add, astuple(self), astuple(other)))  # type: ignore[call-overload]


@dataclass(frozen=True)
class PassCost(_Summed):
    """Of a pass of expectation-maximization: what a family's `pass_cost` returns.

    flops_per_row     of an E-step, as if rows were dense
    statistics_bytes  that an E-step returns, however many rows it saw
    parameters_bytes  of the model, which every task of a pass is sent
    """

    flops_per_row: float
    statistics_bytes: int
    parameters_bytes: int


@dataclass(frozen=True)
class StateBytes(_Summed):
    """What an engine holds of networks on each process, on the device unless said otherwise.

    in_transit  buckets that gradients travel in, and parameters that are whole for as long as they are computed with
    on_host     of all these, what lies in the memory of the host instead; it is in no other number
    on_disk     the same of its disk
    """

    parameters: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    average: float = 0.0
    in_transit: float = 0.0
    on_host: float = 0.0
    on_disk: float = 0.0

    @property
    def on_device(self) -> float:
        return self.parameters + self.gradients + self.optimizer + self.average + self.in_transit


@dataclass(frozen=True)
class Traffic(_Summed):
    """What each process sends in an optimizer step, by rings (Patarasuk & Yuan 2009): of a buffer of b bytes that n processes
    reduce, scatter or gather, (n - 1) / n b in n - 1 rounds; an all-reduce is two of these."""

    sent_bytes: float = 0.0
    num_rounds: float = 0.0

    def times(self, often: float) -> Traffic:
        return Traffic(often * self.sent_bytes, often * self.num_rounds)

    @classmethod
    def ring(cls, num_bytes: float, num_processes: int, num_buffers: int = 1) -> Traffic:
        """Of one reduce-scatter or all-gather of so many bytes in so many buffers."""
        return cls((num_processes - 1) / num_processes * num_bytes, num_buffers * (num_processes - 1))


def has_values(x: Tensor) -> bool:
    """Whether a tensor has any: one that a cost is counted with has a shape alone."""
    return x.untyped_storage().device.type != "meta"


def tensor_bytes(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Of float64 tensors of these shapes; the names say to the reader which they are."""
    return sum(8 * prod(shape) for shape in shapes.values())
