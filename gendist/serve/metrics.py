"""What a server counts, for Prometheus. Of several replicas on one machine, whoever starts them names a folder that they share
in PROMETHEUS_MULTIPROC_DIR; then any of them tells the numbers of all. Without it, as on a cluster, the numbers are those of
whichever replica is asked.

A series has a model and a verb that exist, or none: no request makes a new one.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

from gendist.protocols import VERBS
from gendist.serve.batcher import Left

CONTENT_TYPE = CONTENT_TYPE_LATEST
LATENCY_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
WAIT_S = (0.0001, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1.0, 5.0, 30.0)
FILL = (0.03125, 0.0625, 0.125, 0.25, 0.5, 0.75, 0.9, 1.0, 2.0)
OTHER = ""  # of a request that is of no model, or of no verb


class Metrics:
    """models: the names of those there are. batch_rows: of a full batch."""

    def __init__(self, models: Iterable[str], batch_rows: int) -> None:
        self._models, self._batch_rows = frozenset(models), batch_rows
        self._registry = registry = CollectorRegistry()
        of_verb = ("model", "verb")
        self._requests = Counter(
            "gendist_requests", "Requests that were answered, or given up by the client (status 499)", (*of_verb, "status"),
            registry=registry,
        )  # fmt: skip
        self._rows = Counter("gendist_rows", "Rows, or sequences, of answers that were sent whole", of_verb, registry=registry)
        self._latency = Histogram(
            "gendist_latency_seconds", "From the arrival of a request to the end of its answer", of_verb, buckets=LATENCY_S,
            registry=registry,
        )  # fmt: skip
        self._wait = Histogram(
            "gendist_queue_wait_seconds", "From a request's place in the queue to its batch, summed over its chunks", of_verb,
            buckets=WAIT_S, registry=registry,
        )  # fmt: skip
        self._batches = Counter("gendist_batches", "Batches, by why each left the queue", ("reason",), registry=registry)
        self._fill = Histogram("gendist_batch_fill", "Rows of a batch over batch_rows", buckets=FILL, registry=registry)
        self._batch_wait = Histogram(
            "gendist_batch_wait_seconds",
            "How long the oldest request of a batch waited for it",
            buckets=WAIT_S,
            registry=registry,
        )
        self._batch_requests = Counter(
            "gendist_batch_requests", "Requests that left in batches, chunk by chunk", registry=registry
        )
        self._compute = Counter("gendist_compute_seconds", "Spent on computing", registry=registry)
        alive = {"multiprocess_mode": "livesum", "registry": registry}
        self._queue_rows = Gauge("gendist_queue_rows", "Rows that wait", **alive)  # type: ignore[arg-type]
        self._queue_bytes = Gauge("gendist_queue_bytes", "Bytes of what waits", **alive)  # type: ignore[arg-type]
        # Each metric of a pair is looked up once: to find it by its labels takes longer than to count.
        self._of_pair: dict[tuple[str, str], tuple[Counter, Histogram, Histogram]] = {}
        self._of_status: dict[tuple[str, str, int], Counter] = {}

    def answered(
        self, model: str | None, verb: str | None, status: int, rows: int, latency_s: float, wait_s: float | None
    ) -> None:
        """A request is done. wait_s: None where it never was in the queue."""
        if model not in self._models:
            model = verb = OTHER
        elif verb not in VERBS:
            verb = OTHER
        assert model is not None
        assert verb is not None
        counted = self._of_status.get((model, verb, status))
        if counted is None:
            counted = self._of_status[model, verb, status] = self._requests.labels(model, verb, str(status))
        counted.inc()
        metrics = self._of_pair.get((model, verb))
        if metrics is None:
            metrics = (self._rows.labels(model, verb), self._latency.labels(model, verb), self._wait.labels(model, verb))
            self._of_pair[model, verb] = metrics
        rows_counted, latency, wait = metrics
        rows_counted.inc(rows)
        latency.observe(latency_s)
        if wait_s is not None:
            wait.observe(wait_s)

    def left(self, batch: Left) -> None:
        """A batch left the queue."""
        self._batches.labels(batch.reason).inc()
        self._fill.observe(batch.num_rows / self._batch_rows)
        self._batch_wait.observe(batch.oldest_wait_s)
        self._batch_requests.inc(batch.num_works)

    def computed(self, seconds: float) -> None:
        self._compute.inc(seconds)

    def queue(self, num_rows: int, num_bytes: int) -> None:
        """What waits now."""
        self._queue_rows.set(num_rows)
        self._queue_bytes.set(num_bytes)

    def text(self) -> bytes:
        """In the format that Prometheus reads."""
        registry = self._registry
        if folder := os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
            registry = CollectorRegistry()
            _forget_the_dead(Path(folder))
            MultiProcessCollector(registry, folder)
        return generate_latest(registry)


def _forget_the_dead(folder: Path) -> None:
    """What waited in a process that has ended waits no more. What it has counted stays."""
    for file in folder.glob("gauge_live*_*.db"):
        try:
            os.kill(int(file.stem.rpartition("_")[2]), 0)
        except ProcessLookupError:
            file.unlink(missing_ok=True)  # another replica may be at it, too
        except PermissionError:
            pass  # it is somebody else's, and there
