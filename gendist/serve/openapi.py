"""What the application takes and answers, as an OpenAPI document: every route, format and error, with examples."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import gendist
from gendist.noise import MAX_SEED
from gendist.protocols import VERBS
from gendist.serve.checks import MAX_IMPORTANCE_SAMPLES, MAX_ROW
from gendist.serve.limits import Limits
from gendist.serve.media_types import MEDIA_TYPES
from gendist.serve.problems import ProblemBody
from gendist.serve.questions import OF_ROWS, taken

Json = dict[str, Any]

SUMMARIES = {
    "sample": "Draw rows, or sequences, from the model",
    "log_prob": "The log density of each row, or sequence, in nats",
    "elbo": "A lower bound of the log density of each row, in nats",
    "log_prob_bound": "A tighter lower bound of the log density, of several latents a row, in nats",
    "encode": "The representation of each row: of a mixture p(component | x), of an autoencoder the mean of its latents",
    "decode": "The mean of x given latents, or given the number of a component",
    "classify": "log p(label | x) for each of the labels",
    "impute": "The rows with what is missing filled in",
    "reconstruct": "The rows as the model makes them of their latents",
}
PROBLEMS = {
    400: ("The body or the query string cannot be read", "the body is no JSON: EOF while parsing", "body", "an object of JSON"),
    401: ("A token is needed", "a token is needed", "authorization", "Bearer TOKEN"),
    403: ("The server answers its own machine alone", "this server answers its own machine alone", "host", "localhost"),
    404: ("There is no such model, verb or figure", "the model 'digit'", "name", "digits, faces"),
    405: ("The model does not offer the verb", "classify: it is fitted without labels", "verb", "sample, encode, decode"),
    406: ("There is no such format of the answer", "format 'xml'", "format", "json, npy, npz, arrow, ndjson, png"),
    408: ("The body did not come in time", "the body did not come within 30 s", None, None),
    413: ("The body, or what is in it, is too large", "the body is too large", "body", "up to 67108864 bytes"),
    415: ("The body is of a type that is not taken", "content-type 'text/plain'", "content-type", "application/json"),
    422: ("A value is not allowed", "num_samples 0", "num_samples", "1 to 1000000"),
    429: ("The queue is full; Retry-After says when to come again", "the queue is full; try again in 1.0 s", None, None),
    500: ("The server failed", "the server failed; its log says why", None, None),
    503: ("Not ready, or shutting down; Retry-After says when to come again", "the server is shutting down", None, None),
    504: ("It took longer than the time limit", "it was not computed within 30 s", None, "a smaller request"),
}
OF_ANY = (401, 403, 500)
OF_VERBS = (400, 401, 403, 404, 405, 406, 408, 413, 415, 422, 429, 500, 503, 504)
OF_FIGURES = (400, 401, 403, 404, 422, 429, 500, 503, 504)
ROWS = [[5.1, 3.5], [4.9, 3.0]]


def document(limits: Limits, options: Mapping[str, Collection[str]], has_tokens: bool) -> Json:
    """options: that the models here have, of each verb of rows"""
    paths: Json = {f"/models/{{name}}/{verb}": {"post": _verb(verb, limits, options.get(verb, ()))} for verb in VERBS}
    name = _parameter("name", "path", {"type": "string"}, "Of a model, as GET /models lists them", "digits")
    figure = _parameter("figure", "path", {"type": "string"}, "As GET /models/{name} lists them", "interpolation")
    seed = _parameter("seed", "query", _whole(0, MAX_SEED), "Of what is drawn in it", 0)
    model = {"name": "digits", "num_features": 64, "labels": [], "verbs": {"sample": {"options": ["seed"]}},
             "not_offered": {"log_prob": "the integral over z has no closed form"}}  # fmt: skip
    paths |= {
        "/models": _get("listModels", "The models that are here", _object({"models": [model]})),
        "/models/{name}": _get(
            "describeModel", "What a model is, takes and offers", _object({**model, "figures": ["interpolation"]}), [name],
            (404, 429, 503, 504),
        ),
        "/models/{name}/figures/{figure}": _get(
            "drawFigure", "What else a family would have people look at", {MEDIA_TYPES["png"]: _binary()}, [name, figure, seed],
            OF_FIGURES,
        ),
        "/healthz": _get("isAlive", "Whether the server works", _object({"status": "alive"}), errors=(503,), is_open=True),
        "/readyz": _get("isReady", "Whether it can be asked", _object({"status": "ready", "models": []}), errors=(503,)),
        "/metrics": _get("metrics", "What it counts, for Prometheus", {"text/plain": {"schema": {"type": "string"}}}),
    }  # fmt: skip
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "gendist",
            "version": gendist.__version__,
            "description": "Fitted generative models. The same seed gives the same bytes, whatever else the server does.",
        },
        "paths": paths,
        "components": {
            "schemas": {"Problem": ProblemBody.model_json_schema()},
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"token": []}] if has_tokens else [],
    }


def _verb(verb: str, limits: Limits, has: Collection[str]) -> Json:
    name = _parameter("name", "path", {"type": "string"}, "Of a model, as GET /models lists them", "digits")
    format_ = _parameter(
        "format", "query", {"type": "string", "enum": [*MEDIA_TYPES]}, "Of the answer; else Accept says", "json"
    )
    of_verb = _options_of_sample(limits) if verb == "sample" else _options_of_data(limits, has)
    in_query = [] if verb == "sample" else [
        _parameter(option, "query", schema, f"Beside a body of .npy or Arrow. {schema['description']}", None)
        for option, schema in of_verb.items()
    ]  # fmt: skip
    rows = {} if verb == "sample" else {"z" if verb == "decode" else "x": _rows(verb)}
    body = {
        "type": "object",
        "properties": {**rows, **of_verb},
        "required": list(rows),
        "additionalProperties": False,
    }
    example: Json = {"num_samples": 2, "seed": 7} if verb == "sample" else {next(iter(rows)): ROWS}
    contents: Json = {MEDIA_TYPES["json"]: {"schema": body, "example": example}}
    for kind in taken(verb)[1:]:
        contents[kind] = _binary("The options stand in the query string, under the names that they have in JSON")
    answered = {MEDIA_TYPES["json"]: {"schema": _answer(verb), "example": _example(verb)}}
    answered |= {kind: _binary() for key, kind in MEDIA_TYPES.items() if key != "json"}
    facts = ("Model-Digest", "Num-Samples", *(("Seed", "Offset") if verb == "sample" else ()))
    told = {header: {"schema": {"type": "string"}} for header in ("X-Request-ID", *(f"X-Gendist-{each}" for each in facts))}
    return {
        "operationId": verb,
        "summary": SUMMARIES[verb],
        "parameters": [name, format_, *in_query],
        "requestBody": {"required": verb != "sample", "content": contents},
        "responses": {"200": {"description": "The answer", "headers": told, "content": answered}, **_problems(OF_VERBS)},
    }


def _options_of_sample(limits: Limits) -> Json:
    label = [{"type": "string"}, {"type": "number"}, {"type": "boolean"}, {"type": "null"}]
    return {
        "num_samples": _whole(1, limits.max_rows, "Rows, or sequences"),
        "seed": {
            "anyOf": [_whole(0, MAX_SEED), {"type": "string", "pattern": _digits_up_to(MAX_SEED)}, {"type": "null"}],
            "description": "The same seed, the same rows. Where left out, the server draws one and tells it",
        },
        "offset": _whole(0, MAX_ROW, "Of the first row in the endless sample of the seed"),
        "given": {"anyOf": label, "description": "A label, or the number of a component"},
        "length": {"anyOf": [_whole(1, limits.max_length), {"type": "null"}], "description": "Steps of each sequence"},
    }


def _options_of_data(limits: Limits, has: Collection[str]) -> Json:
    """has: the names of these"""
    options = _options_of_sample(limits)
    given = options["given"]
    of_rows = {"type": "array", "items": {"anyOf": given["anyOf"][:-1]}}
    options["given"] = {"anyOf": [*given["anyOf"], of_rows], "description": "The label of all rows, or a list with one a row"}
    options["seed"]["description"] = "Of what is drawn"
    options["offset"]["description"] = "Of the first row among those that belong to the seed"
    options["num_samples"] = _whole(1, MAX_IMPORTANCE_SAMPLES, "Latents a row")
    return {name: schema for name, schema in options.items() if name in has}


def _digits_up_to(most: int) -> str:
    """A pattern of the numbers from 0 to this one."""
    digits = str(most)
    smaller = [
        f"{digits[:i]}[0-{int(digit) - 1}][0-9]{{{len(digits) - i - 1}}}" for i, digit in enumerate(digits) if digit > "0"
    ]
    return f"^([0-9]{{1,{len(digits) - 1}}}|{'|'.join(smaller)}|{digits})$"


def _rows(verb: str) -> Json:
    entry: Json = {"type": ["number", "null", "string"]}
    row: Json = {"anyOf": [{"type": "array", "items": entry}, {"type": "object", "additionalProperties": entry}]}
    if verb == "decode":
        number: Json = {"type": "number"}
        return {"type": "array", "minItems": 1, "items": {"anyOf": [number, {"type": "array", "items": number}]}}
    sequence = {"type": "array", "items": row}
    return {"type": "array", "minItems": 1, "items": {"anyOf": [*row["anyOf"], sequence]}}


def _answer(verb: str) -> Json:
    name = "x" if verb == "sample" else verb
    item: Json = {"type": ["number", "null"]} if verb in OF_ROWS else {"type": "array"}
    facts: Json = {"model": {"type": "string"}, "digest": {"type": "string"}}
    if verb == "sample":
        whole = {"type": "integer", "minimum": 0}
        facts |= {"seed": whole, "offset": whole, "num_samples": whole}
        facts |= {
            "columns": {"type": "array", "items": {"type": "string"}},
            "label": {"type": "array"},
            "state": {"type": "array"},
        }
    required = [key for key in facts if key not in ("label", "state")]
    properties = {**facts, name: {"type": "array", "items": item}}
    return {"type": "object", "properties": properties, "required": [*required, name]}


def _example(verb: str) -> Json:
    facts: Json = {"model": "digits", "digest": "0f3c..."}
    if verb == "sample":
        return {**facts, "seed": 7, "offset": 0, "num_samples": 2, "columns": ["a", "b"], "x": ROWS}
    if verb in OF_ROWS:
        return {**facts, verb: [-1.25, -3.5]}
    return {**facts, verb: ROWS, **({"labels": ["left", "right"]} if verb == "classify" else {})}


def _get(
    name: str,
    summary: str,
    content: Json,
    parameters: Sequence[Json] = (),
    errors: Sequence[int] = (),
    is_open: bool = False,
) -> Json:
    """is_open: to whoever has no token, too"""
    statuses = (*(status for status in OF_ANY if status != 401 or not is_open), *errors)
    responses = {"200": {"description": "The answer", "content": content}, **_problems(statuses)}
    get = {"operationId": name, "summary": summary, "parameters": list(parameters), "responses": responses}
    return {"get": {**get, **({"security": []} if is_open else {})}}


def _problems(statuses: Sequence[int]) -> Json:
    responses: Json = {}
    for status in sorted(set(statuses)):
        description, error, field, allowed = PROBLEMS[status]
        schema = {"$ref": "#/components/schemas/Problem"}
        example = {"error": error, "field": field, "allowed": allowed}
        response: Json = {"description": description, "content": {"application/json": {"schema": schema, "example": example}}}
        if status in (429, 503):
            response["headers"] = {"Retry-After": {"schema": {"type": "string"}, "description": "Seconds"}}
        responses[str(status)] = response
    return responses


def _object(example: Json) -> Json:
    return {MEDIA_TYPES["json"]: {"schema": {"type": "object", "required": list(example)}, "example": example}}


def _binary(description: str = "") -> Json:
    return {"schema": {"type": "string", "format": "binary", **({"description": description} if description else {})}}


def _parameter(name: str, where: str, schema: Json, description: str, example: Any) -> Json:
    return {
        "name": name,
        "in": where,
        "required": where == "path",
        "schema": schema,
        "description": description,
        **({} if example is None else {"example": example}),
    }


def _whole(least: int, most: int, description: str = "") -> Json:
    return {"type": "integer", "minimum": least, "maximum": most, **({"description": description} if description else {})}
