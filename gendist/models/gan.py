"""Generative adversarial network: a generator G makes x of noise z, and a discriminator D learns to tell it from data.

Goodfellow et al. 2014, "Generative Adversarial Nets"; Radford, Metz & Chintala 2016 (DCGAN). Losses and penalties, with their
sources, are in `ops/adversarial.py`.
Legend: N samples, B samples of a micro-batch, D features, L latent dimensions, F features of the discriminator.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from gendist.models.ops import networks
from gendist.models.ops.adversarial import LossName, discriminator_loss, generator_loss, gradient_penalty, r1
from gendist.models.ops.layout import Layout, check_between_0_and_1
from gendist.models.ops.networks import Activation, NetworkConfig
from gendist.models.ops.sums import total_weight, weighted_sum
from gendist.models.ops.tiles import TILE, evaluating, map_in_tiles, rows_in_tiles
from gendist.noise import Noise
from gendist.protocols import Block, Draw, Loss, Phase, UserError, as_tensor

DISCRIMINATOR = Phase("discriminator", "discriminator")
PENALTY = Phase("penalty", "discriminator")
GENERATOR = Phase("generator", "generator")


class DiscriminatorConfig(NetworkConfig):
    """A network whose activations leak unless said otherwise, as in DCGAN: the generator learns by its gradients."""

    activation: Activation = "leaky_relu"


class GenerativeAdversarialNetworkConfig(BaseModel):
    """The `model:` block of a spec of family `gan`.

    latent_dim        of z
    generator         gives as many numbers as x has
    discriminator     gives one number, larger for data; a module of the user's own may have a method features(x) for `encode`
    output            of the generator: tanh, for x from 0 to 1, or linear; where left out, tanh for images alone. With tanh,
                      networks see x as -1 to 1, so that penalties have the units of the papers
    loss              non_saturating, hinge or wasserstein
    penalty           of the discriminator's gradient: r1 at the data, gradient_penalty between data and samples
    penalty_weight    gamma of R1, lambda of WGAN-GP: 10 in both papers
    penalty_every     steps from one penalty to the next, which then is an optimizer step of its own and counts that many times
                      (Karras et al. 2020, "lazy regularization"; their change of learning rate and betas is left to the spec)
    num_critic_steps  steps of the discriminator for one of the generator, each on a global batch of its own
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    latent_dim: int = Field(ge=1)
    generator: NetworkConfig = NetworkConfig()
    discriminator: DiscriminatorConfig = DiscriminatorConfig()
    output: Literal["tanh", "linear"] | None = None
    loss: LossName = "non_saturating"
    penalty: Literal["none", "r1", "gradient_penalty"] = "r1"
    penalty_weight: float = Field(default=10.0, ge=0.0, allow_inf_nan=False)
    penalty_every: int = Field(default=1, ge=1)
    num_critic_steps: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _wasserstein_is_constrained(self) -> Self:
        if self.loss == "wasserstein" and self.penalty == "none":
            raise ValueError("penalty none: loss wasserstein has no minimum without one; choose gradient_penalty")
        return self


