"""Networks from a small configuration, whose weights are a function of a seed.

Every network takes and gives images as (B, C, H, W), other samples as (B, D), and a sample's output depends on no other
sample: there is no batch normalization, whose statistics would make a loss depend on how a global batch is divided among
processes. Legend: B samples.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from math import prod
from typing import Annotated, Any, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from gendist.models.ops.convolutions import KERNEL, STRIDE, convolutions, transposed_convolutions
from gendist.models.ops.layers import ACTIVATIONS, Activation, LayerKinds, Layers, Normalization
from gendist.models.ops.residual import ResidualBlock, residual_convolutions, residual_upsampling
from gendist.noise import derived_seed
from gendist.protocols import NotImportable, UserError

__all__ = ["ACTIVATIONS", "Activation", "NetworkConfig", "build", "create", "load"]

Size = Annotated[int, Field(ge=1)]


class NetworkConfig(BaseModel):
    """One network: of fully connected layers, of convolutions, or a module of the user's own.

    hidden_sizes   of fully connected layers; [] is a linear map. [256, 256] where nothing else is said
    channels       of convolutions, in the order in which they are computed; images only. Each halves the image, or doubles it
    num_blocks     residual blocks for each of `channels` (`ops/residual.py`); where left out, plain convolutions of stride 2
    checkpointing  of residual blocks: not to keep what is within them for the backward pass, but to compute it once more
    activation     behind every layer but the last
    normalization  of each sample on its own: layer, over all channels and pixels (Ba et al. 2016), or group, over up to 32
                   groups of channels (Wu & He 2018)
    spectral_norm  divide every weight by its spectral norm (Miyato et al. 2018; `ops/spectral_norm.py`)
    module         package.module:Class of an nn.Module, called as Class(input_shape, output_shape, **options): shapes are
                   those of one sample, (C, H, W) of an image. It must be importable wherever the model is, to be loaded too
    options        keyword arguments of the module's
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    hidden_sizes: tuple[Size, ...] | None = None
    channels: Annotated[tuple[Size, ...], Field(min_length=1)] | None = None
    num_blocks: Size | None = None
    checkpointing: bool = False
    activation: Activation = "relu"
    normalization: Normalization = "none"
    spectral_norm: bool = False
    module: str | None = None
    options: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _is_one_network(self) -> Self:
        given = [name for name in ("hidden_sizes", "channels", "module") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are given; a network has one of them")
        if self.options and self.module is None:
            raise ValueError("options are those of a module, and none is given")
        if self.num_blocks is not None and self.channels is None:
            raise ValueError("num_blocks are of residual convolutions; give channels")
        if self.checkpointing and self.num_blocks is None:
            raise ValueError("checkpointing is of residual blocks; give channels and num_blocks")
        if self.spectral_norm and self.module is not None:
            raise ValueError("spectral_norm is of layers that are made here; let the module normalize its own, or leave it out")
        for name in ("activation", "normalization"):
            # An artifact holds every field, given or not: those with the class's own value are of no weight.
            if self.module is not None and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} is of layers that are made here; let the module have its own, or leave it out")
        return self

    @property
    def layer_kinds(self) -> LayerKinds:
        return LayerKinds(self.activation, self.normalization, self.spectral_norm)


def build(
    config: NetworkConfig, input_shape: tuple[int, ...], output_shape: tuple[int, ...], where: str, seed: int = 0
) -> nn.Module:
    """A network on the CPU whose weights are anything; UserError where the shapes do not suit it.

    Within `torch.device("meta")` it takes no memory, and has shapes alone.

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
        network = Layers(*_layers(config, input_shape, output_shape, where)).float()
    return network if _only_shapes() else network.to_empty(device="cpu")


def create(
    config: NetworkConfig, input_shape: tuple[int, ...], output_shape: tuple[int, ...], where: str, seed: int
) -> nn.Module:
    """A network with fresh weights, the same for the same seed and `where`.

    Normal with variance gain^2 / fan-in (He et al. 2015), the last layer with gain 1, and biases of 0; residual blocks add to
    the variance as much as there was, all together. A module of the user's own comes with what its constructor draws.
    """
    seed = derived_seed(seed, f"create.{where}")
    network = build(config, input_shape, output_shape, where, seed)
    if config.module is not None or _only_shapes():
        return network
    generator = torch.Generator().manual_seed(seed)
    linear = [layer for layer in network.modules() if isinstance(layer, nn.Linear | nn.Conv2d | nn.ConvTranspose2d)]
    blocks = [module for module in network.modules() if isinstance(module, ResidualBlock)]
    gains = {layer: gain for block in blocks for layer, gain in block.gains(len(blocks)).items()} | {linear[-1]: 1.0}
    nonlinearity = config.activation if config.activation in ("leaky_relu", "tanh") else "relu"
    with torch.no_grad():
        for layer in linear:
            gain = gains.get(layer, nn.init.calculate_gain(nonlinearity, 0.2))
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


def _only_shapes() -> bool:
    return torch.get_default_device().type == "meta"


def _layers(config: NetworkConfig, input_shape: tuple[int, ...], output_shape: tuple[int, ...], where: str) -> list[nn.Module]:
    kinds, channels, num_blocks = config.layer_kinds, config.channels, config.num_blocks
    if channels is None:
        hidden_sizes = (256, 256) if config.hidden_sizes is None else config.hidden_sizes
        return _fully_connected(kinds, hidden_sizes, input_shape, output_shape)
    takes_images = len(input_shape) == 3
    if num_blocks is None:
        of_images = convolutions if takes_images else transposed_convolutions
        return of_images(kinds, channels, input_shape, output_shape, where)
    of_blocks = residual_convolutions if takes_images else residual_upsampling
    return of_blocks(kinds, channels, num_blocks, config.checkpointing, input_shape, output_shape, where)


def _fully_connected(
    kinds: LayerKinds, hidden_sizes: tuple[int, ...], input_shape: tuple[int, ...], output_shape: tuple[int, ...]
) -> list[nn.Module]:
    size = prod(input_shape)
    layers: list[nn.Module] = [nn.Flatten(), *kinds.added_noise(size, kinds.input_noise)]
    for hidden_size in hidden_sizes:
        layers += [kinds.linear(size, hidden_size), *kinds.nonlinear(hidden_size)]
        layers += kinds.added_noise(hidden_size, kinds.hidden_noise)
        size = hidden_size
    layers.append(kinds.linear(size, prod(output_shape), is_last=True))
    return layers if len(output_shape) == 1 else [*layers, nn.Unflatten(1, output_shape)]


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
    # A dotted path and nothing else: no file, nothing relative, nothing reached through a class.
    if not colon or not all(part.isidentifier() for part in (*module_name.split("."), name)):
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
