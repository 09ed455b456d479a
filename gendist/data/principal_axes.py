"""Principal axes of all rows, in one pass over blocks that keeps the digits of the narrowest of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gendist.data.weightless import first_that_counts
from gendist.one_thread import one_thread
from gendist.protocols import Block


@dataclass(frozen=True, eq=False)
class Spread:
    """Weight, mean (D,) and a root of the scatter about the mean: root (at most D rows, D), scatter = root^T root.

    The root has the digits that squaring loses: axes whose widths are 1e8 apart come out as from a singular value
    decomposition of all the rows. Two roots are merged by a QR decomposition (Demmel et al. 2012, "Communication-optimal
    parallel and sequential QR and LU factorizations"), with one row more for the distance of the means (Chan, Golub &
    LeVeque 1979).
    """

    weight: float
    mean: Tensor
    root: Tensor

    @classmethod
    def of(cls, block: Block) -> Spread:
        """Of a block without missing entries."""
        weights_N1 = block.weights_or_ones()[:, None]
        weight = float(weights_N1.sum())
        reference_D = first_that_counts(block.x, weights_N1)  # keeps the digits of data far from 0
        centred_ND = (block.x - reference_D).masked_fill_(weights_N1 == 0, 0.0)
        shift_D = (weights_N1 * centred_ND).sum(0) / (weight or 1.0)
        return cls(weight, reference_D + shift_D, _triangle(weights_N1.sqrt() * (centred_ND - shift_D)))

    def merge(self, other: Spread) -> Spread:
        weight = self.weight + other.weight
        share = other.weight / (weight or 1.0)
        delta_D = other.mean - self.mean
        between_1D = (self.weight * share) ** 0.5 * delta_D[None]
        root = _triangle(torch.cat([self.root, other.root, between_1D]))
        return Spread(weight, self.mean + delta_D * share, root)

    def axes(self) -> tuple[Tensor, Tensor]:
        """(D, D) the directions, one a row, and (D,) the (biased) standard deviations along them, the largest first.

        The entry of largest magnitude of each direction is positive.
        """
        with one_thread():
            _, singular, directions_DD = torch.linalg.svd(self.root / self.weight**0.5)
        deviations_D = torch.zeros(len(directions_DD), dtype=torch.float64)
        deviations_D[: len(singular)] = singular
        largest_D1 = directions_DD.gather(1, directions_DD.abs().argmax(1, keepdim=True))
        # In rows, as it is read again: a product with the other layout has other last digits.
        return (directions_DD * largest_D1.sign()).contiguous(), deviations_D


def _triangle(rows_ND: Tensor) -> Tensor:
    """R (at most D rows, D) of a QR decomposition, which has the same R^T R."""
    with one_thread():
        return torch.linalg.qr(rows_ND, mode="r").R
