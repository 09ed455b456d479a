"""A model behind transforms: it keeps the contract, its density is that of the rows as they are, and a run carries it."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import gendist
from gendist import em_fitting
from gendist.data import source_of
from gendist.em_checkpoints import resume
from gendist.models.gmm import GaussianMixture
from gendist.protocols import VERBS, GenerativeModel, UserError
from gendist.run_directory import RunDirectory
from gendist.transformed import Transformed

DIGITS = {
    "name": "digits",
    "family": "gmm",
    "model": {"num_components": 5, "covariance_regularization": 1e-3},
    "data": {
        "source": "digits",
        "validation_fraction": 0.1,
        "transforms": [{"log1p": {"columns": ["image_20"]}}, "standardize", {"whiten": {"regularization": 0.1}},
                       {"pca": {"num_components": 0.9}}],
    },
    "fit": {"max_iterations": 6, "tolerance": 0.0, "checkpoint_every": 2},
}  # fmt: skip


def spec_of(transforms: list, **changes) -> dict:
    model = {"num_components": 3, "covariance_regularization": 0.0}
    return {"name": "blobs", "family": "gmm", "model": model, "data": {"transforms": transforms}, **changes}


def bytes_of(run_dir: Path) -> dict[str, str]:
    return {
        name: hashlib.sha256((run_dir / "artifact" / name).read_bytes()).hexdigest()
        for name in ("model.safetensors", "transforms.safetensors", "model.json")
    }


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "unbroken"
    gendist.fit(DIGITS, run_dir=path)
    return path


# The contract


def test_it_keeps_the_contract(unbroken):
    model = gendist.load(unbroken).plain
    assert isinstance(model, Transformed)
    assert isinstance(model, GenerativeModel)
    assert isinstance(model.model, GaussianMixture)
    assert model.num_features == 64
    assert repr(model) == f"Transformed({model.model!r}, num_features=64)"
    assert model.model.num_features == len(model.transforms.feature_names) < 64
    for verb in VERBS:
        assert hasattr(model, verb) != (verb in model.not_offered), verb
        assert getattr(type(model), verb).__doc__, verb
    with pytest.raises(AttributeError, match="components are not classes"):
        model.classify(np.zeros((1, 64)))
    assert model.decode(torch.tensor([0, 3])).shape == (2, 64)
    again = model.from_tensors(model.config, model.tensors(), model.labels)
    assert torch.equal(again.sample(5, seed=1), model.sample(5, seed=1))


def test_a_sample_is_a_window_on_an_endless_one(unbroken):
    model = gendist.load(unbroken)
    whole = model.sample(100, seed=3)
    assert whole.shape == (100, 64)
    assert torch.equal(torch.cat([model.sample(37, seed=3), model.sample(63, seed=3, offset=37)]), whole)
    assert torch.equal(model.transforms.inverse(model.model.sample(100, seed=3)), whole)


# The density


def test_it_integrates_to_one():
    x = np.exp(np.random.default_rng(0).normal(size=(500, 1)) * 0.7 + [[0.5]]) - 1.0
    run = gendist.fit(spec_of(["log1p", "standardize"], model={"num_components": 2}), data=x)
    # An even grid of log(1 + x), so that the long tail is covered, too.
    grid = np.expm1(np.linspace(-8, 9, 200_001))
    density = run.model.log_prob(grid[:, None]).exp().numpy()
    assert np.trapezoid(density, grid) == pytest.approx(1.0, abs=1e-6)
    below = run.model.sample(200_000, seed=1).numpy() < 1.0
    assert np.trapezoid(density[grid < 1.0], grid[grid < 1.0]) == pytest.approx(below.mean(), abs=0.005)


@pytest.mark.parametrize("kind", ["standardize", {"whiten": {}}, {"pca": {"num_components": 3, "whiten": True}}], ids=str)
def test_of_data_that_are_transformed_linearly_a_gaussian_has_the_density_it_has_without(blobs, kind):
    """A Gaussian fitted behind an invertible linear transform is the Gaussian fitted without."""
    one = {"num_components": 1, "covariance_regularization": 0.0}
    without = gendist.fit(spec_of([], model=one), data=blobs)
    behind = gendist.fit(spec_of([kind], model=one), data=blobs)
    torch.testing.assert_close(behind.model.log_prob(blobs), without.model.log_prob(blobs), rtol=0, atol=1e-9)
    for name in ("log_likelihood", "aic", "bic"):
        assert behind.results[name] == pytest.approx(without.results[name], rel=1e-10)


def test_behind_a_pca_that_drops_directions_it_is_that_of_the_principal_coordinates(blobs):
    from sklearn.decomposition import PCA

    for whiten in (False, True):
        spec = spec_of([{"pca": {"num_components": 2, "whiten": whiten}}], model={"num_components": 1})
        model = gendist.fit(spec, data=blobs).model
        coordinates = PCA(2, svd_solver="full").fit_transform(blobs)
        other = gendist.fit({**spec, "data": {}}, data=coordinates).model
        # A component's regularization is added where it is fitted, which whitening makes another place.
        torch.testing.assert_close(model.log_prob(blobs), other.log_prob(coordinates), rtol=0, atol=1e-4 if whiten else 1e-9)
        assert "2 principal coordinates" in model.density


def test_results_are_of_the_rows_as_they_are(unbroken):
    from sklearn.datasets import load_digits

    from gendist.noise import Noise

    x = load_digits().data / 16.0
    held_out = (Noise(0, "validation").uniform_of_rows(torch.arange(len(x))) < 0.1).numpy()
    log_prob = gendist.load(unbroken).log_prob(x)
    results = json.loads((unbroken / "manifest.json").read_text())["results"]
    assert results["log_likelihood"] == pytest.approx(float(log_prob[~held_out].mean()), rel=1e-10)
    assert results["validation_log_likelihood"] == pytest.approx(float(log_prob[held_out].mean()), rel=1e-10)
    # And none of the held-out rows was looked at for the transforms.
    logs = x[~held_out].copy()
    logs[:, 20] = np.log1p(logs[:, 20])
    np.testing.assert_allclose(gendist.load(unbroken).transforms.steps[1].mean, logs.mean(0), atol=1e-12)


def test_verbs_take_what_those_of_the_model_take(blobs):
    network = {"hidden_sizes": [8], "activation": "tanh"}
    spec = {
        "name": "blobs",
        "family": "vae",
        "model": {"latent_dim": 2, "encoder": network, "decoder": network, "likelihood": "gaussian"},
        "data": {"label": "y", "transforms": ["standardize"]},
        "fit": {"num_steps": 5},
    }
    labels = np.where(blobs[:, 0] > 3.0, "right", "left").tolist()
    model = gendist.fit(spec, data={**dict(zip("abc", blobs.T, strict=True)), "y": labels}).model
    assert isinstance(model, Transformed)
    for verb, name, value in (("elbo", "seed", 1), ("log_prob_bound", "num_samples", 7)):
        assert torch.equal(getattr(model, verb)(blobs, value), getattr(model, verb)(blobs, **{name: value})), verb
    for verb in ("encode", "reconstruct"):
        assert torch.equal(getattr(model, verb)(blobs, labels), getattr(model, verb)(blobs, given=labels)), verb
    z = model.encode(blobs, labels)
    assert torch.equal(model.decode(z, "left"), model.decode(z, given="left"))
    assert model.prior is None
    mixture = gendist.fit({"name": "z", "family": "gmm", "model": {"num_components": 2}}, data=z.double().numpy()).model
    assert model.with_prior(mixture).prior is mixture.plain


# Runs


@pytest.mark.ray
@pytest.mark.parametrize("num_workers", [1, 3])
def test_any_number_of_workers_gives_the_same_bytes(cluster, unbroken, tmp_path, num_workers):
    gendist.fit({**DIGITS, "cluster": {"num_workers": num_workers}}, run_dir=tmp_path / "run")
    assert bytes_of(tmp_path / "run") == bytes_of(unbroken)


def test_the_fingerprint_is_that_of_the_data_as_they_are(unbroken, tmp_path):
    plain = {**DIGITS, "data": {**DIGITS["data"], "transforms": []}, "fit": {"max_iterations": 1}}
    gendist.fit(plain, run_dir=tmp_path / "plain")
    data = [json.loads((run / "manifest.json").read_text())["data"] for run in (unbroken, tmp_path / "plain")]
    assert data[0] == data[1]


def test_a_run_that_stopped_goes_on_behind_the_transforms_of_its_checkpoint(unbroken, tmp_path, monkeypatch):
    class Stop(Exception):
        pass

    def stop(record):
        if record["iteration"] == 3:
            raise Stop

    with pytest.raises(Stop):
        gendist.fit(DIGITS, run_dir=tmp_path / "run", watch=stop)
    monkeypatch.setattr(em_fitting.Transforms, "fit", None)  # they are not fitted again
    gendist.fit(DIGITS, run_dir=tmp_path / "run")
    assert bytes_of(tmp_path / "run") == bytes_of(unbroken)
    manifest = [json.loads((run / "manifest.json").read_text()) for run in (unbroken, tmp_path / "run")]
    assert manifest[0]["data"] == manifest[1]["data"]
    assert manifest[0]["results"] == manifest[1]["results"]


def test_without_a_checkpoint_they_are_fitted_again_to_the_same_bytes(unbroken, tmp_path):
    shutil.copytree(unbroken, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "artifact")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    gendist.fit(DIGITS, run_dir=tmp_path / "run")
    assert bytes_of(tmp_path / "run") == bytes_of(unbroken)


def test_a_fit_starts_from_an_artifact_behind_its_transforms(blobs, tmp_path):
    spec = spec_of(["standardize", {"whiten": {}}], fit={"max_iterations": 3})
    first = gendist.fit(spec, data=blobs, run_dir=tmp_path / "first")
    again = {**spec, "fit": {"max_iterations": 2, "init": str(tmp_path / "first")}}
    other = blobs[:300] * 2.0 + 1.0
    for run in (gendist.fit(again, data=other), gendist.fit(spec, data=other, init=first.model)):
        for name, tensor in first.model.transforms.tensors().items():
            assert torch.equal(run.model.transforms.tensors()[name], tensor)
        start = first.model.model.log_prob(first.model.transforms.forward(other)).mean()
        assert run.history[0]["log_likelihood"] == pytest.approx(float(start), rel=1e-12)


@pytest.mark.parametrize("transforms", [[], ["standardize"], [{"whiten": {"regularization": 1.0}}]], ids=str)
def test_a_model_behind_other_transforms_is_no_start(blobs, transforms):
    model = gendist.fit(spec_of([{"whiten": {}}], fit={"max_iterations": 1}), data=blobs).model
    with pytest.raises(UserError, match="behind other transforms") as caught:
        gendist.fit(spec_of(transforms), data=blobs, init=model)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="behind other transforms"):
        gendist.fit(spec_of([{"whiten": {}}]), data=blobs, init=model.model)


def test_a_run_of_other_transforms_is_another_run(unbroken):
    other = {**DIGITS, "data": {**DIGITS["data"], "transforms": ["standardize"]}}
    with pytest.raises(UserError, match=r"another spec \(different: data.transforms\)"):
        gendist.fit(other, run_dir=unbroken)


def test_a_run_from_before_there_were_transforms_goes_on(tmp_path):
    """Its spec has no such field, its checkpoints no such file."""
    plain = {**DIGITS, "data": {"source": "digits"}}
    gendist.fit(plain, run_dir=tmp_path / "run")
    text = (tmp_path / "run" / "spec.yaml").read_text()
    assert "transforms: []" in text
    (tmp_path / "run" / "spec.yaml").write_text(text.replace("  transforms: []\n", ""))
    description = json.loads((tmp_path / "run" / "artifact" / "model.json").read_text())
    assert description["format_version"] == 1
    assert "transforms" not in description
    assert type(gendist.fit(plain, run_dir=tmp_path / "run").model.plain) is GaussianMixture


def test_the_data_are_read_twice_however_many_transforms_there_are(blobs, monkeypatch):
    read = []
    source = source_of(blobs)
    monkeypatch.setattr(type(source), "read", count_rows(type(source).read, read))
    for transforms in (["standardize"], ["standardize", {"whiten": {}}, "standardize", {"pca": {"num_components": 2}}]):
        read.clear()
        gendist.fit(spec_of(transforms), data=blobs)
        assert sum(read) <= 2 * len(blobs) + 1  # and the first row, for the schema


def count_rows(read, counts: list):
    def counting(self, start, stop, columns):
        counts.append(stop - start)
        return read(self, start, stop, columns)

    return counting


def test_nothing_is_begun_where_a_row_cannot_be_transformed(blobs, tmp_path):
    with pytest.raises(UserError, match="log1p takes numbers above -1"):
        gendist.fit(spec_of(["log1p"]), data=blobs - 10.0, run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def damaged(folder: Path, how: str) -> None:
    if how == "gone":
        (folder / "transforms.safetensors").unlink()
    elif how == "cut":
        (folder / "transforms.safetensors").write_bytes((folder / "transforms.safetensors").read_bytes()[:-9])
    else:
        description = json.loads((folder / "model.json").read_text())
        description["transforms"] = {"none": [], "one": description["transforms"][:1], "odd": "x"}[how]
        (folder / "model.json").write_text(json.dumps(description))


@pytest.mark.parametrize("how", ["gone", "cut", "none", "one", "odd"])
def test_damaged_transforms_are_told_in_one_line(unbroken, tmp_path, how):
    shutil.copytree(unbroken / "artifact", tmp_path / "artifact")
    damaged(tmp_path / "artifact", how)
    with pytest.raises(UserError, match="damaged") as caught:
        gendist.load(tmp_path / "artifact")
    assert "\n" not in str(caught.value)


def test_an_unreadable_checkpoint_is_put_aside(unbroken, tmp_path):
    shutil.copytree(unbroken, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "artifact")
    newest = max((tmp_path / "run" / "checkpoints").glob("[0-9]*"))
    damaged(newest / "0", "cut")
    from gendist.config import load_spec

    with RunDirectory(tmp_path / "run", load_spec(DIGITS)) as directory:
        state = resume(directory)
    assert isinstance(state.models[0], Transformed)
    assert state.iteration == int(newest.name) - 2
