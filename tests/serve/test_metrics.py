"""What a server counts, as Prometheus reads it."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading

import pytest
from prometheus_client.parser import text_string_to_metric_families
from served import serving

from gendist.serve.batcher import Batcher, Left, Work
from gendist.serve.http_app import http_app
from gendist.serve.limits import Limits
from gendist.serve.metrics import Metrics


def values(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    families = text_string_to_metric_families(text)
    return {(each.name, tuple(sorted(each.labels.items()))): each.value for family in families for each in family.samples}


def key(name: str, **labels: str) -> tuple[str, tuple[tuple[str, str], ...]]:
    return name, tuple(sorted(labels.items()))


@pytest.fixture
def own(hosted):
    """A server of its own, whose numbers begin at 0."""
    with serving(http_app({"gmm": hosted["gmm"]}, Limits(batch_rows=32))) as server:
        yield server


def test_requests_rows_and_times(own):
    for num_samples in (3, 5):
        assert own.post("/models/gmm/sample", json={"num_samples": num_samples}).status_code == 200
    assert own.post("/models/gmm/log_prob", json={"x": [[1.0, 2.0]]}).status_code == 200
    assert own.post("/models/gmm/sample", json={"num_samples": 0}).status_code == 422
    found = values(own.get("/metrics").text)
    sampled = {"model": "gmm", "verb": "sample"}
    assert found[key("gendist_requests_total", status="200", **sampled)] == 2
    assert found[key("gendist_requests_total", status="422", **sampled)] == 1
    assert found[key("gendist_requests_total", status="200", model="gmm", verb="log_prob")] == 1
    assert found[key("gendist_rows_total", **sampled)] == 8
    assert found[key("gendist_latency_seconds_count", **sampled)] == 3
    assert found[key("gendist_queue_wait_seconds_count", **sampled)] == 2
    assert found[key("gendist_batch_fill_count")] == 3
    assert found[key("gendist_batch_fill_sum")] == pytest.approx((3 + 5 + 1) / 32)
    assert found[key("gendist_batch_wait_seconds_count")] == found[key("gendist_batch_requests_total")] == 3
    assert sum(value for (name, _), value in found.items() if name == "gendist_batches_total") == 3
    assert found[key("gendist_compute_seconds_total")] > 0
    assert found[key("gendist_queue_rows")] == found[key("gendist_queue_bytes")] == 0


def test_what_waits_is_told_while_it_waits(hosted):
    """Also to the other replicas, which cannot ask: whenever something joins the queue or leaves it."""
    leave, told = threading.Event(), []

    class Told(Metrics):
        def queue(self, num_rows, num_bytes):
            super().queue(num_rows, num_bytes)
            found = values(self.text().decode())
            told.append((found[key("gendist_queue_rows")], found[key("gendist_queue_bytes")]))

    metrics = Told(["gmm"], batch_rows=10)

    async def ask():
        batcher = Batcher(lambda key, works: [leave.wait(60) for _ in works], Limits(), metrics.left, metrics.queue)
        first, second = (asyncio.create_task(batcher.result(Work(None, rows, 8 * rows, None))) for rows in (3, 4))
        while told[-1:] != [(4, 32)]:  # the first is computed
            await asyncio.sleep(0)
        second.cancel()
        await asyncio.wait([second])
        leave.set()
        await first
        await batcher.close()

    asyncio.run(ask())
    assert told == [(3, 24), (7, 56), (4, 32), (0, 0)]


def test_no_request_makes_a_series(own):
    own.get("/metrics")
    before = set(values(own.get("/metrics").text))
    for i in range(50):
        own.post(f"/models/nobody{i}/sample", json={})
        own.post(f"/models/gmm/verb{i}", json={})
        own.get(f"/path{i}")
        own.get(f"/models/nobody{i}")
        own.client.request(f"METHOD{i}", "/models")
    after = set(values(own.get("/metrics").text))
    assert len(after - before) < 100
    assert not [labels for _, labels in after - before if "nobody" in str(labels) or "verb1" in str(labels)]


def test_reasons_that_batches_leave_for():
    metrics = Metrics(["gmm"], batch_rows=10)
    for reason in ("full", "full", "waited"):
        metrics.left(Left("gmm", reason, 1, 5, 0.001))
    found = values(metrics.text().decode())
    assert found[key("gendist_batches_total", reason="full")] == 2
    assert found[key("gendist_batches_total", reason="waited")] == 1
    assert found[key("gendist_batch_fill_bucket", le="0.5")] == 3


TWO_PROCESSES = """
import os
from gendist.serve.metrics import Metrics
child = os.fork()
metrics = Metrics(["gmm"], batch_rows=10)
metrics.answered("gmm", "sample", 200, 7, 0.01, 0.001)
metrics.queue(5 if child == 0 else 3, 40)
if child == 0:
    os._exit(0)
os.waitpid(child, 0)
print(metrics.text().decode())
"""


def test_several_replicas_tell_the_numbers_of_all(tmp_path):
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    command = [sys.executable, "-c", TWO_PROCESSES]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=True)
    found = values(done.stdout)
    assert found[key("gendist_requests_total", model="gmm", verb="sample", status="200")] == 2
    assert found[key("gendist_rows_total", model="gmm", verb="sample")] == 14
    assert found[key("gendist_queue_rows")] == 3  # in what has ended nothing waits
