"""Whether a place is one that several machines share: each leaves a mark there and looks for those of all others."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gendist.atomic import write
from gendist.errors import UserError
from gendist.storage.objects import Storage, place_of
from gendist.storage.patience import reason

MARK = ".check-"  # what its name begins with
SEEN_WITHIN_S = 5.0  # a shared folder may be slow to show what another machine wrote


@dataclass(frozen=True)
class Marks:
    """Those of one look at a place.

    place  a path or a URL
    key    of this look alone
    """

    place: str
    key: str

    def leave(self, name: str) -> str | None:
        """Leave a mark from this machine; why that cannot be done, or None."""
        try:
            place = place_of(self.place)
            if isinstance(place, str):
                Storage(place, is_patient=False).write(self._called(name), name.encode())
            elif not place.is_dir():
                return "no such folder there: it is not shared"
            else:
                write(place / self._called(name), name.encode())
        except (OSError, UserError) as error:
            return self._why(error, "cannot be written")
        return None

    def missing(self, names: Sequence[str]) -> str | None:
        """Which marks this machine does not see, as a reason; None where it sees all."""
        unseen = list(names)
        began = time.monotonic()
        while True:
            try:
                unseen = [name for name in unseen if self._read(name) != name.encode()]
            except (OSError, UserError) as error:
                return self._why(error, "cannot be read")
            if not unseen:
                return None
            if time.monotonic() - began > SEEN_WITHIN_S:
                return f"what {unseen[0]} has written is not seen there: it is not shared"
            time.sleep(0.1)

    def remove(self, names: Sequence[str]) -> None:
        """From this machine, as far as it can."""
        place = place_of(self.place)
        try:
            if isinstance(place, str):
                Storage(place, is_patient=False).remove([self._called(name) for name in names])
                return
            for name in names:
                (place / self._called(name)).unlink(missing_ok=True)
        except (OSError, UserError):
            return

    def _read(self, name: str) -> bytes | None:
        place = place_of(self.place)
        if isinstance(place, str):
            return Storage(place, is_patient=False).read(self._called(name))
        return _content(place / self._called(name))

    def _called(self, name: str) -> str:
        return f"{MARK}{self.key}-{name}"

    def _why(self, error: Exception, what: str) -> str:
        said = reason(error).removeprefix(f"{self.place}: ")
        return f"{what} ({said})"


def _content(path: Path) -> bytes | None:
    try:
        os.stat(path.parent)  # which lets a network file system look again
        return path.read_bytes()
    except FileNotFoundError:
        return None
