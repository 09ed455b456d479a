"""Variational autoencoders with labels: p(x | y) where all rows have one, M2 where some have none, by brute force over y."""

from __future__ import annotations

import io
import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch.distributions import Bernoulli, Normal, kl_divergence
from torch.nn.functional import one_hot

import gendist
from gendist.models import vae
from gendist.models.ops import semi_supervised_elbo
from gendist.models.vae import VariationalAutoencoder, VariationalAutoencoderConfig
from gendist.noise import Noise
from gendist.one_thread import one_thread
from gendist.protocols import Block, LabelCounts, UserError
from gendist.transformed import Transformed

LABELS = ("a", "b", "c")
SMALL = {"hidden_sizes": [16], "activation": "tanh"}
CLASSIFIER = {"classifier": SMALL, "classification_weight": 0.7}


def small(x_shape=(4, 3), labels=LABELS, **fields) -> VariationalAutoencoder:
    fields = {"latent_dim": 2, "encoder": SMALL, "decoder": SMALL} | fields
    return VariationalAutoencoder.create(VariationalAutoencoderConfig(**fields), x_shape, labels, 0)


def x_of(num_rows: int, width: int = 12) -> torch.Tensor:
    return Noise(1, "x").uniform(0, num_rows, width).float()


def counts_of(evidence_NC: torch.Tensor, without: int | None = None) -> LabelCounts:
    """Of rows of weight 1, but for one that has none."""
    weights_N = torch.ones(len(evidence_NC))
    if without is not None:
        weights_N[without] = 0.0
    return LabelCounts.of(evidence_NC, weights_N)


def evidence_of(*rows: str | list[float] | None) -> torch.Tensor:
    """A label, None, or the probabilities of a soft one."""
    known = torch.eye(len(LABELS)).log()
    each = [
        torch.zeros(3) if y is None else torch.tensor(y).log() if isinstance(y, list) else known[LABELS.index(y)] for y in rows
    ]
    return torch.stack(each)


MIXED = evidence_of("a", None, "c", None, "b", [0.2, 0.8, 0.0], "a", None)


def batch_of(evidence: torch.Tensor, weights: torch.Tensor | None = None, width: int = 12) -> Block:
    return Block(x_of(len(evidence), width), torch.arange(len(evidence)), weights, evidence)


def noise_of(model: VariationalAutoencoder, num_rows: int) -> dict[str, torch.Tensor]:
    return {
        name: getattr(Noise(2, name), draw.kind)(0, num_rows, draw.width).float()
        for name, draw in model.validation_draws().items()
    }


def elbo_by_hand(model: VariationalAutoencoder, x: torch.Tensor, noise: torch.Tensor, c: int) -> torch.Tensor:
    """(N,) E[log p(x | z, y = c)] - KL, of fully connected networks that have one-hot labels behind x and z."""
    label = one_hot(torch.full((len(x),), c), len(LABELS)).float()
    mean, log_variance = model.autoencoder.encoder(torch.cat([x, label], 1)).chunk(2, 1)
    posterior = Normal(mean, (0.5 * log_variance).exp())
    y = model.autoencoder.decoder(torch.cat([posterior.loc + posterior.scale * noise, label], 1)).flatten(1)
    log_prob = Bernoulli(logits=y, validate_args=False).log_prob(x).sum(1)
    return log_prob - kl_divergence(posterior, Normal(0.0, 1.0)).sum(1)


