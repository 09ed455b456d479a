"""The process in which Weights & Biases works beside a fit. `gendist.tracking` starts it and tells it what to send.

wandb asks for a key where it finds a terminal, waits for its server before a process may end, and takes what it has not sent
along when the process is killed. So it has a process that has no terminal, can be ended, and outlives a fit that is killed.
Nothing of gendist is imported here.

What comes in is a line of JSON each: the task, records ({"step": 3, "numbers": {...}}), and at last {"exit_code": 0}; input
that ends without it is that of a fit that was killed. What goes out: {"folder": name, "online": true} once a run has begun,
{"trouble": why} where something is not sent, {"ended": true}.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

Report = Callable[[dict[str, Any]], None]


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # which is also how wandb passes on that its page says stop
    out = os.dup(1)  # wandb's own service does not get this one, so that it ends with this process
    os.dup2(2, 1)

    def report(message: dict[str, Any]) -> None:
        with suppress(OSError):  # whoever fitted was killed
            os.write(out, json.dumps(message).encode() + b"\n")

    try:
        send(json.loads(sys.stdin.readline()), report)
        report({"ended": True})
    except Exception as error:
        report({"trouble": explained(error)})


def send(task: dict[str, Any], report: Report) -> None:
    refused = threading.Event()
    run = begun(task, report, refused)
    for record in task["earlier"]:  # what the server lacks of them, where whoever fitted was killed with it
        if record["step"] >= run.starting_step:
            run.log(record["numbers"], step=record["step"])
    exit_code = 1
    for line in sys.stdin:
        message = json.loads(line)
        if "exit_code" in message:
            exit_code = message["exit_code"]
            break
        if message["step"] >= run.starting_step:  # else the server has it: the fit went on from a checkpoint before it
            run.log(message["numbers"], step=message["step"])
    bound = threading.Timer(task["finish_timeout_s"], os._exit, [1])  # and wandb's service ends with this process
    bound.daemon = True
    bound.start()
    try:
        run.finish(exit_code=exit_code)
    except TimeoutError:
        report({"trouble": f"{server()} has not taken everything in {task['upload_timeout_s']:g} s"})
    else:
        if refused.is_set():
            report({"trouble": f"{server()} takes no more of this run"})
        elif not run.offline:
            mark_as_sent(task["run"])


def begun(task: dict[str, Any], report: Report, refused: threading.Event) -> Any:
    """A run of wandb. One that cannot begin online does offline, and the trouble is reported.

    refused  set when the server will take no more, of which wandb only warns
    """
    import wandb

    def warned(text: str, *_: Any, **__: Any) -> None:
        if "Fatal error" in text:
            refused.set()

    wandb.errors.term.termwarn = warned  # type: ignore[assignment]
    bounds = {"finish_timeout": task["upload_timeout_s"], "finish_timeout_raises": True}
    known = wandb.Settings.model_fields  # earlier versions lack them, and wait without an end, for which there is the timer
    settings = wandb.Settings(
        silent=True,
        console="off",
        disable_git=True,
        disable_code=True,
        save_code=False,
        x_disable_stats=True,
        x_disable_meta=True,
        x_disable_machine_info=True,
        init_timeout=task["init_timeout_s"],
        **{name: value for name, value in bounds.items() if name in known},
    )

    def begin(mode: Any) -> Any:
        run = wandb.init(**task["run"], mode=mode, resume="allow", settings=settings)
        report({"folder": os.path.basename(run.settings.sync_dir), "online": mode == "online"})
        return run

    if task["mode"] != "online":
        return begin(task["mode"])
    try:
        return begin("online")
    except Exception as error:
        report({"trouble": explained(error)})
        task["earlier"] = []  # they were sent, or lie in another folder to be sent
        wandb.teardown()  # its service still holds the run
        return begin("offline")


def mark_as_sent(run: dict[str, Any]) -> None:
    """What earlier attempts have kept: `wandb sync` would send it a second time, as further steps."""
    for file in Path(run["dir"], "wandb").glob(f"*run-*/run-{run['id']}.wandb"):
        with suppress(OSError):
            file.with_name(f"{file.name}.synced").touch()


def explained(error: Exception) -> str:
    """In one line, what is wrong and what to do."""
    reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__).strip()
    if key := os.environ.get("WANDB_API_KEY"):
        reason = reason.replace(key, "...")
    if "No API key configured" in reason:
        return "there is no key: set WANDB_API_KEY, or call `wandb login`"
    for status in ("401", "403"):
        if f"error {status}" in reason:
            return f"{server()} does not take the key ({status}): look at WANDB_API_KEY, or call `wandb login --relogin`"
    if any(words in reason for words in ("timed out", "deadline exceeded")):
        return f"{server()} does not answer: look at the network, and at WANDB_BASE_URL"
    return reason


def server() -> str:
    import wandb

    url = urlsplit(wandb.setup().settings.base_url)
    return url.netloc.rpartition("@")[2] or url.geturl()


if __name__ == "__main__":
    main()
