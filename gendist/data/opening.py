"""A file opened to be read, on this machine or on a remote file system, and in words why one cannot be."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager

import fsspec
import pyarrow as pa


@contextmanager
def opened(path: str, mapped: bool = False) -> Iterator[pa.NativeFile]:
    """mapped: into memory, where it is local."""
    if "://" not in path:
        if not stat.S_ISREG(os.stat(path).st_mode):  # what is none, such as a device, may have no end
            raise OSError("neither a file nor a folder")
        with pa.memory_map(path) if mapped else pa.OSFile(path) as file:
            yield file
    else:
        with fsspec.open(path, "rb") as remote, pa.PythonFile(remote, mode="r") as file:
            yield file


def obstacle(path: str, error: Exception) -> str:
    """Why a file could not be read."""
    if isinstance(error, FileNotFoundError):
        return f"a link to {os.readlink(path)}, which does not exist" if os.path.islink(path) else "no such file"
    if isinstance(error, PermissionError):
        return "permission denied"
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
