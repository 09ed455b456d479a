"""A small artifact of each family, and of each kind of data that a server meets."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from served import Served, serving

import gendist
from gendist.artifact import Artifact, save
from gendist.config import family_class
from gendist.data import Schema
from gendist.serve.hosted_model import HostedModel
from gendist.serve.http_app import http_app

MLP = {"hidden_sizes": [8]}
COLOURS = np.array(["blue", "green", "red"])


def fitted(folder: Path, family: str, frame: pd.DataFrame, model: dict[str, Any], **data: Any) -> None:
    spec = {"name": folder.name, "family": family, "model": model, "data": data, "fit": {"max_iterations": 3}}
    gendist.fit(spec, data=frame, run_dir=folder)


def fresh(folder: Path, family: str, config: dict[str, Any], x_shape: tuple[int, ...], labels: tuple[Any, ...] = ()) -> None:
    """An artifact of networks that nobody has trained: they sample, and that fast."""
    cls: Any = family_class(family)
    model = cls.create(cls.Config.model_validate(config), x_shape, labels, seed=0)
    names = tuple(f"x_{i}" for i in range(model.num_features))
    is_image = len(x_shape) > 1
    columns = ("x",) if is_image else names
    save(
        Artifact(family, model, Schema(columns=columns, feature_names=names, image_shape=x_shape if is_image else None)), folder
    )


def labelled_gmm(folder: Path) -> None:
    """3 features a, b and c; 3 components, the first two of the labels left and right."""
    x = np.random.default_rng(0).normal(size=(60, 3)) + 4.0 * (np.arange(60) % 3)[:, None]
    frame = pd.DataFrame(x, columns=["a", "b", "c"]).assign(y=np.where(x[:, 0] > 3, "right", "left"))
    fitted(folder, "gmm", frame, {"num_components": 3}, label="y")


def gmm(folder: Path) -> None:
    """2 features a and b; 2 components, no labels."""
    x = np.random.default_rng(1).normal(size=(40, 2)) + 5.0 * (np.arange(40) % 2)[:, None]
    fitted(folder, "gmm", pd.DataFrame(x, columns=["a", "b"]), {"num_components": 2})


def hmm(folder: Path) -> None:
    """Sequences of 2 features a and b; 2 states; samples of 5 steps."""
    rng = np.random.default_rng(2)
    frame = pd.DataFrame(rng.normal(size=(60, 2)) + 3.0 * (np.arange(60) // 5 % 2)[:, None], columns=["a", "b"])
    frame = frame.assign(id=np.arange(60) // 5)
    fitted(folder, "hmm", frame, {"num_states": 2}, sequence="id")


def naive_bayes(folder: Path) -> None:
    """A column of text, colour, and one of numbers, size; classes of the labels 0 and 1."""
    rng = np.random.default_rng(3)
    y = np.arange(60) % 2
    frame = pd.DataFrame({"colour": COLOURS[rng.integers(0, 2, 60) + y], "size": rng.normal(size=60) + 3.0 * y, "y": y})
    fitted(folder, "naive_bayes", frame, {"kind": "mixed"}, label="y")


def labelled_vae(folder: Path) -> None:
    """4 features x_0 to x_3 of real numbers, 2 latents, labels 0, 1 and 2, with a classifier."""
    networks = {"encoder": MLP, "decoder": MLP, "classifier": MLP}
    fresh(folder, "vae", {"latent_dim": 2, "likelihood": "gaussian", **networks}, (4,), (0, 1, 2))


def vae_of_images(folder: Path) -> None:
    """Images of 6 x 4 pixels, 3 latents, no labels."""
    fresh(folder, "vae", {"latent_dim": 3, "encoder": MLP, "decoder": MLP}, (6, 4))


def gan(folder: Path) -> None:
    """Images of 4 x 4 pixels of the labels a and b; conditional."""
    networks = {"generator": MLP, "discriminator": MLP}
    fresh(folder, "gan", {"latent_dim": 3, "labels": "condition", **networks}, (4, 4), ("a", "b"))


MAKERS: dict[str, Callable[[Path], None]] = {
    "labelled_gmm": labelled_gmm,
    "gmm": gmm,
    "hmm": hmm,
    "naive_bayes": naive_bayes,
    "labelled_vae": labelled_vae,
    "vae_of_images": vae_of_images,
    "gan": gan,
}


@pytest.fixture(scope="session")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By name, the path of each of the artifacts that `MAKERS` make: a run directory, or the artifact itself."""
    folder = tmp_path_factory.mktemp("artifacts")
    for name, make in MAKERS.items():
        make(folder / name)
    return {name: folder / name for name in MAKERS}


@pytest.fixture(scope="session")
def hosted(artifacts: dict[str, Path]) -> dict[str, HostedModel]:
    """The same, as a server holds them."""
    return {name: HostedModel(name, path) for name, path in artifacts.items()}


@pytest.fixture(scope="session")
def alike(tmp_path_factory: pytest.TempPathFactory) -> dict[str, HostedModel]:
    """Models whose features are called as what stands beside them in a table: `steps` of sequences with their steps and states,
    `labels` of rows with their labels."""
    folder, rng = tmp_path_factory.mktemp("alike"), np.random.default_rng(4)
    frame = pd.DataFrame(rng.normal(size=(60, 3)), columns=["sequence", "step", "state"]).assign(id=np.arange(60) // 5)
    fitted(folder / "steps", "hmm", frame, {"num_states": 2}, sequence="id")
    rows = pd.DataFrame({"label": rng.normal(size=40), "state": rng.normal(size=40), "y": np.arange(40) % 2})
    fitted(folder / "labels", "naive_bayes", rows, {"kind": "gaussian"}, label="y")
    return {name: HostedModel(name, folder / name) for name in ("steps", "labels")}


@pytest.fixture(scope="session")
def server(hosted: dict[str, HostedModel]) -> Iterator[Served]:
    """All of them behind HTTP on this machine."""
    with serving(http_app(hosted)) as server:
        yield server


@pytest.fixture(scope="session")
def url(server: Served) -> str:
    """Of this server."""
    return str(server.client.base_url).rstrip("/")
