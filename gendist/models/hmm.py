"""Hidden Markov model: a chain of hidden states, and a distribution of x given each state.

    p(x, states) = initial(s_1) * product of transition(s_t, s_t+1) * product of p(x_t | s_t)

Fitted by expectation-maximization (Baum et al. 1970); PRML section 13.2, Rabiner 1989, "A tutorial on hidden Markov models".
Legend: N steps of all sequences, S sequences, T steps of one, D features, K states.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal, Self, SupportsIndex

import torch
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator
from torch import Tensor

from gendist.cost import PassCost, tensor_bytes
from gendist.figures import NUM_STRIPS, Figure, Matrices, Strips, named
from gendist.models.distributions import column_kinds, gaussian_statistics
from gendist.models.distributions.column_kinds import (
    ColumnsConfig,
    FoundKinds,
    blank_columns,
    check_columns,
    check_values,
)
from gendist.models.distributions.columns import Columns
from gendist.models.distributions.gaussian_emission import GaussianEmission, GaussianEmissionConfig
from gendist.models.ops import criteria, topology
from gendist.models.ops.brief import brief
from gendist.models.ops.chain import Chain, ChainPass, ChainStatistics, sequence_weights
from gendist.models.ops.chain_statistics import HiddenMarkovStatistics, Piece, Relay
from gendist.models.ops.forward_backward import drawn_states, log_forward, most_likely_states
from gendist.models.ops.independent_latent import latent_of, loaded, log_prob_of_rows
from gendist.models.ops.packing import Packing
from gendist.models.ops.segments import pays
from gendist.noise import Noise
from gendist.one_thread import one_thread
from gendist.protocols import EXACT, Block, Compute, DataSummary, Update, UserError, as_tensor, sequences_of

ROWS_AT_ONCE = 131_072  # of sequences that are looked at together
SEQUENCES_AT_ONCE = 8_192  # of a sample
MAX_SAMPLE_LENGTH = 1_000  # of a sample whose length nobody says
NO_STEP = 1e-12  # of all steps: a state with less has none
MAX_DESCRIBED = 40  # texts of a state
START_TILT = 0.5  # by how much states of categories, which begin at random, differ from each other; of a log probability

Emission = GaussianEmission | Columns


class HiddenMarkovModelConfig(BaseModel):
    """The `model:` block of a spec of family `hmm`.

    emission                     the distribution of x given a state: `kind: gaussian`, with the keys of a Gaussian mixture's
                                 and num_components of each state; or another kind, with the keys of naive Bayes
    topology                     which transitions there may be: free (all), left_to_right (to a state itself and the next
                                 ones, from the first state on; states begin as equal parts of time, whatever `fit.init` and
                                 the seed), banded (to neighbours on both sides), or a matrix of 0 and 1
    max_jump                     how many states further left_to_right and banded may lead
    initial_pseudocount          of each state: sequences that are taken to have begun there
    transition_pseudocount       of each allowed transition: how often it is taken to have been seen
    self_transition_pseudocount  the same of each state's transition to itself, on top: states last
    frozen                       parameters that keep the values they start with
    labels                       what a label of `data.label` stands for: the state of a step, or the class of a sequence,
                                 which then has a hidden Markov model of its own
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_states: int = Field(ge=1)
    emission: Annotated[
        Annotated[GaussianEmissionConfig, Tag("[gaussian]")] | Annotated[ColumnsConfig, Tag("[columns]")],
        Discriminator(lambda given: _kind_of(given)),
    ] = GaussianEmissionConfig()
    topology: Literal["free", "left_to_right", "banded"] | tuple[tuple[int, ...], ...] = "free"
    max_jump: int = Field(default=1, ge=1)
    initial_pseudocount: float = Field(default=0.0, ge=0.0, allow_inf_nan=False)
    transition_pseudocount: float = Field(default=0.0, ge=0.0, allow_inf_nan=False)
    self_transition_pseudocount: float = Field(default=0.0, ge=0.0, allow_inf_nan=False)
    frozen: tuple[Literal["initial_probs", "transition_matrix", "emission"], ...] = ()
    labels: Literal["states", "classes"] = "states"

    @model_validator(mode="after")
    def _topology_has_exits(self) -> Self:
        if not isinstance(self.topology, str):
            topology.check(self.topology, self.num_states)
        return self

    @property
    def allowed(self) -> Tensor:
        """(K, K) bool: the transitions that there may be."""
        return topology.allowed(self.topology, self.num_states, self.max_jump)

    @property
    def allowed_first(self) -> Tensor:
        """(K,) bool: the states that a sequence may begin in."""
        return topology.allowed_first(self.topology, self.num_states)


def _kind_of(given: Any) -> str:
    kind = given.get("kind", "gaussian") if isinstance(given, Mapping) else getattr(given, "kind", "gaussian")
    return "[gaussian]" if kind == "gaussian" else "[columns]"


