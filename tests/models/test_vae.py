"""The variational autoencoder against densities known in closed form, and against torch.distributions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch.distributions import Bernoulli, MultivariateNormal, Normal, kl_divergence

from gendist.data import Schema
from gendist.models import vae
from gendist.models.gmm import GaussianMixture
from gendist.models.ops import autoencoder, latent_paths, likelihoods, tiles
from gendist.models.vae import VariationalAutoencoder, VariationalAutoencoderConfig
from gendist.noise import Noise, derived_seed
from gendist.pictures import draw_figures, figure_bytes
from gendist.protocols import Block, Draw, UserError

NUM_FEATURES, LATENT_DIM, SCALE = 5, 2, 0.6


def small(x_shape=(4, 3), seed=0, **fields) -> VariationalAutoencoder:
    fields = {"latent_dim": 3, "encoder": {"hidden_sizes": [16]}, "decoder": {"hidden_sizes": [16]}} | fields
    return VariationalAutoencoder.create(VariationalAutoencoderConfig(**fields), x_shape, (), seed)


def linear() -> tuple[VariationalAutoencoder, MultivariateNormal]:
    """x = W z + b + scale noise, and p(x) = N(b, W W^T + scale^2 I) (PRML 12.35); the encoder is a wrong one."""
    none = {"hidden_sizes": []}
    model = small((NUM_FEATURES,), latent_dim=LATENT_DIM, encoder=none, decoder=none, likelihood="gaussian", scale=SCALE)
    decoder = model.autoencoder.decoder[-1]
    with torch.no_grad():
        # Columns at right angles, so that the exact posterior has a diagonal covariance.
        decoder.weight.copy_(torch.tensor([[1.0, 0.0], [0.5, 0.0], [0.0, -0.7], [0.0, 0.3], [0.0, 0.0]]))
        decoder.bias.copy_(torch.tensor([1.0, -2.0, 0.0, 0.5, 3.0]))
        w, b = decoder.weight.double(), decoder.bias.double()
    covariance = w @ w.T + SCALE**2 * torch.eye(NUM_FEATURES, dtype=torch.float64)
    return model, MultivariateNormal(b, covariance)


def with_the_exact_posterior(model: VariationalAutoencoder) -> VariationalAutoencoder:
    """q(z | x) = p(z | x) = N(M^-1 W^T (x - b), scale^2 M^-1), M = W^T W + scale^2 I (PRML 12.42)."""
    encoder, decoder = model.autoencoder.encoder[-1], model.autoencoder.decoder[-1]
    with torch.no_grad():
        w, b = decoder.weight.double(), decoder.bias.double()
        inverse = torch.linalg.inv(w.T @ w + SCALE**2 * torch.eye(LATENT_DIM, dtype=torch.float64))
        encoder.weight.zero_()
        encoder.weight[:LATENT_DIM] = inverse @ w.T
        encoder.bias[:LATENT_DIM] = -inverse @ w.T @ b
        encoder.bias[LATENT_DIM:] = (SCALE**2 * inverse.diagonal()).log()
    return model


def batch_of(x: torch.Tensor, weights: torch.Tensor | None = None) -> Block:
    return Block(x.float(), torch.arange(len(x)), weights)


def drawn(num_rows: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_rows, width, generator=torch.Generator().manual_seed(seed))


def rows_of(exact: MultivariateNormal, num_rows: int) -> torch.Tensor:
    return exact.loc.detach() + drawn(num_rows, NUM_FEATURES, 3).double() @ exact.scale_tril.detach().T


def test_with_the_exact_posterior_every_bound_is_the_density():
    model, exact = linear()
    model, x = with_the_exact_posterior(model), rows_of(exact, 50)
    expected = exact.log_prob(x)
    # The importance weights are all the same: a single sample is enough (IWAE eq. 8).
    torch.testing.assert_close(model.log_prob_bound(x, num_samples=1), expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(model.log_prob_bound(x, num_samples=7, seed=5), expected, rtol=0, atol=1e-4)
    elbo = torch.stack([model.elbo(x, seed=seed) for seed in range(200)]).mean(0)
    assert float((elbo - expected).mean().abs()) < 0.05


def test_bounds_of_a_wrong_encoder_lie_in_order_and_come_to_the_density():
    model, exact = linear()
    model, x = with_the_exact_posterior(model), rows_of(exact, 60)
    with torch.no_grad():
        model.autoencoder.encoder[-1].bias += torch.tensor([0.3, -0.4, 0.8, 0.6])
    expected = float(exact.log_prob(x).mean())
    elbo = float(torch.stack([model.elbo(x, seed=seed) for seed in range(20)]).mean())
    few, more, most = (float(model.log_prob_bound(x, num_samples=n).mean()) for n in (3, 30, 1000))
    assert elbo + 0.1 < few < more < expected
    assert most == pytest.approx(expected, abs=0.01)


def mixture() -> GaussianMixture:
    """Of latents, far from standard normal."""
    covariances = torch.tensor([[[0.5, 0.2], [0.2, 0.4]], [[0.1, 0.0], [0.0, 0.3]]], dtype=torch.float64)
    means = torch.tensor([[1.0, 1.0], [-1.5, 0.5]], dtype=torch.float64)
    return GaussianMixture.from_parameters(torch.tensor([0.3, 0.7], dtype=torch.float64), means, covariances)


def test_over_a_mixture_of_latents_bounds_come_to_the_density_which_is_a_mixture():
    """z of a component makes x of N(W m + b, W S W^T + scale^2 I) (PRML 2.115)."""
    model = with_the_exact_posterior(linear()[0]).with_prior(mixture())
    decoder = model.autoencoder.decoder[-1]
    w, b = decoder.weight.detach().double(), decoder.bias.detach().double()
    noise = SCALE**2 * torch.eye(NUM_FEATURES, dtype=torch.float64)
    parts = [
        MultivariateNormal(w @ m + b, w @ s @ w.T + noise) for m, s in zip(mixture().means, mixture().covariances, strict=True)
    ]
    x = parts[0].loc + drawn(40, NUM_FEATURES, 4).double() @ parts[0].scale_tril.T
    expected = torch.logsumexp(torch.stack([part.log_prob(x) for part in parts], 1) + mixture().weights.log(), 1)
    assert float((model.log_prob_bound(x, num_samples=4000) - expected).abs().mean()) < 0.02
    elbo = torch.stack([model.elbo(x, seed=seed) for seed in range(50)]).mean(0)
    assert float(elbo.mean()) < float(expected.mean())
    # The KL divergence from the mixture in the ELBO, by many draws of z.
    z = torch.cat([model.draw_latents(x, seed=seed) for seed in range(300)]).double().view(300, 40, LATENT_DIM)
    mean, log_variance = (value.double() for value in model.autoencoder.posterior(x.float()))
    log_q = Normal(mean, log_variance.div(2).exp()).log_prob(z).sum(2).mean(0)
    log_p = mixture().log_prob(z.reshape(-1, LATENT_DIM)).view(300, 40).mean(0)
    log_likelihood = Normal(z @ w.T + b, SCALE).log_prob(x).sum(2).mean(0)
    assert float((elbo - (log_likelihood + log_p - log_q)).mean().detach()) == pytest.approx(0.0, abs=0.1)


def test_over_a_mixture_of_latents_samples_are_its_decoded_samples_and_clusters_its_components():
    model = linear()[0].with_prior(mixture())
    latents = mixture().sample(70, seed=derived_seed(3, "sample.prior"), offset=5)
    torch.testing.assert_close(model.sample(70, seed=3, offset=5, mean=True), model.decode(latents))
    assert torch.equal(model.sample(70, seed=3)[40:], model.sample(30, seed=3, offset=40))
    x = model.sample(20, seed=1)
    assert torch.equal(model.cluster(x), mixture().encode(model.encode(x)))
    with pytest.raises(UserError, match="no mixture of latents"):
        linear()[0].cluster(x)


class OfSequences(GaussianMixture):
    takes_sequences = True


class NoMixture(GaussianMixture):
    def encode(self, x_ND):
        return super().encode(x_ND) + 0.5


@pytest.mark.parametrize(
    ("prior", "match"),
    [
        (lambda: mixture(), "a prior of 2 features, but there are 3 latents"),
        (lambda: small(), r"must offer log_prob, and this one does not \(the integral over z has no closed form"),
        (lambda: object(), r"must offer sample, and this one does not \(object has none\)"),
        (lambda: Normal(0.0, 1.0), r"must offer num_features, and this one does not \(Normal has none\)"),
        (lambda: OfSequences(mixture().config, mixture().weights, mixture().gaussian), "this one is of sequences"),
    ],
)
def test_a_prior_has_samples_and_a_density_of_latents(prior, match):
    with pytest.raises(UserError, match=match) as error:
        small().with_prior(prior())
    assert "\n" not in str(error.value)


def test_clusters_are_probabilities():
    model = linear()[0].with_prior(NoMixture(mixture().config, mixture().weights, mixture().gaussian))
    with pytest.raises(UserError, match="no mixture of latents"):
        model.cluster(model.sample(2))


def test_over_a_prior_the_draw_of_x_is_independent_of_that_of_z():
    """A mixture draws from the stream that has the name of x's: with the same seed, both would be made of the same numbers, of
    which the length of z tells the first."""
    one = GaussianMixture.from_parameters(torch.ones(1).double(), torch.zeros(1, 2), torch.eye(2)[None])
    model = small((4,), latent_dim=2, likelihood="gaussian", scale=SCALE).with_prior(one)
    means, x = (model.sample(4000, seed=1, mean=mean).double() for mean in (True, False))
    lengths = one.sample(4000, seed=derived_seed(1, "sample.prior")).norm(dim=1)
    together = torch.corrcoef(torch.cat([lengths[:, None], x - means], 1).T)[0, 1:]
    assert float(together.abs().max()) < 5 / 4000**0.5


def test_drawn_latents_are_of_the_posterior_by_address():
    model, x = small(), drawn(90, 12).sigmoid()
    mean, log_variance = model.autoencoder.posterior(x)
    assert torch.equal(model.draw_latents(x, seed=2)[40:], model.draw_latents(x[40:], seed=2, offset=40))
    draws = torch.stack([model.draw_latents(x, seed=seed) for seed in range(100)])
    standardized = ((draws - mean) / log_variance.div(2).exp()).detach().double()
    assert abs(float(standardized.mean())) < 5 / standardized.numel() ** 0.5
    assert float(standardized.var()) == pytest.approx(1.0, abs=5 * (2 / standardized.numel()) ** 0.5)


def test_the_kl_is_that_of_torch_and_of_monte_carlo():
    mean, log_variance = drawn(6, 4), drawn(6, 4, 1)
    posterior = Normal(mean, (0.5 * log_variance).exp())
    ours = autoencoder.kl(mean, log_variance).sum(1)
    torch.testing.assert_close(ours, kl_divergence(posterior, Normal(0.0, 1.0)).sum(1))
    z = mean + (0.5 * log_variance).exp() * torch.randn(40_000, 6, 4, generator=torch.Generator().manual_seed(0))
    sampled = posterior.log_prob(z).sum(2) - Normal(0.0, 1.0).log_prob(z).sum(2)
    torch.testing.assert_close(ours, sampled.mean(0), rtol=0, atol=0.1)
    torch.testing.assert_close(autoencoder.log_normal(z[0]), Normal(0.0, 1.0).log_prob(z[0]).sum(1))


def test_likelihoods_are_those_of_torch():
    y = 3.0 * drawn(7, 5)
    binary = (torch.rand(7, 5, generator=torch.Generator().manual_seed(0)) < 0.5).float()
    bernoulli = likelihoods.Bernoulli()
    torch.testing.assert_close(bernoulli(binary, y), Bernoulli(logits=y).log_prob(binary).sum(1))
    torch.testing.assert_close(bernoulli.mean(y), Bernoulli(logits=y).mean)
    x = drawn(7, 5, 1)
    torch.testing.assert_close(likelihoods.Gaussian(0.3)(x, y), Normal(y, 0.3).log_prob(x).sum(1))
    learned = likelihoods.Gaussian(None)
    with torch.no_grad():
        learned.log_scale_over_speed.fill_(0.4 / likelihoods.SPEED)
    torch.testing.assert_close(learned(x, y), Normal(y, math.exp(0.4)).log_prob(x).sum(1))


def test_the_learned_scale_is_best_at_the_root_mean_square_error():
    x, y, gaussian = drawn(50, 4), torch.zeros(50, 4), likelihoods.Gaussian(None)
    with torch.no_grad():
        gaussian.log_scale_over_speed.fill_(x.square().mean().sqrt().log() / likelihoods.SPEED)
    gaussian(x, y).sum().backward()
    assert float(gaussian.log_scale_over_speed.grad.abs()) < 1e-2


def test_samples_have_the_moments_of_the_density():
    model, exact = linear()
    x = model.sample(40_000, seed=1, mean=False).double()
    np.testing.assert_allclose(x.mean(0), exact.mean, atol=0.03)
    np.testing.assert_allclose(torch.cov(x.T), exact.covariance_matrix, atol=0.03)
    assert torch.equal(model.sample(50, seed=1), model.sample(50, seed=1, mean=False))  # x is no image
    means = model.sample(40_000, seed=1, mean=True).double()
    without_noise = exact.covariance_matrix - SCALE**2 * torch.eye(NUM_FEATURES, dtype=torch.float64)
    np.testing.assert_allclose(torch.cov(means.T), without_noise, atol=0.03)


def test_samples_of_a_bernoulli_are_binary_and_have_its_mean():
    model = small()
    x, means = model.sample(20_000, seed=1, mean=False), model.sample(20_000, seed=1)
    assert torch.equal(means, model.sample(20_000, seed=1, mean=True))  # x is an image
    assert set(x.unique().tolist()) == {0.0, 1.0}
    np.testing.assert_allclose(x.mean(0), means.mean(0), atol=0.02)
    parts = [model.sample(40, mean=False), model.sample(60, offset=40, mean=False)]
    assert torch.equal(torch.cat(parts), model.sample(100, mean=False))


def test_a_configuration_says_whether_samples_are_means():
    draws, means = small(samples="draws"), small((12,), likelihood="gaussian", samples="means")
    assert torch.equal(draws.sample(30, seed=2), draws.sample(30, seed=2, mean=False))
    assert torch.equal(means.sample(30, seed=2), means.sample(30, seed=2, mean=True))


def test_x_far_from_all_that_was_seen_has_finite_bounds_and_latents():
    for seed in range(3):
        model = small((4,), seed=seed, likelihood="gaussian")
        x = 1e6 * drawn(200, 4, seed)
        assert float(model.autoencoder.encoder(x.view(-1, 4)).detach().max()) > 1e3  # whose exponential is infinite
        for found in (model.elbo(x), model.log_prob_bound(x, num_samples=3), model.draw_latents(x), model.encode(x)):
            assert bool(found.isfinite().all())
        loss = model.loss(model.phases(0)[0], batch_of(x), {"latent": drawn(200, 3)}, 0)
        sum(loss.terms.values()).backward()
        gradients = [p.grad for p in model.autoencoder.parameters() if p.grad is not None]
        assert all(bool(gradient.isfinite().all()) for gradient in gradients)


def test_columns_that_are_large_for_fresh_networks_are_remarked_on():
    model = small((4,), likelihood="gaussian")
    assert any("standardize" in line for line in model.remarks({"validation/kl": 3.0, "validation/negative_elbo": 4e5}))
    assert not model.remarks({"validation/kl": 3.0, "validation/negative_elbo": 9.0})
    with_scale = small((4,), likelihood="gaussian", scale=1e-3)
    assert not with_scale.remarks({"validation/kl": 3.0, "validation/negative_elbo": 4e5})


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
@pytest.mark.parametrize("network", [{"hidden_sizes": [9]}, {"channels": [4, 5], "normalization": "layer"}])
def test_the_loss_is_the_negative_elbo(network, likelihood):
    model = small((4, 6), likelihood=likelihood, encoder=network, decoder=network, beta=0.5)
    batch, noise = batch_of(torch.rand(11, 24)), drawn(11, 3)
    (phase,) = model.phases(0)
    loss = model.loss(phase, batch, {"latent": noise}, 0)
    images = batch.x.reshape(-1, 1, 4, 6)
    mean, log_variance = model.autoencoder.encoder(images).chunk(2, 1)
    posterior = Normal(mean, (0.5 * log_variance).exp())
    y = model.autoencoder.decoder(posterior.loc + posterior.scale * noise).flatten(1)
    if likelihood == "bernoulli":
        log_prob = torch.xlogy(batch.x, y.sigmoid()) + torch.xlogy(1 - batch.x, 1 - y.sigmoid())
    else:
        log_prob = Normal(y, likelihoods.FIRST_SCALE).log_prob(batch.x)
    kl = kl_divergence(posterior, Normal(0.0, 1.0)).sum()
    torch.testing.assert_close(loss.terms["reconstruction"], -log_prob.sum())
    torch.testing.assert_close(loss.terms["weighted_kl"], 0.5 * kl)
    torch.testing.assert_close(loss.watched["kl"], kl.detach())
    torch.testing.assert_close(loss.watched["negative_elbo"], (kl - log_prob.sum()).detach())
    validated = model.validate(batch, {"latent": noise})
    torch.testing.assert_close(validated["negative_elbo"], kl - log_prob.sum())
    torch.testing.assert_close(validated[model.validation_objective], sum(loss.terms.values()))
    sum(loss.terms.values()).backward()
    assert all(bool((p.grad != 0).any()) for p in model.autoencoder.parameters())


def test_weight_two_is_the_row_twice_and_weight_zero_no_row():
    model, x, noise = small(), torch.rand(9, 12), drawn(9, 3)
    weights = torch.tensor([0.0, 1.0, 2.0]).repeat(3)
    index = torch.repeat_interleave(torch.arange(9), weights.long())
    (phase,) = model.phases(0)
    weighted, repeated = batch_of(x, weights), batch_of(x[index])
    assert model.counts(phase, weighted) == model.counts(phase, repeated) == {"reconstruction": 9.0, "weighted_kl": 9.0}
    first = model.loss(phase, weighted, {"latent": noise}, 0).terms
    second = model.loss(phase, repeated, {"latent": noise[index]}, 0).terms
    for name, value in first.items():
        torch.testing.assert_close(value, second[name])
    value, expected = model.validate(weighted, {"latent": noise}), model.validate(repeated, {"latent": noise[index]})
    torch.testing.assert_close(value["negative_elbo"], expected["negative_elbo"])


def test_bounds_of_parts_are_parts_of_the_bounds():
    model, x = small(), torch.rand(100, 12)
    for bound in (model.elbo, lambda x, **o: model.log_prob_bound(x, num_samples=3, **o)):
        whole = bound(x, seed=4)
        torch.testing.assert_close(torch.cat([bound(x[:30], seed=4), bound(x[30:], seed=4, offset=30)]), whole)
        assert not torch.allclose(bound(x, seed=5), whole)
    assert model.elbo(x[:0]).shape == (0,)


@pytest.mark.parametrize(("offset", "num_rows"), [(0, 8), (40, 8), (60, 8), (64, 64), (3, 130), (130, 0)])
def test_a_rows_bytes_depend_on_its_number_alone(offset, num_rows):
    model, x = small(), drawn(150, 12).sigmoid()
    some = slice(offset, offset + num_rows)
    for verb in (model.elbo, model.draw_latents, lambda x, **o: model.log_prob_bound(x, num_samples=3, **o)):
        assert torch.equal(verb(x[some], seed=4, offset=offset), verb(x, seed=4)[some])


@pytest.mark.parametrize("first", [-200, -64, -63, -5, 0, 5, 99, 100, 300])
def test_a_tile_is_a_window_that_is_filled_up_with_zeros(first):
    values = torch.arange(1, 101)
    expected = [values[i] if 0 <= i < 100 else 0 for i in range(first, first + tiles.TILE)]
    assert tiles.tile_of(values, first).tolist() == expected


def test_images_may_come_as_images():
    model, x = small((4, 3)), torch.rand(5, 12)
    assert torch.equal(model.encode(x.reshape(5, 4, 3)), model.encode(x))
    torch.testing.assert_close(model.reconstruct(x), model.decode(model.encode(x)))


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda m: m.elbo(np.zeros((2, 11))), r"\(2, 11\); \(N, 12\) is needed, or \(N, 4, 3\)"),
        (lambda m: m.elbo(np.full((2, 12), 1.5)), "bernoulli takes 0 to 1"),
        (lambda m: m.encode(np.full((2, 12), np.nan)), "missing or infinite"),
        (lambda m: m.decode(np.zeros((2, 4))), r"\(N, 3\), not \(2, 4\)"),
        (lambda m: m.log_prob_bound(np.zeros((2, 12)), num_samples=0), "num_samples 0; 1 or more"),
        (lambda m: m.sample(3, given="a"), "without labels"),
        (lambda m: m.sample(3, offset=-1), "must be 0 or more"),
        (lambda m: m.loss(m.phases(0)[0], batch_of(torch.full((2, 12), 255.0)), {"latent": drawn(2, 3)}, 0), "from 255 to 255"),
    ],
)
def test_mistakes_are_one_line(call, match):
    with pytest.raises(UserError, match=match) as error:
        call(small())
    assert "\n" not in str(error.value)


def test_a_scale_is_a_gaussians():
    with pytest.raises(ValidationError, match="likelihood bernoulli has none"):
        VariationalAutoencoderConfig(latent_dim=2, scale=0.1)
    assert small(likelihood="gaussian", scale=0.1).tensors().keys() == small().tensors().keys()
    assert "likelihood.log_scale_over_speed" in small(likelihood="gaussian").tensors()


# Objectives


def iwae(num_samples: int, **fields) -> dict:
    return {"objective": "iwae", "num_importance_samples": num_samples, **fields}


def naive_log_weights(model: VariationalAutoencoder, x: torch.Tensor, noise_NKL: torch.Tensor) -> torch.Tensor:
    """(N, K) log p(x | z) p(z) / q(z | x) of a Bernoulli decoder, one latent after the other."""
    mean, log_variance = model.autoencoder.encoder(model.layout.to_network(x)).chunk(2, 1)
    posterior, columns = Normal(mean, (0.5 * log_variance).exp()), []
    for k in range(noise_NKL.shape[1]):
        z = posterior.loc + posterior.scale * noise_NKL[:, k]
        log_joint = Bernoulli(logits=model.autoencoder.decoder(z).flatten(1), validate_args=False).log_prob(x).sum(1)
        columns.append(log_joint + Normal(0.0, 1.0).log_prob(z).sum(1) - posterior.log_prob(z).sum(1))
    return torch.stack(columns, 1)


def test_the_importance_weighted_loss_and_its_gradient_are_those_of_a_loop():
    model, x, noise = small(**iwae(7)), torch.rand(11, 12), drawn(11, 7 * 3)
    assert model.draws(model.phases(0)[0])["latent"].width == 7 * 3
    (term,) = model.loss(model.phases(0)[0], batch_of(x), {"latent": noise}, 0).terms.values()
    naive = -(torch.logsumexp(naive_log_weights(model, x, noise.view(11, 7, 3)), 1) - math.log(7)).sum()
    torch.testing.assert_close(term, naive)
    parameters = list(model.autoencoder.parameters())
    for ours, theirs in zip(torch.autograd.grad(term, parameters), torch.autograd.grad(naive, parameters), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.validate(batch_of(x), {"latent": noise})[model.validation_objective], naive)


def test_with_one_sample_the_importance_weighted_bound_is_the_elbo_in_the_mean():
    one, elbo, x = small(**iwae(1)), small(), torch.rand(1, 12)
    batch, noise = batch_of(x.expand(20_000, -1)), {"latent": drawn(20_000, 3)}
    with torch.no_grad():
        values = one.validate(batch, noise), elbo.validate(batch, noise)
    assert float(values[0]["negative_bound"]) / 20_000 == pytest.approx(float(values[1]["loss"]) / 20_000, abs=0.03)


def test_the_importance_weighted_loss_rises_to_the_density():
    model, exact = linear()
    x = rows_of(exact, 60).float()
    trained = VariationalAutoencoder(
        model.config.model_copy(update=iwae(2000)), model.layout, with_the_exact_posterior(model).autoencoder
    )
    with torch.no_grad():
        trained.autoencoder.encoder[-1].bias += torch.tensor([0.3, -0.4, 0.8, 0.6])
    bounds = []
    for num_samples in (1, 10, 2000):
        repeated = x.repeat(2000 // num_samples, 1)
        noise = drawn(len(repeated), num_samples * LATENT_DIM)
        with torch.no_grad():
            bounds.append(-float(trained.validate(batch_of(repeated), {"latent": noise})["negative_bound"]) / len(repeated))
    assert bounds[0] < bounds[1] < bounds[2]
    assert bounds[2] == pytest.approx(float(exact.log_prob(x.double()).mean()), abs=0.02)


@torch.no_grad()
def test_free_bits_cost_nothing_below_the_floor_and_warm_up_begins_at_no_cost():
    x, noise = torch.rand(9, 12), {"latent": drawn(9, 3)}
    plain = small()
    (phase,) = plain.phases(0)
    kl_BL = plain.autoencoder(x, noise["latent"][:, None])[1]
    floor = float(kl_BL.median())
    floored = small(free_bits=floor, beta=2.0).loss(phase, batch_of(x), noise, 0).terms["weighted_kl"]
    expected = 2.0 * sum(max(value, floor) for value in kl_BL.flatten().tolist())
    assert float(floored) == pytest.approx(expected, rel=1e-5)
    warmed = small(kl_warmup_steps=100)
    weighted = [float(warmed.loss(phase, batch_of(x), noise, step).terms["weighted_kl"]) for step in (0, 25, 100, 5000)]
    np.testing.assert_allclose(weighted, float(kl_BL.sum()) * np.array([0.0, 0.25, 1.0, 1.0]), rtol=1e-5)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        (iwae(5, beta=0.5), "beta: objective iwae"),
        (iwae(5, free_bits=0.1), "free_bits: objective iwae"),
        (iwae(5, kl_warmup_steps=10), "kl_warmup_steps: objective iwae"),
        ({"objective": "iwae"}, "num_importance_samples"),
        ({"num_importance_samples": 5}, "choose iwae"),
        ({"binarize": True, "likelihood": "gaussian"}, "binarize: likelihood gaussian"),
        ({"num_mixtures": 5}, "num_mixtures: likelihood bernoulli"),
        ({"classification_weight": 1.0}, "model.classifier is not given"),
    ],
)
def test_what_makes_no_sense_together_is_refused(fields, match):
    with pytest.raises(ValidationError, match=match):
        VariationalAutoencoderConfig(latent_dim=2, **fields)


# Binary x that is drawn


def test_binary_x_has_the_mean_of_x_and_is_drawn_by_address():
    x = torch.tensor([[0.0, 0.2, 0.7, 1.0]])
    uniform = torch.rand(20_000, 4, generator=torch.Generator().manual_seed(0))
    uniform[0] = 1.0  # as float32 rounds the largest
    binary = vae.binarized(x, uniform)
    assert set(binary.unique().tolist()) == {0.0, 1.0}
    np.testing.assert_allclose(binary.mean(0), x[0], atol=0.015)
    assert binary[:, 0].max() == 0.0
    assert binary[:, 3].min() == 1.0


def test_losses_and_bounds_of_binarized_x_are_those_of_binary_x():
    model, plain, x = small(binarize=True), small(), torch.rand(70, 12)
    (phase,) = model.phases(0)
    assert model.draws(phase)["binarization"] == Draw("uniform", 12)
    assert "binarization" not in plain.draws(phase)
    noise, uniform = drawn(70, 3), torch.rand(70, 12)
    ours = model.loss(phase, batch_of(x), {"latent": noise, "binarization": uniform}, 0)
    theirs = plain.loss(phase, batch_of((uniform < x).float()), {"latent": noise}, 0)
    for name, term in ours.terms.items():
        torch.testing.assert_close(term, theirs.terms[name])
    for bound in ("elbo", "log_prob_bound"):
        binary = (Noise(3, "binarization").uniform(5, 70, 12) < x).float()
        torch.testing.assert_close(getattr(model, bound)(x, seed=3, offset=5), getattr(plain, bound)(binary, seed=3, offset=5))
    torch.testing.assert_close(model.encode(x), plain.encode(x))


# Ways through the latents


def test_great_circles_keep_their_ends_and_the_length_of_unit_vectors():
    ends = torch.nn.functional.normalize(drawn(8, 5), dim=1)
    a, b = ends[:4], ends[4:]
    paths = latent_paths.great_circles(a, b, 7)
    torch.testing.assert_close(paths[:, 0], a)
    torch.testing.assert_close(paths[:, -1], b)
    torch.testing.assert_close(paths.norm(dim=2), torch.ones(4, 7))
    steps = paths.diff(dim=1).norm(dim=2)
    torch.testing.assert_close(steps, steps[:, :1].expand(-1, 6))
    straight = latent_paths.great_circles(torch.stack([a[0], a[0], 0 * a[0]]), torch.stack([3 * a[0], -a[0], a[1]]), 3)
    torch.testing.assert_close(straight[:, 1], torch.stack([2 * a[0], 0 * a[0], a[1] / 2]))


def test_interpolations_and_traversals_are_decoded_paths():
    model, x = small(), torch.rand(2, 12)
    z = model.encode(x)
    path = model.interpolate(x[:1], x[1:], 5)
    torch.testing.assert_close(path[0, [0, -1]], model.decode(z))
    torch.testing.assert_close(path[0], model.decode(latent_paths.great_circles(z[:1], z[1:], 5)[0]))
    traversed = model.traverse(x[:1], low=-2.0, high=2.0, num_steps=5)
    assert traversed.shape == (3, 5, 12)
    moved = z[0].repeat(5, 1)
    moved[:, 1] = torch.linspace(-2.0, 2.0, 5)
    torch.testing.assert_close(traversed[1], model.decode(moved))
    torch.testing.assert_close(model.traverse()[:, 4], model.decode(torch.zeros(3, 3)))
    with pytest.raises(UserError, match="2 steps or more"):
        model.interpolate(x[:1], x[1:], 1)


def test_held_out_rows_that_cannot_be_are_told_as_others_are():
    """The bound of a pixel of 5 is beyond all others, and would choose the checkpoint."""
    model = small(likelihood="bernoulli")
    batch = Block(torch.full((2, 12), 5.0), torch.arange(2))
    noise = {name: torch.zeros(2, draw.width) for name, draw in model.validation_draws().items()}
    with pytest.raises(UserError, match="x goes from 5 to 5"):
        model.validate(batch, noise)


def test_figures_are_pictures_of_rows_of_steps(tmp_path):
    model = small()
    schema = Schema(columns=("x",), feature_names=tuple(f"p{i}" for i in range(12)), image_shape=(4, 3))
    draw_figures(model, schema, tmp_path, seed=0)
    figures = model.figures(0)
    for name, rows in {"interpolations": vae.NUM_PATHS, "traversals": 3}.items():
        assert figures[name].x_RTD.shape == (rows, vae.NUM_STEPS, 12)
        assert (tmp_path / f"{name}.png").read_bytes() == figure_bytes(figures[name], schema)
        assert torch.equal(figures[name].x_RTD, model.figures(0)[name].x_RTD)


def test_active_units_are_those_that_say_something():
    model, exact = linear()
    model = with_the_exact_posterior(model)
    x = rows_of(exact, 200)
    assert model.active_units(x).tolist() == [True, True]
    with torch.no_grad():
        model.autoencoder.encoder[-1].weight[1] *= 0.01
    assert model.active_units(x).tolist() == [True, False]
