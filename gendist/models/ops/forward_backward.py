"""Inference in a chain of hidden states: filter, smoother, the most likely path, and paths drawn from the posterior.

Pure functions of the initial probabilities, the transition matrix and what each observation says of each state, batched over
sequences that are packed side by side (`packing.py`). Rabiner 1989, "A tutorial on hidden Markov models"; PRML section 13.2.

The fast ones take likelihoods, each scaled by the largest of its step, and divide by the sum at each step (PRML 13.59): all
that they hold is finite at any length. What that costs in digits, `chain.py` knows and checks. Those called log_ take
log-likelihoods and lose nothing at all, at ten times the price.

Legend: N packed steps, S sequences, K states; log_likelihood[n, k] = log p(x_n | state k).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from gendist.models.ops.packing import Packing

MOST_ENTRIES = 1 << 22  # of what a product of logarithms holds at a time
NEAR = 300.0  # of logarithms: the products of two such numbers are far from vanishing

Array = np.ndarray[Any, np.dtype[np.float64]]

# Scaled probabilities


def forward_(
    likelihood_NK: Tensor,
    packing: Packing,
    transition_KK: Tensor,
    predicted_SK: Tensor | None,
    out_NK: Tensor,
    stride: int = 1,
    least: float = 0.0,
) -> Tensor:
    """The filter: into `out` p(state | x up to this step), up to a factor. Returns (N,) these factors: p(x_n | x before it), of
    as many steps as the stride has, in units of the likelihoods, which are divided by it; 1 at the steps between.

    predicted  of the first steps, p(state | what came before); None: their likelihoods include the initial probabilities
    stride     the steps until the next division by the sum; each sequence's last step is one
    least      no filtered probability falls below this: 0 where none can
    """
    norm_N1 = likelihood_NK.new_ones(len(likelihood_NK), 1)
    ones_K1 = likelihood_NK.new_ones(likelihood_NK.shape[1], 1)
    likelihoods, filtered, norms = (values.split(packing.sizes) for values in (likelihood_NK, out_NK, norm_N1))
    before: Tensor | None = None
    for t, (size, after) in enumerate(zip(packing.sizes, [*packing.sizes[1:], 0], strict=True)):
        filtered_BK, likelihood_BK = filtered[t], likelihoods[t]
        if before is not None:
            torch.mm(before if len(before) == size else before[:size], transition_KK, out=filtered_BK)
            filtered_BK.mul_(likelihood_BK)
        elif predicted_SK is None:
            filtered_BK.copy_(likelihood_BK)
        else:
            torch.mul(likelihood_BK, predicted_SK, out=filtered_BK)
        if after < size or (t + 1) % stride == 0:
            norm_B1 = torch.mm(filtered_BK, ones_K1, out=norms[t])
            filtered_BK.div_(norm_B1)
            likelihood_BK.div_(norm_B1)
            if least > 0.0:
                filtered_BK.clamp_min_(least)
        before = filtered_BK
    return norm_N1[:, 0]


def backward_(
    likelihood_NK: Tensor,
    packing: Packing,
    transition_KK: Tensor,
    filtered_NK: Tensor,
    message_SK: Tensor | None,
    out_NK: Tensor,
) -> None:
    """The smoother, after `forward_`: p(state | all of x) takes the place of the likelihoods. Into `out` goes likelihood times
    backward message, so that p(state n - 1, state n | x) is filtered[n - 1] * transition * out[n] (PRML 13.65).

    message  of the last steps: p(x after the sequence | state) / p(x after it | x), None: nothing comes after
    """
    to_before = transition_KK.T.contiguous()
    smoothed, weighed = likelihood_NK.split(packing.sizes), out_NK.split(packing.sizes)
    backward_SK = torch.ones_like(likelihood_NK[: packing.num_sequences])
    if message_SK is not None:
        backward_SK.copy_(message_SK)
    filtered = filtered_NK.split(packing.sizes)
    after: Tensor | None = None
    for t in range(len(packing.sizes) - 1, -1, -1):
        backward_BK = backward_SK[: packing.sizes[t]]
        if after is not None:  # of the sequences that go on; for the others this is the last step
            torch.mm(after, to_before, out=backward_BK if len(after) == len(backward_BK) else backward_BK[: len(after)])
        torch.mul(smoothed[t], backward_BK, out=weighed[t])
        torch.mul(filtered[t], backward_BK, out=smoothed[t])
        after = weighed[t]


def transfer(likelihood_NK: Tensor, packing: Packing, transition_KK: Tensor, first_KKS: Tensor, stride: int = 1) -> Tensor:
    """(S, K, K) log p(x of the sequence, its last state = j | the state before it = i), in units of the likelihoods.

    first   (to, from, S) p(first state | the state before)
    stride  as in `forward_`
    """
    num_states = len(first_KKS)
    to_next = transition_KK.T.contiguous()
    log_norm_KS = first_KKS.new_zeros(first_KKS.shape[1:], dtype=torch.float64)
    # Sequences are the last axis: products with a small matrix from the left are twice as fast as from the right.
    state_KKB = first_KKS.clone(memory_format=torch.contiguous_format)
    other_KKB, at_end_KKS = torch.empty_like(state_KKB), torch.empty_like(state_KKB)
    for t, likelihood_BK in enumerate(likelihood_NK.split(packing.sizes)):
        size = len(likelihood_BK)
        if size < state_KKB.shape[2]:
            at_end_KKS[:, :, size : state_KKB.shape[2]] = state_KKB[:, :, size:]
            state_KKB, other_KKB = state_KKB[:, :, :size].contiguous(), other_KKB[:, :, :size].contiguous()
        if t > 0:
            torch.mm(to_next, state_KKB.view(num_states, -1), out=other_KKB.view(num_states, -1))
            state_KKB, other_KKB = other_KKB, state_KKB
        state_KKB.mul_(likelihood_BK.T.contiguous()[:, None, :])
        if (t + 1) % stride == 0:
            norm_KB = state_KKB.sum(0).clamp_min_(torch.finfo(state_KKB.dtype).tiny)  # 0 where x is impossible
            state_KKB.div_(norm_KB)
            log_norm_KS[:, :size] += norm_KB.log()
    at_end_KKS[:, :, : state_KKB.shape[2]] = state_KKB
    return (at_end_KKS.to(torch.float64).log() + log_norm_KS).permute(2, 1, 0).contiguous()


# Logarithms


def log_forward(log_likelihood_NK: Tensor, packing: Packing, log_transition_KK: Tensor, log_first_SK: Tensor) -> Tensor:
    """(N, K) log p(x up to this step, state). first: log p(first state) of each sequence."""
    log_alpha_NK = torch.empty_like(log_likelihood_NK)
    before: Tensor = log_first_SK
    steps = zip(log_likelihood_NK.split(packing.sizes), log_alpha_NK.split(packing.sizes), strict=True)
    for t, (log_likelihood_BK, out_BK) in enumerate(steps):
        predicted_BK = before if t == 0 else _log_product(before[: len(out_BK)], log_transition_KK)
        before = torch.add(predicted_BK, log_likelihood_BK, out=out_BK)
    return log_alpha_NK


def log_backward(
    log_likelihood_NK: Tensor, packing: Packing, log_transition_KK: Tensor, log_message_SK: Tensor | None = None
) -> Tensor:
    """(N, K) log p(x after this step | state)."""
    log_beta_NK = torch.zeros_like(log_likelihood_NK)
    if log_message_SK is not None:
        log_beta_NK[packing.last] = log_message_SK
    log_likelihoods, out = log_likelihood_NK.split(packing.sizes), log_beta_NK.split(packing.sizes)
    for t in range(len(packing.sizes) - 2, -1, -1):
        after_BK = log_likelihoods[t + 1] + out[t + 1]
        out[t][: len(after_BK)] = _log_product(after_BK, log_transition_KK.T)
    return log_beta_NK


def log_transfer(log_likelihood_NK: Tensor, packing: Packing, log_transition_KK: Tensor, log_first_SKK: Tensor) -> Tensor:
    """(S, K, K) what `transfer` returns, in nats."""
    at_end = log_first_SKK.clone()
    for t, log_likelihood_BK in enumerate(log_likelihood_NK.split(packing.sizes)):
        size = len(log_likelihood_BK)
        if t > 0:
            at_end[:size] = _log_product(at_end[:size].flatten(0, 1), log_transition_KK).view(at_end[:size].shape)
        at_end[:size] += log_likelihood_BK[:, None, :]
    return at_end


def log_messages(log_transfers_SKK: Tensor, log_before_K: Tensor, log_after_K: Tensor) -> tuple[Tensor, Tensor, float]:
    """Of sequences that follow one another: (S, K) log p(state before the sequence | x before it), (S, K) log p(x after it |
    its last state), up to a constant, and log p(x of them all).

    before  of the first, after  of the last
    """
    # Small matrices, of which NumPy makes less fuss.
    log_transfers, log_before, log_after = (values.numpy() for values in (log_transfers_SKK, log_before_K, log_after_K))
    largest_S = log_transfers.max((1, 2))
    if (log_transfers.min((1, 2)) > largest_S - NEAR).all():  # so near to each other that no sum loses one
        return _messages(np.exp(log_transfers - largest_S[:, None, None]), largest_S, np.exp(log_before), np.exp(log_after))
    before, after, log_prob = [log_before], [log_after], 0.0
    for log_transfer_KK in log_transfers:
        log_next_K = np.logaddexp.reduce(before[-1][:, None] + log_transfer_KK, axis=0)
        log_norm = np.logaddexp.reduce(log_next_K)
        log_prob += float(log_norm)
        before.append(log_next_K - log_norm if log_norm > -np.inf else log_next_K)
    for log_transfer_KK in log_transfers[:0:-1]:
        log_previous_K = np.logaddexp.reduce(log_transfer_KK + after[-1], axis=1)
        largest = log_previous_K.max()
        after.append(log_previous_K - largest if largest > -np.inf else log_previous_K)
    return torch.from_numpy(np.stack(before[:-1])), torch.from_numpy(np.stack(after[::-1])), log_prob


def _messages(transfers: Array, log_scales_S: Array, before_K: Array, after_K: Array) -> tuple[Tensor, Tensor, float]:
    """What `log_messages` returns, from what is no logarithm."""
    before, norms, after = [before_K], [], [after_K]
    for transfer_KK in transfers:
        next_K = before[-1] @ transfer_KK
        norms.append(next_K.sum())
        before.append(next_K / norms[-1])
    for transfer_KK in transfers[:0:-1]:
        previous_K = transfer_KK @ after[-1]
        after.append(previous_K / previous_K.max())
    log_prob = float(np.log(norms).sum() + log_scales_S.sum())
    return torch.from_numpy(np.log(np.stack(before[:-1]))), torch.from_numpy(np.log(np.stack(after[::-1]))), log_prob


def most_likely_states(
    log_likelihood_NK: Tensor, packing: Packing, log_transition_KK: Tensor, log_initial_K: Tensor
) -> tuple[Tensor, Tensor]:
    """(N,) the states of the most likely path of each sequence, and (S,) log p(path, x) (Viterbi 1967)."""
    num_states = len(log_initial_K)
    came_from_NK = torch.empty(log_likelihood_NK.shape, dtype=torch.int32)
    final_SK = torch.empty(packing.num_sequences, num_states, dtype=torch.float64)
    best_BK: Tensor | None = None
    for log_likelihood_BK, came_from_BK in zip(
        log_likelihood_NK.split(packing.sizes), came_from_NK.split(packing.sizes), strict=True
    ):
        size = len(log_likelihood_BK)
        if best_BK is None:
            best_BK = log_initial_K + log_likelihood_BK
        else:
            best_BK, index_BK = (best_BK[:size, :, None] + log_transition_KK).max(1)
            came_from_BK.copy_(index_BK)
            best_BK = best_BK + log_likelihood_BK
        final_SK[:size] = best_BK
    log_prob_S, state_S = final_SK.max(1)
    states_N = torch.empty(packing.num_steps, dtype=torch.int64)
    states, came_from = states_N.split(packing.sizes), came_from_NK.split(packing.sizes)
    for t in range(len(packing.sizes) - 1, -1, -1):
        size = packing.sizes[t]
        states[t].copy_(state_S[:size])
        if t > 0:
            state_S[:size] = came_from[t].gather(1, state_S[:size, None])[:, 0].long()
    return states_N, log_prob_S


def drawn_states(log_alpha_NK: Tensor, packing: Packing, log_transition_KK: Tensor, u_N: Tensor) -> Tensor:
    """(N,) states of a path of each sequence drawn from p(path | x), from the last step to the first; u: uniform numbers."""
    states_N = torch.empty(packing.num_steps, dtype=torch.int64)
    log_alphas, us, states = (values.split(packing.sizes) for values in (log_alpha_NK, u_N, states_N))
    for t in range(len(packing.sizes) - 1, -1, -1):
        log_weight_BK = log_alphas[t].clone()
        if t + 1 < len(packing.sizes):
            after = states[t + 1]
            log_weight_BK[: len(after)] += log_transition_KK.T[after]
        cumulative_BK = log_weight_BK.softmax(1).cumsum(1)
        u_B1 = us[t][:, None] * cumulative_BK[:, -1:]
        states[t].copy_((cumulative_BK[:, :-1] <= u_B1).sum(1))
    return states_N


def _log_product(log_a: Tensor, log_b_KK: Tensor) -> Tensor:
    """(N, K) of the logarithms of matrices a (N, K) and b (K, K) that of their product, which loses nothing however far
    apart the numbers are."""
    parts = log_a.split(max(1, MOST_ENTRIES // log_b_KK.numel()))
    return torch.cat([(part[:, :, None] + log_b_KK).logsumexp(1) for part in parts])
