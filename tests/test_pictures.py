"""What families would have people look at, and the pictures that are made of it."""

from __future__ import annotations

import io
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import gendist
from gendist import plots
from gendist.data import Schema
from gendist.figures import Matrices, Mixture, Paths, Profiles, Strips
from gendist.models.gmm import GaussianMixture
from gendist.pictures import MAX_GAP, draw_figures, figure_bytes, grid, picture_bytes, save_picture

COVARIANCES = {
    "full": torch.tensor(
        [[[2.0, 0.5, 0.1], [0.5, 1.0, -0.3], [0.1, -0.3, 0.7]], [[1.0, 0.0, 0.2], [0.0, 3.0, 0.0], [0.2, 0.0, 1.0]]]
    ),
    "tied": torch.tensor([[2.0, 0.5, 0.1], [0.5, 1.0, -0.3], [0.1, -0.3, 0.7]]),
    "diag": torch.tensor([[2.0, 1.0, 0.7], [1.0, 3.0, 0.1]]),
    "spherical": torch.tensor([2.0, 0.4]),
}
MEANS = torch.tensor([[0.0, 1.0, -2.0], [4.0, 4.0, 4.0]])


def mixture(covariance_type: str = "full") -> GaussianMixture:
    return GaussianMixture.from_parameters([0.25, 0.75], MEANS, COVARIANCES[covariance_type], covariance_type)


def schema_of(*names: str, **more: object) -> Schema:
    return Schema(columns=names, feature_names=names, **more)


def opened(png: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(png)) as image:
        assert image.format == "PNG"
        return np.asarray(image)


def fitted(family: str, frame: pd.DataFrame, model: dict[str, object], path, **data: object):
    spec = {"name": "x", "family": family, "model": model, "data": data, "fit": {"max_iterations": 5}}
    return gendist.fit(spec, data=frame, run_dir=path)


# What is to be drawn


@pytest.mark.parametrize("covariance_type", COVARIANCES)
def test_outlines_are_two_standard_deviations_from_the_mean(covariance_type):
    model = mixture(covariance_type)
    figure = model.figures(0)["components"]
    full = {
        "full": COVARIANCES["full"],
        "tied": COVARIANCES["tied"].expand(2, 3, 3),
        "diag": torch.diag_embed(COVARIANCES["diag"]),
        "spherical": COVARIANCES["spherical"][:, None, None] * torch.eye(3),
    }[covariance_type].numpy()
    for k in (0, 1):
        for i, j in ((0, 1), (2, 0)):
            away = figure.outline(k, i, j, 50).numpy() - MEANS[k, [i, j]].numpy()
            inverse = np.linalg.inv(full[k][np.ix_([i, j], [i, j])])
            np.testing.assert_allclose(np.sqrt(np.einsum("pi,ij,pj->p", away, inverse, away)), 2.0, rtol=1e-6)
            assert np.unique(np.round(away[:-1], 6), axis=0).shape == (49, 2)
            np.testing.assert_allclose(away[0], away[-1], atol=1e-9)


def test_points_of_a_mixture_are_its_samples_and_belong_to_their_components():
    model = mixture()
    figure = model.figures(3)["components"]
    assert torch.equal(figure.x_ND, model.sample(len(figure.x_ND), seed=3))
    for k in (0, 1):
        rows = figure.latent_N == k
        assert torch.equal(figure.x_ND[rows], model.sample(len(figure.x_ND), seed=3, given=k)[rows])


@pytest.mark.parametrize("transforms", [["standardize"], ["whiten"], ["standardize", {"pca": {"num_components": 2}}]])
def test_outlines_behind_transforms_are_those_of_the_data(transforms, tmp_path):
    x = np.random.default_rng(0).normal(size=(400, 3)) @ [[1.0, 0.3, 5.0], [0.0, 2.0, 1.0], [0.0, 0.0, 4.0]] + [10.0, 0.0, -5.0]
    model = fitted("gmm", pd.DataFrame(x, columns=list("abc")), {"num_components": 1}, tmp_path, transforms=transforms).model
    figure = model.figures(0)["components"]
    many = model.sample(40_000, seed=1).numpy()
    np.testing.assert_allclose(figure.means_KD[0], many.mean(0), atol=0.2)
    np.testing.assert_allclose(figure.covariance(0, (0, 1, 2)), np.cov(many.T), rtol=0.05, atol=0.3)
    assert torch.equal(figure.x_ND, model.sample(len(figure.x_ND), seed=0))


def test_behind_log1p_points_are_those_of_the_data_and_there_are_no_outlines(tmp_path):
    x = np.exp(np.random.default_rng(0).normal(size=(100, 2)))
    model = fitted("gmm", pd.DataFrame(x, columns=list("ab")), {"num_components": 2}, tmp_path, transforms=["log1p"]).model
    figure = model.figures(0)["components"]
    assert figure.covariances is None
    assert torch.equal(figure.x_ND, model.sample(len(figure.x_ND), seed=0))
    opened(figure_bytes(figure, schema_of("a", "b")))


