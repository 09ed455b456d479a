"""A small family of two networks that is fitted by gradient: points along a line through the data, with noise.

Two phases a step, one a network: enough for a fit to be resumed wrongly, and quick. It is no module of gendist/models;
`toy_family.py` and the fixture `toy` put it among the families.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from gendist.noise import Noise
from gendist.protocols import Block, Draw, Loss, Phase, UserError, as_tensor


class ToyConfig(BaseModel):
    """explode_at: the step whose loss is NaN."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    width: int = 8
    explode_at: int = -1


class Toy:
    Config: ClassVar[type[BaseModel]] = ToyConfig
    not_offered: ClassVar[Mapping[str, str]] = {
        "log_prob": "a toy has a bound of its density alone",
        **dict.fromkeys(("elbo", "encode", "decode", "classify", "impute", "reconstruct"), "a toy has no more than samples"),
    }
    validation_objective: ClassVar[str | None] = "distance"

    def __init__(self, config: ToyConfig, num_features: int, labels: tuple[Any, ...] = ()):
        self.config, self.labels, self.num_features = config, labels, num_features
        self.line = nn.Sequential(nn.Linear(1, config.width), nn.Tanh(), nn.Linear(config.width, num_features))
        self.scale = nn.Linear(1, 1)

    @classmethod
    def create(cls, config: ToyConfig, x_shape: tuple[int, ...], labels: tuple[Any, ...], seed: int) -> Toy:
        if config.width > 1000:
            raise UserError(f"model.width is {config.width}; a toy is small: 1000 at most")
        model = cls(config, int(torch.tensor(x_shape).prod()), labels)
        generator = torch.Generator().manual_seed(seed % 2**63)
        with torch.no_grad():
            for network in model.networks().values():
                for parameter in network.parameters():
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        return model

    def tensors(self) -> dict[str, Tensor]:
        return {f"{name}.{key}": value for name, net in self.networks().items() for key, value in net.state_dict().items()}

    @classmethod
    def from_tensors(cls, config: ToyConfig, tensors: Mapping[str, Tensor], labels: tuple[Any, ...]) -> Toy:
        model = cls(config, len(tensors["line.2.bias"]), labels)
        for name, network in model.networks().items():
            prefix = f"{name}."
            network.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
        return model

    def sample(self, num_samples: int, *, seed: int = 0, offset: int = 0, given: Any = None) -> Tensor:
        with torch.no_grad():
            return self.line(Noise(seed, "toy").normal(offset, num_samples).float())

    def log_prob_bound(self, x: Any, seed: int = 0, offset: int = 0) -> Tensor:
        """(N,) no bound at all, but numbers that are addressed by row."""
        x_ND = as_tensor(x)
        return -x_ND.square().sum(1) + Noise(seed, "bound").uniform(offset, len(x_ND))[:, 0]

    def networks(self) -> Mapping[str, nn.Module]:
        return {"line": self.line, "scale": self.scale}

    def phases(self, step: int) -> Sequence[Phase]:
        return [Phase("place", "line"), Phase("spread", "scale")]

    def draws(self, phase: Phase) -> Mapping[str, Draw]:
        return {"z": Draw("normal", 1)}

    def counts(self, phase: Phase, batch: Block) -> Mapping[str, float]:
        return {"distance": float(batch.weights_or_ones().sum())}

    def loss(self, phase: Phase, batch: Block, noise: Mapping[str, Tensor], step: int) -> Loss:
        made = self.line(noise["z"]) + self.scale(noise["z"])
        distance_B = (made - batch.x).square().sum(1) * batch.weights_or_ones()
        if step == self.config.explode_at:
            distance_B = distance_B * torch.nan
        return Loss({"distance": distance_B.sum()})

    def validation_draws(self) -> Mapping[str, Draw]:
        return {"z": Draw("normal", 1)}

    def validate(self, batch: Block, noise: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        made = self.line(noise["z"]) + self.scale(noise["z"])
        return {"distance": ((made - batch.x).square().sum(1) * batch.weights_or_ones()).sum()}

    def needs_whole_batch(self, phase: Phase) -> str | None:
        return None


Model = Toy
