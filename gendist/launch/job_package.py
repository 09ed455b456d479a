"""What travels with a job: this package, the resolved spec, and of the machine that submits what the spec names by relative
paths: small data, a run to start from, DeepSpeed's configuration, modules of networks.

An absolute path or a URL is the cluster's. What a relative one names is packed under that very name, and the job works in the
folder where it is unpacked, on every node.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

import gendist
from gendist.config import Spec
from gendist.data.formats import expand
from gendist.em.config import STARTS
from gendist.launch.job_lines import JOB_FILE
from gendist.launch.submission import is_of_the_cluster
from gendist.protocols import UserError

# Ray keeps packages in the memory of the head, 512 MiB at most, and copies them to every node.
MAX_PACKED_BYTES = 100 * 2**20
PACKAGE = Path(gendist.__file__).parent


@dataclass(frozen=True)
class Package:
    """
    job    what the job's driver is to do
    files  of the folder that the command was called in, by their place in it, which they keep
    """

    job: Mapping[str, Any]
    files: tuple[str, ...]

    def digest(self) -> str:
        """Of the files and their names."""
        found = hashlib.sha256()
        for name in self.files:
            with open(name, "rb") as file:
                found.update(f"{name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
        return found.hexdigest()

    def write(self, folder: Path, here: Path) -> None:
        """As a folder that can be packed: links to the files. `here` is where they are."""
        for name in self.files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).symlink_to((here / name).resolve())
        (folder / JOB_FILE).write_text(json.dumps(self.job), encoding="utf-8")


def package(spec: Spec, run_dir: str, versions: Mapping[str, str]) -> Package:
    """UserError where a relative path names nothing here, or more than can be sent."""
    job = {"spec": spec.model_dump(mode="json"), "run_dir": run_dir, "versions": dict(versions)}
    files = tuple(sorted({*_data(spec), *_start(spec), *_engine_configuration(spec), *_modules(spec.model)}))
    sizes = {name: os.path.getsize(name) for name in files}
    if sum(sizes.values()) > MAX_PACKED_BYTES:
        largest = max(sizes, key=lambda name: sizes[name])
        raise UserError(
            f"{sum(sizes.values()) / 2**20:,.0f} MiB would have to be sent with the job ({largest} is the largest of "
            f"{len(sizes)} files), and {MAX_PACKED_BYTES // 2**20} MiB can be; put the data where every node reads them, and "
            "give an absolute path or a URL"
        )
    return Package(job, files)


def _data(spec: Spec) -> Iterator[str]:
    given = spec.data.path
    paths = [given] if isinstance(given, str) else given or ()
    for path in paths:
        if is_of_the_cluster(path):
            continue
        if spec.data.source == "huggingface":
            if os.path.isdir(path):  # else the name of a data set on the hub
                yield from _inside(path, "data.path")
        elif not os.path.lexists(path) and not glob.has_magic(path):
            raise UserError(
                f"data.path: {path}: no such file here; what a relative path names is sent with the job, an absolute path or a "
                "URL is one of the cluster's"
            )
        else:
            yield from (_name(file, "data.path") for file in expand(path, spec.data.source))


def _start(spec: Spec) -> Iterator[str]:
    """The artifact that the fit starts from."""
    init = getattr(spec.fit, "init", None)
    if init is not None and init not in STARTS and not is_of_the_cluster(init) and os.path.isdir(init):
        artifact = os.path.join(init, "artifact")
        yield from _inside(artifact if os.path.isdir(artifact) else init, "fit.init")


def _engine_configuration(spec: Spec) -> Iterator[str]:
    path = getattr(getattr(spec.fit, "engine", None), "config", None)
    if path is not None and not is_of_the_cluster(path):
        if not os.path.isfile(path):
            raise UserError(f"fit.engine.config: {path}: no such file")
        yield _name(path, "fit.engine.config")


def _modules(config: BaseModel) -> Iterator[str]:
    """Where a network is a module of the user's own, the package or file of this folder that it is imported from. What is not
    here must be installed on the cluster."""
    for key in type(config).model_fields:
        value = getattr(config, key)
        if isinstance(value, BaseModel):
            yield from _modules(value)
        elif key == "module" and isinstance(value, str):
            top = value.partition(":")[0].partition(".")[0]
            if os.path.isdir(top):
                yield from _inside(top, key)
            elif os.path.isfile(f"{top}.py"):
                yield f"{top}.py"


def _inside(folder: str, field: str) -> Iterator[str]:
    """The files of a folder, but those that begin with a dot and compiled ones."""
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".") and name != "__pycache__"]
        for name in names:
            if not name.startswith(".") and not name.endswith(".pyc") and os.path.isfile(os.path.join(parent, name)):
                yield _name(os.path.join(parent, name), field)


def _name(path: str, field: str) -> str:
    """The place of a file in this folder."""
    name = os.path.relpath(path)
    if name.partition(os.sep)[0] == os.pardir:
        raise UserError(
            f"{field}: {name}: outside of this folder, and only what is in it is sent; call the command in a folder above it, "
            "or give an absolute path or a URL that every node can read"
        )
    return name