@dataclass(frozen=True, eq=False)
class HiddenMarkovModel:
    """initial_probs (K,) and transition_matrix (K, K), whose rows sum to 1, and the distributions that the states emit.

    length    of a sample whose length nobody says: the mean of the sequences of the fit
    labels    what the first states stand for, where the fit saw labels of steps
    is_blank  whether the parameters say nothing yet: its E-step shares out steps as their evidence says
    relay     of a second pass
    """

    config: HiddenMarkovModelConfig
    initial_probs: Tensor
    transition_matrix: Tensor
    emission: Emission
    labels: tuple[Any, ...] = ()
    length: int = 1
    is_blank: bool = False
    relay: Relay | None = field(default=None, repr=False)

    Config: ClassVar[type[BaseModel]] = HiddenMarkovModelConfig
    takes_sequences: ClassVar[bool] = True
    cuts_sequences: ClassVar[bool] = True
    takes_categories: ClassVar[bool] = True
    not_offered: ClassVar[Mapping[str, str]] = {
        "elbo": "a hidden Markov model has its exact density: use log_prob",
        "log_prob_bound": "a hidden Markov model has its exact density: use log_prob",
        "classify": "states are not classes; encode gives the probability of each state",
        "reconstruct": "a hidden Markov model has no decoder of x; decode gives a state's mean",
    }

    __repr__ = brief

    def __post_init__(self) -> None:
        num_states = self.num_states
        if tuple(self.transition_matrix.shape) != (num_states, num_states) or self.emission.num_latents != num_states:
            raise ValueError(
                f"{num_states} initial probabilities, transitions of shape {tuple(self.transition_matrix.shape)}, emissions "
                f"of {self.emission.num_latents} states; all need the same number of states"
            )
        for name, probs in (("initial_probs", self.initial_probs[None]), ("transition_matrix", self.transition_matrix)):
            if not bool((probs >= 0).all()) or not torch.allclose(probs.sum(1), torch.ones(len(probs)).double(), atol=1e-6):
                raise ValueError(f"{name}: rows must be 0 or more and sum to 1, not {probs.sum(1).tolist()}")
        if len(self.labels) > num_states:
            raise ValueError(f"{len(self.labels)} labels for {num_states} states")

    @classmethod
    def from_parameters(
        cls,
        initial_probs: Any,
        transition_matrix: Any,
        emission: Emission,
        config: HiddenMarkovModelConfig | None = None,
        labels: tuple[Any, ...] = (),
        length: int = 100,
    ) -> HiddenMarkovModel:
        """A model from arrays (K,) and (K, K) and the K distributions. ValueError where shapes do not fit.

        config: how it is estimated from here on, where that is not what the emission says.
        """
        initial, transition = as_tensor(initial_probs), as_tensor(transition_matrix)
        if config is None:
            kinds = ColumnsConfig(kind="mixed") if isinstance(emission, Columns) else emission.config
            config = HiddenMarkovModelConfig(num_states=len(initial), emission=kinds)
        return cls(config, initial, transition, emission, labels, length)

    # Parameters

    @property
    def num_states(self) -> int:
        return len(self.initial_probs)

    num_latents = num_states

    @property
    def num_features(self) -> int:
        return self.emission.num_features

    @property
    def kinds(self) -> tuple[str, ...]:
        """(D,) of what states emit: gaussian, multinomial, bernoulli, categorical or poisson."""
        return self.emission.kinds if isinstance(self.emission, Columns) else ("gaussian",) * self.num_features

    @property
    def num_parameters(self) -> int:
        """Those that are free."""
        num_first = int(self.config.allowed_first.sum()) - 1
        return num_first + int(self.config.allowed.sum()) - self.num_states + self.emission.num_parameters

    @cached_property
    def chain(self) -> Chain:
        return Chain(self.initial_probs, self.transition_matrix)

    def tensors(self) -> dict[str, Tensor]:
        own = {"initial_probs": self.initial_probs, "transition_matrix": self.transition_matrix}
        own["length"] = torch.tensor(self.length)
        return own | {f"emission.{name}": tensor for name, tensor in self.emission.tensors().items()}

    @classmethod
    def from_tensors(cls, config: Any, tensors: Mapping[str, Tensor], labels: tuple[Any, ...]) -> HiddenMarkovModel:
        own = {name: tensor for name, tensor in tensors.items() if not name.startswith("emission.")}
        if set(own) != {"initial_probs", "transition_matrix", "length"}:
            raise ValueError(f"tensors {sorted(own)}; initial_probs, transition_matrix and length are needed")
        of_emission = {name.removeprefix("emission."): tensor for name, tensor in tensors.items() if name not in own}
        emission = _emission_class(config).from_tensors(of_emission, config.emission)
        if emission.num_latents != config.num_states:
            raise ValueError(f"emissions of {emission.num_latents} states; {config.num_states} are configured")
        return cls(config, own["initial_probs"], own["transition_matrix"], emission, labels, int(own["length"]))

    # What is said of sequences: each is an array (T, D), NaN where an entry is missing; one (T, D) array is one sequence,
    # one of (S, T, D) are S.

    @one_thread()  # steps are small
    def log_prob(self, sequences: Any) -> Tensor:
        """(S,) log p(x) of each sequence, in nats."""
        parts = [_sums(self._smoothed(block)[1], block) for block in self._blocks(sequences)]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)

    @one_thread()
    def encode(self, sequences: Any) -> list[Tensor]:
        """(T, K) of each sequence, p(state | the whole sequence)."""
        return [part for block in self._blocks(sequences) for part in _split(self._smoothed(block)[0], block)]

    def _smoothed(self, block: Block) -> tuple[Tensor, Tensor]:
        """(N, K) p(state | sequence) and (N,) log p(x_t | x before it)."""
        smoothed = ChainPass(self.chain, self.emission.kernel(EXACT), block, EXACT).run()
        probs_NK = torch.zeros(block.num_rows, self.num_states, dtype=torch.float64)
        probs_NK[smoothed.rows] = smoothed.probs
        return probs_NK, _by_row(smoothed.log_prob, smoothed.rows, block.num_rows)

    @one_thread()
    def filtered_probs(self, sequences: Any) -> list[Tensor]:
        """(T, K) of each sequence, p(state | the sequence up to this step)."""
        return [part for block, log_alpha_NK in self._filtered(sequences) for part in _split(_shares(log_alpha_NK), block)]

    @one_thread()
    def most_likely_states(self, sequences: Any) -> list[Tensor]:
        """(T,) of each sequence, the states of the most likely path (Viterbi 1967)."""
        paths = []
        for block in self._blocks(sequences):
            packing = _packing(block)
            log_likelihood_NK = self._log_likelihoods(block)[packing.rows]
            states_N, _ = most_likely_states(log_likelihood_NK, packing, self.chain.log_transition, self.chain.log_initial)
            paths += _split(_by_row(states_N, packing.rows, block.num_rows), block)
        return paths

    @one_thread()
    def sample_posterior_states(self, sequences: Any, *, seed: int = 0, offset: int = 0) -> list[Tensor]:
        """(T,) of each sequence, states drawn from p(path | x). offset: the number of the first step among those that belong to
        the seed."""
        paths = []
        for block, log_alpha_NK in self._filtered(sequences):
            packing = _packing(block)
            first_row = int(block.rows[0]) if block.num_rows else 0
            u_N = Noise(seed, "posterior.states").uniform(offset + first_row, block.num_rows)[:, 0]
            states_N = drawn_states(log_alpha_NK[packing.rows], packing, self.chain.log_transition, u_N[packing.rows])
            paths += _split(_by_row(states_N, packing.rows, block.num_rows), block)
        return paths

    @one_thread()
    def forecast_states(self, sequences: Any, horizon: int = 1) -> Tensor:
        """(S, horizon, K) p(state of each of the next steps | the sequence)."""
        if not isinstance(horizon, SupportsIndex) or operator.index(horizon) < 1:
            raise UserError(f"horizon {horizon}; ask for 1 step or more")
        nexts = []
        for block, log_alpha_NK in self._filtered(sequences):
            for last_K in (_shares(part[-1:])[0] if len(part) else None for part in _split(log_alpha_NK, block)):
                nexts.append(self.initial_probs if last_K is None else last_K @ self.transition_matrix)
        probs_SK = torch.stack(nexts) if nexts else torch.zeros(0, self.num_states, dtype=torch.float64)
        forecasts = [probs_SK]
        for _ in range(operator.index(horizon) - 1):
            forecasts.append(forecasts[-1] @ self.transition_matrix)
        return torch.stack(forecasts, 1)

    @one_thread()
    def forecast(self, sequences: Any, horizon: int = 1) -> Tensor:
        """(S, horizon, D) the mean of x at each of the next steps, given the sequence; of categories the most likely one."""
        probs_SHK = self.forecast_states(sequences, horizon)
        return self._mean(probs_SHK.flatten(0, 1)).unflatten(0, tuple(probs_SHK.shape[:2]))

    def decode(self, z: Any) -> Tensor:
        """(N, D) the mean of x given states (N,), integers, or given their probabilities (N, K)."""
        z = as_tensor(z, dtype=None)
        if z.ndim == 1 and not z.is_floating_point():
            if len(z) and not 0 <= int(z.min()) <= int(z.max()) < self.num_states:
                raise UserError(f"states {int(z.min())} to {int(z.max())}; allowed are 0 to {self.num_states - 1}")
            return self.emission.means[z]
        if z.ndim != 2 or z.shape[1] != self.num_states:
            raise UserError(
                f"decode takes states of shape (N,) or probabilities of shape (N, {self.num_states}), not {tuple(z.shape)}"
            )
        return self._mean(z.to(torch.float64))

    def _mean(self, probs_NK: Tensor) -> Tensor:
        return self.emission.impute(probs_NK) if isinstance(self.emission, Columns) else probs_NK @ self.emission.means

    @one_thread()
    def impute(self, sequences: Any, *, seed: int | None = None, offset: int = 0) -> list[Tensor]:
        """(T, D) each sequence with its missing entries (NaN) filled in: by their mean given all of the sequence (of a
        category the most likely one), or, where a seed is given, by a draw: a path of states, then the entries.
        offset: the number of the first step among those that belong to the seed."""
        filled = []
        for block in self._blocks(sequences):
            parts = _split(block.x, block)
            if block.missing is None:
                filled += parts
                continue
            if seed is None:
                probs_NK = self._smoothed(block)[0]
            else:
                as_given = [x.masked_fill(gaps, torch.nan) for x, gaps in zip(parts, _split(block.missing, block), strict=True)]
                states = self.sample_posterior_states(as_given, seed=seed, offset=offset + int(block.rows[0]))
                probs_NK = torch.nn.functional.one_hot(torch.cat(states), self.num_states).double()
            start = offset + int(block.rows[0])
            if not isinstance(self.emission, Columns):
                noise = None if seed is None else (seed, "impute.x", start)
                filled_ND = self.emission.impute(block.x, block.missing, probs_NK, noise)
            elif seed is None:
                filled_ND = self.emission.impute(probs_NK)
            else:
                filled_ND = self.emission.sample(probs_NK.argmax(1), seed, "impute.x", start)
            filled += _split(torch.where(block.missing, filled_ND, block.x), block)
        return filled

    def criteria(self, log_likelihood: float, total_weight: float) -> dict[str, float]:
        """What may be read off a fit's total log-likelihood: aic and bic."""
        return {
            "aic": criteria.aic(self.num_parameters, log_likelihood),
            "bic": criteria.bic(self.num_parameters, log_likelihood, total_weight),
        }

    def described(self, categories: Mapping[str, tuple[str, ...]]) -> list[str]:
        """A line for each state of one column of texts: which of them it emits more often than any other state does, the most
        frequent first. categories: of each column the texts that there are."""
        if not isinstance(self.emission, Columns) or self.num_features != 1 or len(categories) != 1:
            return []
        ((_, texts),) = categories.items()
        probs_KC = self.emission.tensors()["0.categorical.probs"][:, : len(texts)]
        lines = []
        for k, probs_C in enumerate(probs_KC):
            own = torch.nonzero(probs_KC.argmax(0) == k)[:, 0]
            shown = [texts[i] for i in own[probs_C[own].argsort(descending=True, stable=True)].tolist()][:MAX_DESCRIBED]
            lines.append(f"state {k}: {' '.join('␣' if text == ' ' else text for text in shown)}")
        return lines

    def _filtered(self, sequences: Any) -> Iterator[tuple[Block, Tensor]]:
        """Blocks, and (N, K) log p(x up to a step, state)."""
        for block in self._blocks(sequences):
            packing = _packing(block)
            log_likelihood_NK = self._log_likelihoods(block)[packing.rows]
            log_first_SK = self.chain.log_initial.expand(packing.num_sequences, -1)
            log_alpha_NK = log_forward(log_likelihood_NK, packing, self.chain.log_transition, log_first_SK)
            yield block, _by_row(log_alpha_NK, packing.rows, block.num_rows)

    def _log_likelihoods(self, block: Block) -> Tensor:
        """(N, K) log p(x | state)."""
        log_likelihood_NK = torch.empty(block.num_rows, self.num_states, dtype=torch.float64)
        kernel, zeros_K = self.emission.kernel(EXACT), torch.zeros(self.num_states, dtype=torch.float64)
        for rows in loaded(block.x, block.missing, kernel):
            log_likelihood_NK[rows] = kernel.log_prob(zeros_K).T
        return log_likelihood_NK

    def check_rows(self, sequences: Any) -> None:
        """UserError where one of them cannot be of this model."""
        for _ in self._blocks(sequences):
            pass

    def _blocks(self, sequences: Any) -> Iterator[Block]:
        """The sequences, some at a time; UserError where one cannot be of this model."""
        arrays = [self._checked(x, index) for index, x in enumerate(sequences_of(sequences))]
        first, first_row = 0, 0
        while first < len(arrays):
            stop, num_rows = first + 1, len(arrays[first])
            while stop < len(arrays) and num_rows + len(arrays[stop]) <= ROWS_AT_ONCE:
                num_rows += len(arrays[stop])
                stop += 1
            x_ND = torch.cat(arrays[first:stop])
            missing_ND = x_ND.isnan()
            any_missing = bool(missing_ND.any())
            bounds = torch.tensor([0, *(len(x) for x in arrays[first:stop])]).cumsum(0)
            x_ND = x_ND.masked_fill(missing_ND, 0.0) if any_missing else x_ND
            if isinstance(self.emission, Columns):
                for group in self.emission.groups:
                    check_values(group, group.of(x_ND, self.num_features))
            rows = torch.arange(first_row, first_row + num_rows)
            if num_rows:
                yield Block(x_ND, rows, missing=missing_ND if any_missing else None, sequence_bounds=bounds)
            else:
                yield Block(x_ND, torch.zeros(1, dtype=torch.int64)[:0], sequence_bounds=bounds)
            first, first_row = stop, first_row + num_rows

    def _checked(self, x: Any, index: int) -> Tensor:
        x_TD = as_tensor(x)
        if x_TD.ndim == 1 and (self.num_features == 1 or len(x_TD) == 0):
            x_TD = x_TD.reshape(-1, self.num_features)
        if x_TD.ndim != 2 or x_TD.shape[1] != self.num_features:
            raise UserError(f"sequence {index} has shape {tuple(x_TD.shape)}; (T, {self.num_features}) is needed")
        if bool(x_TD.isinf().any()):
            raise UserError(
                f"sequence {index} has infinite entries; finite ones are needed, and NaN for those that are missing"
            )
        return x_TD

    # Sampling

    @one_thread()
    def sample(
        self, num_samples: int, *, seed: int = 0, offset: int = 0, length: int | None = None, given: Any = None
    ) -> Tensor:
        """(num_samples, length, D) sequences offset.. of the endless sample that belongs to the seed; a longer one begins with
        the shorter one.

        given  one of `labels`, or a state's index: begin in this state
        """
        states_NT = self.sample_states(num_samples, seed=seed, offset=offset, length=length, given=given)
        x_NTD = torch.empty(*states_NT.shape, self.num_features, dtype=torch.float64)
        for first in range(0, num_samples, SEQUENCES_AT_ONCE):
            rows = slice(first, first + SEQUENCES_AT_ONCE)
            for t, state_N in enumerate(states_NT[rows].unbind(1)):
                x_NTD[rows, t] = self.emission.sample(state_N, seed, f"sample.x.{t}", offset + first)
        return x_NTD

    @one_thread()
    def sample_states(
        self, num_samples: int, *, seed: int = 0, offset: int = 0, length: int | None = None, given: Any = None
    ) -> Tensor:
        """(num_samples, length) the hidden states of `sample`."""
        length = self.length if length is None else length
        if length < 1:
            raise UserError(f"length {length}; ask for 1 step or more")
        first_state = None if given is None else latent_of(given, self.labels, self.num_states, "states")
        states_NT = torch.empty(num_samples, length, dtype=torch.int64)
        cumulative_KK, cumulative_1K = self.transition_matrix.cumsum(1), self.initial_probs.cumsum(0)[None]
        for first in range(0, num_samples, SEQUENCES_AT_ONCE):
            rows = states_NT[first : first + SEQUENCES_AT_ONCE]
            for t in range(length):
                u_N1 = Noise(seed, f"sample.state.{t}").uniform(offset + first, len(rows))
                if t == 0:
                    rows[:, 0] = _drawn(cumulative_1K, u_N1) if first_state is None else first_state
                else:
                    rows[:, t] = _drawn(cumulative_KK[rows[:, t - 1]], u_N1)
        return states_NT

    @one_thread()
    def figures(self, seed: int) -> dict[str, Figure]:
        """Samples with their hidden states; the transitions; and what the states emit."""
        names = named(self.labels, self.num_states, "state")
        x_STD, states_ST = self.sample(NUM_STRIPS, seed=seed), self.sample_states(NUM_STRIPS, seed=seed)
        figures: dict[str, Figure] = {
            "states": Strips(x_STD, states_ST, names),
            "transitions": Matrices(self.transition_matrix[None], names, names),
        }
        if isinstance(self.emission, Columns):
            figures["emissions"] = self.emission.profiles(names)
        else:
            figures["emissions"] = self.emission.figure(self._share_of_states, seed, names)
        return figures

    @property
    def _share_of_states(self) -> Tensor:
        """(K,) of the steps of a sequence, each as long as they are by default."""
        shares_TK = [self.initial_probs]
        for _ in range(self.length - 1):
            shares_TK.append(shares_TK[-1] @ self.transition_matrix)
        return torch.stack(shares_TK).mean(0)

    # Expectation-maximization

    @classmethod
    def count_latents(cls, config: HiddenMarkovModelConfig, labels: tuple[Any, ...]) -> int:
        """One state a label at least; the states beyond the labels are free."""
        if len(labels) > config.num_states:
            raise UserError(
                f"data.label has {len(labels)} different labels, but model.num_states is {config.num_states}; each needs one"
            )
        return config.num_states

    @classmethod
    def default_start(cls, config: HiddenMarkovModelConfig, labels: tuple[Any, ...]) -> str:
        """From the labelled steps where each state has a label; else by k-means, but for categories, which have no distance,
        and from left to right, where states begin as equal parts of time."""
        if labels and len(labels) == config.num_states:
            return "labels"
        needs_no_centers = config.emission.kind == "categorical" or config.topology == "left_to_right"
        return "random_responsibilities" if needs_no_centers else "kmeans||"

    @classmethod
    def check(cls, config: HiddenMarkovModelConfig, summary: DataSummary, labels: tuple[Any, ...]) -> None:
        if isinstance(config.emission, ColumnsConfig):
            check_columns(config.emission, summary)
        elif texts := [feature.name for feature in summary.features if feature.type == "category"]:
            raise UserError(f"column '{texts[0]}' holds text; declare model.emission.kind: categorical, or leave it out")
        num_components = getattr(config.emission, "num_components", 1)
        if summary.num_weighted_rows < config.num_states * num_components:
            said = f"model.num_states is {config.num_states}"
            if num_components > 1:
                said += f", with model.emission.num_components {num_components} of each"
            raise UserError(
                f"{said}, but there are only {summary.num_weighted_rows} steps of positive weight to fit; ask for fewer"
            )
        without = torch.nonzero(summary.feature_weight == 0)[:, 0].tolist()
        if without:
            raise UserError(f"every value of '{summary.features[without[0]].name}' is missing; choose other columns")

    @classmethod
    def find_kinds(cls, config: HiddenMarkovModelConfig, summary: DataSummary) -> FoundKinds | None:
        """What the data decide of emissions of kind mixed."""
        return FoundKinds.of(config.emission, summary) if isinstance(config.emission, ColumnsConfig) else None

    @classmethod
    def settled(cls, config: HiddenMarkovModelConfig, summary: DataSummary) -> HiddenMarkovModelConfig:
        """The same for some of these rows as for all."""
        if not isinstance(config.emission, ColumnsConfig):
            return config
        return config.model_copy(update={"emission": config.emission.settled(summary)})

    @classmethod
    def start(
        cls, config: HiddenMarkovModelConfig, summary: DataSummary, centers_KD: Tensor, labels: tuple[Any, ...]
    ) -> HiddenMarkovModel:
        """All that is allowed is equally likely, and states are alike but for the centers."""
        if config.frozen:
            raise UserError(
                f"frozen {', '.join(config.frozen)} need values to keep: give the model to start from with fit.init"
            )
        emission = _blank_emission(config, summary, centers_KD)
        first_K, allowed_KK = config.allowed_first.double(), config.allowed.double()
        transition_KK = allowed_KK / allowed_KK.sum(1, keepdim=True)
        return cls(config, first_K / first_K.sum(), transition_KK, emission, labels, is_blank=True)

    @classmethod
    def adopt(
        cls, config: HiddenMarkovModelConfig, summary: DataSummary, model: HiddenMarkovModel, labels: tuple[Any, ...]
    ) -> HiddenMarkovModel:
        """The parameters of a model, estimated from here on as the configuration says."""
        if model.num_states != config.num_states:
            raise UserError(
                f"the model to start from has {model.num_states} states, the spec model.num_states {config.num_states}"
            )
        if bool((model.transition_matrix[~config.allowed] > 0).any()):
            raise UserError("the model to start from has transitions that model.topology does not allow")
        if bool((model.initial_probs[~config.allowed_first] > 0).any()):
            raise UserError("the model to start from begins in states that model.topology does not allow to begin in")
        emission = _adopted_emission(config, summary, model.emission)
        return replace(model, config=config, emission=emission, labels=labels or model.labels)

    @classmethod
    def pass_cost(cls, config: HiddenMarkovModelConfig, summary: DataSummary, labels: tuple[Any, ...]) -> PassCost:
        """Forward, backward and pairs of states; where sequences are cut into segments, their transfers, too."""
        num_states, emission = config.num_states, config.emission
        if isinstance(emission, ColumnsConfig):
            of_emission = column_kinds.pass_cost(emission, summary, num_states)
        else:
            num_gaussians = num_states * emission.num_components
            of_emission = gaussian_statistics.pass_cost(emission.covariance_type, num_gaussians, len(summary.features))
            if emission.num_components > 1:  # whose densities are told once more when the moments are taken
                of_emission += PassCost(0.5 * of_emission.flops_per_row, 0, tensor_bytes({"weights": (num_gaussians,)}))
        pairs = tensor_bytes({"initial": (num_states,), "transitions": (num_states, num_states)})
        num_sequences = max(1, summary.num_sequences)
        lengths = torch.full((num_sequences,), summary.num_rows // num_sequences)
        of_transfers = 2.0 * num_states**3 if pays(lengths, num_states) else 0.0
        return of_emission + PassCost(6.0 * num_states**2 + of_transfers, pairs, pairs)

    def e_step(self, block: Block, compute: Compute = EXACT) -> HiddenMarkovStatistics:
        """Posteriors of the states and of pairs of them (PRML 13.33, 13.43), and what they weigh.

        Evidence multiplies p(x | state). A piece of a sequence that other blocks have the rest of yields its transfer alone,
        from which `m_step` makes what a second pass must know.
        """
        if self.is_blank:
            return self._first_look(block, compute)
        is_piece = any(block.open_ends)
        if is_piece and self.relay is None:
            return self._piece(block, compute)
        if self.relay is not None and self.relay.found is not None and not is_piece:
            return self._nothing(compute)  # found already
        kernel = self.emission.kernel(compute)
        chain_pass = ChainPass(self.chain, kernel, block, compute)
        smoothed = chain_pass.run(self.relay.messages.get(int(block.rows[0])) if is_piece and self.relay else None)
        log_prob_N = _by_row(smoothed.log_prob, smoothed.rows, block.num_rows)
        statistics = HiddenMarkovStatistics(
            block.weighted_sum(log_prob_N),
            chain_pass.statistics(),
            kernel.statistics(),
            (),
            _num_beginning(block),
            block.num_rows,
            _num_unknown(block),
        )
        if is_piece and self.relay and self.relay.found and int(block.rows[0]) == min(self.relay.messages):
            return self.relay.found.merge(statistics)
        return statistics

    def _piece(self, block: Block, compute: Compute) -> HiddenMarkovStatistics:
        nothing = self._nothing(compute)
        weight = float(sequence_weights(block)[0])
        if weight == 0.0:
            return nothing
        log_transfers_SKK = ChainPass(self.chain, self.emission.kernel(compute), block, compute).transfers()
        return replace(nothing, pieces=(Piece(int(block.rows[0]), log_transfers_SKK, not block.open_ends[0], weight),))

    def _nothing(self, compute: Compute) -> HiddenMarkovStatistics:
        return HiddenMarkovStatistics(0.0, ChainStatistics.zeros(self.num_states), self.emission.kernel(compute).statistics())

    def _first_look(self, block: Block, compute: Compute) -> HiddenMarkovStatistics:
        """Each step by itself, shared out as its evidence says; of a chain from left to right, in equal parts of time."""
        kernel, weights_K = self.emission.kernel(compute), torch.full((self.num_states,), 1.0 / self.num_states).double()
        if self.config.topology == "left_to_right":
            block = replace(block, evidence=_equal_parts(block, self.num_states))
        log_prob_of_rows(block, kernel, weights_K.log(), kernel.add)
        zeros = ChainStatistics.zeros(self.num_states)
        return HiddenMarkovStatistics(0.0, zeros, kernel.statistics(), (), _num_beginning(block), block.num_rows)

    def log_prob_of(self, block: Block, compute: Compute = EXACT) -> Tensor:
        """(N,) log p(x_t, evidence | x before it) of a block's steps, of some together at the last of them: their sum over a
        sequence is its log p. 0 for sequences of weight 0."""
        smoothed = ChainPass(self.chain, self.emission.kernel(compute), block, compute).run()
        return _by_row(smoothed.log_prob, smoothed.rows, block.num_rows)

    def log_likelihood_of(self, block: Block, compute: Compute = EXACT) -> HiddenMarkovStatistics:
        if any(block.open_ends):
            return self._piece(block, compute)
        return replace(self._nothing(compute), log_likelihood_of_whole=block.weighted_sum(self.log_prob_of(block, compute)))

    def m_step(self, statistics: HiddenMarkovStatistics) -> Update[HiddenMarkovModel]:
        """The mode of the posterior of all parameters (PRML 13.18, 13.19). A state that nothing led to keeps its parameters."""
        if statistics.pieces:
            return Update(self, redo=replace(self, relay=Relay.of(statistics)))
        config, chain = self.config, statistics.chain
        step = self.emission.m_step(statistics.emission)
        emission = self.emission if "emission" in config.frozen else step.distribution
        length = max(1, round(statistics.num_steps / max(1, statistics.num_sequences)))
        model = replace(self, emission=emission, is_blank=False, relay=None, length=min(length, MAX_SAMPLE_LENGTH))
        if self.is_blank:
            return Update(replace(model, emission=_tilted(model.emission)), step.repairs)
        initial_K, transition_KK = self.initial_probs, self.transition_matrix
        if "initial_probs" not in config.frozen:
            initial_K = _normalised((chain.initial + config.initial_pseudocount * config.allowed_first)[None], initial_K[None])[
                0
            ]
        if "transition_matrix" not in config.frozen:
            transition_KK = _normalised(chain.transitions + self._transition_pseudocounts, transition_KK)
        model = replace(model, initial_probs=initial_K, transition_matrix=transition_KK)
        repairs = list(step.repairs)
        repairs += self._not_estimated(chain)
        least_gain = self._log_prior(statistics) - model._log_prior(statistics)
        redo = None
        if step.redo is not None and "emission" not in config.frozen:
            relay = None if self.relay is None else replace(self.relay, found=None)
            redo = replace(self, emission=step.redo, relay=relay)
        is_final = statistics.num_unknown == 0 and step.is_final
        return Update(model, tuple(repairs), least_gain, redo, is_final)

    def _not_estimated(self, chain: ChainStatistics) -> list[str]:
        """A line for each state of which the data say nothing, or not where it leads."""
        entered_K, left_K = chain.initial + chain.transitions.sum(0), chain.transitions.sum(1)
        least = NO_STEP * float(entered_K.sum())
        has_choice_K = self.config.allowed.sum(1) > 1
        lines = []
        for k in range(self.num_states):
            if entered_K[k] <= least:
                if float(self.initial_probs[k] + self.transition_matrix[:, k].sum()) == 0.0:
                    continue  # told when it lost its last step
                lines.append(f"no step is in state {k}; its parameters are what the prior or the start says")
            elif left_K[k] <= least and has_choice_K[k] and "transition_matrix" not in self.config.frozen:
                lines.append(f"state {k} is in last steps alone; its transitions are what the prior or the start says")
        return lines

    @property
    def _transition_pseudocounts(self) -> Tensor:
        """(K, K)"""
        config = self.config
        sticky_KK = config.self_transition_pseudocount * torch.eye(self.num_states, dtype=torch.float64)
        return (config.transition_pseudocount + sticky_KK) * config.allowed

    def _log_prior(self, statistics: HiddenMarkovStatistics) -> float:
        """What the M-step adds to the expected log-likelihood that it maximises, up to a constant."""
        prior = self.emission.log_prior(statistics.emission)
        if "initial_probs" not in self.config.frozen:
            first_K = self.config.initial_pseudocount * self.config.allowed_first.double()
            prior += float(torch.special.xlogy(first_K, self.initial_probs).sum())
        if "transition_matrix" not in self.config.frozen:
            prior += float(torch.special.xlogy(self._transition_pseudocounts, self.transition_matrix).sum())
        return prior

    # hmmlearn

    @classmethod
    def from_hmmlearn(cls, estimator: Any) -> HiddenMarkovModel:
        """From an hmmlearn `GaussianHMM`, `GMMHMM`, `CategoricalHMM`, `MultinomialHMM` or `PoissonHMM` that has parameters; its
        priors of initial and transition probabilities, where symmetric, become pseudocounts."""
        from gendist.models.ops import hmmlearn_parameters

        config, initial, transition, emission = hmmlearn_parameters.read(estimator)
        return cls(HiddenMarkovModelConfig(**config), initial, transition, emission, length=100)

    from_estimator = from_hmmlearn  # what `init` of a fit may be

    def to_hmmlearn(self) -> Any:
        """An hmmlearn estimator with these parameters."""
        from gendist.models.ops import hmmlearn_parameters

        return hmmlearn_parameters.write(self.initial_probs, self.transition_matrix, self.emission)


def _emission_class(config: HiddenMarkovModelConfig) -> type[GaussianEmission] | type[Columns]:
    return Columns if isinstance(config.emission, ColumnsConfig) else GaussianEmission


def _blank_emission(config: HiddenMarkovModelConfig, summary: DataSummary, centers_KD: Tensor) -> Emission:
    if isinstance(config.emission, ColumnsConfig):
        return blank_columns(config.emission, summary, centers_KD)
    return GaussianEmission.blank(config.emission, summary, centers_KD)


def _adopted_emission(config: HiddenMarkovModelConfig, summary: DataSummary, emission: Emission) -> Emission:
    """UserError where the model's is another kind than the spec's."""
    if isinstance(config.emission, ColumnsConfig):
        if not isinstance(emission, Columns):
            raise UserError(f"the model to start from has Gaussian emissions, the spec emission.kind {config.emission.kind}")
        return emission.adopted(blank_columns(config.emission, summary, emission.means), config.emission)
    if isinstance(emission, Columns):
        raise UserError("the model to start from has no Gaussian emissions, the spec has emission.kind gaussian")
    for name in ("covariance_type", "num_components"):
        given, wanted = getattr(emission.config, name), getattr(config.emission, name)
        if given != wanted:
            raise UserError(f"the model to start from has {name} {given}, the spec model.emission.{name} {wanted}")
    return emission.adopted(config.emission, summary)


def _tilted(emission: Emission) -> Emission:
    """Categories, whose states begin almost alike, with the differences between states made as large as they must be for EM
    to find its way; what is random in them stays what the seed says."""
    return emission.tilted(START_TILT) if isinstance(emission, Columns) else emission


def _normalised(weights_NK: Tensor, otherwise_NK: Tensor) -> Tensor:
    """Rows divided by their sums; rows without weight as they were."""
    total_N1 = weights_NK.sum(1, keepdim=True)
    return torch.where(total_N1 > 0, weights_NK / torch.where(total_N1 > 0, total_N1, 1.0), otherwise_NK)


def _equal_parts(block: Block, num_states: int) -> Tensor:
    """(N, K) evidence: the states of a sequence, one after the other, each as long; also where the block has a piece of it."""
    assert block.sequence_bounds is not None
    first_S, here_S, (before, after) = block.sequence_bounds[:-1].clone(), block.sequence_bounds.diff(), block.open_ends
    lengths_S = here_S.clone()
    if len(lengths_S):
        first_S[0] -= before
        lengths_S[0] += before
        lengths_S[-1] += after
    step_N = torch.arange(block.num_rows) - first_S.repeat_interleave(here_S)
    state_N = (step_N * num_states).div(lengths_S.repeat_interleave(here_S), rounding_mode="floor")
    evidence_NK = torch.full((block.num_rows, num_states), -torch.inf, dtype=torch.float64)
    return evidence_NK.scatter_(1, state_N[:, None], 0.0)


def _num_beginning(block: Block) -> int:
    """How many sequences that have a step begin in the block."""
    assert block.sequence_bounds is not None
    return int((block.sequence_bounds.diff() > 0).sum()) - bool(block.open_ends[0])


def _num_unknown(block: Block) -> int:
    """How many steps of positive weight have a state that the evidence leaves open."""
    open_N = ~block.has_one_latent
    return int((open_N if block.weights is None else open_N & (block.weights > 0)).sum())


def _shares(log_weights_NK: Tensor) -> Tensor:
    """(N, K) shares that sum to 1, or are all 0 where nothing is possible."""
    return torch.where((log_weights_NK > -torch.inf).any(1, keepdim=True), log_weights_NK.softmax(1), 0.0)


def _packing(block: Block) -> Packing:
    assert block.sequence_bounds is not None
    return Packing.of(block.sequence_bounds[:-1], block.sequence_bounds.diff())


def _by_row(values_n: Tensor, rows_n: Tensor, num_rows: int) -> Tensor:
    """(N, ...) values of packed steps in the order of the rows; 0 where there are none."""
    values_N = values_n.new_zeros(num_rows, *values_n.shape[1:])
    values_N[rows_n] = values_n
    return values_N


def _split(values_N: Tensor, block: Block) -> list[Tensor]:
    assert block.sequence_bounds is not None
    return list(values_N.split(block.sequence_bounds.diff().tolist()))


def _sums(values_N: Tensor, block: Block) -> Tensor:
    """(S,) of each sequence."""
    assert block.sequence_bounds is not None
    lengths = block.sequence_bounds.diff()
    sequence_N = torch.arange(len(lengths)).repeat_interleave(lengths)
    return torch.zeros(len(lengths), dtype=torch.float64).index_add_(0, sequence_N, values_N)


def _drawn(cumulative_NK: Tensor, u_N1: Tensor) -> Tensor:
    return (cumulative_NK[:, :-1] <= u_N1 * cumulative_NK[:, -1:]).sum(1)


Model = HiddenMarkovModel
