"""Kernels with one intra-op thread: with two, a matrix product or a factorization adds in another order and gives other
bytes. Whoever computes something that must come out equal anywhere does it inside `with one_thread():`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def one_thread() -> Iterator[None]:
    """torch with one intra-op thread, and as many as before at the end."""
    import torch

    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)
