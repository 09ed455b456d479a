"""Sequences: every format gives the same blocks; whole ones and pieces, held out whole; bad ones are told in one line."""

from __future__ import annotations

import io
import itertools
import json
import pickle
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
import scipy.sparse
import torch
from blocks_of import joined, one_run_a_leaf
from PIL import Image
from sklearn.datasets import load_digits

from gendist.blocks import LocalBlocks
from gendist.blocks import leaves as leaves_module
from gendist.data import DataConfig, Dataset, Schema, as_rows, as_sequences, open_source, sequence_ids, sequences, source_of
from gendist.data.schema import Takes
from gendist.data.survey import survey
from gendist.data.transforms import Transforms
from gendist.protocols import Block, UserError

RNG = np.random.default_rng(0)
LENGTHS = (3, 0, 5, 1, 0)
RAGGED = [RNG.normal(size=(length, 2)) for length in LENGTHS]
FLAT = np.concatenate(RAGGED)
ID = np.repeat(np.arange(5), LENGTHS)
STEP = np.concatenate([np.arange(length) for length in LENGTHS])
TEXTS = ["abba", "", "naïve 北京", "b"]
LONG = {"id": ID, "t": STEP, "a": FLAT[:, 0], "b": FLAT[:, 1]}
AB = pa.table({name: [list(x[:, i]) for x in RAGGED] for i, name in enumerate("ab")})
VECTORS = [x.tolist() for x in RAGGED]


def dataset_of(data=None, make_blocks=LocalBlocks, categories=True, cuts_sequences=True, **config) -> Dataset:
    data_config = DataConfig(**config)
    source = as_sequences(open_source(data_config) if data is None else source_of(data), data_config)
    schema = Schema.of(source, data_config, Takes(categories=categories, sparse=True))
    return Dataset.open(source, data_config, schema, make_blocks, cuts_sequences)


def sequences_of(blocks) -> list[np.ndarray]:
    """Each sequence (T, D), put together from its pieces."""
    found: list[np.ndarray] = []
    for block in joined(blocks):
        bounds = block.sequence_bounds.tolist()
        assert bounds[0] == 0
        assert bounds[-1] == block.num_rows
        x = block.x if block.missing is None else block.x.masked_fill(block.missing, torch.nan)
        parts = [x[start:stop].numpy() for start, stop in itertools.pairwise(bounds)]
        if block.open_ends[0]:
            found[-1] = np.concatenate([found[-1], parts.pop(0)])
        found += parts
    return found


def check(dataset: Dataset, expected) -> None:
    found = sequences_of(dataset.blocks())
    assert [len(x) for x in found] == [len(x) for x in expected]
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, np.asarray(other, dtype=float).reshape(one.shape))


def texts_of(dataset: Dataset) -> list[list[str]]:
    (values,) = dataset.schema.categories.values()
    return [[values[int(i)] for i in x[:, 0]] for x in sequences_of(dataset.blocks())]


def encoded(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG")
    return stream.getvalue()


def png(height: int, width: int) -> bytes:
    return encoded(np.zeros((height, width), dtype=np.uint8))


def written(tmp_path, name: str, table: pa.Table) -> str:
    path = tmp_path / name
    match path.suffix:
        case ".parquet":
            pq.write_table(table, path, row_group_size=2)
        case ".csv":
            table.to_pandas().to_csv(path, index=False)
        case ".arrow":
            pyarrow.feather.write_feather(table, path, compression="uncompressed", chunksize=2)
        case ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
    return str(path)


# Every format


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".arrow", ".jsonl"])
def test_rows_with_ids(tmp_path, suffix):
    path = written(tmp_path, f"long{suffix}", pa.table(LONG))
    dataset = dataset_of(path=path, sequence="id", order="t")
    assert dataset.schema.feature_names == ("a", "b")
    assert dataset.schema.is_sequence
    assert (dataset.schema.sequence, dataset.schema.order) == ("id", "t")
    check(dataset, [x for x in RAGGED if len(x)])  # a sequence without rows has no id


