"""The application as a client meets it, on uvicorn and, where a message must wait for another, as ASGI."""

from __future__ import annotations

import asyncio
import io
import json
import re
import sys
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
from pydantic import ValidationError
from served import TIMEOUT_S, serving, until

import gendist
from gendist.bulk import sample
from gendist.noise import MAX_SEED
from gendist.pictures import figure_bytes
from gendist.protocols import VERBS
from gendist.serve import hosted_model, questions
from gendist.serve import http_app as http_app_module
from gendist.serve.answers import SLICE_BYTES
from gendist.serve.bodies import ClientGone, DataOptions, Room, Share
from gendist.serve.computing import DRAWN_ROWS, Drawn
from gendist.serve.hosted_model import HostedModel, SampleCall
from gendist.serve.http_app import http_app
from gendist.serve.limits import Limits

SAMPLE = "/models/gmm/sample"
FORMATS = ["json", "npy", "npz", "arrow", "ndjson"]
JSON = {"content-type": "application/json"}


class Watched(HostedModel):
    """Notes what it computes; of seed 666 it waits for leave, and from row `fails_at` on it fails."""

    def __init__(self, path) -> None:
        super().__init__("gmm", path)
        self.calls: list[SampleCall] = []
        self.leave, self.fails_at = threading.Event(), None

    def answer(self, call):
        self.calls.append(call)
        if call.seed == 666:
            assert self.leave.wait(TIMEOUT_S)
        if self.fails_at is not None and call.offset >= self.fails_at:
            raise RuntimeError("a failure of the test's")
        return super().answer(call)


@pytest.fixture
def watched(artifacts) -> Watched:
    return Watched(artifacts["gmm"])


# Answers


def test_the_models_and_what_they_are(server, hosted):
    models = server.get("/models").json()["models"]
    assert [model["name"] for model in models] == list(hosted)
    for model in models:
        assert set(model["verbs"]) | set(model["not_offered"]) == set(VERBS)
        one = server.get(f"/models/{model['name']}").json()
        assert {key: value for key, value in one.items() if key != "figures"} == model
        for verb, reason in model["not_offered"].items():
            answer = server.post(f"/models/{model['name']}/{verb}", json={"x": [[0.0]]})
            assert answer.status_code == 405
            assert reason in answer.json()["error"]
            assert "allow" in answer.headers


def test_parts_of_a_sample_are_the_sample(server, hosted):
    for name in hosted:
        bodies = [{"num_samples": n, "offset": o, "seed": 9} for n, o in ((100, 0), (40, 0), (60, 40))]
        whole, *parts = (
            np.load(io.BytesIO(server.post(f"/models/{name}/sample?format=npy", json=body).content)) for body in bodies
        )
        assert np.concatenate(parts).tobytes() == whole.tobytes()


@pytest.mark.parametrize("name", ["gmm", "hmm", "naive_bayes", "vae_of_images"])
def test_large_samples_are_streamed_and_are_the_files_of_gendist_sample(server, hosted, artifacts, name, tmp_path):
    num_samples = 2 * hosted[name].chunk_rows + 3
    sample(artifacts[name], num_samples, tmp_path / "x.npy", seed=4, offset=5)
    body = {"num_samples": num_samples, "seed": 4, "offset": 5}
    answer = server.post(f"/models/{name}/sample?format=npy", json=body)
    assert answer.content == (tmp_path / "x.npy").read_bytes()
    x = np.load(tmp_path / "x.npy")
    streamed = server.post(f"/models/{name}/sample", json=body)
    assert streamed.headers.get("transfer-encoding") == "chunked"
    content = streamed.json()
    if name != "naive_bayes":
        assert content["x"] == x.tolist()
    assert len(content["x"]) == num_samples
    lines = server.post(f"/models/{name}/sample?format=ndjson", json=body).content.splitlines()
    assert len(lines) == num_samples * (x.shape[1] if x.ndim == 3 else 1)
    archive = np.load(io.BytesIO(server.post(f"/models/{name}/sample?format=npz", json=body).content))
    assert archive["x"].tobytes() == x.tobytes()


def test_a_seed_that_is_drawn_makes_the_same_again(server):
    first = server.post(SAMPLE, json={"num_samples": 3}).json()
    assert 0 <= first["seed"] < 2**53
    assert server.post(SAMPLE, json={"num_samples": 3}).json()["x"] != first["x"]
    for seed in (first["seed"], str(first["seed"])):
        assert server.post(SAMPLE, json={"num_samples": 3, "seed": seed}).json() == first


