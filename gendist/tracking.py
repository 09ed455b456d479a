"""Weights & Biases beside the run directory's own metrics.jsonl: where it is installed, and never at the price of a fit."""

from __future__ import annotations

import importlib.util
import logging
import os
import queue
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict

from gendist.run import Watch

PROJECT = "gendist"
FINISH_TIMEOUT_S = 60.0  # for what is still to be sent when the fit ends
logger = logging.getLogger("gendist")
Records = queue.SimpleQueue[dict[str, Any] | None]


class TrackingConfig(BaseModel):
    """
    wandb  of Weights & Biases, where it is installed: "offline" keeps a run that `wandb sync` can send later, "online" sends
           as it goes and needs a key, "disabled" does nothing. The environment variable WANDB_MODE=disabled wins
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    wandb: Literal["offline", "online", "disabled"] = "offline"


class Tracked(Protocol):
    """What is tracked: a run directory."""

    @property
    def path(self) -> Path: ...
    @property
    def spec(self) -> Any: ...
    def read_manifest(self) -> dict[str, Any]: ...


@contextmanager
def tracked(directory: Tracked | None, watch: Watch) -> Iterator[Watch]:
    """Yields what is to be called with each record, which calls `watch` in turn. Without a run directory nothing is tracked.

    wandb keeps its files in the run directory, and continues the run of the same manifest. It works in a thread of its own:
    a fit waits neither for its start nor for a network, and a failure is a warning.
    """
    if directory is None or not _is_wanted(directory.spec.tracking):
        yield watch
        return
    records: Records = queue.SimpleQueue()
    thread = threading.Thread(target=_send, args=(records, directory), name="wandb", daemon=True)
    thread.start()

    def watch_and_track(record: dict[str, Any]) -> None:
        records.put(record)
        watch(record)

    try:
        yield watch_and_track
    finally:
        records.put(None)
        thread.join(FINISH_TIMEOUT_S)
        if thread.is_alive():
            logger.warning("wandb has not finished in %.0f s and is left behind; the fit is whole", FINISH_TIMEOUT_S)


def _is_wanted(config: TrackingConfig) -> bool:
    if config.wandb == "disabled" or os.environ.get("WANDB_MODE") == "disabled":
        return False
    if importlib.util.find_spec("wandb") is None:
        if config.wandb == "online":
            logger.warning("tracking.wandb is online, but wandb is not installed: pip install 'gendist[wandb]'")
        return False
    return True


def _send(records: Records, directory: Tracked) -> None:
    """What the thread does, until a None comes."""
    record = records.get()  # a fit that fails before it begins leaves nothing
    if record is None:
        return
    try:
        import wandb

        ours = wandb.run is None
        run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=directory.spec.name,
            id=directory.read_manifest()["run_id"],
            resume="allow",
            mode=directory.spec.tracking.wandb,
            dir=str(directory.path),
            config=directory.spec.model_dump(mode="json"),
            reinit="create_new",
            settings=_quiet(wandb),
        )
        while record is not None:
            run.log(_numbers(record), step=record["step"] if "step" in record else record["iteration"])
            record = records.get()
        run.finish()
        if ours:
            wandb.teardown()  # its service is a process of its own
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        logger.warning("wandb has failed (%s); metrics.jsonl has everything", reason)


def _quiet(wandb: Any) -> Any:
    """Nothing on the console, no look at the machine, the code or the repository."""
    return wandb.Settings(
        silent=True,
        console="off",
        disable_git=True,
        disable_code=True,
        save_code=False,
        x_disable_stats=True,
        x_disable_meta=True,
        x_disable_machine_info=True,
    )


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
