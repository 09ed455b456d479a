"""Weights & Biases beside the run directory's own metrics.jsonl: where it is installed, and never at the price of a fit."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict

from gendist.run import Watch

PROJECT = "gendist"
INIT_TIMEOUT_S = 20.0  # for a server to answer at all; after that the run is kept offline
UPLOAD_TIMEOUT_S = 30.0  # for what is still to be sent when the fit ends
FINISH_TIMEOUT_S = 60.0  # for both, and for wandb itself: then it is ended
PATIENCE_S = 3.0  # before the wait is spoken of
logger = logging.getLogger("gendist")


class TrackingConfig(BaseModel):
    """
    wandb  of Weights & Biases, where it is installed: "offline" keeps a run that `wandb sync` can send later, "online" sends
           as it goes and needs a key, and keeps what it cannot send; "disabled" does nothing. The environment variable
           WANDB_MODE=disabled wins
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    wandb: Literal["offline", "online", "disabled"] = "offline"


class Tracked(Protocol):
    """What is tracked: a run directory."""

    @property
    def place(self) -> Path | str: ...
    @property
    def path(self) -> Path: ...
    @property
    def spec(self) -> Any: ...
    @property
    def is_finished(self) -> bool: ...
    @property
    def metrics_file(self) -> Path: ...
    def read_manifest(self) -> dict[str, Any]: ...


@contextmanager
def tracked(directory: Tracked | None, watch: Watch) -> Iterator[Watch]:
    """Yields what is to be called with each record, which calls `watch` in turn. Without a run directory nothing is tracked.

    wandb keeps its files in the run directory, and continues the run of the same manifest. It works in a process of its own:
    a fit waits neither for its start nor for a network, and a failure is a warning.
    """
    if directory is None or not _is_wanted(directory.spec.tracking):
        yield watch
        return
    sender = _Sender(directory)
    sender.start()

    def watch_and_track(record: dict[str, Any]) -> None:
        sender.messages.put(_message(record))
        watch(record)

    exit_code = 1
    try:
        yield watch_and_track
        exit_code = 0
    finally:
        sender.finish(exit_code)


def _is_wanted(config: TrackingConfig) -> bool:
    if config.wandb == "disabled" or os.environ.get("WANDB_MODE") == "disabled":
        return False
    if importlib.util.find_spec("wandb") is None:
        if config.wandb == "online":
            logger.warning("tracking.wandb is online, but wandb is not installed: pip install 'gendist[wandb]'")
        return False
    return True


class _Sender(threading.Thread):
    """Starts wandb's process at the first record, hands on what comes, and says what went wrong."""

    def __init__(self, directory: Tracked) -> None:
        super().__init__(name="wandb", daemon=True)
        self.directory = directory
        self.messages: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._earlier = _earlier(directory)
        self._process: subprocess.Popen[str] | None = None
        self._is_given_up = False
        self._begun: dict[str, Any] | None = None  # the folder of wandb's last run, and whether it is online

    def finish(self, exit_code: int) -> None:
        self.messages.put({"exit_code": exit_code})
        try:
            self.join(PATIENCE_S)
            if self.is_alive():
                logger.info("waiting for wandb, %.0f s at most", FINISH_TIMEOUT_S)
                self.join(FINISH_TIMEOUT_S - PATIENCE_S)
        finally:
            if self._process and self.is_alive():
                self._is_given_up = True
                self._process.kill()
                self.join()

    def run(self) -> None:
        try:
            trouble = self._send()
        except Exception as error:  # a fit is not lost to it
            trouble = str(error) or type(error).__name__
        if trouble:
            logger.warning("wandb: %s; %s", trouble, self._kept())

    def _send(self) -> str | None:
        """What went wrong."""
        message = self.messages.get()
        # A fit that fails before it begins leaves nothing; one that was killed behind its last record has that to send.
        if "exit_code" in message and (message["exit_code"] or not self._earlier):
            return None
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(Path(__file__).with_name("wandb_process.py"))],
            env={"WANDB_ERROR_REPORTING": "false", **os.environ},  # which would wait for the server, too
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,  # Ctrl-C is the fit's
        )
        with self._process as process:
            assert process.stdin
            assert process.stdout
            with suppress(BrokenPipeError), process.stdin as told:
                told.write(json.dumps(self._task()) + "\n")
                while True:
                    told.write(json.dumps(message) + "\n")
                    told.flush()
                    if "exit_code" in message:
                        break
                    message = self.messages.get()
            troubles, has_ended = [], False
            for line in process.stdout:
                said = json.loads(line)
                self._begun = said if "folder" in said else self._begun
                troubles += [said["trouble"]] if "trouble" in said else []
                has_ended |= "ended" in said
        if not troubles and not has_ended:
            if self._is_given_up:
                return f"it has not finished in {FINISH_TIMEOUT_S:.0f} s"
            return f"its process has ended with {process.returncode}"
        return troubles[0] if troubles else None

    def _task(self) -> dict[str, Any]:
        directory = self.directory
        spec = directory.spec
        run = {
            "project": os.environ.get("WANDB_PROJECT", PROJECT),
            "name": spec.name,
            "id": directory.read_manifest()["run_id"],
            "dir": str(directory.path.absolute()),
            "config": spec.model_dump(mode="json"),
        }
        bounds = {
            "init_timeout_s": INIT_TIMEOUT_S,
            "upload_timeout_s": UPLOAD_TIMEOUT_S,
            "finish_timeout_s": FINISH_TIMEOUT_S,
        }
        return {"mode": spec.tracking.wandb, "run": run, "earlier": self._earlier, **bounds}

    def _kept(self) -> str:
        if self._begun is None:
            return "metrics.jsonl has everything"
        sync = "wandb sync --include-online" if self._begun["online"] else "wandb sync"
        place, folder = self.directory.place, self._begun["folder"]
        if isinstance(place, str):
            return f"copy {place}/wandb/{folder} here, and send it with: {sync} {folder}"
        return f"send it later with: {sync} {place}/wandb/{folder}"


def _earlier(directory: Tracked) -> list[dict[str, Any]]:
    """What an unfinished run has recorded before, of which a server that was not reached in time lacks the end."""
    if directory.spec.tracking.wandb != "online" or directory.is_finished or not directory.metrics_file.exists():
        return []
    lines = directory.metrics_file.read_bytes().splitlines(keepends=True)
    try:
        return [_message(json.loads(line)) for line in lines if line.endswith(b"\n")]
    except (ValueError, KeyError):  # damaged: whoever fits says so
        return []


def _message(record: Mapping[str, Any]) -> dict[str, Any]:
    return {"step": record["step"] if "step" in record else record["iteration"], "numbers": _numbers(record)}


def _numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """What can be drawn of a record: nested numbers by dotted names, those of a restart by its own."""
    flat: dict[str, float] = {}
    for key, value in record.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}.{inside}": number for inside, number in _numbers(value).items()}
        elif isinstance(value, int | float) and not isinstance(value, bool):
            flat[key] = value
    restart = flat.pop("restart", 0)
    return {f"restart_{restart}.{key}": value for key, value in flat.items()} if restart else flat
