"""K distributions of D independent columns of categories, one a latent. PRML 2.2.

Column d holds whole numbers from 0 on, each a category of its own with a slot of its own; with `has_unseen` the column's last
slot is for whatever category was not there when the model was fitted.

Legend: N samples, D columns, K latents, F slots of all columns together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from gendist.models.distributions.distribution import Step
from gendist.models.distributions.linear_kernel import LinearKernel, LinearStatistics, log_prob_of_counted
from gendist.protocols import Compute, csr_from_arrays

SMALLEST = 1e-30  # of a probability: without pseudocounts a category may be in no sample of a latent


@dataclass(frozen=True, eq=False)
class Categorical:
    """probs (K, F), column after column, and num_slots (D,) how many of them each column has; those of a column sum to 1.

    pseudocount: so many samples are taken to have been seen of each slot (Dirichlet prior)."""

    probs: Tensor
    num_slots: Tensor
    pseudocount: float = 0.0
    has_unseen: bool = True

    noise: ClassVar[Literal["normal", "uniform"]] = "uniform"

    def __post_init__(self) -> None:
        if self.probs.ndim != 2 or self.probs.shape[1] != int(self.num_slots.sum()) or not bool((self.probs > 0).all()):
            raise ValueError("probs of categories: a matrix of positive numbers is needed, with a column for each slot")
        sums_KD = self._per_column(self.probs)
        if not torch.allclose(sums_KD, torch.ones_like(sums_KD), atol=1e-6):
            raise ValueError("probs of categories: those of each column must sum to 1")

    @property
    def num_latents(self) -> int:
        return self.probs.shape[0]

    @property
    def num_features(self) -> int:
        return len(self.num_slots)

    @property
    def num_parameters(self) -> int:
        return self.num_latents * (self.probs.shape[1] - self.num_features)

    @cached_property
    def _column(self) -> Tensor:
        """(F,) the column of each slot."""
        return torch.repeat_interleave(torch.arange(self.num_features), self.num_slots)

    @cached_property
    def _log_probs(self) -> Tensor:
        return self.probs.log()

    @property
    def _first_slot(self) -> Tensor:
        """(D,)"""
        return self.num_slots.cumsum(0) - self.num_slots

    @property
    def num_categories(self) -> Tensor:
        """(D,) of those that were seen."""
        return self.num_slots - int(self.has_unseen)

    def _per_column(self, values_KF: Tensor) -> Tensor:
        """(K, D) sums over the slots of each column."""
        return torch.zeros(len(values_KF), self.num_features, dtype=values_KF.dtype).index_add_(1, self._column, values_KF)

    @property
    def means(self) -> Tensor:
        return self._most_likely(self.probs)

    @property
    def variances(self) -> Tensor:
        return torch.zeros(self.num_latents, self.num_features, dtype=torch.float64)

    @property
    def probs_of_columns(self) -> list[Tensor]:
        """(K, C) of each column, of the categories that were seen."""
        columns = zip(self._first_slot.tolist(), self.num_categories.tolist(), strict=True)
        return [self.probs[:, first : first + number] for first, number in columns]

    def _most_likely(self, probs_NF: Tensor) -> Tensor:
        """(N, D) the category of the largest probability, of those that were seen."""
        columns = [
            probs_NF[:, first : first + number].argmax(1)
            for first, number in zip(self._first_slot.tolist(), self.num_categories.tolist(), strict=True)
        ]
        return torch.stack(columns, 1).to(torch.float64)

    def kernel(self, compute: Compute) -> LinearKernel:
        """t(x) has a 1 in the slot of each column's category."""
        no_constants = torch.zeros(self.num_latents, self.num_features, dtype=torch.float64)
        return LinearKernel(self._log_probs, no_constants, compute, self._slots)

    def _slots(self, x_ND: Tensor, missing_ND: Tensor | None) -> Tensor:
        """(N, F) in CSR layout."""
        num_rows, num_columns = x_ND.shape
        x_ND, missing_ND = x_ND.cpu(), None if missing_ND is None else missing_ND.cpu()
        # The least of them before they are integers, which hold no 1e19.
        slot_ND = torch.minimum(x_ND, (self.num_slots - 1).to(x_ND)).to(torch.int64).clamp_min_(0).add_(self._first_slot)
        ones_ND = torch.ones(num_rows, num_columns, dtype=torch.float64)
        if missing_ND is not None:
            ones_ND.masked_fill_(missing_ND, 0.0)
        bounds = torch.arange(0, num_rows * num_columns + 1, num_columns)
        shape = (num_rows, self.probs.shape[1])
        return csr_from_arrays(bounds.numpy(), slot_ND.reshape(-1).numpy(), ones_ND.reshape(-1).numpy(), shape)

    def log_prob_of_counted(self, statistics: LinearStatistics) -> float:
        return log_prob_of_counted(self._log_probs, torch.zeros_like(statistics.present), statistics)

    def m_step(self, statistics: LinearStatistics) -> Step[Categorical]:
        total_KD = statistics.present + self.num_slots.to(torch.float64) * self.pseudocount
        total_KF = total_KD.expand(-1, self.num_features)[:, self._column]
        probs_KF = ((statistics.sums + self.pseudocount) / torch.where(total_KF > 0, total_KF, 1.0)).clamp_min(SMALLEST)
        return Step(replace(self, probs=torch.where(total_KF > 0, probs_KF, self.probs)))

    def log_prior(self, statistics: LinearStatistics) -> float:
        return self.pseudocount * float(self.probs.log().sum())

    def sample(self, latent_N: Tensor, noise_ND: Tensor) -> Tensor:
        """A category that was seen."""
        columns = []
        for d, (first, number) in enumerate(zip(self._first_slot.tolist(), self.num_categories.tolist(), strict=True)):
            cumulative_KC = self.probs[:, first : first + number].cumsum(1)
            u_N1 = noise_ND[:, d, None] * cumulative_KC[latent_N, -1:]
            columns.append((cumulative_KC[latent_N, :-1] <= u_N1).sum(1))
        return torch.stack(columns, 1).to(torch.float64)

    def impute(self, responsibilities_NK: Tensor) -> Tensor:
        return self._most_likely(responsibilities_NK @ self.probs)

    def tilted(self, size: float) -> Categorical:
        """With log p of each category `size` away from its mean over the latents (root mean square), where it is nearer."""
        away_KF = self._log_probs - self._log_probs.mean(0)
        spread_F = away_KF.square().mean(0).sqrt()
        factor_F = torch.where((spread_F > 0) & (spread_F < size), size / spread_F, 1.0)
        weights_KF = (self._log_probs.mean(0) + away_KF * factor_F).exp()
        return replace(self, probs=weights_KF / self._per_column(weights_KF)[:, self._column])

    def tensors(self) -> dict[str, Tensor]:
        return {"probs": self.probs, "num_slots": self.num_slots}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], config: Any) -> Categorical:
        return cls(tensors["probs"], tensors["num_slots"], config.pseudocount, config.unseen_categories)
