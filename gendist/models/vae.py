"""Variational autoencoder: p(x) = integral of p(x | z) N(z | 0, I) dz, with an encoder q(z | x) that proposes z.

Kingma & Welling 2014, "Auto-Encoding Variational Bayes" (AEVB); Burda, Grosse & Salakhutdinov 2016, "Importance Weighted
Autoencoders" (IWAE). With labels y it is p(x | y), encoder and decoder being given y; with a classifier q(y | x) as well, rows
may lack their label (`ops/semi_supervised_elbo.py`).
Legend: N samples, B samples of a micro-batch, T samples of a tile, D features, L latent dimensions, K importance samples,
C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from gendist.figures import Figure, Paths
from gendist.models.ops import autoencoder, latent_paths, networks, semi_supervised_elbo
from gendist.models.ops.autoencoder import Autoencoder, Terms
from gendist.models.ops.brief import brief
from gendist.models.ops.independent_latent import draw_latents, latent_of
from gendist.models.ops.latent_paths import MAX_CLASSES, MAX_RANKED, NUM_PATHS, NUM_STEPS
from gendist.models.ops.layout import Layout
from gendist.models.ops.likelihoods import likelihood_of
from gendist.models.ops.networks import NetworkConfig
from gendist.models.ops.offered import Offered
from gendist.models.ops.sums import total_weight, weighted_sum
from gendist.models.ops.tiles import TILE, evaluating, map_in_tiles, tile_of
from gendist.models.ops.vae_config import VariationalAutoencoderConfig
from gendist.models.ops.vae_objective import Losses, losses
from gendist.noise import Noise, derived_seed
from gendist.protocols import Block, Draw, LabelCounts, Loss, Phase, SampleAddress, UserError, as_tensor

TRAINING = Phase("autoencoder", "autoencoder")
IS_ACTIVE = 0.01  # variance of a latent's mean over the data, from which it counts as active (IWAE section 5.2)
COLLAPSED = 0.1  # nats, below which latents say nothing of a sample
UNSCALED = 100.0  # nats a feature, above which a normal distribution of any width suits x better
SAMPLES_AT_ONCE = 10  # importance samples of a tile
NUMBERS_AT_ONCE = 2**24  # of the decoder's output, over all rows, classes and samples of a tile: 64 MB
LOW, HIGH = -3.0, 3.0  # of a latent dimension that is moved, in standard deviations of the prior


@dataclass(frozen=True, eq=False)
class VariationalAutoencoder:
    """Rows of x are float32, images of 0 to 1 flattened as (H, W[, C]); verbs take such images, too.

    With labels, `given` of a verb is one of `labels`, or a list, array or tensor with one for each row.

    prior  p(z), a `GenerativeModel` of latents; None: standard normal, as in training
    """

    config: VariationalAutoencoderConfig
    layout: Layout
    autoencoder: Autoencoder
    labels: tuple[Any, ...] = ()
    prior: Any = None

    Config: ClassVar[type[BaseModel]] = VariationalAutoencoderConfig
    validation_objective: ClassVar[str | None] = "loss"
    prior_spec: ClassVar[Mapping[str, Any]] = {
        "family": "gmm",
        "model": {"num_components": 10, "covariance_type": "full"},
        "fit": {"max_iterations": 200},
    }
    """What is fitted to latents where the spec of a prior says no more."""

    __repr__ = brief

    @property
    def not_offered(self) -> Mapping[str, str]:
        reasons = {
            "log_prob": "the integral over z has no closed form: log_prob_bound comes as close to it as one likes; or use elbo",
            "impute": "it takes complete rows only; reconstruct gives the mean of x that the latents of a whole row lead to",
        }
        if not self.labels:
            reasons["classify"] = "it is fitted without labels"
        elif self.config.classifier is None:
            reasons["classify"] = "it has no classifier: fit it with model.classifier: {hidden_sizes: [256, 256]}, say"
        return reasons

    @property
    def density(self) -> str:
        """What bounds are of, in words, where that is not always the density of x."""
        if self.config.likelihood != "bernoulli" or self.config.binarize:
            return ""
        return "of x that is 0 or 1; where it lies between, cross-entropies stand for log p(x | z), which are no density of x"

    @property
    def encodes_given(self) -> bool:
        """Whether `encode` must be given the class of a row, which nothing here would guess."""
        return bool(self.labels) and self.config.classifier is None

    # Made and kept

    @classmethod
    def create(
        cls, config: VariationalAutoencoderConfig, x_shape: tuple[int, ...], labels: tuple[Any, ...], seed: int
    ) -> VariationalAutoencoder:
        """Networks with fresh weights, a function of the seed; UserError where they do not suit x or the labels."""

        def fresh(network: NetworkConfig, input_shape: tuple[int, ...], output_shape: tuple[int, ...], where: str) -> nn.Module:
            return networks.create(network, input_shape, output_shape, where, seed)

        return cls._made(config, Layout(x_shape), labels, fresh)

    @classmethod
    def _made(
        cls, config: VariationalAutoencoderConfig, layout: Layout, labels: tuple[Any, ...], make: Callable[..., nn.Module]
    ) -> VariationalAutoencoder:
        if config.classifier is not None and not labels:
            raise UserError("model.classifier: there are no labels to learn; name their column in data.label, or leave it out")
        likelihood = likelihood_of(config.likelihood, config.scale, config.num_mixtures, config.num_levels)
        has_planes = autoencoder.takes_planes(config.encoder, layout)
        shapes = autoencoder.shapes(layout, config.latent_dim, len(labels), has_planes, likelihood.numbers_per_feature)
        encoder = make(config.encoder, shapes.encoder_input, shapes.encoder_output, "model.encoder")
        decoder = make(config.decoder, shapes.decoder_input, shapes.decoder_output, "model.decoder")
        classifier = None
        if config.classifier is not None:
            classifier = make(config.classifier, layout.network_shape, (len(labels),), "model.classifier")
        whole = Autoencoder(encoder, decoder, classifier, likelihood, layout, len(labels), has_planes)
        return cls(config, layout, whole, labels)

    def tensors(self) -> dict[str, Tensor]:
        return self.layout.tensors() | {name: value.cpu() for name, value in self.autoencoder.state_dict().items()}

    @classmethod
    def from_tensors(cls, config: Any, tensors: Mapping[str, Tensor], labels: tuple[Any, ...]) -> VariationalAutoencoder:
        model = cls._made(config, Layout.from_tensors(tensors), labels, networks.build)
        networks.load(model.autoencoder, {name: value for name, value in tensors.items() if name != "x_shape"})
        return model

    @property
    def num_features(self) -> int:
        return self.layout.num_features

    @property
    def _device(self) -> torch.device:
        return next(self.autoencoder.parameters()).device

    def with_prior(self, prior: Any) -> VariationalAutoencoder:
        """The same networks over another p(z), a model fitted to `draw_latents`, which must offer sample and log_prob of rows
        of L features; UserError where it does not."""
        for name in ("sample", "log_prob", "num_features"):
            if not hasattr(prior, name):
                reason = getattr(prior, "not_offered", {}).get(name, f"{type(prior).__name__} has none")
                raise UserError(f"a prior must offer {name}, and this one does not ({reason}); a mixture does, family gmm, say")
        if getattr(prior, "takes_sequences", False):
            raise UserError("a prior is of the latents of a row, and this one is of sequences; take a mixture, family gmm, say")
        if prior.num_features != self.config.latent_dim:
            raise UserError(f"a prior of {prior.num_features} features, but there are {self.config.latent_dim} latents")
        return replace(self, prior=prior)

    # Density

    def elbo(self, x: Any, seed: int = 0, offset: int = 0, given: Any = None) -> Tensor:
        """(N,) float64, in nats: log p(x | z) - KL(q(z | x) || p(z)), whose mean over z of q(z | x) is below log p(x).

        One z a row, the one that belongs to the seed and the row's number, offset.. in the order of x, and so is the binary x
        that `binarize` draws. With labels it is of log p(x | y) where y is given. Where it is not, of log p(x) over all
        classes, which are equally frequent: the bound of an unlabelled row (Kingma et al. 2014, eq. 7), or, without a
        classifier, that of `log_prob_bound` with one sample a class.
        """

        def elbo_of(x_TD: Tensor, noise: Noises, classes: Tensor | None) -> Tensor:
            terms = self._terms(x_TD, noise("elbo"), classes)
            # The KL divergence from another prior has no closed form; its estimate from the same z does.
            elbo_P = terms.elbo() if self.prior is None else terms.log_weights[:, 0]
            elbo_TC = elbo_P.double().view(len(x_TD), -1)
            if classes is None or given is not None:
                return elbo_TC[:, 0]
            if self.config.classifier is None:
                return _over_uniform_classes(terms.log_weights[:, 0].double().view(len(x_TD), -1))
            log_q_TC = self.autoencoder.log_q(x_TD).double()
            return (log_q_TC.exp() * (elbo_TC - log_q_TC)).sum(1) - math.log(len(self.labels))

        return self._bounded(elbo_of, x, seed, offset, given)

    def log_prob_bound(self, x: Any, num_samples: int = 100, seed: int = 0, offset: int = 0, given: Any = None) -> Tensor:
        """(N,) float64, in nats: log of the mean of p(x, z_k) / q(z_k | x) over K z_k of q(z | x) (IWAE eq. 8).

        Its mean is below log p(x), rises with num_samples and comes to log p(x) in the end. With labels it is of log p(x | y)
        where y is given, else of the log of the mean of p(x | y) over the classes, each with num_samples of its own.
        """
        if num_samples < 1:
            raise UserError(f"num_samples {num_samples}; 1 or more is needed")

        def bound_of(x_TD: Tensor, noise: Noises, classes: Tensor | None) -> Tensor:
            log_weights = []
            at_once = self._at_once[1]
            for first in range(0, num_samples, at_once):
                samples = range(first, min(first + at_once, num_samples))
                noise_TKL = torch.cat([noise(f"log_prob_bound.{k}") for k in samples], 1)
                log_weights.append(self._terms(x_TD, noise_TKL, classes).log_weights.double())
            bound_P = torch.logsumexp(torch.cat(log_weights, 1), 1) - math.log(num_samples)
            return _over_uniform_classes(bound_P.view(len(x_TD), -1))

        return self._bounded(bound_of, x, seed, offset, given)

    @property
    def _at_once(self) -> tuple[int, int]:
        """How many classes, and importance samples of each, of every row of a tile the decoder is given at once, so that memory
        is bounded. The configuration alone tells, for a row's result must not depend on what else is asked for."""
        each = TILE * self.num_features * self.autoencoder.likelihood.numbers_per_feature
        num_classes = min(max(1, NUMBERS_AT_ONCE // each), max(1, len(self.labels)))
        return num_classes, min(max(1, NUMBERS_AT_ONCE // (each * num_classes)), SAMPLES_AT_ONCE)

    def _bounded(
        self, function: Callable[[Tensor, Noises, Tensor | None], Tensor], x: Any, seed: int, offset: int, given: Any
    ) -> Tensor:
        """function(x, noise, classes) tile by tile. noise(purpose): (T, 1, L) of the rows; classes: of each row in turn those
        that its bound is of, one where it is given, else all; None without labels."""
        x_ND = self._checked(x)
        given_N = self._classes_of(given, len(x_ND))

        def tile(first: int, x_TD: Tensor) -> Tensor:
            def noise(purpose: str) -> Tensor:
                return Noise(seed, purpose).normal(first, TILE, self.config.latent_dim)[:, None].to(x_TD)

            if self.config.binarize:
                x_TD = binarized(x_TD, Noise(seed, "binarization").uniform(first, TILE, self.num_features).to(x_TD))
            classes = None
            if given_N is not None:
                classes = tile_of(given_N, first - offset).to(x_TD.device)
            elif self.labels:
                classes = torch.arange(len(self.labels), device=x_TD.device).repeat(TILE)
            return function(x_TD, noise, classes)

        with evaluating(self.autoencoder):
            return map_in_tiles(tile, x_ND, self._device, offset)

    def _terms(self, x_TD: Tensor, noise_TKL: Tensor, classes: Tensor | None) -> Terms:
        """Of each row, or of each row with each of its classes."""
        log_prior = None if self.prior is None else lambda z_PL: self.prior.log_prob(z_PL.cpu()).to(z_PL)
        if classes is None:
            return self.autoencoder.terms(x_TD, noise_TKL, None, log_prior)
        parts = []
        for some in classes.view(len(x_TD), -1).split(self._at_once[0], 1):
            each = some.shape[1]
            x_PD, noise_PKL = x_TD.repeat_interleave(each, 0), noise_TKL.repeat_interleave(each, 0)
            terms = self.autoencoder.terms(x_PD, noise_PKL, some.flatten(), log_prior)
            parts.append([values.unflatten(0, (-1, each)) for values in terms])
        return Terms(*(torch.cat(values, 1).flatten(0, 1) for values in zip(*parts, strict=True)))

    def check_rows(self, x: Any) -> None:
        """UserError where x cannot be of this model."""
        self._checked(x)

    def _checked(self, x: Any) -> Tensor:
        """(N, D)"""
        x_ND = self.layout.rows(x)
        self.autoencoder.likelihood.check(x_ND)
        return x_ND

    # Representation

    def encode(self, x: Any, given: Any = None) -> Tensor:
        """(N, L) the mean of q(z | x); with labels of q(z | x, y), for the y that is given, else the one that the classifier
        finds the most probable; UserError where there is none."""
        return self._latents(x, given)

    def draw_latents(self, x: Any, *, seed: int = 0, offset: int = 0, given: Any = None) -> Tensor:
        """(N, L) one draw from q(z | x) a row, the one that belongs to the seed and the row's number, offset.. in the order
        of x; with labels from that of the class that `encode` has."""
        noise = Noise(seed, "latents")
        return self._latents(x, given, lambda first: noise.normal(first, TILE, self.config.latent_dim), offset)

    def cluster(self, x: Any, given: Any = None) -> Tensor:
        """(N, C) float64 p(cluster | latent), of the latents that `encode` gives: clusters are the components of the prior.

        UserError where the prior is no mixture: one is known by its `encode`, which gives probabilities that sum to 1.
        """
        if hasattr(self.prior, "encode"):
            probs_NC: Tensor = self.prior.encode(self.encode(x, given))
            if bool((probs_NC >= 0).all()) and torch.allclose(probs_NC.sum(1), probs_NC.new_ones(()), atol=1e-5):
                return probs_NC
        raise UserError("cluster: there is no mixture of latents; fit one with `prior RUN`, or model.with_prior(mixture)")

    def decode(self, z: Any, given: Any = None) -> Tensor:
        """(N, D) the mean of p(x | z) of latents (N, L); with labels of p(x | z, y) where y is given, else over all classes."""
        z_NL = as_tensor(z, torch.float32)
        if z_NL.ndim != 2 or z_NL.shape[1] != self.config.latent_dim:
            raise UserError(f"decode takes latents of shape (N, {self.config.latent_dim}), not {tuple(z_NL.shape)}")
        given_N = self._classes_of(given, len(z_NL))

        def tile(first: int, z_TL: Tensor) -> Tensor:
            if given_N is not None:
                return self._mean(z_TL, tile_of(given_N, first).to(z_TL.device))
            if not self.labels:
                return self._mean(z_TL, None)
            each = [self._mean(z_TL, torch.full((TILE,), c, device=z_TL.device)) for c in range(len(self.labels))]
            return torch.stack(each).mean(0)

        with evaluating(self.autoencoder):
            return map_in_tiles(tile, z_NL, self._device)

    def reconstruct(self, x: Any, given: Any = None) -> Tensor:
        """(N, D) the mean of p(x | z) at the mean of q(z | x); with labels, both of the class that `encode` has."""
        x_ND = self.layout.rows(x)
        if given is None and self.labels:
            given = [self.labels[c] for c in self._most_probable(x_ND).tolist()]
        return self.decode(self.encode(x_ND, given), given)

    @Offered
    def classify(self, x: Any) -> Tensor:
        """(N, C) float64 log q(y | x), columns in the order of `labels`."""
        x_ND = self._checked(x)
        with evaluating(self.autoencoder):
            return map_in_tiles(lambda _, x_TD: self.autoencoder.log_q(x_TD).double(), x_ND, self._device)

    def active_units(self, x: Any, given: Any = None) -> Tensor:
        """(L,) bool: which latent dimensions say something of x: those whose mean varies over the rows, with a variance above
        0.01 (IWAE section 5.2). Where the posterior has collapsed into the prior, none does."""
        return self.encode(x, given).double().var(0, correction=0) > IS_ACTIVE

    def _latents(self, x: Any, given: Any, noise_of: Callable[[int], Tensor] | None = None, offset: int = 0) -> Tensor:
        """The mean of q(z | x) or, with the (T, L) noise of the tile that begins at a row, draws."""
        x_ND = self._checked(x)
        classes_N = self._classes_of(given, len(x_ND))
        if classes_N is None and self.labels:
            classes_N = self._most_probable(x_ND)

        def tile(first: int, x_TD: Tensor) -> Tensor:
            classes_T = None if classes_N is None else tile_of(classes_N, first - offset).to(x_TD.device)
            mean_TL, log_variance_TL = self.autoencoder.posterior(x_TD, classes_T)
            return mean_TL if noise_of is None else mean_TL + torch.exp(0.5 * log_variance_TL) * noise_of(first).to(mean_TL)

        with evaluating(self.autoencoder):
            return map_in_tiles(tile, x_ND, self._device, offset)

    def _most_probable(self, x_ND: Tensor) -> Tensor:
        if self.config.classifier is None:
            raise UserError(
                "q(z | x, y) is of one class, and no classifier guesses it: pass given=, a label or one for each row"
            )
        most_probable_N: Tensor = self.classify(x_ND).argmax(1)
        return most_probable_N

    def _classes_of(self, given: Any, num_rows: int) -> Tensor | None:
        """(num_rows,) the classes that are given; None where none are."""
        if given is None:
            return None
        if not self.labels:
            raise UserError("given: a variational autoencoder that is fitted without labels has no conditions")
        if getattr(given, "ndim", 0) > 1:
            raise UserError(f"given: labels of shape {tuple(given.shape)}; one, or one for each row, (N,), is needed")
        if hasattr(given, "tolist"):
            given = given.tolist()
        if not isinstance(given, list | tuple):
            return torch.full((num_rows,), latent_of(given, self.labels, len(self.labels), "classes"))
        if len(given) != num_rows:
            raise UserError(f"given: {len(given)} labels for {num_rows} rows; one, or one for each row, is needed")
        by_name = {str(label): label for label in given}
        class_of = {name: latent_of(label, self.labels, len(self.labels), "classes") for name, label in by_name.items()}
        return torch.tensor([class_of[str(label)] for label in given], dtype=torch.int64)

    # Samples

    def sample(
        self, num_samples: int, *, seed: int = 0, offset: int = 0, given: Any = None, mean: bool | None = None
    ) -> Tensor:
        """(num_samples, D) rows offset.. of the endless sample that belongs to the seed; with labels of p(x | y) where y is
        given, one or one for each row, else of all classes, which are equally frequent.

        mean  whether a row is the mean of p(x | z), as is usual for images, or a draw from it, which has the noise of the
              likelihood: then rows are samples of p(x). None: as `model.samples` has it
        """
        z_NL, classes_N = self._drawn(SampleAddress(num_samples, seed, offset, given))
        gives_means = self._samples_are_means if mean is None else mean

        def tile(first: int, z_TL: Tensor) -> Tensor:
            classes_T = None if classes_N is None else tile_of(classes_N, first - offset).to(z_TL.device)
            if gives_means:
                return self._mean(z_TL, classes_T)
            return self._draw(z_TL, classes_T, self._uniform(seed, first, TILE))

        with evaluating(self.autoencoder):
            return map_in_tiles(tile, z_NL, self._device, offset)

    def sample_together(self, addresses: Sequence[SampleAddress]) -> list[Tensor]:
        """What `sample` makes of each address: rows of several share a tile."""
        z, classes = zip(*(self._drawn(address) for address in addresses), strict=True)
        classes_N = torch.cat(classes) if self.labels else None
        uniform_ND = None
        if not self._samples_are_means:
            uniform_ND = torch.cat([self._uniform(each.seed, each.offset, max(each.num_samples, 0)) for each in addresses])

        def tile(first: int, z_TL: Tensor) -> Tensor:
            classes_T = None if classes_N is None else tile_of(classes_N, first).to(z_TL.device)
            return (
                self._mean(z_TL, classes_T) if uniform_ND is None else self._draw(z_TL, classes_T, tile_of(uniform_ND, first))
            )

        with evaluating(self.autoencoder):
            x_ND = map_in_tiles(tile, torch.cat(z), self._device)
        return list(x_ND.split([len(z_NL) for z_NL in z]))

    def _drawn(self, address: SampleAddress) -> tuple[Tensor, Tensor | None]:
        """(N, L) float32 latents of the prior and, with labels, (N,) classes of the rows at the address."""
        num_samples, seed, offset = max(address.num_samples, 0), address.seed, address.offset
        classes_N = None
        if self.labels or address.given is not None:
            classes_N = self.sample_classes(num_samples, seed=seed, offset=offset, given=address.given)
        if self.prior is None:
            z_NL = Noise(seed, "sample.latent").normal(offset, num_samples, self.config.latent_dim)
        else:
            # A seed of its own, since its streams might have the names of those here.
            z_NL = self.prior.sample(num_samples, seed=derived_seed(seed, "sample.prior"), offset=offset)
        return z_NL.float(), classes_N

    def sample_classes(self, num_samples: int, *, seed: int = 0, offset: int = 0, given: Any = None) -> Tensor:
        """(num_samples,) the classes, as indices of `labels`, that the rows of `sample` belong to."""
        given_N = self._classes_of(given, max(num_samples, 0))
        if given_N is not None:
            return given_N
        if not self.labels:
            raise UserError("sample_classes: it is fitted without labels")
        return draw_latents(torch.ones(len(self.labels), dtype=torch.float64), seed, "sample.class", offset, num_samples)

    @property
    def _samples_are_means(self) -> bool:
        return self.layout.is_image if self.config.samples is None else self.config.samples == "means"

    def _mean(self, z_TL: Tensor, classes_T: Tensor | None) -> Tensor:
        return self.autoencoder.likelihood.mean(self.autoencoder.decoded(z_TL, classes_T))

    def _draw(self, z_TL: Tensor, classes_T: Tensor | None, uniform_TD: Tensor) -> Tensor:
        return self.autoencoder.likelihood.draw(self.autoencoder.decoded(z_TL, classes_T), uniform_TD.to(z_TL.device))

    def _uniform(self, seed: int, first: int, num_rows: int) -> Tensor:
        """(num_rows, D) what the draws of x of the rows first.. of a sample are made of."""
        return Noise(seed, "sample.x").uniform(first, num_rows, self.num_features)

    # Ways through the latents

    def interpolate(self, x_a: Any, x_b: Any, num_steps: int = NUM_STEPS, given: Any = None) -> Tensor:
        """(N, num_steps, D) the means of x on the great circles (White 2016) from the latents of each row of x_a, which
        `encode` gives, to those of x_b; with labels, all of the class that is given, or of that of the row of x_a."""
        a_ND, b_ND = self.layout.rows(x_a), self.layout.rows(x_b)
        if len(a_ND) != len(b_ND) or num_steps < 2:
            raise UserError(
                f"{len(a_ND)} and {len(b_ND)} rows, num_steps {num_steps}; as many rows and 2 steps or more are needed"
            )
        classes_N = self._classes_of(given, len(a_ND))
        if classes_N is None and self.labels:
            classes_N = self._most_probable(a_ND)
        given = None if classes_N is None else [self.labels[c] for c in classes_N.tolist()]
        return self._along(latent_paths.great_circles(self.encode(a_ND, given), self.encode(b_ND, given), num_steps), classes_N)

    def traverse(
        self, x: Any = None, *, low: float = LOW, high: float = HIGH, num_steps: int = NUM_STEPS, given: Any = None
    ) -> Tensor:
        """(L, num_steps, D) the means of x where one latent dimension after the other is moved from low to high; the others
        stay at the latents of the one row x, else at 0."""
        z_1L = torch.zeros(1, self.config.latent_dim) if x is None else self.encode(x, given)
        if len(z_1L) != 1 or num_steps < 2:
            raise UserError(f"{len(z_1L)} rows, num_steps {num_steps}; one row, or none, and 2 steps or more are needed")
        class_1 = self._classes_of(given, 1)
        if class_1 is None and x is not None and self.labels:
            class_1 = self._most_probable(self.layout.rows(x))
        classes_L = None if class_1 is None else class_1.expand(self.config.latent_dim)
        return self._along(latent_paths.along_axes(z_1L[0], low, high, num_steps), classes_L)

    def figures(self, seed: int) -> dict[str, Figure]:
        """Great circles between latents of the prior, and the latent dimensions that change x most (of the first MAX_RANKED;
        with labels in the first class), moved from -3 to 3 with the others at 0. With labels a row is of one class, the first
        of the first, and so on in turn; and the same latents are decoded as each class."""
        if self.prior is None:
            z_NL = Noise(seed, "figures").normal(0, 2 * NUM_PATHS, self.config.latent_dim).float()
        else:
            z_NL = self.prior.sample(2 * NUM_PATHS, seed=derived_seed(seed, "figures.prior")).float()
        classes_N = torch.arange(NUM_PATHS) % len(self.labels) if self.labels else None
        paths_NTD = self._along(latent_paths.great_circles(z_NL[:NUM_PATHS], z_NL[NUM_PATHS:], NUM_STEPS), classes_N)
        # A large decoder takes its time: three steps tell which dimensions change x, and those that are not shown have no more.
        at_0 = torch.zeros(self.config.latent_dim)
        ranked_LTL = latent_paths.along_axes(at_0, LOW, HIGH, 3)[:MAX_RANKED]
        change_LTD = self._along(ranked_LTL, torch.zeros(len(ranked_LTL), dtype=torch.int64) if self.labels else None)
        most = change_LTD.var(1).sum(1).argsort(descending=True, stable=True)[:NUM_PATHS]
        moved = tuple(f"latent {latent}" for latent in most.tolist())
        moved_NTL = latent_paths.along_axes(at_0, LOW, HIGH, NUM_STEPS)[most]
        if classes_N is None:
            return {"interpolations": Paths(paths_NTD), "traversals": Paths(self._along(moved_NTL, None), moved)}
        of_classes = torch.arange(min(len(self.labels), MAX_CLASSES))
        same_CTL = z_NL[:NUM_STEPS].expand(len(of_classes), -1, -1)
        names = tuple(str(self.labels[c]) for c in classes_N.tolist())
        return {
            "interpolations": Paths(paths_NTD, names),
            "traversals": Paths(self._along(moved_NTL, classes_N[: len(most)]), moved),
            "classes": Paths(self._along(same_CTL, of_classes), tuple(map(str, self.labels[: len(of_classes)]))),
        }

    def _along(self, z_NTL: Tensor, classes_N: Tensor | None) -> Tensor:
        num_steps = z_NTL.shape[1]
        given = None
        if classes_N is not None:
            given = [self.labels[c] for c in classes_N.repeat_interleave(num_steps).tolist()]
        return self.decode(z_NTL.flatten(0, 1), given).unflatten(0, (-1, num_steps))

    # Fitted by gradient

    def networks(self) -> Mapping[str, nn.Module]:
        return {"autoencoder": self.autoencoder}

    def phases(self, step: int) -> Sequence[Phase]:
        return (TRAINING,)

    def draws(self, phase: Phase) -> Mapping[str, Draw]:
        return self.validation_draws()

    def check_labels(self, counts: LabelCounts) -> None:
        """UserError where rows like these could not be trained on: a class is never seen, or a label is missing that nothing
        guesses."""
        if self.config.classifier is None:
            semi_supervised_elbo.check_all_are_labelled(counts.num_unlabelled, counts.num_rows)
        semi_supervised_elbo.check_classes_are_seen(counts.weights, self.labels)

    def counts(self, phase: Phase, batch: Block) -> Mapping[str, float]:
        """The bound is a mean over all rows, the classifier's cross-entropy one over those that are labelled."""
        names = ("reconstruction", "weighted_kl") if self.config.objective == "elbo" else ("negative_bound",)
        counts = dict.fromkeys(names, total_weight(batch))
        if self.config.classifier is not None:
            labelled_B = batch.is_labelled.to(torch.float64)
            weight = labelled_B.sum() if batch.weights is None else (labelled_B * batch.weights).sum()
            counts |= {"class_kl": total_weight(batch), "classification": float(weight)}
        return counts

    def loss(self, phase: Phase, batch: Block, noise: Mapping[str, Tensor], step: int) -> Loss:
        """The negative bound, beside it the classifier's cross-entropy (see `ops/vae_objective.py`)."""
        warmup = self.config.kl_warmup_steps
        terms, watched = self._losses(batch, noise, min(1.0, step / warmup) if warmup else 1.0)
        return Loss(
            {name: weighted_sum(value_B, batch) for name, value_B in terms.items()},
            {name: weighted_sum(value_B.detach(), batch) for name, value_B in watched.items()},
        )

    def validation_draws(self) -> Mapping[str, Draw]:
        draws = {"latent": Draw("normal", (self.config.num_importance_samples or 1) * self.config.latent_dim)}
        return draws | ({"binarization": Draw("uniform", self.num_features)} if self.config.binarize else {})

    def validate(self, batch: Block, noise: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """loss: what is minimised, with the KL divergence at its full weight: the negative ELBO unless the configuration says
        otherwise. With a classifier labelled, the share of rows that have a label, and right, of those whose label it finds;
        in loss, as in all of these means over all rows, its cross-entropy then weighs by that share, which it does not in
        training, where it is a mean over labelled rows."""
        terms, watched = self._losses(batch, noise, 1.0)
        values = {"loss": torch.stack(list(terms.values())).sum(0), **watched}
        values |= {name: terms[name] for name in ("reconstruction", "negative_bound") if name in terms}
        return {name: weighted_sum(value_B, batch) for name, value_B in values.items()}

    def _losses(self, batch: Block, noise: Mapping[str, Tensor], warmth: float) -> tuple[Losses, Losses]:
        self.autoencoder.likelihood.check(batch.x)
        x_BD = binarized(batch.x, noise["binarization"]) if self.config.binarize else batch.x
        noise_BKL = noise["latent"].unflatten(1, (-1, self.config.latent_dim))
        evidence_BC = batch.evidence if self.labels else None
        if self.labels and evidence_BC is None:
            evidence_BC = x_BD.new_zeros(len(x_BD), len(self.labels))
        return losses(self.config, self.autoencoder, x_BD, noise_BKL, evidence_BC, warmth, batch.weights)

    def remarks(self, results: Mapping[str, Any]) -> tuple[str, ...]:
        """What the last record of a fit says that nobody should overlook."""
        kl, negative_elbo = (
            results.get(f"validation/{name}", results.get(f"autoencoder/{name}")) for name in ("kl", "negative_elbo")
        )
        remarks = []
        if kl is not None and kl <= COLLAPSED:
            remarks.append(
                f"the posterior has collapsed: latents carry {kl:.2g} nats of a sample, and the decoder makes nothing of them; "
                "try model.kl_warmup_steps, model.free_bits or a smaller model.beta"
            )
        # The scale is learned, and a normal distribution of any width beside the data's comes to a few nats.
        is_learned = self.config.likelihood == "gaussian" and self.config.scale is None
        if is_learned and negative_elbo is not None and negative_elbo > UNSCALED * self.num_features:
            remarks.append(
                f"a sample takes {negative_elbo:.2g} nats: columns are large for fresh networks; let them have mean 0 and "
                "variance 1 (data.transforms: [standardize]), or train for longer"
            )
        return tuple(remarks)

    def needs_whole_batch(self, phase: Phase) -> str | None:
        return None


Noises = Callable[[str], Tensor]  # the noise of a purpose


def binarized(x_BD: Tensor, uniform_BD: Tensor) -> Tensor:
    """Binary x whose mean is x, from numbers uniform in (0, 1), which float32 may have rounded to 1."""
    return (uniform_BD <= x_BD).to(x_BD)


def _over_uniform_classes(log_prob_TC: Tensor) -> Tensor:
    """(T,) log of the mean of p over the classes."""
    return torch.logsumexp(log_prob_TC, 1) - math.log(log_prob_TC.shape[1])


Model = VariationalAutoencoder
