"""The folder of a server goes with it; that of one that was killed, with the next; and nothing else."""

from __future__ import annotations

import os

from gendist.serve.own_folder import LOCK, PREFIX, own_folder


def test_a_folder_goes_with_its_server_and_no_earlier(tmp_path):
    with own_folder(tmp_path) as first:
        (first / "file").touch()
        with own_folder(tmp_path) as second:
            assert first != second
            assert (first / "file").exists()
        assert not second.exists()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_server_left_is_removed(tmp_path):
    left = tmp_path / f"{PREFIX}left"
    left.mkdir()
    (left / LOCK).touch()
    with own_folder(tmp_path):
        assert not left.exists()


def test_what_others_laid_there_is_not_touched(tmp_path):
    """A folder without a lock, a pipe in the place of it (which must not be waited for), and links."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / LOCK).touch()
    without, with_pipe, with_link, link = (tmp_path / f"{PREFIX}{name}" for name in ("a", "b", "c", "d"))
    for folder in (without, with_pipe, with_link):
        folder.mkdir()
    os.mkfifo(with_pipe / LOCK)
    (with_link / LOCK).symlink_to(elsewhere / LOCK)
    link.symlink_to(elsewhere)
    with own_folder(tmp_path):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {"elsewhere", *(f"{PREFIX}{name}" for name in "abcd")}
    assert (elsewhere / LOCK).exists()
