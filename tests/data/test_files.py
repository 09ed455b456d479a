"""Many files as one table, and files that are damaged, change or disappear."""

from __future__ import annotations

import json
import os
import pickle
import threading

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

import gendist
from gendist.blocks import LocalBlocks
from gendist.data import DataConfig, Dataset, Schema, open_source
from gendist.data import files as files_module
from gendist.data import lines as lines_module
from gendist.data.matrix import to_matrix
from gendist.data.parquet import ParquetFiles
from gendist.data.sequences import as_sequences
from gendist.protocols import UserError


def matrix(source, start=0, stop=None, columns=None) -> np.ndarray:
    schema = Schema.of(source, DataConfig(columns=columns))
    return to_matrix(source.read(start, stop or source.num_rows, schema.columns), schema.columns, start, source.name)


def write(path, **columns) -> str:
    table = pa.table({name: pa.array(column) for name, column in columns.items()})
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    elif path.suffix == ".csv":
        table.to_pandas().to_csv(path, index=False)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
    else:
        with pa.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table)
    return str(path)


FORMATS = pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl", ".arrow"])

# Many


def test_only_the_row_groups_that_overlap_are_decoded_each_once(tmp_path, monkeypatch):
    pq.write_table(pa.table({"a": np.arange(1000.0), "b": np.arange(1000.0)}), tmp_path / "a.parquet", row_group_size=100)
    decoded = []
    read_row_groups = pq.ParquetFile.read_row_groups

    def watched(self, groups, columns):
        decoded.append((list(groups), list(columns)))
        return read_row_groups(self, groups, columns=columns)

    source = open_source(DataConfig(path=str(tmp_path / "a.parquet")))
    monkeypatch.setattr(pq.ParquetFile, "read_row_groups", watched)
    for start, stop, groups in [(0, 100, [0]), (99, 101, [0, 1]), (250, 400, [2, 3]), (999, 1000, [9])]:
        assert source.read(start, stop, ["b"]).column("b").to_pylist() == list(range(start, stop))
        assert decoded.pop() == (groups, ["b"])
        assert not decoded


def test_files_are_looked_into_at_the_same_time(tmp_path, monkeypatch):
    """All of them wait for each other, which one after the other they would do for ever."""
    monkeypatch.setattr(files_module, "FILES_AT_ONCE", 8)
    together = threading.Barrier(8, timeout=60)
    contents = ParquetFiles._contents
    monkeypatch.setattr(ParquetFiles, "_contents", lambda self, file: (together.wait(), contents(self, file))[1])
    for i in range(8):
        write(tmp_path / f"{i}.parquet", a=[float(i)])
    np.testing.assert_array_equal(matrix(open_source(DataConfig(path=str(tmp_path))))[:, 0], np.arange(8))


def test_thousands_of_files_travel_light(tmp_path):
    for i in range(500):
        write(tmp_path / f"{i:04d}.parquet", **{f"column_{j}": [float(i)] for j in range(20)})
    source = open_source(DataConfig(path=str(tmp_path)))
    assert len(pickle.dumps(source)) < 500 * 400
    np.testing.assert_array_equal(matrix(source, 234, 236)[:, 19], [234, 235])


@FORMATS
def test_integers_in_one_file_and_decimals_in_another(tmp_path, suffix):
    write(tmp_path / f"0{suffix}", a=[1, 2**53 + 1], b=[[1], [2]] if suffix != ".csv" else [1, 2], y=[3, 4])
    write(tmp_path / f"1{suffix}", a=[0.5, None], b=[[0.5], [1.5]] if suffix != ".csv" else [0.5, 1.5], y=[3.0, None])
    source = open_source(DataConfig(path=str(tmp_path)))
    expected = [[1.0, 1.0], [float(2**53 + 1), 2.0], [0.5, 0.5], [np.nan, 1.5]]
    np.testing.assert_array_equal(matrix(source, columns=("a", "b")), expected)
    np.testing.assert_array_equal(matrix(source, 1, 3, columns=("a", "b")), expected[1:3])


@FORMATS
def test_text_in_a_column_of_numbers_names_file_and_column(tmp_path, suffix):
    write(tmp_path / f"0{suffix}", a=[1.0], b=[2.0])
    write(tmp_path / f"1{suffix}", a=[1.0], b=["x"])
    source = open_source(DataConfig(path=str(tmp_path)))
    with pytest.raises(UserError, match=rf"1{suffix}: column 'b' holds string, but double in .*0{suffix}"):
        matrix(source)
    assert matrix(source, columns=("a",)).tolist() == [[1.0], [1.0]]


