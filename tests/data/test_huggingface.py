"""`source: huggingface`: folders in the hub's layout, folders that `save_to_disk` wrote, and a hub that does not answer."""

from __future__ import annotations

import pickle
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import pandas as pd
import pytest

from gendist.data import DataConfig, huggingface, open_source
from gendist.protocols import UserError

FRAME = pd.DataFrame({"a": np.arange(50.0), "y": ["p", "q"] * 25})


pytestmark = pytest.mark.usefixtures("cache_of_datasets")


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two splits, of which one is in two files."""
    FRAME[:20].to_parquet(tmp_path / "train-00000-of-00002.parquet")
    FRAME[20:].to_parquet(tmp_path / "train-00001-of-00002.parquet")
    FRAME[:5].to_parquet(tmp_path / "test-00000-of-00001.parquet")
    return tmp_path


def column(source, name: str = "a") -> list:
    return source.read(0, source.num_rows, [name]).column(name).to_pylist()


def open_folder(path: Path, **config):
    return open_source(DataConfig(source="huggingface", path=str(path), **config))


@pytest.mark.parametrize("streaming", [False, True])
def test_splits(folder, streaming):
    assert column(open_folder(folder, streaming=streaming)) == list(range(50))
    assert column(open_folder(folder, streaming=streaming, split="test")) == list(range(5))
    with pytest.raises(UserError, match="no split 'tset'; there are train, test"):
        open_folder(folder, streaming=streaming, split="tset")
    with pytest.raises(UserError, match="BuilderConfig 'de' not found"):
        open_folder(folder, streaming=streaming, subset="de")


def test_a_part_of_a_split(folder):
    assert column(open_folder(folder, split="train[:30%]")) == list(range(15))
    with pytest.raises(UserError, match=r"no split 'train\[:30%\]'.* a part of a split is not streamed"):
        open_folder(folder, split="train[:30%]", streaming=True)


@pytest.mark.parametrize("streaming", [False, True])
def test_subsets(tmp_path, streaming):
    for subset, frame in (("en", FRAME), ("de", FRAME[::-1])):
        (tmp_path / subset).mkdir()
        frame.to_csv(tmp_path / subset / "train.csv", index=False)
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: en\n  data_files: en/*.csv\n- config_name: de\n  data_files: de/*.csv\n---\n"
    )
    assert column(open_folder(tmp_path, subset="de", streaming=streaming)) == list(range(49, -1, -1))
    with pytest.raises(UserError, match=r"Config name is missing.*en.*de"):
        open_folder(tmp_path, streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
def test_what_save_to_disk_wrote(tmp_path, streaming):
    whole = datasets.Dataset.from_pandas(FRAME)
    whole.save_to_disk(tmp_path / "one")
    assert column(open_folder(tmp_path / "one", streaming=streaming), "y") == list(FRAME.y)
    datasets.DatasetDict({"train": whole, "test": whole.select([3])}).save_to_disk(
        tmp_path / "two", num_shards={"train": 3, "test": 1}
    )
    assert column(open_folder(tmp_path / "two", streaming=streaming)) == list(range(50))
    assert column(open_folder(tmp_path / "two", streaming=streaming, split="test")) == [3]
    with pytest.raises(UserError, match="no split 'zzz'; there are train, test"):
        open_folder(tmp_path / "two", streaming=streaming, split="zzz")


def test_saved_data_travel_as_the_names_of_their_files(tmp_path):
    datasets.Dataset.from_dict({"a": np.zeros(100_000)}).save_to_disk(tmp_path)
    source = open_folder(tmp_path)
    assert len(pickle.dumps(source)) < 10_000
    assert column(pickle.loads(pickle.dumps(source))) == [0.0] * 100_000
    assert Path(source.paths[0]).parent == tmp_path


def test_what_has_no_rows_of_its_own_is_copied_but_not_streamed(tmp_path):
    FRAME.to_csv(tmp_path / "train.tsv", sep="\t", index=False)
    assert column(open_folder(tmp_path)) == list(range(50))
    with pytest.raises(UserError, match=r"files with sep='\\t' cannot be streamed; leave data.streaming out"):
        open_folder(tmp_path, streaming=True)


def test_a_csv_file_of_another_dialect_is_copied_but_not_streamed(tmp_path):
    FRAME.to_csv(tmp_path / "train.csv", sep=";", index=False)
    (tmp_path / "README.md").write_text("---\nconfigs:\n- config_name: a\n  data_files: '*.csv'\n  sep: ';'\n---\n")
    assert column(open_folder(tmp_path)) == list(range(50))
    with pytest.raises(UserError, match="files with sep=';' cannot be streamed"):
        open_folder(tmp_path, streaming=True)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"source": "parquet", "split": "train"}, "data.split: of source huggingface alone"),
        ({"subset": "en"}, "data.subset: of source huggingface alone"),
        ({"source": "digits", "streaming": True}, "data.streaming: of source huggingface alone"),
        ({"source": "huggingface"}, "data.path is missing"),
        ({"source": "huggingface", "path": ("a", "b")}, "data.path: 2 paths; of source huggingface it is one"),
        ({"source": "huggingface", "path": "./a/b/c"}, "neither a folder nor a name of the hub"),
    ],
)
def test_what_a_spec_may_not_say(config, expected):
    with pytest.raises(UserError, match=expected):
        open_source(DataConfig(**config))


def test_a_folder_without_data(tmp_path):
    with pytest.raises(UserError, match="contain any data files"):
        open_folder(tmp_path)


# The hub


@pytest.fixture
def silent_hub(monkeypatch) -> Iterator[str]:
    """Takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
        yield endpoint


@pytest.mark.parametrize("streaming", [False, True])
def test_a_hub_that_never_answers(silent_hub, monkeypatch, streaming):
    monkeypatch.setattr(huggingface, "HUB_TIMEOUT_S", 0.5)
    began = time.monotonic()
    with pytest.raises(
        UserError, match=f"someone/data: no such folder, and the hub at {silent_hub} cannot be reached"
    ) as caught:
        open_source(DataConfig(source="huggingface", path="someone/data", streaming=streaming))
    assert time.monotonic() - began < 10
    assert "\n" not in str(caught.value)


def test_nothing_listens_where_the_hub_should_be(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    with pytest.raises(UserError, match="cannot be reached"):
        open_source(DataConfig(source="huggingface", path="someone/data"))


def test_a_name_that_the_hub_does_not_know(monkeypatch):
    class Hub(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *arguments):
            pass

    with HTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        try:
            with pytest.raises(UserError, match="someone/dta: no such folder, and no such data set on the hub"):
                open_source(DataConfig(source="huggingface", path="someone/dta"))
        finally:
            server.shutdown()
