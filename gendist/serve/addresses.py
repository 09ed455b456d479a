"""Where a server listens, and where it is asked: hosts, ports, and who has them."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
from contextlib import suppress
from pathlib import Path

from gendist.protocols import UserError

LOOPBACK = "127.0.0.1"


def resolved(host: str) -> str:
    """The address of a host's name."""
    try:
        return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        raise UserError(f"--host {host}: {error.strerror}; give an address of this machine, 127.0.0.1 or 0.0.0.0") from error


def asked_at(host: str, address: str) -> str:
    """Where the proxies of a cluster that listen on `host` are asked; address: of its head. UserError where they would hear
    their own machines alone, and this is none of them."""
    head = address.removeprefix("ray://").rpartition(":")[0].strip("[]") or LOOPBACK
    listens = ipaddress.ip_address(host)
    if listens.is_unspecified:
        return head
    if listens.is_loopback and not is_here(head):
        raise UserError(
            f"--host {host} --address {address}: only the cluster's own machines could call it; give --host 0.0.0.0, with "
            "--token-file FILE or --insecure"
        )
    return host


def is_here(host: str) -> bool:
    """Whether it is this machine."""
    try:
        address = resolved(host)
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as knock:
            knock.bind((address, 0))
    except (OSError, UserError):
        return False
    return True


def in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def free_port(host: str, port: int) -> int:
    """The port, or one that is free for 0; UserError where another process listens there."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as knock:
        knock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that have just ended do not matter
        try:
            knock.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise UserError(f"--port {port}: in use{_by_whom(port)}; end that one, or choose another port") from error
            raise UserError(f"--host {host} --port {port}: {error.strerror}") from error
        return int(knock.getsockname()[1])


def _by_whom(port: int) -> str:
    """By process 1234 (its command), where that can be seen."""
    sockets = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with suppress(OSError):
            for line in Path(table).read_text().splitlines()[1:]:
                _, local, _, state, *others = line.split()
                if state == "0A" and int(local.rpartition(":")[2], 16) == port:  # 0A: it listens
                    sockets.add(f"socket:[{others[5]}]")
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if any(os.readlink(file) in sockets for file in (process / "fd").iterdir()):
                command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                return f" by process {process.name} ({command[:60]})"
    return ""


def to_call(url: str) -> str:
    """Where a server that listens on every address of this machine is called from itself."""
    return url.replace("//0.0.0.0:", f"//{LOOPBACK}:").replace("//[::]:", "//[::1]:")