@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".jsonl"])
def test_columns_of_lists(tmp_path, suffix):
    check(dataset_of(path=written(tmp_path, f"lists{suffix}", AB)), RAGGED)
    nested = pa.table({"x": pa.array(VECTORS, pa.list_(pa.list_(pa.float64())))})
    check(dataset_of(path=written(tmp_path, f"nested{suffix}", nested)), RAGGED)


def test_lists_of_lists_of_one_length_and_missing_lists(tmp_path):
    vectors = [*VECTORS[:4], None]
    check(dataset_of(pa.table({"x": pa.array(vectors, pa.list_(pa.list_(pa.float64(), 2)))})), RAGGED)
    fixed = pa.table({"x": pa.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], pa.list_(pa.float64(), 3))})
    check(dataset_of(fixed), [[1, 2, 3], [4, 5, 6]])
    holes = pa.table({"x": [[1.0, None], [None]]})
    check(dataset_of(holes), [[1.0, np.nan], [np.nan]])


def test_files_in_a_folder_are_sequences(tmp_path):
    for i, x in enumerate(RAGGED):
        np.save(tmp_path / f"{i}.npy", x)
    check(dataset_of(path=str(tmp_path)), RAGGED)
    check(dataset_of(path=str(tmp_path / "[02].npy")), [RAGGED[0], RAGGED[2]])


def test_files_of_one_axis_and_of_three(tmp_path):
    (tmp_path / "flat").mkdir()
    (tmp_path / "stacked").mkdir()
    stacked = RNG.normal(size=(6, 5, 4))
    for i in range(3):
        np.save(tmp_path / f"flat/{i}.npy", RAGGED[i][:, 0])
        np.save(tmp_path / f"stacked/{i}.npy", stacked[2 * i : 2 * i + 2])
    check(dataset_of(path=str(tmp_path / "flat")), [x[:, 0] for x in RAGGED[:3]])
    check(dataset_of(path=str(tmp_path / "stacked")), stacked)


def test_what_python_hands_over():
    check(dataset_of(RAGGED), RAGGED)
    check(dataset_of(tuple(torch.from_numpy(x) for x in RAGGED)), RAGGED)
    check(dataset_of([x[:, 0].tolist() for x in RAGGED]), [x[:, 0] for x in RAGGED])
    check(dataset_of([[1, 2], [3, 4]]), [[1, 2], [3, 4]])
    check(dataset_of([RAGGED[0], RAGGED[0]]), [RAGGED[0], RAGGED[0]])
    check(dataset_of(FLAT), [FLAT])
    check(dataset_of(FLAT[:, 0]), [FLAT[:, 0]])
    stacked = RNG.normal(size=(4, 3, 2))
    check(dataset_of(stacked), stacked)
    check(dataset_of({"x": stacked}), stacked)
    check(dataset_of(pd.DataFrame({"a": FLAT[:, 0], "b": FLAT[:, 1]})), [FLAT])
    check(dataset_of(pd.DataFrame(LONG), sequence="id", order="t"), [x for x in RAGGED if len(x)])
    check(dataset_of(LONG, sequence="id", columns=("a", "b")), [x for x in RAGGED if len(x)])
    check(dataset_of({"x": RAGGED, "y": list("aabba")}, label="y"), RAGGED)
    assert dataset_of({"x": np.zeros((2, 3, 1)), "y": [0, 1]}, label="y").source.bounds.tolist() == [0, 3, 6]
    check(dataset_of({"x": [[1, 2], [3, 4]]}), [[1, 2], [3, 4]])
    check(dataset_of({"x": [[1, 2], None]}), [[1, 2], []])
    check(dataset_of({"x": np.array([[1, 2], [3, 4]])}), [[[1, 2], [3, 4]]])


