"""A Ray cluster of several hosts on one Linux machine, to see what becomes of work when hosts and networks fail.

    python cluster/testbed.py up --hosts 3      # prints what to try, from another terminal; Ctrl-C takes it all down

A host is a network namespace with an address of its own on a bridge, and all processes that run in it. Its Ray is started
again when it ends, as a service of a machine is; that of the head is not, since a cluster ends with its head. Hosts share this
machine's files and memory, but for temporary files: the same path is another folder on each of them. Needs root and iproute2,
and no package but Ray.

    with Testbed(num_hosts=3) as bed:
        bed.start_ray()
        driver = bed.hosts[0].popen(sys.executable, "launch.py", "fit", "spec.yaml", "--address", bed.address)
        bed.cut(bed.hosts[2])

Nothing is left behind: another process takes a bed down where the one that made it ends without doing so, however it ends; and
a new bed first removes those whose maker is gone, should that other process have been killed, too.
"""

from __future__ import annotations

import argparse
import atexit
import fcntl
import ipaddress
import json
import os
import re
import secrets
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
FOLDERS = Path("/tmp")  # a short path: the names of Ray's sockets, which begin with it, may have 107 characters
# Of all names: a bed is gdistbed1a2b, its bridge is called so, its hosts' namespaces gdistbed1a2b-0, ..., its cables
# gdistbed1a2bv0, ...: a link's name may have 15 characters.
PREFIX = "gdistbed"
NAME = re.compile(PREFIX + "[0-9a-f]{4}")
SUBNETS = [f"10.77.{number}" for number in range(1, 255)]
OWNER = "owner"  # in the folder of a bed: the process that made it. Nothing is removed where this file, root's own, is not
OWN = "own"  # in the folder of a bed: what a host finds there is its own folder
GCS_PORT, DASHBOARD_PORT = 6379, 8265
START_TIMEOUT_S = 60.0

# A lost node is noticed after five checks that fail: within 8 seconds.
RAY_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "5",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_prestart_worker_first_driver": "0",  # workers are started as they are needed, in the environment that they need
}


class NoTestbed(Exception):
    """A bed cannot be made here, or something asked of it not done; the message is one line that says why."""


