"""The generative adversarial network with labels: of every row, as a condition, and of few, to learn the classes from."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from sklearn.datasets import load_digits
from torch import nn

import gendist
from gendist.data.rows import RowSet
from gendist.evaluate.coverage import likeness
from gendist.evaluate.watch import watch_samples
from gendist.models.gan import DISCRIMINATOR, GENERATOR, PENALTY, GenerativeAdversarialNetwork
from gendist.models.ops import adversarial, semi_supervised
from gendist.models.ops.augmentation import augment
from gendist.models.ops.latent_paths import NUM_PATHS, NUM_STEPS
from gendist.noise import Noise
from gendist.protocols import Block, LabelCounts, Phase, UserError

LABELS = ("a", "b", "c")
SEMI = {"labels": "semi_supervised", "penalty": "none"}


def small(x_shape=(4, 6), classes=LABELS, seed=0, **fields) -> GenerativeAdversarialNetwork:
    smooth = {"hidden_sizes": [16], "activation": "tanh"}
    fields = {"latent_dim": 3, "generator": smooth, "discriminator": smooth} | fields
    return GenerativeAdversarialNetwork.create(GenerativeAdversarialNetwork.Config(**fields), x_shape, classes, seed)


def evidence_of(classes: torch.Tensor, num_classes: int = 3) -> torch.Tensor:
    """(N, C): -1 is unknown."""
    evidence = torch.zeros(len(classes), num_classes).masked_fill(classes[:, None] >= 0, -torch.inf)
    known = torch.nonzero(classes >= 0)[:, 0]
    evidence[known, classes[known]] = 0.0
    return evidence


def batch_of(classes: list[int], width: int = 24, weights: torch.Tensor | None = None, seed: int = 0) -> Block:
    x = torch.rand(len(classes), width, generator=torch.Generator().manual_seed(seed))
    return Block(x, torch.arange(len(classes)), weights, evidence_of(torch.tensor(classes, dtype=torch.int64)))


def noise_of(model: Any, phase: Phase, num_rows: int) -> dict[str, torch.Tensor]:
    draw = {"normal": torch.randn, "uniform": torch.rand}
    generator = torch.Generator().manual_seed(0)
    return {name: draw[d.kind](num_rows, d.width, generator=generator) for name, d in model.draws(phase).items()}


def cut(block: Block, start: int, stop: int) -> Block:
    weights = None if block.weights is None else block.weights[start:stop]
    return Block(block.x[start:stop], block.rows[start:stop], weights, block.evidence[start:stop])


# Conditions


@pytest.mark.parametrize("network", [{"hidden_sizes": [9, 8]}, {"channels": [4, 5]}])
def test_the_discriminator_projects_features_on_the_class(network):
    model, batch = small(discriminator=network), batch_of([0, 2, 1, 1])
    logits = adversarial.projection(
        model.discriminator((2 * batch.x - 1).reshape(4, 1, 4, 6)), torch.eye(3)[torch.tensor([0, 2, 1, 1])]
    )
    phi = torch.cat([model.encode(batch.x), torch.ones(4, 1)], 1)
    last = model.discriminator[-1]
    weight = torch.cat([last.weight, last.bias[:, None]], 1)
    psi, embedding = weight[0], weight[1:]
    for i, y in enumerate([0, 2, 1, 1]):
        torch.testing.assert_close(logits[i], psi @ phi[i] + embedding[y] @ phi[i])


def test_data_and_samples_at_a_place_are_of_the_same_class():
    model, batch = small(), batch_of([0, 2, 1, 1, 0])
    noise = noise_of(model, DISCRIMINATOR, 5)
    y = torch.eye(3)[torch.tensor([0, 2, 1, 1, 0])]
    real = (2 * batch.x - 1).reshape(5, 1, 4, 6)
    fake = torch.tanh(model.generator(torch.cat([noise["latent"], y], 1)))

    def judge(x: torch.Tensor) -> torch.Tensor:
        outputs = model.discriminator(x)
        return outputs[:, 0] + outputs[:, 1:][y.bool()]

    loss = model.loss(DISCRIMINATOR, batch, noise, 0)
    torch.testing.assert_close(loss.terms["real"], -judge(real).sigmoid().log().sum())
    torch.testing.assert_close(loss.terms["fake"], -(1 - judge(fake).sigmoid()).log().sum())
    torch.testing.assert_close(loss.terms["penalty"], 10 * adversarial.r1(judge, real).sum())
    noise = noise_of(model, GENERATOR, 5)
    fake = torch.tanh(model.generator(torch.cat([noise["latent"], y], 1)))
    torch.testing.assert_close(model.loss(GENERATOR, batch, noise, 0).terms["generator"], -judge(fake).sigmoid().log().sum())


def test_a_soft_label_is_its_probabilities():
    model, noise = small(), noise_of(small(), GENERATOR, 2)
    x, probs = torch.rand(2, 24), torch.tensor([[0.2, 0.5, 0.3], [0.0, 1.0, 0.0]])
    soft = model.loss(GENERATOR, Block(x, torch.arange(2), None, probs.log()), noise, 0).terms["generator"]
    fake = torch.tanh(model.generator(torch.cat([noise["latent"], probs], 1)))
    outputs = model.discriminator(fake)
    torch.testing.assert_close(soft, -(outputs[:, 0] + (probs * outputs[:, 1:]).sum(1)).sigmoid().log().sum())


def test_a_sample_of_a_class_is_a_window_on_its_endless_one():
    model = small()
    whole = model.sample(100, seed=3, given="b")
    assert torch.equal(torch.cat([model.sample(30, seed=3, given="b"), model.sample(70, seed=3, offset=30, given="b")]), whole)
    mixed = model.sample(3000, seed=3)
    of_class = torch.stack([(mixed == model.sample(3000, seed=3, given=label)).all(1) for label in LABELS])
    assert bool((of_class.sum(0) == 1).all())  # the same latents, each of one class
    np.testing.assert_allclose(of_class.double().mean(1), 1 / 3, atol=0.03)
    torch.testing.assert_close(model.decode(torch.zeros(2, 3), given="c"), model.decode(torch.zeros(3, 3), given="c")[:2])


def test_samples_that_are_held_beside_data_are_of_the_rows_classes():
    classes = torch.tensor([0] * 40 + [2] * 8)
    x = torch.rand(48, 24, generator=torch.Generator().manual_seed(0))
    rows = RowSet(x.numpy(), np.arange(48), evidence=evidence_of(classes).numpy())
    model = small()
    samples = torch.cat([model.sample(40, seed=3, given="a"), model.sample(8, seed=3, offset=40, given="c")])
    expected = vars(likeness(x, samples))
    found = watch_samples(model, rows, 3, {})
    assert {name: found[f"samples/{name}"] for name in expected} == expected
    without = small(**SEMI)
    expected = vars(likeness(x, without.sample(48, seed=3)))
    found = watch_samples(without, rows, 3, {})
    assert {name: found[f"samples/{name}"] for name in expected} == expected


def test_the_classes_of_samples_are_told_where_they_have_one():
    model = small()
    class_N = model.sample_classes(50, seed=3, offset=7)
    samples = model.sample(50, seed=3, offset=7)
    of_class = torch.stack([model.sample(50, seed=3, offset=7, given=label) for label in LABELS])
    assert torch.equal(samples, of_class[class_N, torch.arange(50)])
    assert torch.equal(model.sample_classes(4, given="b"), torch.ones(4, dtype=torch.int64))
    assert not hasattr(small(**SEMI), "sample_classes")
    assert not hasattr(small(classes=()), "sample_classes")
    with pytest.raises(AttributeError, match="knows no classes"):
        _ = small(**SEMI).sample_classes


def test_a_row_of_weight_0_needs_no_label_and_is_no_row():
    model = small()
    whole = batch_of([0, -1, 2, 1], weights=torch.tensor([1.0, 0.0, 2.0, 1.0]))
    keep = torch.tensor([0, 2, 3])
    without = Block(whole.x[keep], whole.rows[keep], whole.weights[keep], whole.evidence[keep])
    model.check_labels(LabelCounts.of(whole.evidence, whole.weights))
    for phase in (DISCRIMINATOR, GENERATOR):
        noise = noise_of(model, phase, 4)
        first = model.loss(phase, whole, noise, 0).terms
        second = model.loss(phase, without, {name: values[keep] for name, values in noise.items()}, 0).terms
        assert first.keys() == second.keys() == model.counts(phase, whole).keys()
        for name, value in first.items():
            torch.testing.assert_close(value, second[name])
        assert model.counts(phase, whole) == model.counts(phase, without)


def test_saved_with_its_labels_it_is_the_same():
    for fields in ({}, SEMI):
        model = small(**fields)
        again = GenerativeAdversarialNetwork.from_tensors(model.config, model.tensors(), LABELS)
        assert again.labels == LABELS
        assert torch.equal(again.sample(5), model.sample(5))


@pytest.mark.parametrize("loss", ["non_saturating", "wasserstein"])
def test_a_planted_condition_is_learned(loss):
    """Two narrow normal distributions far from each other, told apart by nothing but the label."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 1000)
    x = rng.normal(size=(1000, 2)) * 0.3 + np.where(y[:, None] == 1, [2.0, -1.0], [-2.0, 1.0])
    network = {"hidden_sizes": [32]}
    penalty = {"penalty": "gradient_penalty", "penalty_weight": 1.0} if loss == "wasserstein" else {"penalty_weight": 0.1}
    spec = {
        "name": "planted",
        "family": "gan",
        "model": {"latent_dim": 4, "generator": network, "discriminator": network, "loss": loss, **penalty},
        "data": {"label": "y"},
        "fit": {
            "num_steps": 200,
            "global_batch_size": 64,
            "optimizer": {"learning_rate": 0.005, "betas": [0.0, 0.99]},
            "ema": 0.1,
        },
    }
    run = gendist.fit(spec, data={"a": x[:, 0], "b": x[:, 1], "y": y})
    assert run.model.labels == (0, 1)
    for label, mean in ((0, [-2.0, 1.0]), (1, [2.0, -1.0])):
        samples = run.model.sample(500, seed=1, given=label)
        np.testing.assert_allclose(samples.mean(0), mean, atol=0.5)
        assert float(samples.std(0).max()) < 1.0
    assert run.history[-1]["samples/coverage"] > 0.3


