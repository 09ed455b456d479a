"""Variational autoencoder: p(x) = integral of p(x | z) N(z | 0, I) dz, with an encoder q(z | x) that proposes z.

Kingma & Welling 2014, "Auto-Encoding Variational Bayes" (AEVB); Burda, Grosse & Salakhutdinov 2016, "Importance Weighted
Autoencoders" (IWAE). Legend: N samples, B samples of a micro-batch, D features, L latent dimensions, K importance samples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from gendist.models.ops import networks
from gendist.models.ops.layout import Layout
from gendist.models.ops.likelihoods import Likelihood, LikelihoodName, likelihood_of
from gendist.models.ops.networks import NetworkConfig
from gendist.models.ops.sums import total_weight, weighted_sum
from gendist.models.ops.tiles import TILE, evaluating, map_in_tiles, rows_in_tiles
from gendist.noise import Noise
from gendist.protocols import Block, Draw, Loss, Phase, UserError, as_tensor

TRAINING = Phase("autoencoder", "autoencoder")


class VariationalAutoencoderConfig(BaseModel):
    """The `model:` block of a spec of family `vae`.

    latent_dim  of z
    encoder     of q(z | x): gives the mean and the log variance, 2 latent_dim numbers
    decoder     of p(x | z): gives as many numbers as x has
    likelihood  bernoulli: x from 0 to 1; gaussian: any x, with one standard deviation for all features
    scale       of gaussian: that standard deviation, in units of x; learned where left out
    beta        weight of the KL divergence in the training loss (Higgins et al. 2017); 1 is the ELBO
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    latent_dim: int = Field(ge=1)
    encoder: NetworkConfig = NetworkConfig()
    decoder: NetworkConfig = NetworkConfig()
    likelihood: LikelihoodName = "bernoulli"
    scale: float | None = Field(default=None, gt=0.0, allow_inf_nan=False)
    beta: float = Field(default=1.0, ge=0.0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _only_a_gaussian_has_a_scale(self) -> Self:
        if self.scale is not None and self.likelihood != "gaussian":
            raise ValueError(f"scale: likelihood {self.likelihood} has none; leave it out, or choose gaussian")
        return self


class Autoencoder(nn.Module):
    """Encoder, decoder and likelihood: one network to an engine, called as a whole in training."""

    def __init__(self, encoder: nn.Module, decoder: nn.Module, likelihood: Likelihood, layout: Layout):
        super().__init__()
        self.encoder, self.decoder, self.likelihood, self.layout = encoder, decoder, likelihood, layout

    def forward(self, x_BD: Tensor, noise_BL: Tensor) -> tuple[Tensor, Tensor]:
        """(B,) log p(x | z) for one z of q(z | x), and (B,) KL(q(z | x) || p(z)), the two terms of the ELBO (AEVB eq. 10)."""
        mean_BL, log_variance_BL = self.posterior(x_BD)
        z_BL = mean_BL + torch.exp(0.5 * log_variance_BL) * noise_BL
        return self.likelihood(x_BD, self.decoded(z_BL)), kl(mean_BL, log_variance_BL)

    def posterior(self, x_BD: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of q(z | x), (B, L) each (AEVB eq. 9)."""
        mean_BL, log_variance_BL = self.encoder(self.layout.to_network(x_BD)).float().chunk(2, dim=1)
        return mean_BL, log_variance_BL

    def decoded(self, z_BL: Tensor) -> Tensor:
        """(B, D) what the likelihood makes p(x | z) of."""
        return self.layout.to_rows(self.decoder(z_BL))


def kl(mean_BL: Tensor, log_variance_BL: Tensor) -> Tensor:
    """(B,) KL(N(mean, variance) || N(0, I)) in nats (AEVB appendix B)."""
    return -0.5 * (1.0 + log_variance_BL - mean_BL.square() - log_variance_BL.exp()).sum(1)


def log_normal(z_BL: Tensor) -> Tensor:
    """(B,) log N(z | 0, I)."""
    return -0.5 * (z_BL.square() + math.log(2.0 * math.pi)).sum(1)


@dataclass(frozen=True, eq=False)
class VariationalAutoencoder:
    """Rows of x are float32, images of 0 to 1 flattened as (H, W[, C]); verbs take such images, too."""

    config: VariationalAutoencoderConfig
    layout: Layout
    autoencoder: Autoencoder
    labels: tuple[Any, ...] = ()

    Config: ClassVar[type[BaseModel]] = VariationalAutoencoderConfig
    validation_objective: ClassVar[str | None] = "loss"
    not_offered: ClassVar[Mapping[str, str]] = {
        "log_prob": "the integral over z has no closed form: use elbo, or log_prob_bound, which comes as close as one likes",
        "classify": "it is fitted without labels",
        "impute": "it takes complete rows only; reconstruct gives the mean of x that the latents of a whole row lead to",
    }

    # Made and kept

    @classmethod
    def create(
        cls, config: VariationalAutoencoderConfig, x_shape: tuple[int, ...], labels: tuple[Any, ...], seed: int
    ) -> VariationalAutoencoder:
        """Networks with fresh weights, a function of the seed; UserError where they do not suit x."""
        if labels:
            raise UserError("data.label: a variational autoencoder is fitted without labels; leave data.label out")
        layout = Layout(x_shape)
        latents, shape = config.latent_dim, layout.network_shape
        encoder = networks.create(config.encoder, shape, (2 * latents,), "model.encoder", seed)
        decoder = networks.create(config.decoder, (latents,), shape, "model.decoder", seed)
        return cls(config, layout, Autoencoder(encoder, decoder, likelihood_of(config.likelihood, config.scale), layout))

    def tensors(self) -> dict[str, Tensor]:
        return self.layout.tensors() | {name: value.cpu() for name, value in self.autoencoder.state_dict().items()}

    @classmethod
    def from_tensors(cls, config: Any, tensors: Mapping[str, Tensor], labels: tuple[Any, ...]) -> VariationalAutoencoder:
        layout = Layout.from_tensors(tensors)
        latents, shape = config.latent_dim, layout.network_shape
        encoder = networks.build(config.encoder, shape, (2 * latents,), "model.encoder")
        decoder = networks.build(config.decoder, (latents,), shape, "model.decoder")
        autoencoder = Autoencoder(encoder, decoder, likelihood_of(config.likelihood, config.scale), layout)
        networks.load(autoencoder, {name: value for name, value in tensors.items() if name != "x_shape"})
        return cls(config, layout, autoencoder, labels)

    @property
    def num_features(self) -> int:
        return self.layout.num_features

    @property
    def _device(self) -> torch.device:
        return next(self.autoencoder.parameters()).device

    # Density

    def elbo(self, x: Any, seed: int = 0, offset: int = 0) -> Tensor:
        """(N,) float64, in nats: log p(x | z) - KL(q(z | x) || p(z)), whose mean over z of q(z | x) is below log p(x).

        One z a row, the one that belongs to the seed and the row's number, offset.. in the order of x.
        """

        def elbo_of(first: int, x_TD: Tensor) -> Tensor:
            noise_TL = self._noise(seed, "elbo", offset + first, x_TD)
            log_prob_T, kl_T = self.autoencoder(x_TD, noise_TL)
            return log_prob_T.double() - kl_T.double()

        return self._map(elbo_of, x)

    def log_prob_bound(self, x: Any, num_samples: int = 100, seed: int = 0, offset: int = 0) -> Tensor:
        """(N,) float64, in nats: log of the mean of p(x, z_k) / q(z_k | x) over K z_k of q(z | x) (IWAE eq. 8).

        Its mean is below log p(x), rises with num_samples and comes to log p(x) in the end.
        """
        if num_samples < 1:
            raise UserError(f"num_samples {num_samples}; 1 or more is needed")

        def bound_of(first: int, x_TD: Tensor) -> Tensor:
            mean_TL, log_variance_TL = self.autoencoder.posterior(x_TD)
            log_weights = []
            for k in range(num_samples):
                noise_TL = self._noise(seed, f"log_prob_bound.{k}", offset + first, x_TD)
                z_TL = mean_TL + torch.exp(0.5 * log_variance_TL) * noise_TL
                log_prob_T = self.autoencoder.likelihood(x_TD, self.autoencoder.decoded(z_TL))
                log_q_T = log_normal(noise_TL) - 0.5 * log_variance_TL.sum(1)
                log_weights.append(log_prob_T.double() + log_normal(z_TL).double() - log_q_T.double())
            return torch.logsumexp(torch.stack(log_weights), 0) - math.log(num_samples)

        return self._map(bound_of, x)

    # Representation

    def encode(self, x: Any) -> Tensor:
        """(N, L) the mean of q(z | x)."""
        return self._map(lambda _, x_TD: self.autoencoder.posterior(x_TD)[0], x)

    def decode(self, z: Any) -> Tensor:
        """(N, D) the mean of p(x | z) of latents (N, L)."""
        z_NL = as_tensor(z, torch.float32)
        if z_NL.ndim != 2 or z_NL.shape[1] != self.config.latent_dim:
            raise UserError(f"decode takes latents of shape (N, {self.config.latent_dim}), not {tuple(z_NL.shape)}")
        with evaluating(self.autoencoder):
            return map_in_tiles(lambda _, z_TL: self._mean(z_TL), z_NL, self._device)

    def reconstruct(self, x: Any) -> Tensor:
        """(N, D) the mean of p(x | z) at the mean of q(z | x)."""
        return self.decode(self.encode(x))

    def sample(self, num_samples: int, *, seed: int = 0, offset: int = 0, given: Any = None, mean: bool = True) -> Tensor:
        """(num_samples, D) rows offset.. of the endless sample that belongs to the seed.

        mean  whether a row is the mean of p(x | z), as is usual for images, or a draw from it, which has the noise of the
              likelihood: then rows are samples of p(x)
        """
        if given is not None:
            raise UserError(f"given {given!r}: a variational autoencoder is fitted without labels, and has no conditions")

        def tile(first: int) -> Tensor:
            z_TL = Noise(seed, "sample.latent").normal(first, TILE, self.config.latent_dim).float().to(self._device)
            if mean:
                return self._mean(z_TL)
            uniform_TD = Noise(seed, "sample.x").uniform(first, TILE, self.num_features).to(self._device)
            return self.autoencoder.likelihood.draw(self.autoencoder.decoded(z_TL), uniform_TD)

        with evaluating(self.autoencoder):
            return rows_in_tiles(tile, offset, num_samples)

    def _mean(self, z_TL: Tensor) -> Tensor:
        return self.autoencoder.likelihood.mean(self.autoencoder.decoded(z_TL))

    def _noise(self, seed: int, purpose: str, first: int, like: Tensor) -> Tensor:
        return Noise(seed, purpose).normal(first, len(like), self.config.latent_dim).to(like)

    def _map(self, function: Any, x: Any) -> Tensor:
        x_ND = self.layout.rows(x)
        self.autoencoder.likelihood.check(x_ND)
        with evaluating(self.autoencoder):
            return map_in_tiles(function, x_ND, self._device)

    # Fitted by gradient

    def networks(self) -> Mapping[str, nn.Module]:
        return {"autoencoder": self.autoencoder}

    def phases(self, step: int) -> Sequence[Phase]:
        return (TRAINING,)

    def draws(self, phase: Phase) -> Mapping[str, Draw]:
        return self.validation_draws()

    def counts(self, phase: Phase, batch: Block) -> Mapping[str, float]:
        return dict.fromkeys(("reconstruction", "weighted_kl"), total_weight(batch))

    def loss(self, phase: Phase, batch: Block, noise: Mapping[str, Tensor], step: int) -> Loss:
        """The negative ELBO (AEVB eq. 10) with one z a sample and, where beta is not 1, its KL divergence weighed."""
        self.autoencoder.likelihood.check(batch.x)
        log_prob_B, kl_B = self.autoencoder(batch.x, noise["latent"])
        terms = {"reconstruction": -log_prob_B, "weighted_kl": self.config.beta * kl_B}
        watched = {"kl": kl_B, "negative_elbo": kl_B - log_prob_B}
        return Loss(
            {name: weighted_sum(value_B, batch) for name, value_B in terms.items()},
            {name: value_B.detach().sum() for name, value_B in watched.items()},
        )

    def validation_draws(self) -> Mapping[str, Draw]:
        return {"latent": Draw("normal", self.config.latent_dim)}

    def validate(self, batch: Block, noise: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """loss: what is minimised, which is the negative ELBO where beta is 1."""
        log_prob_B, kl_B = self.autoencoder(batch.x, noise["latent"])
        loss_B = self.config.beta * kl_B - log_prob_B
        values = {"loss": loss_B, "negative_elbo": kl_B - log_prob_B, "reconstruction": -log_prob_B, "kl": kl_B}
        return {name: weighted_sum(value_B, batch) for name, value_B in values.items()}

    def needs_whole_batch(self, phase: Phase) -> str | None:
        return None


Model = VariationalAutoencoder
