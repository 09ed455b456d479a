"""Models small enough to be written out by hand once more, in plain PyTorch: what the loop and the engines are tested with.

Legend: B samples, 4 features.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import plain
import torch
from plain import Plain
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, softplus

from gendist.protocols import Block, Draw, Loss, Phase, is_labelled
from gendist.train.config import DeepConfig


@dataclass(frozen=True)
class TensorRows:
    """`Rows` in memory."""

    x: Tensor
    weights: Tensor | None = None
    evidence: Tensor | None = None

    @property
    def num_rows(self) -> int:
        return len(self.x)

    def take(self, indices: Tensor) -> Block:
        weights = None if self.weights is None else self.weights[indices]
        evidence = None if self.evidence is None else self.evidence[indices]
        return Block(self.x[indices], indices, weights, evidence)

    def labelled(self) -> Tensor:
        return torch.nonzero(torch.zeros(0) if self.evidence is None else is_labelled(self.evidence))[:, 0]


def rows(num_rows: int = 50) -> TensorRows:
    """Weighted, and two of five labelled with one of three classes."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(num_rows, 4, generator=generator)
    labels = torch.randint(0, 3, (num_rows,), generator=generator)
    evidence = torch.full((num_rows, 3), -torch.inf, dtype=torch.float64)
    evidence[torch.arange(num_rows), labels] = 0.0
    evidence[torch.arange(num_rows) % 5 > 1] = 0.0
    return TensorRows(x, torch.rand(num_rows, generator=generator, dtype=torch.float64) + 0.5, evidence)


def mlp(sizes: Sequence[int], generator: torch.Generator, last: nn.Module | None = None) -> nn.Sequential:
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(sizes):
        layers += [nn.Linear(fan_in, fan_out), nn.Tanh()]
    network = nn.Sequential(*layers[:-1], *([last] if last else []))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    return network


class Regression:
    """One network with two terms of different counts: denoising, weighted, of all samples, and labels of some."""

    validation_objective = "squared_error"

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.network = mlp([4, 9, 7], generator)
        self.network.register_parameter("unused", nn.Parameter(torch.ones(3)))

    def networks(self) -> dict[str, nn.Module]:
        return {"network": self.network}

    def phases(self, step: int) -> list[Phase]:
        return [Phase("denoise", "network")]

    def draws(self, phase: Phase) -> dict[str, Draw]:
        return {"shift": Draw("normal", 4), "keep": Draw("uniform", 1)}

    def counts(self, phase: Phase, batch: Block) -> dict[str, float]:
        return {"squared_error": float(batch.weights_or_ones().sum()), "label": float(known(batch.evidence).sum())}

    def loss(self, phase: Phase, batch: Block, noise: Mapping[str, Tensor], step: int) -> Loss:
        output = self.network(batch.x + noise["shift"] * noise["keep"])
        weights = batch.weights_or_ones().float()
        squared_error = (output[:, :4] - batch.x).square().sum(1) * weights
        is_known = known(batch.evidence)
        label = cross_entropy(output[is_known, 4:], batch.evidence[is_known].argmax(1), reduction="sum")
        return Loss({"squared_error": squared_error.sum(), "label": label}, {"output": weights @ output.sum(1)})

    def validation_draws(self) -> dict[str, Draw]:
        return {"shift": Draw("normal", 4)}

    def validate(self, batch: Block, noise: Mapping[str, Tensor]) -> dict[str, Tensor]:
        output = self.network(batch.x + noise["shift"])
        return {"squared_error": ((output[:, :4] - batch.x).square().sum(1) * batch.weights_or_ones()).sum()}

    def needs_whole_batch(self, phase: Phase) -> str | None:
        return None


def known(evidence: Tensor) -> Tensor:
    return (evidence != 0.0).any(1)


