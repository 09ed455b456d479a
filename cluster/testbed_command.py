"""`python cluster/testbed.py VERB`: a test bed from the command line."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
from collections.abc import Sequence

import testbed
from testbed import NoTestbed, Testbed


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="A Ray cluster of several hosts on this machine, to break at will.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    up = verbs.add_parser("up", help="make a bed, start Ray on it, and keep it until Ctrl-C")
    up.add_argument("--hosts", type=int, default=3)
    up.add_argument("--cpus", type=int, default=1, help="that each host has for Ray (1)")
    up.add_argument("--head-cpus", type=int, help="that the head has (as many)")
    for verb, text in {
        "status": "the hosts, and which of them are nodes of the cluster",
        "add": "one more host",
        "cut": "cut a host's network",
        "mend": "undo cut and lossy",
        "kill": "kill all processes of a host",
        "restart": "start a host that was killed",
        "lossy": "lose, delay or throttle a host's packets",
        "exec": "run a command on a host",
    }.items():
        known = verbs.add_parser(verb, help=text)
        known.add_argument("--bed", help="its name, where there are several")
        if verb not in ("status", "add"):
            known.add_argument("host", type=int, help="0 is the head")
        if verb == "lossy":
            known.add_argument("--loss", type=float, default=0.0, help="share of the packets, such as 0.05")
            known.add_argument("--delay-s", type=float, default=0.0)
            known.add_argument("--rate-bits-per-s", type=float)
        if verb == "exec":
            known.add_argument("command", nargs=argparse.REMAINDER)
    verbs.add_parser("reap").add_argument("name")
    given = parser.parse_args(arguments)
    try:
        return _reap(given.name) if given.verb == "reap" else _up(given) if given.verb == "up" else _change(given)
    except NoTestbed as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _reap(name: str) -> int:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sys.stdin.buffer.read()
    testbed.remove(name)
    return 0


def _up(given: argparse.Namespace) -> int:
    def end(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, end)
    with Testbed(given.hosts, given.cpus, head_cpus=given.head_cpus) as bed:
        bed.start_ray()
        here = f"{shlex.quote(sys.executable)} {os.path.relpath(testbed.__file__)}"
        for host in bed.hosts:
            print(f"host {host.number}  {host.address}  logs in {host.folder}/session_latest/logs")
        print(f"Ray at {bed.address}, jobs at {bed.jobs_address}; its token is in {bed.folder}/token")
        print("\nFrom another terminal:")
        fit = f"launch.py fit configs/gmm_digits.yaml --address {bed.address} --run-dir runs/bed"
        for line in (
            f"exec 0 {shlex.quote(sys.executable)} {fit}",
            "cut 2",
            "mend 2",
            "lossy 1 --loss 0.05",
            "kill 2",
            "restart 2",
            "add",
            "status",
        ):
            print(f"  {here} {line}")
        environment = f"RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH={bed.folder}/token"
        print(f"  {environment} {shlex.quote(sys.executable)} -m ray.scripts.scripts job list --address {bed.jobs_address}")
        print("\nCtrl-C takes it all down.", flush=True)
        while True:
            signal.pause()


def _change(given: argparse.Namespace) -> int:
    bed = Testbed.attached(given.bed)
    if given.verb in ("status", "add"):
        added = bed.add_host() if given.verb == "add" else None
        if added:
            bed.wait_for([added])
        alive = bed.alive()
        for host in bed.hosts:
            print(f"host {host.number}  {host.address}  {'a node' if host.address in alive else 'not a node'} of the cluster")
        return 0
    hosts = bed.hosts
    if not 0 <= given.host < len(hosts):
        raise NoTestbed(f"there is no host {given.host}; there are 0 to {len(hosts) - 1}")
    host = hosts[given.host]
    if given.verb == "exec":
        if not given.command:
            raise NoTestbed("exec needs a command")
        return host.popen(*given.command, start_new_session=False, cwd=os.getcwd()).wait()
    if given.verb == "lossy":
        print(bed.lossy(host, given.loss, given.delay_s, given.rate_bits_per_s))
    else:
        getattr(bed, given.verb)(host)
    return 0
