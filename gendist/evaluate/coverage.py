"""How far samples of a model lie where the data lie, and how much of the data they cover: by nearest neighbours.

Kynkäänniemi et al. 2019, "Improved Precision and Recall Metric for Assessing Generative Models" (precision, recall); Naeem
et al. 2020, "Reliable Fidelity and Diversity Metrics for Generative Models" (density, coverage). Each is about the Euclidean
distance of whatever is handed over: pixels, or representations of `encode`.
Legend: N rows of data, M samples, D features, k neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gendist.protocols import UserError, as_tensor

ROWS_AT_ONCE = 1024  # of a matrix of distances


@dataclass(frozen=True)
class Likeness:
    """
    precision  the share of samples within the k-th neighbour distance of some row
    recall     the share of rows within the k-th neighbour distance of some sample
    density    the mean number of rows within whose k-th neighbour distance a sample lies, over k: about 1 for good samples
    coverage   the share of rows with a sample within their k-th neighbour distance. Of as many samples as rows, distributed
               as these, about 1 - 2^-k; of samples that are all alike, next to 0
    """

    precision: float
    recall: float
    density: float
    coverage: float


def likeness(data: Any, samples: Any, num_neighbours: int = 5) -> Likeness:
    """Of rows of data (N, D) and samples (M, D), more than k of each; what has more axes is flattened.

    Memory for `ROWS_AT_ONCE` rows of distances at a time, N M D operations. UserError where the shapes do not fit.
    """
    data_ND, samples_MD = (as_tensor(values) for values in (data, samples))
    data_ND, samples_MD = data_ND.flatten(1), samples_MD.flatten(1)
    if data_ND.shape[1] != samples_MD.shape[1]:
        raise UserError(f"rows of {data_ND.shape[1]} numbers, samples of {samples_MD.shape[1]}; as many are needed")
    if num_neighbours < 1 or min(len(data_ND), len(samples_MD)) <= num_neighbours:
        raise UserError(
            f"{len(data_ND)} rows and {len(samples_MD)} samples, neighbour {num_neighbours}; there must be more of both, and "
            "it be 1 or more"
        )
    radius_N, radius_M = neighbour_distances(data_ND, num_neighbours), neighbour_distances(samples_MD, num_neighbours)
    num_within_M = torch.zeros(len(samples_MD), dtype=torch.int64)
    is_recalled_N, is_covered_N = torch.zeros(2, len(data_ND), dtype=torch.bool)
    for start in range(0, len(data_ND), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        distances_nM = torch.cdist(data_ND[rows], samples_MD)
        is_near_nM = distances_nM < radius_N[rows, None]
        num_within_M += is_near_nM.sum(0)
        is_covered_N[rows] = is_near_nM.any(1)
        is_recalled_N[rows] = (distances_nM < radius_M).any(1)
    return Likeness(
        precision=float((num_within_M > 0).double().mean()),
        recall=float(is_recalled_N.double().mean()),
        density=float(num_within_M.double().mean()) / num_neighbours,
        coverage=float(is_covered_N.double().mean()),
    )


def neighbour_distances(x_ND: Tensor, num_neighbours: int) -> Tensor:
    """(N,) the distance of each row to its k-th nearest other row."""
    parts = []
    for rows in x_ND.split(ROWS_AT_ONCE):
        # The nearest of all rows is the row itself, or one that is equal to it.
        parts.append(torch.cdist(rows, x_ND).kthvalue(num_neighbours + 1, dim=1).values)
    return torch.cat(parts)