class Adversarial:
    """Two networks; the penalty on the gradient at real samples (R1) is a phase of its own at every third step."""

    validation_objective = None

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.generator = mlp([3, 8, 4], generator)
        self.discriminator = mlp([4, 8, 1], generator)
        nn.utils.parametrizations.spectral_norm(self.discriminator[0])
        with torch.no_grad():  # its vectors begin at random
            for buffer in self.discriminator.buffers():
                buffer.copy_(nn.functional.normalize(torch.randn(buffer.shape, generator=generator), dim=0))

    def networks(self) -> dict[str, nn.Module]:
        return {"generator": self.generator, "discriminator": self.discriminator}

    def phases(self, step: int) -> list[Phase]:
        penalty = [Phase("penalty", "discriminator")] if step % 3 == 0 else []
        return [Phase("discriminator", "discriminator"), *penalty, Phase("generator", "generator")]

    def draws(self, phase: Phase) -> dict[str, Draw]:
        return {} if phase.name == "penalty" else {"latent": Draw("normal", 3)}

    def counts(self, phase: Phase, batch: Block) -> dict[str, float]:
        return {"r1" if phase.name == "penalty" else "logistic": batch.num_rows}

    def loss(self, phase: Phase, batch: Block, noise: Mapping[str, Tensor], step: int) -> Loss:
        if phase.name == "penalty":
            return Loss({"r1": squared_slope(self.discriminator, batch.x).sum()})
        fake = self.discriminator(self.generator(noise["latent"]))
        if phase.name == "generator":
            return Loss({"logistic": softplus(-fake).sum()})
        logistic = softplus(fake) + softplus(-self.discriminator(batch.x))
        return Loss({"logistic": logistic.sum()}, {"fake": batch.weights_or_ones().float() @ fake[:, 0]})

    def validation_draws(self) -> dict[str, Draw]:
        return {}

    def validate(self, batch: Block, noise: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {}

    def needs_whole_batch(self, phase: Phase) -> str | None:
        return None


def squared_slope(discriminator: nn.Module, x: Tensor) -> Tensor:
    """(B,) the squared norm of the gradient with respect to the sample, differentiable (Mescheder et al. 2018, eq. 9)."""
    x = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(discriminator(x).sum(), x, create_graph=True)
    return slope.square().sum(1)


MODELS = {"regression": Regression, "adversarial": Adversarial}


def regression_step(model: Regression, batch: Block, training: Plain) -> None:
    output = model.network(batch.x + training.normal("denoise", "shift", 4) * training.uniform("denoise", "keep"))
    weights = batch.weights.float()
    squared_error = (weights * (output[:, :4] - batch.x).square().sum(1)).sum() / weights.sum()
    labelled = known(batch.evidence)
    training.update("network", squared_error + cross_entropy(output[labelled, 4:], batch.evidence[labelled].argmax(1)))


def adversarial_step(model: Adversarial, batch: Block, training: Plain) -> None:
    fake = model.generator(training.normal("discriminator", "latent", 3)).detach()
    logits = model.discriminator(fake), model.discriminator(batch.x)
    training.update("discriminator", softplus(logits[0]).mean() + softplus(-logits[1]).mean())
    if training.step % 3 == 0:
        training.update("discriminator", squared_slope(model.discriminator, batch.x).mean())
    # A frozen network's spectral norm stays where it is.
    kept = [buffer.clone() for buffer in model.discriminator.buffers()]
    training.update(
        "generator", softplus(-model.discriminator(model.generator(training.normal("generator", "latent", 3)))).mean()
    )
    for buffer, value in zip(model.discriminator.buffers(), kept, strict=True):
        buffer.data.copy_(value)


PLAIN_STEPS = {"regression": regression_step, "adversarial": adversarial_step}


def plainly_trained(
    name: str, data: TensorRows, config: DeepConfig, seed: int, device: torch.device = plain.CPU
) -> Iterator[dict[str, Tensor]]:
    """The parameters after each step of a toy in plain PyTorch."""
    return plain.trained(MODELS[name](), PLAIN_STEPS[name], data, config, seed, device)
