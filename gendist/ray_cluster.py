"""A connection to Ray: this machine by default, a cluster by its address.

Ray listens on all interfaces of a machine, whatever it is told: what keeps others out is the token. A Ray of our own has one,
and a cluster that has one is told ours by the environment (RAY_AUTH_MODE=token, and the token as below).
"""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
# Tasks that are killed because memory is short are tried again without end otherwise, ever more seconds apart.
os.environ.setdefault("RAY_task_oom_retries", "8")

import ray
from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS
from ray.autoscaler.v2.utils import is_autoscaler_v2
from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply
from ray.experimental.internal_kv import _internal_kv_get, internal_kv_get_gcs_client

from gendist.machine import machine_type
from gendist.protocols import UserError
from gendist.secrets_in_urls import require_no_secret, without_secrets
from gendist.started_by import is_in_a_job

# glibc hands step-sized memory back to the system and pays for its pages at every step; it reads these when a worker starts.
WORKER_ENVIRONMENT = {
    "MALLOC_TRIM_THRESHOLD_": "4000000000",
    "MALLOC_MMAP_THRESHOLD_": "4000000000",
    "MALLOC_TOP_PAD_": "268435456",
}
CPU_WORKER: Mapping[str, float] = {"CPU": 1}
GPU_WORKER: Mapping[str, float] = {"CPU": 1, "GPU": 1}
CONNECT_TIMEOUT_S = 5.0
ANSWER_TIMEOUT_S = 60.0  # it takes seconds on a machine with nothing else to do
MACHINES_LIMIT_S = 20.0  # that is waited for the nodes to say what machines they are
NEW_NODE_LIMIT_S = 900.0  # that it waits for an autoscaler at its beginning: a machine starts, and is set up
NO_ROOM_LIMIT_S = 300.0  # that a run waits for a cluster that has lost too many nodes
HEAD_LIMIT_S = 20.0  # that it waits for a head that does not answer; after 60 Ray ends the process, and does not say why
LOOK_AT_ROOM_EVERY_S = 1.0
UNEXPECTED = (2, 3)  # reasons for the end of a node: it was lost, or taken away for somebody else
APART_S = 15.0  # looks that are further apart say nothing of the time between them: the process may have slept
END_LIMIT_S = 20.0  # of a command whose head is gone: Ray's own end waits for it
LOST_NODE = re.compile(r"address: (\S+) and node name: \S+ has been marked dead")
logger = logging.getLogger("gendist")


@contextmanager
def ray_cluster(num_workers: int, address: str | None, num_gpus: int = 0) -> Iterator[None]:
    """Connect to Ray for the length of a `with` block.

    address   "HOST:PORT" of a head, or None: the cluster this process is connected to, the one RAY_ADDRESS names, or a
              Ray of our own on this machine, which is stopped at the end

    num_gpus  that each worker needs

    UserError where the address does not answer, or the cluster has no room for the workers.
    """
    address = address or os.environ.get("RAY_ADDRESS") or None
    ours = not ray.is_initialized()
    if ours:
        _without_head.clear()
    with _hearing_of_lost_nodes() if ours and address not in (None, "local") else nullcontext():
        yield from _connected(num_workers, address, num_gpus, ours)


def _connected(num_workers: int, address: str | None, num_gpus: int, ours: bool) -> Iterator[None]:
    if ours:
        with uninterrupted():
            _connect(num_workers, address)
    elif address is not None:
        if address != "local":
            check_reachable(address)
        connected = ray.get_runtime_context().gcs_address
        if address not in (connected, "auto", "local"):
            raise UserError(f"--address {address}: this process is connected to Ray at {connected}; call ray.shutdown() first")
    try:
        check_room(num_workers, GPU_WORKER if num_gpus else CPU_WORKER)
        yield
    finally:
        if ours and not is_without_head():  # which Ray's end would wait for
            with uninterrupted():
                ray.shutdown()


def room(each: Mapping[str, float]) -> int:
    """How many workers the cluster could hold if nothing else ran there; each needs its resources on one node."""
    return sum(_room_of(node, each) for node in ray.nodes() if node["Alive"])


