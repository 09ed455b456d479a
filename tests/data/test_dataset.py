"""Blocks: the right rows with the right weights and evidence, in parts that only seed and row number decide."""

from __future__ import annotations

import io

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from gendist.blocks import LocalBlocks
from gendist.data import DataConfig, Dataset, Schema, source_of
from gendist.data.survey import survey
from gendist.protocols import Block, UserError

RNG = np.random.default_rng(0)
X = RNG.normal(size=(1000, 3)) * [1.0, 10.0, 0.1] + [0.0, 1e6, -5.0]


def one_run_a_leaf(load, leaves, most, keep):
    return LocalBlocks(load, leaves, 1, keep)


def dataset_of(data, make_blocks=LocalBlocks, **config) -> Dataset:
    source, data_config = source_of(data), DataConfig(**config)
    return Dataset.open(source, data_config, Schema.of(source, data_config), make_blocks)


def joined(blocks) -> list[Block]:
    return [block for leaves in blocks.map_runs(lambda _, leaves: list(leaves), None) for block in leaves]


def rows_of(blocks) -> list[int]:
    return [row for block in joined(blocks) for row in block.rows.tolist()]


def test_blocks_hold_every_row_once_in_order():
    blocks = joined(dataset_of(X).blocks())
    assert torch.equal(torch.cat([block.x for block in blocks]), torch.from_numpy(X))
    assert torch.cat([block.rows for block in blocks]).tolist() == list(range(1000))
    assert all(block.missing is None and block.weights is None and block.evidence is None for block in blocks)


def test_parts_share_out_the_rows_by_seed_alone():
    dataset = dataset_of(X, validation_fraction=0.2)
    parts = {part: rows_of(dataset.blocks(part=part, seed=3)) for part in ("training", "validation")}
    assert sorted(parts["training"] + parts["validation"]) == list(range(1000))
    assert 140 < len(parts["validation"]) < 260
    again = dataset_of(X, one_run_a_leaf, validation_fraction=0.2)
    assert rows_of(again.blocks(part="validation", seed=3)) == parts["validation"]
    assert rows_of(again.blocks(part="validation", seed=4)) != parts["validation"]
    block = joined(dataset.blocks(part="validation", seed=3))[0]
    assert torch.equal(block.x, torch.from_numpy(X)[block.rows])


def test_missing_entries_are_marked():
    holes = X.copy()
    holes[5, 1] = holes[700, 2] = np.nan
    blocks = joined(dataset_of(holes).blocks())
    missing = [(int(block.rows[i]), j) for block in blocks if block.missing is not None for i, j in block.missing.nonzero()]
    assert [(row, int(column)) for row, column in missing] == [(5, 1), (700, 2)]
    assert all(bool(block.x.isfinite().all()) for block in blocks)
    assert survey(dataset_of(holes).blocks()).num_missing.tolist() == [0, 1, 1]


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (["b", "a", None, "b"], ("a", "b")),
        ([10, 9, 10, 9], (9, 10)),
        ([1.0, float("nan"), 2.0, 1.0], (1, 2)),
        ([True, False, True, True], (0, 1)),
    ],
)
def test_labels_become_evidence(labels, expected):
    dataset = dataset_of({"x": X[:4], "y": labels}, label="y")
    assert dataset.labels == expected
    (block,) = joined(dataset.blocks(num_latents=3))
    for label, row in zip(labels, block.evidence, strict=True):
        if label is None or label != label:
            assert row.tolist() == [0.0, 0.0, 0.0]
        else:
            allowed = expected.index(label)
            assert [i for i in range(3) if row[i] == 0.0] == [allowed]
            assert [i for i in range(3) if row[i] == -torch.inf] == [i for i in range(3) if i != allowed]


def test_the_label_and_weight_columns_are_not_features():
    dataset = dataset_of({"a": X[:, 0], "b": X[:, 1], "w": np.ones(1000), "y": np.zeros(1000)}, label="y", weight="w")
    assert dataset.schema.feature_names == ("a", "b")


