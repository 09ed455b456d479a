"""The `model:` block of a variational autoencoder. Sources as in `gendist/models/vae.py`."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from gendist.models.ops.likelihoods import LikelihoodName
from gendist.models.ops.networks import NetworkConfig

CLASSIFICATION_WEIGHT = 0.1


class VariationalAutoencoderConfig(BaseModel):
    """The `model:` block of a spec of family `vae`.

    latent_dim             of z
    encoder                of q(z | x): gives the mean and the log variance, 2 latent_dim numbers. With labels it is given the
                           class, too: behind the features of x, or as planes behind the channels of an image
    decoder                of p(x | z): gives as many numbers as x has, as channels of an image where there are several for a
                           feature. With labels it is given the class behind z
    classifier             with labels: of q(y | x), one number a class; rows then may lack their label (Kingma et al. 2014, M2)
    classification_weight  of the classifier's cross-entropy, as a mean over labelled rows, beside the bound, as a mean over
                           all rows: alpha / N of Kingma et al. 2014, eq. 9, whose alpha = 0.1 N is 0.1 here
    likelihood             bernoulli: x from 0 to 1; gaussian: any x, with one standard deviation for all features, which had
                           best have mean 0 and variance 1 (data.transforms: [standardize]); discretized_logistic_mixture:
                           x of evenly spaced levels from 0 to 1 (Salimans et al. 2017)
    scale                  of gaussian: that standard deviation, in units of x; learned where left out
    num_mixtures           of discretized_logistic_mixture: logistics a feature, 10 where left out; the decoder then gives 3 for
                           each, beside the feature's others
    num_levels             of discretized_logistic_mixture: 256 where left out, as of bytes
    binarize               with bernoulli: x is the probability of a 1, and drawn anew each time that a row is seen (IWAE
                           section 5), so that bounds are those of binary x; encode, classify and reconstruct take x as it is
    samples                means of p(x | z), as is usual for images, or draws from it, which are samples of p(x): where left
                           out, means of images and draws of other rows
    objective              elbo, or iwae: the importance-weighted bound of num_importance_samples, 5 or 50 in the paper
    beta                   weight of the KL divergence in the training loss (Higgins et al. 2017); 1 is the ELBO
    kl_warmup_steps        steps over which that weight rises from 0, in a straight line (Bowman et al. 2016)
    free_bits              nats that a latent dimension may take without a cost (Kingma et al. 2016). They take the mean over a
                           minibatch before the floor; here each sample has its floor, so that the loss is a sum over samples
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    latent_dim: int = Field(ge=1)
    encoder: NetworkConfig = NetworkConfig()
    decoder: NetworkConfig = NetworkConfig()
    classifier: NetworkConfig | None = None
    classification_weight: float = Field(default=CLASSIFICATION_WEIGHT, ge=0.0, allow_inf_nan=False)
    likelihood: LikelihoodName = "bernoulli"
    scale: float | None = Field(default=None, gt=0.0, allow_inf_nan=False)
    num_mixtures: int | None = Field(default=None, ge=1)
    num_levels: int | None = Field(default=None, ge=2)
    binarize: bool = False
    samples: Literal["means", "draws"] | None = None
    objective: Literal["elbo", "iwae"] = "elbo"
    num_importance_samples: int | None = Field(default=None, ge=1)
    beta: float = Field(default=1.0, ge=0.0, allow_inf_nan=False)
    kl_warmup_steps: int = Field(default=0, ge=0)
    free_bits: float = Field(default=0.0, ge=0.0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _what_is_given_is_used(self) -> Self:
        if self.scale is not None and self.likelihood != "gaussian":
            raise ValueError(f"scale: likelihood {self.likelihood} has none; leave it out, or choose gaussian")
        for name in ("num_mixtures", "num_levels"):
            if getattr(self, name) is not None and self.likelihood != "discretized_logistic_mixture":
                raise ValueError(
                    f"{name}: likelihood {self.likelihood} has none; leave it out, or choose discretized_logistic_mixture"
                )
        if self.binarize and self.likelihood != "bernoulli":
            raise ValueError(f"binarize: likelihood {self.likelihood} is not of binary x; leave it out, or choose bernoulli")
        if self.classifier is None and self.classification_weight != CLASSIFICATION_WEIGHT:
            raise ValueError("classification_weight is that of a classifier, and model.classifier is not given")
        return self

    @model_validator(mode="after")
    def _objective_is_one(self) -> Self:
        if self.objective == "elbo":
            if self.num_importance_samples is not None:
                raise ValueError("num_importance_samples: objective elbo has one sample; leave it out, or choose iwae")
            return self
        if self.num_importance_samples is None:
            raise ValueError("objective iwae: how many samples? Set num_importance_samples, to 5 or 50 as in the paper")
        for name, neutral in (("beta", 1.0), ("kl_warmup_steps", 0), ("free_bits", 0.0)):
            if getattr(self, name) != neutral:
                raise ValueError(f"{name}: objective iwae has no KL divergence to weigh; leave it out, or choose elbo")
        return self
