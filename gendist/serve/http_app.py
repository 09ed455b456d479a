"""The HTTP application: the same routes for every family, over a batcher. Plain ASGI; it runs under Ray Serve or uvicorn.

A request passes the `Edge` (access.py), is read and checked (bodies.py, rows.py, questions.py), computed (batcher.py) and sent
(answers.py) as bytes (formats.py).
"""

from __future__ import annotations

import asyncio
import mimetypes
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from gendist.pictures import most_shown, picture_bytes
from gendist.serve.access import PAGE_HEADERS, Access, Edge, Record
from gendist.serve.answers import Headers, Line, until_first_result, while_somebody_waits
from gendist.serve.batcher import Batcher, Work
from gendist.serve.bodies import Room, Take, body_of, json_object, query_of
from gendist.serve.computing import Drawn, drawing, timed
from gendist.serve.formats import Described, encoder_of, format_of, json_bytes
from gendist.serve.hosted_model import Call, HostedModel, SampleCall, compute
from gendist.serve.limits import Limits
from gendist.serve.media_types import MEDIA_TYPES
from gendist.serve.metrics import CONTENT_TYPE, Metrics
from gendist.serve.openapi import document
from gendist.serve.problems import Problem, listing, named, shortened
from gendist.serve.questions import Questions, taken

MOST_AT_ONCE = 2**17  # bytes of a body that are read on the event loop
GROWTH_OF_JSON = 24  # times its bytes are the objects that it becomes: lists of nothing are the worst
PAGE = Path(__file__).parent / "page"


def http_app(
    models: Mapping[str, HostedModel],
    limits: Limits | None = None,
    *,
    tokens: Collection[str] = (),
    loopback_only: bool = False,
    cors_origins: Collection[str] = (),
) -> FastAPI:
    """The application.

    models         by the name that stands in the path
    limits         of this process
    tokens         bearer tokens, any of which is good; none: whoever reaches it may ask
    loopback_only  peers on this machine alone are answered
    cors_origins   of pages elsewhere that may call, such as "https://example.org"
    """
    server = _Server(models, limits or Limits())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        server.is_closing = True
        await server.batcher.close()

    app = FastAPI(
        title="gendist",
        docs_url=None,  # it would load from elsewhere
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
        exception_handlers={HTTPException: _told},
    )
    app.add_middleware(Edge, access=Access(tokens, loopback_only, cors_origins), answered=server.answered)
    app.router.routes += [
        Route("/models/{name}/{verb}", server.ask, methods=["POST"]),
        Route("/models/{name}/figures/{figure}", server.figure),
        Route("/models/{name}", server.model),
        Route("/models", server.list_models),
        Route("/healthz", server.healthz),
        Route("/readyz", server.readyz),
        Route("/metrics", server.text_of_metrics),
        *_page_routes(),
    ]
    app.openapi = lambda: document(server.limits, server.options(), bool(tokens))  # type: ignore[method-assign]
    app.state.server = server
    return app


class _Asked:
    """The route of a verb: as an ASGI application, which a request passes without anything between."""

    def __init__(self, server: _Server) -> None:
        self._server = server

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._server.answer(scope, receive, send)


