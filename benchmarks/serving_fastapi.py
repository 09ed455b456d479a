"""How one serves a decoder without gendist: FastAPI with a batch by hand.

    python benchmarks/serving_fastapi.py ARTIFACT PORT NUM_PROCESSES

It answers POST /sample {"num_samples", "seed"} with .npy, and joins what waits in one call of the plain network: noise by
torch's own generator, no fixed shapes. (So, unlike gendist's, a row may depend in its last bits on what it came beside.)
"""

from __future__ import annotations

import asyncio
import io
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import uvicorn
from fastapi import FastAPI, Response
from pydantic import BaseModel

MOST_ROWS = 256
WAIT_S = 0.002


class Decoder:
    def __init__(self, path: str) -> None:
        import torch

        import gendist

        torch.set_num_threads(1)
        model: Any = gendist.load(path)
        self.autoencoder = model.autoencoder.eval()
        self.latent_dim = model.config.latent_dim

    def samples(self, asked: Sequence[tuple[int, int]]) -> list[np.ndarray]:
        """(num_samples, D) of each (num_samples, seed)."""
        import torch

        with torch.inference_mode():
            z = [torch.randn(n, self.latent_dim, generator=torch.Generator().manual_seed(seed)) for n, seed in asked]
            x = self.autoencoder.likelihood.mean(self.autoencoder.decoded(torch.cat(z), None))
        return [each.numpy() for each in x.split([n for n, _ in asked])]


class Body(BaseModel):
    num_samples: int
    seed: int


def npy(x: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, x)
    return file.getvalue()


class Batch:
    """By hand: the first of a batch waits for others, and one thread computes."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.queue: asyncio.Queue[tuple[int, int, asyncio.Future[np.ndarray]]] = asyncio.Queue()
        self.thread = ThreadPoolExecutor(1)

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            batch = [await self.queue.get()]
            until = loop.time() + WAIT_S
            while sum(n for n, _, _ in batch) < MOST_ROWS:
                try:
                    batch.append(await asyncio.wait_for(self.queue.get(), until - loop.time()))
                except TimeoutError:
                    break
            results = await loop.run_in_executor(self.thread, self.decoder.samples, [(n, seed) for n, seed, _ in batch])
            for (_, _, future), x in zip(batch, results, strict=True):
                future.set_result(x)

    async def samples(self, num_samples: int, seed: int) -> np.ndarray:
        future: asyncio.Future[np.ndarray] = asyncio.get_running_loop().create_future()
        self.queue.put_nowait((num_samples, seed, future))
        return await future


def fastapi_app() -> FastAPI:
    batch = Batch(Decoder(os.environ["PEER_ARTIFACT"]))

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> Any:
        task = asyncio.create_task(batch.run())
        yield
        task.cancel()

    app = FastAPI(lifespan=lifespan)

    @app.post("/sample", response_class=Response)
    async def sample(body: Body) -> Response:
        return Response(npy(await batch.samples(body.num_samples, body.seed)), media_type="application/octet-stream")

    return app


def main() -> None:
    path, port, num_processes = sys.argv[1:]
    os.environ["PEER_ARTIFACT"] = path
    uvicorn.run(
        "serving_fastapi:fastapi_app",
        factory=True,
        port=int(port),
        workers=int(num_processes),
        log_level="error",
        access_log=False,
    )


if __name__ == "__main__":
    main()
