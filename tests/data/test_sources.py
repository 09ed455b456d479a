"""Any run of rows of any source, against the whole table read by pyarrow or pandas."""

from __future__ import annotations

import io
import itertools

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from gendist.data import DataConfig, Schema, open_source, source_of
from gendist.data import lines as lines_module
from gendist.data.matrix import to_matrix
from gendist.data.sequences import as_sequences
from gendist.protocols import UserError

RNG = np.random.default_rng(0)
FRAME = pd.DataFrame({"a": RNG.normal(size=500), "b": RNG.integers(-5, 5, 500), "c": RNG.normal(size=500) * 1e6})
PIECES = [(0, 1), (0, 500), (499, 500), (120, 121), (7, 300), (250, 500), (128, 256)]


def matrix(source, start=0, stop=None, columns=None):
    schema = Schema.of(source, DataConfig(columns=columns))
    stop = source.num_rows if stop is None else stop
    return to_matrix(source.read(start, stop, schema.columns), schema.columns, start, source.name)


def check_pieces(source, expected: np.ndarray) -> None:
    assert source.num_rows == len(expected)
    for start, stop in PIECES:
        np.testing.assert_array_equal(matrix(source, start, stop), expected[start:stop])


def write_parquet(path, frame=FRAME, row_group_size=64) -> str:
    pq.write_table(pa.Table.from_pandas(frame, preserve_index=False), path, row_group_size=row_group_size)
    return str(path)


@pytest.mark.parametrize("row_group_size", [1, 7, 64, 10_000])
def test_parquet(tmp_path, row_group_size):
    path = write_parquet(tmp_path / "a.parquet", row_group_size=row_group_size)
    check_pieces(open_source(DataConfig(path=path)), FRAME.to_numpy())


def test_parquet_in_several_files_some_of_them_empty(tmp_path):
    cuts = [0, 100, 100, 101, 400, 500]
    for i, (start, stop) in enumerate(itertools.pairwise(cuts)):
        write_parquet(tmp_path / f"{i}.parquet", FRAME.iloc[start:stop])
    check_pieces(open_source(DataConfig(path=str(tmp_path))), FRAME.to_numpy())
    check_pieces(open_source(DataConfig(path=str(tmp_path / "*.parquet"))), FRAME.to_numpy())
    in_order = tuple(str(tmp_path / f"{i}.parquet") for i in range(5))
    check_pieces(open_source(DataConfig(path=in_order)), FRAME.to_numpy())


@pytest.mark.parametrize("lines_per_mark", [1, 3, 64, 8192])
@pytest.mark.parametrize("bytes_per_read", [64, 1 << 22])
def test_csv_is_found_by_its_marks(tmp_path, monkeypatch, lines_per_mark, bytes_per_read):
    monkeypatch.setattr(lines_module, "LINES_PER_MARK", lines_per_mark)
    monkeypatch.setattr(lines_module, "BYTES_PER_READ", bytes_per_read)
    FRAME.to_csv(tmp_path / "a.csv", index=False)
    check_pieces(open_source(DataConfig(path=str(tmp_path / "a.csv"))), FRAME.to_numpy())


@pytest.mark.parametrize(
    "text",
    [
        "a,b\n1,2\n3,4\n",
        "a,b\n1,2\n3,4",
        "a,b\r\n1,2\r\n3,4\r\n",
        "\n\na,b\n\n1,2\n\n\n3,4\n\n",
        "\ufeffa,b\n1,2\n3,4\n",
        '"a","b"\n"1","2"\n3,4\n',
    ],
)
def test_csv_as_people_write_it(tmp_path, text):
    (tmp_path / "a.csv").write_bytes(text.encode())
    source = open_source(DataConfig(path=str(tmp_path / "a.csv")))
    assert source.num_rows == 2
    np.testing.assert_array_equal(matrix(source), [[1.0, 2.0], [3.0, 4.0]])
    np.testing.assert_array_equal(matrix(source, 1, 2), [[3.0, 4.0]])


