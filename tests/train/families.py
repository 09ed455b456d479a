"""The families that are fitted by gradient, in small, and what a step of each is in plain PyTorch: losses as the papers have
them, of a whole global batch.

Activations are smooth, so that rounding stays rounding: where a unit has a kink, one that is within rounding of it goes
another way.

Legend: B samples, 64 features, which are images of 8 x 8.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import plain
import torch
from plain import Plain
from torch import Tensor
from torch.nn.functional import binary_cross_entropy, logsigmoid, nll_loss, one_hot, relu
from toys import TensorRows

from gendist.models import gan, vae
from gendist.protocols import Block
from gendist.train.config import DeepConfig

SHAPE = (8, 8)
CLASSES = ("a", "b", "c")
CONVOLUTIONS = {"channels": [4], "activation": "silu"}
RESIDUAL = {**CONVOLUTIONS, "num_blocks": 1, "checkpointing": True}
FULLY_CONNECTED = {"hidden_sizes": [10], "activation": "tanh"}

CONFIGS: dict[str, dict[str, Any]] = {
    "vae": {"latent_dim": 3, "encoder": CONVOLUTIONS, "decoder": FULLY_CONNECTED},
    "gan": {"loss": "non_saturating", "penalty": "none", "generator": CONVOLUTIONS, "discriminator": CONVOLUTIONS},
    "gan, r1": {"loss": "non_saturating", "penalty": "r1", "generator": FULLY_CONNECTED, "discriminator": CONVOLUTIONS},
    "gan, wasserstein": {
        "loss": "wasserstein",
        "penalty": "gradient_penalty",
        "num_critic_steps": 2,
        "generator": FULLY_CONNECTED,
        "discriminator": FULLY_CONNECTED,
    },
    "gan, hinge": {"loss": "hinge", "penalty": "none", "generator": FULLY_CONNECTED, "discriminator": FULLY_CONNECTED},
    "gan, residual": {
        "loss": "hinge",
        "penalty": "none",
        "generator": {**RESIDUAL, "normalization": "layer"},
        "discriminator": {**RESIDUAL, "spectral_norm": True},
    },
    "vae, semi-supervised": {"encoder": FULLY_CONNECTED, "decoder": FULLY_CONNECTED, "classifier": FULLY_CONNECTED},
    "gan, conditional": {
        "loss": "non_saturating",
        "penalty": "r1",
        "labels": "condition",
        "generator": FULLY_CONNECTED,
        "discriminator": CONVOLUTIONS,
    },
}


def images(num_rows: int = 50) -> TensorRows:
    """Weighted, of pixels from 0 to 1, each of one of three classes."""
    generator = torch.Generator().manual_seed(2)
    x = torch.rand(num_rows, 64, generator=generator)
    weights = torch.rand(num_rows, generator=generator, dtype=torch.float64) + 0.5
    classes = torch.randint(0, 3, (num_rows,), generator=generator)
    return TensorRows(x, weights, torch.eye(3, dtype=torch.float64)[classes].log())


def rows(name: str, num_rows: int = 50) -> TensorRows:
    """What a family is trained on: where it guesses classes, one row of four is labelled, so that micro-batches have no label,
    or nothing else."""
    known = images(num_rows)
    if "classifier" not in CONFIGS[name]:
        return known
    is_labelled = torch.arange(num_rows) % 4 == 0
    return TensorRows(known.x, known.weights, torch.where(is_labelled[:, None], known.evidence, 0.0))


def create(name: str, seed: int = 0) -> Any:
    family = vae.Model if name.startswith("vae") else gan.Model
    labels = CLASSES if {"labels", "classifier"} & CONFIGS[name].keys() else ()
    return family.create(family.Config.model_validate({"latent_dim": 2, **CONFIGS[name]}), SHAPE, labels, seed)


def weighted_mean(values_B: Tensor, batch: Block) -> Tensor:
    return (values_B * batch.weights.float()).sum() / batch.weights.float().sum()


def autoencoder_step(model: Any, batch: Block, training: Plain) -> None:
    """Kingma & Welling 2014, eq. 10, with the Bernoulli decoder of appendix C.1."""
    mean, log_variance = model.autoencoder.encoder(batch.x.view(-1, 1, 8, 8)).float().chunk(2, dim=1)
    z = mean + log_variance.div(2).exp() * training.normal("autoencoder", "latent", 3)
    logits = model.autoencoder.decoder(z).flatten(1).float()
    reconstruction = -(batch.x * logsigmoid(logits) + (1 - batch.x) * logsigmoid(-logits)).sum(1)
    kl = (mean**2 + log_variance.exp() - log_variance - 1).sum(1) / 2
    training.update("autoencoder", weighted_mean(reconstruction + kl, batch))


def semi_supervised_step(model: Any, batch: Block, training: Plain) -> None:
    """Kingma et al. 2014, eq. 6, 7 and 9, with 0.1 N for alpha: row by row, and of a row without a label class by class."""
    noise = training.normal("autoencoder", "latent", 2)
    log_q = model.autoencoder.classifier(batch.x.view(-1, 1, 8, 8)).log_softmax(1)
    bounds = []
    for c in range(len(CLASSES)):
        label = one_hot(torch.full((len(batch.x),), c, device=batch.x.device), len(CLASSES)).float()
        mean, log_variance = model.autoencoder.encoder(torch.cat([batch.x, label], 1)).chunk(2, dim=1)
        z = mean + log_variance.div(2).exp() * noise
        pixels = torch.sigmoid(model.autoencoder.decoder(torch.cat([z, label], 1))).flatten(1)
        reconstruction = binary_cross_entropy(pixels, batch.x, reduction="none").sum(1)
        kl = (mean**2 + log_variance.exp() - log_variance - 1).sum(1) / 2
        bounds.append(-reconstruction - kl - math.log(len(CLASSES)))
    bounds_BC, label_B = torch.stack(bounds, 1), batch.evidence.argmax(1)
    labelled = (batch.evidence != 0.0).any(1)
    unlabelled_B = (log_q.exp() * (bounds_BC - log_q)).sum(1)
    bound_B = torch.where(labelled, bounds_BC.gather(1, label_B[:, None])[:, 0], unlabelled_B)
    loss = -weighted_mean(bound_B, batch)
    if bool(labelled.any()):
        weights = batch.weights.float()[labelled]
        loss = loss + 0.1 * (weights * nll_loss(log_q[labelled], label_B[labelled], reduction="none")).sum() / weights.sum()
    training.update("autoencoder", loss)


def adversarial_step(model: Any, batch: Block, training: Plain) -> None:
    """Goodfellow et al. 2014, Mescheder et al. 2018 (eq. 9), Gulrajani et al. 2017 (algorithm 1), Lim & Ye 2017; with classes
    Miyato & Koyama 2018 (eq. 3)."""
    config, classes = model.config, batch.evidence.argmax(1)
    given = torch.eye(3).to(batch.x)[classes] if config.labels else batch.x[:, :0]

    def generated(phase: str) -> Tensor:
        return torch.tanh(model.generator(torch.cat([training.normal(phase, "latent", 2), given], 1)))

    def critic(x: Tensor) -> Tensor:
        if not config.labels:
            return model.discriminator(x).float()
        phi, last = model.discriminator.features(x), model.discriminator[-1]
        embedded = torch.cat([last.weight, last.bias[:, None]], 1)[1 + classes]
        return last(phi)[:, :1] + (embedded * torch.cat([phi, phi.new_ones(len(x), 1)], 1)).sum(1, keepdim=True)

    def mean(values_B: Tensor) -> Tensor:
        # With classes a fake has that of a row, and weighs what it does.
        return weighted_mean(values_B, batch) if config.labels else values_B.mean()

    real = batch.x.view(-1, 1, 8, 8) * 2 - 1
    fake = generated("discriminator").detach()
    of_real, of_fake = critic(real)[:, 0], critic(fake)[:, 0]
    match config.loss:
        case "non_saturating":
            loss = weighted_mean(-logsigmoid(of_real), batch) + mean(-logsigmoid(-of_fake))
        case "hinge":
            loss = weighted_mean(relu(1 - of_real), batch) + mean(relu(1 + of_fake))
        case "wasserstein":
            loss = mean(of_fake) - weighted_mean(of_real, batch)
    match config.penalty:
        case "r1":
            loss = loss + 10 / 2 * weighted_mean(slope(critic, real) ** 2, batch)
        case "gradient_penalty":
            share = training.uniform("discriminator", "interpolation").view(-1, 1, 1, 1)
            loss = loss + 10 * weighted_mean((slope(critic, share * real + (1 - share) * fake) - 1) ** 2, batch)
    training.update("discriminator", loss)
    if training.step % config.num_critic_steps == config.num_critic_steps - 1:
        logits = critic(generated("generator"))[:, 0]
        training.update("generator", mean(-logsigmoid(logits) if config.loss == "non_saturating" else -logits))


def slope(critic: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """(B,) the norm of the gradient with respect to the sample, differentiable."""
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    return gradient.flatten(1).norm(dim=1)


def plainly_trained(name: str, config: DeepConfig, seed: int, device: torch.device = plain.CPU) -> Iterator[dict[str, Tensor]]:
    """The parameters after each step of a family in plain PyTorch."""
    steps = {"vae": autoencoder_step, "vae, semi-supervised": semi_supervised_step}
    return plain.trained(create(name), steps.get(name, adversarial_step), rows(name), config, seed, device)
