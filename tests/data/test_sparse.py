"""Sparse rows: the same blocks from SciPy and from files, never dense, in one form; and every mistake in one line."""

from __future__ import annotations

import itertools
import json
import pickle

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.sparse
import torch
from blocks_of import dataset_of, joined, matrix_of, one_run_a_leaf

import gendist
from gendist.blocks import Leaves
from gendist.blocks.leaves import MAX_SPARSE_LEAF_ROWS
from gendist.data.survey import survey
from gendist.protocols import Block, UserError, as_matrix, as_tensor

RNG = np.random.default_rng(0)
COUNTS = scipy.sparse.csr_matrix(
    scipy.sparse.random_array((1000, 40), density=0.1, rng=RNG, data_sampler=lambda size: RNG.integers(1, 9, size) / 2)
)
COUNTS[0, 39] = 3.0  # so that the width can be told from the entries
STRUCT = pa.struct([("indices", pa.list_(pa.int32())), ("values", pa.list_(pa.float32()))])
SPARK = pa.struct([("type", pa.int8()), ("size", pa.int32()), *STRUCT])


def rows_of(start: int, stop: int, kind: str = "plain") -> list[dict]:
    """As structs, in an order of their own where shuffled, as Spark writes them, where every third is dense."""
    rows = []
    for i in range(start, stop):
        row = COUNTS[[i]]
        order = RNG.permutation(row.nnz) if kind == "shuffled" else np.arange(row.nnz)
        content = {"indices": row.indices[order].tolist(), "values": row.data[order].tolist()}
        if kind == "spark":
            content |= {"type": 0, "size": 40}
            if i % 3 == 0:
                content = {"type": 1, "size": None, "indices": None, "values": row.toarray()[0].tolist()}
        rows.append(content)
    return rows


def test_blocks_of_a_matrix_are_its_rows():
    for data in (COUNTS, scipy.sparse.csr_array(COUNTS), COUNTS.tocsc(), COUNTS.tocoo(), COUNTS.tolil(), {"x": COUNTS}):
        dataset = dataset_of(data)
        blocks = joined(dataset.blocks())
        assert all(block.is_sparse and block.x.dtype == torch.float64 and block.missing is None for block in blocks)
        assert sum(block.x.values().numel() for block in blocks) == COUNTS.nnz
        np.testing.assert_array_equal(matrix_of(dataset), COUNTS.toarray())
        assert dataset.schema.feature_names == tuple(f"x_{i}" for i in range(40))
        assert dataset.schema.is_sparse


def test_rows_are_held_out_as_dense_ones_are():
    labels = np.where(np.arange(1000) % 5 == 0, None, np.arange(1000) % 3)
    data = {"label": labels, "weight": 1.0 + np.arange(1000.0)}
    options = {"label": "label", "weight": "weight", "validation_fraction": 0.3}
    sparse, dense = dataset_of(data | {"x": COUNTS}, **options), dataset_of(data | {"x": COUNTS.toarray()}, **options)
    for part in ("training", "validation"):
        one, other = (joined(dataset.blocks(4, part, seed=2)) for dataset in (sparse, dense))
        assert torch.equal(torch.cat([block.x.to_dense() for block in one]), torch.cat([block.x for block in other]))
        for name in ("rows", "weights", "evidence"):
            assert torch.equal(*(torch.cat([getattr(block, name) for block in blocks]) for blocks in (one, other))), name


