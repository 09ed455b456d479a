"""The process that keeps a fit at work, without a cluster: a stand-in is kept instead."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gendist.launch.job_keeper import MAX_ENDS, AfterEnd, after_end
from gendist.launch.job_lines import Message, Progress, heard, reached

KEEP = "import sys; from gendist.launch.job_keeper import Keeper; sys.exit(Keeper([sys.executable, sys.argv[1]]).keep())"
# Its n-th process has this number in `n`.
COUNTED = """
import os, signal, sys, threading, time
from gendist.launch.job_lines import say
with open("begun", "a") as file: file.write(f"{os.getpid()}\\n")
n = len(open("begun").readlines())
"""


@pytest.fixture
def keep(tmp_path):
    """Starts a keeper of a process with this program; whatever it starts is gone in the end."""
    started = []

    def start(program: str) -> subprocess.Popen:
        (tmp_path / "driver.py").write_text(COUNTED + program)
        command = [sys.executable, "-c", KEEP, "driver.py"]
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONUNBUFFERED": "1"}
        started.append(subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def pids(folder: Path, number: int) -> list[int]:
    """Of the processes that were kept, once there are so many."""
    deadline = time.monotonic() + 30
    while True:
        lines = (folder / "begun").read_text().split() if (folder / "begun").exists() else []
        if len(lines) >= number:
            return [int(line) for line in lines]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def has_gone(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"


@pytest.mark.parametrize(
    ("code", "told", "ends", "expected"),
    [
        (0, False, 1, AfterEnd.DONE),
        (2, False, 1, AfterEnd.DONE),
        (2, True, 1, AfterEnd.DONE),
        (130, True, 1, AfterEnd.STOPPED),
        (130, False, 1, AfterEnd.GO_ON),
        (130, False, MAX_ENDS, AfterEnd.GIVE_UP),
        (-15, False, 1, AfterEnd.GO_ON),
        (-15, True, 1, AfterEnd.STOPPED),
        (-9, False, 1, AfterEnd.GO_ON),
        (1, False, MAX_ENDS - 1, AfterEnd.GO_ON),
        (1, False, MAX_ENDS, AfterEnd.GIVE_UP),
        (-9, False, MAX_ENDS, AfterEnd.GIVE_UP),
    ],
)
def test_what_is_done_when_the_process_has_ended(code, told, ends, expected):
    assert after_end(code, told, ends) is expected


def test_progress_is_what_was_never_reached_before():
    progress = Progress()
    progress.num_ends = 2
    progress.saw({"iteration": 3})
    assert progress.num_ends == 0
    progress.num_ends = 2
    progress.saw({"iteration": 2})
    progress.saw({"iteration": 3})
    assert progress.num_ends == 2
    progress.saw({"step": 4})
    assert progress.num_ends == 0


def test_lines_of_a_log_and_messages_among_them():
    assert heard("reading data.csv") == ("reading data.csv", None)
    assert heard('@gendist {"record": {"iteration": 1}}') == ("", Message("record", {"iteration": 1}))
    assert heard('no end of a line@gendist {"begin": {}}') == ("no end of a line", Message("begin", {}))
    for strange in ("@gendist", "@gendist {", "@gendist []", '@gendist {"a": 1, "b": 2}', "@gendist 7"):
        assert heard(strange) == (strange, None)
    assert reached({"iteration": 12}, "100") == "iteration 12/100"
    assert reached({"step": 1200}) == "step 1,200"


def test_a_full_disk_with_the_log_holds_nobody_up(tmp_path):
    (tmp_path / "driver.py").write_text(COUNTED + "print('x' * 1_000_000, flush=True); sys.exit(0 if n > 1 else 1)")
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", KEEP, "driver.py"]
    with open("/dev/full", "wb") as full:
        ended = subprocess.run(
            command, cwd=tmp_path, env=environment, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60
        )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert len(pids(tmp_path, 2)) == 2


def test_what_dies_is_started_again_and_what_it_says_is_passed_on(keep, tmp_path):
    keeper = keep("""
