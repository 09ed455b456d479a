"""What is to be done when somebody submits a fit, or a job has ended: pure decisions, from what the cluster says of the jobs.

A run is told by its resolved spec and the directory that it is kept in, so that the same command means the same run. Each
attempt at it is a job of its own: `gendist-NAME-HASH`, `gendist-NAME-HASH-2`, ...
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from gendist.config import Spec
from gendist.launch.arguments import require_lasting
from gendist.launch.job_keeper import INTERRUPTED
from gendist.protocols import UserError
from gendist.storage import is_url, place_of

# How Ray calls it when the process that holds a job is gone, with its node say; anything else that it calls an error would
# happen again.
LOST = (
    "JOB_SUPERVISOR_ACTOR_DIED",
    "JOB_SUPERVISOR_ACTOR_UNKNOWN_FAILURE",
    "JOB_SUPERVISOR_ACTOR_START_FAILURE",
)


def run_id(spec: Spec, run_dir: str) -> str:
    """The id of a run, and of the first attempt at it."""
    said = json.dumps([spec.identity(), run_dir], sort_keys=True)
    return f"gendist-{spec.name}-{hashlib.sha256(said.encode()).hexdigest()[:12]}"


def kept_in(spec: Spec, run_dir: str | None) -> str:
    """Where a submitted run is kept: the same for every machine of the cluster, or UserError."""
    run_dir = run_dir or spec.place_in_storage
    if run_dir is None:
        raise UserError(
            "no run directory: give --run-dir (a folder that all nodes of the cluster share, or a URL such as "
            "s3://bucket/runs/NAME), or cluster.storage in the spec"
        )
    place = place_of(require_lasting(run_dir))
    if isinstance(place, Path):
        place = os.path.normpath(place)  # one folder is one run, however it is called
    if not is_of_the_cluster(place):
        raise UserError(
            f"{run_dir}: a relative path means nothing on a cluster; give the absolute path of a folder that all nodes share, "
            "or a URL such as s3://bucket/runs/NAME"
        )
    return place


def require_workers(spec: Spec) -> None:
    """UserError where the fit would compute in one process, which is not what a cluster is for."""
    if spec.cluster.num_workers == 0:
        raise UserError(
            "cluster.num_workers is 0, which computes in one process; say how many workers of the cluster are to do it, "
            "such as cluster.num_workers=4"
        )


def is_of_the_cluster(path: str) -> bool:
    """Whether a path is one of the cluster's machines: absolute, or a URL. Any other is of the machine that submits."""
    return is_url(path) or path.removeprefix("file://").removeprefix("local://").startswith("/")


class State(Enum):
    PENDING = "pending"
    RUNNING = "running"
    STOPPED = "stopped"
    FINISHED = "finished"
    FAILED = "failed"

    @property
    def has_ended(self) -> bool:
        return self not in (State.PENDING, State.RUNNING)


@dataclass(frozen=True)
class Attempt:
    """One job.

    exit_code   of its process, where that ended by itself
    error_type  Ray's word for what else ended it
    message     what Ray says about it
    metadata    what was said of it when it was submitted
    node_id     where its process was started
    """

    submission_id: str
    state: State
    exit_code: int | None = None
    error_type: str | None = None
    message: str = ""
    started_s: float = 0.0
    metadata: Mapping[str, str] | None = None
    node_id: str | None = None

    @property
    def run_id(self) -> str:
        return re.sub(r"(-[0-9a-f]{12})-\d+$", r"\1", self.submission_id)

    @property
    def number(self) -> int:
        later = re.search(r"-[0-9a-f]{12}-(\d+)$", self.submission_id)
        return int(later[1]) if later else 1

    @property
    def name_alone(self) -> str:
        """That of no other attempt: of the first the id is that of the run, too, which stands for the newest."""
        return f"{self.run_id}-{self.number}"

    def said(self, key: str) -> str | None:
        return (self.metadata or {}).get(f"gendist_{key}")

    @property
    def name(self) -> str:
        return self.said("name") or self.submission_id


@dataclass(frozen=True)
class Start:
    """There is no attempt yet, or a finished one is to be looked at again."""

    submission_id: str


@dataclass(frozen=True)
class Attach:
    attempt: Attempt


@dataclass(frozen=True)
class Resume:
    """Another attempt in the directory of a broken one."""

    submission_id: str
    broken: Attempt


@dataclass(frozen=True)
class Finished:
    attempt: Attempt


def decide(run: str, attempts: Iterable[Attempt], again: bool = False) -> Start | Attach | Resume | Finished:
    """What a submission of a run means, given all jobs of the cluster.

    again   submit a finished run once more: its driver looks whether the run directory still holds it
    """
    ours = sorted((attempt for attempt in attempts if attempt.run_id == run), key=lambda attempt: attempt.number)
    if not ours:
        return Start(run)
    running = [attempt for attempt in ours if not attempt.state.has_ended]
    if running:
        return Attach(running[-1])
    newest = ours[-1]
    following = f"{run}-{newest.number + 1}"
    if newest.state is State.FINISHED:
        return Start(following) if again else Finished(newest)
    return Resume(following, newest)


class End(Enum):
    """What it means that a job has ended."""

    FINISHED = "finished"
    STOPPED = "stopped"
    REFUSED = "refused"  # a mistake of the user's, which the driver told
    FAILED = "failed"
    LOST = "lost"  # its process or its node is gone: another attempt goes on


def end_of(attempt: Attempt) -> End:
    code = attempt.exit_code
    if attempt.state is State.FINISHED:
        return End.FINISHED
    if attempt.state is State.STOPPED or code == INTERRUPTED:
        return End.STOPPED
    if code == 2:
        return End.REFUSED
    is_killed = code is not None and (code < 0 or code > 128)
    return End.LOST if is_killed or attempt.error_type in LOST else End.FAILED


def state_of(attempt: Attempt) -> str:
    """What people are told of it: where it has ended, what that means."""
    return end_of(attempt).value if attempt.state.has_ended else attempt.state.value


def find(attempts: Sequence[Attempt], name_or_id: str) -> Attempt:
    """The job that is meant: by its id, or by the name of its spec the newest attempt. UserError where it is not one."""
    for attempt in attempts:
        if attempt.name_alone == name_or_id:
            return attempt
    meant = newest_attempts(attempt for attempt in attempts if name_or_id in (attempt.name, attempt.run_id))
    at_work = [attempt for attempt in meant if not attempt.state.has_ended] or meant
    if len(at_work) == 1:
        return at_work[0]
    if at_work:
        ids = ", ".join(attempt.submission_id for attempt in at_work)
        raise UserError(f"'{name_or_id}' is the name of several runs; name one of {ids}")
    names = ", ".join(sorted({attempt.name for attempt in attempts})) or "none"
    raise UserError(f"no job '{name_or_id}' on this cluster; there are: {names}")


def newest_attempts(attempts: Iterable[Attempt]) -> list[Attempt]:
    """Of each run the newest attempt, the run that began last at the end."""
    newest: dict[str, Attempt] = {}
    for attempt in sorted(attempts, key=lambda attempt: attempt.number):
        newest[attempt.run_id] = attempt
    return sorted(newest.values(), key=lambda attempt: attempt.started_s)
