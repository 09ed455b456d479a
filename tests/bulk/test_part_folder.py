"""A folder of parts: stopped at any moment the same command ends in the same bytes; what is not its own it leaves alone."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from power_cut import PowerCut, cut_power_at

from gendist import bulk
from gendist.bulk.part_folder import PartFolder
from gendist.config import ClusterConfig
from gendist.data import DataConfig
from gendist.folder_lock import locked
from gendist.launch import cli
from gendist.protocols import UserError


def content(folder: Path) -> dict[str, bytes]:
    """Every file but the lock."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def write(verb: str, folder: Path, out: Path, **options) -> bulk.Written:
    if verb == "sample":
        return bulk.sample(folder / "run", 800, out, seed=2, **options)
    return bulk.score(folder / "run", DataConfig(path=str(folder / "data.parquet")), out, **options)


VERBS = pytest.mark.parametrize("verb", ["sample", "score"])


@VERBS
def test_power_cut_at_any_moment_ends_in_the_same_bytes(monkeypatch, folder, tmp_path, verb):
    with monkeypatch.context() as counting:
        calls = cut_power_at(counting, 10**9)
        unbroken = write(verb, folder, tmp_path / "unbroken")
    assert calls[0] > 3 * 16
    for number in range(1, calls[0] + 1):
        out = tmp_path / str(number)
        with monkeypatch.context() as dying:
            cut_power_at(dying, number)
            with pytest.raises(PowerCut):
                write(verb, folder, out)
        success = (out / "_SUCCESS").exists()
        assert success == (number == calls[0]), "the mark of completion comes last"
        resumed = write(verb, folder, out)
        assert content(out) == content(tmp_path / "unbroken"), number
        assert resumed.sums == unbroken.sums
        assert resumed.was_finished == success


@pytest.mark.parametrize("number", [1, 3, 20, 30])
def test_power_cut_twice(monkeypatch, folder, tmp_path, number):
    write("sample", folder, tmp_path / "unbroken")
    for _ in range(2):
        with monkeypatch.context() as dying:
            cut_power_at(dying, number)
            with pytest.raises(PowerCut):
                write("sample", folder, tmp_path / "out")
    write("sample", folder, tmp_path / "out")
    assert content(tmp_path / "out") == content(tmp_path / "unbroken")


def call(monkeypatch, capsys, *arguments: object) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["gendist", *map(str, arguments)])
    try:
        cli.main()
        code = 0
    except SystemExit as exit_:
        code = int(exit_.code or 0)
    return code, *capsys.readouterr()


def fill_disk_at(monkeypatch, number: int) -> None:
    """Let the number-th file that is written find no room, and all after it."""
    calls, original = [0], os.fsync

    def fsync(descriptor):
        if not os.path.isdir(f"/proc/self/fd/{descriptor}"):
            calls[0] += 1
            if calls[0] >= number:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize("number", [1, 2, 9, 26, 27])
def test_a_full_disk_is_one_line_and_loses_nothing(monkeypatch, capsys, folder, tmp_path, number):
    write("sample", folder, tmp_path / "unbroken")
    command = ["sample", folder / "run", "-n", 800, "--seed", 2, "--out", tmp_path / "out"]
    with monkeypatch.context() as full:
        fill_disk_at(full, number)
        code, _, err = call(full, capsys, *command)
    assert code == 2
    (line,) = [line for line in err.splitlines() if line.strip()]
    assert line.startswith("error: ")
    assert "No space left on device" in line
    parts = [path for path in (tmp_path / "out").iterdir() if path.name != ".lock"] if (tmp_path / "out").exists() else []
    assert len(parts) == number - 1
    assert "_SUCCESS" not in {path.name for path in parts}
    assert not list(tmp_path.rglob("*unfinished"))
    kept = {path: path.stat().st_mtime_ns for path in parts}
    assert call(monkeypatch, capsys, *command)[0] == 0
    assert content(tmp_path / "out") == content(tmp_path / "unbroken")
    assert {path: path.stat().st_mtime_ns for path in kept} == kept, "what was there is not made again"


def test_a_full_disk_leaves_no_part_of_a_single_file(monkeypatch, capsys, folder, tmp_path):
    out = tmp_path / "all.parquet"
    out.write_bytes(b"what stood there")
    with monkeypatch.context() as full:
        fill_disk_at(full, 1)
        code, _, err = call(full, capsys, "sample", folder / "run", "-n", 800, "--out", out)
    assert code == 2
    assert err.splitlines()[-1] == f"error: No space left on device: {out}"
    assert content(tmp_path) == {"all.parquet": b"what stood there"}


