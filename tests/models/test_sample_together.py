"""Samples of several requests at once: the bytes of `sample`, whatever was drawn beside them. The conformance table has this of
every family without labels."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from gendist.data.coordinates import Whitened
from gendist.data.transforms import Step, Transforms
from gendist.models.gan import GenerativeAdversarialNetwork
from gendist.models.gmm import GaussianMixture
from gendist.models.vae import VariationalAutoencoder
from gendist.protocols import SampleAddress, UserError
from gendist.transformed import Transformed

MLP = {"hidden_sizes": [24]}
LABELS = ("a", "b", "c")
ADDRESSES = [
    SampleAddress(1, 7),
    SampleAddress(37, 7, 100),
    SampleAddress(64, 2**64 - 1, 2**40 + 3),
    SampleAddress(5, 0, 61),
    SampleAddress(130, 3),
]


def vae(labels: tuple[Any, ...] = (), **config: Any) -> VariationalAutoencoder:
    config = {"latent_dim": 3, "encoder": MLP, "decoder": MLP, "likelihood": "gaussian", **config}
    return VariationalAutoencoder.create(VariationalAutoencoder.Config.model_validate(config), (12,), labels, 0)


def gan(classes: tuple[Any, ...] = (), **config: Any) -> GenerativeAdversarialNetwork:
    config = {"latent_dim": 3, "generator": MLP, "discriminator": MLP, **config}
    return GenerativeAdversarialNetwork.create(GenerativeAdversarialNetwork.Config.model_validate(config), (4, 3), classes, 0)


def prior() -> GaussianMixture:
    rng = np.random.default_rng(0)
    return GaussianMixture.from_parameters([0.3, 0.7], rng.normal(size=(2, 3)), np.stack([np.eye(3), 0.1 * np.eye(3)]))


def behind_transforms(model: Any) -> Transformed:
    names = tuple(f"x_{i}" for i in range(model.num_features))
    rng = np.random.default_rng(1)
    rotation = torch.from_numpy(np.linalg.qr(rng.normal(size=(12, 12)))[0])
    steps = (Whitened(torch.arange(12.0, dtype=torch.float64), rotation, torch.full((12,), 3.0, dtype=torch.float64)),)
    return Transformed(model, Transforms(names, (Step.model_validate("whiten"),), steps))


MODELS = {
    "labelled vae": vae(LABELS),
    "vae with a prior": vae().with_prior(prior()),
    "labelled vae with a prior": vae(LABELS).with_prior(prior()),
    "vae of images": vae(likelihood="bernoulli"),
    "vae of draws": vae(LABELS, samples="draws"),
    "conditional gan": gan(LABELS, labels="condition"),
    "semi-supervised gan": gan(LABELS, labels="semi_supervised"),
    "transformed vae": behind_transforms(vae(LABELS)),
}


def alone(model: Any, address: SampleAddress) -> torch.Tensor:
    return model.sample(address.num_samples, seed=address.seed, offset=address.offset, given=address.given)


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())
def test_they_are_the_samples_made_one_by_one_in_any_order(model):
    conditions = getattr(model, "conditions", model.labels)
    addresses = ADDRESSES + [replace(each, given=c) for each, c in zip(ADDRESSES, conditions, strict=False)]
    expected = [alone(model, each) for each in addresses]
    for order in (range(len(addresses)), reversed(range(len(addresses))), random.Random(0).sample(range(len(addresses)), 4)):
        order = list(order)
        for own, index in zip(model.sample_together([addresses[i] for i in order]), order, strict=True):
            assert own.dtype == expected[index].dtype
            assert own.numpy().tobytes() == expected[index].numpy().tobytes()


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())
def test_rows_are_those_of_one_longer_sample(model):
    parts = model.sample_together([SampleAddress(40, 9), SampleAddress(60, 9, 40)])
    assert torch.equal(torch.cat(parts), model.sample(100, seed=9))


@pytest.mark.parametrize("model", [gan(), vae(), MODELS["conditional gan"]], ids=["gan", "vae", "conditional gan"])
def test_a_label_that_is_none_is_refused(model):
    with pytest.raises(UserError, match="given"):
        model.sample_together([SampleAddress(1), SampleAddress(1, given="nobody")])
