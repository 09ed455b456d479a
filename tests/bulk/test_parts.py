"""Where work is cut, and what a part becomes."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gendist.bulk import parts
from gendist.bulk.parts import Layout, as_parquet, cut_into_parts


@pytest.mark.parametrize("num_rows", [1, 2, 17, 1000, 10**6, 10**8 + 1])
@pytest.mark.parametrize("row_bytes", [8, 128, 24_000])
@pytest.mark.parametrize("leaf_rows", [1, 64, 8192])
@pytest.mark.parametrize("first_row", [0, 41])
def test_parts_are_all_rows_once_in_whole_leaves_of_bounded_size(num_rows, row_bytes, leaf_rows, first_row):
    bounds = cut_into_parts(num_rows, row_bytes, first_row, leaf_rows).bounds
    assert bounds[0] == first_row
    assert bounds[-1] == first_row + num_rows
    sizes = {stop - start for start, stop in pairwise(bounds[:-1])}
    assert len(sizes) <= 1
    assert all(size % leaf_rows == 0 and size & (size - 1) == 0 for size in sizes)
    largest = max(stop - start for start, stop in pairwise(bounds))
    assert largest * row_bytes <= max(parts.MAX_PART_BYTES, leaf_rows * row_bytes)
    assert 0 < bounds[-1] - bounds[-2] <= largest


def test_work_of_real_size_is_neither_a_thousand_small_files_nor_one_large_one(monkeypatch):
    monkeypatch.undo()
    assert cut_into_parts(10_000, 128).num_leaves == 1
    assert 16 <= cut_into_parts(2_000_000, 128).num_leaves <= 32
    assert cut_into_parts(10**8, 128).num_leaves < 500


def test_a_part_is_a_whole_file_with_its_sums():
    layout = Layout(("log_prob",), "log_prob", numbered="row")
    values = np.random.default_rng(0).normal(size=100)
    content = as_parquet(layout, values, 40, {"log_likelihood": float(values.sum())})
    table = pq.read_table(pa.BufferReader(content))
    np.testing.assert_array_equal(table["row"], np.arange(40, 140))
    np.testing.assert_array_equal(table["log_prob"], values)
    assert float(table.schema.metadata[b"log_likelihood"]) == values.sum()
    assert as_parquet(layout, values, 40, {"log_likelihood": float(values.sum())}).equals(content)
