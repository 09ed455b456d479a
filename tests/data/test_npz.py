"""Archives of arrays (.npz): any run of rows, of arrays that lie there as they are and of packed ones."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

import gendist
from gendist.data import DataConfig, Schema, npz, open_source, source_of
from gendist.data.matrix import to_matrix
from gendist.data.sequences import as_sequences
from gendist.protocols import UserError

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (300, 4, 5), dtype=np.uint8)
LABELS = RNG.integers(0, 3, 300)
PIECES = [(0, 300), (0, 1), (299, 300), (17, 180)]


@pytest.fixture(params=[np.savez, np.savez_compressed], ids=["stored", "packed"])
def save(request):
    return request.param


def read(path, start, stop, **config):
    source = open_source(DataConfig(path=str(path), **config))
    schema = Schema.of(source, DataConfig(**config))
    return schema, to_matrix(source.read(start, stop, schema.columns), schema.columns, start, source.name)


def test_images_and_labels(tmp_path, save):
    save(tmp_path / "digits.npz", label=LABELS, x=IMAGES, seed=7)
    for start, stop in PIECES:
        for config in ({"label": "label"}, {}):
            schema, matrix = read(tmp_path / "digits.npz", start, stop, **config)
            assert schema.columns == ("x",)
            assert schema.image_shape == (4, 5)
            np.testing.assert_array_equal(matrix, IMAGES.reshape(300, -1)[start:stop] / 255.0)
    source = open_source(DataConfig(path=str(tmp_path / "digits.npz")))
    assert source.schema.names == ["label", "x"]
    assert source.read(5, 25, ["label"]).column("label").to_pylist() == LABELS[5:25].tolist()


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.int16, ">f8"])
def test_matrices_of_any_numbers(tmp_path, save, dtype):
    x = (RNG.normal(size=(300, 3)) * 50).astype(dtype)
    save(tmp_path / "a.npz", x=np.asfortranarray(x), y=np.array(["p", "qq"] * 150), z=np.array([b"p", b"qq"] * 150))
    for start, stop in PIECES:
        schema, matrix = read(tmp_path / "a.npz", start, stop, label="y")
        assert (schema.columns, schema.image_shape) == (("x",), None)
        np.testing.assert_array_equal(matrix, x[start:stop].astype(np.float64))
    texts = open_source(DataConfig(path=str(tmp_path / "a.npz"))).read(1, 3, ["y", "z"])
    assert texts.to_pydict() == {"y": ["qq", "p"], "z": ["qq", "p"]}


def test_columns_of_one_axis_are_fitted_together(tmp_path, save):
    a, b = RNG.normal(size=300), RNG.integers(0, 9, 300)
    save(tmp_path / "a.npz", a=a, b=b)
    np.testing.assert_array_equal(read(tmp_path / "a.npz", 3, 7)[1], np.stack([a, b], axis=1)[3:7])


def test_parts_of_different_lengths_are_told_by_what_is_named(tmp_path, save):
    save(tmp_path / "mnist.npz", x_train=IMAGES, y_train=LABELS, x_test=IMAGES[:10], y_test=LABELS[:10])
    for config in ({"columns": ("x_test",)}, {"label": "y_test"}, {"columns": ("x_test",), "label": "y_test"}):
        schema, matrix = read(tmp_path / "mnist.npz", 0, 10, **config)
        assert schema.columns == ("x_test",)
        np.testing.assert_array_equal(matrix, IMAGES[:10].reshape(10, -1) / 255.0)
    for config in ({}, {"columns": ("x_test",), "label": "y_train"}):
        with pytest.raises(UserError, match=r"arrays of different lengths: .*; choose those of one with data.columns and"):
            open_source(DataConfig(path=str(tmp_path / "mnist.npz"), **config))


def test_several_files(tmp_path, save):
    save(tmp_path / "0.npz", x=IMAGES[:100], label=LABELS[:100])
    save(tmp_path / "1.npz", label=LABELS[100:].astype(np.int16), x=IMAGES[100:])
    schema, matrix = read(tmp_path, 50, 250, label="label")
    assert schema.image_shape == (4, 5)
    np.testing.assert_array_equal(matrix, IMAGES[50:250].reshape(200, -1) / 255.0)
    save(tmp_path / "2.npz", x=IMAGES[:, :3], label=LABELS)
    with pytest.raises(UserError, match=r"2.npz: 'x' has rows of shape \(3, 5\), but \(4, 5\) in .*0.npz; choose files of one"):
        open_source(DataConfig(path=str(tmp_path)))


def test_sequences(tmp_path, save):
    save(tmp_path / "a.npz", x=RNG.normal(size=(30, 7, 2)), y=LABELS[:30])
    sequences = as_sequences(open_source(config := DataConfig(path=str(tmp_path / "a.npz"), label="y")), config)
    assert (sequences.num_sequences, sequences.num_rows) == (30, 210)
    assert Schema.of(sequences, config).num_features == 2


def test_packed_arrays_are_unpacked_once(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "a.npz", x=IMAGES, label=LABELS)
    unpacked = []
    read_array = np.lib.format.read_array
    monkeypatch.setattr(np.lib.format, "read_array", lambda *args, **how: unpacked.append(1) or read_array(*args, **how))
    monkeypatch.setattr(npz, "_held", {})
    for _ in range(2):
        source = open_source(DataConfig(path=str(tmp_path / "a.npz")))
        for start, stop in PIECES:
            source.read(start, stop, ["x", "label"])
    assert len(unpacked) == 2


def test_what_sample_writes_is_read(tmp_path):
    spec = {"name": "a", "family": "gmm", "model": {"num_components": 1}, "data": {}, "fit": {"max_iterations": 1}}
    gendist.fit(spec, data=RNG.normal(size=(50, 3)), run_dir=tmp_path / "run")
    from gendist import bulk

    bulk.sample(tmp_path / "run", 20, tmp_path / "new.npz")
    np.testing.assert_array_equal(read(tmp_path / "new.npz", 0, 20)[1], np.load(tmp_path / "new.npz")["x"])
    bulk.score(tmp_path / "run", DataConfig(path=str(tmp_path / "new.npz")), tmp_path / "scores.npy")
    assert np.load(tmp_path / "scores.npy").shape == (20,)


@pytest.mark.parametrize(
    ("arrays", "expected"),
    [
        ({"x": np.array([[1.0], [1.0, 2.0]], dtype=object)}, "'x' is an array of pickled objects; numbers are needed"),
        ({"x": np.zeros((3, 2)), "y": np.array([1, "a", None], dtype=object)}, "'y' is an array of pickled objects"),
        ({"x": np.zeros((3, 2), complex)}, "'x' is an array of complex128; numbers are needed, or, of one axis, texts"),
        ({"x": np.array([["a"]])}, "'x' is an array of <U1"),
        ({"x": 1.0}, "no array of rows is in it"),
        ({"x": np.zeros((0, 3))}, "the data set is empty"),
        ({"x": np.zeros((3, 0))}, r"'x' has shape \(0, 0\)"),
    ],
)
def test_what_is_not_read_is_told_in_one_line(tmp_path, save, arrays, expected):
    save(tmp_path / "a.npz", **arrays)
    with pytest.raises(UserError, match=expected) as caught:
        Schema.of(open_source(DataConfig(path=str(tmp_path / "a.npz"))), DataConfig())
    assert "\n" not in str(caught.value)


def test_pickled_arrays_that_nobody_names_are_passed_over(tmp_path, save):
    save(tmp_path / "a.npz", x=np.zeros((3, 2)), y=np.array([1, "a", None], dtype=object))
    assert open_source(DataConfig(path=str(tmp_path / "a.npz"), columns=("x",))).schema.names == ["x"]


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04"])
def test_a_damaged_file_is_told_in_one_line(tmp_path, content):
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.npz: cannot be read as \.npz"):
        open_source(DataConfig(path=str(tmp_path / "a.npz")))


def test_a_frame_of_images_keeps_their_shape():
    frame = pd.DataFrame({"label": LABELS, "image": list(IMAGES), "text": ["a"] * 300})
    source = source_of(frame)
    assert source.schema.names == ["label", "image", "text"]
    schema = Schema.of(source, config := DataConfig(label="label", columns=("image",)))
    assert (schema.columns, schema.image_shape) == (config.columns, (4, 5))
    np.testing.assert_array_equal(
        to_matrix(source.read(7, 9, ["image"]), ["image"], 7, source.name), IMAGES.reshape(300, -1)[7:9] / 255.0
    )
    assert Schema.of(source_of(frame[["image"]]), DataConfig()).image_shape == (4, 5)
    frame.at[3, "image"] = IMAGES[3, :2]
    with pytest.raises(UserError, match=r"the data frame cannot be read .*same shape"):
        source_of(frame)


def test_a_mapping_of_images_keeps_their_shape():
    schema = Schema.of(source_of({"image": IMAGES, "label": LABELS}), DataConfig(label="label"))
    assert schema.image_shape == (4, 5)
    assert Schema.of(source_of({"x": IMAGES.reshape(300, -1)}), DataConfig()).image_shape is None
    assert Schema.of(source_of({"a": IMAGES, "b": LABELS}), DataConfig()).image_shape is None
    spec = {
        "name": "a",
        "family": "vae",
        "model": {"latent_dim": 2, "encoder": {"hidden_sizes": [4]}, "decoder": {"hidden_sizes": [4]}},
        "data": {"columns": ["image"]},
        "fit": {"num_steps": 1, "global_batch_size": 8},
    }
    model = gendist.fit(spec, data={"image": IMAGES, "label": LABELS}).model
    assert model.encode(IMAGES / 255.0).shape == (300, 2)
