"""The HTTP application: the same routes for every family, over a batcher. Plain ASGI; it runs under Ray Serve or uvicorn."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field

from gendist.serve.batcher import Batcher
from gendist.serve.hosted_model import HostedModel, SampleCall, compute
from gendist.serve.limits import Limits


class SampleBody(BaseModel):
    model_config = ConfigDict(extra="forbid")

    num_samples: int = Field(1, ge=1)
    seed: int | None = Field(None, ge=0, le=2**64 - 1)
    offset: int = Field(0, ge=0)
    given: str | int | float | bool | None = None
    length: int | None = Field(None, ge=1)


def http_app(models: Mapping[str, HostedModel], limits: Limits | None = None) -> FastAPI:
    limits = limits or Limits()
    batcher = Batcher(compute, limits)
    app = FastAPI(title="gendist")

    @app.post("/models/{name}/sample")
    async def sample(name: str, body: SampleBody) -> dict[str, Any]:
        hosted = models[name]
        seed = secrets.randbits(53) if body.seed is None else body.seed
        call = SampleCall(body.num_samples, seed, body.offset, body.given, body.length)
        answer = await batcher.result(hosted.work_of(call))
        return {"seed": seed, "offset": body.offset, **{name: values.tolist() for name, values in answer.items()}}

    return app
