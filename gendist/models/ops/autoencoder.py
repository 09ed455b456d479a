"""The network of a variational autoencoder, and what it knows of a sample: the terms of every bound of log p(x).

With labels, encoder and decoder are given the class: q(z | x, y) and p(x | z, y). It stands behind the features of x and behind
z as one-hot numbers; behind the channels of an image, which convolutions and modules of the user's own take, as planes.
Legend: B samples, D features, L latent dimensions, K importance samples, C classes, P numbers of a feature's distribution.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from gendist.models.ops.layout import Layout
from gendist.models.ops.likelihoods import Likelihood
from gendist.models.ops.networks import NetworkConfig

# Of q(z | x): beyond it a log variance grows with the logarithm of what the encoder gives, since its exponential would
# overflow for x far from all that it was trained on, and any q gives a bound. Beside a prior of variance 1, no q is so wide.
WIDE_LOG_VARIANCE = 10.0


class Terms(NamedTuple):
    """Of each sample.

    log_prob     (B, K) log p(x | z) for K latents z of q(z | x)
    kl           (B, L) KL(q(z | x) || p(z)) of each latent dimension, which add up
    log_weights  (B, K) log p(x, z) / q(z | x) of these z: the logarithms of the importance weights (IWAE eq. 8)
    """

    log_prob: Tensor
    kl: Tensor
    log_weights: Tensor

    def elbo(self) -> Tensor:
        """(B,) AEVB eq. 10, with a mean over the K latents."""
        return self.log_prob.mean(1) - self.kl.sum(1)

    def importance_weighted_bound(self) -> Tensor:
        """(B,) IWAE eq. 8: the log of the mean importance weight."""
        return torch.logsumexp(self.log_weights, 1) - math.log(self.log_weights.shape[1])


class Shapes(NamedTuple):
    """What the networks of an autoencoder are given and give, of one sample."""

    encoder_input: tuple[int, ...]
    encoder_output: tuple[int, ...]
    decoder_input: tuple[int, ...]
    decoder_output: tuple[int, ...]


class Autoencoder(nn.Module):
    """Encoder, decoder, likelihood and, if any, the classifier q(y | x): one network to an engine, called as a whole."""

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        classifier: nn.Module | None,
        likelihood: Likelihood,
        layout: Layout,
        num_classes: int,
        has_planes: bool,
    ):
        super().__init__()
        self.encoder, self.decoder, self.likelihood, self.layout = encoder, decoder, likelihood, layout
        self.classifier = classifier
        self.num_classes, self.has_planes = num_classes, has_planes

    def forward(
        self, x_BD: Tensor, noise_BKL: Tensor, rows_P: Tensor | None = None, classes_P: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """The three `Terms`, and log q(y | x), (B, C), where there is a classifier.

        rows_P, classes_P  the pairs of a row of x and a class that the terms are of, with labels; else they are of the rows.
                           Pairs of a row share its noise
        """
        log_q_BC = None if self.classifier is None else self.log_q(x_BD)
        if rows_P is not None:
            x_BD, noise_BKL = x_BD[rows_P], noise_BKL[rows_P]
        return *self.terms(x_BD, noise_BKL, classes_P), log_q_BC

    def terms(
        self,
        x_BD: Tensor,
        noise_BKL: Tensor,
        classes_B: Tensor | None,
        log_prior: Callable[[Tensor], Tensor] | None = None,
    ) -> Terms:
        """The encoder is computed once, the decoder for each of the K latents. log_prior: log p(z) of latents (B K, L), for the
        importance weights; None: of the standard normal."""
        mean_BL, log_variance_BL = self.posterior(x_BD, classes_B)
        z_BKL = mean_BL[:, None] + torch.exp(0.5 * log_variance_BL)[:, None] * noise_BKL
        num_latents = z_BKL.shape[1]
        classes_BK = None if classes_B is None else classes_B.repeat_interleave(num_latents)
        y_BKD = self.decoded(z_BKL.flatten(0, 1), classes_BK).unflatten(0, (-1, num_latents))
        log_prob_BK = self.likelihood(x_BD[:, None], y_BKD)
        log_q_BK = log_normal(noise_BKL) - 0.5 * log_variance_BL.sum(1, keepdim=True)
        log_prior_BK = log_normal(z_BKL) if log_prior is None else log_prior(z_BKL.flatten(0, 1)).view_as(log_q_BK)
        return Terms(log_prob_BK, kl(mean_BL, log_variance_BL), log_prob_BK + log_prior_BK - log_q_BK)

    def posterior(self, x_BD: Tensor, classes_B: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean and log variance of q(z | x), or q(z | x, y), (B, L) each (AEVB eq. 9)."""
        mean_BL, log_variance_BL = self.encoder(self._seen(x_BD, classes_B)).float().chunk(2, dim=1)
        excess_BL = functional.relu(log_variance_BL - WIDE_LOG_VARIANCE)
        return mean_BL, log_variance_BL.clamp(max=WIDE_LOG_VARIANCE) + torch.log1p(excess_BL)

    def decoded(self, z_BL: Tensor, classes_B: Tensor | None = None) -> Tensor:
        """(B, P D) what the likelihood makes p(x | z), or p(x | z, y), of: the first number of all features, then the next."""
        if classes_B is not None:
            z_BL = torch.cat([z_BL, functional.one_hot(classes_B, self.num_classes).to(z_BL)], 1)
        y = self.decoder(z_BL)
        numbers = self.likelihood.numbers_per_feature
        y = y.unflatten(1, (numbers, -1)).flatten(0, 1)
        return self.layout.to_rows(y).reshape(-1, numbers * self.layout.num_features)

    def log_q(self, x_BD: Tensor) -> Tensor:
        """(B, C) log q(y | x)."""
        assert self.classifier is not None
        return torch.log_softmax(self.classifier(self.layout.to_network(x_BD)).float(), 1)

    def _seen(self, x_BD: Tensor, classes_B: Tensor | None) -> Tensor:
        """What the encoder is given."""
        if classes_B is None:
            return self.layout.to_network(x_BD)
        one_hot_BC = functional.one_hot(classes_B, self.num_classes).to(x_BD)
        if not self.has_planes:
            return torch.cat([x_BD, one_hot_BC], 1)
        x = self.layout.to_network(x_BD)
        return torch.cat([x, one_hot_BC[:, :, None, None].expand(-1, -1, *x.shape[2:])], 1)


def takes_planes(encoder: NetworkConfig, layout: Layout) -> bool:
    """Whether an encoder has the class as planes of an image, and not as features behind the pixels."""
    is_fully_connected = encoder.module is None and encoder.channels is None
    return layout.is_image and not is_fully_connected


def shapes(layout: Layout, latent_dim: int, num_classes: int, has_planes: bool, numbers_per_feature: int) -> Shapes:
    first, *rest = layout.network_shape
    seen: tuple[int, ...] = (first, *rest)
    if num_classes:
        seen = (first + num_classes, *rest) if has_planes else (layout.num_features + num_classes,)
    return Shapes(seen, (2 * latent_dim,), (latent_dim + num_classes,), (first * numbers_per_feature, *rest))


def kl(mean_BL: Tensor, log_variance_BL: Tensor) -> Tensor:
    """(B, L) KL(N(mean, variance) || N(0, 1)) in nats (AEVB appendix B)."""
    return -0.5 * (1.0 + log_variance_BL - mean_BL.square() - log_variance_BL.exp())


def log_normal(z_BL: Tensor) -> Tensor:
    """(...,) log N(z | 0, I) of z (..., L)."""
    return -0.5 * (z_BL.square() + math.log(2.0 * math.pi)).sum(-1)
