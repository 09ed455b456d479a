"""Layers whose weight is divided by its spectral norm, without a state (Miyato et al. 2018, "Spectral normalization").

Miyato et al. keep a vector from one forward to the next, that a power iteration goes on from. Then a step would depend on how
many forwards came before, on how many micro-batches, and on which process. Here the norm is a function of the weight alone:
the Schatten norm of order p,

    |W|_p = (sum of the singular values to the p)^(1/p) = tr((W W^T)^(p/2))^(1/p),

which lies between the largest singular value and rank^(1/p) times that. With p = 512 the effective weight W / |W|_p has a
spectral norm of at most 1, and at least 0.989 at rank 256, 0.986 at rank 1,024. It has a derivative of any order even where
the largest singular value is there twice, so that penalties of a gradient go through it, and it is seven squarings of a matrix
as large as the smaller side of W: no start, no iteration that may not have come to its end.

Legend: W (M, N), of a convolution (channels out, channels in x height x width of the kernel), as Miyato et al. have it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, conv_transpose2d, linear

NUM_SQUARINGS = 8  # of W W^T, the last of which needs the trace alone: p = 2^(8 + 1)
SMALLEST = 1e-30  # a squared norm; a weight of 0 stays 0


def schatten_norm(weight_MN: Tensor) -> Tensor:
    """() |W|_p in float32, whatever autocast says: in half precision eight squarings would leave no digit."""
    with torch.autocast(weight_MN.device.type, enabled=False):
        weight_MN = weight_MN.float()
        is_wide = weight_MN.shape[0] <= weight_MN.shape[1]
        power = weight_MN @ weight_MN.T if is_wide else weight_MN.T @ weight_MN
        trace = power.diagonal().sum().clamp_min(SMALLEST)
        log_norm = trace.log()
        # Divided by its trace every time: tr(G^(2^k))^(1/2^k) is the product of these traces to the 1/2^i.
        for i in range(1, NUM_SQUARINGS + 1):
            power = power / trace
            if i < NUM_SQUARINGS:
                power = power @ power
                trace = power.diagonal().sum().clamp_min(SMALLEST)
            else:
                trace = power.square().sum().clamp_min(SMALLEST)  # the trace of a symmetric matrix's square
            log_norm = log_norm + trace.log() / 2**i
        return torch.exp(0.5 * log_norm)


# The weight is used in the forward of the module that has it, and nowhere else: under ZeRO-3 it is whole only there.


class SpectralLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight / schatten_norm(self.weight), self.bias)


class SpectralConv2d(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight / schatten_norm(self.weight.flatten(1))
        return conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class SpectralConvTranspose2d(nn.ConvTranspose2d):
    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        assert output_size is None
        assert isinstance(self.padding, tuple)
        weight = self.weight / schatten_norm(self.weight.transpose(0, 1).flatten(1))  # which is (in, out, height, width)
        options = (self.stride, self.padding, self.output_padding, self.groups, self.dilation)
        return conv_transpose2d(x, weight, self.bias, *options)