def test_a_body_is_not_needed(server):
    assert server.post(SAMPLE).json()["num_samples"] == 1


def test_labels_by_their_text(server, artifacts):
    model = gendist.load(artifacts["labelled_vae"])
    for given in (2, "2"):
        content = server.post("/models/labelled_vae/sample", json={"num_samples": 5, "seed": 1, "given": given}).json()
        assert content["x"] == model.sample(5, seed=1, given=2).tolist()
        assert content["label"] == [2] * 5
    x, labels = model.sample(3, seed=1), [0, 2, 1]
    said = server.post("/models/labelled_vae/encode", json={"x": x.tolist(), "given": labels}).json()["encode"]
    assert said == model.encode(x, given=labels).tolist()


def test_options_of_verbs(server, artifacts):
    model = gendist.load(artifacts["labelled_vae"])
    x = model.sample(4, seed=1)
    body = {"x": x.tolist(), "seed": 3, "offset": 7, "num_samples": 5}
    said = server.post("/models/labelled_vae/log_prob_bound", json=body).json()
    assert said["log_prob_bound"] == model.log_prob_bound(x, num_samples=5, seed=3, offset=7).tolist()
    stream = io.BytesIO()
    np.save(stream, x.numpy())
    in_query = {key: value for key, value in body.items() if key != "x"}
    binary = {"content": stream.getvalue(), "headers": {"content-type": "application/x-npy"}, "params": in_query}
    assert server.post("/models/labelled_vae/log_prob_bound", **binary).json() == said


def test_figures(server):
    names = server.get("/models/vae_of_images").json()["figures"]
    assert names
    figure = server.get(f"/models/vae_of_images/figures/{names[0]}", params={"seed": 1})
    assert figure.headers["content-type"] == "image/png"
    assert figure.content.startswith(b"\x89PNG")
    missing = server.get("/models/vae_of_images/figures/none")
    assert missing.status_code == 404
    assert names[0] in missing.json()["allowed"]


def test_a_figure_is_counted_and_kept(watched, monkeypatch):
    drawn, makes, made = [], watched.model.figures, []
    monkeypatch.setattr(questions, "figure_bytes", lambda *args: drawn.append(args) or figure_bytes(*args))
    monkeypatch.setattr(type(watched.model), "figures", lambda self, seed: made.append(seed) or makes(seed))
    with serving(http_app({"gmm": watched})) as server:
        names = server.get("/models/gmm").json()["figures"]
        path = f"/models/gmm/figures/{names[0]}"
        blocking = server.connected()
        blocking.sendall(_request(SAMPLE, {"seed": 666}))
        until(lambda: len(watched.calls) == 1, "the thread computes")
        asks = threading.Thread(target=server.get, args=(path,), kwargs={"params": {"seed": 1}})
        asks.start()
        until(lambda: server.batcher.num_rows > 0, "the figure waits")
        assert server.batcher.num_rows >= 256
        assert server.batcher.num_bytes >= 2**20
        watched.leave.set()
        asks.join(TIMEOUT_S)
        blocking.close()
        first = server.get(path, params={"seed": 1})
        assert first.content == figure_bytes(makes(1)[names[0]], watched.artifact.schema)
        assert len(drawn) == 1
        assert made == [0, 1]
        for name in names:
            server.get(f"/models/gmm/figures/{name}", params={"seed": 1})
        assert made == [0, 1]  # all of a seed at once
        assert server.get(path, params={"seed": 2}).content != first.content
        assert made == [0, 1, 2]


def test_one_figure_is_drawn_once_however_many_ask_for_it(watched, monkeypatch):
    drawn = []
    monkeypatch.setattr(questions, "figure_bytes", lambda *args: drawn.append(args) or b"png")
    with serving(http_app({"gmm": watched})) as server, server.connected() as blocking, ThreadPoolExecutor(4) as pool:
        path = f"/models/gmm/figures/{server.get('/models/gmm').json()['figures'][0]}"
        blocking.sendall(_request(SAMPLE, {"seed": 666}))
        until(lambda: len(watched.calls) == 1, "the thread computes")
        asked = [pool.submit(server.get, path) for _ in range(4)]
        until(lambda: server.batcher.num_rows == 4 * DRAWN_ROWS, "all of them wait")
        watched.leave.set()
        assert {each.result(TIMEOUT_S).content for each in asked} == {b"png"}
    assert len(drawn) == 1


