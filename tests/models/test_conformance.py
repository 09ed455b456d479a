"""One table for all families: every module of gendist/models, fitted by its config in configs/, keeps these promises."""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

import gendist
from gendist.artifact import Artifact, load_artifact, save
from gendist.blocks import Leaves, LocalBlocks, reduce
from gendist.config import families, family_class, is_trained, load_spec
from gendist.data import Schema
from gendist.em.convergence import fell
from gendist.figures import Figure
from gendist.fitted_model import FittedModel
from gendist.noise import Noise
from gendist.pictures import figure_bytes
from gendist.protocols import VERBS, Block, DeepModel, Draw, GenerativeModel, Phase, SampleAddress, StatisticsModel, UserError

CONFIGS = Path(__file__).parents[2] / "configs"


@dataclass(frozen=True)
class Case:
    """x: the samples, (N, D), or sequences (S, T, D)."""

    family: str
    spec: Any
    model: Any
    x: torch.Tensor

    @property
    def width(self) -> int:
        return self.x.shape[-1]

    def block(self, start: int = 0, stop: int | None = None, **fields: torch.Tensor) -> Block:
        """Of the samples start..stop; fields: of all samples."""
        return self.block_of(torch.arange(len(self.x))[start:stop], **fields)

    def block_of(self, samples: torch.Tensor, **fields: torch.Tensor) -> Block:
        if self.x.ndim == 2:
            return Block(x=self.x[samples], rows=samples, **{name: values[samples] for name, values in fields.items()})
        length, bounds = self.x.shape[1], torch.arange(len(samples) + 1) * self.x.shape[1]
        rows = (samples[:, None] * length + torch.arange(length)).flatten()
        of_steps = {name: values[samples].repeat_interleave(length, 0) for name, values in fields.items()}
        return Block(x=self.x[samples].flatten(0, 1), rows=rows, sequence_bounds=bounds, **of_steps)


TRAINED = [family for family in families() if is_trained(family_class(family))]


@cache
def fitted(family: str) -> Case:
    """A family, fitted for a moment on the digits in this process."""
    overrides = ["cluster.num_workers=0", "data.validation_fraction=0"]
    if family in TRAINED:
        overrides += ["fit.num_steps=2", "fit.global_batch_size=32"]
    else:
        overrides += ["fit.max_iterations=2", "fit.tolerance=0"]
    x = torch.from_numpy(load_digits().images / 16.0)
    if getattr(family_class(family), "takes_sequences", False):
        overrides += ["data.label=null", "model.labels=states", "model.topology=free"]
    else:
        x = x.flatten(1)
    spec = load_spec(CONFIGS / f"{family}_digits.yaml", overrides)
    return Case(family, spec, gendist.fit(spec).model.plain, x)


@pytest.fixture(params=families())
def case(request) -> Case:
    return fitted(request.param)


def leaves_of(case: Case):
    return lambda bounds: [case.block(a, b) for a, b in itertools.pairwise(bounds)]


def flat(value: Any) -> list[torch.Tensor | float]:
    """All numbers inside statistics, in order."""
    if isinstance(value, torch.Tensor | float | int):
        return [value]
    if isinstance(value, tuple):
        return [number for each in value for number in flat(each)]
    if value is None:
        return []
    return [number for name in sorted(vars(value)) for number in flat(getattr(value, name))]


def same_bytes(first: Any, second: Any) -> bool:
    pairs = zip(flat(first), flat(second), strict=True)
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


def together(values: Any) -> torch.Tensor:
    """What a verb returns of sequences is a list."""
    return torch.cat(values) if isinstance(values, list) else values


def test_it_keeps_the_protocol(case):
    assert isinstance(case.model, GenerativeModel)
    assert isinstance(case.model.config, type(case.model).Config)
    assert case.model.config == case.spec.model
    assert case.model.num_features == case.width


def test_every_verb_is_offered_or_declared_not_to_be(case):
    for verb in VERBS:
        offered, reason = hasattr(case.model, verb), case.model.not_offered.get(verb)
        assert offered != (reason is not None), f"{verb}: offered {offered}, reason {reason!r}"
    assert set(case.model.not_offered) <= set(VERBS)


def test_what_it_offers_has_a_docstring(case):
    for name, member in inspect.getmembers(type(case.model), inspect.isroutine):
        if name in VERBS:
            assert member.__doc__, f"{name} has no docstring"