@dataclass(frozen=True)
class Host:
    """The name is that of its network namespace; the folder has its temporary files, and Ray's with its logs."""

    number: int
    name: str
    address: str
    folder: Path
    _environment: Callable[[], dict[str, str]]

    def popen(self, *command: str, env: dict[str, str] | None = None, **options: Any) -> subprocess.Popen[Any]:
        """Start a command on this host, in a session of its own: `options` as those of Popen. It finds gendist in this
        repository and has the token of the cluster; `env` is added to that."""
        own = self.folder.parent / OWN
        environment = {**self._environment(), "TMPDIR": str(own / "tmp"), **(env or {})}
        # Ray tells a driver by files which node it is on: where hosts saw each other's, it would take itself for the head.
        enter = ["nsenter", f"--net=/run/netns/{self.name}", "unshare", "--mount", "--propagation", "slave"]
        inside = [*enter, "sh", "-c", 'mount --bind "$0" "$1" && shift && exec "$@"', str(self.folder), str(own), *command]
        process = subprocess.Popen(inside, env=environment, **{"cwd": REPOSITORY, "start_new_session": True, **options})
        _programs.append((self.name, process))
        return process

    def run(
        self, *command: str, timeout_s: float = 120.0, env: dict[str, str] | None = None, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on this host to its end, and keep what it says; it is killed after a while."""
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
        with self.popen(*command, env=env, **pipes) as process:
            try:
                out, err = process.communicate(timeout=timeout_s)
            except BaseException:
                os.killpg(process.pid, signal.SIGKILL)
                raise
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    def pids(self) -> list[int]:
        """Of all processes that run on this host."""
        return _pids(self.name)


class Testbed:
    """Hosts 0, 1, 2, ..., of which the first is the head of the cluster, once Ray is started.

    num_cpus             that each host tells Ray of
    head_cpus            that the head does, where it is another number: with 0 no worker runs beside the head and its driver
    object_store_memory  bytes of each host
    """

    __test__ = False  # pytest would take it for tests

    def __init__(
        self, num_hosts: int = 3, num_cpus: int = 1, object_store_memory: int = 120_000_000, head_cpus: int | None = None
    ):
        if reason := why_not():
            raise NoTestbed(reason)
        with _alone():
            remove_leftovers()
            taken = {found[: len(PREFIX) + 4] for found in _found()}
            self._begin(secrets.choice(sorted({f"{PREFIX}{number:04x}" for number in range(1 << 16)} - taken)))
            subnet = _free_subnet()
            self._folder.mkdir(mode=0o755)
            _write(self._folder / OWNER, _birth(os.getpid()))
            (self._folder / OWN).mkdir(mode=0o755)
            head_cpus = num_cpus if head_cpus is None else head_cpus
            self._settings = {"subnet": subnet, "num_cpus": num_cpus, "head_cpus": head_cpus}
            self._settings |= {"object_store_memory": object_store_memory}
            _write(self._folder / "bed.json", json.dumps(self._settings))
            # It reads to the end of its input, which comes with the end of this process.
            reap = [sys.executable, __file__, "reap", self.name]
            self._reaper = subprocess.Popen(reap, stdin=subprocess.PIPE, start_new_session=True, stdout=subprocess.DEVNULL)
            atexit.register(self.close)
            try:
                _ip("link", "add", self.name, "type", "bridge")
                _ip("addr", "add", f"{subnet}.1/24", "dev", self.name)
                _ip("link", "set", self.name, "up")
                for _ in range(num_hosts):
                    self._new_host()
            except BaseException:
                self.close()
                raise

    def _begin(self, name: str) -> None:
        self.name, self._folder = name, FOLDERS / name
        self._reaper: subprocess.Popen[Any] | None = None

    @classmethod
    def attached(cls, name: str | None = None) -> Testbed:
        """A bed that another process made: the only one, if it is not named. Closing it does nothing."""
        there = [found for found in _names() if (FOLDERS / found / "bed.json").exists()]
        if name not in there and (name or len(there) != 1):
            found = "there is none" if not there else f"there are {', '.join(there)}; choose with --bed"
            raise NoTestbed(f"which test bed? {found}")
        bed = cls.__new__(cls)
        bed._begin(name or there[0])
        bed._settings = json.loads((bed._folder / "bed.json").read_text())
        return bed

    def __enter__(self) -> Testbed:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Take everything down, which kills whatever runs on the hosts. Again: does nothing."""
        reaper, self._reaper = self._reaper, None
        if reaper is None:
            return
        atexit.unregister(self.close)
        try:
            remove(self.name)
        finally:
            assert reaper.stdin is not None
            reaper.stdin.close()
            reaper.wait()

    @property
    def folder(self) -> Path:
        """Of the bed, with a folder for each host, and the token."""
        return self._folder

    @property
    def hosts(self) -> list[Host]:
        """All of them, those that were killed included."""
        numbers = sorted(int(path.name) for path in self._folder.iterdir() if path.name.isdigit())
        return [self._host(number) for number in numbers]

    @property
    def address(self) -> str:
        """Of the head, for `--address` on any host; it can be reached from outside of the hosts, too."""
        return f"{self._host(0).address}:{GCS_PORT}"

    @property
    def jobs_address(self) -> str:
        return f"http://{self._host(0).address}:{DASHBOARD_PORT}"

    @property
    def token(self) -> str | None:
        """That the cluster asks for; None before Ray is started."""
        path = self._folder / "token"
        return path.read_text() if path.exists() else None

    def environment(self) -> dict[str, str]:
        """In which a program finds gendist in this repository, and may talk to the cluster."""
        ours = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        # The `python` of a job is the first in PATH.
        programs = os.pathsep.join([str(Path(sys.executable).parent), ours.get("PATH", os.defpath)])
        ours |= {
            **RAY_SETTINGS,
            "PATH": programs,
            "PYTHONPATH": str(REPOSITORY),
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
        }
        if (self._folder / "token").exists():
            ours |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self._folder / "token")}
        return ours

    def start_ray(self, token: str | None = None) -> None:
        """Start Ray on all hosts, with a dashboard on the head, and wait until the head knows them all."""
        _write(self._folder / "token", token or secrets.token_hex(32), mode=0o600)
        head, *others = self.hosts
        self._start_ray_on(head)
        self._wait_for_head()
        for host in others:
            self._start_ray_on(host)
        self.wait_for([head, *others])

    def add_host(self) -> Host:
        """One more, with Ray, where it was started; use `wait_for` to see it in the cluster."""
        with _alone():
            host = self._new_host()
        if self.token is not None:
            self._start_ray_on(host)
        return host

    def cut(self, host: Host) -> None:
        """Nothing from it reaches another, nor the other way round, from now on. Nobody is told: it looks as a cut wire does
        from the far end."""
        _ip("link", "set", self._wire(host), "down")

    def mend(self, host: Host) -> None:
        """Undo `cut` and `lossy`. A node that the cluster has given up meanwhile ends, and its Ray is started anew."""
        for end, inside in self._ends(host):
            for kind in ("root", "clsact"):
                subprocess.run([*inside, "tc", "qdisc", "del", "dev", end, kind], capture_output=True, check=False)
        _ip("link", "set", self._wire(host), "up")

    def kill(self, host: Host) -> None:
        """As if its plug were pulled: no process there is left, and none could say goodbye to anybody. `restart` starts it."""
        self.cut(host)
        for name, process in _programs:
            if name == host.name:
                process.kill()  # it may be on its way there
        _kill_all(host.name, host.pids)

    def end_programs(self) -> None:
        """Kill whatever this process has started on the hosts with `popen` and `run`, and its children: all but Ray."""
        names = {host.name for host in self.hosts}
        ended = [process for name, process in _programs if name in names and process not in _started]
        for process in ended:
            process.kill()  # it may be on its way to its host
        sessions = {process.pid for process in ended}
        _kill_all(self.name, lambda: [pid for host in self.hosts for pid in host.pids() if _session(pid) in sessions])

    def restart(self, host: Host) -> None:
        """Start a host that was killed: with its address, and with Ray, but without anything that ran there."""
        self.kill(host)
        self.mend(host)
        self._start_ray_on(host)

    def lossy(self, host: Host, loss: float = 0.0, delay_s: float = 0.0, rate_bits_per_s: float | None = None) -> str:
        """Lose a share of the packets to and from a host, let each wait, or let only so much through; returns what does it.

        netem does all of it, where the kernel has it. Else loss is a program for the kernel's classifier that draws a number
        for each packet (of up to 64 KB: they are cut to size behind it), and a rate is a token bucket (tbf); delays
        there are none then.
        """
        self.mend(host)
        rate = [] if rate_bits_per_s is None else ["rate", f"{int(rate_bits_per_s)}bit"]
        how: set[str] = set()
        for end, inside in self._ends(host):
            change = [*inside, "tc", "qdisc", "add", "dev", end]
            netem = ["root", "netem", "loss", f"{100 * loss:.4f}%", "delay", f"{delay_s * 1e6:.0f}us", *rate]
            if subprocess.run([*change, *netem], capture_output=True, check=False).returncode == 0:
                how.add("netem")
                continue
            if delay_s:
                self.mend(host)
                raise NoTestbed("the kernel has no netem (module sch_netem), without which packets cannot be delayed")
            if loss:
                # Classic BPF: A = random; if A >= loss * 2^32 return TC_ACT_OK (0), else TC_ACT_SHOT (2).
                program = f"4,32 0 0 4294963256,53 1 0 {int(loss * 0xFFFFFFFF)},6 0 0 2,6 0 0 0"
                _do(*change, "clsact")
                _do(*inside, "tc", "filter", "add", "dev", end, "egress", "bpf", "da", "bytecode", program)
                how.add("a classifier's program")
            if rate:
                _do(*change, "root", "tbf", *rate, "burst", "64kb", "latency", "400ms")
                how.add("tbf")
        return ", ".join(sorted(how))

    def alive(self) -> set[str]:
        """The addresses of the nodes that the cluster has; empty while the head does not answer."""
        request = urllib.request.Request(
            f"{self.jobs_address}/nodes?view=summary", headers={"Authorization": f"Bearer {self.token}"}
        )
        try:
            with urllib.request.urlopen(request, timeout=10.0) as answer:
                nodes = json.load(answer)["data"]["summary"]
        except (OSError, ValueError, KeyError):
            return set()
        return {node["raylet"]["nodeManagerAddress"] for node in nodes if node["raylet"].get("state") == "ALIVE"}

    def _wait_for_head(self) -> None:
        until = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                return socket.create_connection((self._host(0).address, GCS_PORT), timeout=1.0).close()
            except OSError as error:
                if time.monotonic() > until:
                    raise NoTestbed(
                        f"no head of Ray answers at {self.address}: ...{_end_of(self._host(0).folder / 'log')}"
                    ) from error
            time.sleep(0.1)

    def wait_for(self, hosts: Sequence[Host], timeout_s: float = START_TIMEOUT_S) -> None:
        """Until they are nodes of the cluster. NoTestbed, with the last lines of Ray's, when that takes too long."""
        wanted, until = {host.address: host for host in hosts}, time.monotonic() + timeout_s
        while missing := set(wanted) - self.alive():
            if time.monotonic() > until:
                host = wanted[min(missing)]
                raise NoTestbed(f"Ray on {host.address} did not start in {timeout_s:.0f} s: ...{_end_of(host.folder / 'log')}")
            time.sleep(0.2)

    def wait_until_lost(self, host: Host, timeout_s: float = 30.0) -> None:
        """Until the cluster has given it up."""
        until = time.monotonic() + timeout_s
        while host.address in self.alive():
            if time.monotonic() > until:
                raise NoTestbed(f"the cluster still has {host.address} after {timeout_s:.0f} s")
            time.sleep(0.2)

    def _host(self, number: int) -> Host:
        address = f"{self._settings['subnet']}.{10 + number}"
        return Host(number, f"{self.name}-{number}", address, self._folder / str(number), self.environment)

    def _wire(self, host: Host) -> str:
        """The end of its cable at the bridge; the other end is eth0 of the host."""
        return f"{self.name}v{host.number}"

    def _ends(self, host: Host) -> list[tuple[str, list[str]]]:
        """Both ends of the cable, each with what a command must begin with to reach it."""
        return [(self._wire(host), []), ("eth0", ["nsenter", f"--net=/run/netns/{host.name}", "--"])]

    def _new_host(self) -> Host:
        host = self._host(len(self.hosts))
        (host.folder / "tmp").mkdir(parents=True)
        _ip("netns", "add", host.name)
        _ip("link", "add", self._wire(host), "type", "veth", "peer", "name", "eth0", "netns", host.name)
        _ip("link", "set", self._wire(host), "master", self.name, "up")
        _ip("-n", host.name, "link", "set", "lo", "up")
        _ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", "eth0")
        _ip("-n", host.name, "link", "set", "eth0", "up")
        return host

    def _start_ray_on(self, host: Host) -> None:
        ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", f"--node-ip-address={host.address}"]
        num_cpus = self._settings["num_cpus" if host.number else "head_cpus"]
        ray += [f"--num-cpus={num_cpus}", "--num-gpus=0", f"--temp-dir={self._folder / OWN}"]
        ray += [f"--object-store-memory={self._settings['object_store_memory']}", "--include-log-monitor=false"]
        if host.number == 0:
            ray += ["--head", f"--port={GCS_PORT}", "--include-dashboard=true"]
            ray += [f"--dashboard-host={host.address}", f"--dashboard-port={DASHBOARD_PORT}"]
            command = ray
        else:
            command = ["sh", "-c", 'while :; do "$@"; sleep 1; done', "ray", *ray, f"--address={self.address}"]
        with (host.folder / "log").open("ab") as log:
            # Not this repository's gendist: a driver brings its own with it.
            process = host.popen(
                *command, env={"PYTHONPATH": ""}, cwd=host.folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        _started.append(process)


_started: list[subprocess.Popen[Any]] = []  # whose end nobody waits for; Python warns of one that is forgotten
_programs: list[tuple[str, subprocess.Popen[Any]]] = []  # that this process has started, and on which host


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
        arrives = _packet_arrives()
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


def _packet_arrives() -> bool:
    """Whether one of two namespaces on a bridge hears the other; it is all gone again. NoTestbed where they cannot be made."""
    _remove_old_trials()
    bridge = f"gdtrial{os.getpid()}"  # and one letter more: 15 characters at most
    hosts = [(f"{bridge}-{end}", f"{bridge}{end}", f"10.77.0.{number}/30") for number, end in enumerate("ab", 1)]
    namespaces, processes = [], []
    try:
        _ip("link", "add", bridge, "type", "bridge")
        _ip("link", "set", bridge, "up")
        for namespace, wire, address in hosts:
            _ip("netns", "add", namespace)
            namespaces.append(namespace)
            _ip("link", "add", wire, "type", "veth", "peer", "name", "eth0", "netns", namespace)
            _ip("link", "set", wire, "master", bridge, "up")
            _ip("-n", namespace, "addr", "add", address, "dev", "eth0")
            _ip("-n", namespace, "link", "set", "eth0", "up")
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
    for kind, names in (("netns", _namespaces()), ("link", _links())):
        for name in names:
            of = re.match(r"gdtrial([0-9]+)", name)
            if of and not Path("/proc", of[1]).exists():
                subprocess.run(["ip", kind, "del", name], capture_output=True, check=False)


def remove(name: str) -> None:
    """Take a bed down by its name: what runs on its hosts, its network, its folder. What is not there is passed over.

    NoTestbed where processes do not end; the rest is gone by then, and the next bed tries again.
    """
    if not _is_bed(FOLDERS / name):
        return
    stuck: NoTestbed | None = None
    for namespace in _namespaces():
        if re.fullmatch(f"{name}-[0-9]+", namespace):
            try:
                _kill_all(namespace, partial(_pids, namespace))
            except NoTestbed as error:
                stuck = error
            subprocess.run(["ip", "netns", "del", namespace], capture_output=True, check=False)
    for link in _links():
        if link == name or re.fullmatch(f"{name}v[0-9]+", link):
            subprocess.run(["ip", "link", "del", link], capture_output=True, check=False)
    for path in (FOLDERS / name).iterdir():
        if path.name != OWNER:
            shutil.rmtree(path, ignore_errors=True)
    if stuck is not None:
        raise stuck
    shutil.rmtree(FOLDERS / name, ignore_errors=True)


def remove_leftovers() -> None:
    """Those beds whose maker is gone."""
    for name in _names():
        if not _is_running(FOLDERS / name / OWNER):
            try:
                remove(name)
            except NoTestbed as error:
                print(f"a test bed whose maker is gone could not be removed: {error}", file=sys.stderr)


def _names() -> list[str]:
    """Of all beds."""
    return sorted(path.name for path in FOLDERS.glob(f"{PREFIX}*") if _is_bed(path))


def _is_bed(folder: Path) -> bool:
    """Whether root has made it a bed's: anybody may make a folder of such a name."""
    try:
        kinds = [(path.lstat(), is_kind) for path, is_kind in ((folder, stat.S_ISDIR), (folder / OWNER, stat.S_ISREG))]
    except OSError:
        return False
    return NAME.fullmatch(folder.name) is not None and all(
        is_kind(each.st_mode) and each.st_uid == 0 for each, is_kind in kinds
    )


def _found() -> list[str]:
    """Whatever has a name that begins as those of beds."""
    found = [*_namespaces(), *_links(), *(path.name for path in FOLDERS.glob(f"{PREFIX}*"))]
    return [name for name in found if name.startswith(PREFIX)]


def _namespaces() -> list[str]:
    return [line.split()[0] for line in _ip("netns", "list").splitlines() if line]


def _links() -> list[str]:
    return [link["ifname"] for link in json.loads(_ip("-j", "link") or "[]")]


def _pids(namespace: str) -> list[int]:
    answer = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True, check=False)
    return [int(line) for line in answer.stdout.split()]


