"""What a family would have people look at: values that say what is to be drawn, and nothing of how (`gendist.pictures` draws).

Legend: N rows, D features, K latents (components, states or classes), S sequences, T steps, R rows of a picture.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, Self, runtime_checkable

import torch
from torch import Tensor

NUM_POINTS = 2_000  # of a mixture
NUM_STRIPS = 5  # sequences
NUM_SIGMAS = 2.0  # of an outline


def named(labels: Sequence[Any], num_latents: int, what: str) -> tuple[str, ...]:
    """What the latents are called: by their labels, those without one by what they are, and their number."""
    return (*map(str, labels), *(f"{what} {k}" for k in range(len(labels), num_latents)))


@dataclass(frozen=True)
class ToData:
    """The way from the features that a model was fitted to, E of them, to those of the data, D.

    rows    (N, E) -> (N, D)
    matrix  (E, D) where rows(z) is z @ matrix and a constant; None where it is no linear map
    """

    rows: Callable[[Tensor], Tensor]
    matrix: Tensor | None

    def steps(self, z: Tensor) -> Tensor:
        """(..., D) of (..., E)."""
        return self.rows(z.flatten(0, -2)).unflatten(0, z.shape[:-1])


@runtime_checkable
class Figure(Protocol):
    def to_data(self, to_data: ToData) -> Self:
        """The same of the data as they were before transforms, as far as it can be said of them."""
        ...

    @classmethod
    def of_classes(cls, figures: Sequence[Self], labels: Sequence[Any], weights_C: Tensor) -> Self:
        """One figure of the models of several classes, of which each has one."""
        ...


@dataclass(frozen=True, eq=False)
class Paths:
    """A row of pictures for each way through the latents; of what are no images, lines over the steps.

    x_RTD  names: of the rows
    """

    x_RTD: Tensor
    names: tuple[str, ...] = ()

    def to_data(self, to_data: ToData) -> Paths:
        return replace(self, x_RTD=to_data.steps(self.x_RTD))

    @classmethod
    def of_classes(cls, figures: Sequence[Paths], labels: Sequence[Any], weights_C: Tensor) -> Paths:
        names = tuple(str(label) for figure, label in zip(figures, labels, strict=True) for _ in figure.x_RTD)
        return cls(torch.cat([figure.x_RTD for figure in figures]), names)


@dataclass(frozen=True, eq=False)
class Mixture:
    """Gaussians: samples as points, and the outline of each at two standard deviations; of images their means and samples.

    x_ND, latent_N   samples, and which Gaussian each is of
    weights_K        of the Gaussians
    means_KD         covariances (K, D, D), or (K, D) the variances where features are uncorrelated, or None: no outlines
    group_K, names   what is drawn in one colour, and what that is called: component 3, say, or class 7
    """

    x_ND: Tensor
    latent_N: Tensor
    weights_K: Tensor
    means_KD: Tensor
    covariances: Tensor | None
    group_K: Tensor
    names: tuple[str, ...]

    def covariance(self, k: int, features: Sequence[int]) -> Tensor:
        """(d, d) of these features."""
        assert self.covariances is not None
        index = torch.as_tensor(features)
        if self.covariances.ndim == 2:
            return torch.diag(self.covariances[k, index])
        return self.covariances[k][index][:, index]

    def outline(self, k: int, i: int, j: int, num_points: int = 90) -> Tensor:
        """(num_points, 2) points (x_i, x_j), all at two standard deviations from the mean, as Mahalanobis (1936) measures."""
        angle_P = torch.linspace(0.0, 2.0 * math.pi, num_points, dtype=torch.float64)
        circle_P2 = torch.stack([angle_P.cos(), angle_P.sin()], 1)
        # By eigenvectors, not by Cholesky's factor: behind a pca two features may be one and the same.
        variances_2, directions_22 = torch.linalg.eigh(self.covariance(k, (i, j)).double())
        scale_22 = directions_22 * variances_2.clamp_min(0.0).sqrt()
        return self.means_KD[k, [i, j]].double() + NUM_SIGMAS * circle_P2 @ scale_22.mT

    def to_data(self, to_data: ToData) -> Mixture:
        covariances = None
        if self.covariances is not None and to_data.matrix is not None:
            matrix_ED = to_data.matrix
            if self.covariances.ndim == 2:
                covariances = (matrix_ED.mT * self.covariances[:, None]) @ matrix_ED
            else:
                covariances = matrix_ED.mT @ self.covariances @ matrix_ED
        return replace(self, x_ND=to_data.rows(self.x_ND), means_KD=to_data.rows(self.means_KD), covariances=covariances)

    @classmethod
    def of_classes(cls, figures: Sequence[Mixture], labels: Sequence[Any], weights_C: Tensor) -> Mixture:
        """All Gaussians of a class in its colour."""
        sizes = [max(1, round(float(weight) * len(figure.x_ND))) for figure, weight in zip(figures, weights_C, strict=True)]
        counts = [len(figure.means_KD) for figure in figures]
        firsts = [sum(counts[:c]) for c in range(len(counts))]
        has_outlines = all(figure.covariances is not None for figure in figures)
        return cls(
            torch.cat([figure.x_ND[:size] for figure, size in zip(figures, sizes, strict=True)]),
            torch.cat([f.latent_N[:size] + first for f, size, first in zip(figures, sizes, firsts, strict=True)]),
            torch.cat([weight * figure.weights_K for figure, weight in zip(figures, weights_C, strict=True)]),
            torch.cat([figure.means_KD for figure in figures]),
            torch.cat([f.covariances for f in figures if f.covariances is not None]) if has_outlines else None,
            torch.arange(len(figures)).repeat_interleave(torch.tensor(counts)),
            tuple(str(label) for label in labels),
        )


@dataclass(frozen=True, eq=False)
class Strips:
    """Sequences over their steps, in a band of colour for the hidden state of each step.

    x_STD, states_ST   sequences, and their states; names: of the states; titles: of the sequences
    """

    x_STD: Tensor
    states_ST: Tensor
    names: tuple[str, ...]
    titles: tuple[str, ...] = ()

    def to_data(self, to_data: ToData) -> Strips:
        return replace(self, x_STD=to_data.steps(self.x_STD))

    @classmethod
    def of_classes(cls, figures: Sequence[Strips], labels: Sequence[Any], weights_C: Tensor) -> Strips:
        """The first sequences of each class, all as long as the shortest."""
        length = min(figure.x_STD.shape[1] for figure in figures)
        each = max(1, NUM_STRIPS // len(figures))
        return cls(
            torch.cat([figure.x_STD[:each, :length] for figure in figures]),
            torch.cat([figure.states_ST[:each, :length] for figure in figures]),
            max((figure.names for figure in figures), key=len),
            tuple(str(label) for figure, label in zip(figures, labels, strict=True) for _ in figure.x_STD[:each]),
        )


@dataclass(frozen=True, eq=False)
class Matrices:
    """Matrices of probabilities, such as those of transitions, from the rows to the columns.

    values_MRC   titles: of the matrices; row_names, column_names: of what they lead from and to
    """

    values_MRC: Tensor
    row_names: tuple[str, ...]
    column_names: tuple[str, ...]
    titles: tuple[str, ...] = ()

    def to_data(self, to_data: ToData) -> Matrices:
        return self

    @classmethod
    def of_classes(cls, figures: Sequence[Matrices], labels: Sequence[Any], weights_C: Tensor) -> Matrices:
        values = torch.cat([figure.values_MRC[:1] for figure in figures])
        return cls(values, figures[0].row_names, figures[0].column_names, tuple(map(str, labels)))


@dataclass(frozen=True, eq=False)
class Profiles:
    """What each latent makes of each feature, where features are independent given the latent.

    means_KD     variances_KD: None where nothing is known of them
    names        of the latents
    probs        of each feature that is a category, by its index, (K, C) the probability of each; its mean says nothing
    """

    means_KD: Tensor
    variances_KD: Tensor | None
    names: tuple[str, ...]
    probs: Mapping[int, Tensor] = field(default_factory=dict)

    def to_data(self, to_data: ToData) -> Profiles:
        variances_KD = None
        if self.variances_KD is not None and to_data.matrix is not None:
            variances_KD = self.variances_KD @ to_data.matrix.square()
        return replace(self, means_KD=to_data.rows(self.means_KD), variances_KD=variances_KD)

    @classmethod
    def of_classes(cls, figures: Sequence[Profiles], labels: Sequence[Any], weights_C: Tensor) -> Profiles:
        pairs = list(zip(figures, labels, strict=True))
        variances = [figure.variances_KD for figure in figures if figure.variances_KD is not None]
        return cls(
            torch.cat([figure.means_KD for figure in figures]),
            torch.cat(variances) if len(variances) == len(figures) else None,
            tuple(f"{label}: {name}" for figure, label in pairs for name in figure.names),
            {d: torch.cat([figure.probs[d] for figure in figures]) for d in figures[0].probs},
        )