def test_classes_are_drawn_together(tmp_path):
    x = np.random.default_rng(0).normal(size=(200, 2)) + 6.0 * (np.arange(200) % 2)[:, None]
    frame = pd.DataFrame(x, columns=["a", "b"]).assign(y=np.where(np.arange(200) % 2, "high", "low"))
    model = fitted("gmm", frame, {"num_components": 2, "labels": "classes"}, tmp_path, label="y").model
    figure = model.figures(0)["components"]
    assert (figure.names, figure.group_K.tolist()) == (("high", "low"), [0, 0, 1, 1])
    torch.testing.assert_close(figure.weights_K.sum(), torch.tensor(1.0).double())
    # Points are where the model of their class says.
    label_N = model.classify(figure.x_ND).argmax(1)
    assert torch.equal(label_N, figure.group_K[figure.latent_N])
    assert (tmp_path / "components.png").exists()


def test_strips_are_samples_and_their_states(tmp_path):
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"a": rng.normal(size=200) + 5.0 * (np.arange(200) // 10 % 2), "id": np.arange(200) // 20})
    run = fitted("hmm", frame, {"num_states": 2}, tmp_path, sequence="id")
    figures = run.model.figures(5)
    strips = figures["states"]
    assert torch.equal(strips.states_ST, run.model.sample_states(len(strips.x_STD), seed=5))
    assert torch.equal(strips.x_STD, run.model.sample(len(strips.x_STD), seed=5))
    assert torch.equal(figures["transitions"].values_MRC[0], run.model.transition_matrix)
    states = run.model.sample_states(4_000, seed=1)
    frequencies = torch.bincount(states.flatten(), minlength=2) / states.numel()
    torch.testing.assert_close(figures["emissions"].weights_K.float(), frequencies, atol=0.02, rtol=0.0)


def test_profiles_are_the_moments_of_samples(tmp_path):
    rng = np.random.default_rng(0)
    y = np.arange(300) % 2
    frame = pd.DataFrame(
        {
            "colour": np.array(["blue", "green", "red"])[rng.integers(0, 2, 300) + y],
            "size": rng.normal(size=300) * (1 + y),
            "calls": rng.poisson(2 + 3 * y),
            "paid": rng.integers(0, 2, 300).astype(bool),
            "y": y,
        }
    )
    run = fitted("naive_bayes", frame, {"kind": "mixed"}, tmp_path, label="y")
    figure = run.model.figures(0)["classes"]
    for c in (0, 1):
        many = run.model.sample(40_000, seed=c, given=c).numpy()
        np.testing.assert_allclose(figure.means_KD[c, 1:], many[:, 1:].mean(0), atol=0.1)
        np.testing.assert_allclose(figure.variances_KD[c, 1:], many[:, 1:].var(0), rtol=0.1)
        frequencies = np.bincount(many[:, 0].astype(int), minlength=3)[:3] / len(many)
        np.testing.assert_allclose(figure.probs[0][c], frequencies, atol=0.02)
    opened((tmp_path / "classes.png").read_bytes())


# What is drawn


def test_the_pixels_of_images_are_theirs():
    images = np.random.default_rng(0).uniform(size=(5, 4, 3))
    pixels = opened(grid(images, num_columns=3))
    # Of so few the gap is the widest: pixels.shape[1] is 3 images of 3 pixels, and 4 gaps.
    gap = MAX_GAP
    scale = (pixels.shape[1] - 4 * gap) // 9
    assert pixels.shape == (2 * (4 * scale + gap) + gap, 3 * (3 * scale + gap) + gap)
    for i, image in enumerate(images):
        top, left = gap + i // 3 * (4 * scale + gap), gap + i % 3 * (3 * scale + gap)
        shown = pixels[top : top + 4 * scale : scale, left : left + 3 * scale : scale]
        np.testing.assert_array_equal(shown, np.round(255 * image))


def test_names_of_rows_stand_beside_the_same_picture():
    images = np.random.default_rng(0).uniform(size=(6, 4, 4, 3))
    plain, named = opened(grid(images, 3)), opened(grid(images, 3, ("first", "a second, longer one")))
    np.testing.assert_array_equal(named[:, -plain.shape[1] :], plain)
    assert named.shape[1] > plain.shape[1]
    assert (named[:, : -plain.shape[1]] < 128).any()


def test_images_have_a_bar_of_their_rows_states():
    states = torch.tensor([[0, 1, 1, 2], [2, 2, 0, 0]])
    schema = Schema(columns=("x",), feature_names=("p0", "p1", "p2"), image_shape=(4, 3), is_sequence=True)
    figure = Strips(torch.zeros(2, 4, 3), states, ("a", "b", "c"))
    pixels = opened(figure_bytes(figure, schema)).reshape(-1, 3)
    colours = np.round(255 * plots.colours_of(3)[:, :3])
    counts = [(pixels == colour).all(1).sum() for colour in colours]
    assert counts[0] * 2 == counts[1] * 3 == counts[2] * 2 > 0  # 3, 2 and 3 rows


ODD_NAMES = ("a$b", "\N{GRINNING FACE}\n", "x" * 200, "100%_{")


def test_whatever_a_model_makes_can_be_drawn():
    """Names that look like formulas or have no sign in the font; columns without a number, beyond all numbers, and constant."""
    schema = schema_of(*ODD_NAMES)
    x = np.array([[np.nan, np.inf, 1e308, 1.0], [np.nan, -np.inf, -1e308, 1.0], [np.nan, 0.0, 1e-308, 1.0]])
    x_ND = torch.from_numpy(x)
    names = ("a", "$", "c")
    k = torch.arange(3)
    sequences = schema.model_copy(update={"is_sequence": True})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opened(picture_bytes(x, schema))
        opened(picture_bytes(x[None], sequences))
        opened(picture_bytes([x, x[:1]], sequences))
        opened(figure_bytes(Paths(x_ND[None], names[:1]), schema))
        for covariances in (None, torch.eye(4).double().repeat(3, 1, 1)):
            opened(figure_bytes(Mixture(x_ND, k, torch.ones(3).double() / 3, x_ND, covariances, k, names), schema))
        opened(figure_bytes(Strips(x_ND[None], k[None], names), sequences))
        opened(figure_bytes(Matrices(x_ND[None, :, :3], names, names), schema))
        opened(figure_bytes(Profiles(x_ND, x_ND.abs(), names), schema))


@pytest.mark.parametrize("far", [1e16, -1e17, 1e75, 9e99])
@pytest.mark.parametrize("spread", [0.0, 1e-16, 1e-15, 1e-14])
def test_what_varies_less_than_float64_can_tell_is_drawn(far, spread):
    """Too little for 50 bins between the least and the greatest."""
    x_ND = far * (1 + spread * np.arange(4.0)[:, None]).repeat(2, axis=1)
    x_N2, k = torch.from_numpy(x_ND), torch.zeros(4, dtype=torch.int64)
    schema = schema_of("a", "b")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opened(picture_bytes(x_ND, schema))
        opened(picture_bytes(x_ND[None], schema.model_copy(update={"is_sequence": True})))
        opened(figure_bytes(Mixture(x_N2, k, torch.ones(1), x_N2[:1], torch.ones(1, 2), k[:1], ("a",)), schema))
        opened(figure_bytes(Strips(x_N2[None], k[None], ("a",)), schema.model_copy(update={"is_sequence": True})))


@pytest.mark.parametrize("num_features", [1, 2, 3, 7])
def test_a_mixture_of_any_width_is_drawn(num_features):
    x_ND, k = torch.randn(20, num_features), torch.arange(20) % 2
    figure = Mixture(x_ND, k, torch.tensor([0.5, 0.5]), x_ND[:2], torch.ones(2, num_features), torch.arange(2), ("a", "b"))
    opened(figure_bytes(figure, schema_of(*(f"x{i}" for i in range(num_features)))))


def test_many_features_are_drawn_as_a_matrix():
    figure = Profiles(torch.randn(3, 80), torch.ones(3, 80), ("a", "b", "c"))
    opened(figure_bytes(figure, schema_of(*(f"x{i}" for i in range(80)))))


def test_texts_are_drawn_as_letters():
    schema = Schema(columns=("t",), feature_names=("t",), categories={"t": ("a", " ", "$")}, is_sequence=True)
    figure = Strips(torch.tensor([[0, 1, 2, 3] * 30]).double()[..., None], torch.tensor([[0, 1, 0, 1] * 30]), ("s", "t"))
    opened(figure_bytes(figure, schema))


def test_a_picture_has_no_more_pixels_than_memory_bears():
    pixels = opened(grid(np.broadcast_to(np.float32(0.5), (16, 3_000, 1_000)), 4))
    assert pixels.size < 2**25


def test_files_hold_the_same_bytes(tmp_path):
    model, schema = mixture(), schema_of("a", "b", "c")
    draw_figures(model, schema, tmp_path, seed=2)
    assert (tmp_path / "components.png").read_bytes() == figure_bytes(model.figures(2)["components"], schema)
    save_picture(model.sample(10), schema, tmp_path / "samples.png")
    assert (tmp_path / "samples.png").read_bytes() == picture_bytes(model.sample(10), schema)