@VERBS
def test_ctrl_c_says_how_to_go_on(monkeypatch, capsys, folder, tmp_path, verb):
    command = {
        "sample": ["sample", folder / "run", "-n", 800, "--seed", 2],
        "score": ["score", folder / "run", folder / "data.parquet"],
    }[verb]
    original = PartFolder.add

    def add(self, index, part):
        if index == 5:
            raise KeyboardInterrupt
        original(self, index, part)

    with monkeypatch.context() as pressing:
        pressing.setattr(PartFolder, "add", add)
        code, _, err = call(pressing, capsys, *command, "--out", tmp_path / "out")
    assert code == 130
    assert err.splitlines()[-1] == "error: interrupted; what was reached is kept: the same command goes on from there"
    assert len(list((tmp_path / "out").glob("*.parquet"))) == 5
    code, resumed, _ = call(monkeypatch, capsys, *command, "--out", tmp_path / "out")
    assert code == 0
    code, unbroken, _ = call(monkeypatch, capsys, *command, "--out", tmp_path / "unbroken")
    assert content(tmp_path / "out") == content(tmp_path / "unbroken")
    assert resumed.replace("/out", "") == unbroken.replace("/unbroken", "")  # the mean is that of all rows


PROGRAM = """
import os, signal, sys
from gendist import bulk
from gendist.bulk import parts
from gendist.config import ClusterConfig
from gendist.data import DataConfig
parts.MIN_PART_BYTES = 64
verb, folder, out, num_workers, address = sys.argv[1:]
def watch(done, num_rows):
    if done > num_rows / 3:
        os.kill(os.getpid(), signal.SIGKILL)
where = dict(cluster=ClusterConfig(num_workers=int(num_workers)), address=address or None, watch=watch)
if verb == "sample":
    bulk.sample(folder + "/run", 800, out, seed=2, **where)
else:
    bulk.score(folder + "/run", DataConfig(path=folder + "/data.parquet"), out, **where)
"""


def kill(verb: str, folder: Path, out: Path, num_workers: int = 0, address: str = "") -> None:
    command = [sys.executable, "-c", PROGRAM, verb, str(folder), str(out), str(num_workers), address]
    assert subprocess.run(command, timeout=120, capture_output=True).returncode == -signal.SIGKILL
    names = {path.name for path in out.iterdir()}
    assert "_request.json" in names
    assert "part-00000000.parquet" in names
    assert "_SUCCESS" not in names


@VERBS
def test_a_killed_process_is_followed_by_another(folder, tmp_path, verb):
    kill(verb, folder, tmp_path / "out")
    write(verb, folder, tmp_path / "out")
    write(verb, folder, tmp_path / "unbroken")
    assert content(tmp_path / "out") == content(tmp_path / "unbroken")


@pytest.mark.ray
@VERBS
def test_a_driver_killed_on_a_cluster_is_followed_with_other_workers(cluster, folder, tmp_path, verb):
    kill(verb, folder, tmp_path / "out", 2, cluster.address)
    write(verb, folder, tmp_path / "out", cluster=ClusterConfig(num_workers=3))
    write(verb, folder, tmp_path / "unbroken")
    assert content(tmp_path / "out") == content(tmp_path / "unbroken")


def test_a_finished_folder_says_so_and_changes_nothing(monkeypatch, capsys, folder, tmp_path):
    command = ["score", folder / "run", folder / "data.parquet", "--out", tmp_path / "out"]
    _, first, _ = call(monkeypatch, capsys, *command)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    with monkeypatch.context() as read_only:
        cut_power_at(read_only, 1)
        # No Ray is started either: nothing answers at this address.
        code, again, _ = call(read_only, capsys, *command, "cluster.num_workers=1", "--address", "127.0.0.1:1")
    assert code == 0
    assert again == f"{tmp_path / 'out'} is finished; nothing to do\n{first}"
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


