"""What a server has to bear: for some minutes, requests that are damaged, senseless, cut short or given up, several at a time;
then a valid one, whose answer must be what it was, and the memory of the replicas, beside what it was.

    python benchmarks/serving.py --fuzz 10
"""

from __future__ import annotations

import json
import random
import socket
import struct
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from gendist.protocols import VERBS

NUM_CLIENTS = 8
VALUES = (
    None,
    True,
    -1,
    0,
    1,
    10**12,
    2**64,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "a",
    "\0",
    [],
    [[]],
    [[1.0, None]],
    {},
    {"a": 1},
)
KEYS = ("num_samples", "seed", "offset", "given", "length", "x", "z", "other")
KINDS = ("application/json", "application/x-npy", "application/vnd.apache.arrow.stream", "text/plain", "")


def fuzz(port: int, names: Sequence[str], replicas: Sequence[int], minutes: float) -> None:
    """AssertionError where a request is answered by 5xx, or the valid one otherwise than before."""
    valid = request(f"/models/{names[0]}/sample?format=npy", b'{"num_samples": 16, "seed": 7}', KINDS[0])
    before, memory = body_of(answer(port, valid)), [resident_bytes(process) for process in replicas]
    until = time.monotonic() + 60 * minutes
    with ThreadPoolExecutor(NUM_CLIENTS) as pool:
        counts = sum(pool.map(lambda seed: senseless(port, names, until, seed), range(NUM_CLIENTS)), Counter[str]())
    print(f"answered by status: {dict(sorted(counts.items()))}")
    assert not [status for status in counts if status.startswith("5") and status != "503"], counts
    assert body_of(answer(port, valid)) == before, "a valid request is answered otherwise than before"
    for process, was in zip(replicas, memory, strict=True):
        print(f"replica {process}: {was / 2**20:.0f} MiB before, {resident_bytes(process) / 2**20:.0f} MiB after")


def senseless(port: int, names: Sequence[str], until: float, seed: int) -> Counter[str]:
    """The statuses of what one client sends, one after another."""
    rng, counts = random.Random(seed), Counter[str]()
    while time.monotonic() < until:
        name, verb = rng.choice([*names, "nobody"]), rng.choice([*VERBS, "other"])
        path = f"/models/{name}/{verb}?format={rng.choice(['json', 'npy', 'arrow', 'no'])}"
        content = {rng.choice(KEYS): rng.choice(VALUES) for _ in range(rng.randrange(4))}
        body = bytearray(json.dumps(content).encode())
        if rng.random() < 0.3:
            body[rng.randrange(len(body)) :] = rng.randbytes(rng.randrange(50))
        whole = request(path, bytes(body), rng.choice(KINDS))
        if rng.random() < 0.2:
            give_up(port, whole[: rng.randrange(len(whole) + 1)], rng.random() < 0.5)
            counts["given up"] += 1
            continue
        counts[answer(port, whole)[9:12].decode()] += 1
    return counts


def request(path: str, body: bytes, kind: str) -> bytes:
    head = (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
        f"Content-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def answer(port: int, content: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=120) as connection:
        connection.sendall(content)
        parts = []
        while part := connection.recv(2**20):
            parts.append(part)
    return b"".join(parts)


def body_of(content: bytes) -> bytes:
    return content.partition(b"\r\n\r\n")[2]


def give_up(port: int, part: bytes, rudely: bool) -> None:
    connection = socket.create_connection(("127.0.0.1", port), timeout=120)
    connection.sendall(part)
    if rudely:  # a reset in place of an end
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def resident_bytes(process: int) -> int:
    return 4096 * int(Path(f"/proc/{process}/statm").read_text().split()[1])
