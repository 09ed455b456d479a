"""Whatever is sent, the server answers with what it has declared, and afterwards it is as it was before."""

from __future__ import annotations

import gc
import io
import json
import logging
import socket
import struct
import tracemalloc

import httpx
import jsonschema
import numpy as np
import pyarrow as pa
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis.generation import GenerationMode
from served import serving, until

from gendist.protocols import VERBS
from gendist.serve.http_app import http_app
from gendist.serve.limits import Limits
from gendist.serve.media_types import MEDIA_TYPES

SAMPLE = "/models/gmm/sample"
LIMITS = Limits(max_rows=5_000, max_length=50, max_body_bytes=200_000)
EXAMPLES = settings(
    max_examples=6,
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
NAMES = ["gmm", "hmm", "naive_bayes", "labelled_vae"]


@pytest.fixture(scope="module")
def limited(hosted):
    """A server of small limits, and what it logs as errors."""
    with serving(http_app({name: hosted[name] for name in NAMES}, LIMITS)) as server:
        yield server


@pytest.fixture(autouse=True)
def all_is_well_afterwards(limited, caplog):
    """No failure is logged, a valid request is answered, and nothing is left in the queue."""
    caplog.set_level(logging.ERROR)
    before = limited.post(SAMPLE, json={"num_samples": 16, "seed": 5}).json()
    yield
    assert limited.post(SAMPLE, json={"num_samples": 16, "seed": 5}).json() == before
    until(lambda: limited.batcher.num_rows == limited.batcher.num_bytes == 0, "nobody waits")
    until(lambda: limited.app.state.server.room.num_bytes == 0, "no body is on its way")
    assert not [record for record in caplog.records if record.name == "gendist"]


def refused_or_answered(answer: httpx.Response) -> None:
    assert answer.status_code < 500, answer.text
    if answer.status_code >= 400:
        assert answer.json().keys() == {"error", "field", "allowed"}
        assert len(answer.content) < 2_000


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
@pytest.mark.parametrize("verb", VERBS)
def test_what_the_document_allows_and_what_it_does_not(limited, verb, mode):
    document = limited.get("/openapi.json").json()
    schema = schemathesis.openapi.from_dict(document)
    schema.config.update(base_url=str(limited.client.base_url))
    operation = schema[f"/models/{{name}}/{verb}"]["POST"]

    statuses = set()

    @EXAMPLES
    @given(case=operation.as_strategy(mode), name=st.sampled_from(NAMES))
    def asked(case, name):
        case.path_parameters = {"name": name}
        request = case.as_transport_kwargs(base_url=str(limited.client.base_url))
        answer = limited.client.request(
            request["method"], request["url"], params=request.get("params"), headers=request.get("headers"),
            json=request.get("json"), content=request.get("data") if isinstance(request.get("data"), bytes | str) else None,
        )  # fmt: skip
        refused_or_answered(answer)
        assert str(answer.status_code) in operation.definition.raw["responses"]
        statuses.add(answer.status_code)

    asked()
    assert verb != "sample" or mode != GenerationMode.POSITIVE or 200 in statuses


@pytest.mark.parametrize("name", NAMES)
def test_what_is_right_is_in_the_document_and_is_answered_as_it_says(limited, hosted, name):
    """Of every verb that is offered, in JSON and with its options in the query beside a body of .npy."""
    schema = schemathesis.openapi.from_dict(limited.get("/openapi.json").json())
    options = {"seed": 3, "offset": 2, "num_samples": 4, "given": next(iter(hosted[name].model.labels), 0)}
    x = limited.post(f"/models/{name}/sample", json={"num_samples": 3, "seed": 1}).json()["x"]
    for verb in hosted[name].verbs:
        has = [each for each in hosted[name].trial.options[verb] if each != "given" or each in hosted[name].trial.needs_given]
        rows = {} if verb == "sample" else {"x": x}
        if verb == "decode":
            rows = {"z": [0, 1]} if hasattr(hosted[name].model, "num_latents") else {"z": [[0.5, -0.5]]}
        body = {**rows, **({"num_samples": 3} if verb == "sample" else {key: options[key] for key in has})}
        operation = schema[f"/models/{{name}}/{verb}"]["POST"]
        described = operation.definition.raw
        said = described["requestBody"]["content"]["application/json"]["schema"]
        jsonschema.validate(body, said)
        answer = limited.post(f"/models/{name}/{verb}", json=body)
        assert answer.status_code == 200, (verb, answer.text)
        jsonschema.validate(answer.json(), described["responses"]["200"]["content"]["application/json"]["schema"])
        if not rows or name == "naive_bayes":
            continue
        stream = io.BytesIO()
        np.save(stream, np.asarray(next(iter(rows.values()))))
        query = {key: body[key] for key in has}
        assert query.keys() <= {each["name"] for each in described["parameters"] if each["in"] == "query"}
        binary = limited.post(
            f"/models/{name}/{verb}", params=query, content=stream.getvalue(), headers={"content-type": MEDIA_TYPES["npy"]}
        )
        assert binary.json() == answer.json()


ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats()
    | st.text(max_size=5)
    | st.integers(0, 20_000).map(lambda length: "x" * length),
    lambda each: st.lists(each, max_size=3) | st.dictionaries(st.sampled_from(["a", "b", "x", ""]), each, max_size=3),
    max_leaves=12,
)


