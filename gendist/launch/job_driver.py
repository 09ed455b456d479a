"""The process of a job that fits: `python -m gendist.launch.job_driver`, started and kept by `gendist.launch.job_keeper`.

What to do stands in a file of the job's package. It says what comes of it in marked lines (`job_lines.py`) and ends with 0, 2
after a mistake of the user's, or 130 where it was told to stop.
"""

from __future__ import annotations

import json
import logging
import netrc
import os
import signal
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from gendist.errors import UserError
from gendist.launch.job_keeper import INTERRUPTED
from gendist.launch.job_lines import JOB_FILE, say
from gendist.launch.job_versions import check_versions
from gendist.machine import versions

WANDB_HOST = "api.wandb.ai"
logger = logging.getLogger("gendist")


def main() -> int:
    signal.signal(signal.SIGTERM, _interrupt)
    signal.signal(signal.SIGINT, _interrupt)
    threading.Thread(target=_end_with_the_keeper, daemon=True).start()
    logger.handlers = [logging.StreamHandler(sys.stdout)]
    logger.setLevel(logging.INFO)
    try:
        _fit(json.loads(Path(JOB_FILE).read_text(encoding="utf-8")))
    except UserError as error:
        say("error", str(error), sys.stdout)
        if ray_cluster := sys.modules.get("gendist.ray_cluster"):
            ray_cluster.end_without_head(2)
        return 2
    except (ConnectionError, TimeoutError):  # which may pass: the keeper tries again
        raise
    except OSError as error:
        if error.errno is None:
            raise
        say("error", f"{error.strerror}" + (f": {error.filename}" if error.filename else ""), sys.stdout)
        return 2
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


def _fit(job: Mapping[str, Any]) -> None:
    check_versions(job["versions"], versions())
    # Only now: another version of a package may not have what is imported.
    try:
        import gendist
        from gendist.config import load_spec
        from gendist.launch.summary import summary, verbs
    except ModuleNotFoundError as error:
        raise UserError(
            f"the cluster's Python ({sys.executable}) has no package '{error.name}'; install what gendist needs on every node"
        ) from error

    spec = load_spec(job["spec"])
    if spec.tracking.wandb == "online" and not has_wandb_key(os.environ):
        logger.warning(
            "tracking.wandb is online, but there is no key: set WANDB_API_KEY where the cluster's head is started (a key is "
            "never sent with a job, whose settings everybody can read who reaches the cluster)"
        )
    run = gendist.fit(spec, run_dir=job["run_dir"], address="auto", watch=lambda record: say("record", record, sys.stdout))
    told = {"path": str(run.path), "summary": summary(spec, run), "verbs": verbs(run.model)}
    say("finished", told, sys.stdout)


def has_wandb_key(environment: Mapping[str, str]) -> bool:
    """Whether wandb would find one on this machine."""
    if environment.get("WANDB_API_KEY") or environment.get("WANDB_MODE") == "disabled":
        return True
    try:
        return netrc.netrc().authenticators(environment.get("WANDB_BASE_URL", WANDB_HOST).rpartition("/")[2]) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    """Once: the same comes from Ray and from the keeper, and a second one must not disturb the writing of a checkpoint."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt


def _end_with_the_keeper() -> None:
    """Without it nobody hears what is said here, and another attempt at the run waits for its lock."""
    os.read(sys.stdin.fileno(), 1)  # not by way of its buffer, whose lock would be held when Python ends
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
