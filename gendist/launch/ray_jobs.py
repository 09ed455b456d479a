"""What a Ray head is asked about jobs, over HTTP. Every question is answered within a bounded time, or not at all."""

from __future__ import annotations

import asyncio
import logging
import os
import urllib.parse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import ray
import requests
from ray.dashboard.modules.dashboard_sdk import SubmissionClient
from ray.job_submission import JobSubmissionClient

from gendist.launch.submission import Attempt, State
from gendist.protocols import UserError
from gendist.secrets_in_urls import require_no_secret

CONNECT_TIMEOUT_S = 5.0
ANSWER_TIMEOUT_S = 30.0
LOG_TIMEOUT_S = 8.0  # for the end of a log, whose node may be gone without a word
UPLOAD_TIMEOUT_S = 300.0
SILENCE_S = 3.0  # after which it is said that a log has nothing new
HEARTBEAT_S = 20.0  # of a connection that waits for what a log will say
LEFT_OUT = "RAY_OVERRIDE_RUNTIME_ENV_DEFAULT_EXCLUDES"  # folders that Ray does not pack: .git, .venv, venv, __pycache__
ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
STATES = {
    "PENDING": State.PENDING,
    "RUNNING": State.RUNNING,
    "STOPPED": State.STOPPED,
    "SUCCEEDED": State.FINISHED,
    "FAILED": State.FAILED,
}


class Unreachable(UserError):
    """Nothing answers, which may pass."""


class Unknown(UserError):
    """The cluster does not know the job."""


class AlreadyThere(Exception):
    """Somebody has submitted the same just now."""


