"""Pictures that lie in files of their own: the same rows as those that lie in a table, in whatever container."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import gendist
from gendist.blocks import LocalBlocks
from gendist.data import DataConfig, Dataset, Schema, open_source, source_of
from gendist.data.picture_files import with_files
from gendist.protocols import UserError

NUM_PICTURES, HEIGHT, WIDTH = 40, 4, 5
PIXELS = np.random.default_rng(0).integers(0, 256, (NUM_PICTURES, HEIGHT, WIDTH), dtype=np.uint8)
LABELS = ["cat"] * 15 + ["dog"] * 25


pytestmark = pytest.mark.usefixtures("cache_of_datasets")


@pytest.fixture
def folder(tmp_path) -> Path:
    """A sub-folder for each class."""
    for i, (pixels, label) in enumerate(zip(PIXELS, LABELS, strict=True)):
        (tmp_path / "imgs" / label).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "imgs" / label / f"{i:03d}.png")
    return tmp_path / "imgs"


def rows_of(source, **config) -> np.ndarray:
    data_config = DataConfig(**config)
    dataset = Dataset.open(source, data_config, Schema.of(source, data_config), LocalBlocks)
    leaves = dataset.blocks(num_latents=len(dataset.labels)).map_runs(lambda _, leaves: list(leaves), None)
    blocks = [block for run in leaves for block in run]
    parts = [block.x.numpy() for block in blocks]
    if config.get("label"):
        parts = [np.concatenate([block.x.numpy(), block.evidence.numpy().argmax(1)[:, None]], axis=1) for block in blocks]
    return np.concatenate(parts)


def fingerprint(run_dir: Path, data=None, num_workers: int = 0, **config) -> str:
    model = {"num_components": 2, "covariance_type": "diag", "covariance_regularization": 1e-3}
    spec = {"name": "a", "family": "gmm", "model": model, "data": config, "fit": {"max_iterations": 1}}
    gendist.fit({**spec, "cluster": {"num_workers": num_workers}}, data=data, run_dir=run_dir)
    return json.loads((run_dir / "manifest.json").read_text())["data"]["fingerprint"]


def test_a_folder_of_classes_is_a_table(folder):
    source = open_source(DataConfig(path=str(folder)))
    assert source.schema.names == ["image", "label"]
    assert source.read(10, 20, ["label"]).column("label").to_pylist() == LABELS[10:20]
    assert Schema.of(source, DataConfig()).image_shape == (HEIGHT, WIDTH)
    expected = np.concatenate([PIXELS.reshape(NUM_PICTURES, -1) / 255.0, [[label == "dog"] for label in LABELS]], axis=1)
    np.testing.assert_array_equal(rows_of(source, label="label"), expected)
    assert len(pickle.dumps(source)) < 10_000


def test_pictures_of_one_folder_have_no_label(folder):
    for path in (str(folder / "cat"), str(folder / "cat" / "*.png"), tuple(map(str, sorted((folder / "cat").iterdir())))):
        source = open_source(DataConfig(path=path))
        assert (source.schema.names, source.num_rows) == (["image"], 15)
    assert open_source(DataConfig(path=str(folder / "*" / "*.png"))).schema.names == ["image", "label"]


def test_what_lies_beside_the_classes_has_no_label(folder):
    os.rename(folder / "dog" / "039.png", folder / "039.png")
    (folder / ".hidden.png").write_bytes(b"")
    labels = open_source(DataConfig(path=str(folder))).read(0, NUM_PICTURES, ["label"]).column("label").to_pylist()
    assert labels == [None, *LABELS[:-1]]


def test_a_table_in_the_folder_is_what_is_meant(folder):
    pq.write_table(pa.table({"x": [1.0, 2.0]}), folder / "x.parquet")
    assert open_source(DataConfig(path=str(folder))).schema.names == ["x"]
    assert open_source(DataConfig(path=str(folder), source="pictures")).num_rows == NUM_PICTURES


def test_pictures_of_a_remote_file_system(folder):
    system = fsspec.filesystem("memory")
    try:
        system.put(str(folder), "/gendist-pictures", recursive=True)
        for path in ("memory://gendist-pictures", "memory://gendist-pictures/*/*.png"):
            there, here = open_source(DataConfig(path=path)), open_source(DataConfig(path=str(folder)))
            np.testing.assert_array_equal(rows_of(there, label="label"), rows_of(here, label="label"))
    finally:
        system.rm("/gendist-pictures", recursive=True)


def test_the_same_pictures_are_the_same_model_in_whatever_container(folder, tmp_path):
    loaded = datasets.load_dataset(str(folder), split="train")
    loaded.to_parquet(tmp_path / "paths.parquet")
    assert pq.read_table(tmp_path / "paths.parquet").column("image")[0].as_py()["bytes"] is None
    inside = [{"bytes": Path(path).read_bytes(), "path": None} for path in open_source(DataConfig(path=str(folder))).paths]
    pq.write_table(pa.table({"image": inside}), tmp_path / "bytes.parquet")
    relative = [{"bytes": None, "path": f"imgs/{label}/{i:03d}.png"} for i, label in enumerate(LABELS)]
    pq.write_table(pa.table({"image": pa.array(relative, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))}),
                   tmp_path / "relative.parquet")  # fmt: skip
    expected = fingerprint(tmp_path / "0", path=str(tmp_path / "bytes.parquet"))
    assert fingerprint(tmp_path / "1", path=str(folder)) == expected
    assert fingerprint(tmp_path / "2", path=str(tmp_path / "paths.parquet"), columns=["image"]) == expected
    assert fingerprint(tmp_path / "3", path=str(tmp_path / "relative.parquet")) == expected
    assert fingerprint(tmp_path / "4", source="huggingface", path=str(folder), columns=["image"]) == expected
    assert fingerprint(tmp_path / "5", data=loaded, columns=["image"]) == expected
    assert fingerprint(tmp_path / "6", data=loaded.data.table, columns=["image"]) == expected


@pytest.mark.ray
def test_a_fit_on_ray_finds_the_same_pictures(cluster, folder, tmp_path):
    loaded = datasets.load_dataset(str(folder), split="train")
    expected = fingerprint(tmp_path / "0", path=str(folder))
    assert fingerprint(tmp_path / "1", path=str(folder), num_workers=3) == expected
    assert fingerprint(tmp_path / "2", data=loaded, columns=["image"], num_workers=3) == expected
    np.savez_compressed(tmp_path / "x.npz", x=PIXELS)
    assert fingerprint(tmp_path / "3", path=str(tmp_path / "x.npz"), num_workers=3) == expected


def test_a_fit_by_gradient_opens_each_file_once_more_than_it_decodes_it(folder, monkeypatch):
    """The second pass, over pictures that are decoded, opens none."""
    opened = []
    open_ = Image.open
    monkeypatch.setattr(Image, "open", lambda *args, **options: opened.append("decoded") or open_(*args, **options))
    monkeypatch.setattr(
        "gendist.data.picture_files.opened",
        lambda path: opened.append("read") or open(path, "rb"),  # noqa: SIM115
    )
    spec = {
        "name": "pictures",
        "family": "vae",
        "model": {"latent_dim": 2, "encoder": {"hidden_sizes": [4]}, "decoder": {"hidden_sizes": [4]}},
        "data": {"path": str(folder), "label": "label", "validation_fraction": 0.3},
        "fit": {"num_steps": 2, "global_batch_size": 8},
    }
    model = gendist.fit(spec).model
    assert model.labels == ("cat", "dog")
    assert opened.count("decoded") == opened.count("read") == NUM_PICTURES + 1  # and the first once more, for its shape


IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("gone.png", "column 'image' names .*/gone.png, which cannot be read on .*no such file.; put it where all nodes see"),
        ("/dev/zero", "column 'image' names /dev/zero, which cannot be read on .*neither a file nor a folder"),
        ("http://169.254.169.254/x.png", "column 'image' names http://169.254.169.254/x.png, which is not where the data are"),
        ("memory://x.png", "column 'image' names memory://x.png, which is not where the data are"),
        (None, "column 'image' in row 0 has no image, neither its bytes nor the path of a file"),
        ("text.png", "column 'image' in row 0 .text.png. is not an image that can be decoded"),
    ],
)
def test_a_path_that_is_none_is_told_in_one_line(tmp_path, path, expected):
    (tmp_path / "text.png").write_text("no picture")
    pq.write_table(pa.table({"image": pa.array([{"bytes": None, "path": path}], IMAGE)}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=f"^{tmp_path}/a.parquet: {expected}") as caught:
        rows_of(open_source(DataConfig(path=str(tmp_path / "a.parquet"))))
    assert "\n" not in str(caught.value)


def test_a_picture_that_is_gone_or_of_another_size_is_told_by_its_name(folder):
    source = open_source(DataConfig(path=str(folder)))
    Image.fromarray(PIXELS[0, :2]).save(folder / "dog" / "020.png")
    with pytest.raises(
        UserError, match=r"mixed sizes: \(2, 5\) in row 20 .*dog/020.png.*, \(4, 5\) in row 0; make them one size"
    ):
        rows_of(source)
    (folder / "dog" / "020.png").unlink()
    with pytest.raises(UserError, match=r"dog/020.png: cannot be read on .*no such file.; put it where all nodes see it"):
        rows_of(source)


def test_a_folder_without_data_is_told_what_there_may_be(tmp_path):
    with pytest.raises(UserError, match=r"no \.parquet.*\.png.* file in this folder$"):
        open_source(DataConfig(path=str(tmp_path)))
    (tmp_path / "a.csv.gz").write_bytes(b"")
    for path in (tmp_path, tmp_path / "a.csv.gz"):
        with pytest.raises(UserError, match=r"a\.csv\.gz: compressed as a whole, .*unpack it, or write it as Parquet"):
            open_source(DataConfig(path=str(path)))


def test_only_what_is_laid_out_as_images_is_read_from_files(tmp_path):
    """A server takes sparse rows from whoever asks; none of them may name a file."""
    (tmp_path / "secret").write_text("secret")
    row = {"indices": [0], "values": [1.0], "bytes": None, "path": str(tmp_path / "secret")}
    type_ = pa.struct(
        [("indices", pa.list_(pa.int64())), ("values", pa.list_(pa.float64())), ("bytes", pa.binary()), ("path", pa.string())]
    )
    table = pa.table({"x": pa.array([row], type_)})
    assert with_files(table, str(tmp_path), "x").equals(table)
    assert source_of(table).read(0, 1, ["x"]).column("x")[0].as_py()["bytes"] is None


def test_folders_whose_names_begin_alike_and_links_to_folders_are_told_apart(tmp_path, caplog):
    for name in ("dog", "dog-wild", "dog/more", "elsewhere"):
        folder = tmp_path / ("imgs" if name != "elsewhere" else ".") / name
        folder.mkdir(parents=True)
        Image.fromarray(np.full((4, 4), 7, np.uint8)).save(folder / "a.png")
    (tmp_path / "imgs" / "cat").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "imgs" / "cat" / "circle").symlink_to(tmp_path / "imgs")
    source = open_source(DataConfig(path=str(tmp_path / "imgs")))
    assert sorted(source.read(0, source.num_rows, ["label"])["label"].to_pylist()) == ["cat", "dog", "dog-wild", "more"]
    assert not caplog.records
    (tmp_path / "imgs" / "dog-wild" / "dog").mkdir()
    Image.fromarray(np.full((4, 4), 7, np.uint8)).save(tmp_path / "imgs" / "dog-wild" / "dog" / "b.png")
    open_source(DataConfig(path=str(tmp_path / "imgs")))
    assert "'dog' is the label of pictures in" in caplog.text
