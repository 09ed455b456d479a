"""A model for each class: p(x, class) = weight of the class times p(x | model of the class), for any `StatisticsModel`.

Of Gaussian mixtures it is mixture discriminant analysis (Hastie & Tibshirani 1996). Rows whose class is not known take part
by expectation-maximization over the classes, around that of each model.
Legend: N rows, D features, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, ClassVar

import torch
from pydantic import BaseModel
from torch import Tensor

from gendist.blocks import Blocks, Run
from gendist.cost import PassCost, tensor_bytes
from gendist.data.survey import Summary, survey
from gendist.em.start import start_from_data
from gendist.figures import Figure
from gendist.models.ops import criteria
from gendist.models.ops.brief import brief
from gendist.models.ops.independent_latent import draw_latents, latent_of
from gendist.models.ops.responsibilities import responsibilities_
from gendist.noise import Noise, derived_seed
from gendist.protocols import EXACT, Block, Compute, LogLikelihood, Update, UserError


@dataclass(frozen=True)
class ClassStatistics:
    """counts (C,) the weight of each class, and the statistics of each class's model."""

    log_likelihood: float
    counts: Tensor
    classes: tuple[Any, ...]

    def merge(self, other: ClassStatistics) -> ClassStatistics:
        classes = tuple(a.merge(b) for a, b in zip(self.classes, other.classes, strict=True))
        return ClassStatistics(self.log_likelihood + other.log_likelihood, self.counts + other.counts, classes)