def test_the_loss_of_m2_is_that_of_brute_force_over_the_classes():
    model, batch, weights = small(**CLASSIFIER), batch_of(MIXED), torch.linspace(0.5, 2.0, len(MIXED)).double()
    noise = noise_of(model, len(MIXED))
    (phase,) = model.phases(0)
    weighted = batch_of(MIXED, weights)
    elbo_BC = torch.stack([elbo_by_hand(model, batch.x, noise["latent"], c) for c in range(3)], 1)
    log_q_BC = torch.log_softmax(model.autoencoder.classifier(batch.x.view(-1, 1, 4, 3)), 1)
    negative, classification = [], []
    for i in range(len(MIXED)):
        if bool((MIXED[i] == 0.0).all()):  # Kingma et al. 2014, eq. 7
            q = log_q_BC[i].exp()
            negative.append(-sum(q[c] * (elbo_BC[i, c] - math.log(3) - log_q_BC[i, c]) for c in range(3)))
            classification.append(torch.tensor(0.0))
        else:  # eq. 6, and the mean over the label where it is soft
            p = MIXED[i].exp()
            negative.append(-sum(p[c] * (elbo_BC[i, c] - math.log(3)) for c in range(3)))
            classification.append(-0.7 * sum(p[c] * log_q_BC[i, c] for c in range(3)))
    negative_B, classification_B = torch.stack(negative), torch.stack(classification)
    loss = model.loss(phase, weighted, noise, 0)
    bound = sum(term for name, term in loss.terms.items() if name != "classification")
    torch.testing.assert_close(bound, (weights.float() * negative_B).sum())
    torch.testing.assert_close(loss.terms["classification"], (weights.float() * classification_B).sum())
    torch.testing.assert_close(loss.watched["negative_elbo"], bound.detach())
    parameters = list(model.autoencoder.parameters())
    ours = torch.autograd.grad(sum(loss.terms.values()), parameters)
    theirs = torch.autograd.grad((weights.float() * (negative_B + classification_B)).sum(), parameters)
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-4, atol=1e-4)
    assert model.counts(phase, weighted) == pytest.approx({
        "reconstruction": float(weights.sum()),
        "weighted_kl": float(weights.sum()),
        "class_kl": float(weights.sum()),
        "classification": float(weights[[0, 2, 4, 5, 6]].sum()),
    })  # fmt: skip
    assert loss.terms.keys() == model.counts(phase, batch).keys()


def test_a_row_of_weight_zero_needs_no_label():
    model, weights = small(), torch.where((MIXED == 0.0).all(1), 0.0, 1.0).double()
    whole, noise, kept = batch_of(MIXED, weights), noise_of(model, len(MIXED)), weights > 0
    without = Block(whole.x[kept], whole.rows[kept], weights[kept], MIXED[kept])
    of_kept = {name: values[kept] for name, values in noise.items()}
    (phase,) = model.phases(0)
    ours, theirs = model.loss(phase, whole, noise, 0), model.loss(phase, without, of_kept, 0)
    for name, term in ours.terms.items():
        torch.testing.assert_close(term, theirs.terms[name])
    assert model.counts(phase, whole) == model.counts(phase, without)
    torch.testing.assert_close(model.validate(whole, noise)["loss"], model.validate(without, of_kept)["loss"])


def test_the_entropy_of_a_class_is_that_of_torch():
    log_q = torch.log_softmax(torch.randn(5, 3, generator=torch.Generator().manual_seed(0)), 1)
    entropy = torch.distributions.Categorical(logits=log_q).entropy()
    torch.testing.assert_close(semi_supervised_elbo.class_kl(torch.zeros(5, 3), log_q), math.log(3) - entropy)


@pytest.mark.parametrize(
    "fields",
    [
        CLASSIFIER,
        CLASSIFIER | {"objective": "iwae", "num_importance_samples": 3, "binarize": True},
        CLASSIFIER | {"encoder": {"channels": [4], "activation": "silu"}, "kl_warmup_steps": 10},
    ],
)
def test_micro_batches_of_any_labels_add_up(fields):
    model, noise = small(**fields), None
    whole = batch_of(MIXED, torch.linspace(0.5, 2.0, len(MIXED)).double())
    noise = noise_of(model, len(MIXED))
    (phase,) = model.phases(0)

    def part(start: int, stop: int) -> Block:
        return Block(*(values[start:stop] for values in (whole.x, whole.rows, whole.weights, whole.evidence)))

    def loss_of(start: int, stop: int):
        return model.loss(phase, part(start, stop), {name: values[start:stop] for name, values in noise.items()}, 5)

    together = loss_of(0, 8)
    for cuts in ((0, 1, 8), (0, 2, 3, 4, 8), (0, 0, 8)):  # some without a labelled row, some without another, one without rows
        parts = [loss_of(start, stop) for start, stop in pairwise(cuts)]
        counts = [model.counts(phase, part(start, stop)) for start, stop in pairwise(cuts)]
        for name, term in together.terms.items():
            torch.testing.assert_close(sum(each.terms[name] for each in parts), term, rtol=1e-5, atol=1e-5)
            assert sum(each[name] for each in counts) == pytest.approx(model.counts(phase, whole)[name])
        for name, value in together.watched.items():
            torch.testing.assert_close(sum(each.watched[name] for each in parts), value, rtol=1e-5, atol=1e-5)


