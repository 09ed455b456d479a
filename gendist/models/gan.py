"""Generative adversarial network: a generator G makes x of noise z, and a discriminator D learns to tell it from data.

Goodfellow et al. 2014, "Generative Adversarial Nets"; Radford, Metz & Chintala 2016 (DCGAN). Losses and penalties, with their
sources, are in `ops/adversarial.py`. With labels for all rows, G and D are given the class (Miyato & Koyama 2018); with labels
for some, D learns the classes, too (Salimans et al. 2016, `ops/semi_supervised.py`).
Legend: N samples, B samples of a micro-batch, D features, L latent dimensions, C classes, F features of the discriminator.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import BaseModel
from torch import Tensor, nn
from torch.nn.functional import one_hot

from gendist.figures import Figure, Paths
from gendist.models.ops import networks, semi_supervised
from gendist.models.ops.adversarial import discriminator_loss, generator_loss, gradient_penalty, projection, r1
from gendist.models.ops.augmentation import augment, num_uniforms
from gendist.models.ops.brief import brief
from gendist.models.ops.gan_config import GenerativeAdversarialNetworkConfig
from gendist.models.ops.independent_latent import draw_latents, latent_of
from gendist.models.ops.latent_paths import MAX_CLASSES, NUM_PATHS, NUM_STEPS, great_circles
from gendist.models.ops.layers import noise_width
from gendist.models.ops.layout import Layout, check_between_0_and_1
from gendist.models.ops.networks import NetworkConfig
from gendist.models.ops.offered import Offered
from gendist.models.ops.semi_supervised_elbo import check_classes_are_seen
from gendist.models.ops.sums import total_weight, weighted_sum
from gendist.models.ops.tiles import TILE, evaluating, map_in_tiles, tile_of
from gendist.noise import Noise
from gendist.protocols import Block, Draw, LabelCounts, Loss, Phase, SampleAddress, UserError, as_tensor

DISCRIMINATOR = Phase("discriminator", "discriminator")
PENALTY = Phase("penalty", "discriminator")
GENERATOR = Phase("generator", "generator")

# What D judges in a phase, each with noise of its own: the ends of the names of its draws.
OF_REAL, OF_FAKE, OF_OTHER, OF_AGAIN = "", "_of_fake", "_of_other", "_of_again"

HAS_WON = 0.99  # D's accuracy, over many samples, from which G has nothing to learn from


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
    never_offered: ClassVar[Mapping[str, str]] = {
        "log_prob": "a generative adversarial network has samples, and no density",
        "elbo": "a generative adversarial network has no density, nor a bound of one",
        "log_prob_bound": "a generative adversarial network has no density, nor a bound of one",
        "impute": "no network of it leads from x to latents",
        "reconstruct": "no network of it leads from x to latents; encode gives the discriminator's features",
    }

    __repr__ = brief

    @property
    def not_offered(self) -> Mapping[str, str]:
        if self._is_semi_supervised:
            return self.never_offered
        why = (
            "its discriminator is given the class; choose model.labels: semi_supervised" if self.labels else "it has no labels"
        )
        return {**self.never_offered, "classify": why}

    @property
    def further_not_offered(self) -> Mapping[str, str]:
        return {} if self.conditions else {"sample_classes": self._why_without_conditions}

    # Made and kept

    @classmethod
    def create(
        cls, config: GenerativeAdversarialNetworkConfig, x_shape: tuple[int, ...], labels: tuple[Any, ...], seed: int
    ) -> GenerativeAdversarialNetwork:
        """Networks with fresh weights, a function of the seed; UserError where they do not suit x."""
        layout = Layout(x_shape)
        if config.labels is not None and not labels:
            raise UserError(f"model.labels: {config.labels} needs classes; name their column with data.label, or leave it out")
        if config.augmentation and not layout.is_image:
            raise UserError(
                f"model.augmentation: {', '.join(config.augmentation)} is of images, and x has {layout.num_features} columns; "
                "leave it out"
            )
        return cls._made(config, layout, labels, seed)

    @classmethod
    def _made(
        cls, config: GenerativeAdversarialNetworkConfig, layout: Layout, labels: tuple[Any, ...], seed: int | None
    ) -> GenerativeAdversarialNetwork:
        """With fresh weights, or any where there is no seed."""
        is_semi_supervised = config.labels == "semi_supervised"
        inputs = config.latent_dim + (0 if is_semi_supervised else len(labels))
        outputs = len(labels) if is_semi_supervised else 1 + len(labels)
        shape = layout.network_shape

        def network(own: NetworkConfig, given: tuple[int, ...], gives: tuple[int, ...], where: str) -> nn.Module:
            if seed is None:
                return networks.build(own, given, gives, where)
            return networks.create(own, given, gives, where, seed)

        generator = network(config.generator, (inputs,), shape, "model.generator")
        discriminator = network(config.discriminator, shape, (outputs,), "model.discriminator")
        if is_semi_supervised:
            module = f"model.discriminator.module '{config.discriminator.module}'"
            discriminator = semi_supervised.ClassifyingDiscriminator(discriminator, module)
        return cls(config, layout, generator, discriminator, labels)

    def tensors(self) -> dict[str, Tensor]:
        weights = nn.ModuleDict(self.networks()).state_dict()
        return self.layout.tensors() | {name: value.cpu() for name, value in weights.items()}

    @classmethod
    def from_tensors(cls, config: Any, tensors: Mapping[str, Tensor], labels: tuple[Any, ...]) -> GenerativeAdversarialNetwork:
        model = cls._made(config, Layout.from_tensors(tensors), labels, None)
        networks.load(nn.ModuleDict(model.networks()), {name: value for name, value in tensors.items() if name != "x_shape"})
        return model

    @property
    def num_features(self) -> int:
        return self.layout.num_features

    @property
    def _is_bounded(self) -> bool:
        return self.config.output == "tanh" or (self.config.output is None and self.layout.is_image)

    @property
    def _is_semi_supervised(self) -> bool:
        return self.config.labels == "semi_supervised"

    @property
    def conditions(self) -> tuple[Any, ...]:
        """What `sample` may be given."""
        return () if self._is_semi_supervised else self.labels

    # Samples and representations

    def sample(self, num_samples: int, *, seed: int = 0, offset: int = 0, given: Any = None) -> Tensor:
        """(num_samples, D) rows offset.. of the endless sample that belongs to the seed: G of standard normal z.

        given  one of `conditions`; where nobody says, every row draws its own, each as likely as the others
        """
        return self._of_drawn(*self._drawn(SampleAddress(num_samples, seed, offset, given)), offset)

    def sample_together(self, addresses: Sequence[SampleAddress]) -> list[Tensor]:
        """What `sample` makes of each address: rows of several share a tile."""
        z, classes = zip(*(self._drawn(address) for address in addresses), strict=True)
        x_ND = self._of_drawn(torch.cat(z), torch.cat(classes) if self.conditions else None, 0)
        return list(x_ND.split([len(z_NL) for z_NL in z]))

    def _drawn(self, address: SampleAddress) -> tuple[Tensor, Tensor | None]:
        """(N, L) float32 noise and, with conditions, (N,) classes of the rows at the address."""
        if address.given is not None and not self.conditions:
            raise UserError(f"given {address.given!r}: {self._why_without_conditions}")
        num_samples, seed, offset = max(address.num_samples, 0), address.seed, address.offset
        class_N = None
        if self.conditions:
            class_N = self.sample_classes(num_samples, seed=seed, offset=offset, given=address.given)
        return Noise(seed, "sample.latent").normal(offset, num_samples, self.config.latent_dim).float(), class_N

    def _of_drawn(self, z_NL: Tensor, class_N: Tensor | None, offset: int) -> Tensor:
        """(N, D) G(z) of the rows offset.. of these classes, in the tiles that begin at row 0."""

        def tile(first: int, z_TL: Tensor) -> Tensor:
            if class_N is None:
                return self._rows(self._generated(z_TL))
            class_T = tile_of(class_N, first - offset).to(z_TL.device)
            return self._rows(self._generated(z_TL, one_hot(class_T, len(self.conditions)).float()))

        with evaluating(self.generator):
            return map_in_tiles(tile, z_NL, _device(self.generator), offset)

    @Offered
    def sample_classes(self, num_samples: int, *, seed: int = 0, offset: int = 0, given: Any = None) -> Tensor:
        """(num_samples,) the classes, as indices of `labels`, that the rows of `sample` belong to."""
        num_classes = len(self.conditions)
        if given is None:
            return draw_latents(torch.ones(num_classes, dtype=torch.float64), seed, "sample.class", offset, num_samples)
        return torch.full((num_samples,), latent_of(given, self.labels, num_classes, "classes"))

    @property
    def _why_without_conditions(self) -> str:
        if self._is_semi_supervised:
            return "the generator of model.labels: semi_supervised knows no classes; model.labels: condition has one that does"
        return "a generative adversarial network that is fitted without labels has no conditions"

    def decode(self, z: Any, *, given: Any = None) -> Tensor:
        """(N, D) G(z) of latents (N, L), whose distribution is standard normal; `encode` does not lead to them.

        given  one of `conditions`, which must be said where there are any
        """
        z_NL = as_tensor(z, torch.float32)
        if z_NL.ndim != 2 or z_NL.shape[1] != self.config.latent_dim:
            raise UserError(f"decode takes latents of shape (N, {self.config.latent_dim}), not {tuple(z_NL.shape)}")
        if given is not None and not self.conditions:
            raise UserError(f"given {given!r}: {self._why_without_conditions}")
        if given is None and self.conditions:
            raise UserError(f"decode: say of which class, with given=; the labels are {', '.join(map(str, self.labels))}")
        classes_TC = None
        if given is not None:
            chosen = latent_of(given, self.labels, len(self.labels), "classes")
            classes_TC = one_hot(torch.full((TILE,), chosen), len(self.labels)).float().to(_device(self.generator))
        with evaluating(self.generator):
            return map_in_tiles(lambda _, z_TL: self._rows(self._generated(z_TL, classes_TC)), z_NL, _device(self.generator))

    def figures(self, seed: int) -> dict[str, Figure]:
        """Great circles between latents; with conditions a row is of one class, the first of the first, and so on in turn, and
        the same latents are decoded as each class."""
        z_NL = Noise(seed, "figures").normal(0, 2 * NUM_PATHS, self.config.latent_dim).float()
        paths_NTL = great_circles(z_NL[:NUM_PATHS], z_NL[NUM_PATHS:], NUM_STEPS)
        if not self.conditions:
            return {"interpolations": Paths(self.decode(paths_NTL.flatten(0, 1)).unflatten(0, paths_NTL.shape[:2]))}
        shown = self.conditions[:MAX_CLASSES]
        given = [self.conditions[i % len(self.conditions)] for i in range(NUM_PATHS)]
        paths_NTD = torch.stack([self.decode(z_TL, given=y) for z_TL, y in zip(paths_NTL, given, strict=True)])
        classes_CTD = torch.stack([self.decode(z_NL[:NUM_STEPS], given=y) for y in shown])
        return {
            "interpolations": Paths(paths_NTD, tuple(map(str, given))),
            "classes": Paths(classes_CTD, tuple(map(str, shown))),
        }

    def encode(self, x: Any) -> Tensor:
        """(N, F) the features that the discriminator's last layer is given."""
        x_ND = self.layout.rows(x)
        features = getattr(self.discriminator, "features", None)
        if features is None:
            raise UserError(f"encode: {self.config.discriminator.module} has no method features(x)")
        with evaluating(self.discriminator):
            return map_in_tiles(lambda _, x_TD: features(self._seen(x_TD)).flatten(1), x_ND, _device(self.discriminator))

    @Offered
    def classify(self, x: Any) -> Tensor:
        """(N, C) float64 log p(label | x), columns in the order of `labels`; of x as data, not as a sample."""
        x_ND = self.layout.rows(x)

        def log_probs(_: int, x_TD: Tensor) -> Tensor:
            logits: Tensor = self.discriminator(self._seen(x_TD))
            return logits.double().log_softmax(1)

        with evaluating(self.discriminator):
            return map_in_tiles(log_probs, x_ND, _device(self.discriminator))

    def check_rows(self, x: Any) -> None:
        """UserError where x cannot be of this model."""
        self._check_bounds(self.layout.rows(x))

    def _check_bounds(self, x_BD: Tensor) -> None:
        if self._is_bounded:
            check_between_0_and_1(x_BD, "model.output: tanh makes 0 to 1: rescale the columns, or choose linear")

    def _seen(self, x_BD: Tensor) -> Tensor:
        """Rows as networks see them."""
        self._check_bounds(x_BD)
        return self.layout.to_network(2.0 * x_BD - 1.0 if self._is_bounded else x_BD)

    def _generated(self, z_BL: Tensor, classes_BC: Tensor | None = None) -> Tensor:
        """G(z), as networks see samples, of classes where there are conditions."""
        y = self.generator(z_BL if classes_BC is None else torch.cat([z_BL, classes_BC], 1))
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
        if phase == GENERATOR and self._matches_pairs:
            draws["other_latent"] = Draw("normal", self.config.latent_dim)
        if self._has_penalty(phase) and self.config.penalty == "gradient_penalty":
            draws["interpolation"] = Draw("uniform", 1)
        of_real = [OF_REAL] if phase != GENERATOR or self._is_semi_supervised else []
        of_fake = [OF_FAKE] if phase != PENALTY else []
        of_other = [OF_OTHER] if "other_latent" in draws else []
        of_again = [OF_AGAIN] if phase == DISCRIMINATOR and self.config.consistency_weight else []
        for judged in (*of_real, *of_fake, *of_other, *of_again):
            if width := num_uniforms(self.config.augmentation):
                draws[f"augmentation{judged}"] = Draw("uniform", width)
            if width := noise_width(self.discriminator):
                draws[f"discriminator{judged}"] = Draw("normal", width)
        return draws

    def check_labels(self, counts: LabelCounts) -> None:
        """UserError where rows like these could not be trained on: with a condition a label is missing, or a class is never
        seen."""
        if self.conditions and counts.num_unlabelled:
            raise UserError(
                f"data.label: {counts.num_unlabelled} of {counts.num_rows} rows have no label, and model.labels: condition "
                "needs that of every row; leave such rows out, or choose semi_supervised, which learns from both"
            )
        check_classes_are_seen(counts.weights, self.labels)

    def counts(self, phase: Phase, batch: Block) -> Mapping[str, float]:
        """The weights of rows are those of the data. Samples of the generator count once each; with conditions each has the
        class of a row, and counts what that does: else the classes of D's two terms would have other frequencies."""
        if phase == GENERATOR:
            return {"generator": total_weight(batch) if self._matches_pairs else self._num_samples(batch)}
        counts = {"penalty": total_weight(batch)} if self._has_penalty(phase) else {}
        if phase == DISCRIMINATOR:
            counts |= {"real": total_weight(batch), "fake": self._num_samples(batch)}
            if self._is_semi_supervised:
                counts["labelled"] = float((batch.is_labelled * batch.weights_or_ones()).sum())
            if self.config.consistency_weight:
                counts["consistency"] = total_weight(batch)
        return counts

    def _num_samples(self, batch: Block) -> float:
        return total_weight(batch) if self.conditions else float(batch.num_rows)

    def loss(self, phase: Phase, batch: Block, noise: Mapping[str, Tensor], step: int) -> Loss:
        if phase == GENERATOR:
            return Loss({"generator": self._of_generator(batch, noise)})
        real, classes_BC = self._seen(batch.x), self._classes(batch)
        with torch.no_grad():
            # The fake at a row's place has the row's class, so that both are of the same frequencies.
            fake = self._generated(noise["latent"], classes_BC) if "latent" in noise else None
        terms: dict[str, Tensor] = {}
        watched: dict[str, Tensor] = {}
        if phase == DISCRIMINATOR:
            assert fake is not None
            outputs, fake_outputs = self._judged(real, noise), self._judged(fake, noise, OF_FAKE)
            real_B, fake_B = self._logits(outputs, classes_BC), self._logits(fake_outputs, classes_BC)
            of_real_B, of_fake_B = discriminator_loss(self.config.loss, real_B, fake_B)
            if self._is_semi_supervised:
                labelled_B = batch.is_labelled.to(real.device)
                evidence_BC = torch.zeros_like(outputs) if batch.evidence is None else batch.evidence
                terms["labelled"] = weighted_sum(labelled_B * semi_supervised.cross_entropy(outputs, evidence_BC), batch)
                if self.config.consistency_weight:
                    inconsistency_B = semi_supervised.inconsistency(outputs, self._judged(real, noise, OF_AGAIN))
                    terms["consistency"] = self.config.consistency_weight * weighted_sum(inconsistency_B, batch)
            terms |= {"real": weighted_sum(of_real_B, batch), "fake": self._sum_of_samples(of_fake_B, batch)}
            watched = {"real_logit": real_B, "fake_logit": fake_B}
            if self.config.loss != "wasserstein":  # of which any number may be added to the logits
                # D is right about all at 1, and no better than a coin at 0.5.
                watched["accuracy"] = 0.5 * ((real_B > 0).float() + (fake_B < 0).float())
        if self._has_penalty(phase):

            def discriminator(x: Tensor) -> Tensor:
                # Of the image before it is augmented, as the published code of differentiable augmentation has it.
                return self._logits(self._judged(x, noise), classes_BC)

            if self.config.penalty == "r1":
                penalty_B = r1(discriminator, real)
            else:
                assert fake is not None
                penalty_B = gradient_penalty(discriminator, real, fake, noise["interpolation"])
            # A penalty that comes with every n-th step counts n times (Karras et al. 2020, appendix B).
            weight = self.config.penalty_weight * self.config.penalty_every
            terms["penalty"] = weight * weighted_sum(penalty_B, batch)
        return Loss(terms, {name: weighted_sum(value_B.detach(), batch) for name, value_B in watched.items()})

    def _of_generator(self, batch: Block, noise: Mapping[str, Tensor]) -> Tensor:
        """() what G minimises, summed over the samples."""
        if not self._is_semi_supervised:
            classes_BC = self._classes(batch)
            fake = self._judged(self._generated(noise["latent"], classes_BC), noise, OF_FAKE)
            return self._sum_of_samples(generator_loss(self.config.loss, self._logits(fake, classes_BC)), batch)
        with torch.no_grad():
            real_BF = self._judged(self._seen(batch.x), noise, gives_features=True)
        fake_BF = self._judged(self._generated(noise["latent"]), noise, OF_FAKE, gives_features=True)
        if self._matches_pairs:
            other = self._generated(noise["other_latent"])
            other_BF = self._judged(other, noise, OF_OTHER, gives_features=True)
            return weighted_sum(semi_supervised.pairwise_feature_matching(real_BF, fake_BF, other_BF), batch)
        return batch.num_rows * semi_supervised.feature_matching(real_BF, fake_BF, batch.weights_or_ones().to(real_BF))

    def _sum_of_samples(self, values_B: Tensor, batch: Block) -> Tensor:
        return weighted_sum(values_B, batch) if self.conditions else values_B.sum()

    @property
    def _matches_pairs(self) -> bool:
        return self._is_semi_supervised and self.config.feature_matching == "pairs"

    def _classes(self, batch: Block) -> Tensor | None:
        """(B, C) the probability of each class, where there are conditions: one-hot but for soft labels."""
        if not self.conditions:
            return None
        assert batch.evidence is not None
        return batch.evidence.softmax(1).float()

    def _judged(self, y: Tensor, noise: Mapping[str, Tensor], judged: str = OF_REAL, gives_features: bool = False) -> Tensor:
        """(B, outputs) what D gives of samples as networks see them, augmented; or (B, F) its features."""
        if self.config.augmentation:
            y = augment(y, self.config.augmentation, noise[f"augmentation{judged}"])
        within = [noise[name] for name in (f"discriminator{judged}",) if name in noise]
        output: Tensor = self.discriminator(y, *within, **({"gives_features": True} if gives_features else {}))
        return output.float()

    def _logits(self, outputs_B: Tensor, classes_BC: Tensor | None) -> Tensor:
        """(B,) larger for data."""
        if self._is_semi_supervised:
            return semi_supervised.real_logit(outputs_B)
        return outputs_B[:, 0] if classes_BC is None else projection(outputs_B, classes_BC)

    def validation_draws(self) -> Mapping[str, Draw]:
        return {}

    def validate(self, batch: Block, noise: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Of a classifying D alone, since no number that D or G gives on held-out samples tells a better G: error and
        cross_entropy of the rows with a label, and labelled, which rows these are: shares of all, as means have it."""
        if not self._is_semi_supervised or batch.evidence is None:
            return {}
        labelled_B, logits = batch.is_labelled, self.discriminator(self._seen(batch.x)).float()
        wrong_B = logits.argmax(1) != batch.evidence.argmax(1)
        values = {
            "error": labelled_B & wrong_B,
            "cross_entropy": labelled_B * semi_supervised.cross_entropy(logits, batch.evidence),
            "labelled": labelled_B,
        }
        return {name: weighted_sum(value_B.float(), batch) for name, value_B in values.items()}

    def advice(self, record: Mapping[str, Any]) -> Sequence[str]:
        """What to try, of a record of training in which something goes wrong: a line for each."""
        accuracy = record.get("discriminator/accuracy")
        if accuracy is None or not math.isfinite(accuracy) or accuracy < HAS_WON or self._is_semi_supervised:
            return ()
        return (
            f"the discriminator is right about {accuracy:.1%} of data and samples, which leaves the generator little to learn "
            "from: raise model.penalty_weight, add model.augmentation, or lower fit.optimizers.discriminator.learning_rate",
        )

    def needs_whole_batch(self, phase: Phase) -> str | None:
        if phase != GENERATOR or not self._is_semi_supervised or self._matches_pairs:
            return None
        return "feature matching compares means over the whole batch (model.feature_matching: pairs does not)"


def _device(network: nn.Module) -> torch.device:
    return next(network.parameters()).device


Model = GenerativeAdversarialNetwork