@VERBS
@pytest.mark.parametrize(("how", "finished"), [("cut", False), ("empty", False), ("gone", False), ("gone", True)])
def test_a_part_that_a_disk_lost_is_made_again(folder, tmp_path, verb, how, finished):
    first = write(verb, folder, tmp_path / "out")
    expected = content(tmp_path / "out")
    part = tmp_path / "out" / "part-00000003.parquet"
    if how == "gone":
        part.unlink()
    else:
        part.write_bytes(part.read_bytes()[: -20 if how == "cut" else 0])
    if not finished:
        (tmp_path / "out" / "_SUCCESS").unlink()
    again = write(verb, folder, tmp_path / "out")
    assert content(tmp_path / "out") == expected
    assert again == first


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    ("change", "different"),
    [
        ({"seed": 3}, "seed"),
        ({"offset": 1}, "offset"),
        ({"num_samples": 801}, "num_samples"),
        ({"given": "left"}, "given"),
        ({"artifact": "other"}, "artifact"),
        ({"seed": 3, "given": "2"}, "seed, given"),
    ],
)
def test_another_request_is_refused(folder, tmp_path, finished, change, different):
    request = {"num_samples": 800, "seed": 2}
    write("sample", folder, tmp_path / "out")
    if not finished:
        (tmp_path / "out" / "_SUCCESS").unlink()
        (tmp_path / "out" / "part-00000009.parquet").unlink()
    before = content(tmp_path / "out")
    with pytest.raises(UserError, match=rf"another request \(different: {different}") as caught:
        bulk.sample(**{**request, **change, "artifact": folder / change.get("artifact", "run"), "out": tmp_path / "out"})
    assert "\n" not in str(caught.value)
    assert content(tmp_path / "out") == before


def test_other_data_columns_or_verb_are_refused(folder, tmp_path):
    data = tmp_path / "data.parquet"
    shutil.copy(folder / "data.parquet", data)
    bulk.score(folder / "run", DataConfig(path=str(data)), tmp_path / "out")
    assert bulk.score(folder / "run", DataConfig(path=str(data)), tmp_path / "out").was_finished
    with pytest.raises(UserError, match=r"different: columns\)"):
        bulk.score(folder / "run", DataConfig(path=str(data), columns=("b", "a", "c")), tmp_path / "out")
    with pytest.raises(UserError, match="different: verb"):
        write("sample", folder, tmp_path / "out")
    moved = tmp_path / "mounted_elsewhere"
    moved.mkdir()
    data.rename(moved / "data.parquet")
    assert bulk.score(folder / "run", DataConfig(path=str(moved / "data.parquet")), tmp_path / "out").was_finished
    frame = pd.read_parquet(moved / "data.parquet")
    frame.iloc[0, 0] += 1
    frame.to_parquet(moved / "data.parquet", index=False)
    with pytest.raises(UserError, match=r"different: data\)"):
        bulk.score(folder / "run", DataConfig(path=str(moved / "data.parquet")), tmp_path / "out")


def test_files_of_something_else_are_refused_and_kept(folder, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="holds files of something else"):
        write("sample", folder, tmp_path)
    (tmp_path / "plain").write_text("a file")
    with pytest.raises(UserError, match="a file without a suffix"):
        write("sample", folder, tmp_path / "plain")
    assert content(tmp_path) == {"thesis.tex": b"years of work", "plain": b"a file"}


def test_scores_are_not_put_among_the_data(folder, tmp_path):
    shutil.copy(folder / "data.parquet", tmp_path / "data.parquet")
    with pytest.raises(UserError, match="lies inside the data"):
        bulk.score(folder / "run", DataConfig(path=str(tmp_path)), tmp_path / "scores")
    assert list(content(tmp_path)) == ["data.parquet"]


@pytest.mark.parametrize("name", ["_request.json", "_SUCCESS"])
@pytest.mark.parametrize("damage", [b"", b"[", b"{}", b"\xff\xfe"])
def test_a_damaged_folder_is_told_in_one_line(folder, tmp_path, name, damage):
    write("sample", folder, tmp_path / "out")
    (tmp_path / "out" / name).write_bytes(damage)
    with pytest.raises(UserError, match=f"{name}: damaged") as caught:
        write("sample", folder, tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_two_processes_cannot_work_in_one_folder(folder, tmp_path):
    with locked(tmp_path / "out"), pytest.raises(UserError, match="another process is at work"):
        write("sample", folder, tmp_path / "out")
    write("sample", folder, tmp_path / "out")


def test_what_another_machine_began_is_gone_on_with_and_said(monkeypatch, caplog, folder, tmp_path):
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr("gendist.bulk.part_folder.machine_type", lambda: {"cpu": "abacus"})
        cut_power_at(elsewhere, 20)
        with pytest.raises(PowerCut):
            write("sample", folder, tmp_path / "out")
    write("sample", folder, tmp_path / "out")
    assert "another machine" in caplog.text
