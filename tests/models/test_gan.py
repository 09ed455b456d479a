"""The generative adversarial network: losses written out, penalties against finite differences, phases by their schedule."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits

from gendist.models.gan import DISCRIMINATOR, GENERATOR, PENALTY, GenerativeAdversarialNetwork
from gendist.models.ops import adversarial
from gendist.protocols import Block, Phase, UserError

WGAN_GP = {"loss": "wasserstein", "penalty": "gradient_penalty"}


def small(x_shape=(4, 3), seed=0, **fields) -> GenerativeAdversarialNetwork:
    fields = {"latent_dim": 3, "generator": {"hidden_sizes": [16]}, "discriminator": {"hidden_sizes": [16]}} | fields
    return GenerativeAdversarialNetwork.create(GenerativeAdversarialNetwork.Config(**fields), x_shape, (), seed)


def batch_of(x: torch.Tensor, weights: torch.Tensor | None = None) -> Block:
    return Block(x.float(), torch.arange(len(x)), weights)


def noise_of(model: GenerativeAdversarialNetwork, phase: Phase, num_rows: int) -> dict[str, torch.Tensor]:
    draw = {"normal": torch.randn, "uniform": torch.rand}
    generator = torch.Generator().manual_seed(0)
    return {name: draw[d.kind](num_rows, d.width, generator=generator) for name, d in model.draws(phase).items()}


def one(value: float) -> torch.Tensor:
    return torch.tensor([value])


def test_non_saturating_is_cross_entropy_with_the_generators_labels_turned():
    real, fake = torch.linspace(-4, 4, 9), torch.linspace(3, -5, 9)
    ones, zeros = torch.ones(9), torch.zeros(9)
    of_real, of_fake = adversarial.discriminator_loss("non_saturating", real, fake)
    torch.testing.assert_close(of_real, binary_cross_entropy_with_logits(real, ones, reduction="none"))
    torch.testing.assert_close(of_fake, binary_cross_entropy_with_logits(fake, zeros, reduction="none"))
    torch.testing.assert_close(
        adversarial.generator_loss("non_saturating", fake), binary_cross_entropy_with_logits(fake, ones, reduction="none")
    )


@pytest.mark.parametrize(
    ("name", "real", "fake", "of_real", "of_fake", "of_generator"),
    [
        ("hinge", 0.25, -0.5, 0.75, 0.5, 0.5),
        ("hinge", 2.0, -3.0, 0.0, 0.0, 3.0),
        ("hinge", -1.0, 1.0, 2.0, 2.0, -1.0),
        ("wasserstein", 2.0, -3.0, -2.0, -3.0, 3.0),
    ],
)
def test_hinge_and_wasserstein_by_hand(name, real, fake, of_real, of_fake, of_generator):
    assert adversarial.discriminator_loss(name, one(real), one(fake)) == (one(of_real), one(of_fake))
    assert adversarial.generator_loss(name, one(fake)) == one(of_generator)


def numeric_gradient_norms(discriminator: nn.Module, x: torch.Tensor, step: float = 1e-6) -> torch.Tensor:
    """(B,) |grad_x D(x)| by central differences."""
    with torch.no_grad():
        directions = torch.eye(x[0].numel(), dtype=x.dtype).reshape(-1, *x.shape[1:])
        slopes = [(discriminator(x + step * d) - discriminator(x - step * d)).flatten() / (2 * step) for d in directions]
    return torch.stack(slopes).square().sum(0).sqrt()


@pytest.fixture(params=[{"hidden_sizes": [8, 8]}, {"channels": [4, 6]}], ids=["connected", "convolutions"])
def discriminator(request) -> nn.Module:
    return small(discriminator={"activation": "silu", **request.param}, x_shape=(4, 5)).discriminator.double()


def test_r1_is_half_the_squared_gradient_at_the_data(discriminator):
    real = torch.rand(6, 1, 4, 5, dtype=torch.float64)
    expected = 0.5 * numeric_gradient_norms(discriminator, real).square()
    torch.testing.assert_close(adversarial.r1(discriminator, real), expected, rtol=1e-6, atol=1e-9)


def test_the_gradient_penalty_is_taken_between_data_and_samples(discriminator):
    real, fake = torch.rand(2, 6, 1, 4, 5, dtype=torch.float64)
    share = torch.rand(6, 1, dtype=torch.float64)
    between = torch.stack([u * r + (1 - u) * f for u, r, f in zip(share, real, fake, strict=True)])
    expected = (numeric_gradient_norms(discriminator, between) - 1).square()
    torch.testing.assert_close(adversarial.gradient_penalty(discriminator, real, fake, share), expected, rtol=1e-6, atol=1e-9)


def test_a_discriminator_of_no_slope_has_a_penalty_with_a_gradient():
    flat = nn.Linear(3, 1)
    nn.init.zeros_(flat.weight)
    penalty = adversarial.gradient_penalty(flat, torch.rand(2, 3), torch.rand(2, 3), torch.rand(2, 1))
    torch.testing.assert_close(penalty, torch.ones(2), rtol=1e-5, atol=0)
    penalty.sum().backward()
    assert bool(flat.weight.grad.isfinite().all())


@pytest.mark.parametrize("penalty", ["r1", "gradient_penalty"])
def test_penalties_move_the_discriminator_as_their_slope_says(discriminator, penalty):
    """The gradient in the parameters, a derivative of a derivative, by finite differences along one direction."""
    real, fake = torch.rand(2, 6, 1, 4, 5, dtype=torch.float64)
    share = torch.rand(6, 1, dtype=torch.float64)

    def value() -> torch.Tensor:
        if penalty == "r1":
            return adversarial.r1(discriminator, real).sum()
        return adversarial.gradient_penalty(discriminator, real, fake, share).sum()

    parameters = list(discriminator.parameters())
    gradients = torch.autograd.grad(value(), parameters, allow_unused=True)  # none of the last bias
    generator = torch.Generator().manual_seed(0)
    directions = [torch.randn(p.shape, dtype=p.dtype, generator=generator) for p in parameters]
    along = sum(float((g * d).sum()) for g, d in zip(gradients, directions, strict=True) if g is not None)
    values = []
    for step in (1e-5, -2e-5):
        with torch.no_grad():
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter.add_(direction, alpha=step)
        values.append(float(value().detach()))
    assert along == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-5)


@pytest.mark.parametrize(
    ("fields", "initials"),
    [
        ({}, "dg dg dg dg dg dg"),
        ({"penalty_every": 4, "num_critic_steps": 3}, "dp d dg d dp dg"),
        ({"penalty": "none"}, "dg dg dg dg dg dg"),
    ],
)
def test_phases_follow_their_schedule(fields, initials):
    model = small(**fields)
    steps = ["".join(phase.name[0] for phase in model.phases(step)) for step in range(6)]
    assert " ".join(steps) == initials
    networks = {phase.name: phase.network for step in range(6) for phase in model.phases(step)}
    assert networks.pop("generator") == "generator"
    assert set(networks.values()) == {"discriminator"}


@pytest.mark.parametrize("fields", [{}, WGAN_GP], ids=["r1", "wgan-gp"])
def test_a_lazy_penalty_counts_as_often_as_it_is_left_out(fields):
    eager, lazy = small(**fields), small(**fields, penalty_every=4)
    batch = batch_of(torch.rand(8, 12))
    noise = noise_of(eager, DISCRIMINATOR, 8)
    terms = eager.loss(DISCRIMINATOR, batch, noise, 0).terms
    assert lazy.loss(DISCRIMINATOR, batch, noise, 0).terms.keys() == {"real", "fake"}
    assert lazy.draws(PENALTY).keys() == ({"latent", "interpolation"} if fields else set())
    alone = lazy.loss(PENALTY, batch, {name: noise[name] for name in lazy.draws(PENALTY)}, 0).terms
    assert alone.keys() == lazy.counts(PENALTY, batch).keys() == {"penalty"}
    torch.testing.assert_close(alone["penalty"], 4 * terms["penalty"])
    torch.testing.assert_close(small(**fields, penalty_weight=5.0).loss(DISCRIMINATOR, batch, noise, 0).terms["penalty"],
                               0.5 * terms["penalty"])  # fmt: skip


def test_the_loss_is_of_images_as_networks_see_them():
    model = small()
    batch, noise = batch_of(torch.rand(7, 12)), noise_of(model := small(), DISCRIMINATOR, 7)
    loss = model.loss(DISCRIMINATOR, batch, noise, 0)
    real = (2 * batch.x - 1).reshape(7, 1, 4, 3)
    fake = model.generator(noise["latent"]).tanh()
    real_logits, fake_logits = model.discriminator(real).flatten(), model.discriminator(fake).flatten()
    torch.testing.assert_close(loss.terms["real"], -real_logits.sigmoid().log().sum())
    torch.testing.assert_close(loss.terms["fake"], -(1 - fake_logits.sigmoid()).log().sum())
    torch.testing.assert_close(loss.terms["penalty"], 10 * adversarial.r1(model.discriminator, real).sum())
    right = (real_logits > 0).float().mean() / 2 + (fake_logits < 0).float().mean() / 2
    assert float(loss.watched["accuracy"]) / 7 == pytest.approx(float(right))
    torch.testing.assert_close(model.decode(noise["latent"]), (fake.flatten(1).detach() + 1) / 2)
    free = small(penalty="none")
    assert (
        free.loss(DISCRIMINATOR, batch, noise, 0).terms.keys() == free.counts(DISCRIMINATOR, batch).keys() == {"real", "fake"}
    )


def test_each_phase_moves_its_own_network():
    model, batch = small(**WGAN_GP, penalty_every=2), batch_of(torch.rand(5, 12))
    for phase in (DISCRIMINATOR, PENALTY, GENERATOR):
        for name, network in model.networks().items():
            network.requires_grad_(name == phase.network).zero_grad()
        sum(model.loss(phase, batch, noise_of(model, phase, 5), 0).terms.values()).backward()
        for name, network in model.networks().items():
            moved = [p.grad is not None and bool((p.grad != 0).any()) for p in network.parameters()]
            assert any(moved) == (name == phase.network)


def test_weights_are_those_of_the_data():
    model, x = small(**WGAN_GP), torch.rand(9, 12)
    weights = torch.tensor([0.0, 1.0, 2.0]).repeat(3)
    index = torch.repeat_interleave(torch.arange(9), weights.long())
    noise = noise_of(model, DISCRIMINATOR, 9)
    weighted, repeated = batch_of(x, weights), batch_of(x[index])
    assert model.counts(DISCRIMINATOR, weighted) == {"real": 9.0, "fake": 9.0, "penalty": 9.0}
    assert model.counts(DISCRIMINATOR, batch_of(x, 2 * weights)) == {"real": 18.0, "fake": 9.0, "penalty": 18.0}
    first = model.loss(DISCRIMINATOR, weighted, noise, 0).terms
    second = model.loss(DISCRIMINATOR, repeated, {name: values[index] for name, values in noise.items()}, 0).terms
    for name in ("real", "penalty"):
        torch.testing.assert_close(first[name], second[name])
    plain = model.loss(DISCRIMINATOR, batch_of(x), noise, 0).terms
    torch.testing.assert_close(first["fake"], plain["fake"])
    assert model.counts(GENERATOR, weighted) == {"generator": 9.0}


@pytest.mark.parametrize("network", [{"hidden_sizes": [9, 8]}, {"channels": [4, 5]}])
def test_encode_gives_what_the_last_layer_is_given(network):
    model, x = small((4, 6), discriminator=network), torch.rand(5, 24)
    features = model.encode(x)
    logits = model.discriminator((2 * x - 1).reshape(5, 1, 4, 6))
    torch.testing.assert_close(model.discriminator[-1](features), logits)
    assert torch.equal(model.encode(x.reshape(5, 4, 6)), features)


def test_images_are_made_between_0_and_1_and_columns_anywhere():
    image, columns = small((4, 3)).sample(500), small((12,)).sample(500)
    assert 0.0 <= float(image.min()) <= float(image.max()) <= 1.0
    assert float(columns.min()) < 0.0 < 1.0 < float(columns.max())
    assert float(small((12,), output="tanh").sample(500).min()) >= 0.0


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda m: m.encode(np.zeros((2, 11))), r"\(2, 11\); \(N, 12\) is needed"),
        (lambda m: m.decode(np.zeros((2, 4))), r"\(N, 3\), not \(2, 4\)"),
        (lambda m: m.sample(3, given="a"), "without labels"),
        (lambda m: m.loss(DISCRIMINATOR, batch_of(torch.full((2, 12), 255.0)), noise_of(m, DISCRIMINATOR, 2), 0), "tanh makes"),
        (lambda m: m.decode(np.zeros((2, 3)), given="a"), "without labels"),
        (lambda m: small((4,), augmentation=["color"]), "is of images, and x has 4 columns"),
    ],
)
def test_mistakes_are_one_line(call, match):
    with pytest.raises(UserError, match=match) as error:
        call(small())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"loss": "wasserstein", "penalty": "none"}, "gradient_penalty"),
        ({"penalty": "none", "penalty_every": 4}, "penalty_every: penalty none"),
        ({"penalty": "none", "penalty_weight": 1.0}, "penalty_weight: penalty none"),
        ({"augmentation": ["color", "cutout", "color"]}, "color more than once"),
        ({"discriminator": {"module": "a:B", "activation": "relu"}}, "activation is of layers that are made here"),
    ],
)
def test_what_would_not_be_used_is_refused(fields, match):
    with pytest.raises(ValidationError, match=match):
        small(**fields)


@pytest.mark.parametrize("fields", [{"penalty": "none"}, {"discriminator": {"module": "a:B"}, "generator": {"module": "a:B"}}])
def test_a_configuration_with_every_field_written_out_is_the_same(fields):
    config = GenerativeAdversarialNetwork.Config(latent_dim=3, **fields)
    assert GenerativeAdversarialNetwork.Config.model_validate(config.model_dump(mode="json")) == config
