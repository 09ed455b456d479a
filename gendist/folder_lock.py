"""One process at a time works in a folder."""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from gendist.protocols import UserError

logger = logging.getLogger("gendist")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Be the one process that works in a folder, which is made where there is none, and removed if nothing came into it.

    UserError where it cannot be written, or another process is at work in it.
    """
    lock = folder / ".lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = lock.open("w")
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror})") from error
    with file:
        _take(file, lock)
        try:
            yield
        finally:
            if all(path.name.startswith(".") for path in folder.iterdir()):
                # Nothing was begun: a mistake in the data block, say, leaves no folder behind.
                lock.unlink(missing_ok=True)
                if not any(folder.iterdir()):
                    folder.rmdir()


def _take(file: IO[str], lock: Path) -> None:
    taken = f"{lock.parent}: another process is at work here; wait for it or stop it"
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(taken) from None
    except OSError as error:  # a file system without locks
        logger.warning("%s cannot be locked (%s): see to it that one process at a time works in it", lock.parent, error)
        return
    try:
        still_there = os.path.samestat(os.fstat(file.fileno()), lock.stat())
    except FileNotFoundError:
        still_there = False
    if not still_there:  # the process that had it removed it
        raise UserError(taken)
