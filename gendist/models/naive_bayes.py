"""Naive Bayes as a generative model: p(x, class) = prior of the class times the product over the columns of p(x_d | class).

Where all classes are known it is fitted by counting; where some or all are not, by expectation-maximization (Nigam et al.
2000, "Text classification from labeled and unlabeled documents using EM"; without any label it is latent class analysis).
Legend: N samples, D columns, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import BaseModel, Field, model_validator
from torch import Tensor

from gendist.cost import PassCost, tensor_bytes
from gendist.figures import Figure, named
from gendist.models.distributions.column_kinds import (
    ColumnsConfig,
    FoundKinds,
    blank_columns,
    check_columns,
    check_values,
    pass_cost,
)
from gendist.models.distributions.columns import Columns, ColumnsStatistics
from gendist.models.ops import criteria
from gendist.models.ops.brief import brief
from gendist.models.ops.independent_latent import draw_latents, known_latents, latent_of, loaded, log_joint, log_prob_of_rows
from gendist.noise import Noise
from gendist.protocols import EXACT, Block, Compute, DataSummary, LogLikelihood, Update, UserError, as_matrix, as_tensor

ROWS_AT_ONCE = 8_192  # of a sample, to stay in the processor's cache

PositiveNumber = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]


class NaiveBayesConfig(ColumnsConfig):
    """The `model:` block of a spec of family `naive_bayes`: that of its columns, and

    num_classes                the classes; as many as there are labels where left out
    class_prior                of the classes: as the data have them, uniform, or given, in the order of the labels
    class_pseudocount          samples that are taken to have been seen of each class
    """

    num_classes: int | None = Field(default=None, ge=1)
    class_prior: Literal["empirical", "uniform"] | tuple[PositiveNumber, ...] = "empirical"
    class_pseudocount: float = Field(default=0.0, ge=0.0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _prior_fits(self) -> Self:
        if isinstance(self.class_prior, tuple):
            if not math.isclose(sum(self.class_prior), 1.0, rel_tol=1e-6):
                raise ValueError(f"class_prior sums to {sum(self.class_prior):g}; it must sum to 1")
            if self.num_classes not in (None, len(self.class_prior)):
                raise ValueError(f"class_prior has {len(self.class_prior)} entries for {self.num_classes} classes")
        return self


@dataclass(frozen=True, eq=False)
class NaiveBayesStatistics:
    """What an E-step keeps of its samples.

    num_unknown  samples of positive weight whose class was guessed
    """

    log_likelihood: float
    columns: ColumnsStatistics
    num_unknown: int

    def merge(self, other: NaiveBayesStatistics) -> NaiveBayesStatistics:
        return NaiveBayesStatistics(
            self.log_likelihood + other.log_likelihood,
            self.columns.merge(other.columns),
            self.num_unknown + other.num_unknown,
        )


@dataclass(frozen=True, eq=False)
class NaiveBayes:
    """weights (K,), the classes' prior, which sum to 1, and the distributions of the columns given the class.

    labels   what the first classes stand for, where the fit saw labels: labels[k] belongs to class k
    """

    config: NaiveBayesConfig
    weights: Tensor
    columns: Columns
    labels: tuple[Any, ...] = ()

    Config: ClassVar[type[BaseModel]] = NaiveBayesConfig
    takes_categories: ClassVar[bool] = True
    takes_sparse: ClassVar[bool] = True
    not_offered: ClassVar[Mapping[str, str]] = {
        "elbo": "naive Bayes has its exact density: use log_prob",
        "log_prob_bound": "naive Bayes has its exact density: use log_prob",
        "reconstruct": "naive Bayes has no decoder of x; decode gives a class's mean, impute what is missing",
    }

    __repr__ = brief

    def __post_init__(self) -> None:
        if tuple(self.weights.shape) != (self.columns.num_latents,):
            raise ValueError(f"weights of shape {tuple(self.weights.shape)}; ({self.columns.num_latents},) is needed")
        if not bool((self.weights >= 0).all()) or not math.isclose(float(self.weights.sum()), 1.0, rel_tol=1e-6):
            raise ValueError(f"weights must be 0 or more and sum to 1, not {float(self.weights.sum()):g}")
        if len(self.labels) > self.num_classes:
            raise ValueError(f"{len(self.labels)} labels for {self.num_classes} classes")

    @property
    def num_classes(self) -> int:
        return self.columns.num_latents

    num_latents = num_classes

    @property
    def num_features(self) -> int:
        return self.columns.num_features

    @property
    def kinds(self) -> tuple[str, ...]:
        """(D,) gaussian, multinomial, bernoulli, categorical or poisson."""
        return self.columns.kinds

    @property
    def num_parameters(self) -> int:
        free = 0 if self.config.class_prior != "empirical" else self.num_classes - 1
        return free + self.columns.num_parameters

    def tensors(self) -> dict[str, Tensor]:
        return {"weights": self.weights} | self.columns.tensors()

    @classmethod
    def from_tensors(cls, config: Any, tensors: Mapping[str, Tensor], labels: tuple[Any, ...]) -> NaiveBayes:
        if "weights" not in tensors:
            raise ValueError(f"tensors {sorted(tensors)}; weights are needed, and those of the columns")
        of_columns = {name: tensor for name, tensor in tensors.items() if name != "weights"}
        return cls(config, tensors["weights"], Columns.from_tensors(of_columns, config), labels)

    # Density

    def log_prob(self, x_ND: Any) -> Tensor:
        """(N,) log p(x) in nats; entries that are NaN are missing, and marginalised."""
        return self.joint_log_prob(x_ND).logsumexp(1)

    def joint_log_prob(self, x_ND: Any) -> Tensor:
        """(N, K) log p(x, class)."""
        x_ND, missing_ND = self._rows(x_ND)
        joint_NK = torch.empty(len(x_ND), self.num_classes, dtype=torch.float64)
        for rows, joint_KN in log_joint(x_ND, missing_ND, self.columns.kernel(EXACT), self.weights.log()):
            joint_NK[rows] = joint_KN.T
        return joint_NK

    def encode(self, x_ND: Any) -> Tensor:
        """(N, K) p(class | x)."""
        return self.joint_log_prob(x_ND).softmax(1)

    def classify(self, x_ND: Any) -> Tensor:
        """(N, C) log p(label | x), columns in the order of `labels`; classes without a label take no part."""
        if not self.labels:
            raise UserError("classify: the fit saw no labels; encode gives the probability of each class")
        return self.joint_log_prob(x_ND)[:, : len(self.labels)].log_softmax(1)

    def decode(self, z: Any) -> Tensor:
        """(N, D) the mean of x given classes (N,), integers, or given their probabilities (N, K); of a categorical column
        the most likely category."""
        z = as_tensor(z, dtype=None)
        if z.ndim == 1 and not z.is_floating_point():
            if len(z) and not 0 <= int(z.min()) <= int(z.max()) < self.num_classes:
                raise UserError(f"classes {int(z.min())} to {int(z.max())}; allowed are 0 to {self.num_classes - 1}")
            return self.columns.means[z]
        if z.ndim != 2 or z.shape[1] != self.num_classes:
            raise UserError(
                f"decode takes classes of shape (N,) or probabilities of shape (N, {self.num_classes}), "
                f"not an array of shape {tuple(z.shape)}"
            )
        return self.columns.impute(z.to(torch.float64))

    def impute(self, x_ND: Any, *, seed: int | None = None, offset: int = 0) -> Tensor:
        """(N, D) x with its missing entries (NaN) filled in: with their mean given the others (of a categorical column the
        most likely category), or, where a seed is given, with a draw from what they may be. offset: the first row's number
        among those that belong to the seed."""
        x_ND, missing_ND = self._rows(x_ND)
        if missing_ND is None:
            return x_ND
        posterior_NK = self.encode(x_ND.masked_fill(missing_ND, torch.nan))
        if seed is None:
            filled_ND = self.columns.impute(posterior_NK)
        else:
            u_N1 = Noise(seed, "impute.class").uniform(offset, len(x_ND))
            class_N = (posterior_NK.cumsum(1)[:, :-1] <= u_N1).sum(1)
            filled_ND = self.columns.sample(class_N, seed, "impute.x", offset)
        return torch.where(missing_ND, filled_ND, x_ND)

    def criteria(self, log_likelihood: float, total_weight: float) -> dict[str, float]:
        """What may be read off a fit's total log-likelihood: aic and bic."""
        return {
            "aic": criteria.aic(self.num_parameters, log_likelihood),
            "bic": criteria.bic(self.num_parameters, log_likelihood, total_weight),
        }

    def check_rows(self, x: Any) -> None:
        """UserError where x cannot be of this model."""
        self._rows(x)

    def _rows(self, x: Any) -> tuple[Tensor, Tensor | None]:
        """x with 0 for what is missing, and what is; UserError where x cannot be of this model."""
        x_ND = as_matrix(x)
        if x_ND.ndim != 2 or x_ND.shape[1] != self.num_features:
            raise UserError(f"x has shape {tuple(x_ND.shape)}; (N, {self.num_features}) is needed")
        is_sparse = x_ND.layout is torch.sparse_csr
        values = x_ND.values() if is_sparse else x_ND
        if bool(values.isinf().any()) or (is_sparse and bool(values.isnan().any())):
            raise UserError("x has infinite entries" if not is_sparse else "sparse x has missing or infinite entries")
        missing_ND = None if is_sparse else x_ND.isnan()
        if missing_ND is not None and bool(missing_ND.any()):
            x_ND = x_ND.masked_fill(missing_ND, 0.0)
        else:
            missing_ND = None
        for group in self.columns.groups:
            check_values(group, values if is_sparse else group.of(x_ND, self.num_features))
        return x_ND, missing_ND

    # Sampling

    def sample(self, num_samples: int, *, seed: int = 0, offset: int = 0, given: Any = None) -> Tensor:
        """(num_samples, D) rows offset.. of the endless sample that belongs to the seed.

        given   one of `labels`, or a class's index: draw from this class alone
        """
        class_N = self.sample_classes(num_samples, seed=seed, offset=offset, given=given)
        x_ND = torch.empty(num_samples, self.num_features, dtype=torch.float64)
        for first in range(0, num_samples, ROWS_AT_ONCE):
            rows = slice(first, first + ROWS_AT_ONCE)
            x_ND[rows] = self.columns.sample(class_N[rows], seed, "sample.x", offset + first)
        return x_ND

    def sample_classes(self, num_samples: int, *, seed: int = 0, offset: int = 0, given: Any = None) -> Tensor:
        """(num_samples,) the classes that the rows of `sample` belong to."""
        if given is None:
            return draw_latents(self.weights, seed, "sample.class", offset, num_samples)
        return torch.full((num_samples,), latent_of(given, self.labels, self.num_classes, "classes"))

    def figures(self, seed: int) -> dict[str, Figure]:
        """What each class makes of each column."""
        return {"classes": self.columns.profiles(named(self.labels, self.num_classes, "class"))}

    # Fitting

    @classmethod
    def count_latents(cls, config: NaiveBayesConfig, labels: tuple[Any, ...]) -> int:
        """A class for each label, and free ones if `num_classes` says so."""
        num_classes = config.num_classes
        if num_classes is None and isinstance(config.class_prior, tuple):
            num_classes = len(config.class_prior)
        if num_classes is None:
            if not labels:
                raise UserError("model.num_classes is missing: give it, or name the column with the classes in data.label")
            return len(labels)
        if len(labels) > num_classes:
            raise UserError(
                f"data.label has {len(labels)} different labels, but there are {num_classes} classes (model.num_classes or "
                "model.class_prior); each label needs one"
            )
        return num_classes

    @classmethod
    def default_start(cls, config: NaiveBayesConfig, labels: tuple[Any, ...]) -> str:
        """From the labelled rows alone, as Nigam et al. do, where each class has a label; else from classes at random."""
        return "labels" if labels and len(labels) == cls.count_latents(config, labels) else "random_responsibilities"

    @classmethod
    def check(cls, config: NaiveBayesConfig, summary: DataSummary, labels: tuple[Any, ...]) -> None:
        num_classes = cls.count_latents(config, labels)
        if summary.num_weighted_rows < num_classes:
            raise UserError(f"{num_classes} classes, but only {summary.num_weighted_rows} rows of positive weight to fit")
        check_columns(config, summary)

    @classmethod
    def find_kinds(cls, config: NaiveBayesConfig, summary: DataSummary) -> FoundKinds | None:
        """What the data decide of columns of kind mixed."""
        return FoundKinds.of(config, summary)

    @classmethod
    def start(cls, config: NaiveBayesConfig, summary: DataSummary, centers_KD: Tensor, labels: tuple[Any, ...]) -> NaiveBayes:
        """Classes that are alike but for the centers: of each column what all rows together suggest."""
        num_classes = len(centers_KD)
        weights_K = torch.full((num_classes,), 1.0 / num_classes, dtype=torch.float64)
        if isinstance(config.class_prior, tuple):
            weights_K = torch.tensor(config.class_prior, dtype=torch.float64)
        return cls(config, weights_K, blank_columns(config, summary, centers_KD), labels)

    @classmethod
    def adopt(cls, config: NaiveBayesConfig, summary: DataSummary, model: NaiveBayes, labels: tuple[Any, ...]) -> NaiveBayes:
        """The parameters of a model, estimated from here on as the configuration says."""
        labels = labels or model.labels
        num_classes = cls.count_latents(config, labels)
        if model.num_classes != num_classes:
            raise UserError(f"the model to start from has {model.num_classes} classes, the spec and the data {num_classes}")
        blank = cls.start(config, summary, model.columns.means, labels)
        columns = model.columns.adopted(blank.columns, config)
        weights_K = model.weights if config.class_prior == "empirical" else blank.weights
        return cls(config, weights_K, columns, labels)

    @classmethod
    def pass_cost(cls, config: NaiveBayesConfig, summary: DataSummary, labels: tuple[Any, ...]) -> PassCost:
        num_classes = cls.count_latents(config, labels)
        return pass_cost(config, summary, num_classes) + PassCost(0.0, 0, tensor_bytes({"weights": (num_classes,)}))

    def e_step(self, block: Block, compute: Compute = EXACT) -> NaiveBayesStatistics:
        """The statistics of a block's rows, weighed by p(class | x, evidence).

        Where every row's class is known no density is needed: the rows are counted, and their log-likelihood follows from
        the counts.
        """
        kernel, log_weights_K = self.columns.kernel(compute), self.weights.log()
        class_N = known_latents(block)
        if class_N is None:
            log_likelihood = block.weighted_sum(log_prob_of_rows(block, kernel, log_weights_K, kernel.add))
            return NaiveBayesStatistics(log_likelihood, kernel.statistics(), _num_unknown(block))
        for rows in loaded(block.x, block.missing, kernel):
            if block.weights is None:
                kernel.count(class_N[rows])
            else:
                kernel.add(
                    _shares(class_N[rows], block.weights[rows], self.num_classes).to(compute.torch_device, compute.dtype)
                )
        statistics = kernel.statistics()
        counts_K = statistics.counts
        log_likelihood = float(torch.where(counts_K > 0, counts_K * log_weights_K, 0.0).sum())
        return NaiveBayesStatistics(log_likelihood + self.columns.log_prob_of_counted(statistics), statistics, 0)

    def log_prob_of(self, block: Block, compute: Compute = EXACT) -> Tensor:
        """(N,) log p(x, evidence) of a block's rows; UserError where x cannot be of this model."""
        for group in self.columns.groups:
            check_values(group, block.x.values() if block.is_sparse else group.of(block.x, self.num_features))
        return log_prob_of_rows(block, self.columns.kernel(compute), self.weights.log())

    def log_likelihood_of(self, block: Block, compute: Compute = EXACT) -> LogLikelihood:
        return LogLikelihood(block.weighted_sum(self.log_prob_of(block, compute)))

    def m_step(self, statistics: NaiveBayesStatistics) -> Update[NaiveBayes]:
        """The mode of the posterior of all parameters. A class without rows is told when it lost them."""
        counts_K = statistics.columns.counts
        step = self.columns.m_step(statistics.columns)
        weights_K = self.weights
        if self.config.class_prior == "empirical":
            weights_K = counts_K + self.config.class_pseudocount
            weights_K = weights_K / weights_K.sum()
        model = replace(self, weights=weights_K, columns=step.distribution)
        emptied = torch.nonzero((counts_K == 0) & (self.weights > 0))[:, 0].tolist()
        empty = [self.labels[k] if k < len(self.labels) else k for k in emptied]
        repairs = [f"class {label} has no rows; its parameters are what the prior or the start says" for label in empty]
        least_gain = self._log_prior(statistics) - model._log_prior(statistics)
        redo = None if step.redo is None else replace(self, columns=step.redo)
        is_final = statistics.num_unknown == 0 and step.is_final
        return Update(model, (*repairs, *step.repairs), least_gain, redo, is_final)

    def _log_prior(self, statistics: NaiveBayesStatistics) -> float:
        of_columns, strength = self.columns.log_prior(statistics.columns), self.config.class_pseudocount
        return of_columns + (strength * float(self.weights.log().sum()) if strength > 0 else 0.0)

    # scikit-learn

    @classmethod
    def from_sklearn(cls, estimator: Any) -> NaiveBayes:
        """From a fitted `GaussianNB`, `MultinomialNB`, `BernoulliNB` or `CategoricalNB`.

        A `BernoulliNB` tells apart what is above its `binarize` and what is not; here x is 0 or 1 already.
        """
        kind = {"GaussianNB": "gaussian", "MultinomialNB": "multinomial", "BernoulliNB": "bernoulli",
                "CategoricalNB": "categorical"}.get(type(estimator).__name__)  # fmt: skip
        if kind is None:
            raise UserError(f"a {type(estimator).__name__} is no GaussianNB, MultinomialNB, BernoulliNB or CategoricalNB")
        if not hasattr(estimator, "classes_"):
            raise UserError(f"the {type(estimator).__name__} has no parameters: fit it")
        labels = tuple(label.item() if hasattr(label, "item") else label for label in estimator.classes_)
        pseudocount = 0.0 if kind == "gaussian" else estimator.alpha
        if not isinstance(pseudocount, float | int):
            raise UserError(f"the {type(estimator).__name__} has an alpha for each column; one number is needed")
        config = NaiveBayesConfig(kind=kind, pseudocount=pseudocount, unseen_categories=False)
        prior = estimator.class_prior_ if kind == "gaussian" else torch.from_numpy(estimator.class_log_prior_).exp()
        tensors = {"weights": as_tensor(prior) / as_tensor(prior).sum()}
        own: dict[str, Any]
        if kind == "gaussian":
            own = {"means": estimator.theta_, "variances": estimator.var_}
        elif kind == "categorical":
            tables = [as_tensor(table) for table in estimator.feature_log_prob_]
            own = {"probs": torch.cat(tables, 1).exp(), "num_slots": torch.tensor([table.shape[1] for table in tables])}
        else:
            own = {"probs": as_tensor(estimator.feature_log_prob_).exp()}
            if kind == "multinomial":
                seen = as_tensor(estimator.feature_count_).sum() / as_tensor(estimator.class_count_).sum()
                own["mean_length"] = seen
        columns = torch.arange(estimator.n_features_in_)
        for name, values in {"columns": columns, **own}.items():
            tensors[f"0.{kind}.{name}"] = as_tensor(values, dtype=None).clone()
        return cls.from_tensors(config, tensors, labels)

    from_estimator = from_sklearn  # what `init` of a fit may be

    def to_sklearn(self) -> Any:
        """A fitted scikit-learn classifier with these parameters, which predicts; its counts are those of a mean row."""
        import numpy as np
        from sklearn import naive_bayes

        if len(self.columns.groups) != 1 or self.columns.groups[0].kind == "poisson":
            raise UserError("scikit-learn has naive Bayes of one kind alone: gaussian, multinomial, bernoulli or categorical")
        (group,) = self.columns.groups
        distribution: Any = group.distribution
        labels = self.labels + tuple(range(len(self.labels), self.num_classes))
        shared = {"classes_": np.array(labels), "n_features_in_": self.num_features}
        weights = self.weights.numpy().copy()
        if group.kind == "gaussian":
            estimator = naive_bayes.GaussianNB()
            shared |= {"class_prior_": weights, "theta_": distribution.gaussian.means.numpy().copy()}
            shared |= {"var_": distribution.gaussian.covariances.numpy().copy(), "epsilon_": 0.0}
        else:
            shared |= {"class_log_prior_": np.log(weights), "class_count_": weights}
            log_probs = distribution.probs.log().numpy()
            if group.kind == "categorical":
                estimator = naive_bayes.CategoricalNB(alpha=self.config.pseudocount)
                sizes = distribution.num_slots
                parts = {"feature_log_prob_": log_probs, "category_count_": weights[:, None] * np.exp(log_probs)}
                ends = sizes.cumsum(0)[:-1].numpy()
                shared |= {name: np.split(values, ends, axis=1) for name, values in parts.items()}
                shared |= {"n_categories_": sizes.numpy()}
            else:
                cls = naive_bayes.MultinomialNB if group.kind == "multinomial" else naive_bayes.BernoulliNB
                estimator = cls(alpha=self.config.pseudocount)
                shared |= {"feature_log_prob_": log_probs}
                shared |= {"feature_count_": weights[:, None] * distribution.means.numpy()}
        for name, value in shared.items():
            setattr(estimator, name, value)
        return estimator


def _num_unknown(block: Block) -> int:
    """How many rows of positive weight have a class that the evidence leaves open."""
    open_N = ~block.has_one_latent
    if block.weights is not None:
        open_N = open_N & (block.weights > 0)
    return int(open_N.sum())


def _shares(class_N: Tensor, weights_N: Tensor, num_classes: int) -> Tensor:
    """(K, N) the weight of each row at its class, 0 elsewhere."""
    return torch.zeros(num_classes, len(class_N), dtype=torch.float64).scatter_(0, class_N[None], weights_N[None])


Model = NaiveBayes
