"""The engine over plain processes: each holds all of every network, and gradients are summed by all-reduce.

There is no wrapper around a network. The gradients of its parameters lie in buckets whose layout is fixed from the first
step on, in reverse order of the parameters, which is about the order in which the backward pass completes them; a bucket
is all-reduced while the pass goes on. With three or more processes the order of the additions depends on the layout: one
that is rebuilt after the first step, as DistributedDataParallel's is, would make a resumed run differ from an unbroken one.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gendist.cost import StateBytes, Traffic
from gendist.protocols import UserError
from gendist.train import arithmetic, ema, optimizers
from gendist.train.buffers import Buffers
from gendist.train.config import DeepConfig
from gendist.train.loss_scale import LossScale
from gendist.train.memory import FLOAT32_BYTES, state_bytes
from gendist.train.networks import arrange
from gendist.train.processes import Processes, begin_gather, begin_sum
from gendist.train.state_entries import (
    AVERAGE,
    BUFFER,
    LOSS_SCALE,
    PARAMETER,
    STEP,
    check,
    entry,
    load_networks,
    persistent_buffers,
    shapes,
)

BUCKET_BYTES = 25 * 2**20


class DdpEngine:
    """`Engine` of networks that fit into every process whole. UserError where the device cannot compute in the precision."""

    def __init__(self, processes: Processes, config: DeepConfig) -> None:
        self.check(processes, config)
        self._processes = processes
        self.rank, self.world_size, self.device = processes.rank, processes.world_size, processes.device
        self._config = config
        self._trained: dict[str, _Trained] = {}

    @classmethod
    def check(cls, processes: Processes, config: DeepConfig) -> None:
        arithmetic.check(config.precision, processes.device)

    @classmethod
    def memory(cls, config: DeepConfig, network: str, sizes: Sequence[int], num_processes: int) -> StateBytes:
        # Gradients are added up in the buckets that they travel in.
        return state_bytes(config, network, sum(sizes), num_processes)

    @classmethod
    def traffic(
        cls, config: DeepConfig, network: str, sizes: Sequence[int], num_processes: int, num_micro_batches: int
    ) -> Traffic:
        num_bytes = FLOAT32_BYTES * sum(sizes)
        return Traffic.ring(num_bytes, num_processes, -(-num_bytes // BUCKET_BYTES)).times(2)  # an all-reduce

    def prepare(self, networks: Mapping[str, torch.nn.Module], state: Mapping[str, Tensor] | None = None) -> None:
        if state is not None:
            check(state, shapes(networks, self._config))
            load_networks(networks, state)
        arrange(networks, self.device, self._config)
        self._trained = {name: _Trained(name, network, self._config, self.world_size) for name, network in networks.items()}
        self._buffers = Buffers(networks)
        self._check_alike(networks)
        if state is not None:
            for trained in self._trained.values():
                trained.load(state)

    def _check_alike(self, networks: Mapping[str, torch.nn.Module]) -> None:
        digest = 0
        for network in networks.values() if self.world_size > 1 else ():
            for value in network.state_dict().values():
                digest = zlib.crc32(_copy(value).flatten().view(torch.uint8).numpy().tobytes(), digest)
        if len(set(begin_gather(torch.tensor([digest], dtype=torch.float64), self._processes)()[:, 0].tolist())) > 1:
            raise UserError("the processes begin with networks that differ: make weights a function of the seed alone, and "
                            "let every process read the same checkpoint")  # fmt: skip

    def begin_phase(self, network: str) -> None:
        for name, trained in self._trained.items():
            trained.set_frozen(name != network)
        self._buffers.begin_phase()

    def begin_micro_batch(self, network: str, is_last: bool) -> None:
        self._buffers.begin_micro_batch()
        if is_last:
            self._trained[network].gradients.begin_last_backward()

    def precision(self) -> AbstractContextManager[None]:
        return arithmetic.autocast(self._config.precision, self.device)

    def backward(self, network: str, loss: Tensor) -> None:
        if loss.requires_grad:  # the loss of a micro-batch without a sample that counts may be a constant
            (loss * self._trained[network].loss_scale.scale).backward()

    def step(self, network: str, learning_rate: float) -> float:
        norm = self._trained[network].step(learning_rate)
        self._buffers.end_phase(network if math.isfinite(norm) else None)
        for trained in self._trained.values():
            trained.set_frozen(False)
        return norm

    def begin_sum(self, values: Tensor) -> Callable[[], Tensor]:
        return begin_sum(values, self._processes)

    def sum(self, values: Tensor) -> Tensor:
        return self.begin_sum(values)()

    def state(self) -> dict[str, Tensor] | None:
        if self.rank != 0:
            return None
        return {name: _copy(value) for trained in self._trained.values() for name, value in trained.state().items()}

    @contextmanager
    def averaged(self) -> Iterator[None]:
        for trained in self._trained.values():
            trained.exchange_with_average()
        try:
            yield
        finally:
            for trained in self._trained.values():
                trained.exchange_with_average()


def _copy(value: Tensor) -> Tensor:
    """On the CPU, contiguous, and of memory that the next step does not write to."""
    return value.detach().to("cpu", copy=True).contiguous()


class _Trained:
    """A network with its optimizer, its gradients and its moving average."""

    def __init__(self, name: str, network: torch.nn.Module, config: DeepConfig, world_size: int) -> None:
        self.name, self.network = name, network
        self.parameters = {key: value for key, value in network.named_parameters() if value.requires_grad}
        self.config = optimizers.config_of(config, name)
        self.optimizer = optimizers.make(self.config, self.parameters.values())
        self.gradients = Gradients(list(self.parameters.values()), world_size)
        self.num_steps = 0
        self.gamma = ema.gamma_of_width(config.ema) if config.ema else None
        self.average = {key: value.detach().clone() for key, value in self.parameters.items()} if config.ema else {}
        self.loss_scale = LossScale() if config.precision == "float16" else LossScale(1.0)
        self.scales_loss = config.precision == "float16"

    def set_frozen(self, is_frozen: bool) -> None:
        for parameter in self.parameters.values():
            parameter.requires_grad_(not is_frozen)

    def step(self, learning_rate: float) -> float:
        gradients = self.gradients.reduced()
        norm = float(torch.nn.utils.get_total_norm(self.gradients.runs())) / self.loss_scale.scale
        is_finite = math.isfinite(norm)
        if is_finite:
            self._scale(gradients, norm)
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate
            self.optimizer.step()
            self.num_steps += 1
            self._average()
        if self.scales_loss:
            self.loss_scale = self.loss_scale.after(is_finite)
        self.gradients.clear()
        return norm

    def _scale(self, gradients: list[Tensor], norm: float) -> None:
        """Take the loss scale out, and clip to the norm that is allowed (Pascanu et al. 2013, algorithm 1)."""
        limit = self.config.gradient_clipping
        factor = min(1.0, limit / (norm + 1e-6)) if limit else 1.0  # 1e-6 as torch and DeepSpeed have it
        factor /= self.loss_scale.scale
        if factor != 1.0:
            torch._foreach_mul_(gradients, factor)

    def _average(self) -> None:
        if self.gamma is not None:
            with torch.no_grad():
                weight = 1.0 - ema.decay(self.gamma, self.num_steps)
                torch._foreach_lerp_(list(self.average.values()), list(self.parameters.values()), weight)

    def exchange_with_average(self) -> None:
        for name, value in self.average.items():
            parameter = self.parameters[name]
            parameter.data, self.average[name] = value, parameter.data

    def state(self) -> dict[str, Tensor]:
        """Views of what is to be kept, by the names of `gendist.train.state_entries`."""
        kept: dict[str, Tensor] = {entry(self.name, STEP): torch.tensor(self.num_steps)}
        if self.scales_loss:
            kept[entry(self.name, LOSS_SCALE)] = self.loss_scale.tensor()
        for name, value in persistent_buffers(self.network).items():
            kept[entry(self.name, BUFFER, name)] = value
        for name, parameter in self.network.named_parameters():
            kept[entry(self.name, PARAMETER, name)] = parameter
        for name, parameter in self.parameters.items():
            for moment in optimizers.MOMENTS[self.config.kind]:
                # A torch optimizer makes its moments with the first step.
                moments: dict[str, Tensor] = self.optimizer.state.get(parameter, {})
                kept[entry(self.name, moment, name)] = moments[moment] if moments else torch.zeros_like(parameter)
            if self.gamma is not None:
                kept[entry(self.name, AVERAGE, name)] = self.average[name]
        return kept

    def load(self, values: Mapping[str, Tensor]) -> None:
        """What `state` returned, but for parameters and buffers."""
        self.num_steps = int(values[entry(self.name, STEP)])
        if self.scales_loss:
            self.loss_scale = LossScale.from_tensor(values[entry(self.name, LOSS_SCALE)])
        for name, parameter in self.parameters.items():
            moments: dict[str, Any] = {
                moment: torch.empty_like(parameter).copy_(values[entry(self.name, moment, name)])
                for moment in optimizers.MOMENTS[self.config.kind]
            }
            if moments:
                self.optimizer.state[parameter] = {
                    "step": torch.tensor(float(self.num_steps), device=parameter.device),
                    **{moment: value.detach() for moment, value in moments.items()},
                }
            if self.gamma is not None:
                self.average[name].copy_(values[entry(self.name, AVERAGE, name)])


class Gradients:
    """The gradients of one network, summed over the processes.

    One process alone leaves them where autograd puts them. Of several, autograd adds those of every micro-batch up within their
    buckets, and a bucket sets out when the last backward pass has completed all of it and all before it have: the same order
    on every process, one whose last micro-batch does not reach some parameter included.
    """

    def __init__(self, parameters: list[torch.nn.Parameter], world_size: int) -> None:
        self._parameters = parameters
        self._buckets = list(_buckets(parameters)) if world_size > 1 else []
        self._num_begun = 0
        self._is_last = False
        for bucket in self._buckets:
            for parameter in bucket.views:
                parameter.register_post_accumulate_grad_hook(
                    lambda parameter, bucket=bucket: self._completed(bucket, parameter)
                )

    def begin_last_backward(self) -> None:
        self._is_last = True

    def _completed(self, bucket: _Bucket, parameter: Tensor) -> None:
        if self._is_last:
            bucket.complete(parameter)
            self._send(lambda bucket: not bucket.missing)

    def _send(self, is_ready: Any) -> None:
        while self._num_begun < len(self._buckets) and is_ready(self._buckets[self._num_begun]):
            self._buckets[self._num_begun].begin()
            self._num_begun += 1

    def reduced(self) -> list[Tensor]:
        """The gradient of every parameter, zeros where no process has one."""
        self._send(lambda bucket: True)
        for bucket in self._buckets:
            bucket.wait()
        for parameter in self._parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return [parameter.grad for parameter in self._parameters if parameter.grad is not None]

    def runs(self) -> list[Tensor]:
        """The memory that the gradients lie in, after `reduced`, in as few tensors as can be."""
        if self._buckets:
            return [bucket.memory for bucket in self._buckets]
        return [parameter.grad for parameter in self._parameters if parameter.grad is not None]

    def clear(self) -> None:
        if not self._buckets:
            for parameter in self._parameters:
                parameter.grad = None
        for bucket in self._buckets:
            bucket.clear()
        self._num_begun, self._is_last = 0, False


class _Bucket:
    """Memory for the gradients of some parameters, side by side, that is all-reduced at once."""

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        first = parameters[0]
        self.memory = torch.empty(sum(p.numel() for p in parameters), dtype=first.dtype, device=first.device)
        self.views: dict[Tensor, Tensor] = {}
        start = 0
        for parameter in parameters:
            # Laid out as the parameter is, which may be channels-last; so is the gradient that autograd makes of it.
            self.views[parameter] = self.memory.as_strided(parameter.shape, parameter.stride(), start)
            start += parameter.numel()
        self.clear()

    def clear(self) -> None:
        self.memory.zero_()
        for parameter, view in self.views.items():
            parameter.grad = view
        self.missing = dict.fromkeys(self.views)
        self._work: Any = None

    def complete(self, parameter: Tensor) -> None:
        if self._work is not None:
            raise UserError(
                "a backward pass reached a parameter twice, such as by torch.utils.checkpoint with use_reentrant=True; set it "
                "to False"
            )
        self.missing.pop(parameter, None)

    def begin(self) -> None:
        self._work = dist.all_reduce(self.memory, async_op=True)

    def wait(self) -> None:
        self._work.wait()


def _buckets(parameters: list[torch.nn.Parameter]) -> Iterator[_Bucket]:
    """Of one data type each, in reverse order of the parameters."""
    inside: list[torch.nn.Parameter] = []
    size = 0
    for parameter in reversed(parameters):
        num_bytes = parameter.numel() * parameter.element_size()
        if inside and (size + num_bytes > BUCKET_BYTES or parameter.dtype != inside[0].dtype):
            yield _Bucket(inside)
            inside, size = [], 0
        inside.append(parameter)
        size += num_bytes
    if inside:
        yield _Bucket(inside)
