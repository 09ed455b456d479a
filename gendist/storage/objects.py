"""Objects in a store that fsspec knows: whole ones are written, read, listed and removed. Nothing else is asked of a store, so
that any will do: no name is changed, nothing is appended, nothing locked, and an object that was half-written is not believed.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from gendist.errors import UserError
from gendist.secrets_in_urls import require_no_secret, without_secrets
from gendist.storage.patience import patiently, reason

T = TypeVar("T")
URL = re.compile(r"^[A-Za-z][A-Za-z0-9+.:-]*://")
BROKEN_URL = re.compile(r"^(?!file:)[a-z][a-z0-9+-]+:/(?!/)")  # what pathlib makes of one
FOLDERS = ("file://", "local://")  # another way to write a path

# That no patience mends: what is said is wrong, or may not be done.
LASTING = (PermissionError, FileNotFoundError, NotADirectoryError, IsADirectoryError, FileExistsError, ImportError,
           NotImplementedError, TypeError, ValueError, AttributeError, KeyError)  # fmt: skip


def place_of(given: str | Path) -> Path | str:
    """Where something is kept: a path of this machine's file system, or a URL of another, without a slash at its end.

    UserError where a URL holds credentials, which would be written down and shown, or is none that can be written to.
    """
    text = str(given)
    if isinstance(given, Path) or not URL.match(text):
        if isinstance(given, Path) and BROKEN_URL.match(text):
            shown = without_secrets(text.replace(":/", "://", 1))
            raise UserError(f"{shown}: a URL that was made a path, which loses a slash; give it as text")
        return Path(given)
    check_url(text)
    for scheme in FOLDERS:
        if text.startswith(scheme):
            return Path(text.removeprefix(scheme))
    scheme = text[: text.index("://") + 3]
    return scheme + text.removeprefix(scheme).rstrip("/")


def below(given: str | Path, name: str) -> str:
    """Where something of this name is kept that is in such a place."""
    place = place_of(given)
    return str(place / name) if isinstance(place, Path) else f"{place}{'' if place.endswith('/') else '/'}{name}"


def path_here(given: str | Path, option: str) -> Path:
    """The path of what is written in this machine's file system alone. UserError where a URL of a store is given."""
    text = str(given)
    if BROKEN_URL.match(text):
        text = text.replace(":/", "://", 1)
    if is_url(text):
        raise UserError(
            f"{option} {without_secrets(text)}: a URL, and only files and folders of this machine can be written; give a path, "
            "and copy what is there to the store"
        )
    return Path(place_of(text))


def absolute(given: str | Path) -> str:
    """Where something is kept, as a process in another folder may say it, too."""
    place = place_of(given)
    return place if isinstance(place, str) else os.path.abspath(place)


def check_url(url: str) -> None:
    """UserError where a URL holds credentials, which are not repeated, or is none of a folder."""
    require_no_secret(url, "the place of a run")
    if urlsplit(url).query:
        raise UserError(f"{without_secrets(url)}: a folder has no question mark behind it")
    if "::" in url:
        raise UserError(f"{url}: a chain of file systems; a run is kept in one")


def is_url(place: str | Path) -> bool:
    """Whether something lies in a store, and not in this machine's file system."""
    return isinstance(place, str) and URL.match(place) is not None and not place.startswith(FOLDERS)


@dataclass(frozen=True)
class Storage:
    """The objects below a URL, by names such as "artifact/model.json". A value, which may travel to other machines.

    What fails is asked again for a while (`patiently`), and then a `StorageError`; what does not get better by waiting, such as
    a missing permission, package or credentials, is a UserError at once.

    is_patient  whether to ask again
    """

    url: str
    is_patient: bool = True

    def read(self, name: str) -> bytes | None:
        """The bytes of an object; None where there is no such."""
        system, root = _opened(self.url)

        def read() -> bytes | None:
            try:
                return bytes(system.cat_file(f"{root}/{name}"))
            except FileNotFoundError:
                return None

        return self._do(name, read)

    def write(self, name: str, content: bytes) -> None:
        system, root = _opened(self.url)

        def write() -> None:
            with tempfile.NamedTemporaryFile(prefix="gendist-") as file:
                file.write(content)
                file.flush()
                system.put_file(file.name, f"{root}/{name}")

        self._do(name, write)

    def upload(self, path: Path, name: str) -> None:
        """Make a file an object."""
        system, root = _opened(self.url)
        self._do(name, lambda: system.put_file(str(path), f"{root}/{name}"))

    def download(self, name: str, path: Path) -> None:
        """Make an object a file; FileNotFoundError where there is no such, UserError where its name leads out of a folder."""
        if any(part in ("", "..") for part in name.split("/")):
            raise UserError(f"{self.url}: {name!r} is no name of a file below it: gendist has not written it")
        system, root = _opened(self.url)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._do(name, lambda: system.get_file(f"{root}/{name}", str(path)), FileNotFoundError)

    def names(self, folder: str = "") -> list[str]:
        """Of all objects, or of those below a folder."""
        system, root = _opened(self.url)
        place = f"{root}/{folder}" if folder else root

        def names() -> list[str]:
            system.invalidate_cache()
            try:
                return sorted(str(path) for path in system.find(place))
            except FileNotFoundError:
                return []

        # A store may write the root otherwise in what it lists, such as with a slash before it.
        found = self._do(folder or ".", names)
        names_ = (path.partition(f"{root.strip('/')}/")[2] for path in found)
        return [name for name in names_ if name]

    def remove(self, names: Iterable[str]) -> None:
        """Those that are not there are none to remove."""
        system, root = _opened(self.url)

        def remove(name: str) -> None:
            with suppress(FileNotFoundError):
                system.rm_file(f"{root}/{name}")

        for name in names:
            self._do(name, lambda name=name: remove(name))  # type: ignore[misc]

    def _do(self, name: str, act: Callable[[], T], *expected: type[Exception]) -> T:
        what = f"{self.url}/{name}"
        try:
            return patiently(what, act, lambda error: self.is_patient and may_pass(error))
        except UserError:
            raise
        except Exception as error:
            if isinstance(error, expected):
                raise
            raise UserError(f"{self.url}: {explained(error)}") from error


def may_pass(error: Exception) -> bool:
    """Of a store. Its clients raise errors of many kinds; most are those of a network."""
    return not isinstance(error, LASTING) and not _is_of_credentials(error)


def explained(error: Exception) -> str:
    """In one line why a store does not do what it is asked."""
    if isinstance(error, ImportError):
        return f"{reason(error)} (on every node that shall reach it)"
    if _is_of_credentials(error):
        return f"no credentials ({reason(error)}); they belong in the environment of every node"
    if isinstance(error, PermissionError):
        return f"no permission ({reason(error)})"
    if isinstance(error, FileNotFoundError):
        return f"no such bucket or folder ({reason(error)})"
    return f"{type(error).__name__}: {reason(error)}"


def _is_of_credentials(error: Exception) -> bool:
    """Clients have classes of their own for these, which gendist does not import."""
    return any("Credentials" in kind.__name__ for kind in type(error).__mro__)


@cache
def _opened(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path in it. UserError where fsspec has none, or its package is missing."""
    import fsspec

    check_url(url)
    try:
        system, root = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise UserError(f"{url}: {explained(error)}") from error
    return system, str(root).rstrip("/")
