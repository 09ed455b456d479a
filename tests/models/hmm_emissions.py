"""Small emissions of every kind with random parameters: what gendist makes of them, and by SciPy what they are.

A density here is a sum over columns that are there, of an observation (D,) whose missing entries are NaN.
Legend: T steps, K states, D columns, M components of a mixture, C categories.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from scipy import special, stats

from gendist.models.distributions.bernoulli import Bernoulli
from gendist.models.distributions.categorical import Categorical
from gendist.models.distributions.columns import Columns, Group
from gendist.models.distributions.gaussian import CovarianceType, Gaussian
from gendist.models.distributions.gaussian_emission import GaussianEmission
from gendist.models.distributions.multinomial import Multinomial
from gendist.models.distributions.normal import Normal
from gendist.models.distributions.poisson import Poisson

Array = np.ndarray[Any, np.dtype[Any]]

COVARIANCE_TYPES = ("full", "tied", "diag", "spherical")
GAUSSIANS = tuple(f"gaussian {kind}" for kind in COVARIANCE_TYPES)
MIXTURES = tuple(f"mixture {kind}" for kind in COVARIANCE_TYPES)
COUNTED = ("categorical", "multinomial", "poisson", "bernoulli")
KINDS = (*GAUSSIANS, *MIXTURES, *COUNTED, "mixed")


@dataclass(frozen=True)
class Emission:
    """
    ours         the emission that gendist is given
    log_density  (x (D,), state) -> log p(x | state), by SciPy
    draw         (rng, state) -> x (D,)
    means        (K, D), of columns that have a mean: not of categories
    """

    ours: Any
    num_columns: int
    log_density: Callable[[Array, int], float]
    draw: Callable[[np.random.Generator, int], Array]
    means: Array | None = None


def emission_of(kind: str, num_states: int = 3, seed: int = 0) -> Emission:
    """One of `KINDS`, with parameters that belong to the seed."""
    rng = np.random.default_rng(seed)
    if kind == "mixed":
        return _mixed(rng, num_states)
    family, _, covariance_type = kind.partition(" ")
    if family == "mixture":
        return _gaussian_mixture(rng, num_states, covariance_type)
    if family == "gaussian":
        return _gaussian(rng, num_states, covariance_type)
    part = _PARTS[family](rng, num_states)
    columns = torch.arange(part.num_columns)
    return replace(part, ours=Columns((Group(family, columns, part.ours),)))


# Gaussians


def random_gaussians(
    rng: np.random.Generator, num_latents: int, covariance_type: CovarianceType, num_columns: int = 2
) -> tuple[Array, Array, Array]:
    """means (K, D), covariances as gendist lays them out, and (K, D, D) the same whatever the type."""
    means = 2.0 * rng.normal(size=(num_latents, num_columns))
    factors = rng.normal(size=(num_latents, num_columns, num_columns))
    matrices = factors @ factors.transpose(0, 2, 1) + 0.3 * np.eye(num_columns)
    identity = np.eye(num_columns)
    if covariance_type == "tied":
        return means, matrices[0], np.stack([matrices[0]] * num_latents)
    if covariance_type == "diag":
        variances = matrices.diagonal(axis1=1, axis2=2)
        return means, variances.copy(), variances[:, :, None] * identity
    if covariance_type == "spherical":
        variances = matrices[:, 0, 0]
        return means, variances.copy(), variances[:, None, None] * identity
    return means, matrices, matrices


def log_normal(x: Array, mean: Array, covariance: Array) -> float:
    """Of the entries that are there, of the marginal."""
    there = ~np.isnan(x)
    if not there.any():
        return 0.0
    return float(stats.multivariate_normal.logpdf(x[there], mean[there], covariance[np.ix_(there, there)]))


def _gaussian(rng: np.random.Generator, num_states: int, covariance_type: CovarianceType) -> Emission:
    means, covariances, matrices = random_gaussians(rng, num_states, covariance_type)
    return Emission(
        gaussian_emission(means, covariances, covariance_type),
        means.shape[1],
        lambda x, k: log_normal(x, means[k], matrices[k]),
        lambda rng, k: rng.multivariate_normal(means[k], matrices[k]),
        means,
    )


def _gaussian_mixture(
    rng: np.random.Generator, num_states: int, covariance_type: CovarianceType, num_components: int = 2
) -> Emission:
    weights = rng.dirichlet(np.full(num_components, 3.0), num_states)
    means, covariances, matrices = random_gaussians(rng, num_states * num_components, covariance_type)
    each_means = means.reshape(num_states, num_components, -1)
    each_matrices = matrices.reshape(num_states, num_components, *matrices.shape[1:])

    def log_density(x: Array, state: int) -> float:
        logs = [log_normal(x, m, c) for m, c in zip(each_means[state], each_matrices[state], strict=True)]
        return float(special.logsumexp(logs, b=weights[state]))

    def draw(rng: np.random.Generator, state: int) -> Array:
        component = rng.choice(num_components, p=weights[state])
        return rng.multivariate_normal(each_means[state, component], each_matrices[state, component])

    ours = mixture_emission(weights, means, covariances, covariance_type)
    return Emission(ours, means.shape[1], log_density, draw, np.einsum("km,kmd->kd", weights, each_means))


def gaussian_emission(means: Array, covariances: Array, covariance_type: CovarianceType) -> GaussianEmission:
    """means (K, D)."""
    gaussian = Gaussian(torch.tensor(means), torch.tensor(covariances), covariance_type)
    return GaussianEmission.of(gaussian, covariance_regularization=0.0)


def mixture_emission(weights: Array, means: Array, covariances: Array, covariance_type: CovarianceType) -> GaussianEmission:
    """weights (K, M), means (K M, D), the components of a state side by side."""
    gaussian = Gaussian(torch.tensor(means), torch.tensor(covariances), covariance_type)
    return GaussianEmission.mixture(torch.tensor(weights), gaussian, covariance_regularization=0.0)


# Columns


def _independent(log_density: Callable[[Array, Array], Any], parameters: Array) -> Callable[[Array, int], float]:
    """Of columns with a parameter each, (K, D)."""

    def of_columns_that_are_there(x: Array, state: int) -> float:
        there = ~np.isnan(x)
        return float(np.sum(log_density(x[there], parameters[state, there])))

    return of_columns_that_are_there


def _normal_part(rng: np.random.Generator, num_states: int) -> Emission:
    means, variances = 2.0 * rng.normal(size=(num_states, 2)), rng.uniform(0.3, 2.0, (num_states, 2))
    return Emission(
        Normal(Gaussian(torch.tensor(means), torch.tensor(variances), "diag")),
        2,
        lambda x, k: log_normal(x, means[k], np.diag(variances[k])),
        lambda rng, k: rng.normal(means[k], np.sqrt(variances[k])),
        means,
    )


def _poisson_part(rng: np.random.Generator, num_states: int) -> Emission:
    rates = rng.uniform(0.2, 6.0, (num_states, 2))
    ours = Poisson(torch.tensor(rates), torch.tensor(rates.mean(0)))
    log_density = _independent(stats.poisson.logpmf, rates)
    return Emission(ours, 2, log_density, lambda rng, k: rng.poisson(rates[k]).astype(float), rates)


def _bernoulli_part(rng: np.random.Generator, num_states: int) -> Emission:
    probs = rng.uniform(0.05, 0.95, (num_states, 3))
    draw = lambda rng, k: (rng.random(3) < probs[k]).astype(float)  # noqa: E731
    return Emission(Bernoulli(torch.tensor(probs)), 3, _independent(stats.bernoulli.logpmf, probs), draw, probs)


def _categorical_part(rng: np.random.Generator, num_states: int) -> Emission:
    sizes = (3, 4)
    probs = [rng.dirichlet(np.ones(size), num_states) for size in sizes]

    def log_density(x: Array, state: int) -> float:
        return float(sum(np.log(p[state, int(value)]) for p, value in zip(probs, x, strict=True) if not np.isnan(value)))

    ours = Categorical(torch.tensor(np.concatenate(probs, 1)), torch.tensor(sizes), has_unseen=False)
    draw = lambda rng, k: np.array([rng.choice(len(p[k]), p=p[k]) for p in probs], dtype=float)  # noqa: E731
    return Emission(ours, len(sizes), log_density, draw)


def _multinomial_part(rng: np.random.Generator, num_states: int) -> Emission:
    probs, mean_length = rng.dirichlet(np.full(4, 2.0), num_states), 6.0

    def log_density(x: Array, state: int) -> float:
        """Of the tokens in one order: the multinomial coefficient is left out; and given how many of them are there."""
        there = ~np.isnan(x)
        if there.sum() < 2:
            return 0.0
        counts, p = x[there], probs[state, there] / probs[state, there].sum()
        coefficient = special.gammaln(counts.sum() + 1) - special.gammaln(counts + 1).sum()
        return float(stats.multinomial.logpmf(counts, counts.sum(), p) - coefficient)

    ours = Multinomial(torch.tensor(probs), torch.tensor(mean_length, dtype=torch.float64))
    draw = lambda rng, k: rng.multinomial(rng.poisson(mean_length), probs[k]).astype(float)  # noqa: E731
    return Emission(ours, 4, log_density, draw, mean_length * probs)


_PARTS = {
    "gaussian": _normal_part,
    "poisson": _poisson_part,
    "bernoulli": _bernoulli_part,
    "categorical": _categorical_part,
    "multinomial": _multinomial_part,
}


def _mixed(rng: np.random.Generator, num_states: int) -> Emission:
    """Columns of four kinds, those of a kind not side by side."""
    kinds = ("gaussian", "poisson", "bernoulli", "categorical")
    parts = [_PARTS[kind](rng, num_states) for kind in kinds]
    num_columns = sum(part.num_columns for part in parts)
    order = rng.permutation(num_columns)
    members = [np.sort(own) for own in np.split(order, np.cumsum([part.num_columns for part in parts])[:-1])]
    groups = zip(kinds, members, parts, strict=True)
    ours = Columns(tuple(Group(kind, torch.tensor(own), part.ours) for kind, own, part in groups))

    def draw(rng: np.random.Generator, state: int) -> Array:
        x = np.empty(num_columns)
        for own, part in zip(members, parts, strict=True):
            x[own] = part.draw(rng, state)
        return x

    def log_density(x: Array, state: int) -> float:
        return sum(part.log_density(x[own], state) for own, part in zip(members, parts, strict=True))

    return Emission(ours, num_columns, log_density, draw)


# Data


def log_likelihoods(emission: Emission, x: Array, num_states: int) -> Array:
    """(T, K) log p(x_t | state)."""
    rows = [[emission.log_density(row, k) for k in range(num_states)] for row in x]
    return np.array(rows, dtype=np.float64).reshape(len(x), num_states)


def drawn(emission: Emission, rng: np.random.Generator, num_steps: int, num_states: int, missing: float = 0.0) -> Array:
    """(T, D) observations of random states, a share of whose entries is missing."""
    x = np.array([emission.draw(rng, int(rng.integers(num_states))) for _ in range(num_steps)], dtype=np.float64)
    x = x.reshape(num_steps, emission.num_columns)
    x[rng.random(x.shape) < missing] = np.nan
    return x
