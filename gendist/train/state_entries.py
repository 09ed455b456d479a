"""The state of training as tensors with names, the same of every engine and for any number of processes.

NETWORK/param/NAME       parameters, float32
NETWORK/buffer/NAME      what else the network's state_dict holds
NETWORK/exp_avg/NAME     moments of the optimizer, one a trained parameter, by torch's names (exp_avg and exp_avg_sq of Adam)
NETWORK/ema/NAME         moving average of a trained parameter, where there is one
NETWORK/step             () int64: optimizer steps that the network has taken; a skipped one does not count
NETWORK/loss_scale       (2,) float64: the scale and the steps since it last changed, in float16

Trained are the parameters that require a gradient when an engine is given them. One that a loss does not reach has a
gradient of zero, so that there is one count of steps a network.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from gendist.protocols import UserError
from gendist.train.config import DeepConfig
from gendist.train.optimizers import MOMENTS, config_of

PARAMETER, BUFFER, AVERAGE, STEP, LOSS_SCALE = "param", "buffer", "ema", "step", "loss_scale"


def entry(network: str, kind: str, name: str | None = None) -> str:
    return f"{network}/{kind}" if name is None else f"{network}/{kind}/{name}"


def part(state: Mapping[str, Tensor], network: str, kind: str) -> dict[str, Tensor]:
    """The entries of one kind of one network, by the name within it."""
    prefix = entry(network, kind, "")
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def persistent_buffers(network: torch.nn.Module) -> dict[str, Tensor]:
    """The buffers that a checkpoint must hold: those of the state_dict, and no others."""
    kept = network.state_dict(keep_vars=True).keys()
    return {name: buffer for name, buffer in network.named_buffers() if name in kept}


def shapes(networks: Mapping[str, torch.nn.Module], config: DeepConfig) -> dict[str, tuple[int, ...]]:
    """Of every entry that the state of these networks has. To be asked of whole networks, before they are sharded."""
    return dict(_shapes(networks, config))


def _shapes(networks: Mapping[str, torch.nn.Module], config: DeepConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    for network, module in networks.items():
        of_trained = (*MOMENTS[config_of(config, network).kind], *((AVERAGE,) if config.ema else ()))
        for name, parameter in module.named_parameters():
            for kind in (PARAMETER, *(of_trained if parameter.requires_grad else ())):
                yield entry(network, kind, name), tuple(parameter.shape)
        for name, buffer in persistent_buffers(module).items():
            yield entry(network, BUFFER, name), tuple(buffer.shape)
        yield entry(network, STEP), ()
        if config.precision == "float16":
            yield entry(network, LOSS_SCALE), (2,)


def check(state: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    """UserError where the state is of other networks, or of another `fit` block."""
    other_shape = {name for name in expected.keys() & state.keys() if tuple(state[name].shape) != expected[name]}
    for problem, names in (
        ("is missing", expected.keys() - state.keys()),
        ("is unknown here", state.keys() - expected.keys()),
        ("has another shape", other_shape),
    ):
        if names:
            first = min(names, key=lambda name: (f"/{PARAMETER}/" not in name, name))
            if names is other_shape:
                problem = f"is {list(state[first].shape)}, not {list(expected[first])}"
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise UserError(
                f"the checkpoint is of another model: {first} {problem}{more}; resume with the spec that it was written by, or "
                "choose another folder"
            )


def load_networks(networks: Mapping[str, torch.nn.Module], state: Mapping[str, Tensor]) -> None:
    """Copy parameters and buffers into the networks, where they are."""
    with torch.no_grad():
        for network, module in networks.items():
            parameters, buffers = part(state, network, PARAMETER), part(state, network, BUFFER)
            for name, parameter in module.named_parameters():
                parameter.copy_(parameters[name])
            for name, buffer in persistent_buffers(module).items():
                buffer.copy_(buffers[name])
