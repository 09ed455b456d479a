"""What replicas write comes to whoever started them, and elsewhere to their own standard error."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys

from gendist.serve.server_log import VARIABLE, shown_log

REPLICA = """
import logging, sys
from gendist.serve.server_log import write_log

write_log()
for number in range(100):
    logging.getLogger("gendist.access").info('{"replica": %s, "number": %d}', sys.argv[1], number)
try:
    1 / 0
except ZeroDivisionError:
    logging.getLogger("gendist").exception("request 1234 failed")
"""


def started(number: int, **environment: str) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", REPLICA, str(number)]
    return subprocess.Popen(words, env={**os.environ, **environment}, stderr=subprocess.PIPE, text=True)


def is_complete(log: str, *replicas: int) -> bool:
    noted = [tuple(json.loads(line).values()) for line in log.splitlines() if line.startswith("{")]
    failures = log.count("request 1234 failed"), log.count("ZeroDivisionError: division by zero")
    return sorted(noted) == [(replica, number) for replica in replicas for number in range(100)] and failures == (
        len(replicas), len(replicas),
    )  # fmt: skip


def test_every_line_of_every_replica_is_shown(tmp_path):
    shown = io.StringIO()
    with shown_log(tmp_path / "log", shown) as environment:
        replicas = [started(number, **environment) for number in range(2)]
        own = [replica.communicate(timeout=120)[1] for replica in replicas]
        late = started(2, **environment)  # when nobody else has the pipe open
        late.communicate(timeout=120)
    assert is_complete(shown.getvalue(), 0, 1, 2), shown.getvalue()
    assert own == ["", ""]


def test_elsewhere_it_is_standard_error():
    log = started(0).communicate(timeout=120)[1]
    assert is_complete(log, 0), log


def test_nobody_waits_for_a_log_that_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "log")
    reader = os.open(tmp_path / "log", os.O_RDONLY | os.O_NONBLOCK)
    try:
        # Many times what a pipe holds.
        words = [sys.executable, "-c", REPLICA.replace("range(100)", "range(20_000)") + "print('done', flush=True)", "0"]
        replica = subprocess.Popen(
            words, env={**os.environ, VARIABLE: str(tmp_path / "log")}, stdout=subprocess.PIPE, text=True
        )
        assert replica.stdout is not None
        assert replica.stdout.readline() == "done\n"  # else the test's own time limit ends it
    finally:
        replica.kill()
        replica.wait()
        replica.stdout.close()
        os.close(reader)
