"""Gaussian mixture: p(x) = sum over k of weight_k N(x | mean_k, covariance_k), fitted by expectation-maximization.

Bishop 2006, "Pattern Recognition and Machine Learning" (PRML), section 9.2.
Legend: N samples, D features, K components.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from gendist.models.distributions.gaussian import CovarianceType, Gaussian, GaussianStatistics
from gendist.noise import Noise
from gendist.protocols import Block, DataSummary, Update, UserError, as_tensor

ROWS_AT_ONCE = 4096  # of a sample or of a density, to bound memory


class GaussianMixtureConfig(BaseModel):
    """The `model:` block of a spec of family `gmm`.

    covariance_regularization is added to the diagonal of each covariance, as scikit-learn's reg_covar.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_components: int = Field(ge=1)
    covariance_type: CovarianceType = "full"
    covariance_regularization: float = Field(default=1e-6, ge=0.0, allow_inf_nan=False)


@dataclass(frozen=True, eq=False)
class GaussianMixtureStatistics:
    """What an E-step keeps of its samples; the counts of the components are those of the Gaussians."""

    log_likelihood: float
    gaussian: GaussianStatistics

    def merge(self, other: GaussianMixtureStatistics) -> GaussianMixtureStatistics:
        return GaussianMixtureStatistics(self.log_likelihood + other.log_likelihood, self.gaussian.merge(other.gaussian))