def test_texts_are_sequences_of_their_characters(tmp_path):
    for data in (TEXTS, {"text": TEXTS}, pa.table({"text": pa.array(TEXTS).dictionary_encode()})):
        dataset = dataset_of(data)
        assert texts_of(dataset) == [list(text) for text in TEXTS]
        assert next(iter(dataset.schema.categories.values())) == tuple(sorted(set("".join(TEXTS))))
    path = written(tmp_path, "texts.parquet", pa.table({"text": [*TEXTS, None], "y": [0, 1, 0, 1, 0]}))
    dataset = dataset_of(path=path, label="y")
    assert texts_of(dataset) == [*(list(text) for text in TEXTS), []]


def test_texts_are_sequences_of_their_tokens():
    texts = ["The cat; the DOG", "", None, "a cat"]
    table = pa.table({"text": texts})
    assert texts_of(dataset_of(table, text={"column": "text"})) == [["the", "cat", "the", "dog"], [], [], ["cat"]]
    as_said = {"column": "text", "pattern": r"(\w)\w*|;", "lowercase": False}
    assert texts_of(dataset_of(table, text=as_said)) == [["The", "cat", ";", "the", "DOG"], [], [], ["a", "cat"]]
    tokens = pa.table({"text": [["x", "y"], [], ["y"]]})
    assert texts_of(dataset_of(tokens)) == [["x", "y"], [], ["y"]]
    assert texts_of(dataset_of(tokens, text={"column": "text"})) == [["x", "y"], [], ["y"]]


def test_images_are_sequences_of_their_rows():
    digits = load_digits()
    dataset = dataset_of(source="digits", label="label")
    assert dataset.schema.num_features == 8
    assert dataset.schema.image_shape == (8, 8)
    assert Schema.model_validate(dataset.schema.model_dump()).image_shape == (8, 8)
    check(dataset, digits.images / 16.0)
    pixels = RNG.integers(0, 256, (3, 6, 5, 3), dtype=np.uint8)
    check(dataset_of(pixels), pixels.reshape(3, 6, 15) / 255.0)
    dataset = dataset_of(pa.table({"image": [encoded(image) for image in pixels], "name": ["a", "b", "c"]}))
    assert dataset.schema.image_shape == (6, 5, 3)
    check(dataset, pixels.reshape(3, 6, 15) / 255.0)


def test_what_stands_beside_lists_holds_for_all_steps():
    table = pa.table({"x": [[1.0, 2.0], [], [3.0]], "y": ["a", "b", None], "w": [2.0, 5.0, 0.5], "name": ["p", "q", "r"]})
    dataset = dataset_of(table, label="y", weight="w", labels=("a", "b"))
    (block,) = joined(dataset.blocks(num_latents=2))
    assert block.weights.tolist() == [2.0, 2.0, 0.5]
    assert (block.evidence == 0).tolist() == [[True, False], [True, False], [True, True]]
    a_step = pa.table({"x": [[1.0, 2.0], [], [3.0]], "y": [["b", None], [], ["a"]]})
    words = pa.table({"x": ["to go", "", "go"], "y": [["b", None], [], ["a"]]})
    letters = pa.table({"x": ["to", "", "g"], "y": [["b", None], [], ["a"]]})
    for dataset in (
        dataset_of(a_step, label="y"),
        dataset_of(letters, label="y"),
        dataset_of(words, label="y", text={"column": "x"}),
    ):
        (block,) = joined(dataset.blocks(num_latents=2))
        assert (block.evidence == 0).tolist() == [[False, True], [True, True], [True, False]]


# Leaves, parts, weights


@pytest.fixture
def small_leaves(monkeypatch):
    monkeypatch.setattr(leaves_module, "MIN_SEQUENCE_LEAF_ROWS", 4)
    monkeypatch.setattr(sequences, "FIRST_LOOK_ROWS", 1)
    monkeypatch.setattr(sequences, "BYTES_AT_ONCE", 100)


MANY = [RNG.normal(size=(length, 2)) for length in (0, 30, 0, 0, 2, 3, 0, 1, 50, 0, 1, 1, 1, 7, 0, 0)]