@dataclass(frozen=True, eq=False)
class ClassConditional:
    """weights (C,), which sum to 1, and a model for each of `labels`. Made of a family by `class_conditional`."""

    config: Any
    weights: Tensor
    models: tuple[Any, ...]
    labels: tuple[Any, ...] = ()

    family: ClassVar[type[Any]]
    takes_sequences: ClassVar[bool]
    Config: ClassVar[type[BaseModel]]
    not_offered: ClassVar[Mapping[str, str]]

    __repr__ = brief

    def __post_init__(self) -> None:
        if not len(self.models) == len(self.labels) == len(self.weights):
            each = f"{len(self.models)} models, {len(self.weights)} weights, {len(self.labels)} labels"
            raise ValueError(f"{each}; one a class is needed")
        if not bool((self.weights >= 0).all()) or not math.isclose(float(self.weights.sum()), 1.0, rel_tol=1e-6):
            raise ValueError(f"weights must be 0 or more and sum to 1, not {float(self.weights.sum()):g}")

    @property
    def num_latents(self) -> int:
        return len(self.models)

    @property
    def num_features(self) -> int:
        return self.models[0].num_features

    @property
    def num_parameters(self) -> int:
        return len(self.models) - 1 + sum(model.num_parameters for model in self.models)

    def tensors(self) -> dict[str, Tensor]:
        """`weights`, and `0.means` of the first class's model."""
        each = {f"{c}.{name}": tensor for c, model in enumerate(self.models) for name, tensor in model.tensors().items()}
        return {"weights": self.weights} | each

    @classmethod
    def from_tensors(cls, config: Any, tensors: Mapping[str, Tensor], labels: tuple[Any, ...]) -> ClassConditional:
        own: list[dict[str, Tensor]] = [{} for _ in labels]
        for key, tensor in tensors.items():
            index, dot, name = key.partition(".")
            if dot and index.isdigit() and int(index) < len(labels):
                own[int(index)][name] = tensor
            elif key != "weights":
                raise ValueError(f"tensor {key}; weights are needed, and those of {len(labels)} classes")
        models = tuple(cls.family.from_tensors(config, each, ()) for each in own)
        return cls(config, tensors["weights"], models, labels)

    def check_rows(self, x: Any) -> None:
        """UserError where x cannot be of the model of some class."""
        for model in self.models:
            if hasattr(model, "check_rows"):
                model.check_rows(x)

    # Density

    def log_prob(self, x_ND: Any) -> Tensor:
        """(N,) log p(x) in nats."""
        return self.joint_log_prob(x_ND).logsumexp(1)

    def joint_log_prob(self, x_ND: Any) -> Tensor:
        """(N, C) log p(x, class)."""
        return torch.stack([model.log_prob(x_ND) for model in self.models], 1) + self.weights.log()

    def classify(self, x_ND: Any) -> Tensor:
        """(N, C) log p(label | x), columns in the order of `labels`."""
        return self.joint_log_prob(x_ND).log_softmax(1)

    def encode(self, x_ND: Any) -> Tensor:
        """(N, C) p(class | x)."""
        return self.joint_log_prob(x_ND).softmax(1)

    def impute(self, x_ND: Any, *, seed: int | None = None, offset: int = 0) -> Any:
        """(N, D) x with its missing entries (NaN) filled in: with their mean given the others, or, where a seed is given, with
        a draw from what they may be. Of sequences a list of (T, D)."""
        imputed = [model.impute(x_ND, seed=seed, offset=offset) for model in self.models]
        posterior_NC = self.encode(x_ND)
        if not isinstance(imputed[0], list):
            return _mixed(torch.stack(imputed), posterior_NC, seed, offset)
        of_sequences, first_step = [], offset
        for posterior_C, *each in zip(posterior_NC, *imputed, strict=True):
            of_sequences.append(_mixed(torch.stack(each)[:, None], posterior_C[None], seed, first_step)[0])
            first_step += len(each[0])
        return of_sequences

    def criteria(self, log_likelihood: float, total_weight: float) -> dict[str, float]:
        """What may be read off a fit's total log-likelihood: aic and bic."""
        return {
            "aic": criteria.aic(self.num_parameters, log_likelihood),
            "bic": criteria.bic(self.num_parameters, log_likelihood, total_weight),
        }

    # Sampling

    def sample(
        self, num_samples: int, *, seed: int = 0, offset: int = 0, given: Any = None, length: int | None = None
    ) -> Tensor:
        """(num_samples, D) rows offset.. of the endless sample that belongs to the seed. given: one of `labels`. Of sequences,
        (num_samples, length, D); `length` is that of the class with the longest where nobody says."""
        return self._sampled("sample", num_samples, seed, offset, given, length)

    def sample_states(
        self, num_samples: int, *, seed: int = 0, offset: int = 0, given: Any = None, length: int | None = None
    ) -> Tensor:
        """(num_samples, length) the hidden states of `sample`, each of its class's model."""
        return self._sampled("sample_states", num_samples, seed, offset, given, length)

    def _sampled(self, verb: str, num_samples: int, seed: int, offset: int, given: Any, length: int | None) -> Tensor:
        options = (
            {"length": max(model.length for model in self.models) if length is None else length} if self.takes_sequences else {}
        )
        if given is not None:
            class_N = torch.full((num_samples,), latent_of(given, self.labels, len(self.models), "classes"))
        else:
            class_N = self.sample_classes(num_samples, seed=seed, offset=offset)
        sampled: Tensor | None = None
        for c in class_N.unique().tolist() or [0]:
            rows = torch.nonzero(class_N == c)[:, 0]
            # A model makes rows that follow one another.
            first, last = (int(rows[0]), int(rows[-1])) if len(rows) else (0, -1)
            draw = getattr(self.models[c], verb)
            own = draw(last - first + 1, seed=_seed_of_class(seed, c), offset=offset + first, **options)
            if sampled is None:
                sampled = own.new_empty(num_samples, *own.shape[1:])
            sampled[rows] = own[rows - first]
        assert sampled is not None
        return sampled

    def sample_classes(self, num_samples: int, *, seed: int = 0, offset: int = 0, given: Any = None) -> Tensor:
        """(num_samples,) the classes, as indices of `labels`, that the rows of `sample` belong to."""
        if given is None:
            return draw_latents(self.weights, seed, "sample.class", offset, num_samples)
        return torch.full((num_samples,), latent_of(given, self.labels, len(self.models), "classes"))

    def figures(self, seed: int) -> dict[str, Figure]:
        """Those of the family, each of all classes together."""
        if not hasattr(self.family, "figures"):
            return {}
        each = [model.figures(_seed_of_class(seed, c)) for c, model in enumerate(self.models)]
        return {
            name: type(figure).of_classes([figures[name] for figures in each], self.labels, self.weights)
            for name, figure in each[0].items()
        }

    # Expectation-maximization

    @classmethod
    def count_latents(cls, config: Any, labels: tuple[Any, ...]) -> int:
        if not labels:
            raise UserError("model.labels: classes needs labels: name their column with data.label")
        return len(labels)

    @classmethod
    def default_start(cls, config: Any, labels: tuple[Any, ...]) -> str:
        return cls.family.default_start(config, ())

    @classmethod
    def check(cls, config: Any, summary: Summary, labels: tuple[Any, ...]) -> None:
        cls.family.check(config, summary, ())

    @classmethod
    def find_kinds(cls, config: Any, summary: Summary) -> Any:
        """What the data decide, where the family leaves them something."""
        return cls.family.find_kinds(config, summary) if hasattr(cls.family, "find_kinds") else None

    @property
    def kinds(self) -> tuple[str, ...]:
        """(D,) those of each class's model."""
        return tuple(self.models[0].kinds)

    @classmethod
    def adopt(cls, config: Any, summary: Summary, model: ClassConditional, labels: tuple[Any, ...]) -> ClassConditional:
        models = tuple(cls.family.adopt(config, summary, each, ()) for each in model.models)
        return cls(config, model.weights, models, labels or model.labels)

    @classmethod
    def start_from_data(
        cls, config: Any, blocks: Blocks[Block], summary: Summary, labels: tuple[Any, ...], method: str, seed: int
    ) -> Update[ClassConditional]:
        """Each class's model as it would start from the rows that are known to be of the class."""
        counts, updates = [], []
        # What all rows decide holds for each class: densities of other kinds could not be compared.
        settled = cls.family.settled(config, summary) if hasattr(cls.family, "settled") else config
        for c, label in enumerate(labels):
            own = _OfClass(blocks, c)
            try:
                own_summary = replace(survey(own), features=summary.features)
                if own_summary.total_weight == 0.0:
                    raise UserError("no row of the class to fit")
                cls.family.check(settled, own_summary, ())
                updates.append(start_from_data(cls.family, settled, own, own_summary, (), method, _seed_of_class(seed, c)))
            except UserError as error:
                raise UserError(f"class {label}: {error}") from None
            counts.append(own_summary.total_weight)
        weights_C = torch.tensor(counts, dtype=torch.float64)
        models = tuple(update.model for update in updates)
        repairs = _told(labels, [update.repairs for update in updates])
        return Update(cls(config, weights_C / weights_C.sum(), models, labels), repairs)

    @classmethod
    def pass_cost(cls, config: Any, summary: Any, labels: tuple[Any, ...]) -> PassCost:
        """Where all rows have a label: each is of the model of its class alone, which tells its density first."""
        own, num_classes = cls.family.pass_cost(config, summary, ()), len(labels)
        counts = tensor_bytes({"counts": (num_classes,)})
        statistics_bytes, parameters_bytes = (
            num_classes * size + counts for size in (own.statistics_bytes, own.parameters_bytes)
        )
        return PassCost(1.5 * own.flops_per_row, statistics_bytes, parameters_bytes)

    def e_step(self, block: Block, compute: Compute = EXACT) -> ClassStatistics:
        """Each model's own E-step, of the rows, or sequences, weighed by p(class | x, evidence)."""
        joint_CN = self._joint(block, compute)
        log_prob_N = _once(responsibilities_(joint_CN), block)
        if block.weights is not None:
            joint_CN.mul_(block.weights).masked_fill_(block.weights == 0, 0.0)
        classes = tuple(
            model.e_step(_weighed(block, shares_N), compute) for model, shares_N in zip(self.models, joint_CN, strict=True)
        )
        counts_C = _once(joint_CN, block).sum(1)
        return ClassStatistics(block.weighted_sum(log_prob_N), counts_C, classes)

    def log_prob_of(self, block: Block, compute: Compute = EXACT) -> Tensor:
        """(N,) log p(x, evidence) of a block's rows; of a sequence it stands at its first step, and 0 at the others."""
        return _once(responsibilities_(self._joint(block, compute)), block)

    def log_likelihood_of(self, block: Block, compute: Compute = EXACT) -> LogLikelihood:
        return LogLikelihood(block.weighted_sum(self.log_prob_of(block, compute)))

    def _joint(self, block: Block, compute: Compute) -> Tensor:
        """(C, N) log p(x, class) and the evidence; of classes that the evidence excludes no density is asked for."""
        _check_labels_of_sequences(block)
        joint_CN = torch.full((len(self.models), block.num_rows), -torch.inf, dtype=torch.float64)
        for c, model in enumerate(self.models):
            evidence_N = torch.zeros(block.num_rows, dtype=torch.float64) if block.evidence is None else block.evidence[:, c]
            rows = torch.nonzero(evidence_N > -torch.inf)[:, 0]
            if len(rows):
                own = _rows_of(replace(block, evidence=None), rows)
                log_prob_N = _of_whole(model.log_prob_of(own, compute), own)
                joint_CN[c, rows] = log_prob_N + self.weights[c].log() + evidence_N[rows]
        return joint_CN

    def m_step(self, statistics: ClassStatistics) -> Update[ClassConditional]:
        """Each model's own M-step; a class without rows keeps its model, which is told when it lost them."""
        updates = [
            model.m_step(own) if count > 0 else Update(model, ("no rows; the model stays",) if weight > 0 else ())
            for model, own, count, weight in zip(
                self.models, statistics.classes, statistics.counts.tolist(), self.weights.tolist(), strict=True
            )
        ]
        weights_C = statistics.counts / statistics.counts.sum()
        redo = None
        if any(update.redo is not None for update in updates):
            models = tuple(update.redo or model for update, model in zip(updates, self.models, strict=True))
            redo = replace(self, models=models)
        model = replace(self, weights=weights_C, models=tuple(update.model for update in updates))
        repairs = _told(self.labels, [update.repairs for update in updates])
        return Update(model, repairs, sum(update.least_gain for update in updates), redo)