def test_pictures_that_were_not_asked_for_lately_are_not_kept():
    pictures = Drawn(most_bytes=10)
    for what in ("a", "b", "a", "c"):
        if pictures.get(what) is None:
            pictures.keep(what, what.encode() * 4)
    assert [pictures.get(what) for what in "abc"] == [b"aaaa", None, b"cccc"]
    pictures.keep("large", b"x" * 11)
    assert [pictures.get(what) for what in ("a", "c", "large")] == [None, None, None]


def test_the_document_describes_every_route(server):
    document = server.get("/openapi.json").json()
    assert {f"/models/{{name}}/{verb}" for verb in VERBS} <= set(document["paths"])
    for path, methods in document["paths"].items():
        for operation in methods.values():
            for content in operation.get("requestBody", {}).get("content", {}).items():
                assert content[0] != "application/json" or "example" in content[1], path
            for status, response in operation["responses"].items():
                if int(status) >= 400:
                    assert response["content"]["application/json"]["example"].keys() == {"error", "field", "allowed"}


def test_the_document_names_the_options_that_a_verb_has_and_where_they_stand(server, hosted):
    document = server.get("/openapi.json").json()
    for verb in set(VERBS) - {"sample"}:
        operation = document["paths"][f"/models/{{name}}/{verb}"]["post"]
        has = {option for model in hosted.values() for option in model.trial.options.get(verb, ())}
        body = operation["requestBody"]["content"]["application/json"]["schema"]["properties"]
        assert body.keys() - {"x", "z"} == has
        assert {each["name"] for each in operation["parameters"] if each["in"] == "query"} == has | {"format"}
        assert "X-Gendist-Num-Samples" in operation["responses"]["200"]["headers"]
    sample = document["paths"]["/models/{name}/sample"]["post"]
    assert {each["name"] for each in sample["parameters"] if each["in"] == "query"} == {"format"}
    seed = sample["requestBody"]["content"]["application/json"]["schema"]["properties"]["seed"]
    pattern = next(each["pattern"] for each in seed["anyOf"] if "pattern" in each)
    for number in (0, 9, 10**19, MAX_SEED - 1, MAX_SEED):
        assert re.search(pattern, str(number)), number
    for text in (str(MAX_SEED + 1), "9" * 20, "1" * 21, "", "-1", "1.5"):
        assert not re.search(pattern, text), text


def test_the_document_says_whether_a_token_is_needed(hosted):
    for tokens, security in (((), []), (("secret",), [{"token": []}])):
        document = http_app({"gmm": hosted["gmm"]}, tokens=tokens).openapi()
        assert document["security"] == security
        paths = {path: operation["get"] for path, operation in document["paths"].items() if "get" in operation}
        assert [path for path, get in paths.items() if get.get("security") == []] == ["/healthz"]
        assert [path for path, get in paths.items() if "401" not in get["responses"]] == ["/healthz"]


def test_the_document_says_all_that_a_label_may_be(server):
    properties = server.get("/openapi.json").json()["paths"]["/models/{name}/sample"]["post"]["requestBody"]["content"][
        "application/json"
    ]["schema"]["properties"]
    kinds = {each["type"] for each in properties["given"]["anyOf"]}
    assert kinds == {"string", "number", "boolean", "null"}
    assert "true or false" in server.post(SAMPLE, json={"given": [1]}).json()["allowed"]


def test_health(server):
    assert server.get("/healthz").json() == {"status": "alive"}
    assert server.get("/readyz").json()["status"] == "ready"
    assert server.get("/docs").status_code == 404


# Mistakes


