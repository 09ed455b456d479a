"""K multinomial distributions of D counts, one a latent: a sample is a bag of tokens (McCallum & Nigam 1998).

log p is that of the tokens in one order, given how many there are: sum over d of x_d log prob_d, as in scikit-learn. Where
counts are missing it is given how many of the others there are: of these, each has prob_d / (sum of the probs that are there).

Legend: N samples, D columns, K latents.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from gendist.models.distributions.distribution import Step
from gendist.models.distributions.linear_kernel import LinearKernel, LinearStatistics, unchanged
from gendist.models.distributions.poisson import poisson_quantile
from gendist.protocols import Compute

SMALLEST = 1e-30  # of a probability: without pseudocounts a token may be in no sample of a latent


@dataclass(frozen=True, eq=False)
class MultinomialStatistics:
    """linear    the sums of the counts; its base is minus the sum of r n log S
    exposure  (K, D) sum of r n / S over the samples that have the column: n is a sample's number of tokens, S the sum of the
              probs of its columns that are there, 1 where none is missing; (K, 1) where nothing is missing
    """

    linear: LinearStatistics
    exposure: Tensor

    @property
    def counts(self) -> Tensor:
        """(K,) sum of r."""
        return self.linear.counts

    def merge(self, other: MultinomialStatistics) -> MultinomialStatistics:
        return MultinomialStatistics(self.linear.merge(other.linear), self.exposure + other.exposure)


@dataclass(frozen=True, eq=False)
class Multinomial:
    """probs (K, D), which sum to 1 for each latent. pseudocount: so many tokens are taken to have been seen of each kind
    (Dirichlet prior). mean_length: of the samples, for `sample`."""

    probs: Tensor
    mean_length: Tensor  # ()
    pseudocount: float = 0.0

    noise: ClassVar[Literal["normal", "uniform"]] = "uniform"

    def __post_init__(self) -> None:
        sums = self.probs.sum(-1) if self.probs.ndim == 2 else torch.zeros(1)
        if not torch.allclose(sums, torch.ones_like(sums), atol=1e-6) or not bool((self.probs > 0).all()):
            raise ValueError("probs of a multinomial: a matrix of positive numbers is needed, whose rows sum to 1")

    @property
    def num_latents(self) -> int:
        return self.probs.shape[0]

    @property
    def num_features(self) -> int:
        return self.probs.shape[1]

    @property
    def num_parameters(self) -> int:
        return self.num_latents * (self.num_features - 1)

    @cached_property
    def _log_probs(self) -> Tensor:
        return self.probs.log()

    @property
    def means(self) -> Tensor:
        return self.mean_length * self.probs

    @property
    def variances(self) -> Tensor:
        return self.mean_length * self.probs * (1.0 - self.probs)

    def kernel(self, compute: Compute) -> MultinomialKernel:
        return MultinomialKernel(self.probs, self._log_probs, compute)

    def log_prob_of_counted(self, statistics: MultinomialStatistics) -> float:
        return float((self._log_probs * statistics.linear.sums).sum()) + statistics.linear.base

    def m_step(self, statistics: MultinomialStatistics) -> Step[Multinomial]:
        """prob_d = (sum_d + pseudocount) / (exposure_d + D pseudocount), normalized.

        Without missing counts that is the mode of the Dirichlet posterior. With them it maximises a lower bound of the
        log-likelihood, since -log S >= 1 - log S' - S / S' with equality at the current S' (Hunter 2004, "MM algorithms for
        generalized Bradley-Terry models"), so that it never falls.
        """
        sums_KD, exposure_KD = statistics.linear.sums, statistics.exposure
        total_KD = (exposure_KD + self.num_features * self.pseudocount).expand_as(sums_KD)
        is_seen_KD = total_KD > 0
        probs_KD = ((sums_KD + self.pseudocount) / torch.where(is_seen_KD, total_KD, 1.0)).clamp_min(SMALLEST)
        # Of a column that all samples of a latent lack nothing is learned: it keeps its share, and the others have the rest.
        rest_K1 = 1.0 - torch.where(is_seen_KD, 0.0, self.probs).sum(1, keepdim=True)
        share_K1 = torch.where(is_seen_KD, probs_KD, 0.0).sum(1, keepdim=True)
        probs_KD = torch.where(is_seen_KD, rest_K1 * probs_KD / torch.where(share_K1 > 0, share_K1, 1.0), self.probs)
        # A sample shows the part S of its tokens that are of the columns that are there.
        shown = float((statistics.linear.present * self.probs).sum())
        length = sums_KD.sum() / shown if shown > 0 else self.mean_length
        is_final = statistics.linear.present.shape[1] == 1  # nothing is missing
        return Step(replace(self, probs=probs_KD, mean_length=length), is_final=is_final)

    def log_prior(self, statistics: MultinomialStatistics) -> float:
        return self.pseudocount * float(self._log_probs.sum())

    def sample(self, latent_N: Tensor, noise_ND: Tensor) -> Tensor:
        """The number of tokens is a Poisson's of mean `mean_length`, so that each count is one, too."""
        return poisson_quantile(noise_ND, self.means[latent_N].clamp_min(SMALLEST))

    def impute(self, responsibilities_NK: Tensor) -> Tensor:
        return responsibilities_NK @ self.means

    def tensors(self) -> dict[str, Tensor]:
        return {"probs": self.probs, "mean_length": self.mean_length}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], config: Any) -> Multinomial:
        return cls(tensors["probs"], tensors["mean_length"], config.pseudocount)