def test_bounds_of_a_label_and_of_all_of_them():
    model, x = small(**CLASSIFIER), x_of(70)
    plain = small()
    noise = Noise(4, "elbo").normal(0, 70, 2).float()
    elbo_NC = torch.stack([elbo_by_hand(model, x, noise, c) for c in range(3)], 1).double().detach()
    torch.testing.assert_close(model.elbo(x, seed=4, given="b"), elbo_NC[:, 1], rtol=1e-5, atol=1e-5)
    each = [LABELS[i % 3] for i in range(70)]
    torch.testing.assert_close(
        model.elbo(x, seed=4, given=each), elbo_NC[torch.arange(70), torch.arange(70) % 3], rtol=1e-5, atol=1e-5
    )
    log_q = model.classify(x)
    unlabelled = (log_q.exp() * (elbo_NC - math.log(3) - log_q)).sum(1)
    torch.testing.assert_close(model.elbo(x, seed=4), unlabelled, rtol=1e-5, atol=1e-5)
    for m in (model, plain):
        bounds_NC = torch.stack([m.log_prob_bound(x, num_samples=25, given=label) for label in LABELS], 1)
        torch.testing.assert_close(m.log_prob_bound(x, num_samples=25), torch.logsumexp(bounds_NC, 1) - math.log(3))
        parts = [m.log_prob_bound(x[:30], num_samples=3), m.log_prob_bound(x[30:], num_samples=3, offset=30)]
        torch.testing.assert_close(torch.cat(parts), m.log_prob_bound(x, num_samples=3))
    assert float(plain.elbo(x).mean()) < float(plain.log_prob_bound(x, num_samples=50).mean())


@pytest.mark.parametrize("rows_at_once", [1, 2, 3, 7])
def test_the_decoder_is_given_as_many_rows_as_memory_has_place_for(monkeypatch, rows_at_once):
    model, x, seen = small(**CLASSIFIER), x_of(5), []
    expected = model.log_prob_bound(x, num_samples=11), model.elbo(x)
    monkeypatch.setattr(vae, "NUMBERS_AT_ONCE", rows_at_once * vae.TILE * 12)
    model.autoencoder.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    torch.testing.assert_close((model.log_prob_bound(x, num_samples=11), model.elbo(x)), expected)
    assert max(seen) <= rows_at_once * vae.TILE


@pytest.mark.parametrize(
    ("encoder", "shape", "seen"),
    [
        ({"channels": [4]}, (4, 6), (1 + 3, 4, 6)),
        ({"channels": [4]}, (4, 6, 3), (3 + 3, 4, 6)),
        ({"hidden_sizes": [8]}, (4, 6), (24 + 3,)),
        ({"hidden_sizes": [8]}, (24,), (24 + 3,)),
    ],
)
def test_networks_are_given_the_class(encoder, shape, seen):
    model, taken = small(shape, encoder=encoder), []
    for network in (model.autoencoder.encoder, model.autoencoder.decoder):
        network.register_forward_pre_hook(lambda _, inputs: taken.append(inputs[0].clone()))
    width = math.prod(shape)
    model.reconstruct(x_of(3, width), given=["c", "a", "a"])
    assert taken[0].shape[1:] == seen
    planes = taken[0][:2, -3:].reshape(2, 3, -1)
    assert torch.equal(planes, torch.eye(3)[[2, 0]][:, :, None].expand_as(planes))
    assert torch.equal(taken[1][:2, -3:], torch.eye(3)[[2, 0]])


