"""The contracts at the borders: what a block of data is, and what a family of models promises.

Legend: N rows, D features, L latents (components, states or classes), S sequences, B samples of a micro-batch.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, Literal, Protocol, Self, TypeVar, runtime_checkable

import numpy as np
import torch
from pydantic import BaseModel
from torch import Tensor

from gendist.errors import NotImportable as NotImportable
from gendist.errors import UserError as UserError

M = TypeVar("M", covariant=True)


def as_tensor(values: Any, dtype: torch.dtype | None = torch.float64) -> Tensor:
    """A tensor of what a caller handed over: a tensor, an array of any layout, or lists.

    UserError where it does not hold real numbers, or is a data frame, whose columns nobody here could tell apart.
    """
    if hasattr(values, "columns"):
        raise UserError(
            "a data frame: the model that gendist.fit or gendist.load returns knows the names of its columns; to this one pass "
            "frame[[...]].to_numpy(), the columns in the order in which they were fitted"
        )
    if not isinstance(values, Tensor):
        try:
            array = np.asarray(values)
        except ValueError as error:
            raise UserError(f"an array of numbers is needed, not a {type(values).__name__} ({error})") from error
        if hasattr(values, "tocoo"):
            raise UserError("a dense array is needed, not a sparse one: pass x.toarray(), or take a family of sparse rows")
        if array.dtype.kind not in "buif":
            hint = "; give a data frame, whose texts are known by their columns' names" if array.dtype.kind in "OUST" else ""
            raise UserError(f"an array of numbers is needed, not a {type(values).__name__} of {array.dtype}{hint}")
        native = np.dtype(np.float64) if array.dtype.itemsize > 8 else array.dtype.newbyteorder("=")
        # Memory of its own where torch could not read it as it lies, or warns that it may not be written.
        plain = array.flags.writeable and array.flags.c_contiguous and array.dtype == native
        values = torch.from_numpy(array if plain else np.array(array, dtype=native, order="C"))
    if values.layout is not torch.strided:
        raise UserError("a dense array is needed, not a sparse one: pass x.to_dense(), or take a family of sparse rows")
    if values.is_complex():
        raise UserError(f"an array of real numbers is needed, not of {values.dtype}")
    return values.detach() if dtype is None else values.detach().to(dtype)


def sequences_of(values: Any) -> Sequence[Any]:
    """The sequences that a caller handed over: a list of arrays (T, D), an array (S, T, D), or (T, D), which is one."""
    if isinstance(values, list | tuple) and not (values and isinstance(values[0], int | float)):
        return values
    x = as_tensor(values)
    return list(x) if x.ndim == 3 else [x]


def as_matrix(values: Any) -> Tensor:
    """(N, D) float64 in torch's CSR layout of a sparse matrix, of SciPy or torch; of everything else what `as_tensor` makes
    of it."""
    if isinstance(values, Tensor) and values.layout is not torch.strided:
        entries = values.detach().to_sparse_coo().coalesce()
        (rows, columns), data = entries.indices().numpy(), entries.values().numpy()
    elif hasattr(values, "tocoo"):
        coo = values.tocoo()
        rows, columns, data = coo.row, coo.col, coo.data
    else:
        return as_tensor(values)
    if len(values.shape) != 2 or data.dtype.kind not in "buif":
        raise UserError(f"a sparse matrix of real numbers is needed, not a {type(values).__name__} of {data.dtype}")
    return csr_tensor(rows, columns, data, (values.shape[0], values.shape[1]))


def csr_tensor(
    rows_n: np.ndarray[Any, Any], columns_n: np.ndarray[Any, Any], values_n: np.ndarray[Any, Any], shape: tuple[int, int]
) -> Tensor:
    """(N, D) float64 in torch's CSR layout of entries in any order; those of one place are added.

    The same matrix is the same bytes: indices are int64, a row's columns ascend, and no value is 0.
    """
    rows, columns = rows_n.astype(np.int64, copy=False), columns_n.astype(np.int64, copy=False)
    values = values_n.astype(np.float64, copy=False)
    if bool((np.diff(rows) < 0).any()):
        order = np.argsort(rows, kind="stable")
        rows, columns, values = rows[order], columns[order], values[order]
    crow = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=shape[0]))])
    if bool(((np.diff(rows) == 0) & (np.diff(columns) <= 0)).any()) or not bool(values.all()):
        from scipy.sparse import csr_array

        matrix = csr_array((values, columns, crow), shape=shape, copy=True)
        matrix.sum_duplicates()
        matrix.eliminate_zeros()
        crow, columns = matrix.indptr.astype(np.int64), matrix.indices.astype(np.int64)
        values = matrix.data
    return csr_from_arrays(crow, columns, values, shape)


def csr_from_arrays(
    crow: np.ndarray[Any, Any], columns: np.ndarray[Any, Any], values: np.ndarray[Any, Any], shape: tuple[int, int]
) -> Tensor:
    """(N, D) in torch's CSR layout: row i has values[crow[i] : crow[i + 1]] in these columns, which ascend."""
    with warnings.catch_warnings():
        # Shared memory is read-only, and nothing writes into a matrix; that the layout is young, its makers say once.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable|Sparse CSR tensor support is in beta")
        crow_indices, col_indices, entries = (torch.from_numpy(array) for array in (crow, columns, values))
        return torch.sparse_csr_tensor(crow_indices, col_indices, entries, size=shape, check_invariants=False)