@dataclass(frozen=True)
class RayJobs:
    """The jobs of one cluster.

    address   "http://HOST:PORT" of the head's dashboard
    """

    address: str
    headers: Mapping[str, str] = field(repr=False)

    @classmethod
    def at(cls, address: str | None) -> RayJobs:
        """UserError where the address, or the environment's where none is given, is not one."""
        return cls(_address(address), _authorization(os.environ))

    def versions(self) -> dict[str, str]:
        """Of Ray and Python on the head. UserError where no Ray head answers, or it wants another token."""
        answer = self._ask("GET", "/api/version")
        try:
            found = {"ray": str(answer.json()["ray_version"])}
        except (ValueError, KeyError, TypeError):
            raise UserError(f"--address {self.address}: something answers there, but it is no Ray dashboard") from None
        answer = self._ask("GET", "/api/v0/cluster_metadata", may_fail=True)
        if answer.ok and (python := answer.json().get("data", {}).get("pythonVersion")):
            found["python"] = str(python)
        return found

    def attempts(self) -> list[Attempt]:
        """All jobs that gendist has ever submitted there."""
        jobs = self._ask("GET", "/api/jobs/").json()
        return [_attempt(job) for job in jobs if "gendist_name" in (job.get("metadata") or {})]

    def attempt(self, submission_id: str) -> Attempt:
        answer = self._ask("GET", f"/api/jobs/{submission_id}", may_fail=True)
        if answer.status_code == 404:
            raise self._unknown(submission_id)
        return _attempt(self._checked(answer).json())

    def submit(self, submission_id: str, entrypoint: str, metadata: Mapping[str, str], runtime_env: Mapping[str, Any]) -> None:
        """AlreadyThere where there is such a job."""
        client = _Client(self.address, dict(self.headers))
        try:
            client.submit_job(
                entrypoint=entrypoint,
                submission_id=submission_id,
                metadata=dict(metadata),
                runtime_env=dict(runtime_env),
            )
        except requests.RequestException as error:
            raise Unreachable(
                f"the connection to {self.address} was lost while the job was submitted ({_reason(error)})"
            ) from error
        except RuntimeError as error:
            if "already exists" in str(error):
                raise AlreadyThere from error
            raise UserError(f"the job was not accepted by {self.address}: {_last_line(str(error))}") from error

    def stop(self, submission_id: str) -> None:
        """Ask it to stop; it may take a while."""
        self._ask("POST", f"/api/jobs/{submission_id}/stop")

    def last_lines(self, attempt: Attempt, num_lines: int) -> list[str]:
        """Of its log; none where they cannot be had."""
        if attempt.node_id is None:
            return []
        file = {"node_id": attempt.node_id, "filename": f"job-driver-{attempt.submission_id}.log", "lines": str(num_lines)}
        path = f"/api/v0/logs/file?{urllib.parse.urlencode(file)}"
        try:
            answer = self._ask("GET", path, may_fail=True, timeout_s=min(LOG_TIMEOUT_S, ANSWER_TIMEOUT_S))
        except Unreachable:
            return []
        return answer.text.splitlines() if answer.ok else []

    def log(self, submission_id: str) -> str:
        return str(self._ask("GET", f"/api/jobs/{submission_id}/logs").json()["logs"])

    def tail(self, submission_id: str) -> Iterator[str | None]:
        """The log from its beginning, in pieces, as it is written; None where there was nothing new for a while.

        Ends when the head has no more to say. Unreachable where the connection is lost.
        """
        loop = asyncio.new_event_loop()
        session = None
        try:
            session, socket = loop.run_until_complete(self._connected(submission_id))
            next_piece = loop.create_task(socket.receive())
            while True:
                done, _ = loop.run_until_complete(asyncio.wait([next_piece], timeout=SILENCE_S))
                if not done:
                    yield None
                    continue
                piece = next_piece.result()
                if piece.type is not aiohttp.WSMsgType.TEXT:
                    break
                yield piece.data
                next_piece = loop.create_task(socket.receive())
            if socket.close_code == aiohttp.WSCloseCode.ABNORMAL_CLOSURE:
                raise Unreachable(f"the connection to {self.address} was lost")
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            if isinstance(error, aiohttp.WSServerHandshakeError):
                if error.status == 404:
                    raise self._unknown(submission_id) from None
                if error.status in (401, 403):
                    raise self._refused() from None
            raise Unreachable(f"the connection to {self.address} was lost ({_reason(error)})") from error
        finally:
            for task in asyncio.all_tasks(loop):
                task.cancel()
            if session is not None:
                loop.run_until_complete(session.close())
            loop.close()

    async def _connected(self, submission_id: str) -> tuple[aiohttp.ClientSession, aiohttp.ClientWebSocketResponse]:
        session = aiohttp.ClientSession(headers=dict(self.headers))
        try:
            url = f"{self.address}/api/jobs/{submission_id}/logs/tail"
            return session, await asyncio.wait_for(session.ws_connect(url, heartbeat=HEARTBEAT_S), ANSWER_TIMEOUT_S)
        except BaseException:
            await session.close()
            raise

    def _ask(self, method: str, path: str, may_fail: bool = False, timeout_s: float | None = None) -> requests.Response:
        timeout = (CONNECT_TIMEOUT_S, timeout_s or ANSWER_TIMEOUT_S)
        try:
            with requests.Session() as session:
                session.trust_env = False  # no proxy, and no token of ~/.netrc in the place of ours
                answer = session.request(method, self.address + path, headers=dict(self.headers), timeout=timeout)
        except (requests.RequestException, OSError) as error:
            raise Unreachable(
                f"--address {self.address}: nothing answers there as a Ray head does ({_reason(error)}); is `ray start --head` "
                "running there, and the port (8265 where nothing else was said) open?"
            ) from error
        return answer if may_fail and answer.status_code not in (401, 403) else self._checked(answer)

    def _unknown(self, submission_id: str) -> Unknown:
        return Unknown(f"the cluster at {self.address} knows no job {submission_id}")

    def _refused(self) -> UserError:
        token = "Authorization" in self.headers
        return UserError(
            f"--address {self.address}: the cluster asks for a token, and "
            + ("that which was found is not its own" if token else "none was found")
            + "; give it in RAY_AUTH_TOKEN, in a file that RAY_AUTH_TOKEN_PATH names, or in ~/.ray/auth_token"
        )

    def _checked(self, answer: requests.Response) -> requests.Response:
        if answer.status_code in (401, 403):
            raise self._refused()
        if not answer.ok:
            if "ray" not in answer.text.lower() and answer.status_code in (404, 405, 501):
                raise UserError(f"--address {self.address}: something answers there, but it is no Ray dashboard")
            raise Unreachable(f"--address {self.address}: {answer.status_code}, {_last_line(answer.text)}")
        return answer


