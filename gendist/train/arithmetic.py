"""What numbers are computed in, on which device, so that the same step gives the same bytes each time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch

from gendist.one_thread import one_thread
from gendist.protocols import UserError
from gendist.train.config import Precision

WHOLE: frozenset[Precision] = frozenset({"float32", "tfloat32"})  # of which tensors are, whatever products are computed in


def check(precision: Precision, device: torch.device) -> None:
    """UserError where the device does not compute so."""
    if precision in ("float16", "tfloat32") and device.type != "cuda":
        raise UserError(f"fit.precision: {precision} needs a GPU; allowed on a CPU are float32 and bfloat16")


def autocast(precision: Precision, device: torch.device, cache_enabled: bool = True) -> AbstractContextManager[None]:
    """What losses are computed inside of."""
    if precision in WHOLE:
        return nullcontext()
    return torch.autocast(device.type, getattr(torch, precision), cache_enabled=cache_enabled)


@contextmanager
def arranged(precision: Precision, device: torch.device, deterministic: bool = True) -> Iterator[None]:
    """Kernels whose sums are added in one order, and which round as the precision says.

    On a CPU with one thread. On a GPU those that torch calls deterministic, chosen by no race, unless nobody minds; float32 is
    that of IEEE 754, in convolutions too, where torch would take TF32 unasked. An operation that has no such kernel, of a
    user's own module, say, is done all the same, and torch warns of it.
    """
    if device.type != "cuda":
        with one_thread():
            yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read by cuBLAS when it is first used
    cudnn, memory = torch.backends.cudnn, cast(Any, torch.utils.deterministic)
    was_deterministic = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    before = memory.fill_uninitialized_memory, cudnn.benchmark, cudnn.allow_tf32, torch.get_float32_matmul_precision()
    is_rounded = precision == "tfloat32"
    if deterministic:
        torch.use_deterministic_algorithms(True, warn_only=True)
        cudnn.benchmark = False
        memory.fill_uninitialized_memory = False  # a pass over all that is allocated, against reads of what nobody wrote
    cudnn.allow_tf32 = is_rounded
    torch.set_float32_matmul_precision("high" if is_rounded else "highest")
    try:
        # A GPU's backward pass has a thread of its own, which counts its operations apart from this one. Where it makes some,
        # as that of a gradient does which is differentiated again, the order of sums would depend on how long the process has
        # been at work.
        with torch.autograd.set_multithreading_enabled(not deterministic):
            yield
    finally:
        torch.use_deterministic_algorithms(was_deterministic[0], warn_only=was_deterministic[1])
        memory.fill_uninitialized_memory, cudnn.benchmark, cudnn.allow_tf32, matmul_precision = before
        torch.set_float32_matmul_precision(matmul_precision)
