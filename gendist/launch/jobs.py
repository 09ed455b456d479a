"""`submit`, `status`, `logs`, `stop`: a fit as a job on a Ray cluster, which goes on without the machine that submitted it."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console

from gendist.config import Spec, flat
from gendist.launch.arguments import command
from gendist.launch.job_keeper import INTERRUPTED, MAX_ENDS
from gendist.launch.job_lines import Message, Progress, heard, reached
from gendist.launch.job_package import PACKAGE, Package, package
from gendist.launch.job_versions import check_versions
from gendist.launch.progress import fit_progress
from gendist.launch.ray_jobs import AlreadyThere, RayJobs, Unknown, Unreachable
from gendist.launch.submission import (
    Attach,
    Attempt,
    End,
    Finished,
    Resume,
    Start,
    State,
    decide,
    end_of,
    find,
    kept_in,
    newest_attempts,
    require_workers,
    run_id,
    state_of,
)
from gendist.launch.summary import next_steps
from gendist.machine import versions
from gendist.protocols import UserError

ENTRYPOINT = "exec python -m gendist.launch.job_keeper"
STOP_WAIT_S = 120  # for a checkpoint, between SIGTERM and SIGKILL
RECONNECT_S = 60.0
PAUSE_S = 1.0
RACES = 5  # lost against others who submit the same
LAST_LINES = 100  # of a log, among which the newest record is looked for
GIVEN_UP = 1

T = TypeVar("T")
Tell = Callable[[str], None]


class Lost(Exception):
    """The connection to the cluster, for longer than is waited for."""


@dataclass
class Followed:
    """What a job has said so far."""

    progress: Progress = field(default_factory=Progress)
    error: str | None = None
    finished: dict[str, Any] | None = None

    def hear(self, message: Message) -> None:
        match message.kind:
            case "record":
                self.progress.saw(message.value)
            case "error" | "failed":
                self.error = message.value
            case "finished":
                self.finished = message.value


@dataclass(frozen=True)
class Submission:
    """A fit that somebody wants to be done on a cluster."""

    spec: Spec
    run_dir: str
    jobs: RayJobs
    tell: Tell

    @classmethod
    def of(cls, spec: Spec, run_dir: str | None, address: str | None, tell: Tell) -> Submission:
        """UserError where it could not be done on any cluster, or not on this one."""
        require_workers(spec)
        submission = cls(spec, kept_in(spec, run_dir), RayJobs.at(address), tell)
        submission._package()
        check_versions(versions(), submission.jobs.versions())
        return submission

    def begin(self, again: bool = False) -> Attempt:
        """The job that does it: a new one, one that is at work, or one that has done it."""
        run = run_id(self.spec, self.run_dir)
        for _ in range(RACES):
            match decide(run, self.jobs.attempts(), again):
                case Attach(attempt):
                    self.tell(f"{attempt.submission_id} is {attempt.state.value}; attached{self._differing(attempt)}")
                    return attempt
                case Finished(attempt):
                    self.tell(
                        f"{attempt.submission_id} is finished, in {self.run_dir}; nothing to do (where it was removed, --again "
                        f"fits it once more){self._other_files(attempt)}"
                    )
                    return attempt
                case Resume(submission_id, broken):
                    said = f"{broken.submission_id} was {state_of(broken)}; {submission_id} goes on in {self.run_dir}"
                case Start(submission_id):
                    said = f"submitted {submission_id}, which is kept in {self.run_dir}"
            try:
                self._submit(submission_id)
            except AlreadyThere:
                continue
            self.tell(said)
            return Attempt(submission_id, State.PENDING)
        raise UserError(f"{run}: others submit and stop the same all the time; look at `{command()} status`")

    def _differing(self, attempt: Attempt) -> str:
        """What is no part of a run's identity, and other than what the job was submitted with."""
        there, wanted = json.loads(attempt.said("how") or "{}"), self._how()
        other = [f"{key}={there[key]}, not {wanted[key]}" for key in wanted if key in there and there[key] != wanted[key]]
        has = f" (it has {'; '.join(other)}; to change that, stop it and submit again)" if other else ""
        return has + self._other_files(attempt)

    def _how(self) -> dict[str, Any]:
        """Where and how it computes, by dotted keys; but where the run is kept, which is told apart."""
        return {key: value for key, value in flat(self.spec.surroundings()).items() if key != "cluster.storage"}

    def _other_files(self, attempt: Attempt) -> str:
        if attempt.said("files") in (None, self._package().digest()):
            return ""
        return "; the files of this folder that it was sent have changed since, and are not looked at"

    def _submit(self, submission_id: str) -> None:
        with tempfile.TemporaryDirectory(prefix="gendist-job-") as folder:
            packed = self._package()
            packed.write(Path(folder), Path.cwd())
            goal = getattr(self.spec.fit, "num_steps", None) or getattr(self.spec.fit, "max_iterations", "")
            try:
                self.jobs.submit(
                    submission_id,
                    ENTRYPOINT,
                    {
                        "gendist_name": self.spec.name,
                        "gendist_run_dir": self.run_dir,
                        "gendist_goal": str(goal),
                        "gendist_how": json.dumps(self._how()),
                        "gendist_files": packed.digest(),
                    },
                    {
                        "working_dir": folder,
                        "py_modules": [str(PACKAGE)],
                        "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S)},
                    },
                )
            except Unreachable:
                # Whether it has come there is not known: what has, is not submitted once more.
                try:
                    self.jobs.attempt(submission_id)
                except (Unknown, Unreachable):
                    pass
                else:
                    return
                raise

    def _package(self) -> Package:
        return package(self.spec, self.run_dir, versions())

    def follow(self, attempt: Attempt, console: Console) -> int:
        """Show what the job says until it ends, and go on with another where it is lost; the exit code.

        UserError where the job has met a mistake of the user's. Lost where the cluster is not reached any more.
        """
        followed = Followed()
        with fit_progress(console, self.spec.fit) as watch:
            while True:
                ended = self._hear(attempt, followed, console, watch)
                end = End.LOST if ended is None else end_of(ended)
                if end is not End.LOST:
                    break
                followed.progress.num_ends += 1
                if followed.progress.num_ends >= MAX_ENDS:
                    break
                console.print(f"{attempt.submission_id} was lost with its node or process", highlight=False)
                attempt = reconnecting(self.begin)
        if end is End.FINISHED:
            self.tell_what_came(followed.finished)
        elif end is End.REFUSED:
            raise UserError(followed.error or "the job was refused; its log says more")
        else:
            said = "was stopped" if end is End.STOPPED else f"has failed: {followed.error or _first_line(ended)}"
            print(
                f"error: {attempt.submission_id} {said}; what was reached is kept: the same command goes on from there",
                file=sys.stderr,
            )
        return {End.FINISHED: 0, End.STOPPED: INTERRUPTED}.get(end, GIVEN_UP)

    def _hear(
        self, attempt: Attempt, followed: Followed, console: Console, watch: Callable[[dict[str, Any]], None]
    ) -> Attempt | None:
        """How the job has ended; None where the cluster does not know it any more, as after a restart of its head."""
        followed.error = followed.finished = None
        preamble: list[str] | None = []  # what Ray says before the job begins, of interest where it does not
        try:
            for line in follow(self.jobs, attempt.submission_id):
                text, message = heard(line)
                if message is not None:
                    followed.hear(message)
                    if message.kind == "record":
                        watch(message.value)
                    preamble = None if message.kind == "begin" else preamble
                if text.strip():
                    if preamble is None:
                        console.print(text.rstrip(), highlight=False, markup=False, soft_wrap=True)
                    else:
                        preamble.append(text)
            ended = reconnecting(lambda: self.jobs.attempt(attempt.submission_id))
        except Unknown:
            return None
        if end_of(ended) is End.FAILED:
            for text in preamble or ():
                console.print(text.rstrip(), highlight=False, markup=False, soft_wrap=True)
        return ended

    def tell_what_came(self, finished: dict[str, Any] | None) -> None:
        """What the driver said in the end; nothing where its log is gone."""
        if finished is None:
            return
        for line in finished["summary"]:
            self.tell(line)
        self.tell("")
        for line in next_steps(finished["verbs"], command(), finished["path"]):
            self.tell(line)


