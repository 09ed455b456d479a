"""A file that several processes write, or that one was killed over, is that of one of them, whole."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gendist import atomic
from gendist.atomic import new_file, write_atomically
from gendist.protocols import UserError


def test_of_two_that_write_a_file_the_second_is_told(monkeypatch, tmp_path: Path):
    monkeypatch.setattr(atomic, "WAIT_S", 0.0)
    path = tmp_path / "samples.npy"
    with new_file(path) as first:
        first.write(b"first, and much of it")
        with pytest.raises(UserError, match="another process writes this file"), new_file(path) as second:
            second.write(b"second")
    assert path.read_bytes() == b"first, and much of it"
    write_atomically(path, "second")
    assert path.read_bytes() == b"second"
    assert [file.name for file in tmp_path.iterdir()] == ["samples.npy"]


def test_many_that_write_a_file_leave_one_of_theirs(tmp_path: Path):
    """Each waits for the others, also where the file that it has opened was finished by another meanwhile."""
    path, contents = tmp_path / "state", [bytes([65 + i]) * (1000 + 7 * i) for i in range(8)]
    together = threading.Barrier(8)

    def write(content: bytes) -> None:
        together.wait(60)
        for _ in range(20):
            write_atomically(path, content)

    with ThreadPoolExecutor(8) as threads:
        for done in [threads.submit(write, content) for content in contents]:
            done.result(60)
    assert path.read_bytes() in contents
    assert [file.name for file in tmp_path.iterdir()] == ["state"]


def test_what_a_killed_process_left_of_it_is_gone(tmp_path: Path):
    (tmp_path / ".state.unfinished").write_bytes(b"much more than there will be")
    write_atomically(tmp_path / "state", "little")
    assert (tmp_path / "state").read_bytes() == b"little"