def test_a_decimal_may_come_late_in_a_csv_file(tmp_path):
    (tmp_path / "a.csv").write_text("a\n" + "1\n" * 300_000 + "0.5\n")
    source = open_source(DataConfig(path=str(tmp_path / "a.csv")))
    np.testing.assert_array_equal(matrix(source, 299_999, 300_001), [[1.0], [0.5]])


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.int16, np.uint8, np.bool_])
def test_npy_of_any_numbers(tmp_path, dtype):
    array = (RNG.normal(size=(500, 3)) * 50).astype(dtype)
    np.save(tmp_path / "a.npy", array)
    check_pieces(open_source(DataConfig(path=str(tmp_path / "a.npy"))), array.astype(np.float64))


def test_images_in_an_array_of_bytes_are_scaled(tmp_path):
    images = RNG.integers(0, 256, (20, 5, 4), dtype=np.uint8)
    np.save(tmp_path / "a.npy", images)
    for source in (open_source(DataConfig(path=str(tmp_path / "a.npy"))), source_of(images)):
        assert Schema.of(source, DataConfig()).image_shape == (5, 4)
        np.testing.assert_allclose(matrix(source), images.reshape(20, 20) / 255.0)


def png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 3)])
def test_image_columns_in_the_hubs_layout_are_decoded(tmp_path, shape):
    images = RNG.integers(0, 256, (9, *shape), dtype=np.uint8)
    column = pa.array([{"bytes": png(image), "path": None} for image in images])
    pq.write_table(pa.table({"image": column, "label": list(range(9))}), tmp_path / "a.parquet")
    source = open_source(DataConfig(path=str(tmp_path / "a.parquet")))
    schema = Schema.of(source, DataConfig())
    assert schema.columns == ("image",)
    assert schema.image_shape == shape
    np.testing.assert_allclose(matrix(source), images.reshape(9, -1) / 255.0)


def test_what_python_hands_over():
    values = FRAME.to_numpy()
    by_name = {name: FRAME[name].to_numpy() for name in FRAME}
    nested = datasets.Dataset.from_dict({"x": values.tolist()})
    handed = (values, FRAME, by_name, {"x": values}, pa.Table.from_pandas(FRAME), datasets.Dataset.from_pandas(FRAME), nested)
    for data in handed:
        check_pieces(source_of(data), values)
    shuffled = datasets.Dataset.from_pandas(FRAME).select(range(499, -1, -1))
    check_pieces(source_of(shuffled), values[::-1])
    with pytest.raises(UserError, match="a str; give an array"):
        source_of("data.parquet")


def test_a_data_frame_of_another_library_is_told_in_one_line():
    frame = type("DataFrame", (), {"__module__": "polars.dataframe.frame", "columns": ["a"], "dtypes": ["f8"]})()
    with pytest.raises(UserError, match=r"data: a DataFrame of polars, which is none of pandas; give its Arrow table"):
        source_of(frame)


def test_arrays_of_every_layout_are_the_same_numbers(tmp_path):
    values = RNG.integers(0, 100, (500, 3))
    layouts = [values.astype(kind) for kind in (">f8", ">i4", "<i2", np.longdouble, np.uint64)]
    layouts += [values[::-1][::-1], np.asfortranarray(values), torch.from_numpy(values), torch.tensor(values).bfloat16()]
    layouts += [torch.tensor(values, dtype=torch.float32, requires_grad=True)]
    for layout in layouts:
        check_pieces(source_of(layout), values)
    np.save(tmp_path / "a.npy", values.astype(">f8"))
    check_pieces(open_source(DataConfig(path=str(tmp_path / "a.npy"))), values)


def test_file_names_and_order_of_columns(tmp_path):
    (tmp_path / "odd[1].CSV").write_text("a,b\n1,2\n")
    assert open_source(DataConfig(path=str(tmp_path / "odd[1].CSV"))).num_rows == 1
    (tmp_path / "other.csv").write_text("b,extra,a\n4,x,3\n")
    source = open_source(DataConfig(path=str(tmp_path)))  # a folder, in the order of the names
    np.testing.assert_array_equal(matrix(source, columns=("a", "b")), [[1.0, 2.0], [3.0, 4.0]])


def test_arrays_of_two_axes_in_a_datasets_column():
    images = RNG.normal(size=(8, 3, 4))
    features = datasets.Features({"image": datasets.Array2D((3, 4), "float64")})
    source = source_of(datasets.Dataset.from_dict({"image": list(images)}, features=features))
    np.testing.assert_array_equal(matrix(source), images.reshape(8, 12))


