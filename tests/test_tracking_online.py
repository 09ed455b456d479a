"""wandb beside the run directory, online, with a server of our own (`wandb_server.py`) in place of theirs."""

from __future__ import annotations

import json
import logging
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from wandb_server import KEY, Processes, WandbServer

import gendist
from gendist import tracking
from gendist.run_directory import RunDirectory

ROOT = Path(__file__).parents[1]
SPEC = {
    "name": "tracked",
    "family": "gmm",
    "model": {"num_components": 2},
    "fit": {"max_iterations": 6, "tolerance": 0.0, "checkpoint_every": 2, "num_restarts": 2},
    "tracking": {"wandb": "online"},
}


class Stop(Exception):
    pass


@pytest.fixture
def x() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(200, 2))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[WandbServer]:
    """A server that this process's environment names, with a key that it takes, and no other settings of wandb's.

    What is said is wandb's own: where a test has called the command line in this process, a handler is left that tells of fits.
    """
    monkeypatch.setattr(logging.getLogger("gendist"), "handlers", [])
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "settings"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    with WandbServer() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        yield server


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> Processes:
    return Processes(monkeypatch)


def recorded(run_dir: Path) -> list[dict[str, float]]:
    """What metrics.jsonl says, a dict a step."""
    steps: dict[int, dict[str, float]] = {}
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        message = tracking._message(json.loads(line))
        steps.setdefault(message["step"], {"_step": message["step"]}).update(message["numbers"])
    return [steps[step] for step in sorted(steps)]


def seen(server: WandbServer, run_dir: Path) -> list[dict[str, float]]:
    """What the server has of it, row for row."""
    history = server.runs[json.loads((run_dir / "manifest.json").read_text())["run_id"]].history
    return [{key: value for key, value in row.items() if key not in ("_runtime", "_timestamp")} for row in history]