@settings(EXAMPLES, max_examples=40)
@given(
    name=st.sampled_from(NAMES),
    verb=st.sampled_from(VERBS),
    content=st.dictionaries(
        st.sampled_from(["x", "z", "num_samples", "seed", "offset", "given", "length", "other"]), ANYTHING, max_size=4
    ),
    format_=st.sampled_from([*MEDIA_TYPES, "", "xml"]),
)
def test_json_of_any_shape(limited, name, verb, content, format_):
    body = json.dumps(content).encode()  # with NaN and Infinity
    headers = {"content-type": "application/json"}
    refused_or_answered(limited.post(f"/models/{name}/{verb}?format={format_}", content=body, headers=headers))


def bodies() -> dict[str, bytes]:
    """Whole ones, by media type."""
    stream, sink = io.BytesIO(), pa.BufferOutputStream()
    np.save(stream, np.random.default_rng(0).normal(size=(4, 2)))
    table = pa.table({"a": [1.0, 2.0], "b": [0.5, None]})
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return {
        MEDIA_TYPES["npy"]: stream.getvalue(),
        MEDIA_TYPES["arrow"]: sink.getvalue().to_pybytes(),
        MEDIA_TYPES["json"]: b'{"x": [[1.5, 2], [null, 1e3]]}',
    }


@settings(EXAMPLES, max_examples=100)
@given(
    kind=st.sampled_from([MEDIA_TYPES["npy"], MEDIA_TYPES["arrow"], MEDIA_TYPES["json"]]),
    place=st.integers(0, 10_000),
    change=st.binary(min_size=0, max_size=8),
    is_cut=st.booleans(),
)
def test_damaged_bodies(limited, kind, place, change, is_cut):
    body = bytearray(bodies()[kind])
    place %= len(body)
    body[place : place + len(change)] = change
    content = bytes(body[:place]) if is_cut else bytes(body)
    refused_or_answered(limited.post("/models/gmm/log_prob", content=content, headers={"content-type": kind}))


@settings(EXAMPLES, max_examples=30)
@given(num_rows=st.integers(0, 20_000), num_columns=st.integers(1, 3), kind=st.sampled_from(["number", "null", "sparse"]))
def test_tables_up_to_the_memory_that_there_is(limited, num_rows, num_columns, kind):
    empty = pa.array(
        [{"indices": [], "values": []}], pa.struct({"indices": pa.list_(pa.int32()), "values": pa.list_(pa.float64())})
    )
    column = {
        "number": pa.array(np.zeros(num_rows, np.int8)),
        "null": pa.nulls(num_rows),
        "sparse": empty.take(pa.array(np.zeros(num_rows, np.int32))),
    }[kind]
    sink = pa.BufferOutputStream()
    table = pa.table(dict.fromkeys("abx"[:num_columns], column))
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    content = sink.getvalue().to_pybytes()
    answer = limited.post("/models/gmm/log_prob", content=content, headers={"content-type": MEDIA_TYPES["arrow"]})
    refused_or_answered(answer)
    if num_rows > LIMITS.max_rows:
        assert answer.status_code == 413


def test_clients_that_vanish(limited):
    """At any byte of a request, politely or not, whole requests and halves."""
    body = json.dumps({"num_samples": 5_000}).encode()
    whole = (
        f"POST {SAMPLE}?format=json HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\n\r\n"
    ).encode() + body
    for i in range(40):
        client = limited.connected()
        client.sendall(whole[: len(whole) * (i % 10 + 1) // 10])
        if i % 2:  # with a reset in place of an end
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\0" * 100,
        b"POST\r\n\r\n",
        b"GET /models HTTP/9.9\r\n\r\n",
        b"POST %s HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n" % SAMPLE.encode(),
        b"POST %s HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\n{}   " % SAMPLE.encode(),
        b"POST %s HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n" % SAMPLE.encode(),
        b"GET /%s HTTP/1.1\r\nhost: x\r\n\r\n" % (b"a" * 50_000),
        b"GET /models HTTP/1.1\r\n%s\r\n" % (b"x: y\r\n" * 1_000),
        b"GET /models HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\n"
        b"sec-websocket-key: MDEyMzQ1Njc4OWFiY2RlZg==\r\n\r\n",
        b"GET /\xff\xfe%00/../.. HTTP/1.1\r\nhost: x\r\n\r\n",
    ],
)
def test_what_is_hardly_http(limited, raw):
    with limited.connected() as client:
        client.sendall(raw)
        client.shutdown(socket.SHUT_WR)
        answer = client.recv(100)
    assert not answer.startswith(b"HTTP/1.1 5")


def test_memory_is_back(limited):
    """Of requests that are answered, refused and given up."""
    large = json.dumps({"x": [[0.5, 0.25]] * 5_000}).encode()
    headers = {"content-type": "application/json"}

    def ask() -> None:
        for content in (large, large[:-1], large.replace(b"0.5", b"1e99")):
            limited.post("/models/gmm/log_prob", content=content, headers=headers)
        limited.post(SAMPLE, json={"num_samples": 5_000})
        test_clients_that_vanish(limited)

    ask()
    tracemalloc.start()
    try:
        first = tracemalloc.get_traced_memory()[0]
        for _ in range(3):
            ask()
        # Nine bodies as large as this were read; other tests of this process may leave something, too.
        until(lambda: gc.collect() >= 0 and tracemalloc.get_traced_memory()[0] < first + 4 * len(large), "memory is back")
    finally:
        tracemalloc.stop()
