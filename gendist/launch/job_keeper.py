"""The entrypoint of a job: keeps a fit at work until it ends by itself, though its process be killed or crash.

`python -m gendist.launch.job_keeper` starts `gendist.launch.job_driver` in the same folder, passes on what it says, and starts
it again where it dies; the run directory has what it goes on from. Ray itself does not: a job is lost with its driver (ray
#64104). The process that holds on is small, and imports neither torch nor ray.
"""

from __future__ import annotations

import importlib.util
import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from enum import Enum
from types import FrameType
from typing import Any

from gendist.launch.job_lines import Progress, heard, say

DRIVER = (sys.executable, "-m", "gendist.launch.job_driver")
INTERRUPTED = 130  # the exit code of what was told to stop: the shell's after Ctrl-C, and typer's
STDOUT = 1
MAX_ENDS = 3  # before its time, without progress in between
PAUSE_S = 1.0
REST_S = 2.0  # for what an ended process has still said: one that it left behind may hold the pipe open


class _Log(io.RawIOBase):
    """The log of the job. Where its disk is full, what is said is lost, and the rest goes on."""

    def writable(self) -> bool:
        return True

    def write(self, said: Any) -> int:
        left = bytes(said)
        with suppress(OSError):
            while left:
                left = left[os.write(STDOUT, left) :]
        return len(said)


class AfterEnd(Enum):
    DONE = "done"
    STOPPED = "stopped"
    GO_ON = "go on"
    GIVE_UP = "give up"


def after_end(code: int, was_told_to_stop: bool, num_ends: int) -> AfterEnd:
    """What is done when the process has ended.

    code      its exit code; negative: the signal that ended it
    num_ends  how often it has ended before its time without having come further, this one included
    """
    if code in (0, 2):  # 2 is a mistake of the user's, which would be made again
        return AfterEnd.DONE
    if was_told_to_stop:  # which Ray tells this process before that one; whatever else ended that one alone is no wish to stop
        return AfterEnd.STOPPED
    return AfterEnd.GO_ON if num_ends < MAX_ENDS else AfterEnd.GIVE_UP


class Keeper:
    """Of one job."""

    def __init__(self, driver: Sequence[str] = DRIVER):
        self._driver = driver
        self._log = io.TextIOWrapper(io.BufferedWriter(_Log()), encoding="utf-8", write_through=True)
        self._progress = Progress()
        self._was_told_to_stop = False
        self._process: subprocess.Popen[bytes] | None = None

    def keep(self) -> int:
        """The exit code of the job."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        say("begin", {}, self._log)
        if importlib.util.find_spec("ray") is None:
            say(
                "error",
                f"the cluster's `python` ({sys.executable}) has no Ray: start the head with the environment activated that has "
                "it, so that it comes first in PATH",
                self._log,
            )
            return 2
        while True:
            code = self._run()
            self._progress.num_ends += 1
            match after_end(code, self._was_told_to_stop, self._progress.num_ends):
                case AfterEnd.DONE:
                    return code
                case AfterEnd.STOPPED:
                    return INTERRUPTED
                case AfterEnd.GIVE_UP:
                    how_often = f"{MAX_ENDS} times without having come further"
                    say("failed", f"the process of the fit {_how(code)}, {how_often}; its log says more", self._log)
                    return 1
                case AfterEnd.GO_ON:
                    again = "another one goes on from the newest checkpoint"
                    print(f"the process of the fit {_how(code)}; {again}", file=self._log, flush=True)
                    time.sleep(PAUSE_S)

    def _run(self) -> int:
        """Start the process and wait for its end. It ends with this one: its standard input is closed then."""
        if self._was_told_to_stop:
            return INTERRUPTED
        # Without buffers, whose locks the thread would hold at the end, where something keeps the pipe open.
        self._process = subprocess.Popen(
            self._driver, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=0
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        if self._was_told_to_stop:  # just now
            self._process.terminate()
        passing_on = threading.Thread(target=self._pass_on, args=(self._process.stdout.fileno(),), daemon=True)
        passing_on.start()
        code = self._process.wait()
        self._process.stdin.close()
        passing_on.join(REST_S)
        if not passing_on.is_alive():
            self._process.stdout.close()
        return code

    def _pass_on(self, pipe: int) -> None:
        begun = b""
        while said := os.read(pipe, 1 << 16):
            self._log.buffer.write(said)
            self._log.buffer.flush()
            *lines, begun = (begun + said).split(b"\n")
            for line in lines:
                _, message = heard(line.decode(errors="replace"))
                if message is not None and message.kind == "record":
                    self._progress.saw(message.value)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        """Hand it on. Ray sends the signal to all processes of a job itself; others may know of this one only."""
        self._was_told_to_stop = True
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()


def _how(code: int) -> str:
    if code == INTERRUPTED:
        return "was told to stop by something else than this job"
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"


if __name__ == "__main__":
    sys.exit(Keeper().keep())
