"""A folder for all that a server writes, which does not outlive it."""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PREFIX = "gendist-"
LOCK = "server_lock"  # a file that the server holds locked as long as it lives


@contextmanager
def own_folder(parent: Path | None = None) -> Iterator[Path]:
    """Its path, short enough for sockets (97 characters at most). Those of servers that were killed, which could not do it
    themselves, are removed."""
    parent = parent or Path("/tmp" if os.path.isdir("/tmp") else tempfile.gettempdir())
    for folder in parent.glob(f"{PREFIX}*"):
        _remove_if_left(folder)
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
    try:
        with open(folder / "lock_to_be", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            os.rename(file.name, folder / LOCK)  # nobody sees it before it is locked
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_if_left(folder: Path) -> None:
    """Nothing of others is touched: the parent is for everybody, who may lay anything there."""
    with suppress(OSError):
        status = folder.lstat()
        if status.st_uid != os.getuid() or not stat.S_ISDIR(status.st_mode):
            return
        lock = os.open(folder / LOCK, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            if stat.S_ISREG(os.fstat(lock).st_mode):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # OSError where a server holds it
                shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(lock)
