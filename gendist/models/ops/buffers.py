"""Memory that kernels use again. A pass makes the same large intermediate values for every block; handed back to the system
and asked for anew, their pages would cost more than the arithmetic."""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor


class _Kept(threading.local):
    def __init__(self) -> None:
        self.tensors: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}


_kept = _Kept()


def buffer(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A contiguous tensor of any content; whoever asks for the same name next gets the same memory."""
    size = math.prod(shape)
    key = (name, dtype, device)
    kept = _kept.tensors.get(key)
    if kept is None or kept.numel() < size:
        kept = _kept.tensors[key] = torch.empty(size, dtype=dtype, device=device)
    return kept[:size].view(shape)