@pytest.mark.parametrize(
    ("path", "content", "status", "field"),
    [
        ("/models/nobody/sample", b"{}", 404, "name"),
        ("/models/gmm/dream", b"{}", 404, "verb"),
        ("/nowhere", b"{}", 404, "path"),
        (SAMPLE, b"{", 400, "body"),
        (SAMPLE, b"[1]", 422, "body"),
        (SAMPLE, b'{"seed": NaN}', 400, "body"),
        (SAMPLE, b"[" * 100_000, 400, "body"),
        (SAMPLE, b'{"seed": %s}' % (b"9" * 5000), 400, "body"),
        (SAMPLE, b'{"seed": 1, "seed": 2}', 422, "seed"),
        (SAMPLE, b'{"seed": 18446744073709551616}', 422, "seed"),
        (SAMPLE, b'{"seed": "18446744073709551616"}', 422, "seed"),
        (SAMPLE, b'{"seed": -1}', 422, "seed"),
        (SAMPLE, b'{"seed": 1.5}', 422, "seed"),
        (SAMPLE, b'{"seed": true}', 422, "seed"),
        (SAMPLE, b'{"num_samples": 0}', 422, "num_samples"),
        (SAMPLE, b'{"num_samples": 1000000000000}', 422, "num_samples"),
        (SAMPLE, b'{"num_samples": null}', 422, "num_samples"),
        (SAMPLE, b'{"offset": 1e400}', 422, "offset"),
        (SAMPLE, b'{"offset": 9007199254740993}', 422, "offset"),
        (SAMPLE, b'{"given": "nobody"}', 422, "given"),
        (SAMPLE, b'{"given": [0]}', 422, "given"),
        (SAMPLE, b'{"length": 3}', 422, "length"),
        (SAMPLE, b'{"sead": 3}', 422, "sead"),
        (SAMPLE + "?format=xml", b"{}", 406, "format"),
        (SAMPLE + "?seed=3", b"{}", 422, "seed"),
        (SAMPLE + "?format=npy&format=json", b"{}", 422, "format"),
        (SAMPLE + "?%", b"{}", 400, "query"),
        (SAMPLE + "?format=png", b'{"num_samples": 100000}', 422, "num_samples"),
        ("/models/hmm/sample", b'{"num_samples": 100000, "length": 100}', 422, "num_samples"),
        ("/models/gmm/log_prob", b"{}", 422, "x"),
        ("/models/gmm/log_prob", b'{"x": []}', 422, "x"),
        ("/models/gmm/log_prob", b'{"x": [1, 2]}', 422, "x"),
        ("/models/gmm/log_prob", b'{"x": [[1, 2], [3]]}', 422, "x"),
        ("/models/gmm/log_prob", b'{"x": [[1, 2, 3]]}', 422, "x"),
        ("/models/gmm/log_prob", b'{"x": [[1, "2"]]}', 422, "x[0][1]"),
        ("/models/gmm/log_prob", b'{"x": [[1, null], [{}, 2]]}', 422, "x[1][0]"),
        ("/models/gmm/log_prob", b'{"x": [[1, 1e76]]}', 422, "x[0][1]"),
        ("/models/gmm/log_prob", b'{"x": [[1, 1e400]]}', 422, "x[0][1]"),
        ("/models/gmm/log_prob", b'{"x": [{"a": 1}]}', 422, "x[0]"),
        ("/models/gmm/log_prob", b'{"x": [{"a": 1, "b": 2, "c": 3}]}', 422, "x[0]"),
        ("/models/gmm/log_prob", b'{"x": [{"a": 1, "b": 2, "b": 3}]}', 422, "b"),
        ("/models/gmm/log_prob", b'{"x": [{"a": 1, "b": 2}, [1, 2]]}', 422, "x[1]"),
        ("/models/gmm/log_prob", b'{"x": [[1, 2]], "seed": 3}', 422, "seed"),
        ("/models/gmm/decode", b'{"z": [[1, 2, 3]]}', 422, "z"),
        ("/models/gmm/decode", b'{"z": [5]}', 422, "z"),
        ("/models/gmm/decode", b'{"z": [[null, 1]]}', 422, "z"),
        ("/models/gmm/decode", b'{"z": [[1e308, 1e308]]}', 422, "z"),
        ("/models/gmm/decode?format=png", b'{"z": [[-1e76, 1]]}', 422, "z"),
        ("/models/naive_bayes/log_prob", b'{"x": [[1, 2]]}', 422, "x[0][0]"),
        ("/models/naive_bayes/log_prob", b'{"x": [["red"]]}', 422, "x"),
        ("/models/vae_of_images/encode", b'{"x": [[[1, 2], [3, 4]]]}', 422, "x"),
        ("/models/vae_of_images/elbo", b'{"x": [[%s]]}' % b",".join([b"2"] * 24), 422, "x"),
        ("/models/labelled_vae/encode", b'{"x": [[1, 2, 3, 4]], "given": [1, 2]}', 422, "given"),
        ("/models/labelled_vae/encode", b'{"x": [[1, 2, 3, 4]], "given": 7}', 422, "given"),
        ("/models/hmm/log_prob", b'{"x": [[1, 2]]}', 422, "x"),
        ("/models/hmm/log_prob", b'{"x": [[]]}', 422, "x"),
        ("/models/hmm/log_prob", b'{"x": [[[1, 2]], [[1]]]}', 422, "x"),
    ],
)
def test_mistakes_are_told_with_the_field(server, path, content, status, field):
    answer = server.post(path, content=content, headers=JSON)
    assert answer.status_code == status, answer.text
    problem = answer.json()
    assert problem.keys() == {"error", "field", "allowed"}
    assert problem["field"] == field
    assert len(problem["error"].splitlines()) == 1
    assert len(answer.content) < 2_000


