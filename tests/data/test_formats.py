"""The same rows are the same bytes, in whatever files they lie; and what is wrong with them is told the same way."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

import gendist
from gendist.blocks import LocalBlocks
from gendist.data import DataConfig, Dataset, Schema, open_source, source_of
from gendist.data import lines as lines_module
from gendist.protocols import UserError

RNG = np.random.default_rng(0)
NUM_ROWS = 500

# Writers: one file of a table


def write_parquet(table: pa.Table, path: Path) -> None:
    pq.write_table(table, path, row_group_size=97)


def write_csv(table: pa.Table, path: Path) -> None:
    def cell(value: Any) -> str:
        return "" if value is None else value if isinstance(value, str) else repr(value)

    rows = zip(*(column.to_pylist() for column in table.columns), strict=True)
    path.write_text("\n".join([",".join(table.column_names), *(",".join(map(cell, row)) for row in rows)]) + "\n")


def json_lines(table: pa.Table) -> list[str]:
    # Not `to_pylist`, which cannot hold two columns of one name.
    rows = zip(*(column.to_pylist() for column in table.columns), strict=True)
    keys = [json.dumps(name) for name in table.column_names]
    return ["{" + ", ".join(f"{key}: {json.dumps(value)}" for key, value in zip(keys, row, strict=True)) + "}" for row in rows]


def write_json(table: pa.Table, path: Path) -> None:
    path.write_text("".join(f"{line}\n" for line in json_lines(table)))


def write_json_array(table: pa.Table, path: Path) -> None:
    path.write_text("[" + ",".join(json_lines(table)) + "]")


def write_json_array_for_people(table: pa.Table, path: Path) -> None:
    path.write_text("\ufeff [\n  " + ",\n  ".join(line.replace(", ", ",\n    ") for line in json_lines(table)) + "\n]\n")


def write_arrow_file(table: pa.Table, path: Path) -> None:
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=61)


def write_arrow_stream(table: pa.Table, path: Path) -> None:
    with pa.ipc.new_stream(path, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(table, max_chunksize=61)


def write_feather(table: pa.Table, path: Path) -> None:
    pa.feather.write_feather(table, path, compression="lz4", chunksize=61)


def write_npy(table: pa.Table, path: Path) -> None:
    columns = [column.cast(pa.float64(), safe=False).to_numpy() for column in table.columns]
    np.save(path, np.stack(columns, axis=1) if columns else np.zeros((len(table), 0)))


WRITERS: dict[str, tuple[str, Callable[[pa.Table, Path], None]]] = {
    "parquet": (".parquet", write_parquet),
    "csv": (".csv", write_csv),
    "json": (".jsonl", write_json),
    "json array": (".json", write_json_array),
    "json array for people": (".json", write_json_array_for_people),
    "arrow file": (".arrow", write_arrow_file),
    "arrow stream": (".arrow", write_arrow_stream),
    "feather": (".feather", write_feather),
    "npy": (".npy", write_npy),
}
ON_THE_HUB = ("parquet", "csv", "json", "json array", "arrow stream")


pytestmark = pytest.mark.usefixtures("cache_of_datasets")


def write(kind: str, table: pa.Table, folder: Path, cuts: tuple[int, ...] = ()) -> dict[str, Any]:
    """Write a table as files of some kind, cut before these rows; returns the `data:` block that reads them.

    kind   one of WRITERS, "saved" as `datasets` writes to disk, "hub KIND" for a folder in the hub's layout, with
           ", streaming" behind it to stream
    """
    kind, _, streaming = kind.partition(", ")
    hub = {"source": "huggingface", "path": str(folder), "streaming": bool(streaming)}
    if kind == "saved":
        datasets.DatasetDict({"train": datasets.Dataset(table), "other": datasets.Dataset(table[:1])}).save_to_disk(folder)
        return hub
    suffix, write_file = WRITERS[kind.removeprefix("hub ")]
    bounds = (0, *cuts, len(table))
    for i, start in enumerate(bounds[:-1]):
        write_file(table.slice(start, bounds[i + 1] - start), folder / f"train-{i:05d}{suffix}")
    return hub if kind.startswith("hub ") else {"path": str(folder)}


HUB_KINDS = [f"hub {kind}{how}" for kind in ON_THE_HUB for how in ("", ", streaming")] + ["saved", "saved, streaming"]
KINDS = [*WRITERS, *HUB_KINDS]
# Of the ways through `datasets`, which end in the same readers, some.
SOME_KINDS = [*WRITERS, "hub parquet", "hub csv, streaming", "hub json array", "saved", "saved, streaming"]


def table_of(**columns: Any) -> pa.Table:
    return pa.table({name: column if isinstance(column, pa.Array) else pa.array(column) for name, column in columns.items()})


def awkward_numbers(num_rows: int) -> np.ndarray:
    """(num_rows,) float64 of every magnitude that a fit allows, with all their digits; the smallest first."""
    patterns = np.frombuffer(RNG.bytes(64 * num_rows), dtype=np.float64)
    numbers = patterns[np.abs(patterns) < 1e75][:num_rows].copy()
    numbers[:8] = [5e-324, -0.0, 2.2250738585072014e-308, 0.1 + 0.2, 2.0**53 + 2, 1e23, -1 / 3, 123456789.123456789]
    return numbers


HOLES = pa.array(awkward_numbers(NUM_ROWS), mask=RNG.random(NUM_ROWS) < 0.1)
NUMBERS = table_of(a=awkward_numbers(NUM_ROWS), b=RNG.integers(-(2**60), 2**60, NUM_ROWS), c=HOLES)
NAMES = pa.array(np.where(RNG.random(NUM_ROWS) < 0.5, "süß", "2024-01-01"), mask=RNG.random(NUM_ROWS) < 0.3)
LABELLED = NUMBERS.append_column("w", pa.array(RNG.uniform(0, 2, NUM_ROWS))).append_column("y", NAMES)
LABELLED = LABELLED.append_column("z", pa.array(RNG.integers(0, 3, NUM_ROWS), mask=RNG.random(NUM_ROWS) < 0.3))


def sha256(source, make_blocks=LocalBlocks, **config) -> str:
    """Of every bit of all blocks."""
    data_config = DataConfig(**config)
    dataset = Dataset.open(source, data_config, Schema.of(source, data_config), make_blocks)
    digest = hashlib.sha256(repr(dataset.labels).encode())
    for leaves in dataset.blocks(num_latents=5).map_runs(lambda _, leaves: list(leaves), None):
        for block in leaves:
            for values in (block.x, block.rows, block.weights, block.evidence, block.missing):
                digest.update(b"-" if values is None else values.numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("cuts", [(), (0, 0, 1, 1, 64, 300, 500)])
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_rows_are_the_same_bytes(tmp_path, monkeypatch, kind, cuts):
    monkeypatch.setattr(lines_module, "LINES_PER_MARK", 37)
    monkeypatch.setattr(lines_module, "BYTES_PER_READ", 4096)
    config = write(kind, NUMBERS, tmp_path, cuts)
    source = open_source(DataConfig(**config))
    assert source.num_rows == NUM_ROWS

    def in_many_runs(load, leaves, most, keep):
        return LocalBlocks(load, leaves, 1, keep)

    assert sha256(source, in_many_runs) == sha256(source_of(NUMBERS))


@pytest.mark.parametrize("label", ["y", "z"])
@pytest.mark.parametrize("kind", [kind for kind in SOME_KINDS if kind != "npy"])
def test_labels_and_weights_are_the_same_bytes(tmp_path, kind, label):
    config = {"columns": ("c", "a"), "weight": "w", "label": label}
    source = open_source(DataConfig(**write(kind, LABELLED, tmp_path, (200,))))
    assert sha256(source, **config) == sha256(source_of(LABELLED), **config)


def fingerprint(data: dict[str, Any], run_dir: Path, num_workers: int = 0) -> str:
    model = {"num_components": 2, "covariance_type": "diag"}
    spec = {"name": "a", "family": "gmm", "model": model, "data": data, "fit": {"max_iterations": 1}}
    gendist.fit({**spec, "cluster": {"num_workers": num_workers}}, run_dir=run_dir)
    return json.loads((run_dir / "manifest.json").read_text())["data"]["fingerprint"]


FEATURES = table_of(a=RNG.normal(size=3000), b=RNG.normal(size=3000))


@pytest.fixture(scope="module")
def of_parquet(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("of_parquet")
    return fingerprint(write("parquet", FEATURES, folder), folder / "run")


@pytest.mark.parametrize("kind", ["csv", "json", "arrow stream", "npy", "hub json array, streaming", "saved"])
def test_a_fit_finds_the_same_fingerprint(tmp_path, of_parquet, kind):
    assert fingerprint(write(kind, FEATURES, tmp_path), tmp_path / "run") == of_parquet


@pytest.mark.ray
@pytest.mark.parametrize("kind", ["csv", "json array", "feather", "npy", "hub parquet", "hub parquet, streaming"])
def test_a_fit_on_ray_finds_the_same_fingerprint(cluster, tmp_path, of_parquet, kind):
    config = write(kind, FEATURES, tmp_path, (1000,))
    assert fingerprint(config, tmp_path / "run", num_workers=3) == of_parquet


# What is wrong with the data is told in one line, whatever files they lie in


def ints(*values: int | None) -> pa.Array:
    return pa.array(values, pa.int64())


TEXT, FLAT = {"npy"}, {"npy", "csv"}  # what cannot hold text, and what can hold neither lists nor structures
BAD: dict[str, tuple[pa.Table, dict[str, Any], str, set[str]]] = {
    "infinite": (table_of(a=[1.0, 2.0, np.inf]), {}, "column '[ax]' is infinite in row 2", set()),
    "minus infinite": (table_of(a=[1.0, -np.inf, 2.0]), {}, "column '[ax]' is infinite in row 1", set()),
    "too large": (table_of(a=[1.0, 1e200]), {}, "column '[ax]' is 1e.200, beyond 1e.75, in row 1", set()),
    "text": (table_of(a=[1.0, 2.0], b=["x", "y"]), {}, "column 'b' is not numeric .*such as data.columns=.a.", TEXT),
    "text, asked for": (table_of(a=[1.0], b=["x"]), {"columns": ("b",)}, "column 'b' is not numeric", TEXT),
    "lists of unequal length": (table_of(a=[[1.0, 2.0], [3.0]]), {}, "lists of different lengths .1 to 2.", FLAT),
    "empty lists": (table_of(a=pa.array([[], []], pa.list_(pa.float64()))), {}, "holds empty lists", FLAT),
    "a list is missing": (table_of(a=[[1.0], None]), {}, "is missing in row 1; a list is needed", FLAT),
    "lists of text": (table_of(a=[["x"]]), {}, "column 'a' is not numeric", FLAT),
    "nested": (table_of(a=[{"b": 1.0}]), {}, "column 'a' is not numeric .struct<b: double>.", FLAT),
    "two columns of one name": (
        pa.Table.from_arrays([ints(1), ints(2)], names=["a", "a"]),
        {},
        "columns with the same name: 'a'|specified twice",
        {"npy", "saved", "saved, streaming"},
    ),
    "a missing column": (table_of(amount=[1.0], b=[2.0]), {"columns": ("amout",)}, "did you mean 'amount'", {"npy"}),
    "a missing label": (table_of(a=[1.0], b=[2.0]), {"label": "zzz"}, "no column 'zzz'; there are 'a', 'b'", {"npy"}),
    # `datasets` saves no file of a data set without rows.
    "no rows": (table_of(a=pa.array([], pa.float64())), {}, "the data set is empty", {"saved", "saved, streaming"}),
    "no label in any row": (table_of(a=[1.0], y=ints(None)), {"label": "y"}, "column 'y' holds no label", {"npy"}),
    "a label of lists": (table_of(a=[1.0], y=[[1]]), {"label": "y"}, "a label is a number or a text", FLAT),
    "a weight is missing": (table_of(a=[1.0, 2.0], w=[1.0, None]), {"weight": "w"}, "'w' is missing in row 1", {"npy"}),
    "a weight is negative": (table_of(a=[1.0], w=[-1.0]), {"weight": "w"}, "'w' is negative in row 0", {"npy"}),
    "a weight is text": (table_of(a=[1.0], w=["x"]), {"weight": "w"}, "column 'w' is not numeric", TEXT),
}


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        (kind, what)
        for what, case in BAD.items()
        for kind in SOME_KINDS
        if not {kind, kind.removeprefix("hub ").split(",")[0]} & case[3]
    ],
)
def test_what_is_wrong_is_told_in_one_line(tmp_path, kind, what):
    table, config, expected, _ = BAD[what]
    with pytest.raises(UserError, match=expected) as caught:
        sha256(open_source(DataConfig(**write(kind, table, tmp_path))), **config)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


@pytest.fixture
def memory_url():
    """A folder of fsspec's file system in memory, with Parquet files and others."""
    system = fsspec.filesystem("memory")
    for name, values in {"a.parquet": [0.0, 1.0], "b.parquet": [2.0], "deep/c.parquet": [3.0]}.items():
        with system.open(f"/gendist/{name}", "wb") as file:
            pq.write_table(pa.table({"x": values}), file)
    for name in ("_SUCCESS", ".hidden.parquet", "notes.txt"):
        system.pipe(f"/gendist/{name}", b"nothing of data")
    yield "memory://gendist"
    system.rm("/gendist", recursive=True)


@pytest.mark.parametrize(
    ("path", "expected"),
    [("", [0, 1, 2, 3]), ("/", [0, 1, 2, 3]), ("/*.parquet", [0, 1, 2]), ("/**/*.parquet", [0, 1, 2, 3]), ("/b.parquet", [2])],
)
def test_folders_and_patterns_of_remote_file_systems(memory_url, path, expected):
    if "*" in path:  # a pattern takes what it says, as it does on a disk
        fsspec.filesystem("memory").rm("/gendist/.hidden.parquet")
    source = open_source(DataConfig(path=memory_url + path))
    assert source.read(0, source.num_rows, ["x"]).column("x").to_pylist() == expected


@pytest.mark.parametrize("path", ["memory://nowhere/*.parquet", "memory://nowhere/at-all", "unheard-of://folder/*.parquet"])
def test_a_remote_path_without_data_is_told_in_one_line(path):
    with pytest.raises(UserError) as told:
        open_source(DataConfig(path=path, source="parquet"))
    assert path.partition("*")[0] in str(told.value)
    assert "\n" not in str(told.value)