def test_hinge_and_wasserstein_judge_with_the_class_too():
    for fields in ({"loss": "hinge"}, {"loss": "wasserstein", "penalty": "gradient_penalty"}):
        model, batch = small(**fields), batch_of([0, 2, 1])
        noise = noise_of(model, DISCRIMINATOR, 3)
        swapped = Block(batch.x, batch.rows, None, evidence_of(torch.tensor([1, 0, 2])))
        first, second = (model.loss(DISCRIMINATOR, each, noise, 0).terms for each in (batch, swapped))
        assert all(not torch.equal(first[name], second[name]) for name in ("real", "fake", "penalty"))


# Few labels


def test_the_k_plus_1_losses_are_those_of_a_softmax_over_k_plus_1_classes():
    model, classes = small(**SEMI), [2, -1, 0, -1, -1]
    weights = torch.tensor([1.0, 2.0, 0.5, 1.0, 0.0])
    batch = batch_of(classes, weights=weights)
    noise = noise_of(model, DISCRIMINATOR, 5)
    fake = torch.tanh(model.generator(noise["latent"]))
    probs, of_fake = (
        torch.cat([model.discriminator(x), torch.zeros(5, 1)], 1).softmax(1)
        for x in ((2 * batch.x - 1).reshape(5, 1, 4, 6), fake)
    )
    loss = model.loss(DISCRIMINATOR, batch, noise, 0)
    # The class of a labelled row is judged among the K of data.
    labelled = -(probs[0, 2] / probs[0, :3].sum()).log() - 0.5 * (probs[2, 0] / probs[2, :3].sum()).log()
    torch.testing.assert_close(loss.terms["labelled"], labelled)
    # Whether a row is data is asked of every row, labelled or not.
    torch.testing.assert_close(loss.terms["real"], -(weights * (1 - probs[:, 3]).log()).sum())
    torch.testing.assert_close(loss.terms["fake"], -of_fake[:, 3].log().sum())
    assert model.counts(DISCRIMINATOR, batch) == {"labelled": 1.5, "real": 4.5, "fake": 5.0}