@pytest.mark.parametrize(("verb", "field"), [("log_prob", "x"), ("decode", "z")])
def test_a_long_text_among_numbers_takes_no_memory(server, verb, field):
    num_rows, num_characters = 3_000, 20_000
    body = json.dumps({field: [[0.0, 1.0]] * num_rows + [[0.0, "x" * num_characters]]})
    tracemalloc.start()
    try:
        answer = server.post(f"/models/gmm/{verb}", content=body, headers=JSON)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (answer.status_code, answer.json()["field"]) == (422, f"{field}[{num_rows}][1]")
    assert peak < num_rows * num_characters


def test_no_memory_for_a_body_is_told(server, monkeypatch):
    def none(values):
        raise MemoryError

    monkeypatch.setattr("gendist.serve.rows.np.asarray", none)
    assert server.post("/models/gmm/log_prob", json={"x": [[0.0, 1.0]]}).status_code == 413


def test_bodies_of_other_types(server):
    for kind in ("text/plain", "application/x-www-form-urlencoded", "application/x-npy"):
        answer = server.post(SAMPLE, content=b"{}", headers={"content-type": kind})
        assert (answer.status_code, answer.json()["field"]) == (415, "content-type")
    compressed = server.post(SAMPLE, content=b"{}", headers={**JSON, "content-encoding": "gzip"})
    assert compressed.status_code == 415
    assert server.get(SAMPLE).status_code == 405
    assert server.get(SAMPLE).headers["allow"] == "POST"


def test_bodies_that_are_too_large(hosted):
    limits = Limits(max_body_bytes=1000)
    with serving(http_app({"gmm": hosted["gmm"]}, limits)) as server:
        large = b'{"seed": %s}' % (b" " * 2000)
        assert server.post(SAMPLE, content=large, headers=JSON).status_code == 413

        def parts():
            for _ in range(100):
                yield large

        answer = server.post(SAMPLE, content=parts(), headers=JSON)
        assert answer.status_code == 413
        assert server.post(SAMPLE, json={}).status_code == 200


def test_json_has_a_smaller_limit(hosted):
    rows = np.zeros((100, 2))
    binary = io.BytesIO()
    np.save(binary, rows)
    with serving(http_app({"gmm": hosted["gmm"]}, Limits(max_json_bytes=100))) as server:
        refused = server.post("/models/gmm/log_prob", json={"x": rows.tolist()})
        assert (refused.status_code, refused.json()["field"]) == (413, "body")
        kind = {"content-type": "application/x-npy"}
        assert server.post("/models/gmm/log_prob", content=binary.getvalue(), headers=kind).status_code == 200
        assert server.post("/models/gmm/log_prob", json={"x": rows[:2].tolist()}).status_code == 200


def test_what_is_read_for_nobody_takes_no_room():
    """As a large table of a client that has hung up, which a thread still reads."""
    room, is_over = Room(Limits()), threading.Event()
    told: list[BaseException] = []

    def read(share: Share) -> None:
        assert is_over.wait(TIMEOUT_S)
        try:
            share.take(1_000)
        except ClientGone as gone:
            told.append(gone)

    with room.for_request() as share:
        share.take(10)
        reading = threading.Thread(target=read, args=(share,))
        reading.start()
    is_over.set()
    reading.join()
    assert told
    assert room.num_bytes == 0


def test_room_is_looked_at_and_taken_in_one_step():
    """Bodies are read in several threads: none may find room that another is about to take."""

    class Watched(Room):
        @property
        def num_bytes(self) -> int:
            assert self.lock.locked()
            return self._num_bytes

        @num_bytes.setter
        def num_bytes(self, value: int) -> None:
            self._num_bytes = value

    with Watched(Limits(queue_bytes=100)).for_request() as share:
        share.take(60)
        share.take(60)  # alone


