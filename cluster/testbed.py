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

import atexit
import fcntl
import json
import os
import re
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from testbed_network import NoTestbed, do, free_subnet, ip, kill_all, links, namespaces, pids_in, why_not

REPOSITORY = Path(__file__).resolve().parents[1]
FOLDERS = Path("/tmp")  # a short path: the names of Ray's sockets, which begin with it, may have 107 characters
# Of all names: a bed is gdistbed1a2b, its bridge is called so, its hosts' namespaces gdistbed1a2b-0, ..., its cables
# gdistbed1a2bv0, ...: a link's name may have 15 characters.
PREFIX = "gdistbed"
NAME = re.compile(PREFIX + "[0-9a-f]{4}")
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
        return pids_in(self.name)


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
            subnet = free_subnet()
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
                ip("link", "add", self.name, "type", "bridge")
                ip("addr", "add", f"{subnet}.1/24", "dev", self.name)
                ip("link", "set", self.name, "up")
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
        ip("link", "set", self._wire(host), "down")

    def mend(self, host: Host) -> None:
        """Undo `cut` and `lossy`. A node that the cluster has given up meanwhile ends, and its Ray is started anew."""
        for end, inside in self._ends(host):
            for kind in ("root", "clsact"):
                subprocess.run([*inside, "tc", "qdisc", "del", "dev", end, kind], capture_output=True, check=False)
        ip("link", "set", self._wire(host), "up")

    def kill(self, host: Host) -> None:
        """As if its plug were pulled: no process there is left, and none could say goodbye to anybody. `restart` starts it."""
        self.cut(host)
        for name, process in _programs:
            if name == host.name:
                process.kill()  # it may be on its way there
        kill_all(host.name, host.pids)

    def end_programs(self) -> None:
        """Kill whatever this process has started on the hosts with `popen` and `run`, and its children: all but Ray."""
        names = {host.name for host in self.hosts}
        ended = [process for name, process in _programs if name in names and process not in _started]
        for process in ended:
            process.kill()  # it may be on its way to its host
        sessions = {process.pid for process in ended}
        kill_all(self.name, lambda: [pid for host in self.hosts for pid in host.pids() if _session(pid) in sessions])

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
                do(*change, "clsact")
                do(*inside, "tc", "filter", "add", "dev", end, "egress", "bpf", "da", "bytecode", program)
                how.add("a classifier's program")
            if rate:
                do(*change, "root", "tbf", *rate, "burst", "64kb", "latency", "400ms")
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
        ip("netns", "add", host.name)
        ip("link", "add", self._wire(host), "type", "veth", "peer", "name", "eth0", "netns", host.name)
        ip("link", "set", self._wire(host), "master", self.name, "up")
        ip("-n", host.name, "link", "set", "lo", "up")
        ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", "eth0")
        ip("-n", host.name, "link", "set", "eth0", "up")
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


def remove(name: str) -> None:
    """Take a bed down by its name: what runs on its hosts, its network, its folder. What is not there is passed over.

    NoTestbed where processes do not end; the rest is gone by then, and the next bed tries again.
    """
    if not _is_bed(FOLDERS / name):
        return
    stuck: NoTestbed | None = None
    for namespace in namespaces():
        if re.fullmatch(f"{name}-[0-9]+", namespace):
            try:
                kill_all(namespace, partial(pids_in, namespace))
            except NoTestbed as error:
                stuck = error
            subprocess.run(["ip", "netns", "del", namespace], capture_output=True, check=False)
    for link in links():
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
    found = [*namespaces(), *links(), *(path.name for path in FOLDERS.glob(f"{PREFIX}*"))]
    return [name for name in found if name.startswith(PREFIX)]


def _session(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None


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


def _end_of(log: Path) -> str:
    return " ".join(log.read_text(errors="replace").split())[-600:] if log.exists() else "no log"


if __name__ == "__main__":
    from testbed_command import main  # which imports this file as a module

    sys.exit(main())