say("record", {"iteration": n}, sys.stdout)
print("process", n, flush=True)
if n < 6: os.kill(os.getpid(), signal.SIGKILL)
""")
    out, _ = keeper.communicate(timeout=60)
    assert keeper.returncode == 0
    assert len(pids(tmp_path, 6)) == 6  # more often than without progress
    assert [line for line in out.splitlines() if line.startswith("process ")] == [f"process {n}" for n in range(1, 7)]
    assert out.count("was ended by SIGKILL; another one goes on from the newest checkpoint") == 5


def test_without_progress_it_is_given_up(keep, tmp_path):
    keeper = keep('say("record", {"iteration": 1}, sys.stdout)\nsys.exit(1)')
    out, _ = keeper.communicate(timeout=60)
    assert keeper.returncode == 1
    # The first process came further than nothing.
    assert len(pids(tmp_path, MAX_ENDS)) == MAX_ENDS
    assert heard(out.splitlines()[-1])[1].kind == "failed"


def test_a_mistake_of_the_users_is_not_made_again(keep, tmp_path):
    keeper = keep('say("error", "a misspelt key", sys.stdout)\nsys.exit(2)')
    out, _ = keeper.communicate(timeout=60)
    assert keeper.returncode == 2
    assert heard(out.splitlines()[-1])[1] == Message("error", "a misspelt key")
    assert len(pids(tmp_path, 1)) == 1


def test_told_to_stop_it_tells_the_process_and_waits_for_it(keep, tmp_path):
    keeper = keep("""
def stop(*_):
    time.sleep(0.5)
    open("left", "w").close()
    sys.exit(130)
signal.signal(signal.SIGTERM, stop)
open("ready", "w").close()
time.sleep(60)
""")
    deadline = time.monotonic() + 30
    while not (tmp_path / "ready").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    keeper.terminate()
    keeper.communicate(timeout=30)
    assert keeper.returncode == 130
    assert (tmp_path / "left").exists()


STOPS = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(130))\n"  # as the driver does, once it has left a checkpoint


def test_a_process_that_alone_is_told_to_end_is_started_again(keep, tmp_path):
    keeper = keep(STOPS + "if n == 1: os.kill(os.getpid(), signal.SIGTERM)\nprint('process', n, flush=True)\n")
    out, _ = keeper.communicate(timeout=60)
    assert keeper.returncode == 0
    assert len(pids(tmp_path, 2)) == 2
    assert "was told to stop by something else than this job; another one goes on from the newest checkpoint" in out
    assert "process 2" in out


def test_told_first_as_ray_tells_a_job_and_its_children_it_is_stopped(keep, tmp_path):
    keeper = keep(
        STOPS + "print('process', n, flush=True)\nos.kill(os.getppid(), signal.SIGTERM)\nos.kill(os.getpid(), signal.SIGTERM)\n"
    )
    out, _ = keeper.communicate(timeout=60)
    assert keeper.returncode == 130
    assert out.count("process ") == 1


def test_the_driver_ends_with_its_keeper(keep, tmp_path):
    keeper = keep("""
from gendist.launch.job_driver import _end_with_the_keeper
threading.Thread(target=_end_with_the_keeper, daemon=True).start()
time.sleep(60)
""")
    (driver,) = pids(tmp_path, 1)
    keeper.send_signal(signal.SIGKILL)
    keeper.communicate(timeout=30)
    deadline = time.monotonic() + 30
    while not has_gone(driver):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_it_is_not_held_up_by_what_a_dead_process_has_left_behind(keep, tmp_path):
    keeper = keep("""
import subprocess
if n == 1:
    left = subprocess.Popen(["sleep", "40"])
    open("left", "w").write(str(left.pid))
    os.kill(os.getpid(), signal.SIGKILL)
""")
    try:
        keeper.wait(timeout=20)
        assert keeper.returncode == 0
    finally:
        os.kill(int((tmp_path / "left").read_text()), signal.SIGKILL)
