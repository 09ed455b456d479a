#!/usr/bin/env python3
"""SLURM as cluster/slurm.sh sees it: `srun` starts a command on the nodes it is told, `scontrol` names them and notes what is
queued again. Nodes are hosts of cluster/testbed.py, or this machine, once for each.

FAKE_SLURM  a JSON file: {"nodes": {NAME: NETWORK NAMESPACE or null}, "requeued": FILE}
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType
from typing import Any


def main(program: str, arguments: list[str]) -> int:
    settings = json.loads(Path(os.environ["FAKE_SLURM"]).read_text())
    if program == "scontrol":
        match arguments:
            case ["show", "hostnames", names]:
                assert names == os.environ["SLURM_JOB_NODELIST"]
                print("\n".join(settings["nodes"]))
            case ["requeue", job]:
                Path(settings["requeued"]).write_text(job)
            case _:
                return 1
        return 0
    return srun(settings["nodes"], arguments)


def srun(nodes: dict[str, str | None], arguments: list[str]) -> int:
    options: dict[str, str] = {}
    while arguments and arguments[0].startswith("--"):
        name, _, value = arguments.pop(0).removeprefix("--").partition("=")
        options[name] = value
    known = {"overlap", "kill-on-bad-exit", "ntasks-per-node", "nodes", "ntasks", "nodelist", "exclude"}
    assert set(options) <= known, f"options that this fake does not know: {set(options) - known}"
    chosen = options["nodelist"].split(",") if "nodelist" in options else list(nodes)
    chosen = [name for name in chosen if name not in options.get("exclude", "").split(",")]
    assert len(chosen) == int(options["nodes"]) == int(options["ntasks"])
    processes = [subprocess.Popen([*on(nodes[name]), *arguments], start_new_session=True) for name in chosen]

    def hand_on(number: int, frame: FrameType | None) -> None:
        for process in processes:
            process.send_signal(number)

    signal.signal(signal.SIGTERM, hand_on)
    return max(process.wait() for process in processes)


def on(namespace: str | None) -> list[str]:
    return [] if namespace is None else ["nsenter", f"--net=/run/netns/{namespace}", "--"]


def installed(folder: Path, nodes: dict[str, str | None]) -> dict[str, str]:
    """The programs, in a folder, and the environment in which they stand for SLURM's in a job on these nodes."""
    bin_ = folder / "bin"
    bin_.mkdir()
    for program in ("srun", "scontrol"):
        script = bin_ / program
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{__file__}" {program} "$@"\n')
        script.chmod(0o755)
    settings: dict[str, Any] = {"nodes": nodes, "requeued": str(folder / "requeued")}
    (folder / "slurm.json").write_text(json.dumps(settings))
    return {
        "PATH": f"{bin_}:{os.environ['PATH']}",
        "FAKE_SLURM": str(folder / "slurm.json"),
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": f"node[0-{len(nodes) - 1}]",
        "SLURM_JOB_NUM_NODES": str(len(nodes)),
        "SLURM_CPUS_PER_TASK": "1",
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
