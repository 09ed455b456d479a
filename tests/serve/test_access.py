"""Who may ask, from where, and what is noted of it."""

from __future__ import annotations

import asyncio
import json
import logging

import httpx
import pytest
from served import serving

from gendist.serve.http_app import http_app

TOKENS = ("a-token-of-the-test", "and another one")
SAMPLE = "/models/gmm/sample"


def asked(app, *requests, client=("127.0.0.1", 1), base_url="http://localhost:8000", root_path=""):
    """The answers to (method, path, headers) each."""

    async def all_of_them():
        transport = httpx.ASGITransport(app, client=client, root_path=root_path)
        async with httpx.AsyncClient(transport=transport, base_url=base_url) as http:
            return [await http.request(method, path, headers=headers) for method, path, headers in requests]

    return asyncio.run(all_of_them())


@pytest.fixture
def lines(caplog):
    """What the access log has, one object a request."""
    caplog.set_level(logging.INFO, logger="gendist.access")
    return lambda: [json.loads(record.message) for record in caplog.records if record.name == "gendist.access"]


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


def test_tokens(hosted):
    app = http_app({"gmm": hosted["gmm"]}, tokens=TOKENS)
    bad = [{}, bearer("another"), bearer(TOKENS[0][:-1]), bearer(""), {"authorization": TOKENS[0]},
           {"authorization": f"Basic {TOKENS[0]}"}]  # fmt: skip
    for answer in asked(app, *(("POST", SAMPLE, headers) for headers in bad)):
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"].startswith("Bearer")
        assert answer.json()["field"] == "authorization"
    for answer in asked(app, *(("POST", SAMPLE, bearer(token)) for token in TOKENS)):
        assert answer.status_code == 200


def test_health_is_open_and_all_else_is_not(hosted):
    app = http_app({"gmm": hosted["gmm"]}, tokens=TOKENS)
    paths = [
        "/models",
        "/models/gmm",
        "/models/gmm/figures/none",
        "/metrics",
        "/readyz",
        "/openapi.json",
        "/nowhere",
        "/page",
    ]
    assert [answer.status_code for answer in asked(app, *(("GET", path, {}) for path in paths))] == [401] * len(paths)
    health, page, style = asked(app, ("GET", "/healthz", {}), ("GET", "/", {}), ("GET", "/page/style.css", {}))
    assert health.status_code == 200
    assert page.status_code != 401
    assert style.status_code != 401


@pytest.mark.parametrize("prefix", ["/gendist", "/page", "/healthz"])
def test_what_is_open_is_told_behind_any_prefix(hosted, prefix):
    """That the application stands at, as Serve's route_prefix: it is part of the path."""
    app = http_app({"gmm": hosted["gmm"]}, tokens=TOKENS)

    def statuses(*paths):
        return [answer.status_code for answer in asked(app, *(("GET", prefix + path, {}) for path in paths), root_path=prefix)]

    assert statuses("/models", "/models/gmm", "/metrics", "/page") == [401] * 4
    assert statuses("/healthz", "/", "/page/page.css") == [200] * 3


def test_no_token_is_ever_written(hosted, lines, caplog):
    app = http_app({"gmm": hosted["gmm"]}, tokens=TOKENS)
    asked(app, ("POST", f"{SAMPLE}?token={TOKENS[0]}", bearer(TOKENS[0])), ("POST", SAMPLE, bearer("a wrong secret")))
    assert len(lines()) == 2
    assert TOKENS[0] not in caplog.text
    assert "a wrong secret" not in caplog.text


@pytest.mark.parametrize(
    ("peer", "host", "status"),
    [
        ("127.0.0.1", "http://localhost:8000", 200),
        ("127.9.9.9", "http://127.0.0.1", 200),
        ("::1", "http://[::1]:8000", 200),
        ("::ffff:127.0.0.1", "http://localhost", 200),
        ("10.0.0.7", "http://localhost", 403),
        ("::ffff:10.0.0.7", "http://localhost", 403),
        ("not an address", "http://localhost", 403),
        ("127.0.0.1", "http://evil.example", 403),
        ("127.0.0.1", "http://localhost.evil.example", 403),
        ("127.0.0.1", "http://10.0.0.7:8000", 403),
    ],
)
def test_this_machine_alone(hosted, peer, host, status):
    app = http_app({"gmm": hosted["gmm"]}, loopback_only=True)
    answers = asked(app, ("POST", SAMPLE, {}), ("GET", "/healthz", {}), client=(peer, 1), base_url=host)
    assert [answer.status_code for answer in answers] == [status] * 2


