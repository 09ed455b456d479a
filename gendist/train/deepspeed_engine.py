"""The engine over DeepSpeed ZeRO (Rajbhandari et al. 2020), stages 0 to 3: one DeepSpeed engine a network.

Networks are called as themselves, never through DeepSpeed's engines, whose own call does two things that are done here:
it clears what an earlier backward left behind, without which stage 3 forgets all but the last micro-batch, and it casts
inputs. Parameters, gradients and moments are float32; lower precision is autocast's.
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from gendist.protocols import UserError
from gendist.train.config import DeepConfig, OptimizerConfig
from gendist.train.deepspeed_config import merge, read_user_config

MOMENTS = {"adam": ("exp_avg", "exp_avg_sq"), "sgd": ()}


class DeepSpeedEngine:
    def __init__(self, config: DeepConfig, device: torch.device) -> None:
        self._config = config
        self.device = device
        self._deepspeed = _import_deepspeed(device)
        if not torch.distributed.is_initialized():
            # DeepSpeed speaks to a group even where it is one of one.
            backend = "nccl" if device.type == "cuda" else "gloo"
            torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
        self.rank = torch.distributed.get_rank()
        self.world_size = torch.distributed.get_world_size()
        self._user = read_user_config(config.engine.config) if config.engine.config else {}
        self._stage = config.engine.zero_stage
        self._networks: Mapping[str, torch.nn.Module] = {}
        self._engines: dict[str, Any] = {}
        self._num_steps: dict[str, int] = {}

    def prepare(self, networks: Mapping[str, torch.nn.Module], state: Mapping[str, Tensor] | None = None) -> None:
        self._networks = networks
        for name, network in networks.items():
            if state is not None:
                # Before DeepSpeed copies and cuts them up.
                network.load_state_dict(_under(state, f"network.{name}."))
            network.to(self.device)
            self._start(name, network, state)

    def _start(self, name: str, network: torch.nn.Module, state: Mapping[str, Tensor] | None) -> None:
        options = self._optimizer_config(name)
        parameters = list(network.parameters())
        optimizer = _optimizer(parameters, options)
        num_parameters = sum(p.numel() for p in parameters)
        merged = merge(self._user, self._config, options, num_parameters, self.world_size)
        engine, *_ = self._deepspeed.initialize(model=network, optimizer=optimizer, config=merged)
        self._engines[name] = engine
        self._num_steps[name] = int(state[f"steps.{name}"]) if state is not None else 0
        self._create_moments(name)
        if state is not None:
            for parameter_name, p in network.named_parameters():
                for moment in self._moments(name):
                    self._set(name, p, moment, state[f"{moment}.{name}.{parameter_name}"])
        if self._config.ema:
            engine.basic_optimizer.register_step_post_hook(lambda basic, *_: self._average(name, basic))

    def _optimizer_config(self, name: str) -> OptimizerConfig:
        return self._config.optimizers.get(name, self._config.optimizer)

    def _moments(self, name: str) -> tuple[str, ...]:
        """What the optimizer keeps for each parameter. The average of the parameters is one more: so it is sharded,
        offloaded and gathered as the others are."""
        return MOMENTS[self._optimizer_config(name).kind] + (("ema",) if self._config.ema else ())

    # ---- a step

    def begin_phase(self, network: str) -> None:
        for name, other in self._networks.items():
            other.requires_grad_(name == network)

    def begin_micro_batch(self, network: str, is_last: bool) -> None:
        engine = self._engines[network]
        engine.set_gradient_accumulation_boundary(is_last)
        if self._stage:
            engine.optimizer.clear_backward_seen_flag()

    def precision(self) -> AbstractContextManager[None]:
        if self._config.precision == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, getattr(torch, self._config.precision))

    def backward(self, network: str, loss: Tensor) -> None:
        # DeepSpeed averages over the processes, and over micro-batches unless told not to.
        self._engines[network].backward(loss * self.world_size, scale_wrt_gas=False)

    def step(self, network: str, learning_rate: float) -> float:
        engine = self._engines[network]
        for group in engine.basic_optimizer.param_groups:
            group["lr"] = learning_rate
        self._num_steps[network] += 1
        if self._stage:
            engine.step()
            norm = math.inf if engine.optimizer.overflow else float(engine.get_global_grad_norm())
        else:
            norm = self._clip(network)
            if math.isfinite(norm):
                engine.step()
        if not math.isfinite(norm):
            self._num_steps[network] -= 1
            engine.zero_grad()
        return norm

    def _clip(self, network: str) -> float:
        parameters = list(self._networks[network].parameters())
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        clipping = self._optimizer_config(network).gradient_clipping
        if clipping:
            torch.nn.utils.clip_grads_with_norm_(parameters, clipping, norm)
        return float(norm)

    def _average(self, network: str, optimizer: torch.optim.Optimizer) -> None:
        decay = _decay(self._num_steps[network], self._config.ema)
        with torch.no_grad():
            for group in optimizer.param_groups:
                for p in group["params"]:
                    optimizer.state[p]["ema"].lerp_(p, 1.0 - decay)

    def sum(self, values: Tensor) -> Tensor:
        total = values.to(self.device, copy=True)
        torch.distributed.all_reduce(total)
        return total.to(values.device)

    # ---- state

    def _shards(self, name: str) -> list[Tensor]:
        """The float32 tensors that this process steps."""
        engine = self._engines[name]
        if self._stage == 0:
            return list(self._networks[name].parameters())
        if self._stage == 3:
            return list(engine.optimizer.fp32_partitioned_groups_flat)
        return list(engine.optimizer.single_partition_of_fp32_groups)

    def _create_moments(self, name: str) -> None:
        """What the optimizer would create in its first step, so that it is there to be filled."""
        basic = self._engines[name].basic_optimizer
        for shard in self._shards(name):
            state = basic.state[shard]
            if self._optimizer_config(name).kind == "adam":
                state["step"] = torch.tensor(float(self._num_steps[name]))
            for moment in self._moments(name):
                state[moment] = shard.detach().clone() if moment == "ema" else torch.zeros_like(shard)
        if self._stage in (1, 2):
            self._engines[name].optimizer._lazy_init_hp_params_optimizer_state()

    def _set(self, name: str, p: torch.nn.Parameter, moment: str, value: Tensor) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        if self._stage == 0:
            self._engines[name].basic_optimizer.state[p][moment].copy_(value)
        elif self._stage == 3:
            numel = p.partition_numel()
            local = value.flatten()[self.rank * numel : (self.rank + 1) * numel]
            padded = torch.nn.functional.pad(local, (0, numel - local.numel()))
            safe_set_local_optimizer_state(p, padded, moment)
        else:
            safe_set_full_optimizer_state(p, value.to(p.device), moment)

    def _get(self, name: str, p: torch.nn.Parameter, moment: str) -> Tensor:
        from deepspeed.utils import safe_get_full_optimizer_state

        if self._stage == 0:
            return self._engines[name].basic_optimizer.state[p][moment]
        return safe_get_full_optimizer_state(p, moment)

    def _whole(self, p: torch.nn.Parameter) -> Tensor:
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(p) if self._stage == 3 else p

    def state(self) -> dict[str, Tensor] | None:
        state: dict[str, Tensor] = {}

        def keep(key: str, value: Tensor) -> None:
            if self.rank == 0:
                state[key] = value.detach().to("cpu", copy=True)

        for name, network in self._networks.items():
            network.requires_grad_(True)
            for key, buffer in network.named_buffers():
                keep(f"network.{name}.{key}", buffer)
            # One parameter at a time: never more than one is whole.
            for key, p in network.named_parameters():
                keep(f"network.{name}.{key}", self._whole(p))
                for moment in self._moments(name):
                    keep(f"{moment}.{name}.{key}", self._get(name, p, moment))
            keep(f"steps.{name}", torch.tensor(self._num_steps[name]))
        return state if self.rank == 0 else None

    @contextmanager
    def averaged(self) -> Iterator[None]:
        with ExitStack() as stack:
            for name, network in self._networks.items():
                network.requires_grad_(True)
                stack.enter_context(self._whole_network(name))
                if self._config.ema:
                    stack.enter_context(self._swapped(name))
            yield

    @contextmanager
    def _whole_network(self, name: str) -> Iterator[None]:
        """All parameters are whole, and stay so when the network is called."""
        if self._stage != 3:
            yield
            return
        parameters = list(self._networks[name].parameters())
        self._engines[name].optimizer._partition_all_parameters()
        with self._deepspeed.zero.GatheredParameters(parameters):
            for p in parameters:
                # A parameter that some module is still at work with is not let go of.
                p.ds_active_sub_modules.add(-1)
            try:
                yield
            finally:
                for p in parameters:
                    p.ds_active_sub_modules.discard(-1)

    @contextmanager
    def _swapped(self, name: str) -> Iterator[None]:
        parameters = list(self._networks[name].parameters())
        # At stage 3 the whole ones are copies, which are thrown away.
        plain = [] if self._stage == 3 else [p.detach().clone() for p in parameters]
        with torch.no_grad():
            for p in parameters:
                p.copy_(self._get(name, p, "ema"))
        try:
            yield
        finally:
            with torch.no_grad():
                for p, value in zip(parameters, plain, strict=False):
                    p.copy_(value)


def _optimizer(parameters: list[torch.nn.Parameter], options: OptimizerConfig) -> torch.optim.Optimizer:
    if options.kind == "sgd":
        return torch.optim.SGD(parameters, lr=options.learning_rate, weight_decay=options.weight_decay)
    return torch.optim.AdamW(
        parameters, lr=options.learning_rate, betas=options.betas, eps=options.epsilon, weight_decay=options.weight_decay
    )


def _decay(step: int, width: float) -> float:
    return (1.0 - 1.0 / step) ** (width + 1.0)


def _under(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _import_deepspeed(device: torch.device) -> Any:
    # Read when it is first imported.
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    try:
        import deepspeed
    except ImportError as error:
        raise UserError(
            f"fit.engine.kind: deepspeed is not installed here ({error}); pip install 'gendist[deepspeed]', or take ddp"
        ) from error
    # An all-reduce for inference alone; building it would take a C++ compiler and a minute.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm_op"] = False
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))
    # Collectives that DeepSpeed calls by names which torch has renamed since: a line at every step.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    return deepspeed
