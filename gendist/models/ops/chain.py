"""A latent that depends on its predecessor (a state), and a distribution of x given each of its values: one pass over a block.

    log p(x, states) = log initial(s_1) + sum of log transition(s_t, s_t+1) + sum of log p(x_t | s_t)

What each observation says of each state, log p(x | state) and the evidence, is scaled by the largest of its step and bounded
below, so that the fast recursions of `forward_backward.py` neither vanish nor meet denormal numbers. In a chain the bound is
no matter of course: the state with the largest may be one that cannot be reached. So:

- Where every transition has a probability of at least p, a path through a state can be exchanged for one through the best
  state at a cost of p^2. A bound below exp(-margin) p^2 then changes no sum by more than exp(-margin): chosen before the pass.
- Else the posterior probability of the steps and states that were bounded, which is what the result may be wrong by, is
  looked at after the pass, and the sequences where it is not negligible are done again in logarithms.

Long sequences are cut into segments. The transfer of each (a matrix) gives the messages that it gets from those before and
after; these are exact, and so is all that follows.

Legend: N steps, S sequences (inside a pass: segments), K states, D features.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Self

import torch
from torch import Tensor

from gendist.models.ops.buffers import buffer
from gendist.models.ops.forward_backward import (
    backward_,
    forward_,
    log_backward,
    log_forward,
    log_messages,
    log_transfer,
    transfer,
)
from gendist.models.ops.independent_latent import Kernel, Rows, loaded
from gendist.models.ops.packing import Packing
from gendist.models.ops.segments import cut
from gendist.one_thread import one_thread
from gendist.protocols import Block, Compute

MAX_STRIDE = 8
ROWS_AT_ONCE = 8_192  # of logarithms
ROWS_OF_PRODUCT = 128  # whose sum of products is one matrix: many small ones are twice as fast as one


@dataclass(frozen=True)
class _Digits:
    """Of a precision.

    margin     what is left out is below exp(-margin) of what counts
    lowest     the lowest logarithm that a likelihood may be bounded by
    least      no filtered probability falls below this, where some could vanish
    tolerance  of a posterior probability that is left out, and what rounding adds to it at each step
    """

    margin: float
    lowest: float
    least: float
    tolerance: float
    rounding: float


_DIGITS = {
    torch.float64: _Digits(margin=60.0, lowest=-600.0, least=1e-280, tolerance=1e-12, rounding=1e-14),
    torch.float32: _Digits(margin=20.0, lowest=-60.0, least=1e-30, tolerance=1e-7, rounding=1e-6),
}
CHECKED_BOUND = {torch.float64: -60.0, torch.float32: -40.0}


@dataclass(frozen=True, eq=False)
class Chain:
    """initial_probs (K,) and transition_matrix (K, K), rows sum to 1."""

    initial_probs: Tensor
    transition_matrix: Tensor

    @property
    def num_states(self) -> int:
        return len(self.initial_probs)

    @cached_property
    def log_initial(self) -> Tensor:
        return self.initial_probs.log()

    @cached_property
    def log_transition(self) -> Tensor:
        return self.transition_matrix.log()

    def bound(self, dtype: torch.dtype) -> float | None:
        """Below what a scaled log-likelihood need not be known; None where there is no such number."""
        least, digits = float(self.transition_matrix.min()), _DIGITS[dtype]
        if least <= 0.0:
            return None
        bound = -digits.margin + 2.0 * math.log(least)
        return bound if bound >= digits.lowest else None


@dataclass(frozen=True, eq=False)
class ChainStatistics:
    """initial (K,) the expected weight of first states, transitions (K, K) of each transition, float64."""

    initial: Tensor
    transitions: Tensor

    @classmethod
    def zeros(cls, num_states: int) -> ChainStatistics:
        sizes = ((num_states,), (num_states, num_states))
        return cls(*(torch.zeros(size, dtype=torch.float64) for size in sizes))

    def merge(self, other: ChainStatistics) -> ChainStatistics:
        return ChainStatistics(self.initial + other.initial, self.transitions + other.transitions)


@dataclass(frozen=True, eq=False)
class Messages:
    """What segments, in the order of time, must know of the rest of their sequence.

    before  (S, K) log p(state before the segment | x before it); alike for all states where the sequence begins
    after   (S, K) log p(x after the segment | its last state) up to a constant; 0 where the sequence ends
    """

    before: Tensor
    after: Tensor

    @classmethod
    def between(cls, log_transfers_SKK: Tensor) -> tuple[Self, float]:
        """Of the segments of one sequence, and its log p."""
        num_states = log_transfers_SKK.shape[1]
        alike_K = torch.full((num_states,), -math.log(num_states), dtype=torch.float64)
        before_SK, after_SK, log_prob = log_messages(log_transfers_SKK, alike_K, torch.zeros_like(alike_K))
        return cls(before_SK, after_SK), log_prob


@dataclass(frozen=True, eq=False)
class Smoothed:
    """What a pass finds.

    rows       (n,) the rows that count, as they are packed
    probs      (n, K) p(state | all of x), a buffer
    log_prob   (n,) log p(x_t | x before it), of some steps together at the last of them: their sum over a sequence is its log p
    """

    rows: Tensor
    probs: Tensor
    log_prob: Tensor


def sequence_weights(block: Block) -> Tensor:
    """(S,) the weight of each sequence, which all its steps have; 1 of an empty one."""
    assert block.sequence_bounds is not None
    weights_S = torch.ones(len(block.sequence_bounds) - 1, dtype=torch.float64)
    if block.weights is not None:
        has_steps = block.sequence_bounds.diff() > 0
        weights_S[has_steps] = block.weights[block.sequence_bounds[:-1][has_steps]]
    return weights_S


class ChainPass:
    """One block under one chain: `run`, then perhaps `statistics`. Sequences of weight 0 are left out."""

    def __init__(self, chain: Chain, kernel: Kernel, block: Block, compute: Compute) -> None:
        self._chain, self._kernel, self._block = chain, kernel, block
        self._dtype, self._device = compute.dtype, compute.torch_device
        self._digits = _DIGITS[compute.dtype]
        bound = chain.bound(compute.dtype)
        self._is_checked = bound is None
        self._bound = CHECKED_BOUND[compute.dtype] if bound is None else bound
        self._nothing = self._digits.least**0.75
        # As many steps as cannot vanish together, the transitions among them.
        self._stride = 1 if bound is None else max(1, min(MAX_STRIDE, int(self._digits.lowest / bound)))
        weights_S = sequence_weights(block)
        assert block.sequence_bounds is not None
        # Logarithms would make the transfers dear; then long sequences that lie in one block go step by step.
        segments = cut(block.sequence_bounds, weights_S > 0, block.open_ends, chain.num_states, not self._is_checked)
        self._packing = Packing.of(segments.first_rows, segments.lengths)
        self._segments = segments.take(self._packing.order)
        self._weights = None if block.weights is None else weights_S[self._segments.sequences]
        self._in_time = torch.argsort(self._packing.order)  # the place of each segment
        rows = self._packing.rows
        is_all = len(rows) == block.num_rows and torch.equal(rows, torch.arange(len(rows)))
        self._x = block.x if is_all else block.x.index_select(0, rows)
        self._missing, self._evidence = (
            values if values is None or is_all else values.index_select(0, rows) for values in (block.missing, block.evidence)
        )
        self._transition = chain.transition_matrix.to(self._device, self._dtype)
        self._transitions_again = torch.zeros_like(chain.transition_matrix)  # of what was done in logarithms

    # What each observation says

    def _joint(self) -> Iterator[tuple[Rows, Tensor]]:
        """(K, n) log p(x | state), the evidence, and of first steps log initial, of some packed steps after the other."""
        num_sequences = self._packing.num_sequences
        log_first_KS = torch.where(self._segments.begins, self._chain.log_initial[:, None], 0.0)
        zeros_K = torch.zeros(self._chain.num_states, dtype=torch.float64)
        for rows in loaded(self._x, self._missing, self._kernel):
            joint_KN = self._kernel.log_prob(zeros_K)
            if self._evidence is not None:
                joint_KN += self._evidence[rows].T.to(joint_KN)
            if isinstance(rows, slice):
                firsts = slice(rows.start, min(rows.stop, num_sequences))
                if firsts.start < num_sequences:
                    joint_KN[:, : firsts.stop - firsts.start] += log_first_KS[:, firsts].to(joint_KN)
            else:
                at_first = torch.nonzero(rows < num_sequences)[:, 0]
                joint_KN[:, at_first] += log_first_KS[:, rows[at_first]].to(joint_KN)
            yield rows, joint_KN

    def _likelihoods(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """(N, K) scaled by the largest of each step; (N,) log of the largest; (N, K) bool, where they were bounded."""
        shape = (self._packing.num_steps, self._chain.num_states)
        likelihood_NK = buffer("chain likelihood", shape, self._dtype, self._device)
        is_bounded_NK = torch.empty(shape, dtype=torch.bool, device=self._device) if self._is_checked else None
        log_largest_N = torch.empty(shape[0], dtype=torch.float64, device=self._device)
        for rows, joint_KN in self._joint():
            if shape[0] == 0:
                break
            largest_N = torch.amax(joint_KN, 0)
            is_impossible_KN = None if math.isfinite(float(joint_KN.sum())) else joint_KN == -torch.inf
            if is_impossible_KN is not None:  # also where the largest is -inf, and its difference no number
                largest_N = torch.where(largest_N == -torch.inf, 0.0, largest_N)
            joint_KN -= largest_N
            if is_bounded_NK is not None:
                is_bounded_NK[rows] = (joint_KN < self._bound).T
            joint_KN.clamp_min_(self._bound).exp_()
            if is_impossible_KN is not None:
                joint_KN.masked_fill_(is_impossible_KN, 0.0)
            likelihood_NK[rows] = joint_KN.T.to(likelihood_NK)
            log_largest_N[rows] = largest_N.to(torch.float64)
        return likelihood_NK, log_largest_N, is_bounded_NK

    # Between segments

    def transfers(self) -> Tensor:
        """(S, K, K) log p(x of the segment, its last state = j | the state before it = i) of all segments in the order of time;
        where a sequence begins, alike for all i."""
        with one_thread():
            likelihood_NK, log_largest_N, _ = self._likelihoods()
            return self._transfers(likelihood_NK, log_largest_N)

    def _transfers(self, likelihood_NK: Tensor, log_largest_N: Tensor) -> Tensor:
        packing = self._packing
        if self._is_checked:
            log_first_SKK = torch.where(self._segments.begins[:, None, None], 0.0, self._chain.log_transition)
            log_transfer_SKK = log_transfer(self._log_likelihoods(), packing, self._chain.log_transition, log_first_SKK)
        else:
            # The likelihoods of first steps include the initial probabilities, which no state comes before.
            first_KKS = torch.where(self._segments.begins, 1.0, self._chain.transition_matrix.T[:, :, None])
            log_transfer_SKK = transfer(
                likelihood_NK, packing, self._transition, first_KKS.to(self._transition), self._stride
            ).cpu()
            log_transfer_SKK += packing.sums(log_largest_N.cpu())[:, None, None]
        return log_transfer_SKK[self._in_time]

    def _messages(self, likelihood_NK: Tensor, log_largest_N: Tensor) -> Messages:
        """Of the block's segments, where no sequence goes on in another block."""
        log_transfers_SKK, sequences = self._transfers(likelihood_NK, log_largest_N), self._segments.sequences[self._in_time]
        starts = torch.nonzero(sequences.diff())[:, 0] + 1
        bounds = [0, *starts.tolist(), len(sequences)]
        each = [Messages.between(log_transfers_SKK[start:stop])[0] for start, stop in pairwise(bounds)]
        return Messages(torch.cat([m.before for m in each]), torch.cat([m.after for m in each]))

    # The pass

    def run(self, given: Messages | None = None) -> Smoothed:
        """Posteriors of all steps. given: of a block that is a piece of a sequence."""
        packing, segments = self._packing, self._segments
        likelihood_NK, log_largest_N, is_bounded_NK = self._likelihoods()
        if packing.num_steps == 0:
            return Smoothed(packing.rows, likelihood_NK, log_largest_N)
        shape = tuple(likelihood_NK.shape)
        filtered_NK = buffer("chain filtered", shape, self._dtype, self._device)
        weighed_NK = buffer("chain weighed", shape, self._dtype, self._device)
        before_SK = after_SK = predicted_SK = message_SK = None
        with one_thread():
            if segments.are_linked:
                messages = given or self._messages(likelihood_NK, log_largest_N)
                before_SK, after_SK = messages.before[self._packing.order], messages.after[self._packing.order]
                predicted_SK = before_SK.exp() @ self._chain.transition_matrix
                predicted_SK = torch.where(segments.begins[:, None], 1.0, predicted_SK).to(self._transition)
                if is_bounded_NK is not None:  # also what cannot be reached, and is raised to `least`
                    first_SK = likelihood_NK[: packing.num_sequences] * predicted_SK
                    least_S1 = self._digits.least * first_SK.sum(1, keepdim=True)
                    is_bounded_NK[: packing.num_sequences] |= first_SK <= least_S1
            least = self._digits.least if self._is_checked else 0.0
            norm_N = forward_(likelihood_NK, packing, self._transition, predicted_SK, filtered_NK, self._stride, least)
            trust_S = torch.ones(packing.num_sequences, dtype=torch.bool)
            if after_SK is not None:
                # In units in which the last posterior sums to 1.
                message_SK = after_SK.exp()
                reach_S = (message_SK * filtered_NK[packing.last].to(message_SK)).sum(1)
                trust_S &= reach_S > self._digits.least**0.5
                message_SK = (message_SK / reach_S[:, None]).to(self._transition)
            backward_(likelihood_NK, packing, self._transition, filtered_NK, message_SK, weighed_NK)
        log_prob_N = (norm_N.to(torch.float64).log() + log_largest_N).cpu()
        trust_S &= packing.sums(log_prob_N).isfinite()
        if is_bounded_NK is not None:
            left_out_N = torch.where(is_bounded_NK, likelihood_NK, 0.0).sum(1).cpu()
            off_S = (likelihood_NK[: packing.num_sequences].sum(1).cpu().to(torch.float64) - 1.0).abs()
            rounding_S = self._digits.tolerance + self._digits.rounding * packing.lengths
            trust_S &= (packing.sums(left_out_N) <= self._digits.tolerance) & (off_S <= rounding_S)
        self._filtered, self._weighed, self._before = filtered_NK, weighed_NK, before_SK
        self._probs = likelihood_NK
        again = torch.nonzero(~trust_S)[:, 0]
        if len(again):
            self._run_again(again, log_prob_N, before_SK, after_SK)
        if self._is_checked:  # what was raised to `least` is nothing again
            torch.threshold_(likelihood_NK, self._nothing, 0.0)
        return Smoothed(packing.rows, likelihood_NK, log_prob_N)

    def _run_again(self, places: Tensor, log_prob_N: Tensor, before_SK: Tensor | None, after_SK: Tensor | None) -> None:
        """In logarithms, of the segments at these places, which ascend, so that they are packed in the same order."""
        chain, segments = self._chain, self._segments.take(places)
        chosen_S = torch.zeros(self._packing.num_sequences, dtype=torch.bool)
        chosen_S[places] = True
        chosen = torch.nonzero(chosen_S[self._packing.places])[:, 0]
        packing = Packing.of(segments.first_rows, segments.lengths)
        log_likelihood_NK = self._log_likelihoods()[chosen]
        log_first_SK = torch.zeros(len(places), chain.num_states, dtype=torch.float64)
        if before_SK is not None:
            predicted_SK = (before_SK[places][:, :, None] + chain.log_transition).logsumexp(1)
            log_first_SK = torch.where(segments.begins[:, None], 0.0, predicted_SK)
        log_message_SK = None if after_SK is None else after_SK[places]
        log_alpha_NK = log_forward(log_likelihood_NK, packing, chain.log_transition, log_first_SK)
        log_beta_NK = log_backward(log_likelihood_NK, packing, chain.log_transition, log_message_SK)
        log_total_N = (log_alpha_NK + log_beta_NK).logsumexp(1)
        # Of an impossible sequence nothing is expected.
        log_total_N1 = torch.where(log_total_N > -torch.inf, log_total_N, torch.inf)[:, None]
        log_path_N = log_alpha_NK.logsumexp(1)
        log_step_N = log_path_N.clone()
        log_step_N[len(places) :] -= log_path_N[packing.previous]
        log_prob_N[chosen] = torch.where(log_total_N > -torch.inf, log_step_N, -torch.inf)
        chosen = chosen.to(self._device)
        self._probs[chosen] = (log_alpha_NK + log_beta_NK - log_total_N1).exp().to(self._probs)
        self._weighed[chosen] = self._filtered[chosen] = 0.0
        weights_N = None if self._weights is None else self._weights[places][packing.places]
        log_to_NK = log_likelihood_NK + log_beta_NK - log_total_N1
        log_from_NK = torch.full_like(log_to_NK, -torch.inf)
        log_from_NK[len(places) :] = log_alpha_NK[packing.previous]
        if before_SK is not None:
            log_from_NK[: len(places)] = torch.where(segments.begins[:, None], -torch.inf, before_SK[places])
        for rows in torch.arange(len(log_to_NK)).split(ROWS_AT_ONCE):
            pairs_nKK = (log_from_NK[rows, :, None] + chain.log_transition + log_to_NK[rows, None, :]).exp_()
            self._transitions_again += (pairs_nKK if weights_N is None else pairs_nKK * weights_N[rows, None, None]).sum(0)

    def _log_likelihoods(self) -> Tensor:
        """(N, K) what `_joint` yields, together."""
        log_likelihood_NK = torch.empty(self._packing.num_steps, self._chain.num_states, dtype=torch.float64)
        for rows, joint_KN in self._joint():
            log_likelihood_NK[rows] = joint_KN.T.to(log_likelihood_NK)
        return log_likelihood_NK

    # Statistics

    def statistics(self) -> ChainStatistics:
        """After `run`: the kernel is given what the posteriors weigh."""
        packing, num_states = self._packing, self._chain.num_states
        num_sequences = packing.num_sequences
        transitions = torch.zeros(num_states, num_states, dtype=torch.float64)
        if packing.num_steps == 0:
            return ChainStatistics.zeros(num_states)
        if self._weights is not None:
            weight_N1 = self._weights[packing.places][:, None].to(self._probs)
            self._probs *= weight_N1
            self._weighed *= weight_N1
        initial_K = self._probs[:num_sequences].cpu()[self._segments.begins].to(torch.float64).sum(0)
        initial_K = torch.where(self._chain.initial_probs > 0, initial_K, 0.0)
        for first, before, size in packing.links:
            transitions += _product(self._filtered[before : before + size], self._weighed[first : first + size])
        if self._before is not None:
            linked = ~self._segments.begins
            to_SK = self._weighed[:num_sequences].cpu().to(torch.float64)
            transitions += self._before[linked].exp().T @ to_SK[linked]
        transitions = transitions * self._chain.transition_matrix + self._transitions_again
        if self._is_checked:
            torch.threshold_(transitions, self._nothing, 0.0)
        for rows in loaded(self._x, self._missing, self._kernel):
            self._kernel.add(self._probs[rows].T)
        return ChainStatistics(initial_K, transitions)


def _product(from_NK: Tensor, to_NK: Tensor) -> Tensor:
    """(K, K) from^T to, summed in float64."""
    num_whole = len(from_NK) - len(from_NK) % ROWS_OF_PRODUCT
    split = (num_whole // ROWS_OF_PRODUCT, ROWS_OF_PRODUCT)
    products = torch.bmm(from_NK[:num_whole].unflatten(0, split).mT, to_NK[:num_whole].unflatten(0, split))
    return (products.sum(0, dtype=torch.float64) + from_NK[num_whole:].T @ to_NK[num_whole:]).cpu()