def test_features_are_matched_over_the_batch_or_by_pairs():
    batch = batch_of([-1, 0, -1, -1], weights=torch.tensor([1.0, 9.0, 2.0, 0.0]))
    model = small(**SEMI)
    noise = noise_of(model, GENERATOR, 4)
    real = model.encode(batch.x)
    fake = model.encode(model.decode(noise["latent"]))
    term = model.loss(GENERATOR, batch, noise, 0).terms["generator"] / model.counts(GENERATOR, batch)["generator"]
    torch.testing.assert_close(term, ((real[0] + 9 * real[1] + 2 * real[2]) / 12 - fake.mean(0)).square().sum())
    assert "feature_matching: pairs" in model.needs_whole_batch(GENERATOR)
    assert model.needs_whole_batch(DISCRIMINATOR) is None

    model = small(**SEMI, feature_matching="pairs")
    assert model.needs_whole_batch(GENERATOR) is None
    noise = noise_of(model, GENERATOR, 4)
    fake, other = (model.encode(model.decode(noise[name])) for name in ("latent", "other_latent"))
    term = model.loss(GENERATOR, batch, noise, 0).terms["generator"]
    torch.testing.assert_close(term, sum(w * (fake[i] - real[i]) @ (other[i] - real[i]) for i, w in ((0, 1), (1, 9), (2, 2))))
    assert model.counts(GENERATOR, batch) == {"generator": 12.0}