@FORMATS
def test_columns_in_another_order_and_columns_more(tmp_path, suffix):
    write(tmp_path / f"0{suffix}", a=[1.0], b=[2.0])
    write(tmp_path / f"1{suffix}", more=["x"], b=[4.0], a=[3.0])
    assert matrix(open_source(DataConfig(path=str(tmp_path))), columns=("a", "b")).tolist() == [[1.0, 2.0], [3.0, 4.0]]


@FORMATS
def test_a_column_that_one_file_does_not_have(tmp_path, suffix):
    write(tmp_path / f"0{suffix}", a=[1.0], b=[2.0])
    write(tmp_path / f"1{suffix}", a=[1.0])
    source = open_source(DataConfig(path=str(tmp_path), columns=("a", "b")))
    if suffix == ".jsonl":  # where it is how a missing entry is written
        np.testing.assert_array_equal(matrix(source), [[1.0, 2.0], [1.0, np.nan]])
    else:
        with pytest.raises(UserError, match=rf"1{suffix}: no column 'b', which .*0{suffix} has"):
            matrix(source)


@FORMATS
def test_files_without_rows_may_stand_anywhere(tmp_path, suffix):
    write(tmp_path / f"1{suffix}", a=[1.0], y=["p"])
    write(tmp_path / f"3{suffix}", a=[2.0], y=["q"])
    for i in (0, 2, 4):
        write(tmp_path / f"{i}{suffix}", a=pa.array([], pa.float64()), y=pa.array([], pa.null()))
    for i in (5, 6):
        write(tmp_path / f"{i}{suffix}")
    source = open_source(DataConfig(path=str(tmp_path)))
    assert matrix(source, columns=("a",)).tolist() == [[1.0], [2.0]]
    assert source.read(0, 2, ["y"]).column("y").to_pylist() == ["p", "q"]
    with pytest.raises(UserError, match="the data set is empty"):
        Schema.of(open_source(DataConfig(path=[str(tmp_path / f"{i}{suffix}") for i in (0, 2, 5, 6)])), DataConfig())


@FORMATS
def test_labels_that_are_missing_throughout_one_file(tmp_path, suffix):
    write(tmp_path / f"0{suffix}", a=[1.0, 2.0], y=pa.array([None, None], pa.null()))
    write(tmp_path / f"1{suffix}", a=[3.0], y=["p"])
    source = open_source(DataConfig(path=str(tmp_path)))
    assert source.read(0, 3, ["y"]).column("y").to_pylist() == [None, None, "p"]


def test_text_and_images_of_several_types_are_one_column(tmp_path):
    image = {"bytes": b"123", "path": "a.png"}
    pq.write_table(pa.table({"y": pa.array(["p"]).dictionary_encode(), "i": [image]}), tmp_path / "0.parquet")
    pq.write_table(pa.table({"y": pa.array(["q"], pa.large_string()), "i": [{**image, "path": None}]}), tmp_path / "1.parquet")
    source = open_source(DataConfig(path=str(tmp_path)))
    assert source.read(0, 2, ["y", "i"]).to_pydict() == {"y": ["p", "q"], "i": [image, {**image, "path": None}]}


def test_arrays_of_one_shape_in_several_files(tmp_path):
    np.save(tmp_path / "0.npy", np.ones((2, 3), np.int16))
    np.save(tmp_path / "1.npy", np.asfortranarray(np.arange(6.0).reshape(2, 3)))
    np.save(tmp_path / "2.npy", np.zeros((0, 3)))
    source = open_source(DataConfig(path=str(tmp_path)))
    assert matrix(source, 1, 4).tolist() == [[1, 1, 1], [0, 1, 2], [3, 4, 5]]
    np.save(tmp_path / "3.npy", np.ones((2, 4)))
    with pytest.raises(UserError, match=r"3.npy: rows of shape .4,., but .3,. in .*0.npy"):
        open_source(DataConfig(path=str(tmp_path)))


def test_decimals_are_rounded_once(tmp_path):
    numbers = [f"{number:.9f}" for number in np.random.default_rng(0).uniform(-1e9, 1e9, 2000)]
    pq.write_table(pa.table({"a": pa.array(numbers).cast(pa.decimal128(25, 9))}), tmp_path / "a.parquet")
    np.testing.assert_array_equal(matrix(open_source(DataConfig(path=str(tmp_path))))[:, 0], [float(n) for n in numbers])


