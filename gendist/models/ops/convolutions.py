"""Plain convolutions between images and vectors, each of which halves or doubles the image (Radford et al. 2016, DCGAN)."""

from __future__ import annotations

from math import prod

from torch import nn

from gendist.models.ops.layers import LayerKinds
from gendist.protocols import UserError

KERNEL, STRIDE = 4, 2  # padded by 1: n pixels become n / 2, rounded down

Size = tuple[int, int]


def halved(shape: tuple[int, ...], times: int, where: str) -> list[Size]:
    """Height and width of an image (C, H, W), and after every halving, rounded down; UserError where nothing is left."""
    _, height, width = shape
    if min(height, width) >> times == 0:
        most = min(height, width).bit_length() - 1
        raise UserError(f"{where}.channels: {times} convolutions, but images of {height} x {width} can be halved {most} times")
    return [(height >> i, width >> i) for i in range(times + 1)]


def convolutions(
    kinds: LayerKinds, channels: tuple[int, ...], input_shape: tuple[int, ...], output_shape: tuple[int, ...], where: str
) -> list[nn.Module]:
    """Halve the image once for each of `channels`, then map all that is left to the output."""
    height, width = halved(input_shape, len(channels), where)[-1]
    layers: list[nn.Module] = []
    for before, after in zip((input_shape[0], *channels[:-1]), channels, strict=True):
        layers += [kinds.convolution(before, after, KERNEL, stride=STRIDE, padding=1), *kinds.nonlinear(after)]
    return [*layers, nn.Flatten(), kinds.linear(channels[-1] * height * width, prod(output_shape))]


def transposed_convolutions(
    kinds: LayerKinds, channels: tuple[int, ...], input_shape: tuple[int, ...], output_shape: tuple[int, ...], where: str
) -> list[nn.Module]:
    """The way back: a small image of channels[0], doubled once for each of `channels`, the last time into the output."""
    sizes = halved(output_shape, len(channels), where)[::-1]
    small = (channels[0], *sizes[0])
    layers: list[nn.Module] = [kinds.linear(prod(input_shape), prod(small)), nn.Unflatten(1, small)]
    for i, after in enumerate((*channels[1:], output_shape[0])):
        # Twice n pixels, and the one more that halving has rounded away.
        odd = (sizes[i + 1][0] % 2, sizes[i + 1][1] % 2)
        layers += kinds.nonlinear(channels[i])
        layers.append(kinds.transposed_convolution(channels[i], after, KERNEL, stride=STRIDE, padding=1, output_padding=odd))
    return layers