def test_this_machine_alone_and_not_by_way_of_a_proxy(hosted):
    """By uvicorn as Serve starts it, which may believe what a header says of the peer."""
    forwarded = [
        {name: said}
        for name in ("X-Forwarded-For", "X-Forwarded-Proto", "Forwarded", "X-Real-IP")
        for said in ("127.0.0.1", "10.0.0.7", "for=127.0.0.1")
    ]
    with serving(http_app({"gmm": hosted["gmm"]}, loopback_only=True)) as server:
        assert server.post(SAMPLE).status_code == 200
        assert {server.post(SAMPLE, headers=headers).status_code for headers in forwarded} == {403}
    with serving(http_app({"gmm": hosted["gmm"]}, tokens=TOKENS)) as server:
        assert {server.post(SAMPLE, headers={**headers, **bearer(TOKENS[0])}).status_code for headers in forwarded} == {200}


def test_a_host_is_needed(hosted):
    app = http_app({"gmm": hosted["gmm"]}, loopback_only=True)
    (answer,) = asked(app, ("POST", SAMPLE, {"host": ""}))
    assert answer.status_code == 403


def test_other_origins_may_not_unless_they_are_named(hosted):
    ours, theirs = {"origin": "https://ours.example"}, {"origin": "https://theirs.example"}
    asks = {"access-control-request-method": "POST"}
    closed = http_app({"gmm": hosted["gmm"]})
    answers = asked(closed, ("POST", SAMPLE, ours), ("OPTIONS", SAMPLE, {**ours, **asks}))
    assert not any("access-control-allow-origin" in answer.headers for answer in answers)
    assert answers[1].status_code == 405

    opened = http_app({"gmm": hosted["gmm"]}, tokens=TOKENS, cors_origins=["https://ours.example"])
    allowed, preflight, refused, unknown = asked(
        opened,
        ("POST", SAMPLE, {**ours, **bearer(TOKENS[0])}),
        ("OPTIONS", SAMPLE, {**ours, **asks}),
        ("POST", SAMPLE, {**theirs, **bearer(TOKENS[0])}),
        ("POST", SAMPLE, ours),
    )
    assert allowed.headers["access-control-allow-origin"] == "https://ours.example"
    assert "X-Gendist-Seed" in allowed.headers["access-control-expose-headers"]
    assert preflight.status_code == 204
    assert "authorization" in preflight.headers["access-control-allow-headers"]
    assert "access-control-allow-origin" not in refused.headers
    assert unknown.status_code == 401
    assert unknown.headers["access-control-allow-origin"] == "https://ours.example"


def test_a_line_a_request(hosted, lines):
    app = http_app({"gmm": hosted["gmm"]})
    answers = asked(
        app,
        ("POST", SAMPLE, {"x-request-id": "of-the-client.1"}),
        ("POST", SAMPLE, {"x-request-id": "two\twords, " + "x" * 100}),
        ("POST", "/models/gmm/classify", {}),
        ("POST", "/models/nobody/sample", {}),
    )
    noted = lines()
    assert [line["status"] for line in noted] == [200, 200, 405, 404]
    assert [line["request_id"] for line in noted] == [answer.headers["x-request-id"] for answer in answers]
    assert noted[0]["request_id"] == "of-the-client.1"
    assert "words" not in noted[1]["request_id"]
    assert noted[0]["seed"] == answers[0].json()["seed"]
    for line, answer in zip(noted, answers, strict=True):
        assert line["bytes"] == len(answer.content)
        assert line["method"] == "POST"
        assert line["time"].endswith("Z")
    assert {key: noted[0][key] for key in ("path", "model", "verb", "rows")} == {
        "path": SAMPLE, "model": "gmm", "verb": "sample", "rows": 1,
    }  # fmt: skip
    assert noted[0]["wait_ms"] >= 0
    assert noted[0]["compute_ms"] > 0
    assert noted[3]["model"] is None
    assert noted[2]["wait_ms"] is None


def test_nothing_is_guessed_by_a_browser(hosted):
    (answer,) = asked(http_app({"gmm": hosted["gmm"]}), ("POST", SAMPLE, {}))
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_web_sockets_are_refused(hosted):
    handshake = (
        b"GET /models HTTP/1.1\r\nhost: localhost\r\nconnection: upgrade\r\nupgrade: websocket\r\n"
        b"sec-websocket-version: 13\r\nsec-websocket-key: MDEyMzQ1Njc4OWFiY2RlZg==\r\n\r\n"
    )
    with serving(http_app({"gmm": hosted["gmm"]})) as server, server.connected() as client:
        client.sendall(handshake)
        assert client.recv(100).startswith(b"HTTP/1.1 403")