@pytest.mark.parametrize("feature_matching", ["batch", "pairs"])
def test_a_generator_is_trained_where_every_row_has_a_label(feature_matching):
    model, batch = small(**SEMI, feature_matching=feature_matching), batch_of([0, 1, 2, 1])
    loss = model.loss(GENERATOR, batch, noise_of(model, GENERATOR, 4), 0)
    assert float(loss.terms["generator"].detach()) != 0.0
    assert model.counts(GENERATOR, batch) == {"generator": 4.0}
    gradients = torch.autograd.grad(loss.terms["generator"], list(model.generator.parameters()))
    assert all(bool((gradient != 0).any()) for gradient in gradients)
    assert model.counts(DISCRIMINATOR, batch) == {"labelled": 4.0, "real": 4.0, "fake": 4.0}


def test_pairs_have_the_mean_of_the_whole():
    """Of all pairs of two fakes that are drawn independently: the squared difference of means, and the variance of the data."""
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    fake = torch.randn(6, 4, generator=generator, dtype=torch.float64) + 1
    every = torch.cartesian_prod(torch.arange(5), torch.arange(6), torch.arange(6))
    pairs = semi_supervised.pairwise_feature_matching(real[every[:, 0]], fake[every[:, 1]], fake[every[:, 2]])
    expected = semi_supervised.feature_matching(real, fake, torch.ones(5, dtype=torch.float64))
    torch.testing.assert_close(pairs.mean(), expected + real.var(0, correction=0).sum())


DIGITS = load_digits()


@pytest.mark.parametrize("feature_matching", ["batch", "pairs"])
def test_few_labels_and_many_rows_lead_to_the_classes(feature_matching):
    x, y = DIGITS.data / 16.0, [int(label) for label in DIGITS.target]
    few = [label if i < 50 else None for i, label in enumerate(y)]
    spec = {
        "name": "few",
        "family": "gan",
        "model": {
            "latent_dim": 8,
            "generator": {"hidden_sizes": [64]},
            "discriminator": {"hidden_sizes": [128, 64]},
            "output": "tanh",
            "feature_matching": feature_matching,
            **SEMI,
        },
        "data": {"label": "y"},
        "fit": {
            "num_steps": 100,
            "global_batch_size": 100,
            "labelled_batch_size": 50,
            "optimizer": {"learning_rate": 0.002, "betas": [0.5, 0.99]},
        },
    }
    model = gendist.fit(spec, data={"image": list(x), "y": few}).model
    log_probs = model.classify(x[50:])
    assert log_probs.shape == (len(x) - 50, 10)
    assert log_probs.dtype == torch.float64
    torch.testing.assert_close(log_probs.exp().sum(1), torch.ones(len(x) - 50, dtype=torch.float64))
    assert float((log_probs.argmax(1) == torch.tensor(y[50:])).double().mean()) > 0.5  # chance is 0.1
    assert torch.equal(model.classify(x[60:70]), log_probs[10:20])