def follow(jobs: RayJobs, submission_id: str) -> Iterator[str]:
    """The lines of a job's log from the beginning until the job has ended. A lost connection is made again, for a while.

    Lost where that was in vain, Unknown where the cluster does not know the job.
    """
    num_seen, begun = 0, ""  # characters, and a line without its end
    lost_at: float | None = None
    while True:
        try:
            position, has_ended = 0, False
            for piece in jobs.tail(submission_id):
                if piece is None:
                    # The head may never learn that the node with the log is gone: so the job's state is looked at, too. Where
                    # it has ended, its last lines have the time until the next silence to come.
                    if has_ended:
                        break
                    has_ended, lost_at = jobs.attempt(submission_id).state.has_ended, None
                    continue
                lost_at = None
                *lines, begun = (begun + piece[max(0, num_seen - position) :]).split("\n")
                position += len(piece)
                num_seen = max(num_seen, position)
                yield from lines
            if jobs.attempt(submission_id).state.has_ended:
                if begun:
                    yield begun
                return
        except Unreachable as error:
            lost_at = lost_at or time.monotonic()
            if time.monotonic() - lost_at > RECONNECT_S:
                raise Lost(str(error)) from error
        time.sleep(PAUSE_S)


def submit(spec: Spec, run_dir: str | None, address: str | None, is_detached: bool, again: bool, tell: Tell) -> int:
    """What `gendist submit` does; the exit code."""
    submission = Submission.of(spec, run_dir, address, tell)
    attempt = None
    try:
        attempt = submission.begin(again)
        if attempt.state is State.FINISHED:
            submission.tell_what_came(last_word(submission.jobs, attempt))
            return 0
        if is_detached:
            tell(how_to_look_after(attempt.run_id, submission.jobs))
            return 0
        return submission.follow(attempt, Console(stderr=True))
    except KeyboardInterrupt:
        run = attempt.run_id if attempt else run_id(spec, submission.run_dir)
        said = "detached" if attempt else "interrupted while the job was submitted, which may have come there; if so,"
        print(f"\n{said}{';' if attempt else ''} {how_to_look_after(run, submission.jobs)}", file=sys.stderr)
        return INTERRUPTED
    except Lost as error:
        assert attempt is not None
        print(f"error: {error}; {how_to_look_after(attempt.run_id, submission.jobs)}", file=sys.stderr)
        return GIVEN_UP


