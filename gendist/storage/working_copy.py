"""Folders on this machine for what is kept elsewhere; those of processes that were killed are removed by the next."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from gendist.errors import UserError


@contextmanager
def working_copy() -> Iterator[Path]:
    """An empty folder of this process, which is gone at the end."""
    parent = Path(tempfile.gettempdir()) / f"gendist-runs-{os.getuid()}"
    try:
        parent.mkdir(mode=0o700, exist_ok=True)
        status = parent.lstat()
        if parent.is_symlink() or status.st_uid != os.getuid():
            raise UserError(f"{parent}: is another user's; let the environment variable TMPDIR name another folder")
        for lock in parent.glob("*.lock"):
            _remove_if_left(lock)
        folder = parent / uuid.uuid4().hex[:12]
        lock = folder.with_suffix(".lock")
        held = (parent / f".{folder.name}").open("w")
    except OSError as error:
        raise UserError(f"{parent}: cannot be written ({error.strerror})") from error
    with held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX)
            os.rename(held.name, lock)  # nobody sees it before it is locked
            folder.mkdir()
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            with suppress(OSError):
                lock.unlink(missing_ok=True)


def _remove_if_left(lock: Path) -> None:
    with suppress(OSError), lock.open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # OSError where its process is alive
        shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
        lock.unlink(missing_ok=True)
