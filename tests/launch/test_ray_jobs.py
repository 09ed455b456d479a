"""What a head may answer, and what may answer in its place; without Ray."""

from __future__ import annotations

import io
import json
import os
import socket
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from gendist.config import load_spec
from gendist.launch import jobs, ray_jobs
from gendist.launch.job_lines import JOB_FILE
from gendist.launch.ray_jobs import RayJobs, Unknown, Unreachable
from gendist.launch.submission import State
from gendist.protocols import UserError

TOKEN = "a" * 32


class Head(BaseHTTPRequestHandler):
    """Answers as a head with a token does; whatever is said in `answers` instead of that."""

    answers: dict[str, tuple[int, str]] = {}  # noqa: RUF012
    sent: dict[str, bytes] = {}  # noqa: RUF012

    def do_GET(self) -> None:
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            code, text = 403 if "Authorization" in self.headers else 401, "no"
        else:
            code, text = self.answers.get(self.path, (404, "Job x does not exist in this Ray"))
        self.send_response(code)
        self.end_headers()
        self.wfile.write(text.encode())

    def do_PUT(self) -> None:
        self.sent[self.path] = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.end_headers()

    def do_POST(self) -> None:
        self.do_PUT()
        self.wfile.write(json.dumps({"job_id": "x", "submission_id": "x"}).encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def head(monkeypatch, tmp_path) -> Iterator[str]:
    """The address of a head; the token is in the environment."""
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_TOKEN_PATH", "RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Head)
    Head.answers = {
        "/api/version": (200, json.dumps({"version": "4", "ray_version": "2.60.0"})),
        "/api/v0/cluster_metadata": (200, json.dumps({"data": {"pythonVersion": "3.11.7"}})),
    }
    Head.sent = {}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_the_token_comes_from_where_ray_looks_for_it(head, monkeypatch, tmp_path):
    assert RayJobs.at(head).versions() == {"ray": "2.60.0", "python": "3.11.7"}
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    with pytest.raises(UserError, match="asks for a token, and none was found"):
        RayJobs.at(head).versions()
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text(f"{TOKEN}\n")
    assert RayJobs.at(head).versions()
    (tmp_path / "other").write_text("b" * 32)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "other"))
    with pytest.raises(UserError, match="that which was found is not its own") as told:
        RayJobs.at(head).versions()
    assert "bbb" not in str(told.value)
    assert "bbb" not in repr(RayJobs.at(head))
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="nowhere: cannot be read"):
        RayJobs.at(head)
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)  # wins
    assert RayJobs.at(head).versions()


def test_a_token_is_for_the_head_and_neither_a_proxy_nor_a_netrc_has_a_part_in_it(head, monkeypatch, tmp_path):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # where nothing answers
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login u password p\n")
    assert RayJobs.at(head).versions()
    answer = ray_jobs._Client(head, {"Authorization": f"Bearer {TOKEN}"})._do_request("GET", "/api/version")
    assert answer.status_code == 200