def _session(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None


def _kill_all(where: str, pids: Callable[[], list[int]]) -> None:
    """Kill what `pids` finds, and what one of these starts meanwhile."""
    until = time.monotonic() + 20.0
    while left := pids():
        if time.monotonic() > until:
            raise NoTestbed(f"{where}: processes {left} do not end")
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def _free_subnet() -> str:
    routes = json.loads(_ip("-j", "-4", "route", "show", "table", "all") or "[]")
    taken = [ipaddress.ip_network(route["dst"], strict=False) for route in routes if route["dst"] != "default"]
    for subnet in SUBNETS:
        if not any(ipaddress.ip_network(f"{subnet}.0/24").overlaps(network) for network in taken):
            return subnet
    raise NoTestbed(f"no subnet is free between {SUBNETS[0]}.0 and {SUBNETS[-1]}.0")


def _birth(pid: int) -> str:
    """The process, and when it started, since its number may be another's later."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return f"{pid} {fields[19]}"


def _is_running(owner: Path) -> bool:
    try:
        birth = owner.read_text()
        return _birth(int(birth.split()[0])) == birth
    except (OSError, ValueError, IndexError):
        return False


@contextmanager
def _alone() -> Iterator[None]:
    """One process at a time on this machine looks for names and subnets that are free."""
    with (FOLDERS / f"{PREFIX}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _write(path: Path, text: str, mode: int = 0o644) -> None:
    path.touch(mode)
    path.write_text(text)


def _ip(*arguments: str) -> str:
    return _do("ip", *arguments)


def _do(*command: str) -> str:
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise NoTestbed(f"`{' '.join(command)}` failed: {error}") from error
    if answer.returncode != 0:
        reason = (answer.stderr.strip().splitlines() or ["no reason given"])[0]
        raise NoTestbed(f"`{' '.join(command)}` failed: {reason}")
    return answer.stdout


def _end_of(log: Path) -> str:
    return " ".join(log.read_text(errors="replace").split())[-600:] if log.exists() else "no log"


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
    remove(name)
    return 0


def _up(given: argparse.Namespace) -> int:
    def end(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, end)
    with Testbed(given.hosts, given.cpus, head_cpus=given.head_cpus) as bed:
        bed.start_ray()
        here = f"{shlex.quote(sys.executable)} {os.path.relpath(__file__)}"
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


if __name__ == "__main__":
    sys.exit(main())
