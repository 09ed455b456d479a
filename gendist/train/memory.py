"""How much memory parameters, gradients and moments take on each process, by ZeRO stage (Rajbhandari et al. 2020, figure 1).

`benchmarks/zero_memory.py` measures it. Beside them lie activations, the buckets that gradients travel in, and at stage 3 the
parameters of the modules that are just computed with.
"""

from __future__ import annotations

from gendist.train.config import DeepConfig
from gendist.train.optimizers import MOMENTS, config_of

FLOAT32_BYTES = 4


def bytes_per_parameter(config: DeepConfig, network: str, num_processes: int) -> float:
    """Of a network's parameters, on each process; all are float32, whatever the losses are computed in.

    At stages 1 to 3 the optimizer steps a flat copy of its share of the parameters. At stage 1 gradients are whole until the
    end of the backward pass, which adds 4 - 4 / num_processes to the peak within it. What DeepSpeed offloads is counted, too.
    """
    state = len(MOMENTS[config_of(config, network).kind]) + (1 if config.ema else 0)
    parameters = gradients = copy = 1.0
    stage = config.engine.zero_stage if config.engine.kind == "deepspeed" else 0
    if stage == 0:
        return FLOAT32_BYTES * (parameters + gradients + state)
    shared = (gradients + copy + state) / num_processes
    return FLOAT32_BYTES * (shared + (parameters / num_processes if stage == 3 else parameters))
