"""What the tests of a test bed set going on it: commands as a person gives them, how far they have come, and how they end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from testbed import Host, Testbed

ROOT = Path(__file__).parents[2]
PATIENCE_S = 240.0  # on a machine that is busy with other tests, too


def wait_until(true: Callable[[], bool], what: str, timeout_s: float = PATIENCE_S) -> None:
    until = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < until, f"after {timeout_s:.0f} s still not: {what}"
        time.sleep(0.05)


class Command:
    """`gendist ...` on a host of a bed, and its files in a folder; it is started again by `start`."""

    def __init__(self, host: Host, folder: Path, *arguments: str, out: Path):
        self.host, self.arguments, self.out = host, arguments, out
        self.log = folder / f"{out.name}.log"
        self.process: subprocess.Popen[Any] | None = None
        self.program = str(ROOT / "launch.py")

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = self.host.popen(sys.executable, self.program, *self.arguments, stdout=log, stderr=log)

    def progress(self) -> int:
        """The last iteration or step that is recorded; of parts, how many there are."""
        metrics = self.out / "metrics.jsonl"
        if not metrics.exists():
            return len(list(self.out.glob("part-*")))
        lines = metrics.read_text().rpartition("\n")[0].splitlines()
        last = json.loads(lines[-1]) if lines else {}
        return int(last.get("iteration", last.get("step", 0)))

    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def kill(self) -> None:
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def end(self, timeout_s: float = PATIENCE_S) -> int:
        """Wait for it; its exit code."""
        assert self.process is not None
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.out.name} does not end: {self.said()[-3000:]}") from None


def all_get_on(commands: Sequence[Command], by: int = 3) -> None:
    """Wait until each of them has got further than it is now."""
    before = [command.progress() for command in commands]

    def further() -> bool:
        for command in commands:
            assert command.is_running(), command.said()[-3000:]
        return all(command.progress() >= begun + by for command, begun in zip(commands, before, strict=True))

    wait_until(further, f"{[command.out.name for command in commands]} further than {before}, at "
               f"{[command.progress() for command in commands]}")  # fmt: skip


def kill_a_worker(bed: Testbed, names: Sequence[bytes]) -> None:
    """As the kernel does when memory is short: one that is at work, on any host but the head."""

    def is_killed() -> bool:
        pids = [pid for host in bed.hosts[1:] for pid in host.pids()]
        until = time.monotonic() + 1.0  # short tasks are looked for often, and new processes now and then
        while time.monotonic() < until:
            if any(kill_at(pid, names) for pid in pids):
                return True
            time.sleep(0.002)
        return False

    wait_until(is_killed, f"a worker at {names}")


def is_at(pid: int, names: Sequence[bytes]) -> bool:
    """Ray gives a worker the name of its task or actor."""
    try:
        return (Path("/proc") / str(pid) / "cmdline").read_bytes().startswith(tuple(names))
    except OSError:
        return False


def kill_at(pid: int, names: Sequence[bytes]) -> bool:
    """Kill a worker if it is at such a task; it is held meanwhile, so that the task does not end before it does."""
    if not is_at(pid, names):
        return False
    try:
        os.kill(pid, signal.SIGSTOP)
        at_work = is_at(pid, names)
        os.kill(pid, signal.SIGKILL if at_work else signal.SIGCONT)
    except ProcessLookupError:
        return False
    return at_work


def trace(run: Path) -> list[dict[str, Any]]:
    """The records of a run, without what a clock says."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key not in ("seconds", "samples_per_s")} for record in records]


def write_spec(folder: Path, name: str, spec: dict[str, Any]) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({"name": name, "tracking": {"wandb": "disabled"}, **spec}))
    return path
