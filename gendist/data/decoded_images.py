"""Images that a fit has decoded, so that whoever looks at them again, in whichever process of the machine, need not.

They lie in a file without a name, which is gone when the process that made it ends, however it ends. Another process opens it
through that one's descriptors; where it cannot, as on another machine, it decodes for itself.
"""

from __future__ import annotations

import os
import secrets
import tempfile
import weakref
from typing import Any

import numpy as np

Pixels = np.ndarray[Any, np.dtype[np.uint8]]

TOKEN_BYTES = 16  # at the beginning: a descriptor of this number may be of another file elsewhere


class DecodedImages:
    """num_rows images of num_pixels bytes each, of which some are there.

    The file: the token, for each row a byte that is 1 where it is there, and the pixels.
    """

    def __init__(self, num_rows: int, num_pixels: int) -> None:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
        self._open(descriptor, secrets.token_bytes(TOKEN_BYTES), f"/proc/{os.getpid()}/fd/{descriptor}", num_rows, num_pixels)
        os.pwrite(descriptor, self._token, 0)
        os.truncate(descriptor, self._place(num_rows))  # takes no room before something is written

    def _open(self, descriptor: int | None, token: bytes, path: str, num_rows: int, num_pixels: int) -> None:
        self._descriptor, self._token, self._path = descriptor, token, path
        self._num_rows, self._num_pixels = num_rows, num_pixels
        if descriptor is not None:
            weakref.finalize(self, os.close, descriptor)

    def __reduce__(self) -> tuple[Any, ...]:
        return _found, (self._token, self._path, self._num_rows, self._num_pixels)

    def _place(self, row: int) -> int:
        return TOKEN_BYTES + self._num_rows + row * self._num_pixels

    def get(self, start: int, stop: int) -> Pixels | None:
        """(stop - start, num_pixels) of these rows, or None where one is not there."""
        are_there = b"\1" * (stop - start)
        if self._descriptor is None or os.pread(self._descriptor, stop - start, TOKEN_BYTES + start) != are_there:
            return None
        pixels, at = bytearray((stop - start) * self._num_pixels), 0
        while at < len(pixels):  # a read ends early beyond 2 GB
            at += os.preadv(self._descriptor, [memoryview(pixels)[at:]], self._place(start) + at)
        return np.frombuffer(pixels, dtype=np.uint8).reshape(stop - start, self._num_pixels)

    def put(self, start: int, pixels: Pixels) -> None:
        """Keep the pixels of the rows from `start` on; on a full disk, nothing from now on."""
        if self._descriptor is None:
            return
        whole, at = pixels.tobytes(), 0
        try:
            while at < len(whole):
                at += os.pwrite(self._descriptor, memoryview(whole)[at:], self._place(start) + at)
            os.pwrite(self._descriptor, b"\1" * len(pixels), TOKEN_BYTES + start)
        except OSError:
            self._descriptor = None


def _found(token: bytes, path: str, num_rows: int, num_pixels: int) -> DecodedImages:
    """In another process: the same file where that can be opened, else one that holds nothing and keeps nothing."""
    images = DecodedImages.__new__(DecodedImages)
    descriptor: int | None = None
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        if os.pread(descriptor, TOKEN_BYTES, 0) != token:
            os.close(descriptor)
            descriptor = None
    except OSError:
        pass
    images._open(descriptor, token, path, num_rows, num_pixels)
    return images
