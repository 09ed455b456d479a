"""What the benchmark of training compares on: the networks, the images, and loops over them that are written by hand.

Legend: N images, B images of a batch, H, W height and width.
"""

from __future__ import annotations

import io
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext, redirect_stderr
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

BATCH_SIZE = 128
ENDLESS = 10**9
HEIGHT, WIDTH, NUM_IMAGES = 28, 28, 60_000  # MNIST's


@dataclass(frozen=True)
class Case:
    """One family: its `model:` block, the optimizer of every network, and its step written by hand.

    steps_at_once  that are timed: of gendist, from one record to the next
    x_shape        of an image
    batch_size     over all processes
    fit            what else the spec says of the arithmetic: precision, channels_last, compile
    device         as torch names it
    """

    title: str
    family: str
    model: Mapping[str, Any]
    optimizer: Mapping[str, Any]
    plain_step: Callable[..., Callable[[Any], Any]]
    steps_at_once: int
    x_shape: tuple[int, ...] = (HEIGHT, WIDTH)
    batch_size: int = BATCH_SIZE
    fit: Mapping[str, Any] = field(default_factory=dict)
    device: str = "cpu"

    def fit_config(self, num_steps: int) -> dict[str, Any]:
        return {
            "num_steps": num_steps,
            "global_batch_size": self.batch_size,
            "optimizer": dict(self.optimizer),
            "record_every": self.steps_at_once,
            **self.fit,
        }

    def spec(self, num_steps: int, num_workers: int) -> dict[str, Any]:
        return {
            "name": "benchmark",
            "family": self.family,
            "model": dict(self.model),
            "fit": self.fit_config(num_steps),
            "cluster": {"num_workers": num_workers},
        }

    def new_model(self) -> Any:
        from gendist.config import family_class

        family = family_class(self.family)
        return family.create(family.Config(**self.model), self.x_shape, (), 0)


def plain_autoencoder_step(model: Any, optimizer: Any, wrap: Callable[[Any], Any], precision: Any) -> Callable[[Any], Any]:
    """The negative ELBO with one z an image."""
    import torch

    network = wrap(model.autoencoder)
    adam = optimizer(network.parameters())
    latent_dim = model.config.latent_dim

    def step(x: Any) -> Any:
        with precision():
            log_prob_B1, kl_BL, *_ = network(x, torch.randn(len(x), 1, latent_dim, device=x.device))
            loss = (kl_BL.sum(1) - log_prob_B1[:, 0]).mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
        return loss.detach()

    return step


def plain_adversarial_step(model: Any, optimizer: Any, wrap: Callable[[Any], Any], precision: Any) -> Callable[[Any], Any]:
    """The non-saturating loss (Goodfellow et al. 2014, algorithm 1: new noise for the generator's step), with nothing computed
    that is not needed: no gradient of the generator in the discriminator's step, none of the discriminator's weights in the
    generator's."""
    import torch
    from torch.nn.functional import softplus

    generator, discriminator = wrap(model.generator), wrap(model.discriminator)
    adam_of_generator, adam_of_discriminator = optimizer(generator.parameters()), optimizer(discriminator.parameters())
    latent_dim = model.config.latent_dim

    def step(x: Any) -> Any:
        real = 2.0 * model.layout.to_network(x) - 1.0
        with precision():
            with torch.no_grad():
                fake = torch.tanh(model.generator(torch.randn(len(x), latent_dim, device=x.device)))
            loss = softplus(-discriminator(real)).mean() + softplus(discriminator(fake)).mean()
        adam_of_discriminator.zero_grad()
        loss.backward()
        adam_of_discriminator.step()
        model.discriminator.requires_grad_(False)
        with precision():
            fake = torch.tanh(generator(torch.randn(len(x), latent_dim, device=x.device)))
            loss_of_generator = softplus(-model.discriminator(fake)).mean()
        adam_of_generator.zero_grad()
        loss_of_generator.backward()
        adam_of_generator.step()
        model.discriminator.requires_grad_(True)
        return loss.detach()

    return step


CASES = {
    "vae": Case(
        "VAE, convolutions 32-64, latent 16",
        "vae",
        {"latent_dim": 16, "encoder": {"channels": [32, 64]}, "decoder": {"channels": [64, 32]}},
        {"learning_rate": 1e-3},
        plain_autoencoder_step,
        10,
    ),
    "gan": Case(
        "GAN, convolutions 128-64 and 64-128, latent 64",
        "gan",
        {
            "latent_dim": 64,
            "generator": {"channels": [128, 64]},
            "discriminator": {"channels": [64, 128]},
            "penalty": "none",
        },
        {"learning_rate": 2e-4, "betas": [0.5, 0.999]},
        plain_adversarial_step,
        5,
    ),
}


def images(mnist: Path) -> np.ndarray:
    """(N, H, W) uint8: MNIST's training images from a folder in the Hugging Face hub's layout, or random ones as many.
    FileNotFoundError where the folder has none."""
    import pyarrow.parquet as pq
    from PIL import Image

    files = sorted(mnist.rglob("train*.parquet"))
    if not files:
        raise FileNotFoundError(f"no train*.parquet in {mnist}; name MNIST's folder with --mnist")
    encoded = [image["bytes"] for file in files for image in pq.read_table(file, columns=["image"])["image"].to_pylist()]
    return np.stack([np.asarray(Image.open(io.BytesIO(image))) for image in encoded])