@cache
def class_conditional(family: Any) -> type[ClassConditional]:
    """The class of models that have one of this family for each class."""
    not_offered = {verb: reason for verb, reason in family.not_offered.items() if verb != "classify"}
    not_offered["decode"] = "a class has a model, not a mean; decode with `models[c]`"
    members: dict[str, Any] = {"takes_sequences": getattr(family, "takes_sequences", False), "cuts_sequences": False}
    members |= {name: getattr(family, name, False) for name in ("takes_categories", "takes_sparse")}
    members |= {"family": family, "Config": family.Config, "not_offered": not_offered}
    return type(f"ClassConditional{family.__name__}", (ClassConditional,), members)


def _seed_of_class(seed: int, c: int) -> int:
    return derived_seed(seed, f"class.{c}")


def _told(labels: tuple[Any, ...], repairs: list[tuple[str, ...]]) -> tuple[str, ...]:
    return tuple(f"class {label}: {line}" for label, lines in zip(labels, repairs, strict=True) for line in lines)


def _rows_of(block: Block, rows: Tensor) -> Block:
    """The block of some of its rows, ascending; of sequences all steps or none are among them."""
    if len(rows) == block.num_rows:
        return block
    weights, evidence, missing = (v if v is None else v[rows] for v in (block.weights, block.evidence, block.missing))
    bounds = block.sequence_bounds
    if bounds is not None:
        bounds = torch.cat([bounds[:1], torch.searchsorted(rows, bounds[1:])])
    return Block(block.x[rows], block.rows[rows], weights, evidence, missing, bounds)