def test_the_classes_of_a_row_seen_twice_are_compared():
    model = small(**SEMI, augmentation=["translation"], consistency_weight=3.0)
    batch = batch_of([0, -1, 1, -1], weights=torch.tensor([1.0, 2.0, 0.0, 0.5]))
    noise = noise_of(model, DISCRIMINATOR, 4)
    once, twice = (
        model.discriminator(augment(model._seen(batch.x), ("translation",), noise[name])).softmax(1)
        for name in ("augmentation", "augmentation_of_again")
    )
    expected = 3.0 * (batch.weights * (once - twice).square().sum(1)).sum()
    assert bool(expected > 0.0)
    torch.testing.assert_close(model.loss(DISCRIMINATOR, batch, noise, 0).terms["consistency"], expected)
    assert model.counts(DISCRIMINATOR, batch)["consistency"] == 3.5
    same = {**noise, "augmentation_of_again": noise["augmentation"]}
    assert bool(model.loss(DISCRIMINATOR, batch, same, 0).terms["consistency"] == 0.0)


def test_validation_counts_the_errors_of_rows_with_a_label():
    model, batch = small(**SEMI), batch_of([0, -1, 1, 2, 0], weights=torch.tensor([1.0, 1.0, 2.0, 1.0, 3.0]))
    wrong = model.classify(batch.x).argmax(1) != torch.tensor([0, -1, 1, 2, 0])
    values = model.validate(batch, {})
    assert float(values["error"]) == float(wrong[0] + 2 * wrong[2] + wrong[3] + 3 * wrong[4])
    assert float(values["labelled"]) == 7.0
    assert small().validate(batch, {}) == {}


# Both

NOISY = {"hidden_sizes": [6, 5], "activation": "tanh", "input_noise": 0.3, "hidden_noise": 0.5}
CASES = {
    "condition": {"penalty_every": 2, "augmentation": ["color", "translation", "cutout"]},
    "wasserstein": {"loss": "wasserstein", "penalty": "gradient_penalty", "augmentation": ["translation"]},
    "pairs": {"labels": "semi_supervised", "feature_matching": "pairs", "augmentation": ["cutout", "translation"]},
    "noise": {"penalty_every": 2, "discriminator": NOISY},
    "weight norm": {"penalty_every": 2, "discriminator": {**NOISY, "weight_norm": True}},
    "pairs, consistent": {
        "labels": "semi_supervised",
        "feature_matching": "pairs",
        "augmentation": ["translation"],
        "consistency_weight": 3.0,
    },
    "pairs and noise": {"labels": "semi_supervised", "feature_matching": "pairs", "discriminator": NOISY},
}


@pytest.mark.parametrize("name", CASES)
def test_losses_of_micro_batches_add_up_to_that_of_the_whole(name):
    model = small(**CASES[name])
    is_semi = "pairs" in name
    batch = batch_of([0, 2, -1, 1, -1, -1, 0] if is_semi else [0, 2, 1, 1, 0, 2, 0], weights=torch.linspace(0.5, 2.0, 7))
    for phase in (DISCRIMINATOR, PENALTY, GENERATOR):
        if phase not in model.phases(0):
            continue
        noise = noise_of(model, phase, 7)
        parameters = list(model.networks()[phase.network].parameters())

        def gradients(loss):
            return torch.autograd.grad(sum(loss.terms.values()), parameters, allow_unused=True)  # noqa: B023

        whole = model.loss(phase, batch, noise, 0)
        parts = [
            (cut(batch, a, b), {key: values[a:b] for key, values in noise.items()}) for a, b in ((0, 2), (2, 3), (3, 7), (7, 7))
        ]
        losses = [model.loss(phase, part, own, 0) for part, own in parts]
        for term, value in whole.terms.items():
            torch.testing.assert_close(sum(each.terms[term] for each in losses), value, rtol=1e-5, atol=1e-5)
            total = sum(model.counts(phase, part)[term] for part, _ in parts)
            assert total == pytest.approx(model.counts(phase, batch)[term], rel=1e-6)
        summed = [sum(0 if g is None else g for g in each) for each in zip(*map(gradients, losses), strict=True)]
        for found, expected in zip(summed, gradients(whole), strict=True):
            torch.testing.assert_close(found, 0 if expected is None else expected, rtol=1e-4, atol=1e-4)