def test_a_mistake_in_a_long_list_of_labels_is_one_mistake():
    with pytest.raises(ValidationError) as refused:
        DataOptions.model_validate({"given": [1, "a", []] * 1_000})
    assert refused.value.error_count() == 1
    assert DataOptions.model_validate({"given": [1, "a", 0.5, True]}).given == [1, "a", 0.5, True]


def test_a_picture_is_held_in_the_room_and_is_late_as_a_whole(watched, monkeypatch):
    """All its chunks are there before anything of it can be drawn."""
    monkeypatch.setattr(hosted_model, "CHUNK_ROWS", 5)
    held: list[int] = []

    def slowly(*_):
        held.append(server.app.state.server.room.num_bytes)
        time.sleep(1.0)
        return b"png"

    monkeypatch.setattr(http_app_module, "picture_bytes", slowly)
    with serving(http_app({"gmm": watched}, Limits(time_limit_s=0.5))) as server:
        answer = server.post(f"{SAMPLE}?format=png", json={"num_samples": 20})
        assert answer.status_code == 504
        (num_bytes,) = held
        assert num_bytes >= 2 * 20 * 2 * 8
        until(lambda: server.app.state.server.room.num_bytes == 0, "its room is free")


def test_room_is_for_what_a_body_becomes(watched):
    body = {"seed": 666}
    with serving(http_app({"gmm": watched})) as server, server.connected() as client:
        client.sendall(_request(SAMPLE, body))
        until(lambda: len(watched.calls) == 1, "it is computed")
        objects = sys.getsizeof([]) * len(json.dumps(body)) // len("[],")  # in as many bytes
        assert server.app.state.server.room.num_bytes > objects
        watched.leave.set()
        until(lambda: server.app.state.server.room.num_bytes == 0, "its room is free")


def test_a_slow_body_is_cut_off(hosted):
    with serving(http_app({"gmm": hosted["gmm"]}, Limits(time_limit_s=0.2))) as server:
        with server.connected() as slow:
            slow.sendall(b"POST %s HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n" % SAMPLE.encode())
            slow.sendall(b"content-length: 100\r\n\r\n{")
            head = slow.recv(10_000)
        assert head.startswith(b"HTTP/1.1 408")
        assert server.get("/models").status_code == 200


async def _asked(app, sent, messages, headers=(), body_path=SAMPLE, query=b""):
    """The application, as a server calls it. messages: what the client sends, the last over and over."""
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
        "path": body_path, "raw_path": body_path.encode(), "query_string": query, "root_path": "",
        "headers": [(b"host", b"localhost"), (b"content-type", b"application/json"), *headers],
        "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 1),
    }  # fmt: skip
    waiting = iter(messages)

    async def receive():
        message = next(waiting, None)
        if message is None:
            await asyncio.Event().wait()
        return message

    await asyncio.wait_for(app(scope, receive, sent), TIMEOUT_S)


async def _answered(app, headers):
    sent = []

    async def send(message):
        sent.append(message)

    await _asked(app, send, [{"type": "http.request", "body": b"{}"}], headers)
    return sent


def test_a_body_shorter_than_its_content_length(watched):
    start, body = asyncio.run(_answered(http_app({"gmm": watched}), [(b"content-length", b"9")]))
    assert start["status"] == 400
    assert "9" in json.loads(body["body"])["error"]
    assert not watched.calls


# Streams


def test_one_chunk_is_computed_ahead_of_the_client_and_no_more(watched):
    num_chunks, computed_at = 6, []

    async def asked():
        app = http_app({"gmm": watched})

        batcher = app.state.server.batcher

        async def send(message):
            if message["type"] == "http.response.body" and len(message["body"]) > 1000:
                ahead = min(len(computed_at) + 2, num_chunks)
                while len(watched.calls) < ahead or batcher.num_rows or batcher.stuck_for_s:
                    await asyncio.sleep(0.001)
                for _ in range(10):  # in which whoever wants more would ask for it
                    await asyncio.sleep(0)
                assert batcher.num_rows == batcher.stuck_for_s == 0
                computed_at.append(len(watched.calls))

        body = json.dumps({"num_samples": num_chunks * watched.chunk_rows, "seed": 1}).encode()
        await _asked(app, send, [{"type": "http.request", "body": body}], query=b"format=npy")

    asyncio.run(asked())
    # While part i (from 1) is taken, chunk i + 1 is computed, and not i + 2.
    assert computed_at == [min(i + 1, num_chunks) for i in range(1, num_chunks + 1)]