@dataclass(frozen=True, eq=False)
class GenerativeAdversarialNetwork:
    """Rows of x are float32, images of 0 to 1 flattened as (H, W[, C]); verbs take such images, too."""

    config: GenerativeAdversarialNetworkConfig
    layout: Layout
    generator: nn.Module
    discriminator: nn.Module
    labels: tuple[Any, ...] = ()

    Config: ClassVar[type[BaseModel]] = GenerativeAdversarialNetworkConfig
    validation_objective: ClassVar[str | None] = None
    not_offered: ClassVar[Mapping[str, str]] = {
        "log_prob": "a generative adversarial network has samples, and no density",
        "elbo": "a generative adversarial network has no density, nor a bound of one",
        "log_prob_bound": "a generative adversarial network has no density, nor a bound of one",
        "classify": "it is fitted without labels",
        "impute": "no network of it leads from x to latents",
        "reconstruct": "no network of it leads from x to latents; encode gives the discriminator's features",
    }

    # Made and kept

    @classmethod
    def create(
        cls, config: GenerativeAdversarialNetworkConfig, x_shape: tuple[int, ...], labels: tuple[Any, ...], seed: int
    ) -> GenerativeAdversarialNetwork:
        """Networks with fresh weights, a function of the seed; UserError where they do not suit x."""
        if labels:
            raise UserError("data.label: a generative adversarial network is fitted without labels; leave data.label out")
        layout = Layout(x_shape)
        latent, shape = (config.latent_dim,), layout.network_shape
        generator = networks.create(config.generator, latent, shape, "model.generator", seed)
        discriminator = networks.create(config.discriminator, shape, (1,), "model.discriminator", seed)
        return cls(config, layout, generator, discriminator)

    def tensors(self) -> dict[str, Tensor]:
        weights = nn.ModuleDict(self.networks()).state_dict()
        return self.layout.tensors() | {name: value.cpu() for name, value in weights.items()}

    @classmethod
    def from_tensors(cls, config: Any, tensors: Mapping[str, Tensor], labels: tuple[Any, ...]) -> GenerativeAdversarialNetwork:
        layout = Layout.from_tensors(tensors)
        latent, shape = (config.latent_dim,), layout.network_shape
        generator = networks.build(config.generator, latent, shape, "model.generator")
        discriminator = networks.build(config.discriminator, shape, (1,), "model.discriminator")
        model = cls(config, layout, generator, discriminator, labels)
        networks.load(nn.ModuleDict(model.networks()), {name: value for name, value in tensors.items() if name != "x_shape"})
        return model

    @property
    def num_features(self) -> int:
        return self.layout.num_features

    @property
    def _is_bounded(self) -> bool:
        return self.config.output == "tanh" or (self.config.output is None and self.layout.is_image)

    # Samples and representations

    def sample(self, num_samples: int, *, seed: int = 0, offset: int = 0, given: Any = None) -> Tensor:
        """(num_samples, D) rows offset.. of the endless sample that belongs to the seed: G of standard normal z."""
        if given is not None:
            raise UserError(
                f"given {given!r}: a generative adversarial network is fitted without labels, and has no conditions"
            )

        def tile(first: int) -> Tensor:
            z_TL = Noise(seed, "sample.latent").normal(first, TILE, self.config.latent_dim).float()
            return self._rows(self._generated(z_TL.to(_device(self.generator))))

        with evaluating(self.generator):
            return rows_in_tiles(tile, offset, num_samples)

    def decode(self, z: Any) -> Tensor:
        """(N, D) G(z) of latents (N, L), whose distribution is standard normal; `encode` does not lead to them."""
        z_NL = as_tensor(z, torch.float32)
        if z_NL.ndim != 2 or z_NL.shape[1] != self.config.latent_dim:
            raise UserError(f"decode takes latents of shape (N, {self.config.latent_dim}), not {tuple(z_NL.shape)}")
        with evaluating(self.generator):
            return map_in_tiles(lambda _, z_TL: self._rows(self._generated(z_TL)), z_NL, _device(self.generator))

    def encode(self, x: Any) -> Tensor:
        """(N, F) the features that the discriminator's last layer is given."""
        x_ND = self.layout.rows(x)
        features = getattr(self.discriminator, "features", None)
        if features is None:
            raise UserError(f"encode: {self.config.discriminator.module} has no method features(x)")
        with evaluating(self.discriminator):
            return map_in_tiles(lambda _, x_TD: features(self._seen(x_TD)).flatten(1), x_ND, _device(self.discriminator))

    def _seen(self, x_BD: Tensor) -> Tensor:
        """Rows as networks see them."""
        if not self._is_bounded:
            return self.layout.to_network(x_BD)
        check_between_0_and_1(x_BD, "model.output: tanh makes 0 to 1: rescale the columns, or choose linear")
        return self.layout.to_network(2.0 * x_BD - 1.0)

    def _generated(self, z_BL: Tensor) -> Tensor:
        """G(z), as networks see samples."""
        y = self.generator(z_BL)
        return torch.tanh(y) if self._is_bounded else y

    def _rows(self, y: Tensor) -> Tensor:
        """The inverse of `_seen`."""
        y_BD = self.layout.to_rows(y)
        return 0.5 * (y_BD + 1.0) if self._is_bounded else y_BD

    # Fitted by gradient

    def networks(self) -> Mapping[str, nn.Module]:
        return {"generator": self.generator, "discriminator": self.discriminator}

    def phases(self, step: int) -> Sequence[Phase]:
        phases = [DISCRIMINATOR]
        if self._is_lazy and step % self.config.penalty_every == 0:
            phases.append(PENALTY)
        if (step + 1) % self.config.num_critic_steps == 0:
            phases.append(GENERATOR)
        return phases

    @property
    def _is_lazy(self) -> bool:
        return self.config.penalty != "none" and self.config.penalty_every > 1

    def _has_penalty(self, phase: Phase) -> bool:
        return phase == PENALTY or (phase == DISCRIMINATOR and self.config.penalty != "none" and not self._is_lazy)

    def draws(self, phase: Phase) -> Mapping[str, Draw]:
        draws = {}
        if phase != PENALTY or self.config.penalty == "gradient_penalty":
            draws["latent"] = Draw("normal", self.config.latent_dim)
        if self._has_penalty(phase) and self.config.penalty == "gradient_penalty":
            draws["interpolation"] = Draw("uniform", 1)
        return draws

    def counts(self, phase: Phase, batch: Block) -> Mapping[str, float]:
        """The weights of rows are those of the data: samples of the generator count once each."""
        if phase == GENERATOR:
            return {"generator": float(batch.num_rows)}
        counts = {} if phase == PENALTY else {"real": total_weight(batch), "fake": float(batch.num_rows)}
        return counts | ({"penalty": total_weight(batch)} if self._has_penalty(phase) else {})

    def loss(self, phase: Phase, batch: Block, noise: Mapping[str, Tensor], step: int) -> Loss:
        if phase == GENERATOR:
            fake_B = self._logits(self._generated(noise["latent"]))
            return Loss({"generator": generator_loss(self.config.loss, fake_B).sum()})
        real = self._seen(batch.x)
        with torch.no_grad():
            fake = self._generated(noise["latent"]) if "latent" in noise else None
        terms: dict[str, Tensor] = {}
        watched: dict[str, Tensor] = {}
        if phase == DISCRIMINATOR:
            assert fake is not None
            real_B, fake_B = self._logits(real), self._logits(fake)
            of_real_B, of_fake_B = discriminator_loss(self.config.loss, real_B, fake_B)
            terms = {"real": weighted_sum(of_real_B, batch), "fake": of_fake_B.sum()}
            # D is right about all at 1, and no better than a coin at 0.5.
            right_B = 0.5 * ((real_B > 0).float() + (fake_B < 0).float())
            watched = {"real_logit": real_B.detach().sum(), "fake_logit": fake_B.detach().sum(), "accuracy": right_B.sum()}
        if self._has_penalty(phase):
            if self.config.penalty == "r1":
                penalty_B = r1(self.discriminator, real)
            else:
                assert fake is not None
                penalty_B = gradient_penalty(self.discriminator, real, fake, noise["interpolation"])
            # A penalty that comes with every n-th step counts n times (Karras et al. 2020, appendix B).
            weight = self.config.penalty_weight * self.config.penalty_every
            terms["penalty"] = weight * weighted_sum(penalty_B, batch)
        return Loss(terms, watched)

    def _logits(self, y: Tensor) -> Tensor:
        return self.discriminator(y).float().flatten()

    def validation_draws(self) -> Mapping[str, Draw]:
        return {}

    def validate(self, batch: Block, noise: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return {}  # no number that D or G gives on held-out samples tells a better G

    def needs_whole_batch(self, phase: Phase) -> str | None:
        return None


def _device(network: nn.Module) -> torch.device:
    return next(network.parameters()).device


Model = GenerativeAdversarialNetwork
