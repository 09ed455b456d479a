"""The `model:` block of a generative adversarial network. Sources as in `gendist/models/gan.py`."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from gendist.models.ops.adversarial import LossName
from gendist.models.ops.augmentation import AugmentationName
from gendist.models.ops.layers import Activation, LayerKinds
from gendist.models.ops.networks import NetworkConfig


class DiscriminatorConfig(NetworkConfig):
    """A network whose activations leak unless said otherwise, as in DCGAN: the generator learns by its gradients.

    input_noise   standard deviation of the normal noise that is added, while D or G is trained, to what D is given, and
    hidden_noise  to what each of its further layers is given; of fully connected layers. Salimans et al. 2016: 0.3 of x from 0
                  to 1, which are 0.6 of images as D sees them, and 0.5
    weight_norm   of fully connected layers but the last: divide the weights of each unit by their norm, so that these noises
                  keep their meaning whatever D learns
    """

    activation: Activation = "leaky_relu"
    input_noise: float = Field(default=0.0, ge=0.0, allow_inf_nan=False)
    hidden_noise: float = Field(default=0.0, ge=0.0, allow_inf_nan=False)
    weight_norm: bool = False

    @model_validator(mode="after")
    def _noise_is_of_fully_connected_layers(self) -> Self:
        if self.weight_norm and self.spectral_norm:
            raise ValueError("weight_norm and spectral_norm are given; a weight is divided by one of them")
        for name in ("input_noise", "hidden_noise", "weight_norm"):
            if getattr(self, name) > 0 and (self.channels is not None or self.module is not None):
                raise ValueError(f"{name} is of fully connected layers; give hidden_sizes, or leave it out")
        return self

    @property
    def has_noise(self) -> bool:
        return self.input_noise > 0.0 or self.hidden_noise > 0.0

    @property
    def layer_kinds(self) -> LayerKinds:
        return replace(
            super().layer_kinds, input_noise=self.input_noise, hidden_noise=self.hidden_noise, weight_norm=self.weight_norm
        )


class GenerativeAdversarialNetworkConfig(BaseModel):
    """The `model:` block of a spec of family `gan`.

    latent_dim        of z
    labels            what is made of data.label, which names the classes. condition (the default): every row has a label, and
                      G and D are given it. semi_supervised: a few rows have one, D learns to tell the classes (`classify`), and
                      G, without classes, makes it better at that
    generator         is given z, and with a condition the class, one-hot, behind it; gives as many numbers as x has
    discriminator     gives one number, larger for data; with a condition one more for each class, of which that of the sample's
                      class is added; semi_supervised: one for each class. A module of the user's own may have a method
                      features(x), what its last layer is given: for `encode`, and semi_supervised, which needs it
    output            of the generator: tanh, for x from 0 to 1, or linear; where left out, tanh for images alone. With tanh,
                      networks see x as -1 to 1, so that penalties have the units of the papers
    loss              non_saturating, hinge or wasserstein
    penalty           of the discriminator's gradient: r1 at the data, gradient_penalty between data and samples
    penalty_weight    gamma of R1, lambda of WGAN-GP: 10 in both papers
    penalty_every     steps from one penalty to the next, which then is an optimizer step of its own and counts that many times
                      (Karras et al. 2020, "lazy regularization"; their change of learning rate and betas is left to the spec)
    feature_matching  of semi_supervised: batch: of means over a global batch, which then is one micro-batch of one process.
                      pairs: of two samples with each row; for any number of processes, at twice the work for G
    augmentation      of images, of data and samples alike, in this order: color, translation, cutout
    consistency_weight  of semi_supervised: of the squared difference between the class probabilities that D gives two
                      augmentations of a row, with noise of their own (Laine & Aila 2017, the Pi-model, whose target has a
                      gradient here, too): classes then are what augmentation does not change, of rows without a label as well
    num_critic_steps  steps of the discriminator for one of the generator, each on a global batch of its own
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    latent_dim: int = Field(ge=1)
    labels: Literal["condition", "semi_supervised"] | None = None
    generator: NetworkConfig = NetworkConfig()
    discriminator: DiscriminatorConfig = DiscriminatorConfig()
    output: Literal["tanh", "linear"] | None = None
    loss: LossName = "non_saturating"
    penalty: Literal["none", "r1", "gradient_penalty"] = "r1"
    penalty_weight: float = Field(default=10.0, ge=0.0, allow_inf_nan=False)
    penalty_every: int = Field(default=1, ge=1)
    feature_matching: Literal["batch", "pairs"] = "batch"
    augmentation: tuple[AugmentationName, ...] = ()
    consistency_weight: float = Field(default=0.0, ge=0.0, allow_inf_nan=False)
    num_critic_steps: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _is_one_game(self) -> Self:
        if self.labels == "semi_supervised" and self.loss != "non_saturating":
            raise ValueError(f"loss {self.loss}: labels semi_supervised has its own, which is that of non_saturating")
        if self.labels != "semi_supervised" and self.feature_matching != "batch":
            raise ValueError(f"feature_matching {self.feature_matching}: it is of labels semi_supervised alone")
        if self.consistency_weight and self.labels != "semi_supervised":
            raise ValueError(f"consistency_weight {self.consistency_weight:g}: it is of labels semi_supervised alone")
        if self.consistency_weight and not self.augmentation and not self.discriminator.has_noise:
            raise ValueError(
                "consistency_weight: without augmentation, or noise in the discriminator, D sees the same row twice"
            )
        return self

    @model_validator(mode="after")
    def _wasserstein_is_constrained(self) -> Self:
        if self.loss == "wasserstein" and self.penalty == "none":
            raise ValueError("penalty none: loss wasserstein has no minimum without one; choose gradient_penalty")
        return self

    @model_validator(mode="after")
    def _what_is_given_is_used(self) -> Self:
        for name in ("penalty_weight", "penalty_every"):
            if self.penalty == "none" and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name}: penalty none is no penalty; leave it out, or choose r1 or gradient_penalty")
        if twice := [name for name in dict.fromkeys(self.augmentation) if self.augmentation.count(name) > 1]:
            raise ValueError(f"augmentation has {' and '.join(twice)} more than once; name each once")
        return self