class _Client(JobSubmissionClient):
    """Ray's own, which packs and uploads; with an address that the environment does not overrule, and bounded waits. Of the
    working folder all is packed, since all of it is named by the spec, and of modules all but what was compiled here."""

    def __init__(self, address: str, headers: dict[str, str]):
        self._client_ray_version = ray.__version__
        for name in ("ray.dashboard.modules.dashboard_sdk", "ray._private.runtime_env.packaging"):
            logging.getLogger(name).setLevel(logging.ERROR)
        SubmissionClient.__init__(self, address, headers=headers)

    def _upload_working_dir_if_needed(self, runtime_env: dict[str, Any]) -> None:
        before = os.environ.get(LEFT_OUT)
        os.environ[LEFT_OUT] = ""
        try:
            super()._upload_working_dir_if_needed(runtime_env)
        finally:
            del os.environ[LEFT_OUT]
            if before is not None:
                os.environ[LEFT_OUT] = before

    def _upload_py_modules_if_needed(self, runtime_env: dict[str, Any]) -> None:
        runtime_env["excludes"] = ["__pycache__"]
        super()._upload_py_modules_if_needed(runtime_env)
        del runtime_env["excludes"]

    def _do_request(self, method: str, endpoint: str, *, data: Any = None, json_data: Any = None, **others: Any) -> Any:
        with requests.Session() as session:
            session.trust_env = False  # as in RayJobs._ask: the token is for no proxy, and no .netrc has another
            return session.request(
                method,
                self._address + endpoint,
                data=data,
                json=json_data,
                cookies=self._cookies,
                headers=self._headers,
                verify=self._verify,
                timeout=(CONNECT_TIMEOUT_S, UPLOAD_TIMEOUT_S),
                **others,
            )


def _address(given: str | None) -> str:
    where, address = "--address", given
    if address is None:
        where = next((name for name in ADDRESS_VARIABLES if os.environ.get(name)), "--address")
        address = os.environ.get(where)
    if not address:
        raise UserError(
            "--address is missing: give http://HEAD:8265, where a Ray head takes jobs, or set RAY_API_SERVER_ADDRESS"
        )
    url = require_no_secret(address if "://" in address else f"http://{address}", where)
    try:
        parts = urllib.parse.urlsplit(url)
        is_fit = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and not parts.query
    except ValueError:  # a port that is none
        is_fit = False
    if not is_fit or (where == "RAY_ADDRESS" and "://" not in address):
        raise UserError(f"{where} {address}: not where a Ray head takes jobs; give its dashboard, such as http://10.0.0.1:8265")
    return url.rstrip("/")


def _authorization(environment: Mapping[str, str]) -> dict[str, str]:
    """The header with the token, from where Ray itself looks for it; none where there is no token."""
    token = environment.get("RAY_AUTH_TOKEN", "").strip()
    if not token:
        named = environment.get("RAY_AUTH_TOKEN_PATH")
        path = Path(named) if named else Path(environment.get("HOME", "~")).expanduser() / ".ray" / "auth_token"
        try:
            token = path.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            if named:
                raise UserError(
                    f"RAY_AUTH_TOKEN_PATH {named}: cannot be read ({getattr(error, 'strerror', 'no text')})"
                ) from None
    if not token.isprintable() or not token.isascii():
        raise UserError("the token of the cluster holds something else than plain characters")
    return {"Authorization": f"Bearer {token}"} if token else {}


def _attempt(job: Mapping[str, Any]) -> Attempt:
    return Attempt(
        submission_id=job["submission_id"],
        state=STATES.get(job["status"], State.FAILED),
        exit_code=job.get("driver_exit_code"),
        error_type=job.get("error_type"),
        message=job.get("message") or "",
        started_s=(job.get("start_time") or 0) / 1000,
        metadata=job.get("metadata"),
        node_id=job.get("driver_node_id"),
    )


def _reason(error: BaseException) -> str:
    """The shortest of what a failed connection says."""
    cause: BaseException = error
    while (inner := cause.__cause__ or cause.__context__) is not None:
        cause = inner
    if isinstance(cause, OSError) and cause.strerror:
        return cause.strerror
    return "no answer in time" if "timed out" in str(error).lower() or not str(cause) else _last_line(str(cause))


def _last_line(text: str) -> str:
    """Of a traceback, say."""
    lines = [line.strip() for line in text.splitlines() if line.strip(" .")]
    return lines[-1][:300] if lines else "no reason given"
