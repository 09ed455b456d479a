"""A small family that is fitted by EM, of columns of counts or of categories taken for counts, dense or sparse.

A mixture of multinomials (PRML 9.3.3) without their coefficients: log p(x | k) = sum over d of x_d log probs_kd. It is no
module of gendist/models; the fixture `counter` puts it among the families.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from gendist.noise import Noise
from gendist.protocols import EXACT, Block, Compute, DataSummary, LogLikelihood, Update, as_matrix


class CounterConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    num_components: int = 2


@dataclass(frozen=True, eq=False)
class Counts:
    log_likelihood: float
    rows: Tensor  # (K,)
    sums: Tensor  # (K, D)

    def merge(self, other: Counts) -> Counts:
        return Counts(self.log_likelihood + other.log_likelihood, self.rows + other.rows, self.sums + other.sums)


@dataclass(frozen=True, eq=False)
class Counter:
    """seen: what `check` was told of the data by the latest fit of this process."""

    config: CounterConfig
    weights: Tensor
    probs: Tensor
    labels: tuple[Any, ...] = ()

    Config: ClassVar[type[BaseModel]] = CounterConfig
    takes_categories: ClassVar[bool] = True
    takes_sparse: ClassVar[bool] = True
    seen: ClassVar[list[DataSummary]] = []
    not_offered: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("elbo", "log_prob_bound", "encode", "decode", "classify", "impute", "reconstruct"), "a counter only counts"
    )

    @property
    def num_features(self) -> int:
        return self.probs.shape[1]

    @property
    def num_latents(self) -> int:
        return len(self.weights)

    def tensors(self) -> dict[str, Tensor]:
        return {"weights": self.weights, "probs": self.probs}

    @classmethod
    def from_tensors(cls, config: Any, tensors: Mapping[str, Tensor], labels: tuple[Any, ...]) -> Counter:
        return cls(config, tensors["weights"], tensors["probs"], labels)

    def log_prob(self, x: Any) -> Tensor:
        x_ND = as_matrix(x)
        return self._joint(x_ND).logsumexp(1)

    def _joint(self, x_ND: Tensor) -> Tensor:
        return x_ND @ self.probs.log().T.contiguous() + self.weights.log()

    def sample(self, num_samples: int, *, seed: int = 0, offset: int = 0, given: Any = None) -> Tensor:
        """No sample of the density, but whole numbers from 0 to 3, addressed by row."""
        return (4.0 * Noise(seed, "counter").uniform(offset, num_samples, self.num_features)).floor()

    @classmethod
    def count_latents(cls, config: CounterConfig, labels: tuple[Any, ...]) -> int:
        return config.num_components

    @classmethod
    def check(cls, config: CounterConfig, summary: DataSummary, labels: tuple[Any, ...]) -> None:
        cls.seen[:] = [summary]

    @classmethod
    def default_start(cls, config: CounterConfig, labels: tuple[Any, ...]) -> str:
        return "labels" if labels else "random_responsibilities"

    @classmethod
    def start(cls, config: CounterConfig, summary: DataSummary, centers: Tensor, labels: tuple[Any, ...]) -> Counter:
        k = config.num_components
        return cls(config, torch.full((k,), 1.0 / k).double(), torch.full_like(centers, 1.0 / centers.shape[1]), labels)

    @classmethod
    def adopt(cls, config: CounterConfig, summary: DataSummary, model: Counter, labels: tuple[Any, ...]) -> Counter:
        return cls(config, model.weights, model.probs, labels)

    def e_step(self, block: Block, compute: Compute = EXACT) -> Counts:
        joint_NK = self._joint(block.x) if block.evidence is None else self._joint(block.x) + block.evidence
        resp_NK = joint_NK.softmax(1) * block.weights_or_ones()[:, None]
        log_likelihood = block.weighted_sum(joint_NK.logsumexp(1))
        return Counts(log_likelihood, resp_NK.sum(0), (block.x.mT @ resp_NK).T.contiguous())

    def log_prob_of(self, block: Block, compute: Compute = EXACT) -> Tensor:
        return (self._joint(block.x) + (0.0 if block.evidence is None else block.evidence)).logsumexp(1)

    def log_likelihood_of(self, block: Block, compute: Compute = EXACT) -> LogLikelihood:
        return LogLikelihood(block.weighted_sum(self.log_prob_of(block, compute)))

    def m_step(self, statistics: Counts) -> Update[Counter]:
        sums = statistics.sums + 1.0
        weights = statistics.rows / statistics.rows.sum()
        return Update(Counter(self.config, weights, sums / sums.sum(1, keepdim=True), self.labels))

    def criteria(self, log_likelihood: float, total_weight: float) -> dict[str, float]:
        return {}


Model = Counter
