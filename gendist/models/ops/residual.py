"""Residual convolutions between images and vectors: blocks that add to what they are given (He et al. 2016, "Identity mappings
in deep residual networks", whose order this is: normalization and activation come before each convolution).

As Miyato et al. 2018 and BigGAN (Brock et al. 2019) have it, images become smaller by average pooling and larger by repeating
pixels, in the first block of each size. There both convolutions of such a block see the larger image; here one sees each, at
half the cost.
Legend: B samples.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gendist.models.ops.convolutions import Size, halved
from gendist.models.ops.layers import LayerKinds


class ResidualBlock(nn.Module):
    """x + f(x), where f is two convolutions; the image is resized between them, and x by itself.

    With `checkpointing` the activations within are not kept for the backward pass, which computes them once more from x (Chen
    et al. 2016, "Training deep nets with sublinear memory cost"): the same operations, so the same gradients.
    """

    def __init__(self, kinds: LayerKinds, before: int, after: int, resized: nn.Module | None, checkpointing: bool):
        super().__init__()
        between = [] if resized is None else [resized]
        self.branch = nn.Sequential(
            *kinds.nonlinear(before),
            kinds.convolution(before, after, 3, padding=1),
            *between,
            *kinds.nonlinear(after),
            kinds.convolution(after, after, 3, padding=1),
        )
        mapped = [] if before == after else [kinds.convolution(before, after, 1)]
        # The cheaper of both orders, which are the same map: a small image is mapped, not a large one.
        makes_smaller = isinstance(resized, nn.AvgPool2d)
        self.shortcut = nn.Sequential(*between, *mapped) if makes_smaller else nn.Sequential(*mapped, *between)
        self.checkpointing = checkpointing

    def forward(self, x: Tensor) -> Tensor:
        if not (self.checkpointing and torch.is_grad_enabled()):
            return self._sum(x)
        result: Tensor = checkpoint(self._sum, x, use_reentrant=False, preserve_rng_state=False)
        return result

    def _sum(self, x: Tensor) -> Tensor:
        summed: Tensor = self.shortcut(x) + self.branch(x)
        return summed

    def gains(self, num_blocks: int) -> dict[nn.Module, float]:
        """Of first weights, where they are not those of a layer behind an activation: blocks add up, so each of them adds its
        share of the variance."""
        return dict.fromkeys(self.shortcut, 1.0) | {self.branch[-1]: num_blocks**-0.5}


def residual_convolutions(
    kinds: LayerKinds,
    channels: tuple[int, ...],
    num_blocks: int,
    checkpointing: bool,
    input_shape: tuple[int, ...],
    output_shape: tuple[int, ...],
    where: str,
) -> list[nn.Module]:
    """Halve the image once for each of `channels`, `num_blocks` blocks each, then map all that is left to the output."""
    sizes = halved(input_shape, len(channels), where)
    layers: list[nn.Module] = [kinds.convolution(input_shape[0], channels[0], 3, padding=1)]
    for larger, before, after in zip(sizes, (channels[0], *channels), channels, strict=False):
        layers += _blocks(kinds, before, after, _pooling(larger), num_blocks, checkpointing)
    last = (channels[-1], *sizes[-1])
    return [*layers, *kinds.nonlinear(channels[-1]), nn.Flatten(), kinds.linear(prod(last), prod(output_shape))]


def residual_upsampling(
    kinds: LayerKinds,
    channels: tuple[int, ...],
    num_blocks: int,
    checkpointing: bool,
    input_shape: tuple[int, ...],
    output_shape: tuple[int, ...],
    where: str,
) -> list[nn.Module]:
    """The way back: a small image of channels[0], doubled once for each of `channels`, then mapped to the output's channels."""
    sizes = halved(output_shape, len(channels), where)[::-1]
    small = (channels[0], *sizes[0])
    layers: list[nn.Module] = [kinds.linear(prod(input_shape), prod(small)), nn.Unflatten(1, small)]
    for larger, before, after in zip(sizes[1:], (channels[0], *channels), channels, strict=False):
        layers += _blocks(kinds, before, after, nn.Upsample(larger, mode="nearest"), num_blocks, checkpointing)
    return [
        *layers,
        *kinds.nonlinear(channels[-1]),
        kinds.convolution(channels[-1], output_shape[0], 3, padding=1),
    ]


def _blocks(
    kinds: LayerKinds, before: int, after: int, resized: nn.Module, num_blocks: int, checkpointing: bool
) -> list[nn.Module]:
    """Those of one size of the image, the first of which makes it."""
    first = ResidualBlock(kinds, before, after, resized, checkpointing)
    return [first, *(ResidualBlock(kinds, after, after, None, checkpointing) for _ in range(num_blocks - 1))]


def _pooling(size: Size) -> nn.AvgPool2d:
    """To half the size, rounded down: of an odd number of pixels, windows of 3 overlap by one, and none is left out."""
    height, width = size
    return nn.AvgPool2d((2 + height % 2, 2 + width % 2), stride=2)