def _mixed(filled_CN: Tensor, posterior_NC: Tensor, seed: int | None, offset: int) -> Tensor:
    """(N, ...) the mean of what each class fills in, or that of a class that is drawn."""
    if seed is None:
        share_CN = posterior_NC.T.reshape(*filled_CN.shape[:2], *[1] * (filled_CN.ndim - 2))
        same_N = (filled_CN == filled_CN[0]).all(0)  # what was there
        return torch.where(same_N, filled_CN[0], (share_CN * filled_CN).sum(0))
    u_N1 = Noise(seed, "impute.class").uniform(offset, len(posterior_NC))
    class_N = (posterior_NC.cumsum(1)[:, :-1] <= u_N1).sum(1)
    return filled_CN[class_N, torch.arange(len(class_N))]


def _check_labels_of_sequences(block: Block) -> None:
    """UserError where a sequence has steps of different labels."""
    if block.sequence_bounds is None or block.evidence is None:
        return
    lengths = block.sequence_bounds.diff()
    first_N = block.sequence_bounds[:-1].repeat_interleave(lengths)
    differs_N = (block.evidence != block.evidence[first_N]).any(1)
    if bool(differs_N.any()):
        row = int(differs_N.nonzero()[0, 0])
        raise UserError(
            f"row {int(block.rows[row])} has another label than the first step of its sequence, row "
            f"{int(block.rows[first_N[row]])}; with model.labels: classes all steps have the label of their sequence"
        )