class Mergeable(Protocol):
    """A value that can be combined with another of its kind, as the reduction over blocks does."""

    def merge(self, other: Any) -> Any: ...


def is_labelled(evidence_NL: Any) -> Any:
    """(N,) bool: whether evidence, an array or a tensor, says anything of the row's latent. A single one is always known."""
    return (evidence_NL != 0).any(1) | (evidence_NL.shape[1] == 1)


@dataclass(frozen=True, eq=False)
class LabelCounts:
    """What some rows say of their classes.

    num_rows        that have any weight
    num_unlabelled  of these, of which nothing is known
    weights         (C,) of the rows that have each label; a soft one counts by its shares
    """

    num_rows: int
    num_unlabelled: int
    weights: Tensor

    @classmethod
    def of(cls, evidence_NC: Tensor, weights_N: Tensor) -> LabelCounts:
        labelled_N = is_labelled(evidence_NC) & (weights_N > 0)
        num_rows = int((weights_N > 0).sum())
        shares_NC = torch.softmax(evidence_NC.double(), 1)
        weights_C = (shares_NC * torch.where(labelled_N, weights_N, 0.0)[:, None]).sum(0)
        return cls(num_rows, num_rows - int(labelled_N.sum()), weights_C)

    def merge(self, other: LabelCounts) -> LabelCounts:
        return LabelCounts(
            self.num_rows + other.num_rows, self.num_unlabelled + other.num_unlabelled, self.weights + other.weights
        )


@dataclass(frozen=True, eq=False)
class Block:
    """A fixed run of rows: the unit that every kernel sees. A micro-batch of training is one, too.

    x                (N, D) float64, of a micro-batch float32; entries that are missing hold 0. In torch's CSR layout where the
                     data are sparse: then nothing is missing, and only a family with `takes_sparse` is given it
    rows             (N,) int64: the row numbers in the whole data set; ascending but in a micro-batch
    weights          (N,) float64 >= 0, or None: every row weighs 1
    evidence         (N, L) float64, or None: what is known of each row's latent; 0 unknown, -inf excluded,
                     log p for a soft label
    missing          (N, D) bool, True where the entry of a row that weighs anything is missing, or None: nothing is missing
    sequence_bounds  (S + 1,) int64 offsets into the rows, from 0 to N, or None: the rows are independent. Else a row is a step
                     in time of one of S sequences; one may be empty
    open_ends        how many rows of the first sequence lie in earlier blocks, and how many of the last in later ones
    """

    x: Tensor
    rows: Tensor
    weights: Tensor | None = None
    evidence: Tensor | None = None
    missing: Tensor | None = None
    sequence_bounds: Tensor | None = None
    open_ends: tuple[int, int] = (0, 0)

    @property
    def num_rows(self) -> int:
        return len(self.rows)

    @property
    def num_features(self) -> int:
        return self.x.shape[1]

    @property
    def is_sparse(self) -> bool:
        return self.x.layout is torch.sparse_csr

    @property
    def is_labelled(self) -> Tensor:
        """(N,) bool: whether anything is known of the row's latent."""
        labelled_N: Tensor = (
            torch.zeros(self.num_rows, dtype=torch.bool) if self.evidence is None else is_labelled(self.evidence)
        )
        return labelled_N

    @property
    def has_one_latent(self) -> Tensor:
        """(N,) bool: whether the evidence leaves the row a single latent."""
        if self.evidence is None:
            return torch.zeros(self.num_rows, dtype=torch.bool)
        return (self.evidence > -torch.inf).sum(1) == 1

    def weights_or_ones(self) -> Tensor:
        """(N,) the weights, ones where none were given."""
        return torch.ones(self.num_rows, dtype=self.x.dtype) if self.weights is None else self.weights

    def weighted_sum(self, values_N: Tensor) -> float:
        """Sum of weight times value; a row of weight 0 adds nothing, whatever its value."""
        if self.weights is not None:
            values_N = torch.where(self.weights > 0, values_N * self.weights, 0.0)
        return float(values_N.sum())

    def __reduce__(self) -> tuple[Any, ...]:
        # As NumPy arrays, whose buffers pickle 5 hands over without a copy: a task maps its block straight from Ray's
        # shared memory.
        tensors = (self.rows, self.weights, self.evidence, self.missing, self.sequence_bounds)
        arrays = tuple(None if values is None else values.numpy() for values in tensors)
        if not self.is_sparse:
            return _block_from_arrays, ((self.x.numpy(),), None, self.open_ends, *arrays)
        x = self.x
        return _block_from_arrays, (
            (x.crow_indices().numpy(), x.col_indices().numpy(), x.values().numpy()),
            tuple(x.shape),
            self.open_ends,
            *arrays,
        )