def test_dictionaries_of_an_arrow_stream_are_read_in_parts(tmp_path):
    labels = pa.array(list("pqrp") * 10).dictionary_encode()
    with pa.ipc.new_stream(tmp_path / "a.arrow", pa.schema([("a", pa.float64()), ("y", labels.type)])) as writer:
        writer.write_table(pa.table({"a": np.arange(40.0), "y": labels}), max_chunksize=7)
    source = open_source(DataConfig(path=str(tmp_path)))
    assert source.read(20, 23, ["y"]).column("y").to_pylist() == ["p", "q", "r"]


# Text


@pytest.mark.parametrize(
    "text",
    [
        '{"a":1,"b":2}\n{"a":3,"b":4}\n',
        '\ufeff{"b":2,"a":1}\r\n\n{"z":"x","a":3,"b":4}',
        '[{"a":1,"b":2},{"a":3,"b":4}]',
        ' [\n{\n"a":1,\n"z":["]}",{"q":"\\\\\\"{["}],"b":2},\n\n{"a":3,"b":4}\n]\n',
    ],
)
@pytest.mark.parametrize("bytes_per_read", [5, 1 << 22])
@pytest.mark.parametrize("lines_per_mark", [1, 8192])
def test_json_as_people_write_it(tmp_path, monkeypatch, text, bytes_per_read, lines_per_mark):
    monkeypatch.setattr(lines_module, "BYTES_PER_READ", bytes_per_read)
    monkeypatch.setattr(lines_module, "LINES_PER_MARK", lines_per_mark)
    (tmp_path / "a.json").write_bytes(text.encode())
    source = open_source(DataConfig(path=str(tmp_path / "a.json"), columns=("a", "b")))
    np.testing.assert_array_equal(matrix(source, columns=("a", "b")), [[1.0, 2.0], [3.0, 4.0]])
    np.testing.assert_array_equal(matrix(source, 1, 2, columns=("a", "b")), [[3.0, 4.0]])


@pytest.mark.parametrize("missing", ["{}", '{"a":null}', '{"a":NaN}', '{"b":1}'])
def test_entries_that_json_does_not_have(tmp_path, missing):
    (tmp_path / "a.jsonl").write_text('{"a":1}\n' + missing + "\n")
    np.testing.assert_array_equal(matrix(open_source(DataConfig(path=str(tmp_path))), columns=("a",)), [[1.0], [np.nan]])


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".json"])
@pytest.mark.parametrize("first_label", [0, 1, 2, 3, 50_000, 150_000, 299_999])
def test_labels_that_begin_anywhere(tmp_path, suffix, first_label):
    """Few rows have one: the first, the last of a short file, or one far behind the rows that a look at the beginning finds."""
    path, num_rows = tmp_path / f"a{suffix}", 4 if first_label < 4 else 300_000
    labels = [None] * first_label + ["cat"] * (num_rows - first_label)
    if suffix == ".csv":
        path.write_text("x,note,y\n" + "".join(f"{i},{' ' * 30},{label or ''}\n" for i, label in enumerate(labels)))
    else:
        rows = [json.dumps({"x": i, "note": " " * 30} | ({"y": label} if label else {})) for i, label in enumerate(labels)]
        path.write_text("\n".join(rows) if suffix == ".jsonl" else f"[{','.join(rows)}]")
    source = open_source(DataConfig(path=str(path)))
    assert source.read(0, num_rows, ["y"]).column("y").to_pylist() == labels
    assert source.schema.field("y").type == pa.string()