@dataclass(frozen=True, eq=False)
class GaussianMixture:
    """weights (K,), which sum to 1, and the K Gaussians.

    labels   what the first components stand for, where the fit saw labels: labels[k] belongs to component k
    """

    weights: Tensor
    gaussian: Gaussian
    labels: tuple[Any, ...] = ()

    Config: ClassVar[type[BaseModel]] = GaussianMixtureConfig
    not_offered: ClassVar[Mapping[str, str]] = {
        "elbo": "a Gaussian mixture has its exact density: use log_prob",
        "log_prob_bound": "a Gaussian mixture has its exact density: use log_prob",
        "classify": "components are not classes; encode gives the probability of each component",
        "impute": "a Gaussian mixture takes complete rows only",
        "reconstruct": "a Gaussian mixture has no decoder of x; decode gives a component's mean",
    }

    def __post_init__(self) -> None:
        if tuple(self.weights.shape) != (self.num_components,):
            raise ValueError(f"weights of shape {tuple(self.weights.shape)}; ({self.num_components},) is needed")
        if not bool((self.weights >= 0).all()) or not math.isclose(float(self.weights.sum()), 1.0, rel_tol=1e-6):
            raise ValueError(f"weights must be 0 or more and sum to 1, not {float(self.weights.sum()):g}")
        if len(self.labels) > self.num_components:
            raise ValueError(f"{len(self.labels)} labels for {self.num_components} components")

    @classmethod
    def from_parameters(
        cls,
        weights: Any,
        means: Any,
        covariances: Any,
        covariance_type: CovarianceType = "full",
        covariance_regularization: float = 1e-6,
        labels: tuple[Any, ...] = (),
    ) -> GaussianMixture:
        """A mixture from arrays: weights (K,), means (K, D), covariances as in `distributions/gaussian.py`.

        ValueError where shapes do not fit or a covariance is not positive definite.
        """
        weights, means, covariances = (as_tensor(v) for v in (weights, means, covariances))
        return cls(weights, Gaussian(means, covariances, covariance_type, covariance_regularization).check(), labels)

    # Parameters

    @property
    def num_components(self) -> int:
        return self.gaussian.num_latents

    num_latents = num_components

    @property
    def num_features(self) -> int:
        return self.gaussian.num_features

    @property
    def means(self) -> Tensor:
        return self.gaussian.means

    @property
    def covariances(self) -> Tensor:
        return self.gaussian.covariances

    @property
    def covariance_type(self) -> CovarianceType:
        return self.gaussian.covariance_type

    @property
    def config(self) -> GaussianMixtureConfig:
        return GaussianMixtureConfig(
            num_components=self.num_components,
            covariance_type=self.covariance_type,
            covariance_regularization=self.gaussian.covariance_regularization,
        )

    def tensors(self) -> dict[str, Tensor]:
        return {"weights": self.weights, "means": self.means, "covariances": self.covariances}

    @classmethod
    def from_tensors(cls, config: Any, tensors: Mapping[str, Tensor], labels: tuple[Any, ...]) -> GaussianMixture:
        if set(tensors) != {"weights", "means", "covariances"}:
            raise ValueError(f"tensors {sorted(tensors)}; weights, means and covariances are needed")
        return cls.from_parameters(
            **tensors,
            covariance_type=config.covariance_type,
            covariance_regularization=config.covariance_regularization,
            labels=labels,
        )

    # Density

    def log_prob(self, x_ND: Any) -> Tensor:
        """(N,) log p(x) in nats (PRML 9.7)."""
        return self._by_rows(x_ND, lambda rows: torch.logsumexp(self._log_joint(rows), dim=1))

    def encode(self, x_ND: Any) -> Tensor:
        """(N, K) responsibilities p(component | x) (PRML 9.13)."""
        return self._by_rows(x_ND, lambda rows: torch.softmax(self._log_joint(rows), dim=1))

    def decode(self, z: Any) -> Tensor:
        """(N, D) the mean of x given components (N,), integers, or given responsibilities (N, K)."""
        z = as_tensor(z, dtype=None)
        if z.ndim == 1 and not z.is_floating_point():
            if len(z) and not 0 <= int(z.min()) <= int(z.max()) < self.num_components:
                raise UserError(f"components {int(z.min())} to {int(z.max())}; allowed are 0 to {self.num_components - 1}")
            return self.means[z]
        if z.ndim != 2 or z.shape[1] != self.num_components:
            raise UserError(
                f"decode takes components of shape (N,) or responsibilities of shape (N, {self.num_components}), "
                f"not an array of shape {tuple(z.shape)}"
            )
        return z.to(self.means.dtype) @ self.means

    def aic(self, log_likelihood: float) -> float:
        """Akaike's information criterion of data with this total log-likelihood; lower is better (Akaike 1974)."""
        return 2.0 * self.num_parameters - 2.0 * log_likelihood

    def bic(self, log_likelihood: float, total_weight: float) -> float:
        """Bayesian information criterion; total_weight is the number of samples where none is weighted (Schwarz 1978)."""
        return self.num_parameters * math.log(total_weight) - 2.0 * log_likelihood

    def criteria(self, log_likelihood: float, total_weight: float) -> dict[str, float]:
        """What may be read off a fit's total log-likelihood: aic and bic."""
        return {"aic": self.aic(log_likelihood), "bic": self.bic(log_likelihood, total_weight)}

    @property
    def num_parameters(self) -> int:
        return self.num_components - 1 + self.gaussian.num_parameters

    def _log_joint(self, x_ND: Tensor) -> Tensor:
        """(N, K) log p(x, component)."""
        return self.gaussian.log_prob(x_ND) + self.weights.log()

    def _by_rows(self, x_ND: Any, function: Any) -> Tensor:
        x_ND = as_tensor(x_ND)
        if x_ND.ndim != 2 or x_ND.shape[1] != self.num_features:
            raise UserError(f"x has shape {tuple(x_ND.shape)}; (N, {self.num_features}) is needed")
        if not bool(x_ND.isfinite().all()):
            raise UserError("x has missing or infinite entries; a Gaussian mixture takes complete rows only")
        return torch.cat([function(rows) for rows in x_ND.split(ROWS_AT_ONCE)])

    # Sampling

    def sample(self, num_samples: int, *, seed: int = 0, offset: int = 0, given: Any = None) -> Tensor:
        """(num_samples, D) rows offset.. of the endless sample that belongs to the seed.

        given   a component's index, or one of `labels`: draw from this component alone
        """
        component = None if given is None else self._component_of(given)
        cumulative_K = self.weights.cumsum(0)
        parts = []
        for start in range(offset, offset + num_samples, ROWS_AT_ONCE):
            size = min(ROWS_AT_ONCE, offset + num_samples - start)
            if component is None:
                u_N = Noise(seed, "sample.component").uniform(start, size)[:, 0] * cumulative_K[-1]
                component_N = torch.searchsorted(cumulative_K, u_N, right=True).clamp_max(self.num_components - 1)
            else:
                component_N = torch.full((size,), component)
            parts.append(self.gaussian.sample(component_N, Noise(seed, "sample.x").normal(start, size, self.num_features)))
        return torch.cat(parts) if parts else torch.empty(0, self.num_features, dtype=torch.float64)

    def _component_of(self, given: Any) -> int:
        names = {str(label): component for component, label in enumerate(self.labels)}
        names |= {str(free): free for free in range(len(self.labels), self.num_components) if str(free) not in names}
        if str(given) not in names:
            labels = f"the labels are {', '.join(map(str, self.labels))}" if self.labels else ""
            free = self.num_components - len(self.labels)
            components = f"the components are {len(self.labels)} to {self.num_components - 1}" if free else ""
            raise UserError(f"given {given!r}; {'; '.join(filter(None, (labels, components)))}")
        return names[str(given)]

    # Expectation-maximization

    @classmethod
    def count_latents(cls, config: GaussianMixtureConfig, labels: tuple[Any, ...]) -> int:
        """One component a label at least; the components beyond the labels are free."""
        if len(labels) > config.num_components:
            raise UserError(
                f"data.label has {len(labels)} different labels, but model.num_components is {config.num_components}; "
                "each label needs a component"
            )
        return config.num_components

    @classmethod
    def start(
        cls, config: GaussianMixtureConfig, summary: DataSummary, centers_KD: Tensor, labels: tuple[Any, ...]
    ) -> GaussianMixture:
        """Equal weights and the columns' variances, about the centers."""
        num_components = config.num_components
        variances_D = summary.variance + config.covariance_regularization
        variances_D = torch.where(variances_D > 0, variances_D, 1.0)  # a constant column, no regularization
        covariances = {
            "full": torch.diag(variances_D).expand(num_components, -1, -1).clone(),
            "tied": torch.diag(variances_D),
            "diag": variances_D.expand(num_components, -1).clone(),
            "spherical": variances_D.mean().expand(num_components).clone(),
        }[config.covariance_type]
        weights_K = torch.full((num_components,), 1.0 / num_components, dtype=torch.float64)
        gaussian = Gaussian(centers_KD, covariances, config.covariance_type, config.covariance_regularization)
        return cls(weights_K, gaussian, labels)

    @classmethod
    def check(cls, config: GaussianMixtureConfig, summary: DataSummary, feature_names: Sequence[str]) -> None:
        if bool(summary.num_missing.any()):
            worst = int(torch.argmax(summary.num_missing))
            raise UserError(
                f"{int(summary.num_missing.sum()):,} entries of the rows to fit are missing, "
                f"{int(summary.num_missing[worst]):,} of them in '{feature_names[worst]}'; a Gaussian mixture takes complete "
                "rows only: drop or fill them, or choose other columns with data.columns"
            )
        if summary.num_weighted_rows < config.num_components:
            raise UserError(
                f"model.num_components is {config.num_components}, but there are only {summary.num_weighted_rows} rows of "
                "positive weight to fit; ask for fewer components"
            )

    def e_step(self, block: Block) -> GaussianMixtureStatistics:
        """Responsibilities (PRML 9.23) of a block's rows, and the moments that they weigh.

        Evidence multiplies p(x, component): with all but one component excluded, the row is counted, not guessed.
        """
        log_joint_NK, log_prob_N = self._log_joint_with_evidence(block)
        responsibilities_NK = torch.exp(log_joint_NK - log_prob_N[:, None])
        if block.weights is not None:
            # A row of weight 0 is absent, even where its density underflows.
            responsibilities_NK = torch.where(block.weights[:, None] > 0, responsibilities_NK * block.weights[:, None], 0.0)
        return GaussianMixtureStatistics(
            log_likelihood=_weighted_sum(log_prob_N, block),
            gaussian=self.gaussian.statistics(block.x, responsibilities_NK),
        )

    def log_likelihood(self, block: Block) -> float:
        """Weighted sum of log p(x, evidence) over a block's rows."""
        return _weighted_sum(self._log_joint_with_evidence(block)[1], block)

    def _log_joint_with_evidence(self, block: Block) -> tuple[Tensor, Tensor]:
        """(N, K) log p(x, component, evidence), and (N,) its sum over the components."""
        log_joint_NK = self._log_joint(block.x)
        if block.evidence is not None:
            log_joint_NK = log_joint_NK + block.evidence
        return log_joint_NK, torch.logsumexp(log_joint_NK, dim=1)

    def m_step(self, statistics: GaussianMixtureStatistics) -> Update[GaussianMixture]:
        """New weights (PRML 9.26), means and covariances."""
        counts_K = statistics.gaussian.counts
        gaussian, repairs = self.gaussian.m_step(statistics.gaussian)
        model = replace(self, weights=counts_K / counts_K.sum(), gaussian=gaussian)
        least_gain = gaussian.regularization_penalty(counts_K) - self.gaussian.regularization_penalty(counts_K)
        return Update(model, repairs, least_gain)

    # scikit-learn

    @classmethod
    def from_sklearn(cls, estimator: Any) -> GaussianMixture:
        """From a `sklearn.mixture.GaussianMixture`, fitted, or with weights_init, means_init and precisions_init set."""
        if not hasattr(estimator, "covariance_type"):
            raise UserError(f"a {type(estimator).__name__} is no sklearn.mixture.GaussianMixture")
        kind = estimator.covariance_type
        if hasattr(estimator, "weights_"):
            parameters = (estimator.weights_, estimator.means_, estimator.covariances_)
        elif estimator.weights_init is not None and estimator.means_init is not None and estimator.precisions_init is not None:
            precisions = as_tensor(estimator.precisions_init)
            inverse, failed = torch.linalg.inv_ex(precisions) if kind in ("full", "tied") else (1 / precisions, torch.tensor(0))
            if bool(failed.any()) or not bool(inverse.isfinite().all()):
                raise UserError("precisions_init has no inverse")
            covariances = 0.5 * (inverse + inverse.mT) if kind in ("full", "tied") else inverse
            parameters = (estimator.weights_init, estimator.means_init, covariances)
        else:
            raise UserError(
                "the scikit-learn estimator has no parameters: fit it, or set weights_init, means_init and precisions_init"
            )
        return cls.from_parameters(*parameters, covariance_type=kind, covariance_regularization=estimator.reg_covar)

    def to_sklearn(self) -> Any:
        """A fitted `sklearn.mixture.GaussianMixture` with these parameters."""
        from sklearn.mixture import GaussianMixture as Estimator

        estimator = Estimator(
            self.num_components, covariance_type=self.covariance_type, reg_covar=self.gaussian.covariance_regularization
        )
        whitening = self.gaussian.whitening
        estimator.weights_ = self.weights.numpy()
        estimator.means_ = self.means.numpy()
        estimator.covariances_ = self.covariances.numpy()
        # scikit-learn's precisions_cholesky_ is upper triangular, U U^T = precision: the transpose of the whitening.
        cholesky = {
            "full": lambda: whitening.mT,
            "tied": lambda: whitening[0].mT,
            "diag": lambda: whitening,
            "spherical": lambda: whitening[:, 0],
        }[self.covariance_type]()
        estimator.precisions_cholesky_ = cholesky.contiguous().numpy()
        squared = cholesky @ cholesky.mT if self.covariance_type in ("full", "tied") else cholesky.square()
        estimator.precisions_ = squared.numpy()
        estimator.converged_, estimator.n_features_in_ = True, self.num_features
        return estimator


def _weighted_sum(log_prob_N: Tensor, block: Block) -> float:
    if block.weights is not None:
        log_prob_N = torch.where(block.weights > 0, log_prob_N * block.weights, 0.0)
    return float(log_prob_N.sum())


Model = GaussianMixture