@pytest.mark.parametrize("num_rows", [1, 63, 64, 1000, 10**5, 10**7])
def test_leaves_depend_on_the_number_of_rows_alone(num_rows):
    leaves = Leaves.of_sparse_rows(num_rows)
    rows = leaves.bounds[1]
    assert rows == min(num_rows, 1 << max(64, min(MAX_SPARSE_LEAF_ROWS, num_rows // 32)).bit_length() - 1)
    assert leaves == Leaves.of_sparse_rows(num_rows)


@pytest.mark.parametrize("cuts", [(), (1,), (100, 100, 997)])
@pytest.mark.parametrize("kind", ["plain", "shuffled", "spark", "json", "mixed", "saved"])
def test_the_same_rows_in_other_files_are_the_same_bytes(tmp_path, kind, cuts):
    folder = tmp_path / "data"
    folder.mkdir()
    config = {"path": str(folder)}
    if kind == "saved":
        columns = datasets.Dataset.from_list([{"x": row} for row in rows_of(0, 1000)])
        datasets.DatasetDict({"train": columns}).save_to_disk(folder)
        config |= {"source": "huggingface"}
        cuts = ()
    for i, (start, stop) in enumerate(itertools.pairwise((0, *cuts, 1000)) if kind != "saved" else ()):
        this = ("spark", "plain")[i % 2] if kind == "mixed" else kind
        rows = rows_of(start, stop, this)
        if this == "json":
            (folder / f"{i}.jsonl").write_text("".join(json.dumps({"x": row}) + "\n" for row in rows))
        else:
            column = pa.array(rows, SPARK if this == "spark" else STRUCT)
            pq.write_table(pa.table({"x": column}), folder / f"{i}.parquet", row_group_size=90)
    here, there = dataset_of(COUNTS), dataset_of(None, one_run_a_leaf, **config)
    assert there.schema == here.schema
    assert survey(there.blocks()).fingerprint == survey(here.blocks()).fingerprint


@pytest.mark.ray
def test_workers_see_what_this_process_sees(cluster):
    from gendist.blocks.ray_blocks import RayBlocks

    table = pa.table({"x": pa.array(rows_of(0, 1000), STRUCT)})
    here = dataset_of(table)
    there = dataset_of(table, lambda load, leaves, most, keep: RayBlocks(load, leaves, 2, most, keep))
    assert there.schema == here.schema
    assert survey(there.blocks()).fingerprint == survey(here.blocks()).fingerprint


@pytest.mark.parametrize("weighted", [False, True])
def test_the_survey_is_that_of_the_dense_rows(weighted):
    x = COUNTS.tolil()
    x[:, 0] = 0.0
    x[:, 1] = -2.0
    x[7, 2] = -1e6
    data = {"weight": RNG.integers(0, 3, 1000)} if weighted else {}
    options = {"weight": "weight"} if weighted else {}
    sparse = survey(dataset_of(data | {"x": x.tocsr()}, **options).blocks())
    dense = survey(dataset_of(data | {"x": x.toarray()}, **options).blocks())
    for name in ("feature_weight", "mean", "variance"):
        torch.testing.assert_close(getattr(sparse, name), getattr(dense, name), rtol=1e-11, atol=1e-12)
    for name in ("minimum", "maximum", "all_integers", "num_missing"):
        assert torch.equal(getattr(sparse, name), getattr(dense, name)), name
    for name in ("num_rows", "num_weighted_rows", "total_weight"):
        assert getattr(sparse, name) == getattr(dense, name), name
    assert (sparse.minimum[1], sparse.maximum[1], sparse.variance[1]) == (-2.0, -2.0, 0.0)
    assert sparse.fingerprint != dense.fingerprint


def test_the_survey_does_not_depend_on_how_leaves_are_dealt_out():
    one, other = (
        survey(dataset_of(COUNTS, make_blocks=make).blocks()) for make in (one_run_a_leaf, gendist.blocks.LocalBlocks)
    )
    for name, value in vars(one).items():
        same = torch.equal(value, getattr(other, name)) if isinstance(value, torch.Tensor) else value == getattr(other, name)
        assert same, name


def test_a_block_travels_without_becoming_dense():
    (block, *_) = joined(dataset_of({"x": COUNTS, "w": np.ones(1000)}, weight="w").blocks())
    buffers: list[pickle.PickleBuffer] = []
    content = pickle.dumps(block, protocol=5, buffer_callback=buffers.append)
    num_bytes = sum(memoryview(buffer).nbytes for buffer in buffers)
    assert len(content) < 2000  # all that grows with the rows is handed over as it lies
    assert num_bytes == 8 * (2 * block.x.values().numel() + 65 + 2 * 64)
    other = pickle.loads(content, buffers=[bytes(memoryview(buffer)) for buffer in buffers])
    assert isinstance(other, Block)
    assert other.is_sparse
    assert torch.equal(other.x.to_dense(), block.x.to_dense())
    assert torch.equal(other.weights, block.weights)
    empty = Block(as_matrix(scipy.sparse.csr_array((0, 5))), torch.arange(0))
    assert pickle.loads(pickle.dumps(empty)).x.shape == (0, 5)


def test_a_matrix_in_any_form_is_the_same_tensor():
    rows, columns, values = [1, 0, 1, 1, 0], [2, 1, 0, 2, 1], [3.0, 1.0, 0.0, 4.0, -1.0]
    messy = scipy.sparse.coo_matrix((values, (rows, columns)), shape=(3, 4))  # twice, out of order, and a 0
    tensor = as_matrix(messy)
    assert tensor.layout is torch.sparse_csr
    assert tensor.crow_indices().tolist() == [0, 0, 1, 1]
    assert (tensor.col_indices().tolist(), tensor.values().tolist()) == ([2], [7.0])
    for other in (messy.tocsr(), messy.tocsc(), tensor, tensor.to_sparse_coo(), tensor.float(), messy.astype(np.int8)):
        again = as_matrix(other)
        for part in (torch.Tensor.crow_indices, torch.Tensor.col_indices, torch.Tensor.values):
            assert torch.equal(part(again), part(tensor))
            assert part(again).dtype == part(tensor).dtype
    assert torch.equal(as_matrix(messy.toarray()), torch.from_numpy(messy.toarray()))


@pytest.mark.parametrize("values", [COUNTS, as_matrix(COUNTS)])
def test_a_family_of_dense_rows_refuses_a_sparse_matrix(values):
    with pytest.raises(UserError, match="a dense array is needed, not a sparse one"):
        as_tensor(values)


def test_a_matrix_of_other_things_is_refused():
    with pytest.raises(UserError, match="a sparse matrix of real numbers is needed, not a csr_matrix of complex128"):
        as_matrix(scipy.sparse.csr_matrix([[1j]]))
    with pytest.raises(UserError, match="a sparse matrix of complex128 of shape"):
        dataset_of(scipy.sparse.csr_matrix([[1j]]))


def test_lists_of_numbers_are_read_as_the_sparse_rows_that_a_model_was_fitted_to():
    from gendist.data import DataConfig, Dataset, Schema, source_of

    known = dataset_of(COUNTS)
    source = source_of(COUNTS.toarray())
    schema = Schema.of(source, DataConfig(), known=known.schema)
    dataset = Dataset.open(source, DataConfig(), schema, known.make_blocks)
    assert survey(dataset.blocks()).fingerprint == survey(known.blocks()).fingerprint
    with pytest.raises(UserError, match="column 'x' holds sparse rows, but the model was fitted to dense ones"):
        Schema.of(source_of(COUNTS), DataConfig(), known=dataset_of(COUNTS.toarray()).schema)
    narrow = dataset_of(COUNTS[:, :5]).schema
    wide = Dataset.open(
        source_of(COUNTS), DataConfig(), Schema.of(source_of(COUNTS), DataConfig(), known=narrow), known.make_blocks
    )
    with pytest.raises(UserError, match="has an index beyond the 5 features in row 0"):
        joined(wide.blocks())


def struct(*rows: dict, type_: pa.DataType = STRUCT) -> pa.Table:
    good = {"type": 0, "size": 4, "indices": [0, 3], "values": [1.0, 2.0]}
    return pa.table({"x": pa.array([good, *rows], type_), "y": range(len(rows) + 1)})


@pytest.mark.parametrize(
    ("data", "config", "expected"),
    [
        (struct(None), {"columns": ["x"]}, "column 'x' is missing in row 1; give empty lists"),
        (struct({"indices": [1], "values": [1.0, 2.0]}), {}, "has not as many indices as values in row 1"),
        (struct({"indices": [1], "values": [None]}), {}, "has a missing value in row 1"),
        (struct({"indices": [1], "values": [float("nan")]}), {}, "has a missing value in row 1"),
        (struct({"indices": [1], "values": [float("inf")]}), {}, "has a value beyond 1e.75 in row 1"),
        (struct({"indices": [None], "values": [1.0]}), {}, "has a missing index in row 1"),
        (struct({"indices": None, "values": [1.0]}), {}, "has no indices in row 1"),
        (struct({"indices": [1], "values": None}), {}, "has no values in row 1"),
        (struct({}, {"indices": [-1], "values": [1.0]}), {}, "has no values in row 1"),
        (struct({"indices": [-1], "values": [1.0]}), {}, "has an index below 0 in row 1"),
        (struct({"type": 0, "size": 2, "indices": [2], "values": [1.0]}, type_=SPARK), {}, "not below its size in row 1"),
        (struct({"type": 0, "size": 2, "indices": None, "values": [1.0]}, type_=SPARK), {}, "has no indices in row 1"),
        (struct(), {"columns": ["x", "y"]}, "holds sparse rows; such a column is fitted alone: leave out 'y' .data.columns"),
        (struct(), {"transforms": ["standardize"]}, "column 'x' holds sparse rows, which data.transforms cannot"),
        (scipy.sparse.csr_matrix([[np.nan, 1.0]]), {}, "column 'x' has a missing value in row 0"),
        ({"x": COUNTS, "y": [1, 2]}, {}, "columns of different lengths"),
    ],
)
def test_bad_rows_are_told(data, config, expected):
    with pytest.raises(UserError, match=expected) as caught:
        joined(dataset_of(data, **config).blocks())
    assert "\n" not in str(caught.value)


def test_rows_without_any_entry_are_told():
    rows = pa.table({"x": pa.array([{"indices": [], "values": []}] * 2, STRUCT)})
    with pytest.raises(UserError, match="column 'x' holds sparse rows without entries; there is nothing to fit"):
        dataset_of(rows)


@pytest.mark.parametrize("family", ["gmm", "vae"])
def test_families_that_take_dense_rows_alone_say_so(family):
    model = {
        "gmm": {"num_components": 2},
        "vae": {"latent_dim": 2, "encoder": {"hidden_sizes": [4]}, "decoder": {"hidden_sizes": [4]}},
    }
    spec = {"name": "sparse", "family": family, "model": model[family]}
    with pytest.raises(UserError, match="column 'x' holds sparse rows, but this family takes dense rows alone; choose columns"):
        gendist.fit(spec, data=COUNTS)
    with pytest.raises(UserError, match="column 'body' holds texts, whose counts are sparse, but this family takes dense rows"):
        gendist.fit(spec | {"data": {"text": {"column": "body"}}}, data={"body": ["a text"]})


def test_a_fit_of_sparse_rows_is_that_of_the_dense_ones(counter):
    labels = (np.asarray(COUNTS.sum(1))[:, 0] > 9.0).astype(int)
    spec = {
        "name": "counts",
        "family": counter,
        "model": {},
        "data": {"label": "y"},
        "fit": {"max_iterations": 3, "tolerance": 0.0},
    }
    sparse, dense = (gendist.fit(spec, data={"x": x, "y": labels}) for x in (COUNTS, COUNTS.toarray()))
    torch.testing.assert_close(sparse.model.probs, dense.model.probs, rtol=1e-12, atol=0.0)
    torch.testing.assert_close(sparse.model.log_prob(COUNTS), dense.model.log_prob(COUNTS.toarray()), rtol=1e-12, atol=0.0)
    for init in ("kmeans||", "kmeans++", "random"):
        with pytest.raises(
            UserError, match=r"fit.init: .*: column 'x' makes sparse rows, among which no centers are looked for"
        ):
            gendist.fit(spec | {"fit": {"init": init}}, data={"x": COUNTS, "y": labels})