@pytest.mark.parametrize(
    ("data", "config", "expected"),
    [
        ({"x": X[:3], "w": [1.0, -2.0, 1.0]}, {"weight": "w"}, "column 'w' is negative in row 1"),
        ({"x": X[:3], "w": [1.0, 2.0, np.nan]}, {"weight": "w"}, "column 'w' is missing in row 2"),
        ({"x": X[:3], "y": [None, None, None]}, {"label": "y"}, "holds no label"),
        ({"x": X[:3], "y": [1, 2]}, {}, "columns of different lengths"),
    ],
)
def test_bad_columns_are_told(data, config, expected):
    with pytest.raises(UserError, match=expected):
        joined(dataset_of(data, **config).blocks())


def test_the_survey_has_the_moments_of_the_data():
    weights = RNG.uniform(0, 2, 1000) * (RNG.random(1000) > 0.1)
    summary = survey(dataset_of({"x": X, "w": weights}, weight="w").blocks())
    mean = np.average(X, axis=0, weights=weights)
    np.testing.assert_allclose(summary.mean, mean, rtol=1e-13)
    np.testing.assert_allclose(summary.variance, np.average((X - mean) ** 2, axis=0, weights=weights), rtol=1e-9)
    assert summary.total_weight == pytest.approx(weights.sum(), rel=1e-13)
    assert summary.num_weighted_rows == (weights > 0).sum()


def test_the_fingerprint_is_that_of_the_content():
    first = survey(dataset_of(X).blocks()).fingerprint
    assert survey(dataset_of(X, one_run_a_leaf).blocks()).fingerprint == first
    assert survey(dataset_of({"a": X[:, 0], "b": X[:, 1], "c": X[:, 2]}).blocks()).fingerprint == first
    other = X.copy()
    other[999, 2] = np.nextafter(other[999, 2], 1)
    assert survey(dataset_of(other).blocks()).fingerprint != first
    assert survey(dataset_of({"x": X, "w": np.ones(1000)}, weight="w").blocks()).fingerprint != first


def picture(*shape: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.zeros(shape, np.uint8)).save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("make_blocks", [LocalBlocks, one_run_a_leaf])
@pytest.mark.parametrize("other", [(32, 128), (64, 64, 3), (64, 63)], ids=str)
def test_an_image_unlike_the_first_is_told_wherever_it_is_read(make_blocks, other):
    """Of as many pixels, of more channels, smaller: in the same leaf, and in the first row of a later one."""
    first = dataset_of(pa.table({"image": [picture(64, 64)]})).schema.leaves(1000).bounds[1]
    stop = first + 2
    for row in (5, first):
        images = pa.table({"image": [picture(64, 64)] * row + [picture(*other)] * (stop - row)})
        dataset = dataset_of(images, make_blocks)
        expected = rf"column 'image': images of mixed sizes: {other} in row {row}, (64, 64) in row 0"
        with pytest.raises(UserError) as raised:
            joined(dataset.blocks())
        assert expected in str(raised.value)
        assert "\n" not in str(raised.value)


def test_rows_are_the_images_that_the_spec_says():
    values = RNG.normal(size=(7, 12))
    assert dataset_of(values).schema.image_shape is None
    assert dataset_of(values, image_shape=[3, 4]).schema.image_shape == (3, 4)
    assert dataset_of({"x": values}, image_shape=[2, 2, 3]).schema.image_shape == (2, 2, 3)
    columns = {f"c{i}": values[:, i] for i in range(12)}
    assert dataset_of(columns, image_shape=[6, 2]).schema.image_shape == (6, 2)
    with pytest.raises(UserError, match=r"data.image_shape: \[3, 5\], but .* has 12 features a row"):
        dataset_of(values, image_shape=[3, 5])
    with pytest.raises(UserError, match=r"data.image_shape: \[2, 8\], but .* has images of \[4, 4\]"):
        dataset_of(pa.table({"image": [picture(4, 4)]}), image_shape=[2, 8])
