"""Samples a second over HTTP: `gendist serve`, and the same decoder behind FastAPI with a batch by hand and behind LitServe.

    python benchmarks/serving.py [--replicas 2] [--seconds 3] [--decoder 32,16] [--only gendist,empty,fastapi,litserve]

Clients in a process of their own on the same machine, over loopback, in a closed loop of 1, 8, 32 and 128 connections; each
asks for 16 rows and takes .npy. Beside them what the model alone draws in as many processes of one thread as there are
replicas, which is the limit, and an empty deployment behind the same proxy. Then arrivals at random (Poisson) at 70 % of the
rate of 32 connections. LitServe and FastAPI where they are installed; the former's workers are as many as replicas, the latter
is shown with one process and with as many.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from serving_cases import ROWS_A_REQUEST, rows_per_s, save_cases, seconds_a_call
from serving_fuzz import fuzz
from tables import print_machine, print_table

HERE = Path(__file__).parent
CONCURRENCY = (1, 8, 32, 128)
COMPARED = 32  # the concurrency that ratios are of
LOAD = 0.7  # of the highest rate, for latencies under load
BODY = json.dumps({"num_samples": ROWS_A_REQUEST}).replace("}", ', "seed": %d}')
EMPTY_PATH = "/empty"

Measured = dict[int, dict[str, Any]]  # by concurrency


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, default=min(os.cpu_count() or 1, 4))
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement, after one of warming up")
    parser.add_argument("--decoder", default="32,16", help="channels of the decoder's convolutions")
    parser.add_argument("--only", default="alone,fastapi,litserve,gendist,empty", help="some of these")
    parser.add_argument("--models", default="vae,gmm,hmm", help="some of these")
    parser.add_argument("--fuzz", type=float, metavar="MINUTES", help="no speed: what it bears, for so long (serving_fuzz.py)")
    arguments = parser.parse_args()
    only, channels = set(arguments.only.split(",")), [int(number) for number in arguments.decoder.split(",")]
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", "")])
    print_machine(1)
    print(
        f"{arguments.replicas} replicas; {ROWS_A_REQUEST} rows a request; decoder of 28 x 28, channels {channels}", flush=True
    )
    with tempfile.TemporaryDirectory() as folder:
        saved = save_cases(Path(folder), channels)
        cases = {name: saved[name] for name in arguments.models.split(",")}
        if arguments.fuzz:
            with running_gendist(cases, arguments.replicas) as port:
                fuzz(port, list(cases), replicas_of_gendist(), arguments.fuzz)
            return
        measure(cases, only, arguments.replicas, arguments.seconds)


def measure(cases: Mapping[str, Path], only: set[str], replicas: int, seconds: float) -> None:
    alone: dict[str, float] = {}
    call_s: dict[str, float] = {}
    if "alone" in only:
        for name, path in cases.items():
            alone[name] = rows_per_s(path, replicas, seconds)
            call_s[name] = seconds_a_call(path)
    peers: dict[str, Measured] = {}
    for peer, num_processes in (("fastapi", 1), ("fastapi", replicas), ("litserve", replicas)):
        if peer not in only or "vae" not in cases:
            continue
        if importlib.util.find_spec(peer) is None:
            print(f"{peer} is not installed: left out")
            continue
        with running_peer(peer, cases["vae"], num_processes) as port:
            title = {"fastapi": "FastAPI, a batch by hand", "litserve": "LitServe, batched"}[peer]
            peers[f"{title}, {num_processes} processes"] = closed_loops(port, "/sample", seconds)
    ours: dict[str, Measured] = {}
    under_load: dict[str, dict[str, Any]] = {}
    if only & {"gendist", "empty"}:
        with running_gendist(cases, replicas) as port:
            if "empty" in only:
                ours["empty"] = closed_loops(port, f"{EMPTY_PATH}/", seconds)
            for name in cases if "gendist" in only else ():
                path = f"/models/{name}/sample?format=npy"
                ours[name] = closed_loops(port, path, seconds)
                rate = LOAD * ours[name][COMPARED]["requests"] / seconds
                under_load[name] = client(port, path, rate=rate, seconds=3 * seconds)
    report(cases, replicas, alone, call_s, peers, ours, under_load)


# The servers


@contextmanager
def running_peer(peer: str, artifact: Path, num_processes: int) -> Iterator[int]:
    port = free_port()
    words = [sys.executable, str(HERE / f"serving_{peer}.py"), str(artifact), str(port), str(num_processes)]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        await_answer(f"http://127.0.0.1:{port}/sample", process)
        yield port
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextmanager
def running_gendist(cases: Mapping[str, Path], replicas: int) -> Iterator[int]:
    """What `gendist serve` does, with an empty deployment of as many replicas beside it."""
    from gendist.serve.addresses import LOOPBACK, free_port
    from gendist.serve.local_server import on_this_machine
    from gendist.serve.server_config import server_config

    config = server_config({"models": {name: str(path) for name, path in cases.items()}, "num_replicas": replicas})
    with open(os.devnull, "w") as log, on_this_machine(config, LOOPBACK, free_port(LOOPBACK, 0), print, log) as url:
        from ray import serve

        @serve.deployment(num_replicas=replicas, ray_actor_options={"num_cpus": 0}, max_ongoing_requests=10_000)
        @serve.ingress()
        class Empty:
            def __init__(self) -> None:
                pass

            def __serve_build_asgi_app__(self) -> Any:
                from fastapi import FastAPI

                app = FastAPI()

                @app.post("/")
                async def nothing() -> None:
                    return None

                return app

        serve.run(Empty.options(logging_config={"enable_access_log": False}).bind(), name="empty", route_prefix=EMPTY_PATH)
        yield int(url.rpartition(":")[2])


def replicas_of_gendist() -> list[int]:
    """Their processes."""
    from gendist.serve.local_server import MARK, marked

    commands = {process: Path(f"/proc/{process}/cmdline").read_bytes() for process in marked(os.environ[MARK])}
    return [process for process, command in commands.items() if b"ServeReplica:gendist" in command]


def free_port() -> int:
    with socket.socket() as knock:
        knock.bind(("127.0.0.1", 0))
        return int(knock.getsockname()[1])


def await_answer(url: str, process: subprocess.Popen[bytes]) -> None:
    body = BODY.replace("%d", "0").encode()
    for _ in range(600):
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        try:
            urllib.request.urlopen(request, timeout=30)
        except urllib.error.HTTPError:
            raise
        except OSError:
            assert process.poll() is None, f"it has ended: {process.args}"
            time.sleep(0.1)
        else:
            return
    raise TimeoutError(url)


# The clients


def closed_loops(port: int, path: str, seconds: float) -> Measured:
    measured = {}
    for connections in CONCURRENCY:
        measured[connections] = client(port, path, connections=connections, seconds=seconds)
        print(f"  {path}  {connections}: {cell(measured[connections], 1)}", file=sys.stderr, flush=True)
    return measured


def client(port: int, path: str, **order: Any) -> dict[str, Any]:
    order = {"port": port, "path": path, "body": BODY, **order}
    words = [sys.executable, str(HERE / "serving_client.py")]
    done = subprocess.run(words, input=json.dumps(order), capture_output=True, text=True, check=True)
    measured: dict[str, Any] = json.loads(done.stdout)
    assert not measured["failures"], f"{path}: {measured['failures']}"
    assert measured["requests"], (
        f"{path}: nothing was answered in {order['seconds']} s; the machine is busy, or --seconds too few"
    )
    return measured


# The tables


def report(
    cases: Mapping[str, Path],
    replicas: int,
    alone: Mapping[str, float],
    call_s: Mapping[str, float],
    peers: Mapping[str, Measured],
    ours: Mapping[str, Measured],
    under_load: Mapping[str, Mapping[str, Any]],
) -> None:
    header = [f"{each} connections" if each > 1 else "1 connection" for each in CONCURRENCY]
    if "empty" in ours:
        print("\nRequests/s (p50, p99 ms) of an empty deployment, and as requests the models behind it:")
        print_table(["", *header], [[name, *(cell(each, 1) for each in ours[name].values())] for name in ours])
    for name in cases:
        rows = [[f"the model alone, {replicas} processes", *[f"{alone[name]:,.0f}"] * len(header)]] if name in alone else []
        if name == "vae":
            rows += [[peer, *(cell(each) for each in measured.values())] for peer, measured in peers.items()]
        if name in ours:
            rows.append([f"gendist serve, {replicas} replicas", *(cell(each) for each in ours[name].values())])
        if rows:
            print(f"\nSamples/s (p50, p99 ms) of the {name}:")
            print_table(["", *header], rows)
    lines = []
    for name in set(ours) - {"empty"}:
        measured = ours[name]
        compared = {f"{replicas} processes of the model alone": alone[name]} if name in alone else {}
        if name == "vae":
            compared |= {peer: samples_per_s(each[COMPARED]) for peer, each in peers.items()}
        for who, rate in compared.items():
            lines.append([f"{name}: samples/s at {COMPARED}, times {who}", f"{samples_per_s(measured[COMPARED]) / rate:.2f}"])
        if "empty" in ours:
            times = measured[COMPARED]["requests"] / ours["empty"][COMPARED]["requests"]
            lines.append([f"{name}: requests/s at {COMPARED}, times the empty deployment", f"{times:.2f}"])
        load = under_load[name]
        lines.append([f"{name}: p99 / p50 at {LOAD:.0%} load", f"{load['p99_s'] / load['p50_s']:.2f}"])
        lines.append([f"{name}: p50, p99 ms at {LOAD:.0%} load", f"{1e3 * load['p50_s']:.1f}, {1e3 * load['p99_s']:.1f}"])
        if name in call_s:
            more = 1e3 * (measured[1]["p50_s"] - call_s[name])
            lines.append([f"{name}: ms at 1 connection above the model alone ({1e3 * call_s[name]:.1f})", f"{more:.1f}"])
    if lines:
        print_table(["", ""], lines)


def samples_per_s(measured: Mapping[str, Any]) -> float:
    return float(ROWS_A_REQUEST * measured["requests"] / measured["seconds"])


def cell(measured: Mapping[str, Any], rows: int = ROWS_A_REQUEST) -> str:
    rate = rows * measured["requests"] / measured["seconds"]
    return f"{rate:,.0f} ({1e3 * measured['p50_s']:.1f}, {1e3 * measured['p99_s']:.1f})"


if __name__ == "__main__":
    main()
