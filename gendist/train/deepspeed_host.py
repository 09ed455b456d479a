"""What a host must have for files that tensors are swapped to: a folder, room, an operator, memory that may be locked."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import shutil
import tempfile
import weakref
from pathlib import Path

from gendist.protocols import UserError

_PREFIX = "gendist-swapped-"  # of folders: nobody else's, since what is left of them is removed
_MLOCK_ONFAULT = 1  # of Linux: a lock that takes no memory yet


def own_folder(path: str, owner: object) -> str:
    """A new folder in `path`, which goes with the owner, or at the end of the process; that of a process that was killed, with
    the next one that comes there. UserError where there can be none."""
    try:
        guard = _lock(path)
        try:
            for former in Path(path).glob(f"{_PREFIX}*"):
                _remove_if_nobody_has_it(former)
            folder = tempfile.mkdtemp(prefix=_PREFIX, dir=path)
            descriptor = _lock(folder)  # for as long as this process lives
        finally:
            os.close(guard)
    except OSError as error:
        raise UserError(
            f"fit.engine.config: nvme_path {path} is no folder that can be written to ({error.strerror}); give one on a local "
            "disk of every host"
        ) from error
    weakref.finalize(owner, _remove, folder, descriptor)
    probe = Path(folder) / "probe"
    try:
        os.close(os.open(probe, os.O_CREAT | os.O_WRONLY | os.O_DIRECT))
    except OSError as error:
        raise UserError(
            f"fit.engine.config: nvme_path {path} takes no direct writes ({error.strerror}); give a folder on a local disk of "
            "every host, neither in memory nor on a network"
        ) from error
    probe.unlink()
    return folder


def _lock(folder: str | Path, how: int = fcntl.LOCK_EX) -> int:
    """A descriptor that holds the lock until it is closed, which the end of a process does in any case."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, how)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _remove_if_nobody_has_it(folder: Path) -> None:
    try:
        descriptor = _lock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return
    _remove(folder, descriptor)


def _remove(folder: str | Path, descriptor: int) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    os.close(descriptor)


def check_space(paths: set[str], num_bytes: float) -> None:
    """DeepSpeed takes a write that failed for one that did not, and ends the process when it reads."""
    free = sum(shutil.disk_usage(path).free for path in paths)
    if num_bytes > free:
        raise UserError(
            f"fit.engine.config: nvme_path {' and '.join(sorted(paths))} has {free / 1e9:.3g} GB left, and each process swaps "
            f"{num_bytes / 1e9:.3g} GB there; make room, or give another"
        )


def check_operator() -> None:
    """Builds DeepSpeed's operator where that was not done yet, which takes minutes."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    try:
        AsyncIOBuilder().load(verbose=False)
    except (RuntimeError, ImportError, OSError) as error:
        why = " ".join(str(error).split())[:200]
        raise UserError(
            "fit.engine.config: offload to nvme needs DeepSpeed's operator async_io, which is built on every host: install "
            f"libaio-dev, g++ and ninja there, or offload to cpu ({why})"
        ) from error


def check_lock(num_bytes: int) -> None:
    """DeepSpeed ends the process where it may not lock its buffers in memory."""
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        with mmap.mmap(-1, num_bytes) as memory:
            start = ctypes.c_char.from_buffer(memory)
            failed = libc.mlock2(ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(num_bytes), _MLOCK_ONFAULT)
            del start  # which keeps the memory from being closed
            if failed:
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    except OSError as error:
        raise UserError(
            f"fit.engine.config: offload to nvme locks {num_bytes / 1e6:.1f} MB of buffers in memory, which cannot be done "
            f"({error.strerror}); raise `ulimit -l` on every host, or give a smaller sub_group_size"
        ) from error
