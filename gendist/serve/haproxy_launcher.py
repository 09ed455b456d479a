"""HAProxy as Ray Serve starts it, made fit for a machine of one's own. A program: Serve is told that it is HAProxy
(`local_server` writes the shell script that calls it), and it becomes HAProxy once it has changed what Serve has set down.

    haproxy_launcher.py HAPROXY HOST ERROR_FILES ...     ... are the arguments that Serve has for HAProxy

- HAProxy ends with whoever started it, also where that one was killed: it would keep the port.
- HAProxy alone listens on HOST: Serve and its replicas listen on loopback, whatever HOST is. Its two pages of statistics, for
  which Serve opens ports on all interfaces, are left out.
- What HAProxy has to say for itself (a body is not whole, no replica is there, one has died over a request, one does not
  answer) is what the folder ERROR_FILES holds, as 400.http, 503.http and so on: no page of HTML, and not a plain 500, which
  tells nobody whether to come again.
- What Serve would have it say at /-/routes, without a token, is said to nobody.
- It writes no line for each request: the replicas do.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import sys

DISCONNECT = "http-request set-header x-request-disconnect-disabled ?1"
PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
NO_ROUTES = """404 content-type application/json string '{"error": "no such path", "field": "path", "allowed": null}'"""


def adapted(config: str, host: str, error_files: str) -> str:
    """The text of HAProxy's configuration, changed as said above. It may have been changed already."""
    config = re.sub(r"^(frontend prometheus|listen stats)\n(\s+.*\n)*", "", config, flags=re.MULTILINE)
    config = re.sub(r"^(frontend http_frontend\n\s*bind )\S+(:\d+)", rf"\g<1>{host}\g<2>", config, flags=re.MULTILINE)
    if DISCONNECT not in config:
        config = re.sub(r"^(frontend http_frontend\n(\s*bind .*\n)+)", rf"\g<1>    {DISCONNECT}\n", config, flags=re.MULTILINE)
    config = re.sub(r"^\s*errorfile .*\n", "", config, flags=re.MULTILINE)
    own = "".join(
        f"    errorfile {file[:-5]} {error_files}/{file}\n"
        for file in sorted(os.listdir(error_files))
        if file.endswith(".http")
    )
    config = re.sub(r"^(defaults\n)", rf"\g<1>{own}", config, flags=re.MULTILINE)
    config = re.sub(r"^(\s*http-request return status ).*( if routes)$", rf"\g<1>{NO_ROUTES}\g<2>", config, flags=re.MULTILINE)
    return re.sub(r"^\s*(log|option httplog|option log-health-checks)\b.*\n", "", config, flags=re.MULTILINE)


def main() -> None:
    haproxy, host, error_files, *arguments = sys.argv[1:]
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    path = arguments[arguments.index("-f") + 1]
    with open(path) as file:
        config = file.read()
    with open(path, "w") as file:
        file.write(adapted(config, host, error_files))
    os.execv(haproxy, [haproxy, *arguments])


if __name__ == "__main__":
    main()
