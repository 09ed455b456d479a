"""`fit --dry-run`: what is wrong with a spec's data is told before anything is read."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gendist.config import load_spec
from gendist.dry_run import sizes
from gendist.protocols import UserError

GMM = {"name": "a", "family": "gmm", "model": {"num_components": 2}}
NETWORKS = {"encoder": {"hidden_sizes": [4]}, "decoder": {"hidden_sizes": [4]}}
VAE = {"name": "a", "family": "vae", "model": {"latent_dim": 2, **NETWORKS}}


@pytest.fixture
def table(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pq.write_table(pa.table({"amount": [1.0, 2.0], "label": [0, 1]}), "a.parquet")
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.csv").write_text("amount\n1\n")


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"path": "nope.parquet"}, "/nope.parquet: no such file"),
        ({"path": ["a.parquet", "nope.parquet"]}, "/nope.parquet: no such file"),
        ({"path": "nope/*.parquet"}, "no file matches"),
        ({"path": "empty"}, r"empty: no \.parquet.* file in this folder"),
        ({"path": "empty", "source": "parquet"}, r"empty: no \.parquet"),
        ({"path": "a.parquet", "columns": ["amout"]}, "no column 'amout'; did you mean 'amount'"),
        ({"path": "a.parquet", "label": "lable"}, "no column 'lable'; did you mean 'label'"),
        ({"path": "a.parquet", "weight": "w"}, "no column 'w'"),
    ],
)
def test_data_that_are_not_there(table, data, expected):
    for spec in (GMM, VAE):
        with pytest.raises(UserError, match=expected):
            list(sizes(load_spec({**spec, "data": data})))
    where = {**data, "image_shape": [1, 2], "labels": [0, 1]} if "label" in data else {**data, "image_shape": [1, 2]}
    *lines, last = sizes(load_spec({**VAE, "data": where}))
    assert lines[0].startswith("autoencoder: ")
    assert last.startswith("a fit would fail here: ")


@pytest.mark.parametrize(
    "data",
    [
        {"path": "a.parquet", "columns": ["amount"], "label": "label"},
        {"path": "a.csv", "columns": ["not looked for"]},  # which would take reading the file
        {"path": "s3://bucket/nope.parquet"},
        {"source": "huggingface", "path": "someone/data"},
        {"source": "digits"},
        {},
    ],
)
def test_what_is_there_or_cannot_be_told_passes(table, data):
    assert list(sizes(load_spec({**GMM, "data": data}))) == []
