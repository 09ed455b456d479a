"""What a server holds and allows: the `args` of a Serve config file, and what the options of `gendist serve` come to."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from gendist.config import validated
from gendist.protocols import UserError
from gendist.serve.limits import Limits
from gendist.storage import absolute

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # that stands in a URL as it is
DIGEST = re.compile(r"[0-9a-f]{64}")
TOKEN = re.compile(r"[!-~]+")  # that a header holds as it is
BYTE_ORDER_MARK = "\ufeff"  # some editors begin a file with it
ORIGIN = re.compile(r"https?://([a-z0-9._-]+|\[[0-9a-f:.]+\])(:[0-9]+)?|\*")


class Autoscaling(BaseModel):
    """Between so many replicas, by the requests that each has in hand."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    min_replicas: int = Field(1, ge=1)
    max_replicas: int = Field(ge=1)
    target_ongoing_requests: float = Field(16.0, gt=0.0)

    @model_validator(mode="after")
    def _min_is_not_above_max(self) -> Autoscaling:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas {self.min_replicas} is above max_replicas {self.max_replicas}")
        return self


class ServerConfig(BaseModel):
    """models         by name, run directories or artifacts, readable on every node; or a list of paths, called by their folders
    digests           of models, by name, as GET /models has them: whoever finds another one at its path does not serve it
    limits            of each replica
    num_replicas      each holds all models and computes in one thread
    autoscaling       in place of num_replicas
    gpus_per_replica  may be a fraction, such as 0.25, where several share one; 0: a CPU each
    token_file        bearer tokens, one a line: whoever calls must have one of them
    token_variable    or the name of an environment variable of the replicas that holds them, in place of a file
    insecure          whether anybody who reaches the replicas may call them, without a token
    cors_origins      of pages that may call from a browser, such as https://example.org; none by default
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    models: dict[str, str] = Field(min_length=1)
    digests: dict[str, str] = {}
    limits: Limits = Limits()
    num_replicas: int = Field(1, ge=1)
    autoscaling: Autoscaling | None = None
    gpus_per_replica: float = Field(0.0, ge=0.0)
    token_file: str | None = None
    token_variable: str | None = None
    insecure: bool = False
    cors_origins: tuple[str, ...] = ()

    @field_validator("models", mode="before")
    @classmethod
    def _named(cls, models: Any) -> Any:
        if isinstance(models, list | tuple) and all(isinstance(each, str) for each in models):
            return named_artifacts(models)
        return models

    @model_validator(mode="after")
    def _said_once(self) -> ServerConfig:
        if self.autoscaling is not None and "num_replicas" in self.model_fields_set:
            raise ValueError("num_replicas and autoscaling exclude each other; leave one out")
        if self.token_file is not None and self.token_variable is not None:
            raise ValueError("token_file and token_variable exclude each other; leave one out")
        if self.gpus_per_replica > 1 and self.gpus_per_replica % 1:
            raise ValueError(f"gpus_per_replica {self.gpus_per_replica}; a fraction of one, or whole ones")
        for name in self.models:
            if not NAME.fullmatch(name):
                raise ValueError(f"models: the name '{name}'; letters, digits and ._- are allowed")
        for name, digest in self.digests.items():
            if name not in self.models:
                raise ValueError(f"digests: there is no model '{name}'")
            if not DIGEST.fullmatch(digest):
                raise ValueError(f"digests: '{digest}' of '{name}'; 64 digits of 0-9 and a-f")
        for origin in self.cors_origins:
            if not ORIGIN.fullmatch(origin):
                raise ValueError(
                    f"cors_origins: '{origin}'; give it as browsers do, such as https://example.org or http://localhost:3000, "
                    "in small letters and without a path or a slash at the end, or * for all"
                )
        return self

    def tokens(self) -> frozenset[str]:
        """The tokens of the file or the variable; UserError where that is missing or empty."""
        if self.token_file is not None:
            where, text = self.token_file, _text_of(Path(self.token_file))
        elif self.token_variable is not None:
            where, text = f"environment variable {self.token_variable}", os.environ.get(self.token_variable, "")
        else:
            return frozenset()
        lines = {number: line.strip() for number, line in enumerate(text.removeprefix(BYTE_ORDER_MARK).split("\n"), 1)}
        tokens = {number: line for number, line in lines.items() if line}
        if not tokens:
            raise UserError(f"{where}: no token there; write one a line, such as what `openssl rand -hex 32` makes")
        for number, token in tokens.items():  # which no message repeats
            if not TOKEN.fullmatch(token):
                raise UserError(
                    f"{where}: line {number} is no token; write one a line and nothing else, of ASCII characters without spaces"
                )
            if len(token) < 16:
                raise UserError(f"{where}: a token of {len(token)} characters can be guessed; make it 16 or longer")
        return frozenset(tokens.values())


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not text in UTF-8; write a token a line") from error


def server_config(content: Any) -> ServerConfig:
    """UserError, in one line, where the content is none."""
    return validated(ServerConfig, content, "serve")


def named_artifacts(arguments: Iterable[str]) -> dict[str, str]:
    """Of PATH or NAME=PATH each, by name; a path without a name is called as its folder, or that of the run that it is in.
    UserError where two are called alike."""
    models: dict[str, str] = {}
    for argument in arguments:
        name, equals, path = argument.partition("=")
        if not equals or not NAME.fullmatch(name):
            path = argument
            folder = Path(absolute(path))
            name = folder.parent.name if folder.name == "artifact" else folder.name
        if name in models:
            raise UserError(f"two models are called '{name}' ({models[name]} and {path}); name one of them: NAME={path}")
        models[name] = path
    return models