def test_it_is_named_in_one_line(case):
    said = repr(case.model)
    assert said.startswith(f"{type(case.model).__name__}(")
    assert f"num_features={case.width}" in said
    assert len(said) < 120
    assert "tensor" not in said


def test_verbs_take_columns_by_name(case):
    names = tuple(f"p{i}" for i in range(case.width))
    schema = Schema(
        columns=names, feature_names=names, is_sequence=case.x.ndim == 3, sequence="id" if case.x.ndim == 3 else None
    )
    model = FittedModel(Artifact(case.family, case.model, schema))
    x = case.x[:6]
    rows = x.reshape(-1, case.width).numpy()
    table = {"id": torch.arange(6).repeat_interleave(len(rows) // 6), **{name: rows[:, i] for i, name in enumerate(names)}}
    of_rows = {"log_prob", "elbo", "log_prob_bound", "encode", "classify", "impute", "reconstruct"}
    for verb in of_rows - set(case.model.not_offered):
        assert torch.equal(together(getattr(model, verb)(table)), together(getattr(case.model, verb)(x))), verb


def test_a_sample_is_a_window_on_an_endless_one(case):
    whole = case.model.sample(100, seed=3)
    assert len(whole) == 100
    parts = [case.model.sample(40, seed=3), case.model.sample(60, seed=3, offset=40)]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(case.model.sample(100, seed=4), whole)
    assert len(case.model.sample(0)) == 0
    assert bool(whole.isfinite().all())


def test_samples_made_together_are_those_made_one_by_one(case):
    if not hasattr(case.model, "sample_together"):
        return
    addresses = [SampleAddress(*each) for each in ((1, 3), (40, 3, 40), (0, 1), (3, 2**64 - 1, 10**15), (70, 3))]
    alone = [case.model.sample(each.num_samples, seed=each.seed, offset=each.offset) for each in addresses]
    for each, own in zip(case.model.sample_together(addresses), alone, strict=True):
        assert torch.equal(each, own)


def test_global_random_state_is_neither_read_nor_written(case):
    torch.manual_seed(1)
    state, first = torch.random.get_rng_state(), case.model.sample(10, seed=3)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(case.model.sample(10, seed=3), first)


def test_numpy_arrays_and_tensors_of_any_float_give_the_same(case):
    for name in {"log_prob", "elbo", "log_prob_bound", "encode", "reconstruct"} - set(case.model.not_offered):
        verb = getattr(case.model, name)
        expected = verb(case.x[:20])
        assert len(expected) == 20
        assert torch.equal(together(verb(case.x[:20].numpy())), together(expected))
        assert torch.equal(together(verb(case.x[:20].tolist())), together(expected))
        assert torch.allclose(together(verb(case.x[:20].float())), together(expected), rtol=1e-3)


def test_a_density_is_one_number_a_row(case):
    for name in {"log_prob", "elbo", "log_prob_bound"} - set(case.model.not_offered):
        density = getattr(case.model, name)(case.x[:20])
        assert density.shape == (20,)
        assert density.dtype == torch.float64


def test_its_figures_are_functions_of_the_seed_and_can_be_drawn(case):
    """Each family has some, of images and of columns of numbers."""
    figures, again = case.model.figures(1), case.model.figures(1)
    is_sequence = case.x.ndim == 3
    plain = Schema(columns=("x",), feature_names=tuple(f"x_{i}" for i in range(case.width)), is_sequence=is_sequence)
    assert figures
    for name, figure in figures.items():
        assert re.fullmatch("[a-z_]+", name)
        assert isinstance(figure, Figure)
        for value, same in zip(vars(figure).values(), vars(again[name]).values(), strict=True):
            assert torch.equal(value, same) if isinstance(value, torch.Tensor) else value == same
        for schema in (plain, plain.model_copy(update={"image_shape": (8, 8)})):
            assert figure_bytes(figure, schema).startswith(b"\x89PNG")


def test_x_of_another_width_is_refused(case):
    for verb in ("log_prob", "elbo", "log_prob_bound", "encode", "classify", "reconstruct"):
        if verb not in case.model.not_offered:
            with pytest.raises(UserError, match=str(case.width)):
                getattr(case.model, verb)(np.zeros((3, case.width - 1)))


def test_representations_decode_to_x(case):
    if {"encode", "decode"} & set(case.model.not_offered):
        return
    representation = together(case.model.encode(case.x[:7]))
    latent_dim = getattr(case.model.config, "latent_dim", representation.shape[1])
    if representation.shape[1] != latent_dim:  # it is of another kind than what x is made from
        with pytest.raises(UserError, match=f"{latent_dim}"):
            case.model.decode(representation)
        representation = torch.zeros(7, latent_dim)
    assert case.model.decode(representation).shape == (len(representation), case.width)


def test_saved_and_loaded_it_is_the_same_model(case, tmp_path):
    schema = Schema(columns=("image",), feature_names=tuple(f"p{i}" for i in range(case.width)))
    save(Artifact(case.family, case.model, schema), tmp_path / "a")
    loaded = load_artifact(tmp_path / "a")
    assert loaded.schema == schema
    assert type(loaded.model) is type(case.model)
    assert loaded.model.config == case.model.config
    assert torch.equal(loaded.model.sample(30, seed=1), case.model.sample(30, seed=1))
    save(loaded, tmp_path / "b")
    for name in ("model.json", "model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_tensors_that_are_not_the_familys_are_refused(case):
    with pytest.raises(ValueError, match="needed"):
        type(case.model).from_tensors(case.model.config, {"nonsense": torch.zeros(1)}, ())


# Families fitted by sufficient statistics


@pytest.fixture(params=[family for family in families() if family not in TRAINED])
def em_case(request) -> Case:
    assert isinstance(fitted(request.param).model, StatisticsModel)
    return fitted(request.param)


def test_statistics_are_the_same_bytes_for_every_run_of_leaves(em_case):
    leaves, step = Leaves.of_shape(len(em_case.x), 64), type(em_case.model).e_step
    values = [reduce(step, LocalBlocks(leaves_of(em_case), leaves, most), em_case.model) for most in (1, 2, 8, 64)]
    assert all(same_bytes(values[0], value) for value in values[1:])


def assert_equal_to_rounding(model: Any, first: Any, second: Any) -> None:
    """Two statistics are worth the same: they lead to the same parameters."""
    assert first.log_likelihood == pytest.approx(second.log_likelihood, rel=1e-9)
    tensors, others = model.m_step(first).model.tensors(), model.m_step(second).model.tensors()
    for name, a in tensors.items():
        np.testing.assert_allclose(a, others[name], rtol=1e-9, atol=1e-9 * float(a.abs().max()), err_msg=name)


def test_statistics_of_other_leaves_agree_to_rounding(em_case):
    step = type(em_case.model).e_step
    whole = step(em_case.model, em_case.block())
    parts = reduce(step, LocalBlocks(leaves_of(em_case), Leaves((0, 1, 700, 1700, len(em_case.x)))), em_case.model)
    assert_equal_to_rounding(em_case.model, whole, parts)


def test_weight_two_is_the_row_twice_and_weight_zero_no_row(em_case):
    weights = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64).repeat(len(em_case.x))[: len(em_case.x)]
    weighted = em_case.model.e_step(em_case.block(weights=weights))
    index = torch.repeat_interleave(torch.arange(len(em_case.x)), weights.long())
    repeated = em_case.model.e_step(em_case.block_of(index))
    assert_equal_to_rounding(em_case.model, weighted, repeated)


def test_evidence_that_leaves_one_latent_counts_the_row_for_it(em_case):
    num_latents = em_case.model.num_latents
    evidence = torch.full((len(em_case.x), num_latents), -torch.inf, dtype=torch.float64)
    evidence[:, 1] = 0.0
    model = em_case.model.m_step(em_case.model.e_step(em_case.block(evidence=evidence))).model
    decoded = model.decode(torch.tensor([1]))[0]
    np.testing.assert_allclose(decoded, em_case.x.reshape(-1, em_case.width).mean(0), atol=1e-9)


def test_zero_evidence_is_no_evidence(em_case):
    evidence = torch.zeros(len(em_case.x), em_case.model.num_latents, dtype=torch.float64)
    assert same_bytes(em_case.model.e_step(em_case.block(evidence=evidence)), em_case.model.e_step(em_case.block()))


def test_a_block_without_rows_adds_nothing(em_case):
    step = type(em_case.model).e_step
    whole, empty = step(em_case.model, em_case.block()), step(em_case.model, em_case.block(0, 0))
    assert same_bytes(whole.merge(empty), whole)


def test_statistics_of_another_model_cannot_be_merged(em_case):
    other = em_case.model.m_step(em_case.model.e_step(em_case.block())).model
    with pytest.raises(ValueError, match="reference"):
        em_case.model.e_step(em_case.block()).merge(other.e_step(em_case.block()))


def test_an_m_step_raises_the_log_likelihood_as_it_promises(em_case):
    before = em_case.model.e_step(em_case.block())
    update = em_case.model.m_step(before)
    after = update.model.e_step(em_case.block())
    promised = {"log_likelihood": before.log_likelihood, "least_gain": update.least_gain, "repairs": list(update.repairs)}
    assert not fell(after.log_likelihood, promised)


def test_the_log_likelihood_is_that_of_the_e_step(em_case):
    weights = torch.linspace(0.0, 2.0, len(em_case.x), dtype=torch.float64)
    evidence = torch.linspace(-3.0, 0.0, em_case.model.num_latents, dtype=torch.float64).expand(len(em_case.x), -1)
    for fields in ({}, {"weights": weights}, {"weights": weights, "evidence": evidence}):
        block = em_case.block(**fields)
        assert block.weighted_sum(em_case.model.log_prob_of(block)) == em_case.model.e_step(block).log_likelihood


# Families fitted by gradient


@pytest.fixture(params=TRAINED)
def deep_case(request) -> Case:
    assert isinstance(fitted(request.param).model, DeepModel)
    return fitted(request.param)


def fresh(case: Case, seed: int = 0) -> DeepModel:
    return type(case.model).create(case.model.config, (8, 8), (), seed)


def all_phases(model: DeepModel) -> list[Phase]:
    return list(dict.fromkeys(phase for step in range(100) for phase in model.phases(step)))


def noise_of(draws: Mapping[str, Draw], num_rows: int) -> dict[str, torch.Tensor]:
    return {name: getattr(Noise(0, name), draw.kind)(0, num_rows, draw.width).float() for name, draw in draws.items()}


def micro_batch(case: Case, start: int, stop: int) -> Block:
    return Block(x=case.x[start:stop].float(), rows=torch.arange(start, stop))


def gradients(model: DeepModel, network: str, terms: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    parameters = list(model.networks()[network].parameters())
    found = torch.autograd.grad(sum(terms), parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


def test_every_network_is_trained_by_some_phase_and_shares_no_parameter(deep_case):
    networks = deep_case.model.networks()
    assert {phase.network for phase in all_phases(deep_case.model)} == set(networks)
    parameters = [id(parameter) for network in networks.values() for parameter in network.parameters()]
    assert len(set(parameters)) == len(parameters)
    assert deep_case.model.phases(7) == deep_case.model.phases(7)


def test_a_fresh_model_is_a_function_of_the_seed(deep_case):
    torch.manual_seed(1)
    state, first = torch.random.get_rng_state(), fresh(deep_case).tensors()
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(2)
    again, other = fresh(deep_case).tensors(), fresh(deep_case, seed=1).tensors()
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert any(not torch.equal(value, other[name]) for name, value in first.items())
    assert first.keys() == deep_case.model.tensors().keys()


def test_the_loss_and_its_gradient_add_up_over_micro_batches(deep_case):
    """The exactness of training rests on it: a micro-batch knows nothing of the others, nor a sample of its neighbours."""
    model, size = fresh(deep_case), 21
    for phase in all_phases(model):
        assert model.needs_whole_batch(phase) is None
        noise = noise_of(model.draws(phase), size)
        whole = model.loss(phase, micro_batch(deep_case, 0, size), noise, 0)
        assert whole.terms.keys() == model.counts(phase, micro_batch(deep_case, 0, size)).keys()
        parts, counts = [], []
        for start, stop in ((0, 5), (5, 6), (6, size)):
            batch = micro_batch(deep_case, start, stop)
            parts.append(model.loss(phase, batch, {name: values[start:stop] for name, values in noise.items()}, 0))
            counts.append(model.counts(phase, batch))
        for values in ("terms", "watched"):
            for name, value in getattr(whole, values).items():
                torch.testing.assert_close(sum(getattr(part, values)[name] for part in parts), value, rtol=1e-4, atol=1e-4)
        for name, count in model.counts(phase, micro_batch(deep_case, 0, size)).items():
            assert sum(each[name] for each in counts) == count
        expected = gradients(model, phase.network, whole.terms.values())
        found = gradients(model, phase.network, [term for part in parts for term in part.terms.values()])
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()) + 1e-9)


def test_what_is_watched_has_no_gradient_and_a_batch_without_rows_adds_nothing(deep_case):
    model = fresh(deep_case)
    for phase in all_phases(model):
        loss = model.loss(phase, micro_batch(deep_case, 0, 3), noise_of(model.draws(phase), 3), 0)
        assert all(value.requires_grad for value in loss.terms.values())
        assert not any(value.requires_grad for value in loss.watched.values())
        empty = model.loss(phase, micro_batch(deep_case, 0, 0), noise_of(model.draws(phase), 0), 0)
        assert all(float(value.detach()) == 0.0 for value in (*empty.terms.values(), *empty.watched.values()))
        assert set(model.counts(phase, micro_batch(deep_case, 0, 0)).values()) == {0.0}


def test_weights_of_one_change_nothing_and_double_weights_double(deep_case):
    model = fresh(deep_case)
    plain = micro_batch(deep_case, 0, 9)
    for phase in all_phases(model):
        noise = noise_of(model.draws(phase), 9)
        all_losses = [
            model.loss(phase, replace(plain, weights=weights), noise, 0)
            for weights in (None, torch.ones(9), torch.full((9,), 2.0))
        ]
        losses = [loss.terms for loss in all_losses]
        counts = [model.counts(phase, replace(plain, weights=w)) for w in (None, torch.ones(9), torch.full((9,), 2.0))]
        assert counts[0] == counts[1]
        for name, value in losses[0].items():
            torch.testing.assert_close(losses[1][name], value)
            # Terms that do not hang on the rows of the data count every sample once, whatever the weights.
            torch.testing.assert_close(losses[2][name] / counts[2][name], value / counts[0][name])
        for name, value in all_losses[0].watched.items():
            torch.testing.assert_close(all_losses[1].watched[name], value)
            torch.testing.assert_close(all_losses[2].watched[name], 2.0 * value)


def test_what_is_watched_weighs_what_its_row_does(deep_case):
    model, batch = fresh(deep_case), micro_batch(deep_case, 0, 4)
    weights = torch.tensor([0.0, 0.5, 3.0, 1.0], dtype=torch.float64)
    for phase in all_phases(model):
        noise = noise_of(model.draws(phase), 4)
        if model.needs_whole_batch(phase):
            continue
        alone = [
            model.loss(phase, micro_batch(deep_case, i, i + 1), {name: value[i : i + 1] for name, value in noise.items()}, 0)
            for i in range(4)
        ]
        for name, value in model.loss(phase, replace(batch, weights=weights), noise, 0).watched.items():
            expected = sum(float(weight) * each.watched[name] for weight, each in zip(weights, alone, strict=True))
            torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4)


def test_in_half_precision_sums_stay_in_float32(deep_case):
    model, batch = fresh(deep_case), micro_batch(deep_case, 0, 64)
    for phase in all_phases(model):
        noise = noise_of(model.draws(phase), 64)
        expected = model.loss(phase, batch, noise, 0).terms
        with torch.autocast("cpu", torch.bfloat16):
            terms = model.loss(phase, batch, noise, 0).terms
        for name, value in expected.items():
            assert terms[name].dtype == torch.float32
            torch.testing.assert_close(terms[name], value, rtol=0.1, atol=0.1)


def test_validation_sums_over_samples(deep_case):
    model, noise = deep_case.model, noise_of(deep_case.model.validation_draws(), 20)
    whole = model.validate(micro_batch(deep_case, 0, 20), noise)
    assert model.validation_objective is None or model.validation_objective in whole
    parts = [
        model.validate(micro_batch(deep_case, a, b), {name: values[a:b] for name, values in noise.items()})
        for a, b in ((0, 7), (7, 20))
    ]
    for name, value in whole.items():
        torch.testing.assert_close(parts[0][name] + parts[1][name], value, rtol=1e-4, atol=1e-3)


def test_verbs_leave_networks_in_the_mode_that_they_had(deep_case):
    model = fresh(deep_case)
    for training in (True, False):
        for network in model.networks().values():
            network.train(training)
        for name in {"sample", "elbo", "encode", "reconstruct"} - set(model.not_offered):
            result = getattr(model, name)(2 if name == "sample" else deep_case.x[:2])
            assert not result.requires_grad
        assert all(network.training == training for network in model.networks().values())