@pytest.mark.parametrize("make_blocks", [LocalBlocks, one_run_a_leaf])
@pytest.mark.parametrize("cuts_sequences", [True, False])
def test_long_sequences_are_cut_and_put_together(small_leaves, make_blocks, cuts_sequences):
    dataset = dataset_of(MANY, make_blocks, cuts_sequences=cuts_sequences)
    check(dataset, MANY)
    blocks = joined(dataset.blocks())
    assert torch.cat([block.rows for block in blocks]).tolist() == list(range(96))
    pieces = [block for block in blocks if any(block.open_ends)]
    assert bool(pieces) == cuts_sequences
    assert all(len(block.sequence_bounds) == 2 for block in pieces)
    if cuts_sequences:
        assert max(block.num_rows for block in blocks) == dataset.leaves.max_leaf_rows <= 12
    summary = survey(dataset.blocks())
    assert (summary.num_sequences, summary.num_rows) == (16, 96)


def test_the_ways_to_compute_agree_on_the_fingerprint(small_leaves):
    fingerprint = survey(dataset_of(MANY).blocks()).fingerprint
    assert survey(dataset_of(MANY, one_run_a_leaf).blocks()).fingerprint == fingerprint
    table = pa.table({"x": pa.array([x.tolist() for x in MANY], pa.list_(pa.list_(pa.float64())))})
    assert survey(dataset_of(table).blocks()).fingerprint == fingerprint
    other_bounds = [*MANY[:4], np.concatenate(MANY[4:6]), *MANY[6:]]
    assert survey(dataset_of(other_bounds).blocks()).fingerprint != fingerprint


@pytest.mark.parametrize("make_blocks", [LocalBlocks, one_run_a_leaf])
def test_sequences_are_held_out_whole(small_leaves, make_blocks):
    numbered = [np.full((length, 1), float(i)) for i, length in enumerate([40, 3, 0, 5, 60, 2] * 8)]
    dataset = dataset_of(numbered, make_blocks, validation_fraction=0.3)
    parts = {part: sequences_of(dataset.blocks(part=part, seed=2)) for part in ("training", "validation")}
    kept = {part: [(int(x[0, 0]), len(x)) for x in found if len(x)] for part, found in parts.items()}
    assert sorted(kept["training"] + kept["validation"]) == [(i, len(x)) for i, x in enumerate(numbered) if len(x)]
    assert sum(map(len, parts.values())) == len(numbered)
    assert 5 <= len(kept["validation"]) <= 25
    # By their numbers alone, whatever their lengths.
    as_long = dataset_of([np.full((9, 1), float(i)) for i in range(48)], make_blocks, validation_fraction=0.3)
    numbers = {int(x[0, 0]) for x in sequences_of(as_long.blocks(part="validation", seed=2))}
    assert {i for i, _ in kept["validation"]} == {i for i in numbers if i % 6 != 2}


def test_a_weight_is_that_of_a_whole_sequence(small_leaves):
    long = {"id": np.repeat([0, 1, 2], [30, 2, 3]), "x": np.zeros(35), "w": np.repeat([1.0, 2.0, 3.0], [30, 2, 3])}
    weights = torch.cat([block.weights for block in joined(dataset_of(long, sequence="id", weight="w").blocks())])
    assert weights.tolist() == long["w"].tolist()
    for row, make_blocks in ((17, LocalBlocks), (31, one_run_a_leaf), *((row, one_run_a_leaf) for row in range(1, 30))):
        wrong = long | {"w": np.where(np.arange(35) >= row, 7.0, 1.0)}
        with pytest.raises(UserError, match=f"column 'w' is 7 in row {row}, and 1 in the step before"):
            joined(dataset_of(wrong, make_blocks, sequence="id", weight="w").blocks())


@pytest.mark.parametrize("make_blocks", [LocalBlocks, one_run_a_leaf])
def test_a_sequence_with_any_label_is_labelled(small_leaves, make_blocks):
    """What multiplies the weight of what has no label: it is one number for all steps."""
    label = [None] * 40
    label[17], label[33] = "a", "b"
    ids = np.repeat([0, 1, 2, 3], [30, 2, 3, 5])
    table = pa.table({"id": ids, "x": np.zeros(40), "y": label})
    dataset = dataset_of(table, make_blocks, sequence="id", label="y")
    weights = torch.cat([block.weights for block in joined(dataset.blocks(num_latents=2, unlabelled_weight=0.25))])
    assert weights.tolist() == np.where(np.isin(ids, [0, 2]), 1.0, 0.25).tolist()