def reconnecting(ask: Callable[[], T]) -> T:
    """What is answered; where nothing is, asked again for a while, and then Lost."""
    until = time.monotonic() + RECONNECT_S
    while True:
        try:
            return ask()
        except Unreachable as error:
            if time.monotonic() > until:
                raise Lost(str(error)) from error
        time.sleep(PAUSE_S)


def last_word(jobs: RayJobs, attempt: Attempt) -> dict[str, Any] | None:
    """What a finished job said in the end, where its log still has it."""
    said = [
        message for _, message in map(heard, jobs.last_lines(attempt, LAST_LINES)) if message and message.kind == "finished"
    ]
    return said[-1].value if said else None


def how_to_look_after(job: str, jobs: RayJobs) -> str:
    """job  the id of a run, which stands for its newest attempt"""
    where = "" if os.environ.get("RAY_API_SERVER_ADDRESS") == jobs.address else f" --address {jobs.address}"
    program = command()
    return (
        f"the job goes on\n  attach:   the same command\n  see it:   {program} status {job}{where}\n"
        f"  its log:  {program} logs {job}{where} --follow\n  stop it:  {program} stop {job}{where}"
    )


def status(name_or_id: str | None, address: str | None) -> list[str]:
    """What `gendist status` shows: the newest attempt at each run; of one run all of them, and what its job said last."""
    jobs = RayJobs.at(address)
    jobs.versions()
    attempts = jobs.attempts()
    if name_or_id is None:
        return (
            _table([_row(jobs, attempt, attempt.submission_id) for attempt in newest_attempts(attempts)])
            if attempts
            else ["no jobs of gendist there"]
        )
    meant = find(attempts, name_or_id)
    same = sorted((attempt for attempt in attempts if attempt.run_id == meant.run_id), key=lambda attempt: attempt.number)
    lines = _table([_row(jobs, attempt, attempt.name_alone) for attempt in same])
    said = [text for text, _ in map(heard, jobs.last_lines(meant, LAST_LINES)) if text.strip()]
    return [*lines, "", *said[-5:]] if said else lines