def _block_from_arrays(
    of_x: tuple[np.ndarray[Any, Any], ...],
    sparse_shape: tuple[int, int] | None,
    open_ends: tuple[int, int],
    *arrays: np.ndarray[Any, Any] | None,
) -> Block:
    with warnings.catch_warnings():
        # Shared memory is read-only, and nothing writes into a block.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        x = torch.from_numpy(of_x[0]) if sparse_shape is None else csr_from_arrays(of_x[0], of_x[1], of_x[2], sparse_shape)
        rows, *rest = (None if values is None else torch.from_numpy(values) for values in arrays)
    assert rows is not None
    weights, evidence, missing, sequence_bounds = rest
    return Block(x, rows, weights, evidence, missing, sequence_bounds, open_ends)


@dataclass(frozen=True)
class Compute:
    """How and where a kernel computes. Parameters and statistics are float64 on the CPU whatever this says.

    precision   of the products over the rows; sums of blocks are float64 in any case
    device      as torch names it: "cpu", "cuda"
    """

    precision: Literal["float64", "float32"] = "float64"
    device: str = "cpu"

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64 if self.precision == "float64" else torch.float32

    @property
    def torch_device(self) -> torch.device:
        return torch.device(self.device)


EXACT = Compute()


@dataclass(frozen=True)
class Feature:
    """One column of x.

    name            what messages and tables call it
    column          of the source, that it comes from: several features come from a column of lists
    type            what that column holds. Of a "category" (a column of text), x is the index of the value among those that
                    the data have, 0 to num_categories - 1, and num_categories for any other value
    num_categories  of a category, else 0
    """

    name: str
    column: str
    type: Literal["real", "integer", "boolean", "category"] = "real"
    num_categories: int = 0


class DataSummary(Protocol):
    """What a family may know of the whole data set before it starts (`gendist.data.survey.Summary`).

    features          (D,) of the columns of x
    minimum, maximum  (D,) of the entries that are there, of rows of positive weight; inf and -inf of a column without entries
    all_integers      (D,) bool
    feature_weight    (D,) the weight of the rows that have the entry
    """

    @property
    def features(self) -> Sequence[Feature]: ...
    @property
    def minimum(self) -> Tensor: ...
    @property
    def maximum(self) -> Tensor: ...
    @property
    def all_integers(self) -> Tensor: ...
    @property
    def feature_weight(self) -> Tensor: ...
    @property
    def num_rows(self) -> int: ...
    @property
    def num_weighted_rows(self) -> int: ...
    @property
    def total_weight(self) -> float: ...
    @property
    def mean(self) -> Tensor: ...
    @property
    def variance(self) -> Tensor: ...
    @property
    def num_sequences(self) -> int: ...
    @property
    def num_missing(self) -> Tensor: ...


@dataclass(frozen=True)
class SampleAddress:
    """Which samples are meant: the arguments of `sample`, which say all of them."""

    num_samples: int
    seed: int = 0
    offset: int = 0
    given: Any = None


