"""Naive Bayes as a generative model: p(x, class) = prior of the class times the product over the columns of p(x_d | class).

Where all classes are known it is fitted by counting; where some or all are not, by expectation-maximization (Nigam et al.
2000, "Text classification from labeled and unlabeled documents using EM"; without any label it is latent class analysis).
Legend: N samples, D columns, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from gendist.models.distributions.bernoulli import Bernoulli
from gendist.models.distributions.categorical import Categorical
from gendist.models.distributions.columns import Columns, ColumnsStatistics, Group
from gendist.models.distributions.gaussian import Gaussian
from gendist.models.distributions.multinomial import Multinomial
from gendist.models.distributions.normal import Normal
from gendist.models.distributions.poisson import Poisson
from gendist.models.ops import criteria
from gendist.models.ops.independent_latent import draw_latents, known_latents, latent_of, loaded, log_joint, log_prob_of_rows
from gendist.noise import Noise
from gendist.protocols import EXACT, Block, Compute, DataSummary, Feature, Update, UserError, as_matrix, as_tensor

Kind = Literal["gaussian", "multinomial", "bernoulli", "categorical", "poisson"]

ROWS_AT_ONCE = 8_192  # of a sample, to stay in the processor's cache
MAX_CATEGORIES = 10_000  # of a column of whole numbers


class NaiveBayesConfig(BaseModel):
    """The `model:` block of a spec of family `naive_bayes`.

    kind                       of all columns; or "mixed": each its own, by `columns` or else by what the data hold: text is
                               categorical, 0 and 1 alone (true and false) bernoulli, whole numbers from 0 on poisson, other
                               numbers gaussian
    columns                    of kind mixed: the kinds of columns by name
    num_classes                the classes; as many as there are labels where left out
    class_prior                of the classes: as the data have them, uniform, or given, in the order of the labels
    class_pseudocount          samples that are taken to have been seen of each class
    pseudocount                what is taken to have been seen for each class: tokens of each kind (multinomial), samples of
                               each value (bernoulli, categorical), samples like the mean of all (poisson)
    unseen_categories          whether categories that the data do not have keep a probability, that of one category more
    covariance_regularization  is added to the variances of gaussian columns
    covariance_floor           no variance of theirs is below this
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["gaussian", "multinomial", "bernoulli", "categorical", "poisson", "mixed"]
    columns: dict[str, Kind] = {}
    num_classes: int | None = Field(default=None, ge=1)
    class_prior: Literal["empirical", "uniform"] | tuple[Annotated[float, Field(gt=0.0, allow_inf_nan=False)], ...] = (
        "empirical"
    )
    class_pseudocount: float = Field(default=0.0, ge=0.0, allow_inf_nan=False)
    pseudocount: float = Field(default=1.0, ge=0.0, allow_inf_nan=False)
    unseen_categories: bool = True
    covariance_regularization: float = Field(default=1e-9, ge=0.0, allow_inf_nan=False)
    covariance_floor: float = Field(default=0.0, ge=0.0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.columns and self.kind != "mixed":
            raise ValueError(f"columns: of kind mixed alone; every column is {self.kind} here")
        if isinstance(self.class_prior, tuple):
            if not math.isclose(sum(self.class_prior), 1.0, rel_tol=1e-6):
                raise ValueError(f"class_prior sums to {sum(self.class_prior):g}; it must sum to 1")
            if self.num_classes not in (None, len(self.class_prior)):
                raise ValueError(f"class_prior has {len(self.class_prior)} entries for {self.num_classes} classes")
        return self

    def kinds_of(self, summary: DataSummary) -> list[str]:
        """The kind of each column."""
        ranges = zip(summary.minimum.tolist(), summary.maximum.tolist(), summary.all_integers.tolist(), strict=True)
        return [self._kind_of(feature, *each) for feature, each in zip(summary.features, ranges, strict=True)]

    def _kind_of(self, feature: Feature, least: float, most: float, is_whole: bool) -> str:
        if self.kind != "mixed":
            return self.kind
        declared = self.columns.get(feature.column, self.columns.get(feature.name))
        if declared is not None:
            return declared
        if feature.type == "category":
            return "categorical"
        # By the numbers and not by their type, of which files of other formats know nothing.
        if is_whole and least >= 0:
            return "bernoulli" if most <= 1 else "poisson"
        return "gaussian"


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
            _check_values(group, values if is_sparse else group.of(x_ND, self.num_features))
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
        features = summary.features
        known = {feature.name for feature in features} | {feature.column for feature in features}
        for name in config.columns:
            if name not in known:
                raise UserError(f"model.columns: '{name}' is no column that is fitted; these are {_listing(features)}")
        num_classes = cls.count_latents(config, labels)
        if summary.num_weighted_rows < num_classes:
            raise UserError(f"{num_classes} classes, but only {summary.num_weighted_rows} rows of positive weight to fit")
        for feature, is_empty in zip(features, (summary.feature_weight <= 0).tolist(), strict=True):
            if is_empty:
                raise UserError(f"column '{feature.name}' has no value in any row; leave it out of data.columns")
        _check_kinds(config, summary)

    @classmethod
    def start(cls, config: NaiveBayesConfig, summary: DataSummary, centers_KD: Tensor, labels: tuple[Any, ...]) -> NaiveBayes:
        """Classes that are alike but for the centers: of each column what all rows together suggest."""
        num_classes = len(centers_KD)
        members: dict[tuple[str, str], list[int]] = {}
        for index, (feature, kind) in enumerate(zip(summary.features, config.kinds_of(summary), strict=True)):
            # Of mixed kinds, a column of lists that is multinomial is a bag of tokens of its own; numbers are one together.
            is_bag = kind == "multinomial" and config.kind == "mixed" and feature.name != feature.column
            members.setdefault((kind, feature.column if is_bag else ""), []).append(index)
        groups = [_blank(config, kind, torch.tensor(indices), summary, centers_KD) for (kind, _), indices in members.items()]
        weights_K = torch.full((num_classes,), 1.0 / num_classes, dtype=torch.float64)
        if isinstance(config.class_prior, tuple):
            weights_K = torch.tensor(config.class_prior, dtype=torch.float64)
        return cls(config, weights_K, Columns(tuple(groups)), labels)

    @classmethod
    def adopt(cls, config: NaiveBayesConfig, summary: DataSummary, model: NaiveBayes, labels: tuple[Any, ...]) -> NaiveBayes:
        """The parameters of a model, estimated from here on as the configuration says."""
        labels = labels or model.labels
        num_classes = cls.count_latents(config, labels)
        if model.num_classes != num_classes:
            raise UserError(f"the model to start from has {model.num_classes} classes, the spec and the data {num_classes}")
        blank = cls.start(config, summary, model.columns.means, labels)
        given, own = model.tensors(), blank.tensors()
        same_shapes = {name: tensor.shape for name, tensor in given.items()} == {name: own[name].shape for name in own}
        layout = [name for name in own if name.endswith((".columns", ".num_slots"))]
        if not same_shapes or not all(torch.equal(given[name], own[name]) for name in layout):
            raise UserError("the model to start from has other kinds of columns or categories than the spec and the data")
        priors = {name: tensor for name, tensor in own.items() if name.endswith(".prior_rates")}
        if config.class_prior != "empirical":
            priors["weights"] = blank.weights
        return cls.from_tensors(config, given | priors, labels)

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
            _check_values(group, block.x.values() if block.is_sparse else group.of(block.x, self.num_features))
        return log_prob_of_rows(block, self.columns.kernel(compute), self.weights.log())

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


def _blank(config: NaiveBayesConfig, kind: str, columns: Tensor, summary: DataSummary, centers_KD: Tensor) -> Group:
    """What all rows together suggest of some columns of one kind, the same for each class."""
    num_classes, mean_D = len(centers_KD), summary.mean[columns]
    pseudocount = config.pseudocount
    distribution: Any
    if kind == "gaussian":
        variance_D = summary.variance[columns] + config.covariance_regularization
        variance_D = torch.where(variance_D > 0, variance_D, 1.0)  # a constant column, no regularization
        gaussian = Gaussian(centers_KD[:, columns], variance_D.repeat(num_classes, 1), "diag")
        distribution = Normal(gaussian, config.covariance_regularization, config.covariance_floor)
    elif kind == "bernoulli":
        distribution = Bernoulli(mean_D.clamp(1e-3, 1.0 - 1e-3).repeat(num_classes, 1), pseudocount)
    elif kind == "poisson":
        distribution = Poisson(mean_D.clamp_min(1e-3).repeat(num_classes, 1), mean_D, pseudocount)
    elif kind == "multinomial":
        length = mean_D.sum()
        smooth_D = mean_D + 1e-3 * torch.where(length > 0, length, 1.0) / len(columns)
        distribution = Multinomial((smooth_D / smooth_D.sum()).repeat(num_classes, 1), length, pseudocount)
    else:
        numbers = [summary.features[d].num_categories or int(summary.maximum[d]) + 1 for d in columns.tolist()]
        num_slots = torch.tensor(numbers) + int(config.unseen_categories)
        probs_F = torch.repeat_interleave(1.0 / num_slots.to(torch.float64), num_slots)
        distribution = Categorical(probs_F.repeat(num_classes, 1), num_slots, pseudocount, config.unseen_categories)
    return Group(kind, columns, distribution)


# What columns of a kind may hold


def _check_kinds(config: NaiveBayesConfig, summary: DataSummary) -> None:
    """UserError where a column holds what its kind does not allow."""
    kinds = config.kinds_of(summary)
    if kinds.count("multinomial") == 1:
        name = summary.features[kinds.index("multinomial")].name
        raise UserError(f"column '{name}' is the only one of kind multinomial, of which it says nothing; declare it poisson")
    ranges = (summary.minimum.tolist(), summary.maximum.tolist(), summary.all_integers.tolist())
    for feature, kind, least, most, is_whole in zip(summary.features, kinds, *ranges, strict=True):
        name = feature.name
        if feature.type == "category" and kind != "categorical":
            raise UserError(f"column '{name}' holds text, which is not {kind}; declare it categorical, or leave it out")
        if kind != "gaussian" and least < 0:
            raise UserError(f"column '{name}' holds {least:g}, but {kind} columns hold 0 and more; declare it gaussian")
        if kind in ("categorical", "poisson", "bernoulli") and not is_whole:
            raise UserError(f"column '{name}' does not hold whole numbers alone, as {kind} columns do; declare it gaussian")
        if kind == "bernoulli" and most > 1:
            raise UserError(f"column '{name}' holds {most:g}, but bernoulli columns hold 0 and 1; declare it categorical")
        if kind == "categorical" and feature.type == "category":
            if most >= feature.num_categories and not config.unseen_categories:
                raise UserError(
                    f"column '{name}' holds texts that are no category of the model to start from; allow them with "
                    "model.unseen_categories"
                )
        elif kind == "categorical" and most >= MAX_CATEGORIES:
            raise UserError(
                f"column '{name}' holds {most:g}, but categorical columns number their categories, 0 to "
                f"{MAX_CATEGORIES - 1:,} at most; declare it poisson, or make it a column of text"
            )


def _check_values(group: Group, values: Tensor) -> None:
    """UserError where values cannot be of the group's kind."""
    if group.kind == "gaussian" or values.numel() == 0:
        return
    if bool((values < 0).any()):
        raise UserError(f"x has the entry {float(values.min()):g}; {group.kind} columns hold 0 and more")
    if group.kind in ("categorical", "poisson", "bernoulli") and not bool((values == values.round()).all()):
        raise UserError(f"x has entries that are no whole numbers, in {group.kind} columns")
    if group.kind == "bernoulli" and bool((values > 1).any()):
        raise UserError(f"x has the entry {float(values.max()):g}; bernoulli columns hold 0 and 1")
    if isinstance(group.distribution, Categorical) and not group.distribution.has_unseen:
        beyond = values > group.distribution.num_slots - 1
        if bool(beyond.any()):
            raise UserError(f"x has the category {float(values[beyond][0]):g}, which the fit did not see; allow it with "
                            "model.unseen_categories")  # fmt: skip


def _listing(features: Sequence[Feature], most: int = 12) -> str:
    names = [feature.name for feature in features]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


Model = NaiveBayes