def timeless(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    """Without how long each took, which differs where a step was done again."""
    return [{key: value for key, value in row.items() if not key.endswith("seconds")} for row in rows]


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def wandb_sync(warning: str) -> None:
    """Do what a warning says."""
    command = shlex.split(warning.partition("send it later with: ")[2])
    assert command[:2] == ["wandb", "sync"]
    subprocess.run([sys.executable, "-m", *command], cwd=Path(command[-1]).parents[2], check=True, timeout=120)


def test_the_server_has_the_run_and_its_records(x, server, processes, tmp_path, caplog, capfd):
    gendist.fit(SPEC, data=x, run_dir=tmp_path / "run")
    processes.wait_until_gone()
    run_id = json.loads((tmp_path / "run" / "manifest.json").read_text())["run_id"]
    (run,) = server.runs.values()
    assert list(server.runs) == [run_id]
    assert (run.project, run.name) == ("gendist", "tracked")
    spec = yaml.safe_load((tmp_path / "run" / "spec.yaml").read_text())
    assert {key: item["value"] for key, item in run.config.items() if key != "_wandb"} == spec
    rows = seen(server, tmp_path / "run")
    assert [row["_step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert "restart_1.log_likelihood" in rows[0]
    assert rows == recorded(tmp_path / "run")
    assert run.exit_codes == [0]
    assert warnings(caplog) == []
    assert capfd.readouterr() == ("", "")


def test_of_training_too_and_one_that_was_stopped_has_not_succeeded(toy, server, tmp_path):
    spec = {
        "name": "trained",
        "family": toy,
        "model": {},
        "data": {"source": "digits"},
        "fit": {"num_steps": 8, "global_batch_size": 8, "record_every": 1, "checkpoint_every": 3},
        "tracking": {"wandb": "online"},
    }

    def stop(record):
        if record["step"] == 4:
            (tmp_path / "run" / ".stop").touch()

    with pytest.raises(KeyboardInterrupt):
        gendist.fit(spec, run_dir=tmp_path / "run", watch=stop)
    (run,) = server.runs.values()
    assert run.exit_codes == [1]
    gendist.fit(spec, run_dir=tmp_path / "run")
    assert run.exit_codes == [1, 0]
    rows = seen(server, tmp_path / "run")
    assert len(rows) == 8
    assert timeless(rows) == timeless(recorded(tmp_path / "run"))


def test_a_fit_that_is_stopped_and_resumed_is_one_run_with_each_step_once(x, server, tmp_path, caplog):
    def stop(record):
        if record["iteration"] == 5:  # behind the checkpoint of 4, from which 5 is done again
            raise Stop

    with pytest.raises(Stop):
        gendist.fit(SPEC, data=x, run_dir=tmp_path / "run", watch=stop)
    (run,) = server.runs.values()
    assert [row["_step"] for row in run.history] == [1, 2, 3, 4, 5]
    gendist.fit(SPEC, data=x, run_dir=tmp_path / "run")
    assert list(server.runs.values()) == [run]
    assert run.exit_codes == [1, 0]
    rows = seen(server, tmp_path / "run")
    assert [row["_step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    rows, expected = timeless(rows), timeless(recorded(tmp_path / "run"))
    assert rows[:4] + rows[5:] == expected[:4] + expected[5:]
    assert rows[4].items() <= expected[4].items()  # which is sent as far as it had come when the fit was stopped
    assert warnings(caplog) == []


def test_a_killed_fit_has_sent_what_it_recorded_and_goes_on(server, tmp_path):
    program = """
import os, signal, sys, threading, time, gendist
def die(record):
    if record["iteration"] == 5:
        (sender,) = (thread for thread in threading.enumerate() if thread.name == "wandb")
        while not sender.messages.empty():  # what the process of wandb was not told by now dies with this one
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
gendist.fit("spec.yaml", run_dir="run", watch=die if sys.argv[1:] else None)
"""
    spec = {**SPEC, "fit": {**SPEC["fit"], "num_restarts": 1}, "data": {"source": "digits"}}
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec))
    killed = subprocess.run([sys.executable, "-c", program, "die"], cwd=tmp_path, capture_output=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    server.wait_until(lambda: any(run.exit_codes for run in server.runs.values()))
    (run,) = server.runs.values()
    assert run.exit_codes == [1]
    assert [row["_step"] for row in run.history] in ([1, 2, 3, 4], [1, 2, 3, 4, 5])
    resumed = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, timeout=120)
    assert resumed.returncode == 0, resumed.stderr.decode()
    assert list(server.runs.values()) == [run]
    assert run.exit_codes == [1, 0]
    assert [row["_step"] for row in run.history] == [1, 2, 3, 4, 5, 6]
    assert timeless(seen(server, tmp_path / "run")) == timeless(recorded(tmp_path / "run"))


def test_what_a_server_that_was_away_lacks_is_sent_by_the_next_attempt(x, server, tmp_path, monkeypatch, caplog):
    """Even where the fit was killed behind its last record, and has none to add; and not a second time by `wandb sync`."""

    def stop(*_):
        raise Stop

    server.refuses = 403
    with monkeypatch.context() as patched:
        patched.setattr(RunDirectory, "finish", stop)
        with pytest.raises(Stop):
            gendist.fit(SPEC, data=x, run_dir=tmp_path / "run")
    assert server.runs == {}
    server.refuses = None
    gendist.fit(SPEC, data=x, run_dir=tmp_path / "run")
    (run,) = server.runs.values()
    assert run.exit_codes == [0]
    assert seen(server, tmp_path / "run") == recorded(tmp_path / "run")
    gendist.fit(SPEC, data=x, run_dir=tmp_path / "run")
    assert run.exit_codes == [0]  # it was finished
    (warning,) = warnings(caplog)
    wandb_sync(warning)
    assert len(run.history) == 6


NEVER_BEGUN = {
    "closed": "127.0.0.1:{port} does not answer: look at the network, and at WANDB_BASE_URL",
    "silent": "127.0.0.1:{port} does not answer: look at the network, and at WANDB_BASE_URL",
    "wrong key": "127.0.0.1:{port} does not take the key (401): look at WANDB_API_KEY, or call `wandb login --relogin`",
    "forbidden": "127.0.0.1:{port} does not take the key (403): look at WANDB_API_KEY, or call `wandb login --relogin`",
    "no key": "there is no key: set WANDB_API_KEY, or call `wandb login`",
}


@pytest.mark.parametrize("what", NEVER_BEGUN)
def test_what_cannot_be_sent_is_kept_and_one_warning_says_what_to_do(
    x, server, processes, monkeypatch, tmp_path, caplog, capfd, what
):
    key, port = KEY, server.url.rpartition(":")[2]
    monkeypatch.setattr(tracking, "INIT_TIMEOUT_S", 2.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        if what == "closed":
            port = unused_port()
        elif what == "silent":
            port = str(silent.getsockname()[1])
        elif what == "wrong key":
            key = "badbad" * 6 + "bad0"
        elif what == "forbidden":
            server.refuses = 403
        if what == "no key":
            monkeypatch.delenv("WANDB_API_KEY")
        else:
            monkeypatch.setenv("WANDB_API_KEY", key)
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
        began = time.monotonic()
        run = gendist.fit(SPEC, data=x, run_dir=tmp_path / "run")
        assert time.monotonic() - began < 30  # 2 s, and what wandb takes to start on a busy machine
        processes.wait_until_gone()
    assert len(run.history) == 6
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 12
    (warning,) = warnings(caplog)
    assert warning.split("; ")[0] == "wandb: " + NEVER_BEGUN[what].format(port=port)
    assert capfd.readouterr() == ("", "")
    for file in (file for file in tmp_path.rglob("*") if file.is_file()):
        assert key.encode() not in file.read_bytes(), file
    assert server.runs == {}

    # Who does as he is told has all of it there.
    server.refuses = None
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    wandb_sync(warning)
    assert seen(server, tmp_path / "run") == recorded(tmp_path / "run")
    assert [run.exit_codes for run in server.runs.values()] == [[0]]


def test_of_a_run_in_a_store_it_is_kept_there(x, server, store, caplog):
    server.refuses = 403
    gendist.fit(SPEC, data=x, run_dir=f"{store}/run")
    (warning,) = warnings(caplog)
    (folder,) = Path(store.removeprefix("objects://"), "run", "wandb").glob("offline-run-*")
    assert list(folder.glob("run-*.wandb"))
    kept = f"; copy {store}/run/wandb/{folder.name} here, and send it with: wandb sync {folder.name}"
    assert warning.endswith(kept)


def unused_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return str(probe.getsockname()[1])


@pytest.mark.parametrize(
    ("status", "reason"),
    [(500, "127.0.0.1:{port} has not taken everything in 1 s"), (403, "127.0.0.1:{port} takes no more of this run")],
    ids=["for now", "for good"],
)
def test_a_server_that_takes_nothing_more_holds_nobody_up(x, server, processes, monkeypatch, tmp_path, caplog, status, reason):
    monkeypatch.setattr(tracking, "UPLOAD_TIMEOUT_S", 1.0)
    server.breaks = status
    began = time.monotonic()
    gendist.fit(SPEC, data=x, run_dir=tmp_path / "run")
    assert time.monotonic() - began < 30
    processes.wait_until_gone()
    (warning,) = warnings(caplog)
    reason = reason.format(port=server.url.rpartition(":")[2])
    assert warning.split("; ")[0] == f"wandb: {reason}"
    server.breaks = None
    wandb_sync(warning)
    assert seen(server, tmp_path / "run") == recorded(tmp_path / "run")


def test_one_that_does_not_end_is_ended(x, server, processes, monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(tracking, "FINISH_TIMEOUT_S", 3.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        began = time.monotonic()
        gendist.fit(SPEC, data=x, run_dir=tmp_path / "run")
        assert time.monotonic() - began < tracking.INIT_TIMEOUT_S
        processes.wait_until_gone()
    assert warnings(caplog) == ["wandb: it has not finished in 3 s; metrics.jsonl has everything"]
