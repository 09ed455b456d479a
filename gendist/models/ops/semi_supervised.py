"""The K+1 discriminator, which tells the classes of data from each other and all of them from samples of the generator.

Salimans et al. 2016, "Improved Techniques for Training GANs", section 5 (their published code halves the terms of data and of
samples against that of labels, which the paper does not): the discriminator gives K logits l, and that of the class of fakes is
0, so that p(fake | x) = 1 / (Z + 1) with Z = sum exp l, and p(class | x, real) is the softmax of l. The generator matches
features (section 3.1).
Rows with a label are real as well: they add to the unsupervised loss and to the features that are matched, beside their own
cross-entropy. In the paper both are expectations over all data, and its code draws the batches for them from the whole training
set, with the few rows whose labels are known. Here one batch is for all three, so that where it holds more labelled rows than
the data do (`fit.labelled_batch_size`), they count as often as they come up.
Legend: B samples of a micro-batch, K classes, F features.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gendist.protocols import UserError


class ClassifyingDiscriminator(nn.Module):
    """A network with its features, called as a whole for either."""

    def __init__(self, network: nn.Module, name: str) -> None:
        """UserError where the network has no features; name: what the spec calls it."""
        super().__init__()
        if not callable(getattr(network, "features", None)):
            raise UserError(
                f"model.labels: semi_supervised matches features, and {name} has no method features(x) that gives them; add one"
            )
        self.network = network

    def forward(self, x: Tensor, *noise_BW: Tensor, gives_features: bool = False) -> Tensor:
        """(B, K) logits, or (B, F) what the last layer makes them of."""
        features_or_logits: Tensor = self.features(x, *noise_BW) if gives_features else self.network(x, *noise_BW)
        return features_or_logits

    def features(self, x: Tensor, *noise_BW: Tensor) -> Tensor:
        features: Tensor = self.network.features(x, *noise_BW)  # type: ignore[operator]
        return features.flatten(1)


def real_logit(logits_BK: Tensor) -> Tensor:
    """(B,) log p(real | x) / p(fake | x) = log Z: with D(x) = Z / (Z + 1), -log D is softplus of the negative, and
    -log(1 - D) softplus of it."""
    return logits_BK.logsumexp(1)


def cross_entropy(logits_BK: Tensor, evidence_BK: Tensor) -> Tensor:
    """(B,) in nats, against the classes that the evidence makes likely."""
    return -(evidence_BK.softmax(1).to(logits_BK) * logits_BK.log_softmax(1)).sum(1)


def inconsistency(logits_BK: Tensor, again_BK: Tensor) -> Tensor:
    """(B,) squared difference between the class probabilities of one row seen twice (Laine & Aila 2017, section 2.1, there a
    mean over the classes)."""
    return (logits_BK.softmax(1) - again_BK.softmax(1)).square().sum(1)


def feature_matching(real_BF: Tensor, fake_BF: Tensor, weights_B: Tensor) -> Tensor:
    """() |E f(x) - E f(G(z))|^2, means over the batch, of weight over the data; 0 where no row has weight."""
    total = weights_B.sum()
    mean_F = (weights_B[:, None] * real_BF).sum(0) / total.clamp_min(torch.finfo(total.dtype).tiny)
    return (total > 0) * (mean_F - fake_BF.mean(0)).square().sum()


def pairwise_feature_matching(real_BF: Tensor, fake_BF: Tensor, other_BF: Tensor) -> Tensor:
    """(B,) (f(G(z)) - f(x)) . (f(G(z')) - f(x)) with two independent samples for each of the data.

    Its expectation is |E f(x) - E f(G(z))|^2 plus the variance of f(x), which no generator changes: the same is minimised, by a
    sum over samples, without the part of the variance of f(G(z)) that a batch's mean of B adds.
    """
    return ((fake_BF - real_BF) * (other_BF - real_BF)).sum(1)