def test_a_label_that_no_look_has_found(tmp_path, monkeypatch):
    monkeypatch.setattr(lines_module, "BYTES_OF_HEAD", 100)
    monkeypatch.setattr(lines_module, "BYTES_OF_SAMPLE", 100)
    missing = [None] * 500
    for suffix, expected in (
        (".csv", "column 'y' holds 'cat', but nothing in"),
        (".jsonl", "'y' holds string, but nothing in"),
    ):
        path = write(tmp_path / f"a{suffix}", a=[0.0] * 1001, y=[*missing, "cat", *missing])
        with pytest.raises(UserError, match=rf"a{suffix}: cannot be read as .*{expected}.*; put such a row first") as caught:
            open_source(DataConfig(path=path)).read(0, 1001, ["y"])
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl"])
def test_ids_and_labels_that_float64_cannot_tell_apart(tmp_path, suffix):
    """Times in nanoseconds, say; small ones in another file, whose integers may be of another width."""
    ids = [1_790_000_000_000_000_000 + 40 * (i // 3) for i in range(30)]
    write(tmp_path / f"0{suffix}", a=np.arange(6.0), id=pa.array([7] * 6, pa.int32()), y=pa.array([None, 1] * 3, pa.int32()))
    write(tmp_path / f"1{suffix}", a=np.arange(30.0), id=ids, y=ids)
    source = open_source(DataConfig(path=str(tmp_path)))
    sequences = as_sequences(source, DataConfig(sequence="id"))
    assert sequences.bounds.tolist() == [0, *range(6, 37, 3)]
    if suffix != ".csv":  # pandas writes integers with missing ones as decimals
        config = DataConfig(label="y", columns=("a",))
        assert Dataset.open(source, config, Schema.of(source, config), LocalBlocks).labels == (1, *sorted(set(ids)))
        assert matrix(source, columns=("y",))[6:, 0].tolist() == [float(id_) for id_ in ids]


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl"])
def test_ids_and_labels_that_are_decimals_and_large_are_refused(tmp_path, suffix):
    path = write(tmp_path / f"a{suffix}", a=[0.0, 1.0, 2.0], id=[1.5, 2.0**53, 2.0**53])
    source, config = open_source(DataConfig(path=path)), DataConfig(label="id", columns=("a",))
    expected = rf"{suffix}: column '(id|t)' holds 9007199254740992 among float64, which cannot tell numbers beyond 2.53 apart"
    with pytest.raises(UserError, match=expected):
        as_sequences(source, DataConfig(sequence="id"))
    times = open_source(DataConfig(path=write(tmp_path / f"b{suffix}", t=[1.5, 2.0**53, 2.0**53], s=[0, 0, 0])))
    with pytest.raises(UserError, match=expected):
        as_sequences(times, DataConfig(sequence="s", order="t"))
    with pytest.raises(UserError, match=expected):
        Dataset.open(source, config, Schema.of(source, config), LocalBlocks)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_a_decimal_that_comes_late_among_large_integers(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(lines_module, "BYTES_OF_HEAD", 100)
    monkeypatch.setattr(lines_module, "BYTES_OF_SAMPLE", 100)
    path = tmp_path / f"a{suffix}"
    rows = [str(2**53 + 1)] * 100 + ["0.5"] + [str(2**53 + 1)] * 100
    path.write_text("a\n" + "\n".join(rows) if suffix == ".csv" else "\n".join(f'{{"a":{row}}}' for row in rows))
    with pytest.raises(UserError, match=rf"a{suffix}: cannot be read as .*column 'a' holds '?0.5'?, but int64 in the rows"):
        matrix(open_source(DataConfig(path=str(path))))


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl"])
def test_true_and_false_in_one_file_and_numbers_in_another(tmp_path, suffix):
    write(tmp_path / f"0{suffix}", x=[True, False])
    write(tmp_path / f"1{suffix}", x=[1.0, 0.5])
    write(tmp_path / f"2{suffix}", x=[False, None])
    source = open_source(DataConfig(path=str(tmp_path)))
    np.testing.assert_array_equal(matrix(source)[:, 0], [1.0, 0.0, 1.0, 0.5, 0.0, np.nan])


@pytest.mark.parametrize("quote", ["", '"'])
def test_what_is_missing_in_csv(tmp_path, quote):
    """A country is called NA, and a person Null."""
    texts = ["NA", "null", "nan", "N/A", "", "DE"]
    lines = [f"{number},{quote}{text}{quote}" for number, text in zip(["1", "NA", "nan", "null", "", "2"], texts, strict=True)]
    (tmp_path / "a.csv").write_text("\n".join(["a,y", *lines]))
    source = open_source(DataConfig(path=str(tmp_path)))
    np.testing.assert_array_equal(matrix(source, columns=("a",))[:, 0], [1.0, np.nan, np.nan, np.nan, np.nan, 2.0])
    assert source.read(0, 6, ["y"]).column("y").to_pylist() == [text or None for text in texts]


# Damage


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.json", "[1, 2]", "cannot be read as JSON .an array that holds something else than objects"),
        ("a.json", "[[1, 2]]", "something else than objects"),
        ("a.json", '["a"]', "something else than objects"),
        ("a.json", '[{"a":1},', "the array does not end; the file is cut short"),
        ("a.json", '[{"a":1},{"a"', "the array does not end; the file is cut short"),
        ("a.json", '[{"a":1}] [', "more than one array"),
        ("a.json", "[]", "the data set is empty"),
        ("a.json", "[" * 1_000_000, "something else than objects"),
        ("a.jsonl", '{"a":' * 1_000_000, "cannot be read as JSON"),
        ("a.json", "3\n4\n", "cannot be read as JSON"),
        ("a.json", '{\n"a": 1\n}\n', "cannot be read as JSON"),
        ("a.jsonl", '{"a":1}\n{"a":2', "cannot be read as JSON"),
        ("a.jsonl", '{"a":1}\n{"a":"x"}\n', "column 'a' holds string, but number in the rows"),
        ("a.jsonl", '{"a":1}{"a":2}\n', "cannot be read as JSON"),
        ("a.jsonl", '{"a":1}\n' * 200_000 + '{"a":"x"}\n', "column 'a' holds string, but number in the rows"),
        ("a.jsonl", '{"a":1,"a":2}\n', "specified twice"),
        ("a.jsonl", b"\xff\xfe{\x00", "cannot be read as JSON"),
        ("a.csv", b"a\n\xff\n", "not numeric|cannot be read as CSV"),
        ("a.csv", "a\n" + "1\n" * 600_000 + "x\n", "cannot be read as CSV .column 'a' holds 'x', but double in"),
        ("a.arrow", "", "cannot be read as Arrow"),
        ("a.arrow", "ARROW1 but no more", "cannot be read as Arrow"),
        ("a.arrow", b"FEA1" + bytes(100), "version 1 of Feather"),
        ("a.arrow", b"\x01" * 1000, "cannot be read as Arrow"),
        ("a.parquet", "", "cannot be read as Parquet"),
        ("a.npy", "", "cannot be read as .npy"),
        ("a.npy", b"\x93NUMPY\x01\x00" + bytes(100), "cannot be read as .npy"),
    ],
)
def test_damaged_files_are_told_in_one_line(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=expected) as caught:
        matrix(open_source(DataConfig(path=str(tmp_path / name))))
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".feather", ".npy"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.95])
def test_files_that_are_cut_short(tmp_path, suffix, share):
    table = pa.table({"x": np.random.default_rng(0).normal(size=5000)})
    path = tmp_path / f"a{suffix}"
    if suffix == ".feather":
        pa.feather.write_feather(table, path)
    elif suffix == ".npy":
        np.save(path, table.column("x").to_numpy())
    else:
        write(path, x=table.column("x").to_numpy())
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(UserError, match=f"a{suffix}: cannot be read as"):
        open_source(DataConfig(path=str(path)))


