"""What a submission means, without a cluster."""

from __future__ import annotations

import pytest

from gendist.config import load_spec
from gendist.launch.job_versions import check_versions
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
from gendist.protocols import UserError

SPEC = {"name": "two", "family": "gmm", "model": {"num_components": 2}, "data": {"path": "data.csv"}}
RUN = "gendist-two-0123456789ab"


def attempt(number: int, state: State, run: str = RUN, **others) -> Attempt:
    metadata = {"gendist_name": run.split("-")[1]}
    return Attempt(run if number == 1 else f"{run}-{number}", state, metadata=metadata, **others)


def test_the_same_spec_in_the_same_directory_is_the_same_run():
    spec = load_spec(SPEC)
    here = run_id(spec, "/shared/two")
    assert here.startswith("gendist-two-")
    assert here == run_id(load_spec(SPEC, ["cluster.num_workers=7", "cluster.storage=s3://elsewhere"]), "/shared/two")
    assert here != run_id(load_spec(SPEC, ["seed=1"]), "/shared/two")
    assert here != run_id(spec, "/shared/other")


def test_where_a_run_is_kept():
    spec = load_spec(SPEC)
    assert kept_in(spec, "/shared/two/") == kept_in(spec, "file:///shared/two") == "/shared/two"
    assert kept_in(spec, "/shared/../shared/./two") == kept_in(spec, "file:///shared//two/.") == "/shared/two"
    assert kept_in(load_spec(spec.model_dump(), ["cluster.storage=s3://bucket/runs/"]), None) == "s3://bucket/runs/two"
    assert kept_in(load_spec(spec.model_dump(), ["cluster.storage=s3://bucket/runs"]), "/else") == "/else"
    for run_dir, said in (
        (None, "give --run-dir"),
        ("runs/two", "a relative path means nothing on a cluster"),
        ("memory://two", "in the memory of this process"),
        ("file://runs/two", "a relative path means nothing on a cluster"),
        ("s3://key:secret@bucket/two", "comes with a password before the host"),
    ):
        with pytest.raises(UserError, match=said) as told:
            kept_in(spec, run_dir)
        assert "secret" not in str(told.value)


@pytest.mark.parametrize("state", [State.PENDING, State.RUNNING])
def test_what_is_at_work_is_attached_to(state):
    running = attempt(2, state)
    assert decide(RUN, [attempt(1, State.FAILED), running]) == Attach(running)


@pytest.mark.parametrize("state", [State.STOPPED, State.FAILED])
def test_what_is_broken_is_resumed(state):
    assert decide(RUN, [attempt(1, state)]) == Resume(f"{RUN}-2", attempt(1, state))
    # The newest one counts, in the order of numbers and not of names.
    attempts = [attempt(number, State.FAILED) for number in range(1, 11)]
    assert decide(RUN, reversed(attempts)) == Resume(f"{RUN}-11", attempts[-1])


def test_what_is_new_is_started_and_what_is_finished_is_left_alone():
    others = [attempt(1, State.RUNNING, "gendist-two-ffffffffffff"), attempt(1, State.FINISHED, "gendist-three-0123456789ab")]
    assert decide(RUN, others) == Start(RUN)
    finished = attempt(2, State.FINISHED)
    assert decide(RUN, [*others, attempt(1, State.FAILED), finished]) == Finished(finished)
    assert decide(RUN, [attempt(1, State.FAILED), finished], again=True) == Start(f"{RUN}-3")


@pytest.mark.parametrize(
    ("ended", "expected"),
    [
        (attempt(1, State.FINISHED, exit_code=0), End.FINISHED),
        (attempt(1, State.STOPPED), End.STOPPED),
        (attempt(1, State.FAILED, exit_code=130), End.STOPPED),
        (attempt(1, State.FAILED, exit_code=2), End.REFUSED),
        (attempt(1, State.FAILED, exit_code=1), End.FAILED),
        (attempt(1, State.FAILED, exit_code=-9), End.LOST),
        (attempt(1, State.FAILED, exit_code=137), End.LOST),
        (attempt(1, State.FAILED, error_type="JOB_SUPERVISOR_ACTOR_DIED"), End.LOST),
        (attempt(1, State.FAILED, error_type="RUNTIME_ENV_SETUP_FAILURE"), End.FAILED),
        (attempt(1, State.FAILED, error_type="JOB_SUPERVISOR_ACTOR_START_TIMEOUT"), End.FAILED),
    ],
)
def test_what_it_means_that_a_job_has_ended(ended, expected):
    assert end_of(ended) is expected


def test_one_computes_on_a_cluster_with_workers():
    with pytest.raises(UserError, match=r"cluster\.num_workers is 0"):
        require_workers(load_spec(SPEC))
    require_workers(load_spec(SPEC, ["cluster.num_workers=1"]))


def test_people_are_told_of_a_job_what_its_end_means():
    assert state_of(attempt(1, State.RUNNING)) == "running"
    assert state_of(attempt(1, State.FAILED, exit_code=130)) == state_of(attempt(1, State.STOPPED)) == "stopped"
    assert state_of(attempt(1, State.FAILED, exit_code=2)) == "refused"
    assert state_of(attempt(1, State.FAILED, exit_code=-9)) == "lost"
    assert state_of(attempt(1, State.FAILED, exit_code=1)) == "failed"
    assert state_of(attempt(1, State.FINISHED, exit_code=0)) == "finished"


def test_jobs_are_found_by_name_and_by_id():
    old, running = attempt(1, State.FAILED, started_s=1.0), attempt(2, State.RUNNING, started_s=2.0)
    other = attempt(1, State.FINISHED, "gendist-two-ffffffffffff", started_s=3.0)
    attempts = [old, running, other]
    assert find(attempts, "two") == running  # of several runs of this name the one at work
    assert find(attempts, RUN) == running  # a run is its newest attempt
    assert find(attempts, f"{RUN}-2") == running
    assert find(attempts, f"{RUN}-1") == old
    assert find([old, other], "gendist-two-ffffffffffff") == other
    with pytest.raises(UserError, match="name of several runs"):
        find([old, other], "two")
    with pytest.raises(UserError, match="no job 'three' on this cluster; there are: two"):
        find(attempts, "three")
    assert newest_attempts(attempts) == [running, other]


def test_other_versions_are_refused_with_both():
    here = {"ray": "2.60.0", "python": "3.11.7", "torch": "2.13.0+cpu", "numpy": "2.3.1"}
    check_versions(here, {"ray": "2.60.0", "python": "3.11.2", "torch": "2.13.0+cu128", "numpy": "2.3.4"})
    check_versions(here, {"ray": "2.60.0"})
    with pytest.raises(UserError, match=r"ray is 2\.60\.0 here and 2\.59\.1 there, python is 3\.11\.7 here and 3\.12\.1 there"):
        check_versions(here, {"ray": "2.59.1", "python": "3.12.1"})
    check_versions({**here, "pyarrow": "not installed"}, {"pyarrow": "25.0.0"})
    with pytest.raises(UserError, match=r"torch is 2\.13\.0\+cpu here and not installed there"):
        check_versions(here, {"torch": "not installed"})