def trained(model: VariationalAutoencoder, batch: Block, num_steps: int) -> VariationalAutoencoder:
    optimizer, (phase,) = torch.optim.Adam(model.autoencoder.parameters(), 0.02), model.phases(0)
    with one_thread():
        for step in range(num_steps):
            noise = {"latent": Noise(step, "z").normal(0, batch.num_rows, 2).float()}
            optimizer.zero_grad()
            (sum(model.loss(phase, batch, noise, step).terms.values()) / batch.num_rows).backward()
            optimizer.step()
    return model


def test_samples_of_a_label_are_those_of_a_planted_conditional():
    means = torch.tensor([[0.9, 0.1, 0.5, 0.5], [0.1, 0.9, 0.5, 0.5], [0.5, 0.5, 0.1, 0.1]])
    classes = torch.arange(300) % 3
    x = (Noise(0, "x").uniform(0, 300, 4) < means[classes]).float()
    model = small((4,))
    batch = Block(x, torch.arange(300), None, one_hot(classes, 3).float().log())
    model = trained(model, batch, 120)
    found = torch.stack([model.sample(2000, given=label, mean=False).mean(0) for label in LABELS])
    observed = torch.stack([x[classes == c].mean(0) for c in range(3)])
    np.testing.assert_allclose(found, observed, atol=0.1)
    together, which = model.sample(3000, seed=1, mean=False), model.sample_classes(3000, seed=1)
    np.testing.assert_allclose(which.bincount() / 3000, 1 / 3, atol=0.03)
    for c, label in enumerate(LABELS):
        rows = which == c
        assert torch.equal(together[rows], model.sample(3000, seed=1, given=label, mean=False)[rows])
    assert torch.equal(model.sample(40, given="b", offset=70), model.sample(110, given="b")[70:])
    each = [LABELS[c] for c in model.sample_classes(100, seed=1, offset=30).tolist()]
    assert torch.equal(model.sample(100, seed=1, offset=30, given=each), model.sample(100, seed=1, offset=30))
    assert torch.equal(model.sample_classes(100, given=np.array(each)), model.sample_classes(100, seed=1, offset=30))
    # Bayes' rule, with the bounds in the place of the densities, finds the class that a row was made of.
    bound = model.log_prob_bound(means[:2].round(), num_samples=50, given=["a", "b"])
    assert bool((bound > model.log_prob_bound(means[:2].round(), num_samples=50, given=["b", "a"])).all())


def test_decoding_without_a_label_is_the_mean_over_all():
    model, z = small(**CLASSIFIER), torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model.decode(z), torch.stack([model.decode(z, given=label) for label in LABELS]).mean(0))
    x = x_of(5)
    guessed = [LABELS[c] for c in model.classify(x).argmax(1).tolist()]
    assert torch.equal(model.encode(x), model.encode(x, given=guessed))
    assert torch.equal(model.reconstruct(x), model.decode(model.encode(x, given=guessed), given=guessed))
    assert torch.equal(model.reconstruct(x, given="a"), model.decode(model.encode(x, given="a"), given="a"))
    torch.testing.assert_close(model.classify(x).exp().sum(1), torch.ones(5).double())
    assert model.interpolate(x[:2], x[2:4], 4).shape == (2, 4, 12)
    assert model.traverse(x[:1]).shape == (2, vae.NUM_STEPS, 12)
    torch.testing.assert_close(model.traverse(x[:1], given=["b"]), model.traverse(x[:1], given="b"))
    figures = {name: figure.x_RTD for name, figure in model.figures(0).items()}
    assert {name: rows.shape for name, rows in figures.items()} == {
        "interpolations": (vae.NUM_PATHS, vae.NUM_STEPS, 12),
        "traversals": (2, vae.NUM_STEPS, 12),
        "classes": (len(LABELS), vae.NUM_STEPS, 12),
    }
    # A row is of one class, whichever of the latent dimensions it is of.
    for row, label in zip(figures["traversals"], LABELS, strict=False):
        assert any(torch.allclose(row, moved) for moved in model.traverse(given=label))
    # The same latents, as each class.
    z = Noise(0, "figures").normal(0, 2 * vae.NUM_PATHS, 2)[: vae.NUM_STEPS]
    for row, label in zip(figures["classes"], LABELS, strict=True):
        torch.testing.assert_close(row, model.decode(z, given=label))