def test_with_a_weight_norm_the_sizes_of_hidden_weights_mean_nothing():
    model = small(discriminator={**NOISY, "weight_norm": True})
    first, second, last = (layer for layer in model.discriminator.modules() if isinstance(layer, torch.nn.Linear))
    x = torch.rand(5, first.in_features)
    rows = first.weight / first.weight.square().sum(1, keepdim=True).sqrt()
    torch.testing.assert_close(first(x), x @ rows.T + first.bias)
    before = model.encode(x)
    with torch.no_grad():
        first.weight.mul_(torch.rand(6, 1) + 0.5)
        second.weight.mul_(7.0)
    torch.testing.assert_close(model.encode(x), before)
    assert type(last) is torch.nn.Linear


def test_data_and_samples_are_augmented_and_verbs_are_not():
    plain, augmented = small(), small(augmentation=["translation"])
    batch = batch_of([0, 1, 2])
    noise = noise_of(augmented, DISCRIMINATOR, 3)
    first, second = (model.loss(DISCRIMINATOR, batch, noise, 0).terms for model in (plain, augmented))
    assert all(not torch.equal(first[name], second[name]) for name in ("real", "fake", "penalty"))
    assert torch.equal(plain.sample(5), augmented.sample(5))
    assert torch.equal(plain.encode(batch.x), augmented.encode(batch.x))


def test_noise_is_added_to_what_each_layer_is_given_and_verbs_see_none():
    model = small(x_shape=(4,), output="linear", penalty="none", discriminator=NOISY)
    assert {name: d.width for name, d in model.draws(DISCRIMINATOR).items()} == {
        "latent": 3,
        "discriminator": 4 + 6 + 5,
        "discriminator_of_fake": 4 + 6 + 5,
    }
    batch = batch_of([0, 1, 2], width=4)
    noise = noise_of(model, DISCRIMINATOR, 3)
    first, second, last = (layer for layer in model.discriminator if isinstance(layer, nn.Linear))

    def logits(x, noise_BW):
        h = (first(x + 0.3 * noise_BW[:, :4])).tanh() + 0.5 * noise_BW[:, 4:10]
        outputs = last(second(h).tanh() + 0.5 * noise_BW[:, 10:])
        return adversarial.projection(outputs, batch.evidence.softmax(1))

    fake = model.generator(torch.cat([noise["latent"], batch.evidence.softmax(1)], 1))
    by_hand = adversarial.discriminator_loss(
        "non_saturating", logits(batch.x, noise["discriminator"]), logits(fake, noise["discriminator_of_fake"])
    )
    terms = model.loss(DISCRIMINATOR, batch, noise, 0).terms
    torch.testing.assert_close(torch.stack([terms["real"], terms["fake"]]), torch.stack([term.sum() for term in by_hand]))
    torch.testing.assert_close(model.encode(batch.x), second(first(batch.x).tanh()).tanh())


def test_with_conditions_a_sample_weighs_what_its_row_does():
    """Else the classes of D's two terms would have other frequencies, of which D of a Wasserstein loss makes what it likes."""
    model = small(labels="condition", loss="wasserstein", penalty="gradient_penalty")
    weights = torch.tensor([1.0, 0.5, 0.0, 2.0], dtype=torch.float64)
    batch, without = batch_of([0, 1, 2, 1], weights=weights), batch_of([0, 1, 2, 1])
    for phase, term in ((DISCRIMINATOR, "fake"), (GENERATOR, "generator")):
        noise = noise_of(model, phase, 4)
        each = torch.stack(
            [
                model.loss(phase, cut(without, i, i + 1), {name: value[i : i + 1] for name, value in noise.items()}, 0).terms[
                    term
                ]
                for i in range(4)
            ]
        )
        torch.testing.assert_close(model.loss(phase, batch, noise, 0).terms[term], (weights.float() * each).sum())
        assert model.counts(phase, batch)[term] == 3.5


def test_a_wasserstein_discriminator_is_right_about_nothing():
    """Whatever is added to all of its logits changes no loss."""
    model = small(labels="condition", loss="wasserstein", penalty="gradient_penalty")
    batch = batch_of([0, 1, 2, 1])
    assert model.loss(DISCRIMINATOR, batch, noise_of(model, DISCRIMINATOR, 4), 0).watched.keys() == {"real_logit", "fake_logit"}


