"""Files and folders that appear whole or not at all, whenever the process or the machine dies."""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from gendist.errors import UserError

WAIT_S = 10.0  # for another process that writes the same file


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """`with new_folder(path) as inside:` write into `inside`; at the end it is renamed to `path`, where nothing may stand.

    What an earlier process left half-written is removed.
    """
    inside = path.with_name(f".{path.name}.unfinished")
    shutil.rmtree(inside, ignore_errors=True)
    inside.mkdir(parents=True)
    try:
        yield inside
        for folder in (inside, *(path for path in sorted(inside.rglob("*")) if path.is_dir())):
            _sync_folder(folder)
        inside.rename(path)
        _sync_folder(path.parent)
    finally:
        shutil.rmtree(inside, ignore_errors=True)


@contextmanager
def new_file(path: Path) -> Iterator[IO[bytes]]:
    """`with new_file(path) as file:` write into `file`; at the end it takes the place of what stood at `path`.

    UserError where another process is at it, and does not end in a few seconds.
    """
    unfinished = path.with_name(f".{path.name}.unfinished")
    alone = _alone(unfinished)
    try:
        with alone as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            unfinished.replace(path)  # while it is held
        _sync_folder(path.parent)
    except BaseException as error:
        unfinished.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # a full disk does not say which file found no room
        raise


def _alone(path: Path) -> IO[bytes]:
    """The empty file, which one process at a time writes; what a killed one has left of it is gone."""
    until = time.monotonic() + WAIT_S
    while True:
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "wb")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):  # else it has been finished, or removed, meanwhile
                file.truncate()
                return file
        except BlockingIOError:
            if time.monotonic() > until:
                file.close()
                raise UserError(f"{path}: another process writes this file; wait for it, or name another one") from None
            time.sleep(0.05)
        except FileNotFoundError:
            pass
        except OSError:  # a file system without locks
            file.truncate()
            return file
        file.close()


def write_atomically(path: Path, content: str | Any) -> None:
    """Replace a file by new content: text, or whatever has the buffer protocol."""
    with new_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def write(path: Path, content: bytes) -> None:
    """Write a file and wait until the disk has it."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_file(path: Path) -> None:
    """Wait until the disk has what somebody else wrote into a file."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    """A new name survives a power cut only once its folder is on disk too."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
