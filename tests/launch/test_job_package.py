"""What travels with a job, without a cluster."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

import gendist
from gendist.config import load_spec
from gendist.launch import job_package
from gendist.launch.job_lines import JOB_FILE
from gendist.launch.job_package import package
from gendist.protocols import UserError

SPEC = {"name": "two", "family": "gmm", "model": {"num_components": 2}, "data": {"path": "data/*.npy"}}


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A folder with what a person may have in it, in which the command is called."""
    (tmp_path / "work" / "data").mkdir(parents=True)
    for name in ("work/data/a.npy", "work/data/b.npy", "outside.npy"):
        np.save(tmp_path / name, np.zeros((3, 2)))
    (tmp_path / "work" / "data" / "notes.txt").write_text("not of the data")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def packed(*overrides: str, spec=SPEC) -> tuple[str, ...]:
    return package(load_spec(spec, overrides), "/shared/two", {}).files


def test_relative_paths_of_data_are_packed_where_they_lie(here):
    both = ("data/a.npy", "data/b.npy")
    assert packed() == both
    assert packed("data.path=data") == both
    assert packed("data.path=[./data/b.npy,data/a.npy]") == both
    assert packed("data.path=/data/*.npy") == ()
    assert packed("data.path=s3://bucket/data/*.npy") == ()
    assert packed("data.source=digits", "data.path=null") == ()


def test_a_name_that_begins_with_dots_is_no_way_out_of_this_folder(here):
    (here / "data" / "a.npy").rename(here / "..data.npy")
    assert packed("data.path=..data.npy") == ("..data.npy",)


def test_other_files_and_other_names_have_another_digest(here):
    digest = package(load_spec(SPEC), "/shared/two", {}).digest()
    assert package(load_spec(SPEC), "/shared/other", {"ray": "1.2.3"}).digest() == digest
    content = (here / "data" / "a.npy").read_bytes()
    (here / "data" / "a.npy").write_bytes(content[:-1] + b"x")
    assert package(load_spec(SPEC), "/shared/two", {}).digest() != digest
    (here / "data" / "a.npy").write_bytes(content)
    assert package(load_spec(SPEC), "/shared/two", {}).digest() == digest
    (here / "data" / "a.npy").rename(here / "data" / "c.npy")
    assert package(load_spec(SPEC), "/shared/two", {}).digest() != digest


def test_the_package_is_what_the_driver_reads(here, tmp_path):
    made = package(load_spec(SPEC), "/shared/two", {"ray": "1.2.3"})
    (tmp_path / "made").mkdir()
    made.write(tmp_path / "made", here)
    job = json.loads((tmp_path / "made" / JOB_FILE).read_text())
    assert load_spec(job["spec"]) == load_spec(SPEC)
    assert job["run_dir"] == "/shared/two"
    assert job["versions"] == {"ray": "1.2.3"}
    assert (tmp_path / "made" / "data" / "b.npy").read_bytes() == (here / "data" / "b.npy").read_bytes()


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("nowhere.npy", "no such file here"),
        ("nowhere/*.npy", "no file matches"),
        ("../outside.npy", "outside of this folder"),
        ("..", "outside of this folder"),
    ],
)
def test_what_cannot_be_packed_is_told(here, path, said):
    with pytest.raises(UserError, match=said):
        packed(f"data.path={path}")


def test_what_is_too_large_is_told_with_the_limit(here, monkeypatch):
    monkeypatch.setattr(job_package, "MAX_PACKED_BYTES", 2**20)
    with (here / "data" / "b.npy").open("ab") as file:
        file.truncate(3 * 2**20)
    with pytest.raises(
        UserError, match=r"3 MiB would have to be sent .* .data/b.npy is the largest of 2 files., and 1 MiB can be"
    ):
        packed()


def test_a_run_to_start_from_is_packed_as_its_artifact(here):
    gendist.fit(SPEC | {"data": {}}, data=np.random.default_rng(0).normal(size=(50, 2)), run_dir=here / "runs" / "old")
    files = packed("fit.init=runs/old", "data.path=/data/a.npy")
    assert "runs/old/artifact/model.json" in files
    assert all(name.startswith("runs/old/artifact/") for name in files)
    assert packed("fit.init=/shared/old", "data.path=/data/a.npy") == ()
    assert packed("fit.init=random", "data.path=/data/a.npy") == ()


def test_modules_and_configurations_of_the_users_own_are_packed(here):
    (here / "nets" / "__pycache__").mkdir(parents=True)
    for name in ("__init__.py", "coders.py", ".hidden", "__pycache__/coders.pyc"):
        (here / "nets" / name).write_text("")
    (here / "ds.json").write_text("{}")
    spec = {"name": "deep", "family": "vae", "data": {"path": "/data/a.npy"}}
    spec["model"] = {
        "latent_dim": 2,
        "encoder": {"module": "nets.coders:Encoder"},
        "decoder": {"module": "installed.elsewhere:Decoder"},
    }
    (here / "deep.yaml").write_text(yaml.safe_dump(spec))
    engine = ["fit.engine.kind=deepspeed", "fit.engine.config=ds.json"]
    assert packed(*engine, spec=here / "deep.yaml") == ("ds.json", "nets/__init__.py", "nets/coders.py")