def test_transforms_leave_bounds_as_they_are(small_leaves):
    dataset = dataset_of(MANY, transforms=["standardize"])
    blocks = dataset.blocks()
    transforms = Transforms.fit(dataset.config.transforms, dataset.schema.feature_names, blocks, survey(blocks))
    after = joined(replace(dataset, transforms=transforms).blocks())
    for one, other in zip(joined(blocks), after, strict=True):
        assert torch.equal(one.sequence_bounds, other.sequence_bounds)
        assert one.open_ends == other.open_ends


def test_images_of_other_sizes_are_told_wherever_they_are_read(small_leaves):
    sizes = [(8, 4)] * 5 + [(4, 8)]
    images = pa.table({"image": [png(*size) for size in sizes]})
    with pytest.raises(UserError, match=r"mixed sizes: \(4, 8\) in row 5, \(8, 4\) in row 0"):
        joined(dataset_of(images, one_run_a_leaf).blocks())


def test_ids_are_looked_at_in_chunks(monkeypatch):
    monkeypatch.setattr(sequence_ids, "ROWS_AT_ONCE", 3)
    ids = np.repeat(list("cabde"), [4, 2, 3, 1, 7])
    order = np.concatenate([np.sort(RNG.normal(size=n)) for n in (4, 2, 3, 1, 7)])
    dataset = dataset_of({"id": ids, "t": order, "x": np.arange(17.0)}, sequence="id", order="t")
    assert dataset.source.bounds.tolist() == [0, 4, 6, 9, 10, 17]
    for i in range(1, 17):
        wrong = ids.copy()
        wrong[i] = "c" if i > 4 else "z"
        if i > 4:
            with pytest.raises(UserError, match=f"sequence 'c' comes back in row {i}"):
                dataset_of({"id": wrong, "x": np.arange(17.0)}, sequence="id")


# Bad input


def long_with(**changes):
    return pa.table({**{name: list(values) for name, values in LONG.items()}, **changes})


