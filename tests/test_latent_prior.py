"""A mixture of a run's latents: fitted to the rows that the run was trained on, resumed, kept and read again."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
import torch

import gendist
from gendist import bulk
from gendist.data import DataConfig
from gendist.latent_prior import LatentPrior
from gendist.noise import derived_seed
from gendist.protocols import UserError

OPTIONS = ("model.num_components=3", "fit.max_iterations=30")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, blobs):
    """run/, a short training of a VAE behind transforms on data.parquet, some rows of which are held out."""
    folder = tmp_path_factory.mktemp("prior")
    pd.DataFrame(blobs, columns=["a", "b", "c"]).to_parquet(folder / "data.parquet", index=False)
    network = {"hidden_sizes": [32], "activation": "tanh"}
    spec = {
        "name": "blobs",
        "family": "vae",
        "model": {"latent_dim": 2, "encoder": network, "decoder": network, "likelihood": "gaussian", "scale": 0.3},
        "data": {
            "source": "parquet",
            "path": str(folder / "data.parquet"),
            "transforms": ["standardize"],
            "validation_fraction": 0.2,
        },
        "fit": {"num_steps": 400, "global_batch_size": 64, "optimizer": {"learning_rate": 0.01}},
    }
    gendist.fit(spec, run_dir=folder / "run")
    return folder


def fitted(folder, out, overrides=OPTIONS) -> LatentPrior:
    prior = LatentPrior.of(folder / "run", overrides, out)
    prior.encode()
    prior.fit()
    return prior


def test_the_mixture_is_of_the_latents_of_the_training_rows(folder, tmp_path):
    prior = fitted(folder, tmp_path / "prior")
    plain, model = gendist.load(folder / "run"), gendist.load(prior.path)
    x = pd.read_parquet(folder / "data.parquet").to_numpy()
    latents = plain.draw_latents(x, seed=0)
    np.testing.assert_array_equal(pd.read_parquet(prior.path / "latents").to_numpy(), latents.double().numpy())
    # The same rows are held out of the mixture as of the run.
    manifests = [json.loads((path / "manifest.json").read_text()) for path in (folder / "run", prior.path / "fit")]
    assert manifests[0]["data"]["num_rows"] == manifests[1]["data"]["num_rows"] < len(x)
    assert model.model.prior.num_components == 3
    # Three clusters of the data are no standard normal distribution of latents.
    assert float(model.log_prob_bound(x).mean()) > float(plain.log_prob_bound(x).mean())
    expected = model.transforms.inverse(model.model.decode(model.model.prior.sample(30, seed=derived_seed(4, "sample.prior"))))
    torch.testing.assert_close(model.sample(30, seed=4, mean=True), expected)
    again = plain.with_prior(model.model.prior)
    assert torch.equal(again.sample(30, seed=4), model.sample(30, seed=4))
    assert torch.equal(again.cluster(x), model.cluster(x))


def test_again_it_ends_in_the_same_bytes_and_changes_nothing(folder, tmp_path):
    once, again = fitted(folder, tmp_path / "once"), fitted(folder, tmp_path / "again")
    artifact = {path.relative_to(once.path): path.read_bytes() for path in (once.path / "artifact").rglob("*.safetensors")}
    assert len(artifact) == 3  # model, transforms, prior
    for path, content in artifact.items():
        assert (again.path / path).read_bytes() == content
    fitted(folder, tmp_path / "once")
    assert (once.path / "artifact" / "model.json").exists()


def test_bulk_verbs_know_an_artifact_with_a_prior_from_one_without(folder, tmp_path):
    prior = fitted(folder, tmp_path / "prior")
    data = DataConfig(path=str(folder / "data.parquet"))
    for path, name in ((folder / "run", "plain"), (prior.path, "with")):
        bulk.sample(path, 50, tmp_path / f"{name}.npy")
        bulk.score(path, data, tmp_path / f"{name}-scores")
    assert not np.array_equal(np.load(tmp_path / "plain.npy"), np.load(tmp_path / "with.npy"))
    with pytest.raises(UserError):
        bulk.score(prior.path, data, tmp_path / "plain-scores")


NETWORK = {"hidden_sizes": [8]}


def test_rows_weigh_in_the_mixture_what_they_weigh_in_the_run(blobs, tmp_path):
    weights = np.where(blobs[:, 0] > 3.0, 0.0, 2.0)
    pd.DataFrame(blobs, columns=["a", "b", "c"]).assign(w=weights).to_parquet(tmp_path / "data.parquet")
    spec = {
        "name": "weighted",
        "family": "vae",
        "model": {"latent_dim": 2, "encoder": NETWORK, "decoder": NETWORK, "likelihood": "gaussian"},
        "data": {"path": str(tmp_path / "data.parquet"), "weight": "w"},
        "fit": {"num_steps": 5, "global_batch_size": 64},
    }
    gendist.fit(spec, run_dir=tmp_path / "run")
    prior = fitted(tmp_path, tmp_path / "prior", ["model.num_components=1"])
    latents = pd.read_parquet(prior.path / "latents")
    np.testing.assert_array_equal(latents["w"].to_numpy(), weights)
    mean = latents[["latent_0", "latent_1"]].to_numpy()[weights > 0].mean(0)
    np.testing.assert_allclose(gendist.load(prior.path).prior.means[0].numpy(), mean, rtol=1e-9)


def test_a_model_of_known_classes_encodes_rows_with_their_labels(blobs, tmp_path):
    labels = np.where(blobs[:, 0] > 3.0, "right", "left")
    frame = pd.DataFrame(blobs, columns=["a", "b", "c"]).assign(y=labels)
    frame.to_parquet(tmp_path / "data.parquet")
    data = {"path": str(tmp_path / "data.parquet"), "label": "y"}
    model = {"latent_dim": 2, "encoder": NETWORK, "decoder": NETWORK, "likelihood": "gaussian"}
    spec = {"name": "known", "family": "vae", "model": model, "data": data, "fit": {"num_steps": 5, "global_batch_size": 64}}
    gendist.fit(spec, run_dir=tmp_path / "run")
    bulk.encode(tmp_path / "run", DataConfig(**data), tmp_path / "latents.npy")
    expected = gendist.load(tmp_path / "run").encode(blobs, given=labels.tolist())
    np.testing.assert_allclose(np.load(tmp_path / "latents.npy"), expected.numpy(), rtol=1e-6)
    with pytest.raises(UserError, match=r"a class that is known; name the column of their labels with data\.label"):
        bulk.encode(tmp_path / "run", DataConfig(path=data["path"]), tmp_path / "again.npy")
    frame.assign(y=frame["y"].where(frame.index != 17)).to_parquet(tmp_path / "data.parquet")
    with pytest.raises(UserError, match="row 17: no label"):
        bulk.encode(tmp_path / "run", DataConfig(**data), tmp_path / "again.npy")


def test_a_row_of_weight_0_needs_no_label_nor_entries(blobs, tmp_path):
    """It changes nothing in what is trained, and the mixture is of the latents of the others."""
    weights, frame = np.ones(len(blobs)), pd.DataFrame(blobs, columns=["a", "b", "c"])
    weights[[3, 40]] = 0.0
    frame = frame.assign(w=weights, y=np.where(blobs[:, 0] > 3.0, "right", "left"))
    lacking = frame.copy()
    lacking.loc[3, ["a", "b"]] = np.nan
    lacking.loc[40, "y"] = None
    models = []
    for name, each in (("whole", frame), ("lacking", lacking)):
        (tmp_path / name).mkdir()
        each.to_parquet(tmp_path / name / "data.parquet")
        spec = {
            "name": "known",
            "family": "vae",
            "model": {"latent_dim": 2, "encoder": NETWORK, "decoder": NETWORK, "likelihood": "gaussian"},
            "data": {"path": str(tmp_path / name / "data.parquet"), "label": "y", "weight": "w"},
            "fit": {"num_steps": 5, "global_batch_size": 64},
        }
        gendist.fit(spec, run_dir=tmp_path / name / "run")
        prior = fitted(tmp_path / name, tmp_path / name / "prior", ["model.num_components=1"])
        models.append(gendist.load(prior.path))
    for name, tensor in models[0].tensors().items():
        assert torch.equal(models[1].tensors()[name], tensor)
    torch.testing.assert_close(models[1].prior.means, models[0].prior.means, rtol=0.0, atol=0.0)


def test_latents_are_as_wide_as_the_data_tell(tmp_path):
    """Means of levels are none, so that a model of levels does not take its own samples."""
    levels = np.random.default_rng(0).integers(0, 5, (80, 3)) / 4.0
    np.save(tmp_path / "x.npy", levels)
    likelihood = {"likelihood": "discretized_logistic_mixture", "num_levels": 5, "num_mixtures": 2}
    model = {"latent_dim": 2, "encoder": NETWORK, "decoder": NETWORK, **likelihood}
    data = {"source": "npy", "path": str(tmp_path / "x.npy")}
    gendist.fit(
        {"name": "levels", "family": "vae", "model": model, "data": data, "fit": {"num_steps": 3}}, run_dir=tmp_path / "run"
    )
    bulk.encode(tmp_path / "run", DataConfig(**data), tmp_path / "latents.npy")
    assert np.load(tmp_path / "latents.npy").shape == (80, 2)


def test_a_run_is_not_written_over(folder):
    with pytest.raises(UserError, match="holds a run or an artifact"):
        LatentPrior.of(folder / "run", OPTIONS, folder / "run")


def test_a_family_without_latents_and_a_folder_without_a_run_are_told(folder, tmp_path, blobs):
    spec = {"name": "blobs", "family": "gmm", "model": {"num_components": 1}, "fit": {"max_iterations": 1}}
    gendist.fit(spec, data=blobs, run_dir=tmp_path / "mixture")
    with pytest.raises(UserError, match="of a gmm, which draws no latents"):
        LatentPrior.of(tmp_path / "mixture")
    with pytest.raises(UserError, match="no run directory"):
        LatentPrior.of(folder / "run" / "artifact")
    with pytest.raises(UserError, match="num_componentz"):
        LatentPrior.of(folder / "run", ["model.num_componentz=3"])