def _room_of(node: Mapping[str, Any], each: Mapping[str, float]) -> int:
    return int(min(node["Resources"].get(kind, 0) // amount for kind, amount in each.items()))


def check_room(num_workers: int, each: Mapping[str, float]) -> None:
    """UserError where the cluster has no room for the workers, which Ray would wait for without an end. Where nodes may still
    come, they are waited for first: an autoscaler starts them on demand; and in a job, which may be the next attempt after one
    whose node was lost, that node may come back.
    """
    there = room(each)
    if num_workers <= there:
        return
    is_growing = has_autoscaler()
    if not is_growing and (not is_in_a_job() or num_workers > most_room(ray.nodes(), each)):
        raise _no_room(num_workers, there, each)
    limit_s = NEW_NODE_LIMIT_S if is_growing else NO_ROOM_LIMIT_S
    logger.info("the cluster has room for %d of %d workers; waiting up to %.0f s for more nodes", there, num_workers, limit_s)
    lookout = Lookout(each, num_workers, limit_s)
    demand = ray.util.placement_group([dict(each)] * num_workers)
    try:
        while (there := lookout.look()) < num_workers:
            if is_growing and is_refused(demand.id.hex()):
                raise _no_room(num_workers, there, each)
            time.sleep(LOOK_AT_ROOM_EVERY_S)
    finally:
        if not is_without_head():
            ray.util.remove_placement_group(demand)


def _no_room(num_workers: int, there: int, each: Mapping[str, float]) -> UserError:
    return UserError(
        f"cluster.num_workers is {num_workers}, but the cluster has "
        + (f"{there} GPUs with a CPU beside each" if "GPU" in each else f"{there} CPUs")
        + f"; ask for at most {there}"
        + (", or leave cluster.use_gpu out" if "GPU" in each else "")
    )


def most_room(nodes: Sequence[Mapping[str, Any]], each: Mapping[str, float]) -> int:
    """The room there would be if the lost nodes came back, each as large as the largest that is there."""
    alive = [node for node in nodes if node["Alive"]]
    addresses = {node["NodeManagerAddress"] for node in alive}
    lost = {node["NodeManagerAddress"] for node in nodes if not node["Alive"] and node.get("DeathReason") in UNEXPECTED}
    rooms = [_room_of(node, each) for node in alive]
    largest = max(rooms, default=0) or sys.maxsize  # where none is left, how large they were is not known
    return sum(rooms) + largest * len(lost - addresses)


def has_autoscaler() -> bool:
    """Whether something starts nodes where there is work for them. Ray's monitor runs anywhere, and says what it looks after:
    where nobody gave it types of nodes, each node is a type of its own."""
    if is_autoscaler_v2():
        return True  # it is there where somebody has set one up, and says by itself what it will never do
    said = json.loads(_internal_kv_get(DEBUG_AUTOSCALING_STATUS) or "{}")
    return knows_types_of_nodes(said.get("autoscaler_report") or {})


def knows_types_of_nodes(report: Mapping[str, Any]) -> bool:
    """Whether what Ray's first autoscaler reports is about nodes that it can start."""
    names = {*(report.get("node_type_mapping") or {}).values(), *(report.get("active_nodes") or {})}
    return not all(re.fullmatch(r"node_[0-9a-f]+", name) for name in names)


def is_refused(demand: str) -> bool:
    """Whether the autoscaler says that no node which it may start will do; the first one does not say it.

    demand  the id of a placement group
    """
    if not is_autoscaler_v2():
        return False
    reply = GetClusterStatusReply()
    with suppress(ray.exceptions.RpcError):  # the lookout has an eye on the head
        reply.ParseFromString(internal_kv_get_gcs_client().get_cluster_status(timeout_s=CONNECT_TIMEOUT_S))
    return any(demand in request.details for request in reply.autoscaling_state.infeasible_gang_resource_requests)


class Lookout:
    """With a cluster whose head is gone, or that has not the room for what is waited for: it has an end.

    needed   workers, at least
    limit_s  after which `look` gives up where they have no room
    """

    def __init__(self, each: Mapping[str, float], needed: int = 1, limit_s: float | None = None):
        self._each, self._needed = each, needed
        self._limit_s = NO_ROOM_LIMIT_S if limit_s is None else limit_s
        self._without_room_since: float | None = None
        self._silence = Silence()

    def look(self) -> int:
        """To be called now and then while one waits; how many workers there is room for. UserError once that has been too
        few for too long, or the head is gone."""
        there, now = (room(self._each) if self._head_answers() else 0), time.monotonic()  # Ray's answer may never come
        if there >= self._needed:
            self._without_room_since = None
        elif self._without_room_since is None:
            self._without_room_since = now
        elif now - self._without_room_since > self._limit_s:
            raise UserError(
                f"the cluster has had room for {there} of {self._needed} workers for {self._limit_s:.0f} s; add nodes and run "
                "the command again: what was reached is kept, and it goes on from there"
            )
        return there

    def _head_answers(self) -> bool:
        if ray.util.client.ray.is_connected():
            return True  # ray://: the address of the head is one inside of the cluster
        head = ray.get_runtime_context().gcs_address
        silent_s = self._silence.heard(_answers(head), time.monotonic())
        if silent_s > HEAD_LIMIT_S:
            _without_head.set()
            raise UserError(
                f"the head of the cluster ({head}) has not answered for {silent_s:.0f} s; once there is one, run the command "
                "again: what was reached is kept, and it goes on from there (Ray itself may end this process, 60 s after it "
                "lost the head; ray.shutdown() waits for the head)"
            )
        return silent_s == 0.0


class Silence:
    """For how long there has been no answer, as far as one knows: from the first of looks that follow one another."""

    def __init__(self) -> None:
        self._since: float | None = None
        self._looked_at = 0.0

    def heard(self, answered: bool, now: float) -> float:
        """After a look at `now` (seconds); more than 0 where there was no answer."""
        if answered:
            self._since = None
            return 0.0
        if self._since is None or now - self._looked_at > APART_S:
            self._since = now
        self._looked_at = now
        return max(now - self._since, 1e-9)


def host_and_port(address: str) -> tuple[str, int] | None:
    """Of "HOST:PORT", "[::1]:PORT" and "ray://HOST:PORT"; None where it is none of them."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    return (host, int(port)) if host and port.isascii() and port.isdigit() else None


def _answers(head: str) -> bool:
    place = host_and_port(head)
    assert place is not None
    try:
        socket.create_connection(place, timeout=CONNECT_TIMEOUT_S).close()
    except OSError:
        return False
    return True


_without_head = threading.Event()


def is_without_head() -> bool:
    """Whether the head of the cluster is gone, so that Ray answers nothing any more, and waits for it without an end."""
    return _without_head.is_set()


def end_without_head(code: int) -> None:
    """For a command that has said why it ends: where the head is gone, it has a while to do so by itself, and is ended then."""
    if is_without_head():
        timer = threading.Timer(END_LIMIT_S, os._exit, [code])
        timer.daemon = True
        timer.start()


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold back Ctrl-C and SIGTERM: an interrupt in the middle of Ray's start or end can crash the process. And undo what
    Ray does to the handlers of both."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held_back: list[int] = []
    signals = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda number, _: held_back.append(number)) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if held_back:
        raise KeyboardInterrupt


def _connect(num_workers: int, address: str | None) -> None:
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is None or address == "local":
        logger.info("starting Ray on this machine")
        # More workers than cores are granted on one's own machine: it is slower, and gives the same result.
        num_cpus = max(num_workers, os.cpu_count() or 1)
        os.environ.update({name: value for name, value in WORKER_ENVIRONMENT.items() if name not in os.environ})
        require_token()
        ray.init(address="local", num_cpus=num_cpus, include_dashboard=False, **quiet)
        return
    check_reachable(address)
    logger.info("connecting to Ray at %s", address)
    try:
        # The cluster's workers run this very code; its dependencies must be installed there. A job has brought it along.
        package = {} if is_in_a_job() else {"py_modules": [str(Path(__file__).parent)]}
        ray.init(address=address, runtime_env={**package, "env_vars": WORKER_ENVIRONMENT}, **quiet)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"cannot connect to Ray at {address}: {reason}") from error
    _warn_of_mixed_machines()


def require_token(token_file: Path | None = None) -> None:
    """See to it that there is a token, of the environment or the user's own, which Ray then asks of whoever would use the Ray
    that is started next. Ray would make one, too, but so that others on this machine could read it.

    token_file  where Ray looks for it (default ~/.ray/auth_token)
    """
    mode = os.environ.get("RAY_AUTH_MODE", "token")
    if mode.lower() != "token":
        logger.warning("RAY_AUTH_MODE is %s: whoever reaches this machine can run code in this Ray", mode)
        return
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return
    token_file = token_file or Path.home() / ".ray" / "auth_token"
    whole = token_file.with_name(f".auth_token-{os.getpid()}")
    try:
        token_file.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(whole, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
        os.link(whole, token_file)  # by which it appears whole, and only where there is none
    except FileExistsError:
        if token_file.stat().st_mode & 0o077:
            logger.warning("%s could be read by others; it no longer can", token_file)
            token_file.chmod(0o600)
    except OSError:  # no home of one's own, or none that can be written to
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    finally:
        with suppress(OSError):
            whole.unlink()


def check_reachable(address: str) -> None:
    """UserError unless a Ray head answers. `ray.init` itself can try for ever, or end the process: so knock first."""
    if address == "auto":
        return
    require_no_secret(address, "--address")
    place = host_and_port(address)
    if place is None or "@" in place[0]:
        shown = without_secrets(address).rpartition("@")[2]
        raise UserError(f"--address {shown}: not an address; give HOST:PORT of a Ray head, such as 10.0.0.1:6379")
    try:
        socket.create_connection(place, timeout=CONNECT_TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        raise UserError(
            f"--address {address}: nothing answers there ({error}); is `ray start --head` running, and the port open?"
        ) from error
    if address.startswith("ray://"):
        return
    status = [sys.executable, "-m", "ray.scripts.scripts", "status", "--address", address]
    try:
        subprocess.run(status, timeout=ANSWER_TIMEOUT_S, check=True, capture_output=True)
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError) as error:
        said = b"".join(each or b"" for each in (error.stdout, error.stderr)).decode(errors="replace")
        late = (
            f" (or one too busy to answer in {ANSWER_TIMEOUT_S:.0f} s)" if isinstance(error, subprocess.TimeoutExpired) else ""
        )
        raise UserError(f"--address {address}: {refusal(said)}{late}") from error


def refusal(said: str) -> str:
    """Why `ray status` did not get its answer, from what it said."""
    if "authenticat" in said.lower() or "auth_token" in said.lower() or "authtoken" in said.lower():
        return (
            "this Ray answers those alone who have its token; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to a file that "
            "holds it (or RAY_AUTH_TOKEN; ~/.ray/auth_token is looked at, too)"
        )
    return "something listens there, but it is no Ray head of this version"


@contextmanager
def _hearing_of_lost_nodes() -> Iterator[None]:
    """In a line each, where Ray would print the ends of their logs between those of a progress bar."""
    worker = ray._private.worker
    rays = getattr(worker, "print_to_stdstream", None)

    def hear(data: Mapping[str, Any], ignore_prefix: bool) -> None:
        lost = [found.group(1) for line in data["lines"] if (found := LOST_NODE.search(line))]
        for address in lost:
            logger.warning("the cluster has lost the node %s; what it was at is done again elsewhere", address)
        if not lost and rays is not None:
            rays(data, ignore_prefix)

    if rays is not None:
        worker.print_to_stdstream = hear
    try:
        yield
    finally:
        if rays is not None:
            worker.print_to_stdstream = rays


def _warn_of_mixed_machines() -> None:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]
    ask = ray.remote(num_cpus=0)(machine_type)  # which waits for nobody's work
    answers = [ask.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=True)).remote() for node in nodes]
    # Those that are late are left to end: cancelled while it imports torch, a worker could do nothing else after that.
    done, _ = ray.wait(answers, num_returns=len(answers), timeout=MACHINES_LIMIT_S) if answers else ([], [])
    machines = [machine_type()]
    for answer in done:
        with suppress(ray.exceptions.RayError):  # a node may be lost just now, and a warning is not worth a run
            machines.append(ray.get(answer))
    warn_if_mixed(machines)


def warn_if_mixed(machines: Sequence[dict[str, str]]) -> None:
    """The promise of equal bytes holds for one type of machine; a task may run on any."""
    kinds = {", ".join(f"{key} {value}" for key, value in machine.items()) for machine in machines}
    if len(kinds) > 1:
        logger.warning("the cluster mixes machines (%s): results may differ in their last bits", "; ".join(sorted(kinds)))
