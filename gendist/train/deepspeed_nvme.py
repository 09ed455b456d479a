"""What DeepSpeed swaps to files on NVMe (Rajbhandari et al. 2021, "ZeRO-Infinity"): of one network, at stage 3.

Of the optimizer these are, by sub-groups of the parameters, the copy that is stepped, the moments and the moving average; of
the network, parameters while no module computes with them. What is small on a process stays in memory, and so do gradients.
The rest is DeepSpeed's own; here stands what it lacks to be as exact as training in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import accumulate
from typing import Any

from torch import Tensor
from torch.nn import Module, Parameter

from gendist.cost import StateBytes
from gendist.train.deepspeed_host import check_lock, check_operator, check_space, own_folder
from gendist.train.memory import FLOAT32_BYTES

# DeepSpeed's own, where a user's file has no others. In entries, but for bytes.
_SUB_GROUP_SIZE, _MAX_IN_CPU, _PARAMETER_BUFFERS, _SWAPPED_BYTES = 10**9, 10**9, 5, 2**20

_SWAPPING = ("_optimizer_states_and_gradient_swap_in", "_release_swap_buffers", "_optimizer_states_and_gradient_swap_out")


class SwappedOptimizer:
    """DeepSpeed's optimizer of one network at stage 3, some sub-groups of which are swapped, or none."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        if optimizer.swap_optimizer:
            self._keep_gradients_in_memory()

    def _keep_gradients_in_memory(self) -> None:
        """DeepSpeed has them there in any case, and writes a copy to files. Of a parameter that a loss does not reach it steps
        along what the file has from an earlier step, or the buffer from any other use."""
        optimizer, gradients, start = self._optimizer, [], 0
        for numel in optimizer.fp16_partitioned_groups_flat_numel:
            gradients.append(optimizer.grad_partitions_flat_buffer.narrow(0, start, numel))
            start += numel
        prepare = optimizer._prepare_sub_group

        def prepare_with_gradient(sub_group: int, timers: Any) -> None:
            prepare(sub_group, timers)
            if optimizer._swappable_optimizer_subgroup(sub_group):
                optimizer.fp32_partitioned_groups_flat[sub_group].grad = gradients[sub_group]

        optimizer._prepare_sub_group = prepare_with_gradient
        optimizer._swap_out_offload_fp32_gradients = lambda *_: None

    def shards(self) -> Iterator[Tensor]:
        """The tensors that this process steps, each in memory until the next is asked for; what becomes of it and of its
        moments is kept."""
        optimizer = self._optimizer
        for sub_group, shard in enumerate(optimizer.fp32_partitioned_groups_flat):
            is_swapped = optimizer._swappable_optimizer_subgroup(sub_group)
            if is_swapped:
                optimizer._optimizer_states_and_gradient_swap_in(sub_group)
            yield shard
            if is_swapped:
                optimizer._optimizer_states_and_gradient_swap_out(sub_group)

    def set(self, kind: str, parameter: Parameter, value: Tensor) -> None:
        """This process's share of a moment. DeepSpeed's own function refuses where the parameter itself is swapped."""
        optimizer = self._optimizer
        share, sub_group = optimizer._get_fp32_opt_state_partition(parameter, release_swap_buffers=False, optim_state_key=kind)
        share.copy_(value)
        if optimizer._swappable_optimizer_subgroup(sub_group):
            optimizer._optimizer_states_and_gradient_swap_out(sub_group)

    @contextmanager
    def one_at_a_time(self) -> Iterator[None]:
        """A sub-group that is asked for stays in memory until another is. DeepSpeed reads all of it for each moment of each
        parameter, and writes it as often."""
        optimizer = self._optimizer
        swap_in, release, swap_out = (getattr(optimizer, name) for name in _SWAPPING)
        present: int | None = None
        is_changed = False

        def put_away() -> None:
            nonlocal present, is_changed
            if present is not None:
                (swap_out if is_changed else release)(present)
            present, is_changed = None, False

        def bring(sub_group: int) -> None:
            nonlocal present
            if present != sub_group:
                put_away()
                swap_in(sub_group)
                present = sub_group

        def note_change(sub_group: int) -> None:
            nonlocal is_changed
            assert present == sub_group
            is_changed = True

        for name, function in zip(_SWAPPING, (bring, lambda _: None, note_change), strict=True):
            setattr(optimizer, name, function)
        try:
            yield
        finally:
            for name in _SWAPPING:
                delattr(optimizer, name)  # the methods of its class are back
            put_away()


def shard_where_parameters_are_swapped(network: Module, settings: Mapping[str, Any]) -> None:
    """To be called before DeepSpeed does it, which on a CPU makes bfloat16 of the parameters that it swaps."""
    import deepspeed

    if _device(settings, "offload_param") == "nvme":
        deepspeed.zero.Init(module=network, config_dict_or_path=dict(settings))


