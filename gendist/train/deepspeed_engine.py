"""The engine over DeepSpeed ZeRO (Rajbhandari et al. 2020), stages 0 to 3: one DeepSpeed engine a network.

Networks are called as themselves, never through DeepSpeed's engines. What the call of such an engine does beside is done
here: it forgets that a backward pass was seen, without which stage 3 keeps the gradient of the last micro-batch alone.
Parameters, gradients and moments are float32, whatever the losses are computed in.
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gendist.cost import StateBytes, Traffic
from gendist.protocols import UserError
from gendist.train import arithmetic, ema, optimizers
from gendist.train.batches import Division
from gendist.train.buffers import Buffers
from gendist.train.config import DeepConfig
from gendist.train.deepspeed_config import merged, read_user_config
from gendist.train.deepspeed_nvme import (
    SwappedOptimizer,
    copy_out_of_buffers,
    on_nvme,
    shard_where_parameters_are_swapped,
    with_own_folders,
)
from gendist.train.loss_scale import LossScale
from gendist.train.memory import FLOAT32_BYTES, state_bytes
from gendist.train.networks import arrange
from gendist.train.processes import Processes, begin_sum
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

_SECOND_DERIVATIVE = -1  # stands for a module, whose numbers begin at 0

# DeepSpeed's own, where a user's file has no others. In entries.
_MAX_LIVE, _PERSISTENCE_THRESHOLD = 10**9, 10**5

_group: dist.ProcessGroup | None = None  # that DeepSpeed knows
_linear_of_torch = torch.nn.functional.linear


class DeepSpeedEngine:
    """`Engine` of networks whose moments (stage 1), gradients (2) and parameters (3) are shared out over the processes.

    At stages 2 and 3 processes exchange gradients within every backward pass, as these are completed: a loss must reach the
    same parameters in the same order on all of them, so it may not branch on the data.

    UserError where DeepSpeed is not installed, or cannot do what the spec asks for.
    """

    def __init__(self, processes: Processes, config: DeepConfig) -> None:
        self._processes = processes
        self.rank, self.world_size, self.device = processes.rank, processes.world_size, processes.device
        self._config = config
        self._stage = config.engine.zero_stage
        self._user = read_user_config(config.engine.config) if config.engine.config else {}
        self.check(processes, config)
        self._deepspeed = _imported(self.device)
        if not dist.is_initialized():
            # DeepSpeed speaks to a group even where there is one process.
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            store = dist.HashStore()  # type: ignore[attr-defined]
            dist.init_process_group(backend, store=store, rank=0, world_size=1)
        _forget_former_groups()
        self._trained: dict[str, _Trained] = {}

    @classmethod
    def check(cls, processes: Processes, config: DeepConfig) -> None:
        stage, division = (
            config.engine.zero_stage,
            Division(config.global_batch_size, processes.world_size, config.micro_batch_size),
        )
        arithmetic.check(config.precision, processes.device)
        if config.channels_last and stage:
            raise UserError(
                f"fit.channels_last: zero_stage {stage} lays parameters out in a flat run; set it to false, or take ddp"
            )
        if config.compile and stage == 3:
            raise UserError(
                "fit.compile: zero_stage 3 gathers parameters within the networks; set it to false, or take stage 2"
            )
        if stage >= 2 and not all(len(part) for rank in range(processes.world_size) for part in division.micro_batches(rank)):
            raise UserError(
                f"fit.engine.zero_stage: {stage} needs a sample in every micro-batch of every process, which global_batch_size "
                f"{config.global_batch_size} over {processes.world_size} processes in micro-batches of "
                f"{config.micro_batch_size} has not; take stage 1, or a batch that divides"
            )

    @classmethod
    def memory(cls, config: DeepConfig, network: str, sizes: Sequence[int], num_processes: int) -> StateBytes:
        state = state_bytes(config, network, sum(sizes), num_processes)
        settings, stage = _settings(config, network, sizes, num_processes), config.engine.zero_stage
        zero = settings["zero_optimization"]
        bucket = FLOAT32_BYTES * zero["reduce_bucket_size"]
        whole = FLOAT32_BYTES * sum(sizes)
        # At stage 1 gradients are whole until the end of the backward pass. At stage 3 parameters are until they will not be
        # needed soon, and of up to `stage3_max_live_parameters` entries that is the same.
        live = min(whole, FLOAT32_BYTES * zero.get("stage3_max_live_parameters", _MAX_LIVE)) * (1.0 - 1.0 / num_processes)
        state = replace(state, in_transit=(0.0, whole - state.gradients, bucket, bucket + live)[stage])
        if zero.get("offload_optimizer", {}).get("device") == "cpu":  # gradients lie there, too, where the optimizer steps
            moved = state.gradients + state.optimizer + state.average
            state = replace(state, gradients=0.0, optimizer=0.0, average=0.0, on_host=moved)
        if zero.get("offload_param", {}).get("device") == "cpu":
            state = replace(state, parameters=0.0, on_host=state.on_host + state.parameters)
        return on_nvme(state, settings, sizes, num_processes)

    @classmethod
    def traffic(
        cls, config: DeepConfig, network: str, sizes: Sequence[int], num_processes: int, num_micro_batches: int
    ) -> Traffic:
        zero = _settings(config, network, sizes, num_processes)["zero_optimization"]
        whole, stage = FLOAT32_BYTES * sum(sizes), config.engine.zero_stage
        num_buckets = -(-sum(sizes) // zero["reduce_bucket_size"])
        once = Traffic.ring(whole, num_processes, num_buckets)
        if stage < 3:
            # Gradients are all-reduced, at stage 2 those of each micro-batch (DeepSpeed 0.19.8 scatters none there); then
            # parameters are gathered from those that stepped them.
            return once.times(2 * (num_micro_batches if stage == 2 else 1)) + once.times(1 if stage else 0)
        threshold = zero.get("stage3_param_persistence_threshold", _PERSISTENCE_THRESHOLD)
        large = [size for size in sizes if size >= threshold]
        few = Traffic.ring(FLOAT32_BYTES * (sum(sizes) - sum(large)), num_processes, len(sizes) - len(large))
        # For the forward pass, and for the backward pass once more where they are not all kept until then.
        num_gathers = 1 if sum(large) <= zero.get("stage3_max_live_parameters", _MAX_LIVE) else 2
        gathered = Traffic.ring(FLOAT32_BYTES * sum(large), num_processes, len(large))
        return (gathered.times(num_gathers) + once).times(num_micro_batches) + few

    def prepare(self, networks: Mapping[str, torch.nn.Module], state: Mapping[str, Tensor] | None = None) -> None:
        if state is not None:
            check(state, shapes(networks, self._config))
            # Before DeepSpeed makes copies and cuts them up.
            load_networks(networks, state)
        arrange(networks, self.device, self._config)
        self._buffers = Buffers(networks)
        for name, network in networks.items():
            options = optimizers.config_of(self._config, name)
            num_parameters = sum(p.numel() for p in network.parameters())
            settings = merged(self._user, self._config, options, num_parameters, self.world_size)
            # At stage 3 parameters have no size afterwards.
            trained = {key: p for key, p in network.named_parameters() if p.requires_grad}
            sizes = [p.numel() for p in trained.values()]
            held = state_bytes(self._config, name, sum(sizes), self.world_size)
            settings = with_own_folders(settings, self, held, sizes, self.world_size)
            engine = self._initialized(network, optimizers.make(options, trained.values()), settings)
            self._trained[name] = _TRAINED[self._stage](name, network, trained, engine, self._config, state)

    def _initialized(self, network: torch.nn.Module, optimizer: torch.optim.Optimizer, settings: dict[str, Any]) -> Any:
        try:
            shard_where_parameters_are_swapped(network, settings)
            engine, *_ = self._deepspeed.initialize(model=network, optimizer=optimizer, config=settings)
            if self._stage == 3:
                _leave_whole_weights_to_torch()
        except (AssertionError, ValueError, TypeError, RuntimeError) as error:
            if not self._user:
                raise
            why = " ".join(str(error).split())
            raise UserError(f"fit.engine.config: DeepSpeed refuses {self._config.engine.config}: {why}") from error
        return engine

    def begin_phase(self, network: str) -> None:
        for name, trained in self._trained.items():
            trained.set_frozen(name != network)
        self._buffers.begin_phase()

    def begin_micro_batch(self, network: str, is_last: bool) -> None:
        self._buffers.begin_micro_batch()
        self._trained[network].begin_micro_batch(is_last)

    def precision(self) -> AbstractContextManager[None]:
        # At stage 3 the cache would hold all of a network that is gathered a module at a time.
        return arithmetic.autocast(self._config.precision, self.device, cache_enabled=self._stage != 3)

    def backward(self, network: str, loss: Tensor) -> None:
        # DeepSpeed takes the mean over the processes.
        self._trained[network].backward(loss * self.world_size)
        for trained in self._trained.values():
            trained.end_backward()

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
        # One at a time: of a network that is sharded, no process ever holds more than one parameter whole.
        values = (item for trained in self._trained.values() for item in trained.state())
        state = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in values if self.rank == 0}
        return state if self.rank == 0 else None

    @contextmanager
    def averaged(self) -> Iterator[None]:
        with ExitStack() as stack:
            for trained in self._trained.values():
                stack.enter_context(trained.averaged())
            yield


class _Trained:
    """A network with its DeepSpeed engine, which at stage 0 wraps a plain optimizer."""

    def __init__(
        self,
        name: str,
        network: torch.nn.Module,
        trained: Mapping[str, torch.nn.Parameter],
        engine: Any,
        config: DeepConfig,
        state: Mapping[str, Tensor] | None,
    ) -> None:
        self.name, self.network, self.engine = name, network, engine
        self.parameters = trained
        self.config = optimizers.config_of(config, name)
        self.stage = config.engine.zero_stage
        self.gamma = ema.gamma_of_width(config.ema) if config.ema else None
        self.scales_loss = config.precision == "float16"
        self.loss_scale = LossScale() if self.scales_loss else LossScale(1.0)
        self.num_steps = 0
        # The moving average lies with the moments, so that it is shared out, offloaded and gathered as they are.
        self.kinds = (*optimizers.MOMENTS[self.config.kind], *((AVERAGE,) if config.ema else ()))
        if state is not None:
            self.num_steps = int(state[entry(name, STEP)])
            if self.scales_loss:
                self.loss_scale = LossScale.from_tensor(state[entry(name, LOSS_SCALE)])
        self._make_moments()
        if state is not None:
            self._load_moments(state)
        if self.gamma is not None:
            engine.basic_optimizer.register_step_post_hook(lambda *_: self._average())

    def shards(self) -> Iterable[Tensor]:
        """The tensors that this process steps."""
        return self.parameters.values()

    def _make_moments(self) -> None:
        """What the optimizer would make in its first step, so that it is there to be filled."""
        for shard in self.shards():
            state = self.engine.basic_optimizer.state[shard]
            if self.config.kind == "adam":
                state["step"] = torch.tensor(float(self.num_steps), device=shard.device)
            for kind in self.kinds:
                state[kind] = shard.detach().clone() if kind == AVERAGE else torch.zeros_like(shard.detach())

    def _load_moments(self, state: Mapping[str, Tensor]) -> None:
        for key, parameter in self.parameters.items():
            for kind in self.kinds:
                self.set(kind, parameter, state[entry(self.name, kind, key)])

    def get(self, kind: str, parameter: torch.nn.Parameter) -> Tensor:
        value: Tensor = self.engine.basic_optimizer.state[parameter][kind]
        return value

    def set(self, kind: str, parameter: torch.nn.Parameter, value: Tensor) -> None:
        self.get(kind, parameter).copy_(value)

    def set_frozen(self, is_frozen: bool) -> None:
        for parameter in self.parameters.values():
            parameter.requires_grad_(not is_frozen)

    def begin_micro_batch(self, is_last: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(is_last)

    def backward(self, loss: Tensor) -> None:
        if not loss.requires_grad:
            loss = self._nothing()
        # Micro-batches are added up, not averaged.
        self.engine.backward(self._scaled(loss), scale_wrt_gas=False)

    def end_backward(self) -> None:
        """After that of any network."""

    def _nothing(self) -> Tensor:
        """0, with a gradient of 0 for every parameter, for a loss that happens to depend on none."""
        if self.stage >= 2:
            raise UserError(
                f"fit.engine.zero_stage: {self.stage} needs a loss that depends on {self.name} in every micro-batch; write it "
                "without a branch on the data, or take stage 1"
            )
        return torch.stack([p.flatten()[0] * 0.0 for p in self.parameters.values() if p.numel()]).sum()

    def _scaled(self, loss: Tensor) -> Tensor:
        return loss * self.loss_scale.scale

    def step(self, learning_rate: float) -> float:
        for group in self.engine.basic_optimizer.param_groups:
            group["lr"] = learning_rate
        norm = self._step()
        is_finite = math.isfinite(norm)
        self.num_steps += is_finite
        if self.scales_loss:
            self.loss_scale = self.loss_scale.after(is_finite)
        return norm

    def _step(self) -> float:
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients)) / self.loss_scale.scale
        if not math.isfinite(norm):
            self.engine.zero_grad()
            return norm
        limit = self.config.gradient_clipping
        factor = min(1.0, limit / (norm + 1e-6)) if limit else 1.0  # 1e-6 as torch and the other stages have it
        factor /= self.loss_scale.scale
        if factor != 1.0:
            torch._foreach_mul_(gradients, factor)
        self.engine.step()
        return norm

    def _average(self) -> None:
        """After each call of the optimizer, which at stage 3 steps some of the parameters at a time."""
        assert self.gamma is not None
        weight = 1.0 - ema.decay(self.gamma, self.num_steps + 1)
        optimizer = self.engine.basic_optimizer
        with torch.no_grad():
            for group in optimizer.param_groups:
                for shard in group["params"]:
                    optimizer.state[shard][AVERAGE].lerp_(shard, weight)

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """By the names of `gendist.train.state_entries`; every process must go through it."""
        yield entry(self.name, STEP), torch.tensor(self.num_steps)
        if self.scales_loss:
            yield entry(self.name, LOSS_SCALE), self.loss_scale.tensor()
        for key, value in persistent_buffers(self.network).items():
            yield entry(self.name, BUFFER, key), value
        for key, parameter in self.network.named_parameters():
            with self.whole([parameter]):
                yield entry(self.name, PARAMETER, key), parameter
            for kind in self.kinds if key in self.parameters else ():
                yield entry(self.name, kind, key), self.get(kind, parameter)

    def whole(self, parameters: list[torch.nn.Parameter]) -> AbstractContextManager[Any]:
        """The parameters are whole on every process inside."""
        return nullcontext()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        parameters = list(self.parameters.values()) if self.gamma is not None else []
        with torch.no_grad():
            plain = [parameter.clone() for parameter in parameters]
            for parameter in parameters:
                parameter.copy_(self.get(AVERAGE, parameter))
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, value in zip(parameters, plain, strict=True):
                    parameter.copy_(value)


class _Sharded(_Trained):
    """At stages 1 and 2 the optimizer steps a part of a flat copy of the parameters on each process."""

    def shards(self) -> Iterable[Tensor]:
        return self.engine.optimizer.single_partition_of_fp32_groups

    def _make_moments(self) -> None:
        super()._make_moments()
        self.engine.optimizer._lazy_init_hp_params_optimizer_state()

    def get(self, kind: str, parameter: torch.nn.Parameter) -> Tensor:
        from deepspeed import utils

        value: Tensor = utils.safe_get_full_optimizer_state(parameter, kind)
        return value

    def set(self, kind: str, parameter: torch.nn.Parameter, value: Tensor) -> None:
        from deepspeed import utils

        utils.safe_set_full_optimizer_state(parameter, value.to(parameter.device), kind)

    def begin_micro_batch(self, is_last: bool) -> None:
        super().begin_micro_batch(is_last)
        self.engine.optimizer.clear_backward_seen_flag()

    def _scaled(self, loss: Tensor) -> Tensor:
        if self.scales_loss:
            # It multiplies the loss, and takes the scale out of gradients and norm before it clips.
            self.engine.optimizer.override_loss_scale(self.loss_scale.scale)
        return loss

    def _step(self) -> float:
        self.engine.step()
        self._clear_gradients()
        return math.inf if self.engine.optimizer.overflow else float(self.engine.get_global_grad_norm())

    def _clear_gradients(self) -> None:
        """Of optimizers that are offloaded, gradients lie there for good: DeepSpeed would step a parameter that the next loss
        does not reach along the gradient of this one."""
        for shard in self.shards():
            if shard.grad is not None:
                shard.grad.zero_()


class _ShardedParameters(_Sharded):
    """At stage 3 no process holds a network; its modules gather their parameters when they are called."""

    def shards(self) -> Iterable[Tensor]:
        return self._swapped.shards()

    def _make_moments(self) -> None:
        self._swapped = SwappedOptimizer(self.engine.optimizer)
        copy_out_of_buffers(self.engine.optimizer, self.network)
        _Trained._make_moments(self)
        self._kept = False
        self._keep_for_second_derivatives()

    def _load_moments(self, state: Mapping[str, Tensor]) -> None:
        with self._swapped.one_at_a_time():
            super()._load_moments(state)

    def state(self) -> Iterator[tuple[str, Tensor]]:
        # DeepSpeed does not gather a parameter that is whole by now and has its shard on a disk.
        self.engine.optimizer._partition_all_parameters()
        with self._swapped.one_at_a_time():
            yield from super().state()

    def _keep_for_second_derivatives(self) -> None:
        """Parameters that a gradient with `create_graph=True` goes through stay whole until the backward pass of the loss.

        DeepSpeed lets go of them after the first derivative, and does not gather them again for the second.
        """
        offload = self.engine.optimizer.parameter_offload
        gather = offload.pre_sub_module_backward_function

        def gather_and_keep(module: torch.nn.Module) -> None:
            gather(module)
            if torch.is_grad_enabled():
                self._kept = True
                for parameter in module.parameters(recurse=False):
                    # DeepSpeed keeps a parameter as long as some module is marked as computing with it.
                    parameter.ds_active_sub_modules.add(_SECOND_DERIVATIVE)  # type: ignore[attr-defined]

        offload.pre_sub_module_backward_function = gather_and_keep

    def _clear_gradients(self) -> None:
        for shard in self.engine.optimizer.fp32_partitioned_groups_flat:
            if shard.grad is not None:
                shard.grad.zero_()
        self.engine.optimizer.grad_partitions_flat_buffer.zero_()  # as above, at stage 3 in any case

    def end_backward(self) -> None:
        if self._kept:
            self._kept = False
            self.engine.optimizer._partition_all_parameters()

    def set(self, kind: str, parameter: torch.nn.Parameter, value: Tensor) -> None:
        size = parameter.partition_numel()  # type: ignore[attr-defined]
        mine = value.flatten()[dist.get_rank() * size :][:size]
        self._swapped.set(kind, parameter, torch.nn.functional.pad(mine, (0, size - len(mine))))

    def whole(self, parameters: list[torch.nn.Parameter]) -> AbstractContextManager[Any]:
        import deepspeed

        return deepspeed.zero.GatheredParameters(parameters)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        self.engine.optimizer._partition_all_parameters()
        # The whole ones are copies, which are thrown away at the end: nothing need be put back.
        with self._without_hooks(), self.whole(list(self.network.parameters())):
            with self._swapped.one_at_a_time():
                for parameter in self.parameters.values() if self.gamma is not None else ():
                    # In memory of its own: one process alone has the shard for the whole.
                    parameter.data = self.get(AVERAGE, parameter).clone()
            yield

    @contextmanager
    def _without_hooks(self) -> Iterator[None]:
        """The modules neither gather nor let go of parameters, so that any one process may call them alone."""
        offload = self.engine.optimizer.parameter_offload
        start_of_forward = self.network._forward_pre_hooks[offload.fwd_pre_hook.id]
        offload._remove_module_hooks()
        offload.forward_hooks, offload.backward_hooks = [], []
        try:
            yield
        finally:
            offload.fwd_pre_hook = self.network.register_forward_pre_hook(start_of_forward)
            offload._register_deepspeed_module(self.network)


_TRAINED = {0: _Trained, 1: _Sharded, 2: _Sharded, 3: _ShardedParameters}


def _settings(config: DeepConfig, network: str, sizes: Sequence[int], num_processes: int) -> dict[str, Any]:
    user = read_user_config(config.engine.config) if config.engine.config else {}
    return merged(user, config, optimizers.config_of(config, network), sum(sizes), num_processes)


def _imported(device: torch.device) -> Any:
    # DeepSpeed reads them when it is imported and when it starts.
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))
    if device.type == "cpu":
        # At every step of stage 3 DeepSpeed asks how many devices there are, and starts numactl to find out.
        os.environ.setdefault("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1"))
    try:
        import deepspeed
    except ImportError as error:
        raise UserError(
            f"fit.engine.kind: deepspeed is not installed ({error}); pip install 'gendist[deepspeed]', or take ddp"
        ) from error
    found = deepspeed.get_accelerator().device_name()
    if found.split(":")[0] != device.type:
        raise UserError(
            f"DeepSpeed computes on {found} in this process, not on {device.type}: set DS_ACCELERATOR={device.type}"
        )
    # An all-reduce for inference; to build it takes a C++ compiler and a minute.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").addFilter(_is_news)
    # At every step: DeepSpeed calls collectives by names that torch has changed since.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    return deepspeed


def _leave_whole_weights_to_torch() -> None:
    """At stage 3 DeepSpeed puts a product of its own in place of torch's, for all that this process computes from then on."""
    from deepspeed.runtime.zero.linear import zero3_linear_wrap

    def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        product = zero3_linear_wrap if hasattr(weight, "ds_id") else _linear_of_torch
        return product(input, weight, bias)

    torch.nn.functional.linear = linear


def _forget_former_groups() -> None:
    """DeepSpeed keeps its copy of the process group, which somebody may have destroyed and made anew since."""
    from deepspeed.utils import groups

    global _group
    if _group is not dist.group.WORLD:
        groups._release_process_group_references()
        _group = dist.group.WORLD


def _is_news(record: logging.LogRecord) -> bool:
    """Silences the warning that a plain torch optimizer is none of DeepSpeed's own, which our tests cover."""
    return "untested optimizer" not in record.getMessage()
