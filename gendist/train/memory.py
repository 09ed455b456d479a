"""How much memory parameters, gradients and moments take on each process, by ZeRO stage (Rajbhandari et al. 2020, figure 1).

`benchmarks/zero_memory.py` measures it. Beside them lie activations, the buckets that gradients travel in, and at stage 3 the
parameters of the modules that are just computed with.
"""

from __future__ import annotations

from gendist.cost import StateBytes
from gendist.train.config import DeepConfig
from gendist.train.optimizers import MOMENTS, config_of

FLOAT32_BYTES = 4


def bytes_per_parameter(config: DeepConfig, network: str, num_processes: int) -> float:
    """Of a network's parameters, on each process; all are float32, whatever the losses are computed in.

    At stages 1 to 3 the optimizer steps a flat copy of its share of the parameters. At stage 1 gradients are whole until the
    end of the backward pass, which adds 4 - 4 / num_processes to the peak within it. What DeepSpeed offloads, to the memory of
    the host or to NVMe, is counted, too.
    """
    return state_bytes(config, network, 1, num_processes).on_device


def state_bytes(config: DeepConfig, network: str, num_parameters: int, num_processes: int) -> StateBytes:
    """The same in its parts, of all parameters of a network; the copy that is stepped stands with the optimizer."""
    stage = config.engine.stage
    whole = float(FLOAT32_BYTES * num_parameters)
    shared = whole / num_processes if stage else whole
    num_moments = len(MOMENTS[config_of(config, network).kind])
    return StateBytes(
        parameters=shared if stage == 3 else whole,
        gradients=shared,
        optimizer=shared * (num_moments + (1 if stage else 0)),
        average=shared if config.ema else 0.0,
    )
