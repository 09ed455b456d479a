"""The client gives what the model itself would, whatever happens on the way."""

from __future__ import annotations

import asyncio
import io
import json
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from live_server import running
from PIL import Image

import gendist
from gendist.protocols import UserError
from gendist.serve import client as client_module
from gendist.serve import client_calls
from gendist.serve.client import AsyncClient, Client, NotAllowed, NotFound, NotOffered, RequestError, Samples, ServerError
from gendist.serve.http_app import http_app
from gendist.serve.media_types import ARROW


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[Client]:
    with Client(url) as client:
        yield client


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Those that there would be, in seconds."""
    pauses: list[float] = []
    monkeypatch.setattr(client_module.time, "sleep", pauses.append)
    return pauses


def loaded(artifacts: Any, name: str) -> Any:
    return gendist.load(artifacts[name])


def same(served: Any, ours: Any) -> None:
    """Numbers alike to the last digit, in float64; or lists of them."""
    if isinstance(ours, list):
        assert isinstance(served, list)
        assert len(served) == len(ours)
        for one, other in zip(served, ours, strict=True):
            same(one, other)
    else:
        assert served.dtype == np.float64
        np.testing.assert_array_equal(served, np.asarray(ours, dtype=np.float64))


def test_it_needs_neither_torch_nor_ray():
    program = "import sys, gendist.serve.client; print(sorted({'torch', 'ray', 'fastapi', 'matplotlib'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"


# Samples


@pytest.mark.parametrize("name", ["labelled_gmm", "hmm", "naive_bayes", "labelled_vae", "vae_of_images", "gan"])
def test_samples_are_those_of_the_model(client, artifacts, name):
    model = loaded(artifacts, name)
    samples = client.sample(name, 7, seed=3, offset=2)
    same(samples.x, model.sample(7, seed=3, offset=2))
    assert (samples.seed, samples.offset, samples.digest) == (3, 2, gendist.artifact.digest(artifacts[name]))
    assert samples.columns == tuple(client.model(name)["columns"])
    within = getattr(model, "model", model)
    if model.labels and hasattr(within, "sample_classes"):
        assert samples.label.tolist() == [model.labels[c] for c in within.sample_classes(7, seed=3, offset=2)]
    else:
        assert samples.label is None
    if hasattr(within, "sample_states"):
        np.testing.assert_array_equal(samples.state, within.sample_states(7, seed=3, offset=2))
    else:
        assert samples.state is None
    for given in client.model(name)["conditions"][:1]:
        same(client.sample(name, 3, seed=1, given=given).x, model.sample(3, seed=1, given=given))


def test_a_seed_that_nobody_gives_is_drawn_and_told(client):
    first, second = client.sample("gmm", 3), client.sample("gmm", 3)
    assert first.seed != second.seed
    np.testing.assert_array_equal(client.sample("gmm", 3, seed=first.seed).x, first.x)
    largest = client.sample("gmm", 2, seed=2**64 - 1)
    assert largest.seed == 2**64 - 1


@pytest.mark.parametrize("name", ["labelled_gmm", "hmm", "naive_bayes", "gan"])
def test_chunks_are_the_same_rows(client, name):
    options = {"length": 4} if name == "hmm" else {}
    number = 2 * client.model(name)["chunk_rows"] + 3
    whole = client.sample(name, number, seed=5, offset=1, **options)
    chunks = list(client.sample_chunks(name, number, seed=5, offset=1, **options))
    assert len(chunks) == 3
    assert [chunk.offset for chunk in chunks] == [1, 1 + len(chunks[0].x), 1 + 2 * len(chunks[0].x)]
    for field in ("x", "label", "state"):
        parts = [getattr(chunk, field) for chunk in chunks]
        if getattr(whole, field) is None:
            assert parts == [None] * 3
        else:
            together = np.concatenate(parts)
            assert together.dtype == getattr(whole, field).dtype
            np.testing.assert_array_equal(together, getattr(whole, field))


def test_pictures_are_png_files(client):
    for png in (client.picture("gan", 4, seed=1, given="a"), client.figure("gmm", "components")):
        with Image.open(io.BytesIO(png)) as image:
            assert image.format == "PNG"


# What is said of data


@pytest.mark.parametrize("name", ["labelled_gmm", "naive_bayes", "labelled_vae", "vae_of_images", "gan"])
def test_what_is_said_of_rows_is_what_the_model_says(client, artifacts, name):
    model, said = loaded(artifacts, name), client.model(name)
    x = model.sample(9, seed=0)
    for verb in set(said["verbs"]) - {"sample", "decode"}:
        same(getattr(client, verb)(name, x), getattr(model, verb)(x))
    if "decode" in said["verbs"]:
        z = np.random.default_rng(0).dirichlet(np.ones(said["latent_width"]), size=5)
        given = {"given": said["conditions"][0]} if said["verbs"]["decode"]["needs_given"] else {}
        same(client.decode(name, z, **given), model.decode(z, **given))
    for verb, reason in model.not_offered.items():
        with pytest.raises(NotOffered, match=f"^{verb}: ") as refused:
            getattr(client, verb)(name, x)
        assert reason in str(refused.value)


def test_options_reach_the_model(client, artifacts):
    vae, gmm = loaded(artifacts, "labelled_vae"), loaded(artifacts, "labelled_gmm")
    x = vae.sample(6, seed=0).double()
    same(client.elbo("labelled_vae", x, seed=4, offset=9, given=1), vae.elbo(x, seed=4, offset=9, given=1))
    same(client.log_prob_bound("labelled_vae", x, num_samples=3, seed=2), vae.log_prob_bound(x, num_samples=3, seed=2))
    each = [0, 1, 2, 2, 1, 0]
    same(client.encode("labelled_vae", x, given=each), vae.encode(x, given=each))
    same(client.encode("labelled_vae", x, given=np.array(each)), vae.encode(x, given=each))
    gappy = np.array([[np.nan, 1.0, 2.0], [0.0, np.nan, np.nan]])
    same(client.impute("labelled_gmm", gappy), gmm.impute(gappy))
    same(client.impute("labelled_gmm", gappy, seed=3, offset=5), gmm.impute(gappy, seed=3, offset=5))
    same(client.decode("labelled_gmm", [2, 0]), gmm.decode(np.array([2, 0])))


def test_sequences_of_any_lengths(client, artifacts):
    model, rng = loaded(artifacts, "hmm"), np.random.default_rng(0)
    ragged = [rng.normal(size=(length, 2)) for length in (3, 1, 6)]
    alike = rng.normal(size=(4, 5, 2))
    for x in (ragged, alike, list(alike), alike[0]):
        for verb in ("log_prob", "encode"):
            same(getattr(client, verb)("hmm", x), getattr(model, verb)(x))
    ragged[2][1, 0] = np.nan
    same(client.impute("hmm", ragged), model.impute(ragged))
    same(client.impute("hmm", ragged, seed=1), model.impute(ragged, seed=1))


def test_features_that_are_called_as_what_stands_beside_them(alike):
    rng = np.random.default_rng(0)
    ragged = [rng.normal(size=(length, 3)) for length in (3, 1, 6)]
    ragged[0][1, 0] = np.nan
    steps = alike["steps"].model
    with running(http_app(alike)) as url, Client(url) as client:
        same(client.log_prob("steps", ragged), steps.log_prob(ragged))
        same(client.encode("steps", ragged), steps.encode(ragged))
        same(client.impute("steps", ragged), steps.impute(ragged))
        for name, field in (("steps", "state"), ("labels", "label")):
            whole, (chunk,) = client.sample(name, 4, seed=1), client.sample_chunks(name, 4, seed=1)
            same(chunk.x, whole.x)
            assert getattr(whole, field) is not None
            np.testing.assert_array_equal(getattr(chunk, field), getattr(whole, field))


def test_data_frames_are_read_by_the_names_of_their_columns(client, artifacts):
    model = loaded(artifacts, "naive_bayes")
    frame = pd.DataFrame({"size": [0.5, 3.0, -1.0], "colour": ["red", "blue", "green"], "more": [1, 2, 3]})
    x = np.array([[2.0, 0.5], [0.0, 3.0], [1.0, -1.0]])  # blue, green and red are 0, 1 and 2
    for table in (frame, pa.Table.from_pandas(frame)):
        same(client.log_prob("naive_bayes", table), model.log_prob(x))
    same(client.classify("naive_bayes", frame), model.classify(x))


def test_texts_that_are_no_columns_are_refused_here(client):
    with pytest.raises(UserError, match="data frame"):
        client.log_prob("naive_bayes", [["red", 0.5]])


# Errors


def test_errors_are_the_servers_line_and_have_types(client):
    with pytest.raises(NotFound, match="no_such") as missing:
        client.sample("no_such", 1)
    assert "labelled_gmm" in missing.value.allowed
    with pytest.raises(RequestError) as wrong:
        client.sample("gmm", 0)
    assert (wrong.value.status, wrong.value.field) == (422, "num_samples")
    with pytest.raises(RequestError, match="num_samples 0"):
        next(client.sample_chunks("gmm", 0))
    with pytest.raises(NotFound, match="no_such"):
        next(client.sample_chunks("no_such", 0))
    with pytest.raises(RequestError, match="given") as unknown:
        client.sample("labelled_gmm", 1, given="up")
    assert isinstance(unknown.value, UserError)
    with pytest.raises(RequestError) as shape:
        client.log_prob("gmm", np.zeros((2, 5)))
    assert shape.value.field == "x"
    with pytest.raises(NotFound):
        client.figure("gmm", "no_such")


def test_what_somebody_else_has_opened_stays_open(url):
    with httpx.Client() as http:
        with Client(url, http=http) as client:
            client.models()
        assert not http.is_closed
    own = Client(url)
    own.close()
    assert own._http.is_closed


def test_a_token_is_sent(hosted):
    with running(http_app({"gmm": hosted["gmm"]}, tokens=["s3cret"])) as url:
        with Client(url) as client, pytest.raises(NotAllowed, match="token"):
            client.models()
        with Client(url, token="s3cret") as client:
            assert [model["name"] for model in client.models()] == ["gmm"]
            assert client.sample("gmm", 2).x.shape == (2, 2)


# Servers that come and go. A handler answers as the server behind `url` does, after what goes wrong.


@contextmanager
def client_of(url: str, wrong: Callable[[int, httpx.Request], httpx.Response | None], **options: Any) -> Iterator[Client]:
    """wrong(number of the request, the request) -> an answer, an exception, or None: as the server says."""
    count = iter(range(1000))
    behind = httpx.HTTPTransport()

    def handle(request: httpx.Request) -> httpx.Response:
        answer = wrong(next(count), request)
        return behind.handle_request(request) if answer is None else answer

    with behind, httpx.Client(transport=httpx.MockTransport(handle)) as http:
        yield Client(url, http=http, **options)


def test_what_may_come_right_is_asked_again_with_the_same_seed(url, no_pauses):
    bodies = []

    def wrong(number: int, request: httpx.Request) -> httpx.Response | None:
        if request.method == "GET":
            return None
        bodies.append(request.read())
        if len(bodies) == 1:
            raise httpx.ConnectError("refused")
        if len(bodies) <= 4:
            status = (429, 503, 502)[len(bodies) - 2]
            return httpx.Response(status, json={"error": "busy", "field": None, "allowed": None}, headers={"Retry-After": "3"})
        return None

    with client_of(url, wrong) as client:
        samples = client.sample("gmm", 4)
    assert len(bodies) == 5
    assert len(set(bodies)) == 1
    assert no_pauses[0] < 1.0
    assert all(pause >= 3.0 for pause in no_pauses[1:])
    with Client(url) as client:
        np.testing.assert_array_equal(samples.x, client.sample("gmm", 4, seed=samples.seed).x)


def test_an_answer_that_is_cut_is_asked_for_again(no_pauses):
    """A replica that dies between the head of its answer and the end of the body: fewer bytes come than were promised."""
    body = b'{"models": []}'
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)

    def answer(sockets: socket.socket) -> None:
        for content in (head, head + body[:-1], head + body):
            connection, _ = sockets.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(content)

    with socket.create_server(("127.0.0.1", 0)) as sockets, ThreadPoolExecutor(1) as thread:
        sockets.settimeout(60)
        served = thread.submit(answer, sockets)
        with Client(f"http://127.0.0.1:{sockets.getsockname()[1]}") as client:
            assert client.models() == []
        served.result()
    assert len(no_pauses) == 2


@pytest.mark.parametrize("status", [500, 504])
def test_what_will_not_come_right_is_told_at_once(status, url, no_pauses):
    asked = []

    def wrong(number: int, request: httpx.Request) -> httpx.Response:
        asked.append(request)
        return httpx.Response(status, text="no JSON at all")

    with client_of(url, wrong) as client, pytest.raises(ServerError, match=str(status)) as error:
        client.models()
    assert error.value.status == status
    assert len(asked) == 1


def test_retries_end_by_number_and_by_time(url, no_pauses):
    def busy(number: int, request: httpx.Request) -> httpx.Response:
        return httpx.Response(429, json={"error": "the queue is full"}, headers={"Retry-After": "2"})

    with client_of(url, busy, max_retries=3, timeout_s=1e6) as client, pytest.raises(ServerError, match="the queue is full"):
        client.models()
    assert len(no_pauses) == 3
    # A pause that would end too late is not begun.
    with client_of(url, busy, max_retries=1000, timeout_s=1.0) as client, pytest.raises(ServerError):
        client.models()
    assert len(no_pauses) == 3


def test_an_answer_that_never_ends_does(url, no_pauses):
    def endless() -> Iterator[bytes]:
        while True:
            yield b" "

    def wrong(number: int, request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, content=endless())

    with client_of(url, wrong, timeout_s=0.2) as client, pytest.raises(ServerError, match="too long"):
        client.models()


def test_what_is_no_server_of_ours_is_told():
    with pytest.raises(UserError, match="http://"):
        Client("localhost:8000")
    client_of_elsewhere = client_of("http://elsewhere", lambda number, request: httpx.Response(200, text="<html>"))
    with client_of_elsewhere as client, pytest.raises(ServerError, match="is it a gendist server"):
        client.models()


def test_nobody_there_is_told(no_pauses):
    with Client("http://127.0.0.1:9", max_retries=2) as client, pytest.raises(ServerError, match="is a server running there"):
        client.models()


class Broken(httpx.SyncByteStream):
    """A body that ends early: with an error, or as if it were whole."""

    def __init__(self, content: bytes, is_told: bool) -> None:
        self.content, self.is_told = content, is_told

    def __iter__(self) -> Iterator[bytes]:
        for first in range(0, len(self.content), 1000):
            yield self.content[first : first + 1000]
        if self.is_told:
            raise httpx.RemoteProtocolError("peer closed connection")


@pytest.mark.parametrize("is_told", [True, False])
@pytest.mark.parametrize("share", [0.0, 0.4, 0.95])
def test_a_stream_goes_on_from_the_row_that_it_has_come_to(url, no_pauses, is_told, share):
    offsets = []

    def wrong(number: int, request: httpx.Request) -> httpx.Response | None:
        if request.method == "GET":
            return None
        body = request.read()
        offsets.append(int(body.decode().split('"offset":')[1].split(",")[0]))
        if len(offsets) > 2:
            return None
        whole = httpx.post(request.url, content=body, headers={"Content-Type": "application/json", "Accept": ARROW})
        assert whole.status_code == 200
        part = whole.content[: int(share * len(whole.content))]
        headers = {"X-Gendist-Model-Digest": whole.headers["X-Gendist-Model-Digest"]}
        return httpx.Response(200, headers=headers, stream=Broken(part, is_told))

    with client_of(url, wrong) as client, Client(url) as plain:
        number = 4 * plain.model("labelled_gmm")["chunk_rows"] + 5
        chunks = list(client.sample_chunks("labelled_gmm", number, seed=7))
        whole = plain.sample("labelled_gmm", number, seed=7)
    np.testing.assert_array_equal(np.concatenate([chunk.x for chunk in chunks]), whole.x)
    assert len(offsets) == 3
    assert offsets == sorted(offsets)
    if share > 0.3:
        assert offsets[1] > 0


def test_a_stream_of_another_model_is_no_continuation(url, no_pauses):
    answers = []

    def wrong(number: int, request: httpx.Request) -> httpx.Response | None:
        if request.method == "GET":
            return None
        whole = httpx.post(request.url, content=request.read(), headers={"Content-Type": "application/json", "Accept": ARROW})
        answers.append(whole)
        headers = {"X-Gendist-Model-Digest": f"digest {len(answers)}"}
        return httpx.Response(200, headers=headers, stream=Broken(whole.content[: len(whole.content) // 2], True))

    with client_of(url, wrong) as client, pytest.raises(ServerError, match="another model"):
        for _ in client.sample_chunks("gmm", 20_000, seed=1):
            pass
    assert len(answers) == 2


def test_chunks_are_read_while_they_come(url):
    """Of more rows than a server would ever make, the first are there; and who stops asks for no more."""
    with Client(url) as client:
        most = 1_000_000
        stream = client.sample_chunks("gmm", most, seed=2)
        first = next(stream)
        assert len(first.x) < most / 10
        stream.close()
        np.testing.assert_array_equal(first.x[:3], client.sample("gmm", 3, seed=2).x)


# The same, awaited


async def gathered(stream: AsyncIterator[Samples]) -> list[Samples]:
    return [chunk async for chunk in stream]


def test_what_is_awaited_is_the_same(client, url, artifacts):
    """Every method that answers, of many requests at once."""
    methods = {name for name in vars(Client) if not name.startswith("_")} - {"close"}
    assert methods == {name for name in vars(AsyncClient) if not name.startswith("_")} - {"aclose"}
    x = loaded(artifacts, "labelled_vae").sample(6, seed=0).double().numpy()
    ragged = [np.zeros((3, 2)), np.ones((1, 2))]
    calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
        ("models", (), {}),
        ("model", ("gan",), {}),
        ("picture", ("gan", 4), {"seed": 1, "given": "a"}),
        ("figure", ("gmm", "components"), {"seed": 1}),
        ("elbo", ("labelled_vae", x), {"seed": 4, "offset": 9, "given": 1}),
        ("log_prob_bound", ("labelled_vae", x), {"num_samples": 3}),
        ("classify", ("labelled_vae", x), {}),
        ("reconstruct", ("labelled_vae", x), {}),
        ("log_prob", ("hmm", ragged), {}),
        ("encode", ("hmm", ragged), {}),
        ("impute", ("labelled_gmm", [[np.nan, 1.0, 2.0]]), {"seed": 3}),
        ("decode", ("labelled_gmm", [2, 0]), {}),
    ]
    assert {name for name, *_ in calls} == methods - {"sample", "sample_chunks"}
    number = 2 * client.model("naive_bayes")["chunk_rows"] + 3

    async def asked() -> tuple[list[Any], list[Samples], list[Samples]]:
        async with AsyncClient(url) as awaited:
            told = await asyncio.gather(*(getattr(awaited, name)(*args, **options) for name, args, options in calls))
            samples = await asyncio.gather(*(awaited.sample("hmm", 5, seed=seed) for seed in range(40)))
            return told, samples, await gathered(awaited.sample_chunks("naive_bayes", number, seed=5))

    told, samples, chunks = asyncio.run(asked())
    for one, (name, args, options) in zip(told, calls, strict=True):
        np.testing.assert_equal(one, getattr(client, name)(*args, **options))
    for seed, one in enumerate(samples):
        np.testing.assert_equal(vars(one), vars(client.sample("hmm", 5, seed=seed)))
    whole = client.sample("naive_bayes", number, seed=5)
    assert len(chunks) == 3
    np.testing.assert_array_equal(np.concatenate([chunk.x for chunk in chunks]), whole.x)
    np.testing.assert_array_equal(np.concatenate([chunk.label for chunk in chunks]), whole.label)


class BrokenAwaited(httpx.AsyncByteStream):
    def __init__(self, content: bytes) -> None:
        self.content = content

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield self.content
        raise httpx.RemoteProtocolError("peer closed connection")


def test_what_is_awaited_is_asked_again_and_goes_on(url, client, monkeypatch):
    """As a client that waits does: from the row that it has come to, with the seed that it has drawn."""
    monkeypatch.setattr(client_calls, "FIRST_PAUSE_S", 0.0)
    bodies: list[dict[str, Any]] = []
    number = 4 * client.model("labelled_gmm")["chunk_rows"] + 5

    async def asked() -> list[Samples]:
        async with httpx.AsyncHTTPTransport() as behind:

            async def handle(request: httpx.Request) -> httpx.Response:
                if request.method == "GET":
                    return await behind.handle_async_request(request)
                bodies.append(json.loads(request.content))
                if len(bodies) == 1:
                    raise httpx.ConnectError("refused")
                if len(bodies) == 2:
                    return httpx.Response(503, json={"error": "busy", "field": None, "allowed": None})
                answer = await behind.handle_async_request(request)
                if len(bodies) > 3:
                    return answer
                content = await answer.aread()
                return httpx.Response(200, headers=answer.headers, stream=BrokenAwaited(content[: int(0.7 * len(content))]))

            async with httpx.AsyncClient(transport=httpx.MockTransport(handle)) as http:
                async with AsyncClient(url, http=http) as awaited:
                    chunks = await gathered(awaited.sample_chunks("labelled_gmm", number))
                assert not http.is_closed
                return chunks

    chunks = asyncio.run(asked())
    assert len({body["seed"] for body in bodies}) == 1
    assert [body["offset"] > 0 for body in bodies] == [False, False, False, True]
    whole = client.sample("labelled_gmm", number, seed=chunks[0].seed)
    np.testing.assert_array_equal(np.concatenate([chunk.x for chunk in chunks]), whole.x)


def test_what_is_awaited_fails_as_what_is_not(url, monkeypatch):
    monkeypatch.setattr(client_calls, "FIRST_PAUSE_S", 0.0)

    async def asked() -> None:
        async with AsyncClient(url) as awaited:
            with pytest.raises(NotFound, match="no_such"):
                await awaited.sample("no_such", 1)
            with pytest.raises(RequestError, match="num_samples 0"):
                await gathered(awaited.sample_chunks("gmm", 0))
        async with AsyncClient("http://127.0.0.1:9", max_retries=2) as nobody:
            with pytest.raises(ServerError, match="is a server running there"):
                await nobody.models()

    asyncio.run(asked())
    with pytest.raises(UserError, match="http://"):
        AsyncClient("localhost:8000")
