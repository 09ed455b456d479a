"""One process at a time works in a folder."""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from gendist.protocols import UserError

LOOK_S = 0.5

logger = logging.getLogger("gendist")


@contextmanager
def locked(folder: Path, wait_s: float = 0.0) -> Iterator[None]:
    """Be the one process that works in a folder, which is made where there is none, and removed if nothing came into it.

    wait_s  for another process to end, or for a file system to see that it has

    UserError where it cannot be written, or another process is at work in it.
    """
    lock = folder / ".lock"
    began, is_said = time.monotonic(), False
    while (file := _taken(lock)) is None:
        if time.monotonic() - began >= wait_s:
            raise UserError(f"{folder}: another process is at work here; wait for it or stop it")
        if not is_said:
            logger.warning("%s: another process is at work here; it is waited for, up to %.0f s", folder, wait_s)
            is_said = True
        time.sleep(LOOK_S)
    with file:
        try:
            yield
        finally:
            with suppress(OSError):  # a file system that fails has been spoken of
                if all(path.name.startswith(".") for path in folder.iterdir()):
                    # Nothing was begun: a mistake in the data block, say, leaves no folder behind.
                    lock.unlink(missing_ok=True)
                    if not any(folder.iterdir()):
                        folder.rmdir()


def _taken(lock: Path) -> IO[str] | None:
    """The file, locked; None where another process has it."""
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        file = lock.open("w")
    except OSError as error:
        raise UserError(f"{lock.parent}: cannot be written ({error.strerror})") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(file.fileno()), lock.stat()):
            return file
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError as error:  # a file system without locks
        logger.warning("%s cannot be locked (%s): see to it that one process at a time works in it", lock.parent, error)
        return file
    file.close()  # the process that had it may have removed it
    return None
