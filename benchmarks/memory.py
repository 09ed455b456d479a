"""How benchmarks measure memory: what a process and all that descend from it hold at their peak, while it does some work.

The work is a function of the script that calls `main_or_measured`, in a process of its own, which says when it is ready and
waits for the word. Again and again, 20 ms between, the PSS of /proc/PID/smaps_rollup is added up: memory that several
processes share (the object store) is counted once. Linux only.
"""

from __future__ import annotations

import json
import os
import resource
import select
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

MIB = 2**20
SAMPLE_EVERY_S = 0.02
FIT_TIMEOUT_S = 3600


# The measured process.


def fit_gendist(wanted: dict[str, Any]) -> None:
    import gendist

    tell_ready()
    gendist.fit(wanted)


def fit_capped(cap_mib: int, warm_up: dict[str, Any], wanted: dict[str, Any]) -> None:
    """With no more than the cap of writable memory beyond what the imports and a small fit left; a MemoryError otherwise."""
    import gendist

    gendist.fit(warm_up)
    status = Path("/proc/self/status").read_text().split()
    held_bytes = int(status[status.index("VmData:") + 1]) * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (held_bytes + cap_mib * MIB,) * 2)
    tell_ready()
    gendist.fit(wanted)


def tell_ready() -> None:
    print("ready", flush=True)
    sys.stdin.readline()


def main_or_measured(main: Callable[[], None], *works: Callable[..., None]) -> None:
    """What a script ends with: it measures, or it is the process that is measured, and does one of the works."""
    measured = {work.__name__: work for work in (fit_gendist, fit_capped, *works)}
    if len(sys.argv) == 3 and sys.argv[1] in measured:
        measured[sys.argv[1]](*json.loads(sys.argv[2]))
    else:
        main()


# The measuring process.


def memory_mib(root: int) -> float:
    """The PSS of a process and of all that descend from it."""
    children: dict[int, list[int]] = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            try:
                # "PID (NAME) STATE PPID", and the name may hold anything.
                parent = int(Path(entry.path, "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:  # it has ended
                continue
            children.setdefault(parent, []).append(int(entry.name))
    total_kib, waiting = 0, [root]
    while waiting:
        process = waiting.pop()
        waiting += children.get(process, [])
        try:
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().split()
            total_kib += int(lines[lines.index("Pss:") + 1])
        except (OSError, ValueError):  # it has ended
            continue
    return total_kib / 1024


def peak_mib(work: Callable[..., None], *arguments: Any) -> tuple[float, float]:
    """(when ready, at its peak) of this script at this work. CalledProcessError where it fails."""
    command = [sys.executable, sys.argv[0], work.__name__, json.dumps(arguments)]
    # Arrow's default allocator reserves a gigabyte at once, which a limit of writable memory counts as taken.
    environment = os.environ | {"ARROW_DEFAULT_MEMORY_POOL": "system"} if work is fit_capped else None
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdin is not None
    assert process.stdout is not None
    with process:
        if process.stdout.readline() != "ready\n":
            raise subprocess.CalledProcessError(process.wait(FIT_TIMEOUT_S), command[:3])
        ready = peak = memory_mib(process.pid)
        process.stdin.write("go\n")
        process.stdin.flush()
        while not select.select([process.stdout], [], [], SAMPLE_EVERY_S)[0]:  # readable when it ends
            peak = max(peak, memory_mib(process.pid))
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command[:3])
    return ready, peak


def told_of_capped(cap_mib: int, warm_up: dict[str, Any], wanted: dict[str, Any]) -> str:
    """What became of a fit in one process that may hold no more than the cap."""
    try:
        ready, peak = peak_mib(fit_capped, cap_mib, warm_up, wanted)
        return f"was fitted; its peak was {peak - ready:.0f} MiB"
    except subprocess.CalledProcessError as error:
        return f"FAILED (exit code {error.returncode})"
