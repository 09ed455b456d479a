"""Load on an HTTP server, from a process of its own: closed-loop connections, or arrivals that do not wait for answers.

    echo '{"port": 8000, "path": "/models/m/sample", "body": "{\"seed\": %d}", "connections": 32, "seconds": 3}' |
        python benchmarks/serving_client.py

Each request has the next seed. With "rate" (a second), requests arrive at random (Poisson) and their latency counts from when
they were to begin, also where no connection was free. One thread with epoll and whole requests made beforehand, so that little
of the machine is taken from the server. Prints {"requests", "failures", "seconds", "p50_s", "p99_s", "bytes"}: in a closed loop
of what was answered after "warmup_s", else of what began after them.
"""

from __future__ import annotations

import json
import random
import selectors
import socket
import sys
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any

MOST_CONNECTIONS = 1000  # that arrivals open
BUFFER = bytearray(2**20)


@dataclass(eq=False)
class Connection:
    socket: socket.socket
    began: float = 0.0
    answer: bytearray = field(default_factory=bytearray)
    total: int | None = None  # bytes of the answer, once its head has come; -1 where it comes in chunks

    def send(self, request: bytes, began: float) -> None:
        self.began, self.total = began, None
        self.answer.clear()
        self.socket.sendall(request)

    def is_answered(self) -> bool:
        """Reads what is there; ConnectionError where the server has hung up."""
        number = self.socket.recv_into(BUFFER)
        if number == 0:
            raise ConnectionResetError
        self.answer += memoryview(BUFFER)[:number]
        if self.total is None and (end := self.answer.find(b"\r\n\r\n")) >= 0:
            head = bytes(self.answer[:end]).lower()
            _, found, length = head.partition(b"content-length:")
            self.total = end + 4 + int(length.split(b"\r\n")[0]) if found else -1
        if self.total == -1:
            return self.answer.endswith(b"\r\n0\r\n\r\n")
        return self.total is not None and len(self.answer) >= self.total


class Load:
    def __init__(self, port: int, path: str, body: str, host: str = "127.0.0.1", method: str = "POST") -> None:
        self.address, self.method, self.path, self.body = (host, port), method, path, body
        self.seed = random.Random(0).randrange(2**30)
        self.latencies: list[float] = []
        self.statuses: Counter[str] = Counter()
        self.num_bytes = 0
        self.selector = selectors.DefaultSelector()

    def open(self) -> Connection:
        connection = Connection(socket.create_connection(self.address, timeout=60))
        connection.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.selector.register(connection.socket, selectors.EVENT_READ, connection)
        return connection

    def request(self) -> bytes:
        self.seed += 1
        body = self.body.replace("%d", str(self.seed))
        return (
            f"{self.method} {self.path} HTTP/1.1\r\nHost: {self.address[0]}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n{body}"
        ).encode()

    def answered(self, timeout: float, from_s: float, began_s: float = 0.0) -> list[Connection]:
        """The connections that are free again; what is answered after `from_s`, and began after `began_s`, is counted."""
        free = []
        for key, _ in self.selector.select(timeout):
            connection = key.data
            try:
                if not connection.is_answered():
                    continue
            except ConnectionError:
                # An idle connection may be closed at any time, also at the very moment of a request: that is sent again.
                self.statuses["cut off" if connection.answer else "reconnected"] += 1
                self.selector.unregister(connection.socket)
                connection.socket.close()
                free.append(self.open())
                continue
            free.append(connection)
            now = time.perf_counter()
            if now >= from_s and connection.began >= began_s:
                self.latencies.append(now - connection.began)
                self.statuses[connection.answer[9:12].decode()] += 1
                self.num_bytes = len(connection.answer)
        return free

    def closed_loop(self, num_connections: int, warmup_s: float, seconds: float) -> float:
        """Each connection sends its next request when it is answered. Returns the seconds that are counted."""
        began = time.perf_counter()
        from_s, until = began + warmup_s, began + warmup_s + seconds
        for _ in range(num_connections):
            self.open().send(self.request(), time.perf_counter())
        while (now := time.perf_counter()) < until:
            for connection in self.answered(until - now, from_s):
                connection.send(self.request(), time.perf_counter())
        return seconds

    def open_loop(self, rate: float, warmup_s: float, seconds: float) -> float:
        """Requests begin at random, whatever has become of those before; all that began are waited for."""
        rng = random.Random(0)
        began = time.perf_counter()
        from_s, until = began + warmup_s, began + warmup_s + seconds
        free = [self.open() for _ in range(8)]
        late: deque[float] = deque()
        arrival, num_busy = began, 0
        while arrival < until or num_busy or late:
            now = time.perf_counter()
            while arrival < min(now, until):
                late.append(arrival)
                arrival += rng.expovariate(rate)
            while late and (free or num_busy < MOST_CONNECTIONS):
                (free.pop() if free else self.open()).send(self.request(), late.popleft())
                num_busy += 1
            done = self.answered(max(arrival - time.perf_counter(), 0.0) if arrival < until else 1.0, from_s, from_s)
            free += done
            num_busy -= len(done)
        return seconds

    def summary(self, seconds: float) -> dict[str, Any]:
        latencies = sorted(self.latencies)
        failures = {status: count for status, count in self.statuses.items() if status not in ("200", "reconnected")}
        quantiles = {f"p{q}_s": latencies[min(len(latencies) * q // 100, len(latencies) - 1)] for q in (50, 99) if latencies}
        return {"requests": len(latencies), "failures": failures, "seconds": seconds, "bytes": self.num_bytes, **quantiles}


def main() -> None:
    order = json.load(sys.stdin)
    connections, rate = order.pop("connections", None), order.pop("rate", None)
    warmup_s, seconds = order.pop("warmup_s", 1.0), order.pop("seconds")
    load = Load(**order)
    counted = load.closed_loop(connections, warmup_s, seconds) if rate is None else load.open_loop(rate, warmup_s, seconds)
    print(json.dumps(load.summary(counted)))


if __name__ == "__main__":
    main()