@pytest.mark.parametrize(
    ("data", "config", "expected"),
    [
        (long_with(id=[0, 0, 0, 2, 2, 0, 2, 2, 3]), {"sequence": "id"}, "'id': the sequence 0 comes back in row 5; .* sort"),
        (long_with(id=[0, None, 0, 2, 2, 2, 2, 2, 3]), {"sequence": "id"}, "column 'id' is missing in row 1"),
        (long_with(id=[0.0, np.nan] + [1.0] * 7), {"sequence": "id"}, "column 'id' is missing in row 1"),
        (long_with(t=[0, 2, 1, 0, 1, 2, 3, 4, 0]), {"sequence": "id", "order": "t"}, "'t' falls from 2 to 1 in row 2.*sort"),
        (long_with(t=[0, 1, 2, 0, 1, 1, 3, 4, 0]), {"sequence": "id", "order": "t"}, "'t' is 1 twice in row 5, .* sequence 2"),
        (long_with(t=[0, 1, 2, 0, 1, None, 3, 4, 0]), {"sequence": "id", "order": "t"}, "'t' is missing in row 5"),
        (long_with(), {"sequence": "idd"}, "no column 'idd'; did you mean 'id'"),
        (long_with(), {"sequence": "id", "order": "tt"}, "no column 'tt'"),
        (long_with(), {"sequence": "id", "columns": ("id", "a")}, "'id' says where the sequences are"),
        (long_with(id=[[0]] * 9), {"sequence": "id"}, "column 'id' holds list.*numbers or texts"),
        (pa.table({"a": [[1.0], [2.0]], "b": [[1.0], [2.0, 3.0]]}), {}, "row 1: column 'a' has 1 steps, column 'b' has 2"),
        (
            pa.table({"a": [[1.0], [2.0]], "y": [["p"], ["p", "q"]]}),
            {"label": "y"},
            "row 1: column 'a' has 1 steps, column 'y'",
        ),
        (pa.table({"a": ["b", "c"], "y": [["p"], ["p", "q"]]}), {"label": "y"}, "row 1: column 'a' has 1 steps, column 'y'"),
        (pa.table({"a": [[[1.0]], [[2.0, 3.0]]]}), {}, "lists of different lengths"),
        (pa.table({"a": [png(8, 4), png(4, 8)]}), {}, "images of mixed sizes"),
        ([np.zeros((3, 2)), np.zeros((4, 3))], {}, r"sequence 1 has shape \(4, 3\), but sequence 0 \(3, 2\)"),
        ([np.zeros((3, 2)), np.zeros(4)], {}, "sequence 1 has shape"),
        ([np.zeros((3, 2)), "abc"], {}, "entry 1 of the list is a str"),
        ([1.0, 2.0], {}, "entry 0 of the list is a float"),
        ([np.zeros((3, 2, 2)), np.zeros((4, 2, 2))], {}, "sequence 0 has shape"),
        ([], {}, "the data set is empty"),
        ([np.zeros((0, 2)), np.zeros((0, 2))], {}, "2 sequences, none of which has a step"),
        (["", ""], {}, "2 sequences, none of which has a step"),
        (np.zeros((0, 2)), {}, "the data set is empty"),
        (pa.table({"p": ["a"], "q": ["b"]}), {}, "columns 'p', 'q', some of texts: choose one"),
        (pa.table({"p": ["a"], "q": [1.0]}), {}, "columns 'p', 'q', some of texts: choose one"),
        (pa.table({"p": ["a"], "q": [1.0]}), {"text": {"column": "q"}}, "column 'q' holds double"),
        (
            pa.table({"p": ["a"], "q": [1.0]}),
            {"text": {"column": "p"}, "columns": ("q",)},
            "data.text its column 'p' is fitted",
        ),
        (pa.table({"p": ["ab"]}), {"text": {"column": "p", "hash_buckets": 4}}, "data.text.hash_buckets: of counts"),
        (pa.table({"p": ["ab"]}), {"text": {"column": "p", "max_vocabulary": 4}}, "data.text.max_vocabulary: of counts"),
        (pa.table({"p": ["ab"]}), {"text": {"column": "p", "pattern": r"\b"}}, "matches no letter"),
        (long_with(), {"sequence": "id", "text": {"column": "a"}}, "data.text: with data.sequence"),
    ],
)
def test_bad_sequences_are_told(data, config, expected):
    with pytest.raises(UserError, match=expected) as caught:
        joined(dataset_of(data, **config).blocks())
    assert "\n" not in str(caught.value)


def test_sparse_rows_are_no_steps():
    with pytest.raises(UserError, match="holds sparse rows; the steps of sequences are dense"):
        dataset_of(scipy.sparse.csr_array(np.eye(3)))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"order": "t"}, "checked within sequences"),
        ({"text": {"column": "a", "pattern": "("}}, "no regular expression"),
        ({"text": {"column": "a", "pattern": r"\w*"}}, "matches where there is nothing"),
    ],
)
def test_a_config_that_cannot_be_is_told(config, expected):
    with pytest.raises(ValueError, match=expected):
        DataConfig(**config)


@pytest.mark.parametrize(
    ("data", "config", "expected"),
    [
        (RAGGED, {}, "a list of sequences, but to this family rows are independent"),
        (LONG, {"sequence": "id"}, "data.sequence: of families of sequences alone"),
    ],
)
def test_families_of_independent_rows_take_no_sequences(data, config, expected):
    with pytest.raises(UserError, match=re.escape(expected)):
        as_rows(source_of(data), DataConfig(**config))


def test_a_block_of_sequences_travels(small_leaves):
    for block in joined(dataset_of(MANY).blocks()):
        again: Block = pickle.loads(pickle.dumps(block, protocol=5))
        assert torch.equal(again.sequence_bounds, block.sequence_bounds)
        assert again.open_ends == block.open_ends
