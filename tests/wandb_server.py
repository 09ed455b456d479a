"""What of the server of Weights & Biases a run needs, on this machine's loopback.

It stands for: the key in the header Authorization; the GraphQL operations that a run asks for (RunResumeStatus, which tells
what is known of a run that goes on, UpsertBucket, which makes or changes one, and CreateRunFiles); the file stream, whose
lines are written at their offsets, and which says that a run is complete. Others, such as who the user is, what the server
offers, where files are uploaded and telemetry, get an error or nothing, which wandb does without. It knows one entity, and
neither limits of rate nor of size. The answers are those that wandb 0.31 reads; the real server was not there to compare.
"""

from __future__ import annotations

import base64
import json
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from gendist import tracking

KEY = "c0ffee" * 6 + "cafe"  # 40 characters, as theirs
ENTITY = "somebody"


@dataclass
class ServedRun:
    """
    files      the lines of each file of the file stream
    config     as the last UpsertBucket had it
    exit_codes of each time that the run was complete
    """

    project: str
    name: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    files: dict[str, list[str]] = field(default_factory=dict)
    exit_codes: list[int] = field(default_factory=list)

    @property
    def history(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.files.get("wandb-history.jsonl", [])]


class WandbServer:
    """`with WandbServer() as server:`, which listens at `server.url`.

    runs     by their ids
    refuses  the status of every answer, where it is not 200
    breaks   the same of the file stream alone
    """

    def __init__(self) -> None:
        self.runs: dict[str, ServedRun] = {}
        self.refuses: int | None = None
        self.breaks: int | None = None
        self._changed = threading.Condition()
        served = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                status, answer = served._answer(self.path, self.headers.get("Authorization", ""), content)
                text = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            do_GET = do_PUT = do_POST

            def log_message(self, *_: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> WandbServer:
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05})
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def wait_until(self, condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
        with self._changed:
            assert self._changed.wait_for(condition, timeout_s)

    def _answer(self, path: str, authorization: str, content: bytes) -> tuple[int, Any]:
        if self.refuses or authorization != "Basic " + base64.b64encode(f"api:{KEY}".encode()).decode():
            return self.refuses or 401, {"errors": [{"message": "refused"}]}
        with self._changed:
            try:
                if path == "/graphql":
                    asked = json.loads(content)
                    answer = getattr(self, f"_{asked['operationName']}", None)
                    if answer is None:
                        return 200, {"errors": [{"message": f"{asked['operationName']} is not known here"}]}
                    return 200, {"data": answer(asked["variables"])}
                if path.endswith("/file_stream"):
                    return (self.breaks, {}) if self.breaks else (200, self._stream(path, json.loads(content)))
                return 404, {}
            finally:
                self._changed.notify_all()

    def _RunResumeStatus(self, asked: dict[str, Any]) -> dict[str, Any]:
        run = self.runs.get(asked["name"])
        if run is None or run.project != asked["project"]:
            return {"model": None}
        lines = {name: run.files.get(f"wandb-{name}", []) for name in ("history.jsonl", "events.jsonl", "summary.json")}
        known = {
            **_description(asked["name"], run),
            "summaryMetrics": lines["summary.json"][-1] if lines["summary.json"] else "{}",
            "logLineCount": 0,
            "historyLineCount": len(lines["history.jsonl"]),
            "eventsLineCount": len(lines["events.jsonl"]),
            "historyTail": json.dumps(lines["history.jsonl"][-1:]),
            "eventsTail": json.dumps(lines["events.jsonl"][-1:]),
            "tags": [],
            "notes": None,
            "wandbConfig": json.dumps({"t": 1}),
        }
        return {"model": {**known["project"], "bucket": known}}

    def _UpsertBucket(self, asked: dict[str, Any]) -> dict[str, Any]:
        inserted = asked["name"] not in self.runs
        run = self.runs.setdefault(asked["name"], ServedRun(asked["project"]))
        run.name = asked["displayName"] or run.name
        run.config = json.loads(asked["config"]) if asked["config"] else run.config
        return {"upsertBucket": {"bucket": _description(asked["name"], run), "inserted": inserted}}

    def _CreateRunFiles(self, asked: dict[str, Any]) -> dict[str, Any]:
        return {"createRunFiles": {"runID": asked["run"], "uploadHeaders": [], "files": []}}

    def _stream(self, path: str, sent: dict[str, Any]) -> dict[str, Any]:
        _, files, entity, project, run_id, _ = path.split("/")
        run = self.runs[run_id]
        assert (files, entity, project) == ("files", ENTITY, run.project)
        for name, part in sent.get("files", {}).items():
            run.files.setdefault(name, [])[part["offset"] :] = part["content"]
        if sent.get("complete"):
            run.exit_codes.append(sent["exitcode"])
        return {}


def _description(run_id: str, run: ServedRun) -> dict[str, Any]:
    return {
        "id": base64.b64encode(f"Run:{run_id}".encode()).decode(),
        "name": run_id,
        "displayName": run.name,
        "description": None,
        "config": json.dumps(run.config),
        "sweepName": None,
        "historyLineCount": len(run.files.get("wandb-history.jsonl", [])),
        "project": {"id": run.project, "name": run.project, "entity": {"id": ENTITY, "name": ENTITY}},
    }


class Processes:
    """Those that tracking starts, and wandb's service in each."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.started: list[int] = []

        class Noted(subprocess.Popen):  # type: ignore[type-arg]
            def __init__(noted, arguments: list[str], **options: Any) -> None:
                super().__init__(arguments, **options)
                if arguments[-1].endswith("wandb_process.py"):
                    self.started.append(noted.pid)

        monkeypatch.setattr(tracking.subprocess, "Popen", Noted)

    def left(self) -> list[str]:
        found = subprocess.run(["ps", "-ww", "-e", "-o", "pid=,args="], capture_output=True, text=True, check=True)
        lines = [line.strip() for line in found.stdout.splitlines()]
        pids = {str(pid) for pid in self.started}
        return [line for line in lines if line.split()[0] in pids or line.rpartition("wandb-core")[2].split()[-1] in pids]

    def wait_until_gone(self, timeout_s: float = 20.0) -> None:
        """Of a process that was killed, the service notices it within a second."""
        until = time.monotonic() + timeout_s
        while self.left():
            assert time.monotonic() < until, self.left()
            time.sleep(0.1)
