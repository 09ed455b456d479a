"""An artifact is read as it was written, or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import gendist
from gendist.artifact import Artifact, digest, load_artifact, load_with_digest, save
from gendist.data import Schema
from gendist.models.gmm import GaussianMixture
from gendist.protocols import UserError


@pytest.fixture
def folder(tmp_path) -> Path:
    model = GaussianMixture.from_parameters([0.4, 0.6], [[0.0], [1.0]], [1.0, 2.0], "spherical", labels=("a", 3))
    save(Artifact("gmm", model, Schema(columns=("x",), feature_names=("x",))), tmp_path / "artifact")
    return tmp_path / "artifact"


def edit(folder: Path, **changes) -> None:
    description = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps(description | changes))


def test_labels_keep_their_types(folder):
    assert gendist.load(folder).labels == ("a", 3)
    assert gendist.load(folder.parent).labels == ("a", 3)  # a run directory has its artifact inside


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def set_schema(folder: Path, **changes) -> None:
    edit(folder, schema=json.loads((folder / "model.json").read_text())["schema"] | changes)


def set_tensor(folder: Path, name: str, values: list) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, name: torch.tensor(values, dtype=torch.float64)}, folder / "model.safetensors")


def set_weights(folder: Path, weights: list[float]) -> None:
    set_tensor(folder, "weights", weights)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda folder: cut(folder / "model.safetensors"), "damaged"),
        (lambda folder: cut(folder / "model.json"), "damaged"),
        (lambda folder: (folder / "model.safetensors").unlink(), "damaged"),
        (lambda folder: (folder / "model.json").unlink(), "no such artifact"),
        (lambda folder: (folder / "model.json").write_text("[]"), "damaged"),
        (lambda folder: edit(folder, config={"num_components": -1}), "damaged"),
        (lambda folder: edit(folder, config={"num_components": 2}), "damaged"),
        (lambda folder: edit(folder, family="flow"), "family 'flow', which this gendist does not know"),
        (lambda folder: edit(folder, format_version=99), "by a newer gendist"),
        (lambda folder: edit(folder, noise_version=99), "by a newer gendist"),
        (lambda folder: set_weights(folder, [0.4, float("nan")]), "damaged"),
        (lambda folder: set_weights(folder, [0.4, 0.3, 0.3]), "damaged"),
        (lambda folder: set_tensor(folder, "means", [[0.0], [float("inf")]]), "damaged.*mean"),
        (lambda folder: set_tensor(folder, "covariances", [1.0, -1.0]), "damaged.*variance"),
        (lambda folder: edit(folder, labels="ab"), "damaged.*labels"),
        (lambda folder: edit(folder, labels=["a", "b", "c"]), "damaged.*3 labels for 2 components"),
        (lambda folder: set_schema(folder, feature_names=["x", "y"]), "damaged.*2 features"),
        (lambda folder: set_schema(folder, image_shape=[3, 3]), "damaged.*1 pixels"),
    ],
)
def test_damage_is_told_in_one_line(folder, damage, expected):
    damage(folder)
    with pytest.raises(UserError, match=expected) as caught:
        load_artifact(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_a_digest_is_of_what_was_loaded(folder, monkeypatch):
    artifact, its_digest = load_with_digest(folder.parent, digest(folder))
    assert its_digest == digest(folder.parent)
    assert torch.equal(artifact.model.weights, torch.tensor([0.4, 0.6], dtype=torch.float64))
    with pytest.raises(UserError, match="another model lies there now"):
        load_with_digest(folder, "0" * 64)

    def and_meanwhile_it_is_another(path):
        tensors = load_file(path)
        set_weights(folder, [0.5, 0.5])
        return tensors

    monkeypatch.setattr("safetensors.torch.load_file", and_meanwhile_it_is_another)
    with pytest.raises(UserError, match="changes while it is read"):
        load_with_digest(folder)


def test_nothing_in_an_artifact_is_a_pickle(folder):
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors"}
    assert np.frombuffer((folder / "model.safetensors").read_bytes()[:8], dtype="<u8")[0] < 10_000  # its header's length
