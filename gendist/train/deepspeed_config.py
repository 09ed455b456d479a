"""What DeepSpeed is configured with: what the spec says, and a user's own JSON for everything that it does not."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gendist.protocols import UserError
from gendist.train.batches import Division
from gendist.train.config import DeepConfig, OptimizerConfig
from gendist.train.optimizers import MOMENTS

# Keys of a user's file that change where things lie and how they travel, or what is logged, but not what is computed.
PASSED_ON = (
    "activation_checkpointing",
    "aio",
    "communication_data_type",
    "comms_logger",
    "csv_monitor",
    "dump_state",
    "flops_profiler",
    "gradient_predivide_factor",
    "memory_breakdown",
    "prescale_gradients",
    "steps_per_print",
    "tensorboard",
    "timers",
    "wall_clock_breakdown",
    "zero_optimization",
)

# In ZeRO's block: what would change the arithmetic, leave out the norm of the gradient, or step with another optimizer.
_FIXED_IN_ZERO: Mapping[str, Any] = {
    "compute_grad_norm": True,
    "zero_quantized_weights": False,
    "zero_quantized_nontrainable_weights": False,
    "zero_quantized_gradients": False,
    "ignore_unused_parameters": True,
    "zenflow": None,
}

# Elements. DeepSpeed's own default allocates buffers of 500 million, however small the network.
_BUCKET_NUMEL = 8_000_000
_PARAMETER_BUFFER_NUMEL = 100_000_000  # DeepSpeed's own default, of each of five
_BUCKET_ALIGNMENT = 1000  # an even number will do


def read_user_config(path: str) -> dict[str, Any]:
    """A DeepSpeed JSON file; UserError where it is none."""
    try:
        content = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"fit.engine.config: {path} cannot be read as JSON ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"fit.engine.config: {path} holds a {type(content).__name__}; a DeepSpeed configuration is an object")
    return content


def merged(
    user: Mapping[str, Any], config: DeepConfig, optimizer: OptimizerConfig, num_parameters: int, world_size: int
) -> dict[str, Any]:
    """The configuration of one network's DeepSpeed engine.

    user            the content of the user's file, or nothing
    num_parameters  of the network: no bucket need be larger

    UserError names a key of the user's that contradicts the spec, and both values. "auto" contradicts nothing.
    """
    own = _without_auto(user)
    stage = config.engine.zero_stage
    division = Division(config.global_batch_size, world_size, config.micro_batch_size)
    said: dict[str, Any] = {
        "train_batch_size": config.global_batch_size,
        "train_micro_batch_size_per_gpu": config.micro_batch_size or len(division.slice(0)),
        "gradient_accumulation_steps": division.num_micro_batches,
        "gradient_clipping": optimizer.gradient_clipping,
        "gradient_allreduce_op": "mean",
        "managed_gradient_accumulation": True,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    for key, value in said.items():
        _agree(own.pop(key, value), value, key)
    for key, precision in (("bf16", "bfloat16"), ("bfloat16", "bfloat16"), ("fp16", "float16")):
        block = own.pop(key, None)
        if block is not None:
            enabled = bool(block.get("enabled", False)) if isinstance(block, dict) else bool(block)
            if enabled != (config.precision == precision):
                raise _contradiction(f"{key}.enabled", enabled, f"fit.precision: {config.precision}")
    places = {
        "optimizer": f"fit.optimizer.kind: {optimizer.kind}",
        "scheduler": f"fit.optimizer.schedule: {optimizer.schedule}",
    }
    for key, place in places.items():
        if key in own:
            raise _contradiction(key, own[key], place)
    for key in own:
        if key not in PASSED_ON:
            raise UserError(f"fit.engine.config: {key!r} is not passed on to DeepSpeed; what is: {', '.join(PASSED_ON)}")
    zero = _as_block(own.pop("zero_optimization", {}), "zero_optimization")
    for key, value in {"stage": stage, **_FIXED_IN_ZERO}.items():
        _agree(zero.pop(key, value), value, f"zero_optimization.{key}")
    for key in ("offload_optimizer", "offload_param"):
        block = _as_block(zero.get(key) or {}, f"zero_optimization.{key}")
        _check_offload(block, key, stage)
        if block.get("device") == "nvme" and key == "offload_param":
            zero[key] = {"buffer_size": min(-(-num_parameters // world_size), _PARAMETER_BUFFER_NUMEL), **block}
        elif block.get("device") == "nvme":
            num_tensors = 1 + len(MOMENTS[optimizer.kind]) + bool(config.ema)
            zero[key] = {**block, "buffer_count": _buffer_count(block, num_tensors)}
    numel = min(-(-num_parameters // _BUCKET_ALIGNMENT) * _BUCKET_ALIGNMENT, _BUCKET_NUMEL)
    return {
        "communication_data_type": "fp32",
        **own,
        # The number of micro-batches is told before each of them. That there may be several is all that matters: with
        # optimizers offloaded, DeepSpeed adds up only where it is told more than one.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 2,
        # DeepSpeed clips at 1.0 unless told otherwise.
        "gradient_clipping": optimizer.gradient_clipping if stage else 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "reduce_bucket_size": numel,
            "allgather_bucket_size": numel,
            **zero,
            "stage": stage,
        },
    }


def _check_offload(block: Mapping[str, Any], key: str, stage: int) -> None:
    device = block.get("device", "none")
    if device not in ("none", "cpu", "nvme"):
        raise UserError(f"fit.engine.config: {key} to {device} is not supported; allowed are cpu, nvme and none")
    if device == "nvme" and key == "offload_optimizer" and stage in (1, 2):
        raise UserError(
            f"fit.engine.config: {key} to nvme needs fit.engine.zero_stage: 3, not {stage}, at which DeepSpeed keeps it in the "
            "memory of the host without a word; take stage 3, or offload to cpu"
        )
    if device != "none" and (stage == 0 or (key == "offload_param" and stage != 3)):
        needed = "3" if key == "offload_param" or device == "nvme" else "1, 2 or 3"
        raise UserError(f"fit.engine.config: {key} to {device} needs fit.engine.zero_stage: {needed}, not {stage}")
    if device == "nvme" and not isinstance(block.get("nvme_path"), str):
        raise UserError(f"fit.engine.config: {key} to nvme needs nvme_path, a folder on a local disk of every host")
    # With fast_init DeepSpeed steps a copy of other parameters than those of the network.
    for name, only in (("ratio", 1.0), ("super_offload", False), ("fast_init", False)):
        _agree(block.get(name, only), only, f"zero_optimization.{key}.{name}")


def _buffer_count(block: Mapping[str, Any], num_tensors: int) -> int:
    """Through which a sub-group of an optimizer that keeps so many tensors of it comes from NVMe and goes there."""
    needed = num_tensors * (1 + bool(block.get("pipeline_read")) + bool(block.get("pipeline_write")))
    given: int = block.get("buffer_count", needed)
    if given < needed:
        raise UserError(
            f"fit.engine.config: offload_optimizer.buffer_count is {given}, but parameters, moments and moving average take "
            f"{needed} buffers; leave the key out"
        )
    return given


def _agree(given: Any, said: Any, key: str) -> None:
    if given != said:
        raise _contradiction(key, given, str(said))


def _contradiction(key: str, given: Any, said: str) -> UserError:
    return UserError(f"fit.engine.config: {key} is {json.dumps(given)} there, but the spec says {said}; leave the key out")


def _as_block(value: Any, key: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"fit.engine.config: {key} is {json.dumps(value)}; a block of keys is needed")
    return dict(value)


def _without_auto(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _without_auto(value) if isinstance(value, Mapping) else value for key, value in values.items() if value != "auto"
    }
