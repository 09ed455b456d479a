"""Storage that fails for a while is waited for, within a stated time, and asked again; nothing is lost."""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from gendist.errors import UserError

PATIENCE_S = 90.0  # for one thing that is to be written or read, from its first failure on
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.25, 8.0
SAID_EVERY_S = 20.0

# A disk that is full, read-only or not there at the moment: somebody may be about to mend it.
MAY_PASS = {
    errno.EROFS, errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EBUSY, errno.ENOMEM,
    errno.ENXIO, errno.ENODEV, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH, errno.ENOTCONN,
    errno.ECONNRESET, errno.ECONNREFUSED, errno.ECONNABORTED, errno.EPIPE, errno.EREMOTEIO, errno.ENOLINK,
}  # fmt: skip

# What is said of something that is there no more, or has other bytes than were written.
DAMAGE = (ValueError, KeyError, TypeError, AttributeError, FileNotFoundError, NotADirectoryError, IsADirectoryError)

T = TypeVar("T")
logger = logging.getLogger("gendist")


class StorageError(UserError):
    """Storage has failed for longer than anybody waits for it."""


def patiently(what: str, act: Callable[[], T], may_pass: Callable[[Exception], bool] | None = None) -> T:
    """What `act` returns, which is called again after a failure that may pass; so it must be able to begin anew.

    what  is written or read, for messages

    StorageError when that has taken PATIENCE_S; any other failure is raised at once.
    """
    failed_at: float | None = None
    said_at, number = 0.0, 0
    while True:
        try:
            result = act()
        except Exception as error:
            if isinstance(error, StorageError) or not (may_pass or is_passing)(error):
                raise
            now = time.monotonic()
            failed_at = now if failed_at is None else failed_at
            pause = next_pause(number, now - failed_at)
            if pause is None:
                raise StorageError(f"{what}: {reason(error)}, for {PATIENCE_S:.0f} s") from error
            if not number or now - said_at >= SAID_EVERY_S:
                left = PATIENCE_S - (now - failed_at)
                logger.warning("%s: %s; it is tried again for %.0f s more, and nothing is lost", what, reason(error), left)
                said_at = now
            number += 1
            time.sleep(pause)
        else:
            if failed_at is not None:
                logger.warning("%s: done at last, after %.1f s", what, time.monotonic() - failed_at)
            return result


def first_whole(paths: Iterable[Path], read: Callable[[Path], T]) -> tuple[Path, T] | None:
    """The first that is not damaged, and what it holds; None where there is none. What is damaged stays and is said.

    UserError where one may well be whole, but cannot be read now, or by this gendist: then none is passed over.
    """
    for path in paths:
        try:
            return path, patiently(str(path), lambda path=path: read(path))  # type: ignore[misc]
        except UserError:
            raise
        except DAMAGE as error:
            said = reason(error)
            logger.warning("%s cannot be read and is passed over (%s: %s)", path, type(error).__name__, said)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({reason(error)})") from error
    return None


def next_pause(number: int, waited_s: float) -> float | None:
    """How long to wait after so many attempts that failed before this one; None where patience is at its end."""
    if waited_s >= PATIENCE_S:
        return None
    return min(FIRST_PAUSE_S * 2.0 ** min(number, 30), LONGEST_PAUSE_S, PATIENCE_S - waited_s)


def is_passing(error: Exception) -> bool:
    """Of a file system: whether a failure may pass by itself, or by somebody else's hand. A missing permission does not."""
    return isinstance(error, OSError) and error.errno in MAY_PASS


def reason(error: BaseException) -> str:
    """What went wrong, in one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    said = " ".join(str(error).split())
    return said[:300] or type(error).__name__