def random_images() -> np.ndarray:
    """(N, H, W) uint8, as many and as large as MNIST's."""
    return np.random.default_rng(0).integers(0, 256, (NUM_IMAGES, HEIGHT, WIDTH), dtype=np.uint8)


def rows_of(x_NHW: np.ndarray) -> Any:
    """(N, H W) float32 from 0 to 1."""
    import torch

    return torch.from_numpy(x_NHW.reshape(len(x_NHW), -1)).float().div_(255.0)


# Contenders: each yields after every `steps_at_once` steps on BATCH_SIZE images, over all processes


def gendist_loop(case: Case, x_NHW: np.ndarray, rank: int, world_size: int) -> Iterator[None]:
    """Training without disk and driver: `gendist.train.loop` and its engine, on rows in memory."""
    import torch

    from gendist.data.rows import RowSet
    from gendist.train.config import DeepConfig
    from gendist.train.ddp_engine import DdpEngine
    from gendist.train.loop import train
    from gendist.train.processes import Processes

    config = DeepConfig(**case.fit_config(ENDLESS), checkpoint_every=ENDLESS)
    model, engine = case.new_model(), DdpEngine(Processes(rank, world_size, torch.device(case.device)), config)
    engine.prepare(model.networks())
    rows = RowSet(rows_of(x_NHW).numpy(), np.arange(len(x_NHW)))
    for _ in train(model, engine, rows, config, seed=0):
        yield


def plain_loop(case: Case, x_NHW: np.ndarray, rank: int, world_size: int) -> Iterator[None]:
    """A dozen lines of PyTorch: rows gathered from a tensor in the device's memory by a permutation, torch's own noise, the
    same optimizer (AdamW, fused), a loss that is looked at once a chunk; of several processes, with DistributedDataParallel."""
    import torch
    from torch.nn.parallel import DistributedDataParallel

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        betas = tuple(case.optimizer.get("betas", (0.9, 0.999)))
        return torch.optim.AdamW(parameters, case.optimizer["learning_rate"], betas, weight_decay=0.0, fused=True)

    wrap = DistributedDataParallel if torch.distributed.is_initialized() else lambda network: network
    model = case.new_model()
    for network in model.networks().values():
        network.to(case.device, memory_format=torch.channels_last if case.fit.get("channels_last") else torch.preserve_format)
        if case.fit.get("compile"):
            network.compile()
    name = case.fit.get("precision", "float32")
    precision = nullcontext if name == "float32" else partial(torch.autocast, case.device, getattr(torch, name))
    step = case.plain_step(model, optimizer, wrap, precision)
    x, batch_size, loss, num_steps = rows_of(x_NHW).to(case.device), case.batch_size // world_size, torch.tensor(0.0), 0
    while True:
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(num_steps))[rank::world_size].to(x.device)
        for start in range(0, len(order) - batch_size + 1, batch_size):
            loss = step(x[order[start : start + batch_size]])
            num_steps += 1
            if num_steps % case.steps_at_once == 0:
                assert torch.isfinite(loss), float(loss)
                yield


def pythae_trainer(case: Case, x_NHW: np.ndarray, rank: int, world_size: int) -> Iterator[None]:
    """Epochs of pythae's own trainer, of `steps_at_once` batches each, with the same encoder and decoder."""
    import torch
    from pythae.data.datasets import BaseDataset
    from pythae.models import VAE, VAEConfig
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder
    from pythae.trainers import BaseTrainer, BaseTrainerConfig

    logging.disable(logging.INFO)
    network = case.new_model().autoencoder

    class Encoder(BaseEncoder):
        def __init__(self) -> None:
            super().__init__()
            self.network = network.encoder

        def forward(self, x: Any) -> Any:
            mean, log_variance = self.network(x).chunk(2, dim=1)
            return ModelOutput(embedding=mean, log_covariance=log_variance)

    class Decoder(BaseDecoder):
        def __init__(self) -> None:
            super().__init__()
            self.network = network.decoder

        def forward(self, z: Any) -> Any:
            return ModelOutput(reconstruction=torch.sigmoid(self.network(z)))

    config = VAEConfig(input_dim=(1, HEIGHT, WIDTH), latent_dim=case.model["latent_dim"], reconstruction_loss="bce")
    x = rows_of(x_NHW[: case.steps_at_once * BATCH_SIZE]).reshape(-1, 1, HEIGHT, WIDTH)
    with tempfile.TemporaryDirectory() as folder:
        trainer = BaseTrainer(
            VAE(config, encoder=Encoder(), decoder=Decoder()),
            BaseDataset(x, torch.zeros(len(x))),
            training_config=BaseTrainerConfig(
                output_dir=folder,
                per_device_train_batch_size=BATCH_SIZE,
                learning_rate=case.optimizer["learning_rate"],
                no_cuda=True,
            ),
        )
        trainer.prepare_training()
        for epoch in range(1, ENDLESS):
            with Path(os.devnull).open("w") as nowhere, redirect_stderr(nowhere):  # its progress bar
                trainer.train_step(epoch)
            yield
