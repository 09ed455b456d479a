"""A fitted model, data, and parts so small that little work has many of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import gendist
from gendist.bulk import parts

NUM_ROWS = 2000


@pytest.fixture(scope="session")
def folder(tmp_path_factory, blobs) -> Path:
    """run/, a fitted mixture with labels a and b; other/, another one; data.parquet, 2000 rows for it."""
    folder = tmp_path_factory.mktemp("bulk")
    frame = pd.DataFrame(blobs, columns=["a", "b", "c"])
    data = {"frame": frame, "y": np.where(blobs[:, 0] > 3, "left", "right")}
    spec = {"name": "blobs", "family": "gmm", "model": {"num_components": 3}, "data": {"label": "y"}}
    gendist.fit(spec, data=frame.assign(y=data["y"]), run_dir=folder / "run")
    gendist.fit({**spec, "seed": 1, "model": {"num_components": 2}}, data=frame.assign(y=data["y"]), run_dir=folder / "other")
    rows = np.random.default_rng(1).normal(scale=4.0, size=(NUM_ROWS, 3))
    pd.DataFrame(rows, columns=["a", "b", "c"]).to_parquet(folder / "data.parquet", index=False)
    return folder


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(parts, "MIN_PART_BYTES", 64)
