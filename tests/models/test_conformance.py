"""One table for all families: every module of gendist/models, fitted by its config in configs/, keeps these promises."""

from __future__ import annotations

import inspect
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

import gendist
from gendist.artifact import Artifact, load_artifact, save
from gendist.blocks import Leaves, LocalBlocks, reduce
from gendist.config import families, load_spec
from gendist.data import Schema
from gendist.em.convergence import fell
from gendist.protocols import VERBS, Block, GenerativeModel, StatisticsModel, UserError

CONFIGS = Path(__file__).parents[2] / "configs"


@dataclass(frozen=True)
class Case:
    family: str
    spec: Any
    model: Any
    x: torch.Tensor

    def block(self, start: int = 0, stop: int | None = None, **fields: torch.Tensor) -> Block:
        rows = torch.arange(len(self.x))[start:stop]
        return Block(x=self.x[rows], rows=rows, **{name: values[rows] for name, values in fields.items()})


@pytest.fixture(scope="module", params=families())
def case(request) -> Case:
    """A family, fitted for a moment on the digits in this process."""
    overrides = ["cluster.num_workers=0", "fit.max_iterations=2", "fit.tolerance=0", "data.validation_fraction=0"]
    spec = load_spec(CONFIGS / f"{request.param}_digits.yaml", overrides)
    x = torch.from_numpy(load_digits().images.reshape(-1, 64) / 16.0)
    return Case(request.param, spec, gendist.fit(spec).model, x)


def leaves_of(case: Case):
    return lambda bounds: [case.block(a, b) for a, b in itertools.pairwise(bounds)]


def flat(value: Any) -> list[torch.Tensor | float]:
    """All numbers inside statistics, in order."""
    if isinstance(value, torch.Tensor | float | int):
        return [value]
    return [number for name in sorted(vars(value)) for number in flat(getattr(value, name))]


def same_bytes(first: Any, second: Any) -> bool:
    pairs = zip(flat(first), flat(second), strict=True)
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


def test_it_keeps_the_protocol(case):
    assert isinstance(case.model, GenerativeModel)
    assert isinstance(case.model.config, type(case.model).Config)
    assert case.model.config == case.spec.model
    assert case.model.num_features == 64


def test_every_verb_is_offered_or_declared_not_to_be(case):
    for verb in VERBS:
        offered, reason = hasattr(case.model, verb), case.model.not_offered.get(verb)
        assert offered != (reason is not None), f"{verb}: offered {offered}, reason {reason!r}"
    assert set(case.model.not_offered) <= set(VERBS)


def test_what_it_offers_has_a_docstring(case):
    for name, member in inspect.getmembers(type(case.model), inspect.isroutine):
        if name in VERBS:
            assert member.__doc__, f"{name} has no docstring"


def test_a_sample_is_a_window_on_an_endless_one(case):
    whole = case.model.sample(100, seed=3)
    assert len(whole) == 100
    parts = [case.model.sample(40, seed=3), case.model.sample(60, seed=3, offset=40)]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(case.model.sample(100, seed=4), whole)
    assert len(case.model.sample(0)) == 0
    assert bool(whole.isfinite().all())


def test_global_random_state_is_neither_read_nor_written(case):
    torch.manual_seed(1)
    state, first = torch.random.get_rng_state(), case.model.sample(10, seed=3)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(case.model.sample(10, seed=3), first)


def test_numpy_arrays_and_tensors_of_any_float_give_the_same(case):
    if "log_prob" in case.model.not_offered:
        return
    expected = case.model.log_prob(case.x[:20])
    assert torch.equal(case.model.log_prob(case.x[:20].numpy()), expected)
    assert torch.equal(case.model.log_prob(case.x[:20].tolist()), expected)
    assert torch.allclose(case.model.log_prob(case.x[:20].float()), expected, rtol=1e-3)
    assert expected.shape == (20,)


def test_x_of_another_width_is_refused(case):
    for verb in ("log_prob", "elbo", "encode", "classify"):
        if verb not in case.model.not_offered:
            with pytest.raises(UserError, match="64"):
                getattr(case.model, verb)(np.zeros((3, 63)))


def test_representations_decode_to_x(case):
    if {"encode", "decode"} & set(case.model.not_offered):
        return
    assert case.model.decode(case.model.encode(case.x[:7])).shape == (7, 64)


def test_saved_and_loaded_it_is_the_same_model(case, tmp_path):
    schema = Schema(columns=("image",), feature_names=tuple(f"p{i}" for i in range(64)), image_shape=(8, 8))
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


@pytest.fixture
def em_case(case) -> Case:
    if not isinstance(case.model, StatisticsModel):
        pytest.skip("not fitted by sufficient statistics")
    return case


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
    repeated = em_case.model.e_step(Block(x=em_case.x[index], rows=torch.arange(len(index))))
    assert_equal_to_rounding(em_case.model, weighted, repeated)


def test_evidence_that_leaves_one_latent_counts_the_row_for_it(em_case):
    num_latents = em_case.model.num_latents
    evidence = torch.full((len(em_case.x), num_latents), -torch.inf, dtype=torch.float64)
    evidence[:, 1] = 0.0
    model = em_case.model.m_step(em_case.model.e_step(em_case.block(evidence=evidence))).model
    decoded = model.decode(torch.tensor([1]))[0]
    np.testing.assert_allclose(decoded, em_case.x.mean(0), atol=1e-9)


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
        assert em_case.model.log_likelihood(block) == em_case.model.e_step(block).log_likelihood