def test_an_arrow_file_whose_offsets_point_outside_of_it(tmp_path):
    write(tmp_path / "a.arrow", a=np.arange(200.0), y=["p"] * 200)
    offsets = np.arange(201, dtype=np.int32)
    content = (tmp_path / "a.arrow").read_bytes()
    assert offsets.tobytes() in content
    offsets[100] = 1 << 30
    (tmp_path / "a.arrow").write_bytes(content.replace(np.arange(201, dtype=np.int32).tobytes(), offsets.tobytes()))
    source = open_source(DataConfig(path=str(tmp_path)))
    with pytest.raises(UserError, match=r"a.arrow: cannot be read as Arrow"):
        source.read(0, 200, ["y"])


def test_a_label_of_a_type_that_arrow_cannot_compare(tmp_path):
    table = pa.table({"a": [1.0], "y": pa.array([bytes(16)], pa.uuid())})
    with pa.ipc.new_stream(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table)
    source, config = open_source(DataConfig(path=str(tmp_path))), DataConfig(label="y", columns=("a",))
    with pytest.raises(UserError, match=r"column 'y' holds extension<arrow.uuid>; a label is a number or a text"):
        Dataset.open(source, config, Schema.of(source, config), LocalBlocks)


def test_an_arrow_stream_whose_dictionaries_change(tmp_path):
    tables = [pa.table({"y": pa.array(labels).dictionary_encode()}) for labels in (["p"], ["q", "r"])]
    with pa.ipc.new_stream(tmp_path / "a.arrow", tables[0].schema) as writer:
        for table in tables:
            writer.write_table(table)
    with pytest.raises(UserError, match="a stream whose dictionaries change"):
        open_source(DataConfig(path=str(tmp_path)))


