from __future__ import annotations

import io
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import gendist
from gendist.blocks import LocalBlocks
from gendist.data import DataConfig, Schema, open_source
from gendist.data.dataset import Dataset
from gendist.data.decoded_images import DecodedImages

NUM_IMAGES, HEIGHT, WIDTH = 60, 4, 5


@pytest.fixture
def pixels() -> np.ndarray:
    """(N, H, W) uint8"""
    return np.random.default_rng(0).integers(0, 256, (NUM_IMAGES, HEIGHT, WIDTH), dtype=np.uint8)


def write_images(images: np.ndarray, path: Path) -> Path:
    """A Parquet file in the hub's layout."""

    def encoded(image: np.ndarray) -> dict:
        file = io.BytesIO()
        Image.fromarray(image).save(file, format="PNG")
        return {"bytes": file.getvalue(), "path": None}

    pq.write_table(pa.table({"image": [encoded(image) for image in images]}), path)
    return path


@pytest.fixture
def count_decoded(monkeypatch):
    """A list that grows by an entry for each image that is opened."""
    opened = []
    open_ = Image.open

    def counting(*arguments, **options):
        opened.append(1)
        return open_(*arguments, **options)

    monkeypatch.setattr(Image, "open", counting)
    return opened


def rows_of(dataset: Dataset, part: str) -> np.ndarray:
    leaves = dataset.blocks(part=part).map_runs(lambda _, leaves: np.concatenate([leaf.x.numpy() for leaf in leaves]), None)
    return np.concatenate(list(leaves))


def test_a_fit_decodes_each_image_once(tmp_path, pixels, count_decoded):
    spec = {
        "name": "pictures",
        "family": "vae",
        "model": {"latent_dim": 2, "encoder": {"hidden_sizes": [4]}, "decoder": {"hidden_sizes": [4]}},
        "data": {"path": str(write_images(pixels, tmp_path / "x.parquet")), "validation_fraction": 0.3},
        "fit": {"num_steps": 2, "global_batch_size": 8},
        "cluster": {"num_workers": 0},
    }
    gendist.fit(spec)
    assert len(count_decoded) == NUM_IMAGES + 1  # and the first once more, for its shape


def test_rows_are_those_that_are_decoded_anew(tmp_path, pixels, count_decoded):
    source = open_source(config := DataConfig(path=str(write_images(pixels, tmp_path / "x.parquet")), validation_fraction=0.3))
    dataset = Dataset.open(source, config, Schema.of(source, config), LocalBlocks)
    once = dataset.decoding_once()
    for part in ("training", "validation", "all"):
        np.testing.assert_array_equal(rows_of(once, part), rows_of(dataset, part))
    np.testing.assert_array_equal(rows_of(once, "all"), pixels.reshape(NUM_IMAGES, -1) / 255.0)


def test_images_of_16_bits_are_not_made_8(tmp_path, pixels, count_decoded):
    images = pixels.astype(np.uint16) * 256 + 7
    source = open_source(config := DataConfig(path=str(write_images(images, tmp_path / "x.parquet"))))
    dataset = Dataset.open(source, config, Schema.of(source, config), LocalBlocks).decoding_once()
    for _ in range(2):
        np.testing.assert_array_equal(rows_of(dataset, "all"), images.reshape(NUM_IMAGES, -1) / 65535.0)


def test_another_process_of_the_machine_finds_them(tmp_path, pixels):
    images = DecodedImages(NUM_IMAGES, HEIGHT * WIDTH)
    images.put(10, pixels[10:20].reshape(10, -1))
    (tmp_path / "images.pickle").write_bytes(pickle.dumps(images))
    program = (
        "import pickle, sys; images = pickle.load(open(sys.argv[1], 'rb'));"
        "print(images.get(12, 15).tobytes().hex(), images.get(9, 12), images.get(19, 21))"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "images.pickle")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == [pixels[12:15].tobytes().hex(), "None", "None"]


def test_where_the_file_is_another_or_not_there_nothing_is_found(pixels):
    images, other = DecodedImages(NUM_IMAGES, HEIGHT * WIDTH), DecodedImages(NUM_IMAGES, HEIGHT * WIDTH)
    for each in (images, other):
        each.put(0, pixels.reshape(NUM_IMAGES, -1))
    assert pickle.loads(pickle.dumps(images)).get(0, 1) is not None
    for path in ("/proc/0/fd/3", other._path):  # as on another machine
        images._path = path
        found = pickle.loads(pickle.dumps(images))
        found.put(0, pixels.reshape(NUM_IMAGES, -1))
        assert found.get(0, 1) is None


def test_a_full_disk_is_no_error(pixels, monkeypatch):
    images = DecodedImages(NUM_IMAGES, HEIGHT * WIDTH)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.pwrite", full)
    images.put(0, pixels.reshape(NUM_IMAGES, -1))
    assert images.get(0, 1) is None
