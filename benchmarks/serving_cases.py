"""What the benchmark of serving serves: a mixture, a hidden Markov model and a decoder; and how fast they are alone."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROWS_A_REQUEST = 16
ROWS_A_CALL = (16, 64, 256)  # of a model alone; the best counts


def save_cases(folder: Path, decoder_channels: Sequence[int]) -> dict[str, Path]:
    """By name, artifacts: what a server does is the same whether a model is a good one."""
    import gendist

    rng = np.random.default_rng(0)
    x = rng.normal(size=(2_000, 10)) + 4.0 * rng.integers(0, 8, 2_000)[:, None]
    fit = {"max_iterations": 3}
    gendist.fit({"name": "gmm", "family": "gmm", "model": {"num_components": 8}, "fit": fit}, data=x, run_dir=folder / "gmm")
    spec = {"name": "hmm", "family": "hmm", "model": {"num_states": 4}, "fit": fit}
    gendist.fit(spec, data=list(x[:, :4].reshape(-1, 20, 4)), run_dir=folder / "hmm")
    save_decoder(folder / "vae", decoder_channels)
    return {name: folder / name for name in ("gmm", "hmm", "vae")}


def save_decoder(folder: Path, channels: Sequence[int]) -> None:
    """Of images of 28 x 28, as configs/vae_mnist_convolutional.yaml has it but for the number of channels."""
    from gendist.artifact import Artifact, save
    from gendist.config import family_class
    from gendist.data import Schema

    decoder = {"channels": list(channels), "activation": "silu"}
    config = {"latent_dim": 40, "encoder": {**decoder, "channels": list(channels)[::-1]}, "decoder": decoder}
    family: Any = family_class("vae")
    model = family.create(family.Config.model_validate(config), (28, 28), (), seed=0)
    names = tuple(f"image_{i}" for i in range(28 * 28))
    save(Artifact("vae", model, Schema(columns=("image",), feature_names=names, image_shape=(28, 28))), folder)


def rows_per_s(path: Path, num_processes: int, seconds: float) -> float:
    """What the model alone draws in so many processes of one thread at once, together, in calls of the best size."""
    context = multiprocessing.get_context("spawn")
    best = 0.0
    with context.Pool(num_processes) as pool:
        for rows in ROWS_A_CALL:
            barrier_s = time.time() + 8.0 * (rows == ROWS_A_CALL[0]) + 0.5  # all begin at once, once torch is imported
            best = max(best, sum(pool.starmap(_rate, [(path, rows, barrier_s, seconds)] * num_processes, chunksize=1)))
    return best


def seconds_a_call(path: Path, num_calls: int = 50) -> float:
    """The median time of a call for the rows of one request, alone, in a process of one thread."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return float(np.median(pool.apply(_times, (path, num_calls))))


def _rate(path: Path, rows: int, begin: float, seconds: float) -> float:
    sample = _sample(path)
    sample(rows, seed=0)
    time.sleep(max(begin - time.time(), 0.0))
    began, seed = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        seed += 1
        sample(rows, seed=seed)
    return rows * seed / (time.perf_counter() - began)


def _times(path: Path, num_calls: int) -> list[float]:
    sample, times = _sample(path), []
    for seed in range(num_calls):
        began = time.perf_counter()
        sample(ROWS_A_REQUEST, seed=seed)
        times.append(time.perf_counter() - began)
    return times


def _sample(path: Path) -> Any:
    import torch

    import gendist

    torch.set_num_threads(1)
    return gendist.load(path).sample