VERBS = ("sample", "log_prob", "elbo", "log_prob_bound", "encode", "decode", "classify", "impute", "reconstruct")


@runtime_checkable
class GenerativeModel(Protocol):
    """A fitted model of any family. Tensors in, tensors out; NumPy arrays are accepted.

    A verb of `VERBS` is a method of the model or stands in `not_offered` with the reason.

    A family may have more, which is asked for where it is there:
        figures(seed)               by name, what people should look at beside samples: a `Figure` each, a function of the seed
        check_rows(x)               UserError where x cannot be of this model, whatever verb takes it: a server asks before it
                                    queues a request, so that its last row is refused as its first is. Sequences are a list
        sample_together(addresses)  what `sample` makes of each `SampleAddress`, a list; for families to which several of them
                                    at once are less work than one by one
    """

    Config: ClassVar[type[BaseModel]]
    not_offered: ClassVar[Mapping[str, str]]

    @property
    def config(self) -> BaseModel: ...

    @property
    def num_features(self) -> int: ...

    @property
    def labels(self) -> tuple[Any, ...]:
        """The labels that the first latents stand for; empty where the fit saw none."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """Everything the model is made of, beside `config` and `labels`."""
        ...

    @classmethod
    def from_tensors(cls, config: Any, tensors: Mapping[str, Tensor], labels: tuple[Any, ...]) -> Self:
        """The inverse of `tensors`; ValueError where their names, shapes or values do not fit."""
        ...

    def sample(self, num_samples: int, *, seed: int = 0, offset: int = 0, given: Any = None) -> Any:
        """Rows offset..offset + num_samples of the one endless sample that belongs to the seed."""
        ...


@dataclass(frozen=True)
class Update(Generic[M]):
    """What an M-step returns.

    model       the new parameters
    repairs     one line for every parameter that could not be estimated and what was done instead
    least_gain  what the total log-likelihood must gain at least by this step, up to rounding. 0 for an exact M-step;
                another number where the step maximises the likelihood plus a penalty, as regularization does
    redo        None, or the model that the step began with, prepared for another pass, whose step is to count instead: since
                these statistics had too few digits for what came out, or were of parts that must first know of each other
    is_final    whether no further iteration can change anything: every row's latent was known, and all was counted
    """

    model: M
    repairs: tuple[str, ...] = ()
    least_gain: float = 0.0
    redo: M | None = None
    is_final: bool = False


class Statistics(Mergeable, Protocol):
    """Expected sufficient statistics of some rows: of fixed size, in float64, about a stated reference point."""

    @property
    def log_likelihood(self) -> float:
        """The weighted sum of log p over the rows."""
        ...


@dataclass(frozen=True)
class LogLikelihood:
    """The statistics of rows of which nothing else is kept."""

    log_likelihood: float

    def merge(self, other: LogLikelihood) -> LogLikelihood:
        return LogLikelihood(self.log_likelihood + other.log_likelihood)


@runtime_checkable
class StatisticsModel(GenerativeModel, Protocol):
    """A family fitted by expected sufficient statistics: all that the EM engine knows of it.

    A family may have more, which is asked for where it is there:
        find_kinds(config, summary)          a class method: what the data decide that the configuration leaves to them, as
                                             `FoundKinds` of columns; None where nothing
        pass_cost(config, summary, labels)   a class method, which `plan` needs: the `PassCost` of a model of this configuration
                                             for such data, told before any is made, however large it would be
    """

    @property
    def num_latents(self) -> int: ...

    @classmethod
    def count_latents(cls, config: Any, labels: tuple[Any, ...]) -> int:
        """The width of the evidence; UserError where the configuration has no room for the labels."""
        ...

    @classmethod
    def check(cls, config: Any, summary: DataSummary, labels: tuple[Any, ...]) -> None:
        """UserError where this data cannot be fitted by this configuration."""
        ...

    @classmethod
    def default_start(cls, config: Any, labels: tuple[Any, ...]) -> str:
        """Where `fit.init: auto` begins: one of `gendist.em.config.STARTS`."""
        ...

    @classmethod
    def start(cls, config: Any, summary: DataSummary, centers_LD: Tensor, labels: tuple[Any, ...]) -> Self:
        """Parameters alike for every latent but for the centers, for the first M-step to set out from."""
        ...

    @classmethod
    def adopt(cls, config: Any, summary: DataSummary, model: Self, labels: tuple[Any, ...]) -> Self:
        """A model that was fitted elsewhere, to go on from under this configuration; UserError where it cannot."""
        ...

    def e_step(self, block: Block, compute: Compute = EXACT) -> Statistics: ...

    def log_prob_of(self, block: Block, compute: Compute = EXACT) -> Tensor:
        """(N,) log p of a block's rows, given what is known of their latents: what the E-step sums. Of sequences,
        which lie in the block as wholes, those of the steps add up to that of the sequence; 0 where the weight is 0."""
        ...

    def log_likelihood_of(self, block: Block, compute: Compute = EXACT) -> Statistics:
        """What the E-step returns, as far as the log-likelihood needs it."""
        ...

    def m_step(self, statistics: Any) -> Update[Self]: ...

    def criteria(self, log_likelihood: float, total_weight: float) -> dict[str, float]:
        """Numbers to compare models by, from the total log-likelihood of a fit; for the manifest."""
        ...


@dataclass(frozen=True)
class Phase:
    """One optimizer step within a training step: one network is trained, all others are frozen.

    name     what metrics call it; with two phases of one network, such as a lazy penalty, the names differ
    network  the key of `DeepModel.networks` whose parameters it trains
    """

    name: str
    network: str


@dataclass(frozen=True)
class Draw:
    """Random numbers that a loss needs for each sample: `width` of them, standard normal or uniform in (0, 1)."""

    kind: Literal["normal", "uniform"]
    width: int


@dataclass(frozen=True)
class Loss:
    """What a phase makes of a micro-batch.

    terms    sums over its samples, differentiable; what is minimised is the sum over the terms of
             (sum over the global batch) / (count over the global batch), with the counts of `DeepModel.counts`
    watched  sums over its samples, by the weights of the rows that they stand beside, which are only recorded: as means over
             the global batch, by its total weight
    """

    terms: Mapping[str, Tensor]
    watched: Mapping[str, Tensor] = field(default_factory=dict)


@runtime_checkable
class DeepModel(GenerativeModel, Protocol):
    """A family fitted by gradient: all that the training loop and the engines know of it.

    Networks are called as themselves; nobody but an engine calls backward or an optimizer. A loss reads no global random
    state, no rank and no clock.

    A family may have more, which is asked for where it is there:
        check_labels(counts)                  UserError where it cannot be trained on rows with these labels (`LabelCounts`)
        conditions                            what `sample` may be given, where these are not all of `labels`
        advice(record)                        lines about a record of training in which something goes wrong: what to try
        remarks(results)                      lines about what a fit came to, which its user should not overlook
    """

    validation_objective: ClassVar[str | None]
    """The value of `validate` whose lowest mean tells the best checkpoint; None where there is no such number."""

    @classmethod
    def create(cls, config: Any, x_shape: tuple[int, ...], labels: tuple[Any, ...], seed: int) -> Self:
        """New networks for samples of this shape (an image's, or (D,)), whose weights are a function of the seed; UserError
        where the configuration does not fit."""
        ...

    def networks(self) -> Mapping[str, torch.nn.Module]:
        """Everything that is trained, one optimizer a network; no parameter belongs to two."""
        ...

    def phases(self, step: int) -> Sequence[Phase]:
        """The optimizer steps of a training step, in order: a function of its number alone."""
        ...

    def draws(self, phase: Phase) -> Mapping[str, Draw]:
        """The noise that the phase's loss is given, by name: one row a sample, (B, width)."""
        ...

    def counts(self, phase: Phase, batch: Block) -> Mapping[str, float]:
        """Of each term of the phase's loss, over how many samples of this micro-batch it is a sum. It depends on the batch's
        weights and evidence, not on networks, so that the counts of the whole global batch are known before any backward."""
        ...

    def loss(self, phase: Phase, batch: Block, noise: Mapping[str, Tensor], step: int) -> Loss: ...

    def validation_draws(self) -> Mapping[str, Draw]: ...

    def validate(self, batch: Block, noise: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Sums over the samples of what is to be known of held-out ones; empty where there is no such number."""
        ...

    def needs_whole_batch(self, phase: Phase) -> str | None:
        """The reason why this phase's loss is not a sum over samples, so that a global batch may not be divided; or None."""
        ...