def _of_whole(log_prob_N: Tensor, block: Block) -> Tensor:
    """(N,) at each step log p of the whole sequence."""
    if block.sequence_bounds is None:
        return log_prob_N
    lengths = block.sequence_bounds.diff()
    sequence_N = torch.arange(len(lengths)).repeat_interleave(lengths)
    return torch.zeros(len(lengths), dtype=torch.float64).index_add_(0, sequence_N, log_prob_N)[sequence_N]


def _once(values_N: Tensor, block: Block) -> Tensor:
    """(..., N) 0 but at the first step of each sequence."""
    if block.sequence_bounds is None:
        return values_N
    firsts = block.sequence_bounds[:-1][block.sequence_bounds.diff() > 0]
    once_N = torch.zeros_like(values_N)
    once_N[..., firsts] = values_N[..., firsts]
    return once_N


def _weighed(block: Block, shares_N: Tensor) -> Block:
    """The rows that have a share, weighed by it."""
    return _rows_of(replace(block, evidence=None, weights=shares_N), torch.nonzero(shares_N)[:, 0])


@dataclass(frozen=True)
class _OfClass:
    """Blocks of the labelled rows, weighed by how probable their labels say class `c` is."""

    blocks: Blocks[Block]
    c: int

    def map_runs(self, function: Callable[[Any, Run[Any]], Any], broadcast: Any) -> Iterator[Any]:
        return self.blocks.map_runs(partial(_of_class, self.c, function), broadcast)


def _of_class(c: int, function: Callable[[Any, Run[Block]], Any], broadcast: Any, run: Run[Block]) -> Any:
    return function(broadcast, Run([_labelled(c, block) for block in run], run.first))


def _labelled(c: int, block: Block) -> Block:
    _check_labels_of_sequences(block)
    if block.evidence is None:
        shares_N = torch.zeros(block.num_rows, dtype=torch.float64)
    else:
        shares_N = torch.where(block.is_labelled, block.evidence.softmax(1)[:, c], 0.0)
    return _weighed(block, shares_N * block.weights_or_ones())