@pytest.mark.parametrize("format_", FORMATS)
def test_a_failure_on_the_way_cuts_the_answer_off(watched, format_, caplog):
    watched.fails_at = 2 * watched.chunk_rows
    with serving(http_app({"gmm": watched})) as server:
        body = {"num_samples": 4 * watched.chunk_rows, "seed": 1}
        with pytest.raises(httpx.RemoteProtocolError):
            server.post(SAMPLE, params={"format": format_}, json=body)
        watched.fails_at = 0
        failed = server.post(SAMPLE, params={"format": format_}, json=body)
        assert failed.status_code == 500  # nothing was sent yet
        assert "test's" not in failed.text


@pytest.mark.parametrize("num_chunks", [1, 3])
def test_an_answer_is_sent_in_slices_and_held_in_the_room(watched, num_chunks):
    num_samples, sent, held = num_chunks * watched.chunk_rows - 1, [], []

    async def asked():
        app = http_app({"gmm": watched})

        async def send(message):
            if message["type"] == "http.response.body":
                sent.append(message["body"])
                held.append(app.state.server.room.num_bytes)

        body = json.dumps({"num_samples": num_samples, "seed": 1}).encode()
        await _asked(app, send, [{"type": "http.request", "body": body}], query=b"format=json")
        assert app.state.server.room.num_bytes == 0

    asyncio.run(asked())
    assert len(json.loads(b"".join(sent))["x"]) == num_samples
    assert max(map(len, sent)) <= SLICE_BYTES < sum(map(len, sent))
    assert min(held) > 8 * min(num_samples, watched.chunk_rows)


@pytest.mark.parametrize("num_chunks", [1, 3])
def test_who_takes_nothing_is_given_up(watched, num_chunks, caplog):
    async def asked():
        app = http_app({"gmm": watched}, Limits(time_limit_s=0.2))

        async def send(message):
            if message["type"] == "http.response.body":
                await asyncio.Event().wait()

        body = json.dumps({"num_samples": num_chunks * watched.chunk_rows, "seed": 1}).encode()
        await _asked(app, send, [{"type": "http.request", "body": body}], query=b"format=json")
        assert app.state.server.room.num_bytes == 0

    asyncio.run(asked())
    assert "the client took nothing" in caplog.text


# Clients that hang up


def _request(path, body, query=""):
    content = json.dumps(body).encode()
    head = f"POST {path}{query} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    return head.encode() + b"content-length: %d\r\n\r\n" % len(content) + content


def test_who_hangs_up_frees_the_queue(watched):
    with serving(http_app({"gmm": watched})) as server:
        blocking = server.connected()
        blocking.sendall(_request(SAMPLE, {"seed": 666}))
        until(lambda: len(watched.calls) == 1, "the thread computes")
        others = [server.connected() for _ in range(5)]
        for i, each in enumerate(others):
            each.sendall(_request(SAMPLE, {"seed": i, "num_samples": 10}))
        until(lambda: server.batcher.num_rows == 50, "five requests wait")
        for each in others:
            each.close()
        until(lambda: server.batcher.num_rows == server.batcher.num_bytes == 0, "nobody waits")
        blocking.close()
        watched.leave.set()
        assert server.post(SAMPLE, json={"seed": 1}).status_code == 200
        assert {call.seed for call in watched.calls} == {666, 1}


def test_who_hangs_up_before_a_figure_is_drawn_frees_the_queue(watched, monkeypatch):
    drawn = []
    monkeypatch.setattr(questions, "figure_bytes", lambda *args: drawn.append(args) or b"png")
    with serving(http_app({"gmm": watched})) as server:
        path = f"/models/gmm/figures/{server.get('/models/gmm').json()['figures'][0]}"
        with server.connected() as blocking:
            blocking.sendall(_request(SAMPLE, {"seed": 666}))
            until(lambda: len(watched.calls) == 1, "the thread computes")
            with server.connected() as other:
                other.sendall(f"GET {path} HTTP/1.1\r\nhost: localhost\r\n\r\n".encode())
                until(lambda: server.batcher.num_rows == DRAWN_ROWS, "the figure waits")
                counted = server.app.state.server.metrics.text().decode()  # as another replica reads it
                assert f"gendist_queue_rows {DRAWN_ROWS}.0" in counted
            until(lambda: server.batcher.num_rows == server.batcher.num_bytes == 0, "nobody waits")
            watched.leave.set()
        assert server.post(SAMPLE, json={"seed": 1}).status_code == 200
    assert not drawn