class _Server:
    """The models of a process behind one batcher, and the endpoints of the routes."""

    def __init__(self, models: Mapping[str, HostedModel], limits: Limits) -> None:
        self.limits = limits
        self.questions = {name: Questions(hosted, limits) for name, hosted in models.items()}
        self.metrics = Metrics(models, limits.batch_rows)
        self.batcher = Batcher(timed(compute, self.metrics.computed), limits, self.metrics.left, self.metrics.queue)
        self.ask = _Asked(self)
        self.room = Room(limits)
        self.is_closing = False
        self._drawn = Drawn()
        self._figure_names: dict[str, list[str]] = {}

    def options(self) -> dict[str, set[str]]:
        """That any of the models has, of each verb."""
        found: dict[str, set[str]] = {}
        for questions in self.questions.values():
            for verb, names in questions.hosted.trial.options.items():
                found.setdefault(verb, set()).update(names)
        return found

    # Samples, and what is said of data

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        record: Record = scope["gendist"]
        name, verb = scope["path_params"]["name"], scope["path_params"]["verb"]
        questions = self._questions(name)
        record.model = name
        questions.check_offered(verb)
        record.verb = verb
        query = query_of(scope)
        headers = dict(scope["headers"])
        accept = [value for header, value in scope["headers"] if header == b"accept"]  # it may be said in several lines
        format_ = format_of(query.pop("format", None), b",".join(accept).decode("latin-1") if accept else None)
        kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower().decode("latin-1")
        most = self.limits.max_body_bytes
        if is_json := kind == MEDIA_TYPES["json"]:
            most = min(most, self.limits.max_json_bytes)
        with self.room.for_request() as share:
            async with until_first_result(self.limits.time_limit_s) as clock:
                body = await body_of(scope, receive, most, share.take)
                clock.is_body_here = True
                async with while_somebody_waits(receive, record):
                    if is_json:
                        share.take(GROWTH_OF_JSON * len(body))
                    if len(body) <= MOST_AT_ONCE:
                        call, described = _asked(questions, verb, kind, body, query, format_, share.take)
                    else:  # beside the event loop, which has others to serve
                        asked = asyncio.to_thread(_asked, questions, verb, kind, body, query, format_, share.take)
                        call, described = await asked
                    del body
                    line = Line(self.batcher, self.limits, record, clock, share.hold)
                    await self._answer(send, line, record, questions, call, described, format_)

    async def _answer(
        self, send: Send, line: Line, record: Record, questions: Questions, call: Call, described: Described, format_: str
    ) -> None:
        record.rows, record.seed = described.num_rows, described.facts.get("seed")
        works = (questions.hosted.work_of(chunk) for chunk in questions.hosted.chunks(call))
        told = _headers(questions.hosted, call, described, format_)
        if format_ == "png":
            await self._picture(send, told, line, works, questions, described)
        else:
            await line.send(send, told, encoder_of(format_, described), works)

    async def _picture(
        self, send: Send, headers: Headers, line: Line, works: Iterable[Work], questions: Questions, described: Described
    ) -> None:
        schema = questions.hosted.artifact.schema
        questions.check_picture(described, most_shown(schema))
        x = (await line.all_of(works))[described.name]
        num_bytes = sum(each.nbytes for each in x) if isinstance(x, list) else x.nbytes
        work = drawing(lambda: picture_bytes(x, schema), described.num_rows, num_bytes)
        await line.send_whole(send, headers, await line.result(work))

    # Models, and what to look at

    async def list_models(self, request: Request) -> Response:
        return _json({"models": [questions.hosted.description() for questions in self.questions.values()]})

    async def model(self, request: Request) -> Response:
        questions = self._questions(request.path_params["name"])
        request.scope["gendist"].model = questions.hosted.name
        names = await self._names_of_figures(questions, request)
        return _json({**questions.hosted.description(), "figures": names})

    async def figure(self, request: Request) -> Response:
        questions = self._questions(request.path_params["name"])
        request.scope["gendist"].model = questions.hosted.name
        seed = questions.seed_of(query_of(request.scope))
        names, wanted = await self._names_of_figures(questions, request), request.path_params["figure"]
        if wanted not in names:
            raise Problem(404, f"the figure {shortened(wanted)}", "figure", listing(names) or "this family has none")
        what = (questions.hosted.name, wanted, seed)
        png = self._drawn.get(what)
        if png is None:
            png = await self._drawing(request, lambda: self._drawn.or_draw(what, lambda: questions.figure(wanted, seed)))
        return Response(png, media_type=MEDIA_TYPES["png"])

    async def _names_of_figures(self, questions: Questions, request: Request) -> list[str]:
        name = questions.hosted.name
        if name not in self._figure_names:
            self._figure_names[name] = await self._drawing(request, questions.names_of_figures)
        return self._figure_names[name]

    async def _drawing(self, request: Request, draw: Callable[[], Any]) -> Any:
        """What comes of it, for as long as somebody waits for that."""
        record: Record = request.scope["gendist"]
        async with while_somebody_waits(request.receive, record):
            return await Line(self.batcher, self.limits, record).result(drawing(draw))

    def _questions(self, name: str) -> Questions:
        if name not in self.questions:
            raise Problem(404, f"the model {shortened(name)}", "name", listing(tuple(self.questions)) or "there is none")
        return self.questions[name]

    # How the server is

    async def healthz(self, request: Request) -> Response:
        self._check_not_stuck()
        return _json({"status": "alive"})

    async def readyz(self, request: Request) -> Response:
        """That a model is here says that it is loaded and that its first sample was made: see `HostedModel`.

        A replica that Serve takes away says so at Serve's own `/-/healthz` at once (503), which its proxies ask; the
        application is told when all that was asked is answered.
        """
        if self.is_closing:
            raise Problem(503, "the server is shutting down", headers={"retry-after": "1"})
        self._check_not_stuck()
        return _json({"status": "ready", "models": list(self.questions)})

    def _check_not_stuck(self) -> None:
        stuck_for_s = self.batcher.stuck_for_s
        if stuck_for_s > self.limits.time_limit_s:
            raise Problem(503, f"stuck in one batch for {stuck_for_s:.0f} s", headers={"retry-after": "1"})

    async def text_of_metrics(self, request: Request) -> Response:
        return Response(self.metrics.text(), headers={"content-type": CONTENT_TYPE})

    def answered(self, record: Record) -> None:
        latency_s = time.monotonic() - record.began
        rows = record.rows if record.is_complete and record.status == 200 else 0
        self.metrics.answered(record.model, record.verb, record.status, rows, latency_s, record.wait_s)