def logs(name_or_id: str, address: str | None, is_followed: bool, tell: Tell) -> int:
    """What `gendist logs` does: the log of a job, with its records as metrics.jsonl has them."""
    jobs = RayJobs.at(address)
    jobs.versions()
    attempt = find(jobs.attempts(), name_or_id)
    lines = follow(jobs, attempt.submission_id) if is_followed else jobs.log(attempt.submission_id).splitlines()
    try:
        for line in lines:
            tell(shown(line))
    except Lost as error:
        print(f"error: {error}; {how_to_look_after(attempt.run_id, jobs)}", file=sys.stderr)
        return GIVEN_UP
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


def stop(name_or_id: str, address: str | None, tell: Tell) -> int:
    """What `gendist stop` does: the job leaves a checkpoint and ends, or is ended after a while."""
    jobs = RayJobs.at(address)
    jobs.versions()
    attempt = find(jobs.attempts(), name_or_id)
    if attempt.state.has_ended:
        tell(f"{attempt.submission_id} is {state_of(attempt)}; nothing to do")
        return 0
    jobs.stop(attempt.submission_id)
    tell(f"{attempt.submission_id} is told to leave a checkpoint and stop (within {STOP_WAIT_S} s)")
    until = time.monotonic() + STOP_WAIT_S + RECONNECT_S
    while time.monotonic() < until:
        with suppress(Unreachable):
            attempt = jobs.attempt(attempt.submission_id)
        if attempt.state.has_ended:
            kept = "; submitted again, it goes on from where it was" if end_of(attempt) is not End.FINISHED else ""
            tell(f"{attempt.submission_id} is {state_of(attempt)}{kept}")
            return 0
        time.sleep(PAUSE_S)
        if attempt.state is State.PENDING:  # there was nobody yet to hear it
            with suppress(Unreachable):
                jobs.stop(attempt.submission_id)
    tell(f"{attempt.submission_id} has not ended yet; `{command()} status {attempt.submission_id}` says when it has")
    return GIVEN_UP


def shown(line: str) -> str:
    """A line of a log for people and for `jq`."""
    text, message = heard(line)
    if message is None or message.kind == "begin":
        return text
    if message.kind == "finished":
        return "\n".join(message.value["summary"])
    return text + (json.dumps(message.value) if message.kind == "record" else f"error: {message.value}")


def _row(jobs: RayJobs, attempt: Attempt, job: str) -> tuple[str, ...]:
    records = [
        message.value
        for _, message in map(heard, jobs.last_lines(attempt, LAST_LINES))
        if message is not None and message.kind == "record"
    ]
    return (
        attempt.name,
        state_of(attempt),
        str(attempt.number),
        datetime.fromtimestamp(attempt.started_s).strftime("%Y-%m-%d %H:%M"),
        reached(records[-1], attempt.said("goal")) if records else "-",
        attempt.said("run_dir") or "-",
        job,
    )


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    rows = [("name", "state", "attempt", "started", "reached", "run directory", "job"), *rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _first_line(attempt: Attempt | None) -> str:
    lines = (attempt.message if attempt else "").strip().splitlines()
    return lines[0][:300] if lines else "its log says more"
