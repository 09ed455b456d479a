"""What a run says of the model that came of it."""

from __future__ import annotations

import math

import numpy as np
import pytest

import gendist
from gendist.config import load_spec
from gendist.launch.summary import summary

SPEC = {"name": "blobs", "family": "gmm"}


def test_criteria_find_the_number_of_components(blobs):
    """By their definitions (Schwarz 1978, Akaike 1974); `blobs` are of three."""
    runs = [gendist.fit({**SPEC, "model": {"num_components": k}}, data=blobs) for k in range(1, 6)]
    for run in runs:
        log_likelihood = float(run.model.log_prob(blobs).sum())
        assert run.bic == pytest.approx(run.model.num_parameters * math.log(len(blobs)) - 2 * log_likelihood)
        assert run.aic == pytest.approx(2 * run.model.num_parameters - 2 * log_likelihood)
    assert min(runs, key=lambda run: run.bic).model.num_components == 3


def test_what_has_no_likelihood_has_no_criteria():
    model = {"latent_dim": 2, "encoder": {"hidden_sizes": [8]}, "decoder": {"hidden_sizes": [8]}}
    spec = {"name": "x", "family": "vae", "model": model, "fit": {"num_steps": 1, "global_batch_size": 8}}
    run = gendist.fit(spec, data=np.random.default_rng(0).random((32, 4)))
    with pytest.raises(AttributeError, match="bic is not offered: it is of models with a log-likelihood alone"):
        _ = run.bic
    assert not hasattr(run, "aic")


@pytest.mark.parametrize("transforms", [[], ["standardize"]])
def test_a_log_likelihood_is_said_to_be_of_what_it_is_the_mean_over(tmp_path, transforms):
    x = np.random.default_rng(0).normal(size=(40, 2))
    for family, model, one in (("hmm", {"num_states": 2}, "step"), ("gmm", {"num_components": 2}, "row")):
        spec = load_spec({"name": "n", "family": family, "model": model, "data": {"transforms": transforms}})
        said = summary(spec, gendist.fit(spec, data=x, run_dir=tmp_path / family))
        assert f"  (of the fitted model; a log-likelihood is the mean a {one}, in nats)" in said