def test_pictures_of_sixteen_bits_are_scaled(tmp_path):
    image = np.array([[0, 300], [30_000, 65_535]], dtype=np.uint16)
    pq.write_table(pa.table({"image": [png(image)]}), tmp_path / "a.parquet")
    source = open_source(DataConfig(path=str(tmp_path / "a.parquet")))
    np.testing.assert_allclose(matrix(source), image.reshape(1, 4) / 65_535)


def test_images_that_are_too_large_or_of_decimals_are_refused(tmp_path, monkeypatch):
    decimals = io.BytesIO()
    Image.fromarray(np.array([[0.0, 100.5]], np.float32)).save(decimals, format="TIFF")
    large = png(np.zeros((30, 40), np.uint8))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    for content, expected in ((decimals.getvalue(), "an image of decimals"), (large, "too large an image .*1200 pixels")):
        pq.write_table(pa.table({"image": [content]}), tmp_path / "a.parquet")
        with pytest.raises(UserError, match=f"^{tmp_path}/a.parquet: column 'image' in row 0 is {expected}") as caught:
            matrix(open_source(DataConfig(path=str(tmp_path / "a.parquet"))))
        assert "\n" not in str(caught.value)


def test_a_column_alone_is_known_by_its_name(tmp_path):
    """What a model was fitted to: other numbers are no scores of it. Arrays and lists have no name of their own."""
    ages, incomes = pa.table({"age": [1.0, 2.0]}), pa.table({"income": [3.0]})
    known = Schema.of(source_of(ages), DataConfig())
    for kind in ("csv", "parquet"):
        path = str(tmp_path / f"a.{kind}")
        incomes.to_pandas().to_csv(path, index=False) if kind == "csv" else pq.write_table(incomes, path)
        with pytest.raises(UserError, match=r"no column 'age', to which the model was fitted, but 'income'; rename it, or say"):
            Schema.of(open_source(DataConfig(path=path)), DataConfig(), known=known)
        assert Schema.of(open_source(DataConfig(path=path)), DataConfig(columns=("income",)), known=known).columns == (
            "income",
        )
    np.save(tmp_path / "a.npy", np.array([3.0]))
    without_name = [
        open_source(DataConfig(path=str(tmp_path / "a.npy"))),
        source_of(np.array([[3.0]])),
        source_of({"v": [[3.0]]}),
    ]
    for source in without_name:
        assert Schema.of(source, DataConfig(), known=known).columns == tuple(source.schema.names)
    of_array = Schema.of(without_name[1], DataConfig())
    assert Schema.of(source_of(incomes), DataConfig(), known=of_array).columns == ("income",)
    with pytest.raises(UserError, match="no column 'age'"):
        Schema.of(
            as_sequences(source_of(incomes), DataConfig()),
            DataConfig(),
            known=Schema.of(as_sequences(source_of(ages), DataConfig()), DataConfig()),
        )


def test_the_embedded_digits():
    source = open_source(DataConfig(source="digits"))
    values = matrix(source)
    assert values.shape == (1797, 64)
    assert (values.min(), values.max()) == (0.0, 1.0)
    assert Schema.of(source, DataConfig(label="label")).image_shape == (8, 8)


# What is wrong with the data is told in one line


def case(name: str, expected: str, **config):
    return pytest.param(name, config, expected, id=name)


