"""The parameters of hmmlearn's estimators, as initial probabilities, transitions and emissions, and back."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from gendist.models.distributions.categorical import Categorical
from gendist.models.distributions.columns import Columns, Group
from gendist.models.distributions.gaussian import Gaussian
from gendist.models.distributions.gaussian_emission import GaussianEmission
from gendist.models.distributions.multinomial import Multinomial
from gendist.models.distributions.poisson import Poisson
from gendist.protocols import UserError, as_tensor

NAMES = ("GaussianHMM", "GMMHMM", "CategoricalHMM", "MultinomialHMM", "PoissonHMM")


def read(estimator: Any) -> tuple[dict[str, Any], Tensor, Tensor, GaussianEmission | Columns]:
    """The configuration's fields, initial probabilities (K,), transitions (K, K) and emissions; UserError where there are
    none."""
    name = type(estimator).__name__
    if name not in NAMES:
        raise UserError(f"a {name} is none of hmmlearn's {', '.join(NAMES)}")
    if not hasattr(estimator, "transmat_"):
        raise UserError(f"the {name} has no parameters: fit it, or set them")
    emission = _emission(name, estimator)
    config: dict[str, Any] = {"num_states": emission.num_latents, "emission": _config(emission)}
    for field, prior in (("initial_pseudocount", "startprob_prior"), ("transition_pseudocount", "transmat_prior")):
        values = np.unique(np.asarray(getattr(estimator, prior), dtype=np.float64))
        if len(values) > 1 or values[0] < 1.0:
            raise UserError(f"the {name} has {prior} {values.tolist()}; one number of 1 or more is needed")
        config[field] = float(values[0]) - 1.0
    return config, as_tensor(estimator.startprob_).clone(), as_tensor(estimator.transmat_).clone(), emission


def _config(emission: GaussianEmission | Columns) -> Any:
    if isinstance(emission, GaussianEmission):
        return emission.config
    return {"kind": emission.groups[0].kind, "pseudocount": 0.0, "unseen_categories": False}


def _emission(name: str, estimator: Any) -> GaussianEmission | Columns:
    if name in ("GaussianHMM", "GMMHMM"):
        kind = estimator.covariance_type
        # The property `covars_` of a GaussianHMM has matrices whatever the type; what is kept is as wide as the type says.
        covariances = as_tensor(estimator._covars_ if name == "GaussianHMM" else estimator.covars_).clone()
        if kind == "spherical":
            covariances = covariances.flatten() if name == "GMMHMM" else covariances.reshape(len(covariances), -1)[:, 0]
        settings = {"covariance_regularization": 0.0}
        if name == "GaussianHMM":
            return GaussianEmission.of(Gaussian(as_tensor(estimator.means_).clone(), covariances, kind).check(), **settings)
        if kind == "tied":
            raise UserError(
                "a GMMHMM of tied covariances has one a state; those of one for all, full, diag or spherical are known"
            )
        covariances = covariances if kind == "spherical" else covariances.flatten(0, 1)
        gaussian = Gaussian(as_tensor(estimator.means_).flatten(0, 1).clone(), covariances, kind).check()
        return GaussianEmission.mixture(as_tensor(estimator.weights_).clone(), gaussian, **settings)
    distribution: Any
    if name == "PoissonHMM":
        rates = as_tensor(estimator.lambdas_).clone()
        distribution = Poisson(rates, rates.mean(0), 0.0)
    elif name == "CategoricalHMM":
        probs = as_tensor(estimator.emissionprob_).clone()
        distribution = Categorical(probs.clamp_min(1e-30), torch.tensor([probs.shape[1]]), 0.0, has_unseen=False)
    else:
        length = as_tensor(np.mean(estimator.n_trials))
        distribution = Multinomial(as_tensor(estimator.emissionprob_).clone(), length, 0.0)
    kind = {"PoissonHMM": "poisson", "CategoricalHMM": "categorical", "MultinomialHMM": "multinomial"}[name]
    return Columns((Group(kind, torch.arange(distribution.num_features), distribution),))


def write(initial: Tensor, transition: Tensor, emission: GaussianEmission | Columns) -> Any:
    """A fitted estimator; UserError where hmmlearn has none of this kind."""
    from hmmlearn import hmm

    num_states, num_features = emission.num_latents, emission.num_features
    estimator: Any
    if isinstance(emission, GaussianEmission):
        gaussian, kind = emission.gaussian, emission.gaussian.covariance_type
        if emission.weights.shape[1] == 1:
            estimator = hmm.GaussianHMM(num_states, covariance_type=kind)
            estimator.n_features = num_features
            estimator.means_ = gaussian.means.numpy().copy()
            covariances = gaussian.covariances.numpy().copy()
            estimator.covars_ = covariances[:, None].repeat(num_features, 1)[:, :1] if kind == "spherical" else covariances
        elif kind == "tied":
            raise UserError("hmmlearn's GMMHMM has a tied covariance for each state, not one for all")
        else:
            shape = tuple(emission.weights.shape)
            estimator = hmm.GMMHMM(num_states, n_mix=shape[1], covariance_type=kind)
            estimator.n_features = num_features
            estimator.weights_ = emission.weights.numpy().copy()
            estimator.means_ = gaussian.means.unflatten(0, shape).numpy().copy()
            estimator.covars_ = gaussian.covariances.unflatten(0, shape).numpy().copy()
    else:
        (group, *others), known = emission.groups, ("categorical", "multinomial", "poisson")
        distribution: Any = group.distribution
        if others or group.kind not in known or (group.kind == "categorical" and num_features > 1):
            raise UserError(
                f"hmmlearn has emissions of one kind alone: gaussian, one categorical column, {known[1]} or {known[2]}"
            )
        if group.kind == "poisson":
            estimator = hmm.PoissonHMM(num_states)
            estimator.lambdas_ = distribution.means.numpy().copy()
        elif group.kind == "categorical":
            estimator = hmm.CategoricalHMM(num_states)
            estimator.emissionprob_ = distribution.probs.numpy().copy()
            num_features = distribution.probs.shape[1]
        else:
            estimator = hmm.MultinomialHMM(num_states, n_trials=round(float(distribution.mean_length)))
            estimator.emissionprob_ = distribution.probs.numpy().copy()
        estimator.n_features = num_features
    estimator.startprob_, estimator.transmat_ = initial.numpy().copy(), transition.numpy().copy()
    return estimator
