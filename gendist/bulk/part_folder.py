"""A folder of Parquet files that hold rows in order; what one process leaves undone, the next one does.

_request.json           what was asked for, written before the first part
part-00000000.parquet   the rows of the first part, and so on, one after the other
_SUCCESS                what they add up to, written last: the folder is finished

Names that begin with an underline or a dot are passed over by what reads a folder as one table (Arrow, Spark).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from gendist.atomic import write_atomically
from gendist.blocks import Leaves
from gendist.bulk.parts import Part
from gendist.folder_lock import locked
from gendist.machine import machine_type, versions
from gendist.protocols import UserError

logger = logging.getLogger("gendist")


@dataclass(frozen=True)
class PartFolder:
    """request: all that the rows depend on, as plain JSON; a folder takes the parts of one request."""

    path: Path
    request: Mapping[str, Any]
    parts: Leaves

    def result(self) -> dict[str, float] | None:
        """The sums over all parts, or None where the folder is not finished.

        UserError where it holds the parts of another request, or something else.
        """
        self._check_what_is_there()
        success = self.path / "_SUCCESS"
        if not success.exists() or not all(self._file(index).exists() for index in range(self.parts.num_leaves)):
            return None
        sums: dict[str, float] = _read(success, "sums")["sums"]
        return sums

    @contextmanager
    def held(self) -> Iterator[list[Mapping[str, float]]]:
        """Be the one process that adds parts; yields the sums of each part that stands there, up to the first that lacks."""
        with locked(self.path):
            self._check_what_is_there()  # again: another process may have begun in between
            yield self._sums_of_parts()

    def add(self, index: int, part: Part) -> None:
        if not self.is_begun:  # only now: a mistake that is found on the way to the first part leaves no folder behind
            here = {"request": self.request, "machine": machine_type(), "versions": versions()}
            self._write("_request.json", json.dumps(here, indent=2) + "\n")
        self._write(self._file(index).name, part.content)

    def finish(self, sums: Mapping[str, float]) -> None:
        num_rows = self.parts.bounds[-1] - self.parts.bounds[0]
        self._write("_SUCCESS", json.dumps({"num_rows": num_rows, "sums": sums}) + "\n")

    @property
    def is_begun(self) -> bool:
        return self._request_file.exists()

    @property
    def _request_file(self) -> Path:
        return self.path / "_request.json"

    def _file(self, index: int) -> Path:
        return self.path / f"part-{index:08d}.parquet"

    def _write(self, name: str, content: Any) -> None:
        try:
            write_atomically(self.path / name, content)
        except OSError as error:
            raise UserError(
                f"{self.path / name}: cannot be written ({error.strerror}); what was reached is kept: once this "
                "is mended, the same command goes on from there"
            ) from error

    def _check_what_is_there(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise UserError(
                f"--out {self.path}: a file without a suffix; give a folder, or a file whose suffix says how to write"
            )
        if not self.is_begun:
            if self.path.exists() and any(not file.name.startswith(".") for file in self.path.iterdir()):
                raise UserError(f"--out {self.path}: holds files of something else; choose another folder")
            return
        there = _read(self._request_file, "request")
        if there["request"] != self.request:
            different = ", ".join(_differences(there["request"], self.request))
            raise UserError(
                f"--out {self.path}: holds the rows of another request (different: {different}); choose another folder"
            )
        if (there.get("machine"), there.get("versions")) != (machine_type(), versions()):
            logger.warning("%s was begun on another machine or with other versions (see _request.json there): its bytes may "
                           "differ from those of an unbroken run", self.path)  # fmt: skip

    def _sums_of_parts(self) -> list[Mapping[str, float]]:
        sums: list[Mapping[str, float]] = []
        for index in range(self.parts.num_leaves):
            file = self._file(index)
            if not file.exists():
                break
            try:
                footer = pq.read_metadata(file)
            except (OSError, pa.ArrowException) as error:
                logger.warning("%s cannot be read (%s) and is made again", file, str(error).splitlines()[0])
                break
            metadata = footer.schema.to_arrow_schema().metadata or {}
            sums.append({name.decode(): float(value) for name, value in metadata.items()})
        return sums


def _read(file: Path, key: str) -> dict[str, Any]:
    """A JSON object that has an object under a key."""
    try:
        content = json.loads(file.read_bytes())
        if not isinstance(content, dict) or not isinstance(content.get(key), dict):
            raise ValueError(f"not a JSON object with '{key}'")
        return content
    except ValueError as error:
        raise UserError(f"{file}: damaged ({error}); remove the folder, and the same command makes it anew") from error


def _differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    return [key for key in dict.fromkeys([*here, *there]) if there.get(key) != here.get(key)]