@pytest.mark.parametrize(
    ("name", "config", "expected"),
    [
        case("missing.parquet", "no such file"),
        case("nothing/*.parquet", "no file matches"),
        case("notes.txt", "the suffix does not say"),
        case("cut.parquet", "cannot be read as Parquet"),
        case("text.parquet", "cannot be read as Parquet"),
        case("empty.csv", "the data set is empty"),
        case("header.csv", "the data set is empty"),
        case("empty.parquet", "the data set is empty"),
        case("words.csv", "column 'b' is not numeric .string.; choose columns that are, such as data.columns=.a."),
        case("words.csv", "column 'b' is not numeric", columns=("b",)),
        case("late.csv", "cannot be read as CSV"),
        case("ragged.csv", "cannot be read as CSV"),
        case("quoted.csv", "quoted line breaks", columns=("a",)),
        case("good.csv", "no column 'amout'; did you mean 'amount'", columns=("amout",)),
        case("good.csv", "no column 'zzz'; there are 'amount', 'count'", label="zzz"),
        case("infinite.csv", "column 'a' is infinite in row 2"),
        case("lists.parquet", "lists of different lengths"),
        case("images.parquet", "images of mixed sizes"),
        case("noimage.parquet", "not an image"),
        case("twice.csv", "columns with the same name: 'a'"),
        case("good.csv", "data.columns with the same name: 'count'", columns=("count", "count")),
        case("hollow.parquet", "holds empty lists"),
        case("several.npy", "cannot be read as .npy"),
        case("objects.npy", "cannot be read as .npy"),
        case("cut.npy", "cannot be read as .npy"),
        case("folder", "2.parquet: no column .c., which .*1.parquet has"),
    ],
)
def test_bad_data_is_told_in_one_line(tmp_path, name, config, expected):
    write_parquet(tmp_path / "whole.parquet")
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "whole.parquet").read_bytes()[:-50])
    (tmp_path / "text.parquet").write_text("not parquet")
    (tmp_path / "notes.txt").write_text("1 2 3")
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "header.csv").write_text("a,b\n")
    (tmp_path / "words.csv").write_text("a,b\n1,x\n2,y\n")
    (tmp_path / "late.csv").write_text("a\n" + "1\n" * 600_000 + "x\n")
    (tmp_path / "ragged.csv").write_text("a,b\n1,2\n3\n")
    (tmp_path / "quoted.csv").write_text('a,b\n1,"x\ny"\n2,z\n')
    (tmp_path / "good.csv").write_text("amount,count\n1,2\n")
    (tmp_path / "infinite.csv").write_text("a\n1\n2\ninf\n")
    write_parquet(tmp_path / "empty.parquet", FRAME.iloc[:0])
    pq.write_table(pa.table({"x": [[1.0, 2.0], [3.0]]}), tmp_path / "lists.parquet")
    sizes = [png(np.zeros((4, 4), np.uint8)), png(np.zeros((4, 5), np.uint8))]
    pq.write_table(pa.table({"image": sizes}), tmp_path / "images.parquet")
    pq.write_table(pa.table({"image": [b"123"]}), tmp_path / "noimage.parquet")
    np.save(tmp_path / "objects.npy", np.array([{}, {}], dtype=object), allow_pickle=True)
    np.save(tmp_path / "whole.npy", np.zeros((100, 3)))
    (tmp_path / "cut.npy").write_bytes((tmp_path / "whole.npy").read_bytes()[:900])
    (tmp_path / "twice.csv").write_text("a,a\n1,2\n")
    pq.write_table(pa.table({"x": pa.array([[], []], pa.list_(pa.float64()))}), tmp_path / "hollow.parquet")
    with (tmp_path / "several.npy").open("wb") as file:
        np.savez(file, a=np.zeros(3), b=np.zeros(3))
    (tmp_path / "folder").mkdir()
    write_parquet(tmp_path / "folder" / "1.parquet")
    write_parquet(tmp_path / "folder" / "2.parquet", FRAME[["a", "b"]])

    def read() -> None:
        source = open_source(DataConfig(path=str(tmp_path / name)))
        schema = Schema.of(source, DataConfig(**config))
        to_matrix(source.read(0, source.num_rows, source.schema.names), schema.columns, 0, source.name)

    with pytest.raises(UserError, match=expected) as caught:
        read()
    assert "\n" not in str(caught.value)


# How CSV files separate columns


