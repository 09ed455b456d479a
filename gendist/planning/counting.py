"""What a training step costs, by running the family's own loss, and its gradient, on shapes without values.

So a thousand million parameters are counted in seconds and in little memory, and what is computed once more under activation
checkpointing, or kept in half precision, is counted as it is.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from gendist.protocols import Block, DeepModel, Phase, UserError
from gendist.train.arithmetic import autocast
from gendist.train.config import DeepConfig
from gendist.train.restrictions import phases_ahead

COUNTED = (2, 4)  # samples at once, to tell what each adds from what there is in any case


class Counter(TorchDispatchMode):
    """Counts, inside `with`, of all that torch does: flops, and peak_bytes of the tensors that it makes."""

    def __init__(self) -> None:
        super().__init__()
        self.flops, self.live_bytes, self.peak_bytes = 0.0, 0, 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if count := flop_registry.get(function._overloadpacket):
            self.flops += count(*args, **(kwargs or {}), out_val=out)
        for value in tree_iter(out):
            if isinstance(value, Tensor) and value.layout is torch.strided:
                self._add(value.untyped_storage())
        return out

    def _add(self, storage: Any) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.live_bytes += self._sizes[key]
            self.peak_bytes = max(self.peak_bytes, self.live_bytes)
            weakref.finalize(storage, self.leave_out, key)

    def leave_out(self, key: int) -> None:
        """Of a storage that is gone, or that somebody else counts."""
        self.live_bytes -= self._sizes.pop(key, 0)


@dataclass(frozen=True)
class PhaseCost:
    """Of a phase's loss and its gradient.

    often             in how many of all steps it comes up, from 0 to 1
    flops             a sample
    activation_bytes  that a sample adds to the peak; fixed_bytes: that there are in any case, as copies of parameters in half
                      precision. Gradients of parameters are counted elsewhere
    """

    phase: Phase
    often: float
    flops: float
    activation_bytes: float
    fixed_bytes: float


def count_phases(model: DeepModel, config: DeepConfig, num_classes: int) -> list[PhaseCost]:
    """Of every phase of a model that was made on torch's device `meta`. UserError where its loss looks at values."""
    steps = range(min(config.num_steps, 256))
    costs = []
    for phase in phases_ahead(model, 0, config):
        try:
            few, more = (_count(model, config, phase, number, num_classes) for number in COUNTED)
        except UserError:
            raise
        except Exception as error:  # whatever a module of the user's own does with values
            why = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
            raise UserError(
                f"the phase {phase.name} cannot be counted on shapes alone ({type(error).__name__}: {why}); a loss that looks "
                "at values of tensors must do without where there are none: see `has_values` in gendist/cost.py"
            ) from error
        between = COUNTED[1] - COUNTED[0]
        each = (more.peak_bytes - few.peak_bytes) / between
        often = sum(phase in model.phases(step) for step in steps) / len(steps)
        fixed = max(0.0, few.peak_bytes - COUNTED[0] * each)
        costs.append(PhaseCost(phase, often, (more.flops - few.flops) / between, each, fixed))
    return costs


def _count(model: DeepModel, config: DeepConfig, phase: Phase, num_samples: int, num_classes: int) -> Counter:
    counter = Counter()
    precision = autocast(config.precision, torch.device("cpu"), cache_enabled=config.engine.stage != 3)

    def leave_out_gradient(parameter: Tensor) -> None:
        assert parameter.grad is not None
        counter.leave_out(parameter.grad.untyped_storage()._cdata)

    with FakeTensorMode():
        for name, network in model.networks().items():
            _take_shapes(network)
            for parameter in network.parameters():
                parameter.requires_grad_(name == phase.network)
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(leave_out_gradient)
        with counter:
            x = torch.empty(num_samples, model.num_features)
            evidence = torch.empty(num_samples, num_classes) if num_classes else None
            noise = {name: torch.empty(num_samples, draw.width) for name, draw in model.draws(phase).items()}
            with precision:
                loss = model.loss(phase, Block(x, torch.arange(num_samples), evidence=evidence), noise, 0)
            total = torch.stack([term.sum() for term in loss.terms.values()]).sum()
            del loss
            if total.requires_grad:
                total.backward()
    return counter


def _take_shapes(network: nn.Module) -> None:
    """Parameters and buffers become shapes that say they lie on the CPU, so that autocast takes them for such."""
    made: dict[Tensor, Tensor] = {}  # what several modules share they share again
    for module in network.modules():
        for tensors in (module._parameters, module._buffers):
            for name, old in tensors.items():
                if old is not None:
                    new = torch.empty(old.shape, dtype=old.dtype)
                    made.setdefault(old, nn.Parameter(new) if isinstance(old, nn.Parameter) else new)
                    tensors[name] = made[old]  # type: ignore[assignment]