@pytest.fixture
def slow_reading(monkeypatch):
    """Large bodies are read only when this is set; and whether one is."""
    leave, began = threading.Event(), threading.Event()
    read = http_app_module._asked

    def slowly(*args):
        began.set()
        assert leave.wait(TIMEOUT_S)
        return read(*args)

    monkeypatch.setattr(http_app_module, "_asked", slowly)
    yield leave, began
    leave.set()


LARGE = {"seed": 1, "given": "x" * http_app_module.MOST_AT_ONCE}


def test_who_hangs_up_while_his_body_is_read_is_noticed(watched, slow_reading):
    leave, began = slow_reading
    with serving(http_app({"gmm": watched})) as server:
        with server.connected() as client:
            client.sendall(_request(SAMPLE, LARGE))
            assert began.wait(TIMEOUT_S)
        text = 'gendist_requests_total{model="gmm",status="499",verb="sample"} 1.0'
        until(lambda: text in server.get("/metrics").text, "the request is given up")
        assert not leave.is_set()
        leave.set()


def test_the_time_limit_is_that_of_reading_a_body_too(watched, slow_reading):
    with serving(http_app({"gmm": watched}, Limits(time_limit_s=0.2))) as server:
        assert server.post(SAMPLE, json=LARGE).status_code == 504
        slow_reading[0].set()


def test_who_hangs_up_in_a_stream_ends_it(watched):
    num_chunks = 2000
    limits = Limits(max_rows=num_chunks * watched.chunk_rows)
    with serving(http_app({"gmm": watched}, limits)) as server:
        client = server.connected()
        client.sendall(_request(SAMPLE, {"seed": 1, "num_samples": limits.max_rows}, "?format=npy"))
        client.recv(1000)
        client.close()
        text = 'gendist_requests_total{model="gmm",status="499",verb="sample"} 1.0'
        until(lambda: text in server.get("/metrics").text, "the request is given up")
        assert server.batcher.num_rows == server.batcher.num_bytes == 0
        assert len(watched.calls) < num_chunks
        assert server.post(SAMPLE, json={"seed": 2}).status_code == 200


def test_the_queue_is_full(watched):
    with serving(http_app({"gmm": watched}, Limits(queue_rows=10))) as server:
        blocking = server.connected()
        blocking.sendall(_request(SAMPLE, {"seed": 666}))
        until(lambda: len(watched.calls) == 1, "the thread computes")
        waiting = server.connected()
        waiting.sendall(_request(SAMPLE, {"seed": 1, "num_samples": 10}))
        until(lambda: server.batcher.num_rows == 10, "one waits")
        refused = server.post(SAMPLE, json={"num_samples": 1})
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json().keys() == {"error", "field", "allowed"}
        watched.leave.set()
        assert waiting.recv(100).startswith(b"HTTP/1.1 200")
        blocking.close()
        waiting.close()


def test_what_takes_too_long_and_a_thread_that_is_stuck(watched):
    with serving(http_app({"gmm": watched}, Limits(time_limit_s=0.2))) as server:
        until(lambda: server.post(SAMPLE, json={"seed": 666}).status_code == 504 and watched.calls, "it takes too long")
        until(lambda: server.get("/healthz").status_code == 503, "it is told")
        assert server.get("/readyz").status_code == 503
        watched.leave.set()
        until(lambda: server.get("/healthz").status_code == 200, "it is over")
        assert server.get("/readyz").status_code == 200
        until(lambda: server.post(SAMPLE, json={"seed": 1}).status_code == 200, "others are answered")


def test_too_many_bodies_at_once(watched):
    limits = Limits(queue_bytes=50_000)
    with serving(http_app({"gmm": watched}, limits)) as server:
        first = server.connected()
        first.sendall(
            _request(SAMPLE, {"seed": 1})[:-1].replace(b"content-length: 11", b"content-length: 49000") + b" " * 40_000
        )
        until(lambda: server.app.state.server.room.num_bytes >= 40_000, "the first body is on its way")
        second = server.post(SAMPLE, content=[b"{" + b" " * 9_000, b" " * 9_000 + b"}"], headers=JSON)
        assert second.status_code == 429
        first.close()
        until(lambda: server.app.state.server.room.num_bytes == 0, "its room is free")
        assert server.post(SAMPLE, json={}).status_code == 200