def test_the_address_may_come_from_the_environment(head, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", head)
    assert RayJobs.at(None).address == head
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://10.0.0.1:8265/")
    assert RayJobs.at(None).address == "http://10.0.0.1:8265"
    assert RayJobs.at("10.0.0.2:8265").address == "http://10.0.0.2:8265"


@pytest.mark.parametrize(
    ("address", "said"),
    [
        (None, "--address is missing"),
        ("ray://10.0.0.1:10001", "not where a Ray head takes jobs"),
        ("http://", "not where a Ray head takes jobs"),
        ("http://10.0.0.1:99999", "not where a Ray head takes jobs"),
        ("auto", "nothing answers there"),
    ],
)
def test_what_is_no_address_is_told(head, address, said):
    with pytest.raises(UserError, match=said):
        RayJobs.at(address).versions()


def test_the_address_of_another_port_of_ray_is_told(head, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with pytest.raises(UserError, match=r"RAY_ADDRESS 10\.0\.0\.1:6379: not where a Ray head takes jobs"):
        RayJobs.at(None)


def test_where_nothing_answers_is_told_soon(head, monkeypatch):
    monkeypatch.setattr(ray_jobs, "ANSWER_TIMEOUT_S", 0.5)
    with pytest.raises(Unreachable, match=r"nothing answers there as a Ray head does .Connection refused."):
        RayJobs.at("http://127.0.0.1:1").versions()
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(Unreachable, match="no answer in time"):
        RayJobs.at(f"http://127.0.0.1:{silent.getsockname()[1]}").versions()


@pytest.mark.parametrize("answer", [(200, "hello"), (200, "[]"), (404, "not found"), (501, "")])
def test_what_is_no_ray_dashboard_is_told(head, answer):
    Head.answers = {"/api/version": answer}
    with pytest.raises(UserError, match="something answers there, but it is no Ray dashboard"):
        RayJobs.at(head).versions()


def test_the_jobs_of_gendist_alone_are_seen(head):
    job = {"submission_id": "gendist-two-0123456789ab-3", "status": "FAILED", "driver_exit_code": 2, "start_time": 5000}
    others = [{"submission_id": None, "status": "RUNNING"}, {"submission_id": "x", "status": "RUNNING", "metadata": {}}]
    ours = job | {"metadata": {"gendist_name": "two"}}
    Head.answers |= {"/api/jobs/": (200, json.dumps([*others, ours])), "/api/jobs/a": (200, json.dumps(ours))}
    (attempt,) = RayJobs.at(head).attempts()
    assert attempt == RayJobs.at(head).attempt("a")
    assert (attempt.name, attempt.number, attempt.run_id) == ("two", 3, "gendist-two-0123456789ab")
    assert (attempt.state, attempt.exit_code, attempt.started_s) == (State.FAILED, 2, 5.0)
    with pytest.raises(Unknown):
        RayJobs.at(head).attempt("b")


def test_the_log_of_a_job_that_a_new_head_does_not_know(head, monkeypatch):
    with pytest.raises(Unknown, match="knows no job a"):
        next(RayJobs.at(head).tail("a"))
    monkeypatch.setenv("RAY_AUTH_TOKEN", "b" * 32)
    with pytest.raises(UserError, match="that which was found is not its own"):
        next(RayJobs.at(head).tail("a"))


def test_a_job_on_a_node_that_is_silent_is_shown_without_its_last_lines(head, monkeypatch):
    attempt = ray_jobs.Attempt("gendist-two-0123456789ab", State.FINISHED, node_id="a")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(ray_jobs, "LOG_TIMEOUT_S", 0.2)
        silent_head = RayJobs.at(f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert silent_head.last_lines(attempt, 5) == []
        assert jobs.last_word(silent_head, attempt) is None


def test_neither_a_proxy_nor_netrc_comes_between(head, monkeypatch, tmp_path):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login user password other\n")
    assert RayJobs.at(head).versions()


@pytest.mark.parametrize("name", [None, "RAY_API_SERVER_ADDRESS"])
def test_an_address_with_a_password_is_refused_and_not_repeated(head, monkeypatch, name):
    address = "http://user:hush7Qx@10.0.0.1:8265"
    if name is not None:
        monkeypatch.setenv(name, address)
    with pytest.raises(UserError, match=f"{name or '--address'}: .* comes with a password before the host") as told:
        RayJobs.at(None if name else address)
    assert "hush7Qx" not in str(told.value)


def submission(head: str, told: list[str]) -> jobs.Submission:
    spec = load_spec({"name": "two", "family": "gmm", "model": {"num_components": 2}, "cluster": {"num_workers": 4}})
    return jobs.Submission(spec, "/shared/run", RayJobs.at(head), told.append)


def submitted() -> dict[str, Any]:
    """The job that the head was sent."""
    job = json.loads(Head.sent["/api/jobs/"])
    return {"submission_id": job["submission_id"], "metadata": job["metadata"]}


def test_whoever_attaches_is_told_what_differs(head):
    told = []
    spec = {"name": "two", "family": "vae", "model": {"latent_dim": 2, "encoder": {"hidden_sizes": [2]}}}
    spec["model"]["decoder"] = {"hidden_sizes": [2]}

    def submission(*overrides: str) -> jobs.Submission:
        return jobs.Submission(load_spec(spec, overrides), "/shared/run", RayJobs.at(head), told.append)

    Head.answers |= {"/api/jobs/": (200, "[]")}
    submission("cluster.num_workers=2", "cluster.storage=/shared").begin()
    job = submitted() | {"status": "RUNNING"}
    Head.answers |= {"/api/jobs/": (200, json.dumps([job]))}
    submission("cluster.num_workers=2").begin()
    assert told[-1] == f"{job['submission_id']} is running; attached"
    submission(
        "cluster.num_workers=[1,4]", "cluster.use_gpu=true", "fit.engine.kind=deepspeed", "fit.micro_batch_size=8"
    ).begin()
    for said in (
        " (it has ",
        "cluster.num_workers=2, not [1, 4]",
        "cluster.use_gpu=False, not True",
        "fit.engine.kind=ddp, not deepspeed",
        "fit.micro_batch_size=None, not 8",
        "stop it and submit again",
    ):
        assert said in told[-1]
    Head.answers |= {"/api/jobs/": (200, json.dumps([job | {"metadata": {"gendist_name": "two"}}]))}
    submission("cluster.num_workers=4").begin()
    assert told[-1].endswith("; attached")  # what it was submitted with is not known


@pytest.mark.parametrize("status", ["SUCCEEDED", "RUNNING"])
def test_files_that_have_changed_since_they_were_sent_are_told(head, tmp_path, monkeypatch, status):
    told = []
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.csv").write_text("a,b\n1,2\n")
    spec = load_spec({"name": "two", "family": "gmm", "model": {"num_components": 2}, "data": {"path": "data.csv"}})
    one = jobs.Submission(spec, "/shared/run", RayJobs.at(head), told.append)
    Head.answers |= {"/api/jobs/": (200, "[]")}
    one.begin()
    Head.answers |= {"/api/jobs/": (200, json.dumps([submitted() | {"status": status}]))}
    one.begin()
    assert "have changed since" not in told[-1]
    (tmp_path / "data.csv").write_text("a,b\n1,3\n")
    one.begin()
    assert "the files of this folder that it was sent have changed since, and are not looked at" in told[-1]


def test_all_that_the_spec_names_is_sent_whatever_its_folder_is_called(head, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = ("venv", ".venv", ".git", "__pycache__", "plain")
    for folder in folders:
        (tmp_path / "data" / folder).mkdir(parents=True)
        (tmp_path / "data" / folder / "a.csv").write_text("a,b\n1,2\n")
    module = tmp_path / "gendist"
    (module / "launch" / "__pycache__").mkdir(parents=True)
    (module / "launch" / "__pycache__" / "cli.pyc").write_text("")
    (module / "launch" / "cli.py").write_text("")
    monkeypatch.setattr(jobs, "PACKAGE", module)
    monkeypatch.setenv(ray_jobs.LEFT_OUT, "kept,as,it,was")
    paths = [f"data/{folder}/a.csv" for folder in folders]
    spec = load_spec({"name": "two", "family": "gmm", "model": {"num_components": 2}, "data": {"path": paths}})
    Head.answers |= {"/api/jobs/": (200, "[]")}
    jobs.Submission(spec, "/shared/run", RayJobs.at(head), print).begin()
    packages = [zipfile.ZipFile(io.BytesIO(body)) for path, body in Head.sent.items() if path.startswith("/api/packages/")]
    sent = [{name for name in package.namelist() if not name.endswith("/")} for package in packages]
    assert sorted(sent, key=len) == [{"gendist/launch/cli.py"}, {*paths, JOB_FILE}]
    assert "excludes" not in json.loads(Head.sent["/api/jobs/"])["runtime_env"]
    assert os.environ[ray_jobs.LEFT_OUT] == "kept,as,it,was"


def test_every_attempt_at_a_run_can_be_named_and_is_called_what_its_end_means(head, capsys):
    run = "gendist-two-0123456789ab"
    first = {"submission_id": run, "status": "FAILED", "driver_exit_code": 130, "metadata": {"gendist_name": "two"}}
    second = first | {"submission_id": f"{run}-2", "driver_exit_code": 1}
    Head.answers |= {
        "/api/jobs/": (200, json.dumps([first, second])),
        f"/api/jobs/{run}/logs": (200, json.dumps({"logs": "of the first"})),
        f"/api/jobs/{run}-2/logs": (200, json.dumps({"logs": "of the second"})),
    }
    rows = [line.split() for line in jobs.status("two", head)[1:]]
    assert [(row[1], row[-1]) for row in rows] == [("stopped", f"{run}-1"), ("failed", f"{run}-2")]
    for name, said in ((f"{run}-1", "of the first"), (f"{run}-2", "of the second"), (run, "of the second")):
        assert jobs.logs(name, head, False, print) == 0
        assert capsys.readouterr().out == f"{said}\n"
    assert jobs.stop(f"{run}-1", head, print) == 0
    assert capsys.readouterr().out == f"{run} is stopped; nothing to do\n"


def test_interrupted_while_it_submits_one_is_told_where_to_look(head, monkeypatch, capsys):
    one = submission(head, [])

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(jobs.Submission, "of", lambda *_: one)
    monkeypatch.setattr(jobs.Submission, "begin", interrupted)
    assert jobs.submit(one.spec, one.run_dir, head, False, False, print) == jobs.INTERRUPTED
    assert f"status {jobs.run_id(one.spec, one.run_dir)} --address {head}" in capsys.readouterr().err

    run = jobs.run_id(one.spec, one.run_dir)
    monkeypatch.setattr(jobs.Submission, "begin", lambda *_: ray_jobs.Attempt(f"{run}-2", State.PENDING))
    assert jobs.submit(one.spec, one.run_dir, head, True, False, print) == 0
    assert f"status {run} --address {head}" in capsys.readouterr().out
    monkeypatch.setattr(jobs.Submission, "follow", interrupted)
    assert jobs.submit(one.spec, one.run_dir, head, False, False, print) == jobs.INTERRUPTED
    assert "detached; the job goes on" in capsys.readouterr().err


class Tailed:
    """A job whose log comes in pieces, over connections that are lost."""

    def __init__(self, connections: list[list[str | None]], states: list[State]):
        self._connections, self._states = iter(connections), iter(states)

    def tail(self, _: str) -> Iterator[str | None]:
        for piece in next(self._connections):
            if piece == "LOST":
                raise Unreachable("gone")
            yield piece

    def attempt(self, submission_id: str) -> object:
        return ray_jobs.Attempt(submission_id, next(self._states))


def test_a_log_is_whole_over_lost_connections(monkeypatch):
    monkeypatch.setattr(jobs, "PAUSE_S", 0.0)
    first, second = ["one\nt", "LOST"], ["one\n", "two\nthr", None, "LOST"]
    third = ["one\ntwo\nthree\n", None, "four\nfi", None, None]
    states = [State.RUNNING, State.RUNNING, State.STOPPED, State.STOPPED]
    lines = list(jobs.follow(Tailed([first, second, third], states), "job"))
    assert lines == ["one", "two", "three", "four", "fi"]


def test_a_connection_that_stays_lost_is_told(monkeypatch):
    monkeypatch.setattr(jobs, "PAUSE_S", 0.01)
    monkeypatch.setattr(jobs, "RECONNECT_S", 0.1)
    with pytest.raises(jobs.Lost):
        list(jobs.follow(Tailed([["LOST"]] * 1000, []), "job"))


def test_a_job_that_is_silent_for_long_may_lose_the_connection_again(monkeypatch):
    monkeypatch.setattr(jobs, "PAUSE_S", 0.0)
    now = iter(range(0, 100_000, 40))  # each look at the clock is 40 s after the last
    monkeypatch.setattr(jobs.time, "monotonic", lambda: next(now))
    connections = [["LOST"], [None, "LOST"], [None, "LOST"], ["end"]]
    states = [State.RUNNING, State.RUNNING, State.STOPPED]
    assert list(jobs.follow(Tailed(connections, states), "job")) == ["end"]


def test_what_a_log_says_for_people():
    assert jobs.shown("reading data.csv") == "reading data.csv"
    assert jobs.shown('@gendist {"record": {"iteration": 1}}') == '{"iteration": 1}'
    assert jobs.shown('@gendist {"error": "a misspelt key"}') == "error: a misspelt key"
    assert jobs.shown('@gendist {"finished": {"summary": ["a", "b"], "verbs": [], "path": "x"}}') == "a\nb"