def copy_out_of_buffers(optimizer: Any, network: Module) -> None:
    """Parameters that were read from files have memory of their own, and not the buffer that they were read to.

    DeepSpeed leaves them in it until they are let go of, and fails where more are whole at once than it has buffers. One
    process alone would compute with the buffer itself.
    """
    from deepspeed.runtime.swap_tensor.partitioned_param_swapper import PartitionedParamStatus

    swapped: list[Any] = [p for p in network.parameters() if p.ds_tensor.final_location == "nvme"]  # type: ignore[attr-defined]
    if not swapped:
        return
    # A step would not reach the file of what was read ahead and not used by then.
    optimizer._get_param_coordinator()._PartitionedParameterCoordinator__prefetch_nvme = False
    swapper = swapped[0].nvme_swapper
    swap_in = swapper.swap_in

    def swap_in_and_copy(parameters: list[Any], async_op: bool = False) -> None:
        num_buffers = swapper.available_swap_in_buffers()
        for start in range(0, len(parameters), num_buffers):
            some = parameters[start : start + num_buffers]
            swap_in(some, async_op=False)
            values = [parameter.ds_tensor.data.clone() for parameter in some]
            swapper.remove_partition_and_release_buffers(some)
            for parameter, value in zip(some, values, strict=True):
                parameter.ds_tensor.data = value
                parameter.ds_tensor.status = PartitionedParamStatus.AVAILABLE

    swapper.swap_in = swap_in_and_copy


def with_own_folders(
    settings: Mapping[str, Any], owner: object, state: StateBytes, sizes: Sequence[int], num_processes: int
) -> dict[str, Any]:
    """The settings of one network, where whatever is swapped goes to folders of its own in the user's `nvme_path`.

    DeepSpeed names files after ranks and parameters, so that two networks, or two runs, would take each other's. The folders
    go with the owner.

    state, sizes, num_processes  as of `on_nvme`

    UserError where they cannot be swapped on this host.
    """
    zero = dict(settings["zero_optimization"])
    swapped = [key for key in ("offload_optimizer", "offload_param") if _device(settings, key) == "nvme"]
    if swapped:
        check_operator()
        check_lock(sum(_buffer_bytes(settings, sizes, num_processes)))
    for key in swapped:
        zero[key] = {**zero[key], "nvme_path": own_folder(zero[key]["nvme_path"], owner)}
    if swapped:
        paths = {settings["zero_optimization"][key]["nvme_path"] for key in swapped}
        check_space(paths, on_nvme(state, settings, sizes, num_processes).on_disk)
    return {**settings, "zero_optimization": zero}


def _buffer_bytes(settings: Mapping[str, Any], sizes: Sequence[int], num_processes: int) -> tuple[int, int]:
    """On the host, of the optimizer and of the parameters."""
    zero, optimizer, parameters = settings["zero_optimization"], 0, 0
    largest = max(map(sum, _sub_groups(settings, sizes, num_processes)), default=0)
    if _device(settings, "offload_optimizer") == "nvme":
        optimizer = zero["offload_optimizer"]["buffer_count"] * largest
    if _device(settings, "offload_param") == "nvme":
        block = zero["offload_param"]
        parameters = block.get("buffer_count", _PARAMETER_BUFFERS) * block["buffer_size"]
        if sum(map(sum, _sub_groups(settings, sizes, num_processes))) > block.get("max_in_cpu", _MAX_IN_CPU):
            parameters += num_processes * largest  # of a sub-group as a whole, through which all of them are written
    return FLOAT32_BYTES * optimizer, FLOAT32_BYTES * parameters


def on_nvme(state: StateBytes, settings: Mapping[str, Any], sizes: Sequence[int], num_processes: int) -> StateBytes:
    """What is held, with that which is offloaded to NVMe there; the buffers that it travels through are on the host.

    sizes  entries of each parameter that is trained
    """
    sub_groups = _sub_groups(settings, sizes, num_processes)
    in_all = max(sum(map(sum, sub_groups)), 1)
    threshold = max(_SWAPPED_BYTES, (settings.get("aio") or {}).get("block_size", 0)) / FLOAT32_BYTES
    of_optimizer, of_parameters = _buffer_bytes(settings, sizes, num_processes)
    if _device(settings, "offload_optimizer") == "nvme":
        swapped = sum(numel for numel in map(sum, sub_groups) if numel >= threshold) / in_all
        stepped = state.optimizer + state.average
        state = replace(
            state,
            gradients=0.0,
            optimizer=0.0,
            average=0.0,
            on_host=state.on_host + state.gradients + (1.0 - swapped) * stepped + of_optimizer,
            on_disk=state.on_disk + swapped * stepped,
        )
    if _device(settings, "offload_param") == "nvme":
        max_in_cpu = settings["zero_optimization"]["offload_param"].get("max_in_cpu", _MAX_IN_CPU)
        ends = accumulate(map(sum, sub_groups))
        beyond = [numel for end, group in zip(ends, sub_groups, strict=True) if end > max_in_cpu for numel in group]
        swapped = sum(numel for numel in beyond if numel >= threshold) / in_all
        state = replace(
            state,
            parameters=0.0,
            on_host=state.on_host + (1.0 - swapped) * state.parameters + of_parameters,
            on_disk=state.on_disk + swapped * state.parameters,
        )
    return state


def _sub_groups(settings: Mapping[str, Any], sizes: Sequence[int], num_processes: int) -> list[list[int]]:
    """Entries that a process has of each parameter, in their order; a group is the shortest that has `sub_group_size`."""
    size, groups = settings["zero_optimization"].get("sub_group_size", _SUB_GROUP_SIZE), list[list[int]]([[]])
    for numel in sizes:
        if sum(groups[-1]) >= size:
            groups.append([])
        groups[-1].append(-(-numel // num_processes))
    return groups


def _device(settings: Mapping[str, Any], key: str) -> str:
    device: str = (settings["zero_optimization"].get(key) or {}).get("device", "none")
    return device
