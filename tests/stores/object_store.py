"""An object store on this machine, objects:///FOLDER/..., which outlives the processes that use it and is as unhelpful as
others are: an object appears whole or not at all, and there is no change of names, no appending, no lock.

With this folder on the Python path, fsspec finds it by itself, in any process. While FOLDER/.trouble exists, everything fails
with what stands in it; a number before that lets so many calls pass. `calls` are those of this process.
"""

from __future__ import annotations

import os
import shutil
import uuid
from pathlib import Path

import fsspec

TROUBLE = ".trouble"  # beside the objects, in any folder above them
PUT = "%put-"  # an object that is being written, which nobody sees


class ObjectStore(fsspec.AbstractFileSystem):
    protocol = "objects"
    cachable = False
    calls: list[str] = []  # noqa: RUF012
    dies_at: int | None = None  # the call that fails as if the process had been killed, and all after it
    death: type[BaseException] = KeyboardInterrupt

    def _called(self, what: str, path: str) -> str:
        path = self._strip_protocol(path)
        self.calls.append(f"{what} {path}")
        if self.dies_at is not None and len(self.calls) >= self.dies_at:
            raise self.death
        for folder in Path(path).parents:
            try:
                trouble = (folder / TROUBLE).read_text()
            except OSError:
                continue
            raise ConnectionError(trouble or "503 Slow Down")
        return path

    def cat_file(self, path, start=None, end=None, **options):
        return Path(self._called("read", path)).read_bytes()

    def get_file(self, rpath, lpath, **options):
        shutil.copyfile(self._called("download", rpath), lpath)

    def put_file(self, lpath, rpath, **options):
        target = Path(self._called("write", rpath))
        target.parent.mkdir(parents=True, exist_ok=True)
        unseen = target.with_name(f"{PUT}{uuid.uuid4().hex}")
        shutil.copyfile(lpath, unseen)
        os.replace(unseen, target)

    def rm_file(self, path):
        Path(self._called("remove", path)).unlink()

    def find(self, path, **options):
        folder = Path(self._called("list", path))
        return sorted(str(file) for file in folder.rglob("*") if file.is_file() and not file.name.startswith(PUT))

    def _open(self, path, **options):
        raise NotImplementedError("an object is read and written whole")

    mv = cp_file = _open