@pytest.mark.parametrize(
    ("name", "text", "delimiter"),
    [
        ("a.csv", "a;b\n1;x\n2;y,z\n", ";"),
        ("a.csv", "a\tb\n1\tx\n2\ty,z\n", "\t"),
        ("a.csv", 'a,b\n1,x\n2,"y,z"\n', ","),
        ("a.tsv", "a\tb\n1\tx\n2\ty,z\n", None),
        ("a.tsv", "a|b\n1|x\n2|y,z\n", "|"),
    ],
)
def test_csv_of_other_delimiters(tmp_path, monkeypatch, name, text, delimiter):
    monkeypatch.setattr(lines_module, "LINES_PER_MARK", 1)
    (tmp_path / name).write_text(text)
    source = open_source(DataConfig(path=str(tmp_path), delimiter=delimiter))
    assert source.read(0, 2, ["a", "b"]).to_pydict() == {"a": [1.0, 2.0], "b": ["x", "y,z"]}
    assert source.read(1, 2, ["b"]).to_pydict() == {"b": ["y,z"]}


@pytest.mark.parametrize(("text", "said"), [("a;b\n1,5;2\n", '";"'), ("a\tb\n1\t2\n", '"\\t"'), ("a|b\n1|2\n", '"|"')])
def test_a_delimiter_that_is_another_is_told(tmp_path, text, said):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(UserError, match=r"a.csv: cannot be read as CSV \(one column, '.*' separates columns, say ") as caught:
        open_source(DataConfig(path=str(tmp_path / "a.csv")))
    assert f"data.delimiter={said}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_name_may_hold_a_delimiter(tmp_path):
    (tmp_path / "a.csv").write_text('"a;b"\n1\n')
    assert open_source(DataConfig(path=str(tmp_path / "a.csv"), delimiter=",")).schema.names == ["a;b"]


def test_what_a_delimiter_may_be(tmp_path):
    write_parquet(tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"data\.delimiter: of CSV files alone"):
        open_source(DataConfig(path=str(tmp_path / "a.parquet"), delimiter=";"))
    with pytest.raises(UserError, match=r"data\.delimiter: of CSV files alone"):
        open_source(DataConfig(source="digits", delimiter=";"))
    for given in ("", ";;", '"', "\n", "ä", 3):
        with pytest.raises(ValueError, match="one character is needed"):
            DataConfig(delimiter=given)
    (tmp_path / "a.parquet").unlink()
    for name in ("a.csv", "b.tsv"):
        (tmp_path / name).write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match=r"files of .csv and .tsv together; say data.delimiter"):
        open_source(DataConfig(path=str(tmp_path)))
    assert open_source(DataConfig(path=str(tmp_path), delimiter=",")).num_rows == 2


# Hints


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        (
            ["1", "?", "3", "4.5", "6"],
            "not numeric (string: numbers but for '?'; what is missing is left empty); choose columns",
        ),
        (["1,5", "2", "3,25"], "not numeric (string: numbers with a comma, such as 1,5; decimals begin with a point); choose"),
        (["x", "y", "z", "1", "w"], "not numeric (string); choose columns"),
    ],
)
def test_a_column_that_is_almost_of_numbers(tmp_path, entries, expected):
    (tmp_path / "a.csv").write_text("a;b\n" + "".join(f"{entry};1\n" for entry in entries))
    source = open_source(DataConfig(path=str(tmp_path / "a.csv"), delimiter=";"))
    with pytest.raises(UserError) as caught:
        Schema.of(source, DataConfig())
    assert f"column 'a' is {expected}" in str(caught.value)


def test_a_missing_entry_that_comes_late_is_told(tmp_path):
    (tmp_path / "a.csv").write_text("a\n" + "1\n" * 600_000 + "?\n" + "1\n" * 600_000)
    with pytest.raises(UserError, match=r"column 'a' holds '\?', but double .* and nothing where an entry is missing"):
        matrix(open_source(DataConfig(path=str(tmp_path / "a.csv"))))


@pytest.mark.parametrize("y", [np.zeros(30), np.zeros((30, 1)), pd.Series(np.zeros(30)), torch.zeros(30)])
def test_rows_and_labels_as_a_pair_are_told_how_to_be_given(y):
    for x in (RNG.normal(size=(30, 4)), RNG.normal(size=(30, 5, 4)), pd.DataFrame(RNG.normal(size=(30, 2)))):
        with pytest.raises(UserError, match=r"a pair of rows and labels; call them by names, data={'x': x, 'label': y}"):
            source_of((x, y))
    assert source_of((np.zeros(30), np.zeros(30))).num_rows == 2
    assert source_of((np.zeros((30, 2)), np.zeros((20, 2)))).num_rows == 2
