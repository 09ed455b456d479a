"""Which transitions between K states there may be."""

from __future__ import annotations

import torch
from torch import Tensor

Topology = str | tuple[tuple[int, ...], ...]


def allowed(topology: Topology, num_states: int, max_jump: int) -> Tensor:
    """(K, K) bool: the transitions that there may be."""
    if not isinstance(topology, str):
        return torch.tensor(topology, dtype=torch.bool)
    jump_KK = torch.arange(num_states)[None, :] - torch.arange(num_states)[:, None]
    if topology == "left_to_right":
        return (jump_KK >= 0) & (jump_KK <= max_jump)
    if topology == "banded":
        return jump_KK.abs() <= max_jump
    return torch.ones(num_states, num_states, dtype=torch.bool)


def allowed_first(topology: Topology, num_states: int) -> Tensor:
    """(K,) bool: the states that a sequence may begin in."""
    first_K = torch.ones(num_states, dtype=torch.bool)
    if topology == "left_to_right":
        first_K[1:] = False
    return first_K


def check(mask: tuple[tuple[int, ...], ...], num_states: int) -> None:
    """ValueError where this is no matrix of 0 and 1, or leaves a state without exits."""
    if len(mask) != num_states or any(len(row) != num_states for row in mask):
        raise ValueError(
            f"topology: {len(mask)} rows of {sorted({len(row) for row in mask})} entries; {num_states} x {num_states} is needed"
        )
    if any(entry not in (0, 1) for row in mask for entry in row):
        raise ValueError("topology: a matrix of 0 (no transition) and 1 (a transition there may be) is needed")
    for state, row in enumerate(mask):
        if not any(row):
            raise ValueError(f"topology: state {state} has no exits; let it lead somewhere, to itself at least")
