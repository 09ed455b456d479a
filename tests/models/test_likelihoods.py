"""The discretized logistic mixture against sums over all levels, and against the differences of distribution functions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gendist.models.ops.likelihoods import DiscretizedLogisticMixture
from gendist.models.vae import VariationalAutoencoder, VariationalAutoencoderConfig
from gendist.noise import Noise
from gendist.protocols import UserError

NUM_FEATURES, NUM_MIXTURES = 6, 3


def output(num_rows: int = 4, seed: int = 0) -> torch.Tensor:
    """What a decoder might give, of narrow logistics and wide ones, inside and outside of -1 to 1."""
    y = torch.randn(num_rows, 3, NUM_MIXTURES, NUM_FEATURES, generator=torch.Generator().manual_seed(seed))
    y[:, 2] = 2.0 * y[:, 2] - 3.0
    return y.flatten(1)


def levels_of(likelihood: DiscretizedLogisticMixture) -> torch.Tensor:
    return torch.linspace(0.0, 1.0, likelihood.num_levels)


def probs(likelihood: DiscretizedLogisticMixture, y: torch.Tensor) -> torch.Tensor:
    """(levels, rows, D) p of every level, of each feature alone."""
    parts = y.unflatten(1, (3 * NUM_MIXTURES, NUM_FEATURES))
    levels = levels_of(likelihood)[:, None, None]
    return torch.stack([likelihood(levels, parts[:, :, d]) for d in range(NUM_FEATURES)], 2).double().exp()


@pytest.mark.parametrize("num_levels", [2, 17, 256])
def test_the_probabilities_of_all_levels_sum_to_1(num_levels):
    likelihood = DiscretizedLogisticMixture(NUM_MIXTURES, num_levels)
    np.testing.assert_allclose(probs(likelihood, output()).sum(0), 1.0, atol=2e-6)


def test_the_probability_is_a_difference_of_distribution_functions():
    likelihood, y = DiscretizedLogisticMixture(NUM_MIXTURES, 256), output()
    logits, means, log_scales = y.double().unflatten(1, (3, NUM_MIXTURES, NUM_FEATURES)).unbind(1)
    edges = torch.cat([torch.tensor([-torch.inf]), (2 * torch.arange(255) + 1) / 255 - 1, torch.tensor([torch.inf])]).double()
    below = torch.sigmoid((edges[:, None, None, None] - means) / log_scales.clamp_min(-7.0).exp())
    expected = (logits.softmax(1) * below.diff(dim=0)).sum(2)
    np.testing.assert_allclose(probs(likelihood, y), expected, rtol=2e-4, atol=1e-9)


def test_features_are_independent_and_leading_axes_are_broadcast():
    likelihood, y = DiscretizedLogisticMixture(NUM_MIXTURES, 17), output(8)
    x = levels_of(likelihood)[torch.randint(0, 17, (2, NUM_FEATURES), generator=torch.Generator().manual_seed(1))]
    together = likelihood(x[:, None], y.view(2, 4, -1))
    assert together.shape == (2, 4)
    torch.testing.assert_close(together.flatten(), likelihood(x.repeat_interleave(4, 0), y))
    at = probs(likelihood, y)
    index = (16 * x.repeat_interleave(4, 0)).round().long()
    expected = at.gather(0, index[None])[0].log().sum(1)
    np.testing.assert_allclose(together.flatten(), expected, rtol=1e-4)


def test_a_probability_far_out_is_finite_and_has_a_gradient():
    likelihood = DiscretizedLogisticMixture(1, 256)
    y = torch.tensor([[0.0, -1.0, -6.5]], requires_grad=True)
    log_prob = likelihood(torch.tensor([[0.9]]), y)
    log_prob.sum().backward()
    assert float(log_prob.detach()) < -100.0
    assert bool(log_prob.isfinite().all())
    assert bool(y.grad.isfinite().all())
    assert float(y.grad[0, 1]) > 0.0


@pytest.mark.parametrize("log_scale", [-1e3, 50.0, 1e3])
def test_scales_beyond_all_measure_have_probabilities_means_and_gradients(log_scale):
    likelihood = DiscretizedLogisticMixture(num_mixtures=1, num_levels=256)
    y = torch.tensor([[0.0] * 3 + [0.1] * 3 + [log_scale] * 3], requires_grad=True)
    log_prob = likelihood(torch.tensor([[0.0, 128 / 255, 1.0]]), y)
    log_prob.sum().backward()
    for found in (log_prob, y.grad):
        assert bool(found.isfinite().all())
    # The logistic's mean where it is narrow, the middle of all levels where it is wide.
    np.testing.assert_allclose(likelihood.mean(y).detach(), 0.55 if log_scale < 0 else 0.5, atol=0.02)


def test_draws_have_the_probabilities_of_the_levels():
    likelihood, y = DiscretizedLogisticMixture(NUM_MIXTURES, 17), output(1)
    uniform = torch.rand(40_000, NUM_FEATURES, generator=torch.Generator().manual_seed(2))
    x = likelihood.draw(y.expand(40_000, -1), uniform)
    likelihood.check(x)
    counted = torch.stack([(x * 16).round().eq(level).double().mean(0) for level in range(17)])
    np.testing.assert_allclose(counted, probs(likelihood, y)[:, 0], atol=0.012)


def test_the_mean_is_that_of_the_levels_up_to_half_a_step():
    likelihood, y = DiscretizedLogisticMixture(NUM_MIXTURES, 256), output()
    exact = (levels_of(likelihood).double()[:, None, None] * probs(likelihood, y)).sum(0)
    np.testing.assert_allclose(likelihood.mean(y), exact, atol=0.5 / 255 + 1e-5)


@pytest.mark.parametrize("shape", [(12,), (4, 6), (4, 6, 3)])
@pytest.mark.parametrize("network", [{"hidden_sizes": [8]}, {"channels": [4, 5]}])
def test_a_decoder_gives_the_numbers_of_each_feature(shape, network):
    if len(shape) == 1 and "channels" in network:
        return
    config = VariationalAutoencoderConfig(
        latent_dim=2, decoder=network, likelihood="discretized_logistic_mixture", num_mixtures=2, num_levels=17
    )
    model = VariationalAutoencoder.create(config, shape, (), 0)
    x = model.sample(5, mean=False)
    assert x.shape == (5, model.num_features)
    bound = model.elbo(x)
    # Of pixel (h, w, c), component m: the channel (3 M) of the decoder's output that is its logit, mean or log scale.
    z = model.encode(x)
    y = model.autoencoder.decoder(z).unflatten(1, (6, -1))
    if len(shape) > 1:
        y = y.permute(0, 1, 3, 4, 2)
    expected = model.autoencoder.likelihood(x, y.reshape(5, -1))
    torch.testing.assert_close(model.autoencoder.likelihood(x, model.autoencoder.decoded(z)), expected)
    assert bool(bound.isfinite().all())
    torch.testing.assert_close(model.decode(z), model.autoencoder.likelihood.mean(y.reshape(5, -1)).detach())


def test_x_between_levels_is_refused():
    likelihood = DiscretizedLogisticMixture(2, 17)
    likelihood.check(Noise(0, "x").uniform(0, 5, 4).mul(16).round().div(16).float())
    with pytest.raises(UserError, match=r"x holds 0.51; .* takes 17 levels"):
        likelihood.check(torch.tensor([[0.5, 0.51]]))
    with pytest.raises(UserError, match="from 0 to 2"):
        likelihood.check(torch.tensor([[0.0, 2.0]]))