class MultinomialKernel(LinearKernel):
    """The linear kernel, and what missing counts take from it: n log S of each sample. All rows of a pass come with a mask of
    what is missing, or none."""

    def __init__(self, probs: Tensor, log_probs: Tensor, compute: Compute):
        super().__init__(log_probs, torch.zeros(1, 1, dtype=torch.float64).expand_as(probs), compute, unchanged)
        self._probs = probs.to(self._device)
        self._exposure = torch.zeros(len(probs), 1, dtype=torch.float64, device=self._device)
        self._length_N = self._log_sum_KN = torch.empty(0)

    def load(self, x_ND: Tensor, missing_ND: Tensor | None) -> None:
        super().load(x_ND, missing_ND)
        if missing_ND is not None:
            self._length_N = x_ND.sum(1).to(self._device)
            present_DN = 1.0 - missing_ND.T.to(self._probs)
            self._log_sum_KN = (self._probs @ present_DN).clamp_min_(SMALLEST).log_()

    def log_prob(self, offset_K: Tensor) -> Tensor:
        log_prob_KN = super().log_prob(offset_K)
        if self._missing is not None:
            log_prob_KN -= (self._length_N * self._log_sum_KN).to(self._dtype)
        return log_prob_KN

    def add(self, responsibilities_KN: Tensor) -> None:
        super().add(responsibilities_KN)
        if self._missing is None:
            return
        weighted_KN = responsibilities_KN.to(torch.float64) * self._length_N
        self._sum_of_base -= float((weighted_KN * self._log_sum_KN).sum())
        weighted_KN /= self._log_sum_KN.exp()
        self._exposure = self._exposure + weighted_KN @ (1.0 - self._missing.to(torch.float64))

    def count(self, latent_N: Tensor) -> None:
        if self._missing is None:
            super().count(latent_N)
        else:
            self.add(torch.nn.functional.one_hot(latent_N.to(self._device), len(self._probs)).T.to(self._dtype))

    def statistics(self) -> MultinomialStatistics:  # type: ignore[override]
        linear = super().statistics()
        whole_K1 = linear.sums.sum(1, keepdim=True)
        return MultinomialStatistics(linear, whole_K1 if self._missing is None else self._exposure.cpu())
