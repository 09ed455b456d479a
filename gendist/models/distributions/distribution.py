"""What K distributions over the same columns, one a latent, promise to the families that are made of them.

Legend: N samples, D columns, K latents.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Literal, Protocol, Self, TypeVar

from torch import Tensor

from gendist.models.ops.independent_latent import Kernel
from gendist.protocols import Compute

D = TypeVar("D", covariant=True)


@dataclass(frozen=True)
class Step(Generic[D]):
    """What an M-step returns.

    distribution  the new parameters
    repairs       a line for each parameter that could not be estimated
    redo          None, or the old parameters, prepared for another pass that keeps the digits which the statistics lacked
    is_final      whether the same latents, known for sure, would lead to the same parameters again
    """

    distribution: D
    repairs: tuple[str, ...] = ()
    redo: D | None = None
    is_final: bool = True


class Distribution(Protocol):
    """Missing entries are marginalised; parameters and statistics are float64 on the CPU."""

    noise: ClassVar[Literal["normal", "uniform"]]
    """What `sample` makes samples from, one number a column."""

    @property
    def num_latents(self) -> int: ...
    @property
    def num_features(self) -> int: ...
    @property
    def num_parameters(self) -> int: ...

    @property
    def means(self) -> Tensor:
        """(K, D) the mean of x, or, of a category, the most likely one."""
        ...

    @property
    def variances(self) -> Tensor:
        """(K, D) of x; 0 of a category, which has none."""
        ...

    def kernel(self, compute: Compute) -> Kernel: ...

    def log_prob_of_counted(self, statistics: Any) -> float:
        """Sum over samples and latents of responsibility times log p(x | latent), from the statistics: what the
        log-likelihood of samples whose latents are known is, without a density of any of them."""
        ...

    def m_step(self, statistics: Any) -> Step[Self]:
        """The maximum of the expected log-likelihood plus the log prior. A latent without weight is left to its prior, or
        keeps its parameters where there is none."""
        ...

    def log_prior(self, statistics: Any) -> float:
        """What the M-step adds to the expected log-likelihood that it maximises, up to a constant."""
        ...

    def sample(self, latent_N: Tensor, noise_ND: Tensor) -> Tensor:
        """(N, D) a sample of each latent, row by row a function of its noise."""
        ...

    def impute(self, responsibilities_NK: Tensor) -> Tensor:
        """(N, D) the mean of x given the latent's probabilities, or, of a category, the most likely one."""
        ...

    def tensors(self) -> dict[str, Tensor]: ...

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], config: Any) -> Self:
        """The inverse of `tensors`; ValueError or KeyError where they do not fit."""
        ...
