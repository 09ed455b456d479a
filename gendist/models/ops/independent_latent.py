"""A latent that is independent from row to row (a component, a class), and a distribution of x given each of its values.

log p(x, latent) = log weight + log p(x | latent) (PRML section 9.2). Evidence is added to it: where it excludes all latents
but one, the row is counted, not guessed.
Legend: N samples, D features, K latents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from gendist.models.ops.responsibilities import responsibilities_
from gendist.noise import Noise
from gendist.protocols import Block, UserError

Rows = slice | Tensor


class Kernel(Protocol):
    """One pass of K distributions over rows, some at a time: `load` them, ask for `log_prob`, `add` what they weigh.

    Tensors that it returns are buffers: they hold until the next rows.
    """

    def portions(self, x_ND: Tensor, missing_ND: Tensor | None) -> Iterator[Rows]:
        """Which rows are to be loaded together, each once: a function of their shapes and of what is missing."""
        ...

    def load(self, x_ND: Tensor, missing_ND: Tensor | None) -> None:
        """The rows that the next calls are about; True where an entry is missing."""
        ...

    def log_prob(self, offset_K: Tensor) -> Tensor:
        """(K, N) log p(x | latent) + offset of the latent."""
        ...

    def add(self, responsibilities_KN: Tensor) -> None:
        """Add the sufficient statistics of the rows, weighed."""
        ...

    def count(self, latent_N: Tensor) -> None:
        """`add`, of rows of which each belongs to one latent alone and weighs 1."""
        ...

    def statistics(self) -> Any:
        """What was added."""
        ...


def take(values: Tensor, rows: Rows) -> Tensor:
    """These rows; of a sparse matrix only all of them can be asked for."""
    return values if isinstance(rows, slice) and rows == slice(0, len(values)) else values[rows]


def known_latents(block: Block) -> Tensor | None:
    """(N,) the latent of each row, where the evidence leaves one to every row and says so without doubt; else None."""
    if block.evidence is None or block.num_rows == 0:
        return None
    best_N, latent_N = block.evidence.max(1)
    # It leaves each row a latent at least, so as many as rows are one each.
    is_known = not bool(best_N.any()) and int(torch.count_nonzero(block.evidence > -torch.inf)) == block.num_rows
    return latent_N if is_known else None


def loaded(x_ND: Tensor, missing_ND: Tensor | None, kernel: Kernel) -> Iterator[Rows]:
    """The rows, some after the other, when the kernel has them at hand."""
    for rows in kernel.portions(x_ND, missing_ND):
        kernel.load(take(x_ND, rows), None if missing_ND is None else take(missing_ND, rows))
        yield rows


def log_joint(x_ND: Tensor, missing_ND: Tensor | None, kernel: Kernel, log_weights_K: Tensor) -> Iterator[tuple[Rows, Tensor]]:
    """Some rows after the other, and their (K, n) log p(x, latent), a buffer."""
    return ((rows, kernel.log_prob(log_weights_K)) for rows in loaded(x_ND, missing_ND, kernel))


def log_prob_of_rows(
    block: Block, kernel: Kernel, log_weights_K: Tensor, use: Callable[[Tensor], None] | None = None
) -> Tensor:
    """(N,) log p(x, evidence); `use` is called with the (K, n) weighted responsibilities (PRML 9.23) of some rows after the
    other."""
    log_prob_N = torch.empty(block.num_rows, dtype=torch.float64)
    for rows, joint_KN in log_joint(block.x, block.missing, kernel, log_weights_K):
        if block.evidence is not None:
            joint_KN += take(block.evidence, rows).T.to(joint_KN.device)
        log_prob_N[rows] = responsibilities_(joint_KN).to(log_prob_N)
        if use is not None:
            if block.weights is not None:
                weights_N = take(block.weights, rows).to(joint_KN.device)
                joint_KN.mul_(weights_N).masked_fill_(weights_N == 0, 0.0)  # absent, even where no density is known
            use(joint_KN)
    return log_prob_N


def latent_of(given: Any, labels: tuple[Any, ...], num_latents: int, name: str) -> int:
    """The latent that a label or, of one that has no label, its number stands for. name: what latents are called."""
    names = {str(label): latent for latent, label in enumerate(labels)}
    names |= {str(free): free for free in range(len(labels), num_latents) if str(free) not in names}
    if str(given) not in names:
        said = f"the labels are {', '.join(map(str, labels))}" if labels else ""
        free = f"the {name} are {len(labels)} to {num_latents - 1}" if num_latents > len(labels) else ""
        raise UserError(f"given {given!r}; {'; '.join(filter(None, (said, free)))}")
    return names[str(given)]


def draw_latents(weights_K: Tensor, seed: int, purpose: str, start: int, size: int) -> Tensor:
    """(size,) latents of the rows from `start` on of the endless sample that belongs to the seed."""
    cumulative_K = weights_K.cumsum(0)
    u_N = Noise(seed, purpose).uniform(start, size)[:, 0] * cumulative_K[-1]
    return torch.searchsorted(cumulative_K, u_N, right=True).clamp_max(len(weights_K) - 1)