@pytest.mark.parametrize("labels", [("a",), (0, 1), tuple(range(12))])
def test_saved_and_loaded_with_any_labels(labels):
    model = small(labels=labels, classifier=SMALL)
    loaded = VariationalAutoencoder.from_tensors(model.config, model.tensors(), labels)
    assert torch.equal(loaded.classify(x_of(3)), model.classify(x_of(3)))
    assert torch.equal(loaded.sample(3, given=labels[-1]), model.sample(3, given=labels[-1]))
    with pytest.raises(ValueError, match="is needed"):
        VariationalAutoencoder.from_tensors(model.config, model.tensors(), (*labels, "more"))


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: small(labels=(), **CLASSIFIER), "model.classifier: there are no labels"),
        (lambda: small().encode(x_of(2)), "pass given="),
        (lambda: small().elbo(x_of(2), given="d"), "'d'; the labels are a, b, c"),
        (lambda: small().elbo(x_of(2), given=["a"]), "1 labels for 2 rows"),
        (lambda: small(labels=()).elbo(x_of(2), given="a"), "without labels"),
        (lambda: small().sample(2, given="d"), "'d'; the labels are"),
        (lambda: small().sample(2, given=["a"]), "1 labels for 2 rows"),
        (lambda: small().sample_classes(2, given=["a"]), "1 labels for 2 rows"),
        (lambda: small().elbo(x_of(2), given=np.array([["a"], ["b"]])), r"labels of shape \(2, 1\)"),
        (lambda: small().elbo(x_of(2), given=[["a"], ["b"]]), r"\['a'\]; the labels are a, b, c"),
        (lambda: small(labels=()).sample(200, given=np.zeros((200, 1))), "without labels"),
        (lambda: small().check_labels(counts_of(MIXED)), "3 of 8 rows have no label.* model.classifier"),
        (lambda: small().loss(vae.TRAINING, batch_of(MIXED), noise_of(small(), 8), 0), "3 of 8 rows .* model.classifier"),
        (
            lambda: small(**CLASSIFIER).check_labels(counts_of(evidence_of("a", "c", None))),
            "the label b, and nothing",
        ),
        (
            lambda: small(**CLASSIFIER).check_labels(counts_of(MIXED, without=2)),
            "the label c, and nothing",
        ),
    ],
)
def test_mistakes_are_one_line(call, match):
    with pytest.raises(UserError, match=match) as error:
        call()
    assert "\n" not in str(error.value)


def test_what_is_not_offered_depends_on_the_labels():
    plain, conditional, both = small(labels=()), small(), small(**CLASSIFIER)
    assert "without labels" in plain.not_offered["classify"]
    assert "model.classifier" in conditional.not_offered["classify"]
    assert "classify" not in both.not_offered
    assert [hasattr(model, "classify") for model in (plain, conditional, both)] == [False, False, True]
    both.check_labels(counts_of(MIXED))