def _asked(
    questions: Questions, verb: str, kind: str, body: bytes, query: dict[str, str], format_: str, take: Take
) -> tuple[Call, Described]:
    """kind: the media type of the body. take: room for what it becomes."""
    options, array = _options_of(kind, body, query)
    if verb != "sample":
        try:
            return questions.data(verb, options, kind, array, format_, take)
        except MemoryError:
            raise Problem(413, "there is no memory for what is in the body", "body") from None
    if array is not None:
        raise Problem(415, f"content-type {shortened(kind)}", "content-type", listing(taken(verb)))
    return questions.sample(options, format_)


def _options_of(kind: str, body: bytes, query: dict[str, str]) -> tuple[dict[str, Any], bytes | None]:
    """The options, and the body where that holds an array and not these."""
    if kind == MEDIA_TYPES["json"] or (not body and not kind):
        if query:
            name = next(iter(query))
            raise Problem(422, f"the parameter {shortened(name)} in the query", named(name), "format; the others "
                          "stand in the body")  # fmt: skip
        return (json_object(body) if body else {}), None
    return dict(query), body


def _headers(hosted: HostedModel, call: Any, described: Described, format_: str) -> Headers:
    headers = [
        (b"content-type", MEDIA_TYPES[format_].encode()),
        (b"x-gendist-model-digest", hosted.digest.encode()),
        (b"x-gendist-num-samples", b"%d" % described.num_rows),
    ]
    if isinstance(call, SampleCall):
        headers += [(b"x-gendist-seed", b"%d" % call.seed), (b"x-gendist-offset", b"%d" % call.offset)]
    return headers


def _json(content: Any) -> Response:
    return Response(json_bytes(content), media_type=MEDIA_TYPES["json"])


async def _told(request: Request, error: Exception) -> Response:
    """What the router refuses, in the shape of all errors."""
    assert isinstance(error, HTTPException)
    method, path = request.method, request.url.path
    headers = dict(error.headers or {})
    if error.status_code == 405:
        problem = Problem(405, f"{method} of {shortened(path)}", "method", headers.get("Allow"), headers)
    else:
        problem = Problem(error.status_code, f"{shortened(path)}: {error.detail}", "path" if error.status_code == 404 else None)
    return Response(problem.body(), problem.status, problem.headers, MEDIA_TYPES["json"])


def _page_routes() -> list[Route]:
    """Of the files of the page, which are read once; index.html is what stands at /."""
    if not PAGE.is_dir():
        return []
    routes = []
    for file in sorted(PAGE.iterdir()):
        kind = mimetypes.guess_type(file.name)[0]
        if file.is_file() and kind is not None:
            response = Response(file.read_bytes(), headers={"cache-control": "no-cache", **PAGE_HEADERS}, media_type=kind)
            routes.append(_page_route(f"/page/{file.name}", response))
            if file.name == "index.html":
                routes.append(_page_route("/", response))
    return routes


def _page_route(path: str, response: Response) -> Route:
    async def page(request: Request) -> Response:
        return response

    return Route(path, page)
