"""Network namespaces of this machine: what is there, what runs in them, whether they can be made and hear one another."""

from __future__ import annotations

import ipaddress
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path

SUBNETS = [f"10.77.{number}" for number in range(1, 255)]


class NoTestbed(Exception):
    """A bed cannot be made here, or something asked of it not done; the message is one line that says why."""


@cache
def why_not() -> str | None:
    """Why no bed can be made here, in a line; None where it can."""
    if not sys.platform.startswith("linux"):
        return "a test bed needs Linux"
    if os.geteuid() != 0:
        return "a test bed needs root, for network namespaces"
    for tool, package in (("ip", "iproute2"), ("tc", "iproute2"), ("nsenter", "util-linux"), ("unshare", "util-linux")):
        if shutil.which(tool) is None:
            return f"a test bed needs `{tool}` of {package}"
    try:
        arrives = packet_arrives()
    except NoTestbed as error:
        return f"network namespaces, veth pairs and bridges are not to be had here ({error})"
    if not arrives:
        return (
            "packets do not pass a bridge here; a firewall filters it, as Docker's does: `sysctl -w "
            "net.bridge.bridge-nf-call-iptables=0` ends that"
        )
    return None


TRIAL_RECEIVER = """
import socket
receiving = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
receiving.bind(("10.77.0.1", 9999))
receiving.settimeout(10.0)
print("ready", flush=True)
receiving.recv(1)
"""
TRIAL_SENDER = """
import socket, time
sending = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
for _ in range(20):
    sending.sendto(b"1", ("10.77.0.1", 9999))
    time.sleep(0.1)
"""


def packet_arrives() -> bool:
    """Whether one of two namespaces on a bridge hears the other; it is all gone again. NoTestbed where they cannot be made."""
    _remove_old_trials()
    bridge = f"gdtrial{os.getpid()}"  # and one letter more: 15 characters at most
    hosts = [(f"{bridge}-{end}", f"{bridge}{end}", f"10.77.0.{number}/30") for number, end in enumerate("ab", 1)]
    namespaces, processes = [], []
    try:
        ip("link", "add", bridge, "type", "bridge")
        ip("link", "set", bridge, "up")
        for namespace, wire, address in hosts:
            ip("netns", "add", namespace)
            namespaces.append(namespace)
            ip("link", "add", wire, "type", "veth", "peer", "name", "eth0", "netns", namespace)
            ip("link", "set", wire, "master", bridge, "up")
            ip("-n", namespace, "addr", "add", address, "dev", "eth0")
            ip("-n", namespace, "link", "set", "eth0", "up")
        python = [["nsenter", f"--net=/run/netns/{namespace}", sys.executable, "-S", "-c"] for namespace in namespaces]
        silent = {"stderr": subprocess.DEVNULL, "text": True}
        receiver = subprocess.Popen([*python[0], TRIAL_RECEIVER], stdout=subprocess.PIPE, **silent)
        processes.append(receiver)
        assert receiver.stdout is not None
        if receiver.stdout.readline() != "ready\n":
            raise NoTestbed("a program in a network namespace cannot listen")
        processes.append(subprocess.Popen([*python[1], TRIAL_SENDER], stdout=subprocess.DEVNULL, **silent))
        return receiver.wait(30) == 0
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoTestbed(str(error)) from error
    finally:
        for process in processes:
            process.kill()
            process.communicate()
        for namespace in namespaces:
            subprocess.run(["ip", "netns", "del", namespace], capture_output=True, check=False)
        subprocess.run(["ip", "link", "del", bridge], capture_output=True, check=False)


def _remove_old_trials() -> None:
    """What those have left that were killed."""
    for kind, names in (("netns", namespaces()), ("link", links())):
        for name in names:
            of = re.match(r"gdtrial([0-9]+)", name)
            if of and not Path("/proc", of[1]).exists():
                subprocess.run(["ip", kind, "del", name], capture_output=True, check=False)


def namespaces() -> list[str]:
    """The names of all of them."""
    return [line.split()[0] for line in ip("netns", "list").splitlines() if line]


def links() -> list[str]:
    """The names of all bridges, cables and other links."""
    return [link["ifname"] for link in json.loads(ip("-j", "link") or "[]")]


def pids_in(namespace: str) -> list[int]:
    """Of all processes that run there."""
    answer = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True, check=False)
    return [int(line) for line in answer.stdout.split()]


def kill_all(where: str, pids: Callable[[], list[int]]) -> None:
    """Kill what `pids` finds, and what one of these starts meanwhile."""
    until = time.monotonic() + 20.0
    while left := pids():
        if time.monotonic() > until:
            raise NoTestbed(f"{where}: processes {left} do not end")
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def free_subnet() -> str:
    """The first three numbers of addresses that no route leads to."""
    routes = json.loads(ip("-j", "-4", "route", "show", "table", "all") or "[]")
    taken = [ipaddress.ip_network(route["dst"], strict=False) for route in routes if route["dst"] != "default"]
    for subnet in SUBNETS:
        if not any(ipaddress.ip_network(f"{subnet}.0/24").overlaps(network) for network in taken):
            return subnet
    raise NoTestbed(f"no subnet is free between {SUBNETS[0]}.0 and {SUBNETS[-1]}.0")


def ip(*arguments: str) -> str:
    return do("ip", *arguments)


def do(*command: str) -> str:
    """What a command says. NoTestbed where it fails."""
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise NoTestbed(f"`{' '.join(command)}` failed: {error}") from error
    if answer.returncode != 0:
        reason = (answer.stderr.strip().splitlines() or ["no reason given"])[0]
        raise NoTestbed(f"`{' '.join(command)}` failed: {reason}")
    return answer.stdout