def few_labels(num_labelled: int) -> pa.Table:
    """Images of digits, of which as many of each are labelled, and no other."""
    digits, num_seen, labels, images = load_digits(), Counter(), [], []
    for image, label in zip(digits.images, digits.target.tolist(), strict=True):
        num_seen[label] += 1
        labels.append(label if num_seen[label] <= num_labelled // 10 else None)
        file = io.BytesIO()
        Image.fromarray((image * 15).astype(np.uint8)).save(file, format="PNG")
        images.append({"bytes": file.getvalue(), "path": None})
    column = pa.array(images, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    return pa.table({"image": column, "label": pa.array(labels, pa.int64())})


SPEC = {
    "name": "m2",
    "family": "vae",
    "model": {
        "latent_dim": 8,
        "encoder": {"hidden_sizes": [64]},
        "decoder": {"hidden_sizes": [64]},
        "classifier": {"hidden_sizes": [64]},
        "classification_weight": 20.0,
    },
    "data": {"label": "label"},
    "fit": {"num_steps": 200, "global_batch_size": 100, "optimizer": {"learning_rate": 3.0e-3}},
}


def test_fifty_labels_tell_most_digits(tmp_path):
    run = gendist.fit(SPEC, data=few_labels(50), run_dir=tmp_path / "run")
    digits = load_digits()
    assert run.model.labels == tuple(range(10))
    right = run.model.classify(digits.data * (15 / 255)).argmax(1).numpy() == digits.target
    assert right.mean() > 0.6
    found = run.model.classify(run.model.sample(50, given=3)).argmax(1)
    assert float((found == 3).float().mean()) > 0.5
    for name in ("samples", "interpolations", "traversals"):
        assert (tmp_path / "run" / f"{name}.png").exists()


def test_latents_that_say_nothing_are_told_of(caplog):
    spec = {
        "name": "collapsed",
        "family": "vae",
        "model": {"latent_dim": 2, "encoder": {"hidden_sizes": []}, "decoder": {"hidden_sizes": []}, "beta": 300.0},
        "data": {"source": "digits"},
        "fit": {"num_steps": 60, "optimizer": {"learning_rate": 3.0e-2}},
    }
    gendist.fit(spec)
    assert "the posterior has collapsed" in caplog.text
    caplog.clear()
    spec["model"]["beta"] = 0.1
    gendist.fit(spec)
    assert "collapsed" not in caplog.text


def test_labels_that_cannot_be_learned_from_are_refused_before_the_first_step(tmp_path):
    table = few_labels(50)
    conditional = {**SPEC, "model": {"latent_dim": 2}}
    with pytest.raises(UserError, match="1747 of 1797 rows have no label"):
        gendist.fit(conditional, data=table, run_dir=tmp_path / "run")
    assert not list((tmp_path / "run").glob("*.json*"))
    unseen = {**SPEC, "data": {"label": "label", "labels": [*range(10), 11]}}
    with pytest.raises(UserError, match="has the label 11, and nothing"):
        gendist.fit(unseen, data=table)


def test_behind_transforms_labels_stay_what_they_are():
    spec = {
        **SPEC,
        "model": {**SPEC["model"], "likelihood": "gaussian"},
        "data": {"label": "label", "transforms": ["standardize"]},
        "fit": {"num_steps": 2, "global_batch_size": 200},
    }
    model = gendist.fit(spec, data=few_labels(50)).model
    assert isinstance(model, Transformed)
    x = load_digits().data[:5] * (15 / 255)
    assert model.encode(x, given=3).shape == (5, 8)
    assert model.decode(np.zeros((2, 8)), given=[1, 2]).shape == (2, 64)
    assert model.elbo(x, given=3).shape == (5,)
    assert model.figures(0)["traversals"].x_RTD.shape == (8, vae.NUM_STEPS, 64)
    z = model.transforms.forward(x)
    torch.testing.assert_close(model.classify(x), model.model.classify(z))
    # Ways through the latents begin at rows as the data hold them, and lead through such rows.
    ways = model.interpolate(x[:2], x_b=x[2:4], num_steps=3), model.traverse(x[:1], given=3), model.traverse(num_steps=4)
    within = model.model.interpolate(z[:2], z[2:4], 3), model.model.traverse(z[:1], given=3), model.model.traverse(num_steps=4)
    for way, z_RTE in zip(ways, within, strict=True):
        torch.testing.assert_close(way, torch.stack([model.transforms.inverse(z_TE) for z_TE in z_RTE]))
    assert torch.equal(model.active_units(x), model.model.active_units(z))
    assert torch.equal(model.sample_classes(9, seed=2), model.model.sample_classes(9, seed=2))