# Change


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl", ".arrow", ".npy"])
@pytest.mark.parametrize("how", ["removed", "longer", "shorter"])
def test_a_file_that_is_another_when_it_is_read(tmp_path, suffix, how):
    path, x = tmp_path / f"1{suffix}", np.arange(1000.0)
    for name in (tmp_path / f"0{suffix}", path):
        if suffix == ".npy":
            np.save(name, x)
        else:
            write(name, x=x)
    source = pickle.loads(pickle.dumps(open_source(DataConfig(path=str(tmp_path)))))
    content = path.read_bytes()
    if how == "removed":
        path.unlink()
    else:
        path.write_bytes(content + b"\n1" if how == "longer" else content[:-100])
    source.read(0, 1000, ["x"])
    expected = (
        "no such file; it was there when" if how == "removed" else r"has changed: [\d,]+ bytes when it was opened, [\d,]+ now"
    )
    with pytest.raises(UserError, match=f"1{suffix}: {expected}"):
        source.read(999, 1001, ["x"])
    path.write_bytes(content)
    assert source.read(999, 1001, ["x"]).column("x").to_pylist()[1:] in ([0.0], [[0.0]])


@pytest.mark.parametrize("how", ["removed", "shorter"])
def test_a_run_goes_on_when_the_file_is_back(tmp_path, how):
    """Interrupted, then called while a file is not whole, then with the file restored: the same bytes as an unbroken run."""
    frame = pd.DataFrame(np.random.default_rng(0).normal(size=(300, 2)), columns=["a", "b"])
    for i in range(3):
        frame[100 * i : 100 * (i + 1)].to_csv(tmp_path / f"{i}.csv", index=False)
    spec = {"name": "a", "family": "gmm", "model": {"num_components": 2}, "data": {"path": str(tmp_path / "*.csv")}}
    spec["fit"] = {"max_iterations": 6, "tolerance": 0.0, "checkpoint_every": 1}
    unbroken = gendist.fit(spec, run_dir=tmp_path / "unbroken")

    class Stop(Exception):
        pass

    def stop(record):
        if record["iteration"] == 3:
            raise Stop

    with pytest.raises(Stop):
        gendist.fit(spec, run_dir=tmp_path / "run", watch=stop)
    content = (tmp_path / "1.csv").read_bytes()
    if how == "removed":
        (tmp_path / "1.csv").unlink()
        expected = "the data has changed since this run began"
    else:
        (tmp_path / "1.csv").write_bytes(content[:-1000])
        expected = "the data has changed|cannot be read as CSV"
    with pytest.raises(UserError, match=expected):
        gendist.fit(spec, run_dir=tmp_path / "run")
    (tmp_path / "1.csv").write_bytes(content)
    resumed = gendist.fit(spec, run_dir=tmp_path / "run")
    assert resumed.history[:3] != resumed.history
    for name, tensor in unbroken.model.tensors().items():
        np.testing.assert_array_equal(tensor, resumed.model.tensors()[name])


def test_links_folders_and_devices(tmp_path):
    (tmp_path / "link.parquet").symlink_to(tmp_path / "gone.parquet")
    for path in (tmp_path / "link.parquet", tmp_path):
        with pytest.raises(UserError, match=r"link.parquet: a link to .*gone.parquet, which does not exist"):
            open_source(DataConfig(path=str(path)))
    write(tmp_path / "gone.parquet", a=[1.0])
    assert matrix(open_source(DataConfig(path=str(tmp_path / "link.parquet")))).tolist() == [[1.0]]
    with pytest.raises(UserError, match=r"/dev/zero: cannot be read as CSV .neither a file nor a folder"):
        open_source(DataConfig(source="csv", path="/dev/zero"))
    os.mkfifo(tmp_path / "pipe.csv")
    with pytest.raises(UserError, match=r"pipe.csv: cannot be read as CSV .neither a file nor a folder"):
        open_source(DataConfig(path=str(tmp_path / "*.csv")))
    (tmp_path / "inside").mkdir()
    with pytest.raises(UserError, match="no file matches"):
        open_source(DataConfig(path=str(tmp_path / "in*")))
    with pytest.raises(UserError, match=r"no .json, .jsonl, .ndjson file in this folder"):
        open_source(DataConfig(source="json", path=str(tmp_path)))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read(tmp_path):
    write(tmp_path / "a.parquet", a=[1.0])
    (tmp_path / "a.parquet").chmod(0)
    with pytest.raises(UserError, match=r"a.parquet: cannot be read .permission denied"):
        open_source(DataConfig(path=str(tmp_path)))
    tmp_path.chmod(0)
    try:
        with pytest.raises(UserError, match="the folder cannot be read"):
            open_source(DataConfig(path=str(tmp_path)))
    finally:
        tmp_path.chmod(0o700)
