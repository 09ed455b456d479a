"""The layers that networks are made of, as a configuration chooses them, and one layer after the other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from gendist.models.ops.spectral_norm import SpectralConv2d, SpectralConvTranspose2d, SpectralLinear

Activation = Literal["relu", "leaky_relu", "silu", "gelu", "tanh"]
ACTIVATIONS: dict[Activation, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": lambda: nn.LeakyReLU(0.2),  # the slope of Radford et al. 2016
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "tanh": nn.Tanh,
}
Normalization = Literal["none", "layer", "group"]
MAX_GROUPS, LEAST_CHANNELS = 32, 4  # of a group normalization, and of each of its groups


class AddedNoise(nn.Module):
    """Where normal noise of this standard deviation is added to `width` numbers of each sample, in a call that brings noise."""

    def __init__(self, width: int, standard_deviation: float) -> None:
        super().__init__()
        self.width, self.standard_deviation = width, standard_deviation

    def forward(self, x: Tensor, noise_BW: Tensor | None = None) -> Tensor:
        return x if noise_BW is None else x + self.standard_deviation * noise_BW


class UnitLinear(nn.Linear):
    """Each unit's weights are divided by their norm, which is as much as to say that noise of what it is given has a fixed size
    in what it gives (Salimans & Kingma 2016, "Weight normalization", with all scales 1)."""

    def forward(self, x: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(self.weight, dim=1, keepdim=True)
        return linear(x, self.weight / norm.clamp_min(torch.finfo(norm.dtype).tiny), self.bias)


def noise_width(network: nn.Module) -> int:
    """How many numbers for a sample all `AddedNoise` of a network take."""
    return sum(layer.width for layer in network.modules() if isinstance(layer, AddedNoise))


class Layers(nn.Sequential):
    """One layer after the other; the last that has weights is linear in the features before it.

    noise_BW  (B, W) standard normal numbers for all of its `AddedNoise`, as when it is trained; None adds none
    """

    def forward(self, x: Tensor, noise_BW: Tensor | None = None) -> Tensor:
        return self._through(len(self), x, noise_BW)

    def features(self, x: Tensor, noise_BW: Tensor | None = None) -> Tensor:
        """(B, F) what the last layer is given."""
        return self._through(len(self) - 1, x, noise_BW)

    def _through(self, num_layers: int, x: Tensor, noise_BW: Tensor | None) -> Tensor:
        taken = 0
        for layer in list(self)[:num_layers]:
            if isinstance(layer, AddedNoise) and noise_BW is not None:
                x = layer(x, noise_BW[:, taken : taken + layer.width])
                taken += layer.width
            else:
                x = layer(x)
        return x


@dataclass(frozen=True)
class LayerKinds:
    """What a configuration says of every layer of a network. The noises are standard deviations (`AddedNoise`)."""

    activation: Activation
    normalization: Normalization
    spectral_norm: bool
    input_noise: float = 0.0
    hidden_noise: float = 0.0
    weight_norm: bool = False

    def linear(self, before: int, after: int, is_last: bool = False) -> nn.Linear:
        if self.weight_norm and not is_last:
            return UnitLinear(before, after)
        return (SpectralLinear if self.spectral_norm else nn.Linear)(before, after)

    def convolution(self, before: int, after: int, kernel: int, **options: Any) -> nn.Conv2d:
        return (SpectralConv2d if self.spectral_norm else nn.Conv2d)(before, after, kernel, **options)

    def transposed_convolution(self, before: int, after: int, kernel: int, **options: Any) -> nn.ConvTranspose2d:
        return (SpectralConvTranspose2d if self.spectral_norm else nn.ConvTranspose2d)(before, after, kernel, **options)

    def added_noise(self, width: int, standard_deviation: float) -> list[nn.Module]:
        return [AddedNoise(width, standard_deviation)] if standard_deviation > 0.0 else []

    def nonlinear(self, num_channels: int) -> list[nn.Module]:
        """What stands between two linear layers: each sample is normalized on its own, over all pixels."""
        groups = {"none": 0, "layer": 1, "group": num_groups(num_channels)}[self.normalization]
        norm = [nn.GroupNorm(groups, num_channels)] if groups else []
        return [*norm, ACTIVATIONS[self.activation]()]


def num_groups(num_channels: int) -> int:
    """As many as 32 (Wu & He 2018), all of one size; fewer where they would have less than 4 channels each."""
    groups = MAX_GROUPS
    while groups > 1 and num_channels % (groups * LEAST_CHANNELS):
        groups //= 2
    return groups
