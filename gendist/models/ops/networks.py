"""Networks from a small configuration, whose weights are a function of a seed.

Every network takes and gives images as (B, C, H, W), other samples as (B, D), and a sample's output depends on no other
sample: there is no batch normalization, whose statistics would make a loss depend on how a global batch is divided among
processes. Legend: B samples.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from math import prod
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from gendist.noise import derived_seed
from gendist.protocols import NotImportable, UserError

Activation = Literal["relu", "leaky_relu", "silu", "gelu", "tanh"]
ACTIVATIONS: dict[Activation, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": lambda: nn.LeakyReLU(0.2),  # the slope of Radford et al. 2016
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "tanh": nn.Tanh,
}
KERNEL, STRIDE = 4, 2  # of convolutions, padded by 1: n pixels become n / 2, rounded down

Size = Annotated[int, Field(ge=1)]


class NetworkConfig(BaseModel):
    """One network: of fully connected layers, of convolutions, or a module of the user's own.

    hidden_sizes   of fully connected layers; [] is a linear map. [256, 256] where nothing else is said
    channels       of convolutions of stride 2 (Radford et al. 2016), in the order in which they are computed; images only
    activation     behind every layer but the last
    normalization  layer: of each sample on its own (Ba et al. 2016), over all channels and pixels of a convolution
    module         package.module:Class of an nn.Module, called as Class(input_shape, output_shape, **options): shapes are
                   those of one sample, (C, H, W) of an image. It must be importable wherever the model is, to be loaded too
    options        keyword arguments of the module's
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    hidden_sizes: tuple[Size, ...] | None = None
    channels: Annotated[tuple[Size, ...], Field(min_length=1)] | None = None
    activation: Activation = "relu"
    normalization: Literal["none", "layer"] = "none"
    module: str | None = None
    options: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _is_one_network(self) -> Self:
        given = [name for name in ("hidden_sizes", "channels", "module") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are given; a network has one of them")
        if self.options and self.module is None:
            raise ValueError("options are those of a module, and none is given")
        return self


class Layers(nn.Sequential):
    """One layer after the other; the last that has weights is linear in the features before it."""

    def features(self, x: Tensor) -> Tensor:
        """(B, F) what the last layer is given."""
        for layer in list(self)[:-1]:
            x = layer(x)
        return x


def build(
    config: NetworkConfig, input_shape: tuple[int, ...], output_shape: tuple[int, ...], where: str, seed: int = 0
) -> nn.Module:
    """A network on the CPU whose weights are anything; UserError where the shapes do not suit it.

    where  the configuration's name in a spec, for messages: "model.encoder"
    seed   of what the constructor of a module of the user's own draws
    """
    if config.module is not None:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return _imported(config, input_shape, output_shape, f"{where}.module '{config.module}'")
    if config.channels is not None and len(input_shape) == len(output_shape) == 1:
        raise UserError(
            f"{where}.channels: convolutions take images, and x has {max(input_shape[0], output_shape[0])} features; give "
            "hidden_sizes"
        )
    with torch.device("meta"):  # drawing no weights, which would read the global random state
        if config.channels is None:
            layers = _fully_connected(config, input_shape, output_shape)
        elif len(input_shape) == 3:
            layers = _convolutions(config, config.channels, input_shape, output_shape, where)
        else:
            layers = _transposed_convolutions(config, config.channels, input_shape, output_shape, where)
        network = Layers(*layers).float()
    return network.to_empty(device="cpu")


def create(
    config: NetworkConfig, input_shape: tuple[int, ...], output_shape: tuple[int, ...], where: str, seed: int
) -> nn.Module:
    """A network with fresh weights, the same for the same seed and `where`.

    Normal with variance gain^2 / fan-in (He et al. 2015), the last layer with gain 1, and biases of 0; a module of the user's
    own comes with what its constructor draws.
    """
    seed = derived_seed(seed, f"create.{where}")
    network = build(config, input_shape, output_shape, where, seed)
    if config.module is not None:
        return network
    generator = torch.Generator().manual_seed(seed)
    linear = [layer for layer in network.modules() if isinstance(layer, nn.Linear | nn.Conv2d | nn.ConvTranspose2d)]
    nonlinearity = config.activation if config.activation in ("leaky_relu", "tanh") else "relu"
    with torch.no_grad():
        for layer in linear:
            gain = 1.0 if layer is linear[-1] else nn.init.calculate_gain(nonlinearity, 0.2)
            layer.weight.normal_(0.0, gain / math.sqrt(_fan_in(layer)), generator=generator)
            if layer.bias is not None:
                layer.bias.zero_()
        for norm in network.modules():
            if isinstance(norm, nn.LayerNorm | nn.GroupNorm):
                norm.reset_parameters()  # to 1 and 0
    return network


def load(network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy parameters and buffers in by their names; ValueError where names or shapes do not fit."""
    needed = network.state_dict()
    if set(tensors) != set(needed):
        wrong = sorted(set(tensors) ^ set(needed))
        raise ValueError(f"tensors {', '.join(sorted(tensors)[:8])}; {', '.join(needed)} are needed (differing: {wrong[:8]})")
    for name, tensor in tensors.items():
        if tensor.shape != needed[name].shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; {tuple(needed[name].shape)} is needed")
    network.load_state_dict(dict(tensors))


def _fully_connected(config: NetworkConfig, input_shape: tuple[int, ...], output_shape: tuple[int, ...]) -> list[nn.Module]:
    hidden_sizes = (256, 256) if config.hidden_sizes is None else config.hidden_sizes
    layers: list[nn.Module] = [nn.Flatten()]
    size = prod(input_shape)
    for hidden_size in hidden_sizes:
        norm = [nn.LayerNorm(hidden_size)] if config.normalization == "layer" else []
        layers += [nn.Linear(size, hidden_size), *norm, ACTIVATIONS[config.activation]()]
        size = hidden_size
    layers.append(nn.Linear(size, prod(output_shape)))
    return layers if len(output_shape) == 1 else [*layers, nn.Unflatten(1, output_shape)]


def _convolutions(
    config: NetworkConfig, channels: tuple[int, ...], input_shape: tuple[int, ...], output_shape: tuple[int, ...], where: str
) -> list[nn.Module]:
    """Halve the image once for each of `channels`, then map all that is left to the output."""
    height, width = _halved(input_shape, len(channels), where)[-1]
    layers: list[nn.Module] = []
    for before, after in zip((input_shape[0], *channels[:-1]), channels, strict=True):
        layers += [nn.Conv2d(before, after, KERNEL, STRIDE, 1), *_after_convolution(config, after)]
    return [*layers, nn.Flatten(), nn.Linear(channels[-1] * height * width, prod(output_shape))]


def _transposed_convolutions(
    config: NetworkConfig, channels: tuple[int, ...], input_shape: tuple[int, ...], output_shape: tuple[int, ...], where: str
) -> list[nn.Module]:
    """The way back: a small image of channels[0], doubled once for each of `channels`, the last time into the output."""
    sizes = _halved(output_shape, len(channels), where)[::-1]
    small = (channels[0], *sizes[0])
    layers: list[nn.Module] = [nn.Linear(prod(input_shape), prod(small)), nn.Unflatten(1, small)]
    for i, after in enumerate((*channels[1:], output_shape[0])):
        # Twice n pixels, and the one more that halving has rounded away.
        odd = (sizes[i + 1][0] % 2, sizes[i + 1][1] % 2)
        layers += _after_convolution(config, channels[i])
        layers.append(nn.ConvTranspose2d(channels[i], after, KERNEL, STRIDE, 1, output_padding=odd))
    return layers


def _after_convolution(config: NetworkConfig, num_channels: int) -> list[nn.Module]:
    norm = [nn.GroupNorm(1, num_channels)] if config.normalization == "layer" else []
    return [*norm, ACTIVATIONS[config.activation]()]


def _halved(shape: tuple[int, ...], times: int, where: str) -> list[tuple[int, int]]:
    """Height and width of an image (C, H, W), and after every halving."""
    _, height, width = shape
    if min(height, width) >> times == 0:
        most = min(height, width).bit_length() - 1
        raise UserError(f"{where}.channels: {times} convolutions, but images of {height} x {width} can be halved {most} times")
    return [(height >> i, width >> i) for i in range(times + 1)]


def _fan_in(layer: nn.Module) -> float:
    """How many numbers are added up in each that the layer gives."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    if isinstance(layer, nn.ConvTranspose2d):  # weight (in, out, height, width); of its kernel, a stride apart are met
        return weight.shape[0] * (KERNEL / STRIDE) ** 2
    return prod(weight.shape[1:])


def _imported(config: NetworkConfig, input_shape: tuple[int, ...], output_shape: tuple[int, ...], where: str) -> nn.Module:
    """The user's own module, once it has been seen to give what is needed."""
    assert config.module is not None
    module_name, colon, name = config.module.partition(":")
    if not colon or not name or not module_name:
        raise UserError(f"{where}: write package.module:Class, such as mynets.encoders:Encoder")
    try:
        cls = getattr(importlib.import_module(module_name), name)
    except Exception as error:  # whatever the user's own code raises while it is imported
        raise NotImportable(
            f"{where}: cannot be imported ({type(error).__name__}: {error}); it must be installed or on PYTHONPATH, on "
            "every node"
        ) from error
    # A class of networks and not any callable: a configuration also comes with an artifact, and loading one calls nothing else.
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise UserError(f"{where}: is a {type(cls).__name__}; a class derived from torch.nn.Module is needed")
    try:
        network = cls(input_shape, output_shape, **config.options).float()
        training = network.training
        with torch.no_grad():
            output = network.eval()(torch.zeros(2, *input_shape))
        network.train(training)
    except Exception as error:
        raise UserError(
            f"{where}: fails for samples of shape {input_shape} ({type(error).__name__}: {' '.join(str(error).split())})"
        ) from error
    given = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
    if given != (2, *output_shape):
        raise UserError(f"{where}: gives {given} for 2 samples of shape {input_shape}; {(2, *output_shape)} is needed")
    return network
