"""What a variational autoencoder minimises, sample by sample: the negative of a bound of log p(x), or of log p(x, y).

The bounds: the ELBO (AEVB eq. 10) with one z a sample, whose KL divergence may be weighed, or the importance-weighted one (IWAE
eq. 8). With labels each is of log p(x | y), and what becomes of a class that is not known stands in `semi_supervised_elbo.py`.
Legend: B samples, D features, K importance samples, L latent dimensions, C classes, P pairs of a sample and a class.
"""

from __future__ import annotations

from torch import Tensor

from gendist.models.ops.autoencoder import Autoencoder, Terms
from gendist.models.ops.semi_supervised_elbo import class_kl, class_weights, cross_entropy, over_classes, pairs_of
from gendist.models.ops.vae_config import VariationalAutoencoderConfig
from gendist.protocols import is_labelled

Losses = dict[str, Tensor]  # (B,) each


def losses(
    config: VariationalAutoencoderConfig,
    autoencoder: Autoencoder,
    x_BD: Tensor,
    noise_BKL: Tensor,
    evidence_BC: Tensor | None,
    warmth: float,
    weights_B: Tensor | None = None,
) -> tuple[Losses, Losses]:
    """The terms of the loss, and what is only watched.

    evidence_BC  what is known of the class; None without labels
    weights_B    of the samples, where they have any: of weight 0 one needs no label
    warmth       what multiplies the weight of the KL divergence, from 0 to 1
    """
    if evidence_BC is None:
        *terms, _ = autoencoder(x_BD, noise_BKL)
        return _of_terms(config, Terms(*terms), warmth)
    pairs = pairs_of(evidence_BC)
    *terms, log_q_BC = autoencoder(x_BD, noise_BKL, *pairs)
    weights_BC = class_weights(evidence_BC, log_q_BC, weights_B)
    minimised, watched = (
        {name: over_classes(value_P, pairs, weights_BC) for name, value_P in of_pairs.items()}
        for of_pairs in _of_terms(config, Terms(*terms), warmth)
    )
    if log_q_BC is not None:
        minimised["class_kl"] = class_kl(evidence_BC, log_q_BC)
        minimised["classification"] = config.classification_weight * cross_entropy(evidence_BC, log_q_BC)
        watched["negative_elbo"] = watched["negative_elbo"] + minimised["class_kl"]
        labelled_B = is_labelled(evidence_BC)
        watched["labelled"] = labelled_B.float()
        watched["right"] = (labelled_B & (log_q_BC.argmax(1) == evidence_BC.argmax(1))).float()
    return minimised, watched


def _of_terms(config: VariationalAutoencoderConfig, terms: Terms, warmth: float) -> tuple[Losses, Losses]:
    watched = {"kl": terms.kl.sum(1), "negative_elbo": -terms.elbo()}
    if config.objective == "iwae":
        return {"negative_bound": -terms.importance_weighted_bound()}, watched
    weighted_kl_B = warmth * config.beta * terms.kl.clamp_min(config.free_bits).sum(1)
    return {"reconstruction": -terms.log_prob[:, 0], "weighted_kl": weighted_kl_B}, watched
