"""The first look at the columns where entries are missing; the moments and the fingerprint are in test_dataset.py."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse
import torch
from blocks_of import dataset_of, one_run_a_leaf

from gendist.blocks import LocalBlocks, reduce
from gendist.data.principal_axes import Spread
from gendist.data.survey import survey

RNG = np.random.default_rng(0)
NAN = np.nan


def columns() -> np.ndarray:
    """Whole numbers, fractions, both with missing entries, negative ones alone, and a column without entries."""
    x = np.stack([RNG.integers(3, 9, 500), RNG.normal(size=500), -RNG.integers(3, 9, 500), RNG.normal(size=500)], axis=1)
    x = np.concatenate([x.astype(float), np.full((500, 1), NAN)], axis=1)
    for column, share in ((2, 0.3), (3, 0.9)):
        x[RNG.random(500) < share, column] = NAN
    x[:64, 2] = NAN  # a whole leaf
    return x


@pytest.mark.parametrize("make_blocks", [LocalBlocks, one_run_a_leaf])
@pytest.mark.parametrize("weighted", [False, True])
def test_missing_entries_do_not_count(make_blocks, weighted):
    x, weights = columns(), RNG.integers(0, 3, 500)
    data, options = ({"x": x, "w": weights}, {"weight": "w"}) if weighted else (x, {})
    summary = survey(dataset_of(data, make_blocks, **options).blocks())
    counted = x[weights > 0] if weighted else x
    np.testing.assert_array_equal(summary.minimum, [*np.nanmin(counted[:, :4], axis=0), np.inf])
    np.testing.assert_array_equal(summary.maximum, [*np.nanmax(counted[:, :4], axis=0), -np.inf])
    assert summary.all_integers.tolist() == [True, False, True, False, True]
    assert summary.num_missing.tolist() == np.isnan(counted).sum(0).tolist()
    present = ~np.isnan(x)
    by = (weights if weighted else np.ones(500))[:, None] * present
    np.testing.assert_allclose(summary.feature_weight, by.sum(0), rtol=1e-13)
    mean = (by * np.nan_to_num(x)).sum(0)[:4] / by.sum(0)[:4]
    np.testing.assert_allclose(summary.mean[:4], mean, rtol=1e-12)
    np.testing.assert_allclose(
        summary.variance[:4], (by[:, :4] * (np.nan_to_num(x[:, :4]) - mean) ** 2).sum(0) / by.sum(0)[:4], rtol=1e-11
    )
    assert summary.variance[4] == 0.0
    assert bool(summary.mean.isfinite().all())


@pytest.mark.parametrize("last", [2.5, 3.0, -7.0])
def test_one_entry_decides_what_a_column_holds(last):
    x = np.full((300, 1), NAN)
    x[299] = last
    summary = survey(dataset_of(x).blocks())
    assert (float(summary.minimum), float(summary.maximum)) == (last, last)
    assert summary.all_integers.tolist() == [last.is_integer()]
    assert summary.mean.tolist() == [last]


@pytest.mark.parametrize("kind", [np.array, scipy.sparse.csr_matrix])
def test_rows_of_no_weight_say_nothing_of_what_a_column_holds(kind):
    summary = survey(dataset_of({"x": kind([[1.0, 0.0], [2.5, -1.0]]), "w": [1.0, 0.0]}, weight="w").blocks())
    assert summary.maximum.tolist() == [1.0, 0.0]
    assert summary.minimum.tolist() == [1.0, 0.0]
    assert summary.all_integers.tolist() == [True, True]
    assert summary.num_weighted_rows == 1


@pytest.mark.parametrize("fill", [1e20, -999.0, np.nan])
@pytest.mark.parametrize("make_blocks", [LocalBlocks, one_run_a_leaf])
def test_rows_of_no_weight_say_nothing_whatever_they_hold(fill, make_blocks):
    """The first row, and all of the first leaf, have a weight of 0: the moments lose no digit to what is there."""
    x, weights = RNG.normal(50.0, 2.0, (4000, 2)), np.ones(4000)
    weights[:64] = weights[100::7] = 0.0
    x[weights == 0.0] = fill
    dataset = dataset_of({"x": x, "w": weights}, make_blocks, weight="w")
    summary, spread = survey(dataset.blocks()), reduce(lambda _, block: Spread.of(block), dataset.blocks(), None)
    counted = x[weights > 0]
    np.testing.assert_allclose(summary.mean, counted.mean(0), rtol=1e-14)
    np.testing.assert_allclose(summary.variance, counted.var(0), rtol=1e-12)
    np.testing.assert_allclose(spread.mean, counted.mean(0), rtol=1e-14)
    np.testing.assert_allclose(spread.axes()[1] ** 2, np.linalg.eigvalsh(np.cov(counted.T, bias=True))[::-1], rtol=1e-11)
    assert summary.num_missing.tolist() == [0, 0]


def test_a_constant_column_is_one_where_its_first_entry_is_missing():
    x = np.full((20, 1), 0.1)
    x[0] = NAN
    assert survey(dataset_of(x).blocks()).variance.tolist() == [0.0]


def test_a_part_without_rows_has_no_extremes():
    summary = survey(dataset_of(np.ones((3, 2)), validation_fraction=0.001).blocks(part="validation"))
    assert summary.num_rows == 0
    assert torch.equal(summary.minimum, torch.full((2,), torch.inf).double())
    assert torch.equal(summary.maximum, torch.full((2,), -torch.inf).double())
    assert summary.all_integers.tolist() == [True, True]