def test_a_discriminator_that_has_won_is_told():
    assert small().advice({"discriminator/accuracy": 0.97}) == ()
    assert small().advice({}) == ()
    (line,) = small().advice({"discriminator/accuracy": 0.999})
    assert "99.9%" in line
    assert "model.penalty_weight" in line


class NoFeatures(nn.Module):
    def __init__(self, input_shape, output_shape):
        super().__init__()
        self.layer = nn.Linear(24, output_shape[0])

    def forward(self, x):
        return self.layer(x.flatten(1))


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: small(classes=(), **SEMI), "model.labels: semi_supervised needs classes"),
        (lambda: small().sample(3, given="d"), "'d'; the labels are a, b, c"),
        (lambda: small().decode(np.zeros((2, 3))), "with given="),
        (lambda: small(**SEMI).sample(3, given="a"), "knows no classes; model.labels: condition"),
        (lambda: check([0, -1, 1, 2]), "1 of 4 rows have no label.*semi_supervised"),
        (lambda: check([0, 2, 2, 0]), "the label b, and nothing"),
        (lambda: check([0, 2, 1], weights=torch.tensor([1.0, 1.0, 0.0])), "the label b, and nothing"),
        (lambda: check([0, 2, -1, -1], **SEMI), "the label b, and nothing"),
        (lambda: small(discriminator={"module": f"{__name__}:NoFeatures"}, **SEMI), "no method features"),
    ],
)
def test_mistakes_are_one_line(call, match):
    with pytest.raises(UserError, match=match) as error:
        call()
    assert "\n" not in str(error.value)


def check(classes: list[int], weights: torch.Tensor | None = None, **fields: Any) -> None:
    weights = torch.ones(len(classes)) if weights is None else weights
    small(**fields).check_labels(LabelCounts.of(evidence_of(torch.tensor(classes)).double(), weights.double()))


def test_labels_that_suffice_are_accepted():
    check([0, 1, 2])
    check([0, 1, -1, 2, -1], **SEMI)


def test_figures_are_decoded_latents_of_the_classes():
    model = small(labels="condition")
    figures = model.figures(2)
    z = Noise(2, "figures").normal(0, 2 * NUM_PATHS, 3).float()
    for x_TD, label in zip(figures["classes"].x_RTD, LABELS, strict=True):
        torch.testing.assert_close(x_TD, model.decode(z[:NUM_STEPS], given=label))
    ends = figures["interpolations"].x_RTD[:, [0, -1]]
    for row, label in enumerate(figures["interpolations"].names):
        torch.testing.assert_close(ends[row], model.decode(z[[row, NUM_PATHS + row]], given=label))
    assert set(figures["interpolations"].names) == set(LABELS)
    assert list(small(classes=(), labels=None).figures(0)) == ["interpolations"]


def test_a_users_module_without_features_takes_conditions():
    module = {"module": f"{__name__}:NoFeatures"}
    model, batch = small(discriminator=module), batch_of([0, 1])
    assert model.loss(DISCRIMINATOR, batch, noise_of(model, DISCRIMINATOR, 2), 0).terms.keys() == {"real", "fake", "penalty"}


def test_classify_is_offered_where_classes_are_learned():
    assert hasattr(small(**SEMI), "classify")
    assert "classify" not in small(**SEMI).not_offered
    assert not hasattr(small(), "classify")
    assert "semi_supervised" in small().not_offered["classify"]


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"labels": "semi_supervised", "loss": "hinge"}, "loss hinge"),
        ({"feature_matching": "pairs"}, "semi_supervised alone"),
        ({"consistency_weight": 1.0, "augmentation": ["color"]}, "semi_supervised alone"),
        ({"labels": "semi_supervised", "consistency_weight": 1.0}, "the same row twice"),
        ({"discriminator": {"channels": [8], "hidden_noise": 0.5}}, "hidden_noise is of fully connected layers"),
        ({"discriminator": {"channels": [8], "weight_norm": True}}, "weight_norm is of fully connected layers"),
        ({"discriminator": {"weight_norm": True, "spectral_norm": True}}, "weight_norm and spectral_norm are given"),
    ],
)
def test_configurations_that_are_no_game_are_refused(fields, match):
    with pytest.raises(ValidationError, match=match):
        small(**fields)
