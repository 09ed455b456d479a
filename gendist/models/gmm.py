"""Gaussian mixture: p(x) = sum over k of weight_k N(x | mean_k, covariance_k), fitted by expectation-maximization.

Bishop 2006, "Pattern Recognition and Machine Learning" (PRML), section 9.2.
Legend: N samples, D features, K components.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import BaseModel, Field, model_validator
from torch import Tensor
from torch.nn.functional import softplus

from gendist.cost import PassCost, tensor_bytes
from gendist.figures import NUM_POINTS, Figure, Mixture, named
from gendist.models.distributions.gaussian import CovarianceType, Gaussian
from gendist.models.distributions.gaussian_estimation import GaussianConfig, GaussianEstimator, NormalInverseWishart
from gendist.models.distributions.gaussian_kernel import GaussianKernel
from gendist.models.distributions.gaussian_missing import drawn, expected
from gendist.models.distributions.gaussian_statistics import GaussianStatistics, Reference, pass_cost
from gendist.models.ops import criteria
from gendist.models.ops.brief import brief
from gendist.models.ops.independent_latent import Rows, draw_latents, latent_of, log_joint, log_prob_of_rows
from gendist.models.ops.responsibilities import responsibilities_
from gendist.noise import Noise
from gendist.protocols import EXACT, Block, Compute, DataSummary, LogLikelihood, Update, UserError, as_tensor

ROWS_AT_ONCE = 8_192  # of a sample, to stay in the processor's cache
NUM_WORST = 8


class GaussianMixtureConfig(GaussianConfig):
    """The `model:` block of a spec of family `gmm`.

    labels                what a label of `data.label` stands for: a component, or a class with a mixture of
                          `num_components` components of its own
    weight_concentration  of a symmetric Dirichlet prior of the weights; 1 is none
    frozen                parameters that keep the values they start with
    frozen_components     components whose mean and covariance do
    """

    num_components: int = Field(ge=1)
    labels: Literal["components", "classes"] = "components"
    weight_concentration: float = Field(default=1.0, ge=1.0, allow_inf_nan=False)
    frozen: tuple[Literal["weights", "means", "covariances"], ...] = ()
    frozen_components: tuple[Annotated[int, Field(ge=0)], ...] = ()

    @model_validator(mode="after")
    def _frozen_components_exist(self) -> Self:
        if self.frozen_components and max(self.frozen_components) >= self.num_components:
            raise ValueError(f"frozen_components: {max(self.frozen_components)}; allowed are 0 to {self.num_components - 1}")
        if self.covariance_type == "tied" and self.frozen_components:
            raise ValueError("frozen_components: components with a tied covariance share it; use frozen")
        return self


@dataclass(frozen=True, eq=False)
class WorstRows:
    """The complete rows without a label of the least log density, the least first, one of a block at most: where empty
    components may begin anew."""

    log_prob: Tensor  # (n,) n <= NUM_WORST
    rows: Tensor  # (n,)
    weights: Tensor  # (n,)
    x: Tensor  # (n, D)

    def merge(self, other: WorstRows) -> WorstRows:
        log_prob = torch.cat([self.log_prob, other.log_prob])
        first = torch.argsort(log_prob, stable=True)[:NUM_WORST]
        rows, weights = torch.cat([self.rows, other.rows]), torch.cat([self.weights, other.weights])
        return WorstRows(log_prob[first], rows[first], weights[first], torch.cat([self.x, other.x])[first])


@dataclass(frozen=True, eq=False)
class GaussianMixtureStatistics:
    """What an E-step keeps of its samples; the counts of the components are those of the Gaussians."""

    log_likelihood: float
    gaussian: GaussianStatistics
    worst: WorstRows

    def merge(self, other: GaussianMixtureStatistics) -> GaussianMixtureStatistics:
        return GaussianMixtureStatistics(
            self.log_likelihood + other.log_likelihood, self.gaussian.merge(other.gaussian), self.worst.merge(other.worst)
        )


@dataclass(frozen=True, eq=False)
class GaussianMixture:
    """weights (K,), which sum to 1, and the K Gaussians.

    labels     what the first components stand for, where the fit saw labels: labels[k] belongs to component k
    prior      what `config.prior` came to with the data
    reference  about what the next pass takes its moments, where not what the parameters suggest
    """

    config: GaussianMixtureConfig
    weights: Tensor
    gaussian: Gaussian
    labels: tuple[Any, ...] = ()
    prior: NormalInverseWishart | None = None
    reference: Reference | None = None

    Config: ClassVar[type[BaseModel]] = GaussianMixtureConfig
    not_offered: ClassVar[Mapping[str, str]] = {
        "elbo": "a Gaussian mixture has its exact density: use log_prob",
        "log_prob_bound": "a Gaussian mixture has its exact density: use log_prob",
        "classify": "components are not classes; encode gives the probability of each component",
        "reconstruct": "a Gaussian mixture has no decoder of x; decode gives a component's mean",
    }

    __repr__ = brief

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
        gaussian = Gaussian(means, covariances, covariance_type).check()
        config = GaussianMixtureConfig(
            num_components=gaussian.num_latents,
            covariance_type=covariance_type,
            covariance_regularization=covariance_regularization,
        )
        return cls(config, weights, gaussian, labels)

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

    def tensors(self) -> dict[str, Tensor]:
        parameters = {"weights": self.weights, "means": self.means, "covariances": self.covariances}
        return parameters | (self.prior.tensors() if self.prior is not None else {})

    @classmethod
    def from_tensors(cls, config: Any, tensors: Mapping[str, Tensor], labels: tuple[Any, ...]) -> GaussianMixture:
        parameters = {"weights", "means", "covariances"}
        prior = {name for name in tensors if name.startswith("prior_")}
        if set(tensors) - prior != parameters or bool(prior) != (config.prior is not None):
            raise ValueError(f"tensors {sorted(tensors)}; weights, means and covariances are needed, and prior_ as configured")
        gaussian = Gaussian(tensors["means"], tensors["covariances"], config.covariance_type).check()
        if gaussian.num_latents != config.num_components:
            raise ValueError(f"{gaussian.num_latents} means for {config.num_components} components")
        return cls(config, tensors["weights"], gaussian, labels, NormalInverseWishart.from_tensors(tensors) if prior else None)

    # Density

    def log_prob(self, x_ND: Any) -> Tensor:
        """(N,) log p(x) in nats (PRML 9.7); NaN is a missing entry, and log p of a row is that of the entries it has."""
        return self._by_rows(x_ND, (), responsibilities_)

    def encode(self, x_ND: Any) -> Tensor:
        """(N, K) responsibilities p(component | x) (PRML 9.13); NaN is a missing entry."""

        def responsibilities(log_joint_KN: Tensor) -> Tensor:
            responsibilities_(log_joint_KN)
            return log_joint_KN.T

        return self._by_rows(x_ND, (self.num_components,), responsibilities)

    def impute(self, x_ND: Any, *, seed: int | None = None, offset: int = 0) -> Tensor:
        """(N, D) x with its missing entries, NaN, filled in: by their mean given the entries that their row has, or by a draw.

        seed    None: the mean. Else a draw from p(missing | observed): a component from its posterior, then the entries; it
                belongs to the seed and the row's number
        offset  the number of the first row
        """
        x_ND, missing_ND = self._rows(x_ND)
        if missing_ND is None:
            return x_ND.clone()
        filled_ND = torch.empty_like(x_ND)
        for first in range(0, len(x_ND), ROWS_AT_ONCE):
            rows = slice(first, min(first + ROWS_AT_ONCE, len(x_ND)))
            filled_ND[rows] = self._imputed(x_ND[rows], missing_ND[rows], seed, offset + first)
        return filled_ND

    def _imputed(self, x_ND: Tensor, missing_ND: Tensor, seed: int | None, offset: int) -> Tensor:
        filled_ND, (num_rows, num_features) = torch.empty_like(x_ND), x_ND.shape
        if seed is not None:
            u_N = Noise(seed, "impute.component").uniform(offset, num_rows)[:, 0]
            noise_ND = Noise(seed, "impute.x").normal(offset, num_rows, num_features)
        for rows, log_joint_KN in self._log_joint(x_ND, missing_ND):
            responsibilities_(log_joint_KN)
            at_hand = x_ND[rows], missing_ND[rows]
            if seed is None:
                filled_ND[rows] = expected(self.gaussian, *at_hand, log_joint_KN)
            else:
                latent_N = (log_joint_KN.cumsum(0)[:-1] <= u_N[rows]).sum(0)
                filled_ND[rows] = drawn(self.gaussian, *at_hand, latent_N, noise_ND[rows])
        return filled_ND

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
        return criteria.aic(self.num_parameters, log_likelihood)

    def bic(self, log_likelihood: float, total_weight: float) -> float:
        """Bayesian information criterion; total_weight is the number of samples where none is weighted (Schwarz 1978)."""
        return criteria.bic(self.num_parameters, log_likelihood, total_weight)

    def criteria(self, log_likelihood: float, total_weight: float) -> dict[str, float]:
        """What may be read off a fit's total log-likelihood: aic and bic."""
        return {"aic": self.aic(log_likelihood), "bic": self.bic(log_likelihood, total_weight)}

    @property
    def num_parameters(self) -> int:
        return self.num_components - 1 + self.gaussian.num_parameters

    def _by_rows(self, x_ND: Any, shape: tuple[int, ...], function: Callable[[Tensor], Tensor]) -> Tensor:
        """(N, *shape) function of the (K, n) log p(x, component) of some rows after the other."""
        x_ND, missing_ND = self._rows(x_ND)
        values = torch.empty(len(x_ND), *shape, dtype=torch.float64)
        for rows, log_joint_KN in self._log_joint(x_ND, missing_ND):
            values[rows] = function(log_joint_KN)
        return values

    def check_rows(self, x_ND: Any) -> None:
        """UserError where x cannot be of this model."""
        self._rows(x_ND)

    def _rows(self, x_ND: Any) -> tuple[Tensor, Tensor | None]:
        """What a caller handed over, with 0 for what is missing; and where it is, if anything is."""
        x_ND = as_tensor(x_ND)
        if x_ND.ndim != 2 or x_ND.shape[1] != self.num_features:
            raise UserError(f"x has shape {tuple(x_ND.shape)}; (N, {self.num_features}) is needed")
        if bool(x_ND.isfinite().all()):
            return x_ND, None
        if bool(x_ND.isinf().any()):
            raise UserError("x has infinite entries; a Gaussian mixture takes finite ones, and NaN for those that are missing")
        missing_ND = x_ND.isnan()
        return x_ND.masked_fill(missing_ND, 0.0), missing_ND

    def _log_joint(self, x_ND: Tensor, missing_ND: Tensor | None) -> Iterator[tuple[Rows, Tensor]]:
        return log_joint(x_ND, missing_ND, GaussianKernel(self.gaussian, EXACT), self.weights.log())

    # Sampling

    def sample(self, num_samples: int, *, seed: int = 0, offset: int = 0, given: Any = None) -> Tensor:
        """(num_samples, D) rows offset.. of the endless sample that belongs to the seed.

        given   a component's index, or one of `labels`: draw from this component alone
        """
        component = None if given is None else latent_of(given, self.labels, self.num_components, "components")
        return self._sample(num_samples, seed, offset, component)[0]

    def _sample(self, num_samples: int, seed: int, offset: int, component: int | None) -> tuple[Tensor, Tensor]:
        """(num_samples, D) and (num_samples,) rows and their components."""
        x_ND = torch.empty(num_samples, self.num_features, dtype=torch.float64)
        latent_N = torch.empty(num_samples, dtype=torch.int64)
        for first in range(0, num_samples, ROWS_AT_ONCE):
            start, size = offset + first, min(ROWS_AT_ONCE, num_samples - first)
            if component is None:
                component_N = draw_latents(self.weights, seed, "sample.component", start, size)
            else:
                component_N = torch.full((size,), component)
            noise_ND = Noise(seed, "sample.x").normal(start, size, self.num_features)
            x_ND[first : first + size] = self.gaussian.sample(component_N, noise_ND)
            latent_N[first : first + size] = component_N
        return x_ND, latent_N

    def figures(self, seed: int) -> dict[str, Figure]:
        """The components: their outlines and samples of them."""
        x_ND, component_N = self._sample(NUM_POINTS, seed, 0, None)
        names = named(self.labels, self.num_components, "component")
        components_K = torch.arange(self.num_components)
        covariances = self.gaussian.covariances_of_latents
        return {"components": Mixture(x_ND, component_N, self.weights, self.means, covariances, components_K, names)}

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
        if config.frozen_components or {"means", "covariances"} & set(config.frozen):
            raise UserError("frozen means and covariances need values to keep: give the model to start from with fit.init")
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
        gaussian = Gaussian(centers_KD, covariances, config.covariance_type)
        return cls(config, weights_K, gaussian, labels, cls._prior(config, summary))

    @classmethod
    def adopt(
        cls, config: GaussianMixtureConfig, summary: DataSummary, model: GaussianMixture, labels: tuple[Any, ...]
    ) -> GaussianMixture:
        """The parameters of a model, estimated from here on as the configuration says."""
        for name in ("num_components", "covariance_type"):
            given, wanted = getattr(model.config, name), getattr(config, name)
            if given != wanted:
                raise UserError(f"the model to start from has {name} {given}, the spec model.{name} {wanted}")
        return cls(config, model.weights, model.gaussian, labels or model.labels, cls._prior(config, summary))

    @staticmethod
    def _prior(config: GaussianMixtureConfig, summary: DataSummary) -> NormalInverseWishart | None:
        if config.prior is None:
            return None
        return NormalInverseWishart.of(config.prior, config.covariance_type, summary, config.num_components)

    @classmethod
    def default_start(cls, config: GaussianMixtureConfig, labels: tuple[Any, ...]) -> str:
        return "kmeans||"

    @classmethod
    def check(cls, config: GaussianMixtureConfig, summary: DataSummary, labels: tuple[Any, ...]) -> None:
        without = torch.nonzero(summary.feature_weight == 0)[:, 0].tolist()
        if without:
            more = f", and of {len(without) - 1} other columns," if len(without) > 1 else ""
            raise UserError(
                f"every value of '{summary.features[without[0]].name}'{more} is missing from the rows to fit, or of weight 0; "
                "choose other columns with data.columns"
            )
        if summary.num_weighted_rows < config.num_components:
            raise UserError(
                f"model.num_components is {config.num_components}, but there are only {summary.num_weighted_rows} rows of "
                "positive weight to fit; ask for fewer components"
            )

    @classmethod
    def pass_cost(cls, config: GaussianMixtureConfig, summary: DataSummary, labels: tuple[Any, ...]) -> PassCost:
        num_features = len(summary.features)
        worst = tensor_bytes({"log_prob": (NUM_WORST,), "rows": (NUM_WORST,), "x": (NUM_WORST, num_features)})
        own = PassCost(0.0, worst, tensor_bytes({"weights": (config.num_components,)}))
        return pass_cost(config.covariance_type, config.num_components, num_features) + own

    def e_step(self, block: Block, compute: Compute = EXACT) -> GaussianMixtureStatistics:
        """Responsibilities (PRML 9.23) of a block's rows, and the moments that they weigh.

        Evidence multiplies p(x, component): with all but one component excluded, the row is counted, not guessed.
        """
        kernel = GaussianKernel(self.gaussian, compute, self.reference)
        log_prob_N = log_prob_of_rows(block, kernel, self.weights.log(), kernel.add)
        return GaussianMixtureStatistics(
            log_likelihood=block.weighted_sum(log_prob_N), gaussian=kernel.statistics(), worst=_worst(log_prob_N, block)
        )

    def log_prob_of(self, block: Block, compute: Compute = EXACT) -> Tensor:
        """(N,) log p(x, evidence) of a block's rows."""
        return log_prob_of_rows(block, GaussianKernel(self.gaussian, compute, self.reference), self.weights.log())

    def log_likelihood_of(self, block: Block, compute: Compute = EXACT) -> LogLikelihood:
        return LogLikelihood(block.weighted_sum(self.log_prob_of(block, compute)))

    def m_step(self, statistics: GaussianMixtureStatistics) -> Update[GaussianMixture]:
        """New weights (PRML 9.26), means and covariances.

        An empty component begins anew at one of the worst rows, where that raises the likelihood.
        """
        counts_K = statistics.gaussian.counts
        estimator = self._estimator()
        estimate = estimator.estimate(self.gaussian, statistics.gaussian)
        weights_K = self.weights
        if "weights" not in self.config.frozen:  # the mode of a Dirichlet posterior
            weights_K = counts_K + (self.config.weight_concentration - 1.0)
            weights_K = weights_K / weights_K.sum()
        model = replace(self, weights=weights_K, gaussian=estimate.gaussian, reference=None)
        weight = statistics.gaussian.weight
        alive_K = estimator.alive(weight.amax(1))  # rows that lack every entry keep no component alive
        model, revivals = model._revived(alive_K, counts_K, statistics.worst)
        least_gain = model._penalty(estimator, weight) - self._penalty(estimator, weight)
        redo = None if estimate.redo is None else replace(self, reference=estimate.redo)
        return Update(model, (*estimate.repairs, *revivals), least_gain, redo)

    def _estimator(self) -> GaussianEstimator:
        config, all_or_none = self.config, torch.ones(self.num_components, dtype=torch.bool)
        chosen_K = torch.zeros_like(all_or_none)
        chosen_K[list(config.frozen_components)] = True
        keep_means_K = chosen_K | ("means" in config.frozen)
        return GaussianEstimator(config, self.prior, keep_means_K, chosen_K | ("covariances" in config.frozen))

    def _penalty(self, estimator: GaussianEstimator, weight: Tensor) -> float:
        """What the M-step takes off the expected log-likelihood that it maximises."""
        extra = self.config.weight_concentration - 1.0
        of_weights = extra * float(self.weights.log().sum()) if extra > 0.0 else 0.0
        return estimator.penalty(self.gaussian, weight) - of_weights

    def _revived(self, alive_K: Tensor, counts_K: Tensor, worst: WorstRows) -> tuple[GaussianMixture, list[str]]:
        """With empty components moved to the worst rows, each with its row's share of all weight and the mean covariance.

        Rows of total weight W lose W log(1 - s) to a component of weight s; a row of weight w gains w log(1 + s p_new / p_old),
        which must be more.
        """
        said = {k: f"component {k} is empty and stays where it was" for k in torch.nonzero(~alive_K)[:, 0].tolist()}
        # A label's component stands for its rows alone.
        empty = [k for k in said if k >= len(self.labels) and k not in self.config.frozen_components]
        if not empty or self.config.frozen or not bool(alive_K.any()):
            return self, list(said.values())
        weights_K, means, covariances = torch.where(alive_K, self.weights, 0.0), self.means.clone(), self.covariances.clone()
        pooled = self.gaussian.pooled(torch.where(alive_K, counts_K, 0.0))
        total = float(counts_K.sum())
        shares = (worst.weights / total).clamp_max(0.5 / self.num_components)
        gains = worst.weights * softplus(shares.log() + pooled.log_peak[0] - worst.log_prob)
        better = torch.nonzero(gains > -total * torch.log1p(-shares))[:, 0].tolist()
        for k, i in zip(empty, better, strict=False):
            weights_K[k], means[k] = shares[i], worst.x[i]
            if self.covariance_type != "tied":
                covariances[k] = pooled.covariances[0]
            said[k] = f"component {k} was empty and begins anew at row {worst.rows[i]}, one of the worst fitted"
        gaussian = Gaussian(means, covariances, self.covariance_type)
        return replace(self, weights=weights_K / weights_K.sum(), gaussian=gaussian), list(said.values())

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
            parameters = (estimator.weights_init, estimator.means_init, inverse)
        else:
            raise UserError(
                "the scikit-learn estimator has no parameters: fit it, or set weights_init, means_init and precisions_init"
            )
        weights, means, covariances = (as_tensor(each) for each in parameters)
        if kind in ("full", "tied"):  # which it does not keep symmetric to the last digit, of float32 to the sixth
            covariances = 0.5 * (covariances + covariances.mT)
        return cls.from_parameters(weights, means, covariances, kind, estimator.reg_covar)

    from_estimator = from_sklearn  # what `init` of a fit may be

    def to_sklearn(self) -> Any:
        """A fitted `sklearn.mixture.GaussianMixture` with these parameters."""
        from sklearn.mixture import GaussianMixture as Estimator

        estimator = Estimator(
            self.num_components, covariance_type=self.covariance_type, reg_covar=self.config.covariance_regularization
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


def _worst(log_prob_N: Tensor, block: Block) -> WorstRows:
    if block.weights is not None:
        log_prob_N = torch.where(block.weights > 0, log_prob_N, torch.inf)
    if block.missing is not None:  # the density of fewer entries is of another unit
        log_prob_N = torch.where(block.missing.any(1), torch.inf, log_prob_N)
    if block.evidence is not None:  # which an empty component, without a label, has no part in
        log_prob_N = torch.where(block.is_labelled, torch.inf, log_prob_N)
    # The first of the least, if any row counts.
    least = log_prob_N.argmin()[None] if block.num_rows else torch.empty(0, dtype=torch.int64)
    least = least[log_prob_N[least] < torch.inf]
    return WorstRows(log_prob_N[least], block.rows[least], block.weights_or_ones()[least], block.x[least])


Model = GaussianMixture
