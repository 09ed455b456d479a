"""Engines send what they say, as seen where torch's collectives are called."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import worlds
from toys import TensorRows

from gendist.config import family_class, load_spec
from gendist.protocols import Block
from gendist.train.loop import train
from gendist.train.processes import Processes
from gendist.training_job import engine_class, make_engine

COLLECTIVES = {"all_reduce": 2, "all_gather_into_tensor": 1, "reduce_scatter_tensor": 1}  # rings of each
ENGINES: dict[str, Any] = {
    "ddp": {"kind": "ddp"},
    **{f"zero {stage}": {"kind": "deepspeed", "zero_stage": stage} for stage in (1, 2, 3)},
}


SMALL = {"hidden_sizes": [5]}


_counts: list[float] = []  # of the calls of this process


def _count_from_now_on(world_size: int) -> None:
    """Before DeepSpeed is imported, which keeps some of torch's functions."""
    _counts.clear()
    for name, rings in COLLECTIVES.items():
        plain = getattr(dist, name)
        if hasattr(plain, "rings"):
            continue

        def counted(*args: Any, plain: Any = plain, rings: int = rings, **kwargs: Any) -> Any:
            largest = max(t.numel() * t.element_size() for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor))
            _counts.append(rings * largest * (world_size - 1) / world_size)
            return plain(*args, **kwargs)

        counted.rings = rings  # type: ignore[attr-defined]
        setattr(dist, name, counted)


def sent(processes: Processes, engine: str) -> tuple[float, float]:
    """Bytes that a step sends by the ring's formula, as seen where torch is called; and as the engine says."""
    _count_from_now_on(processes.world_size)
    content = {
        "name": "x",
        "family": "vae",
        "model": {"latent_dim": 3, "encoder": SMALL, "decoder": SMALL, "likelihood": "bernoulli"},
        "fit": {"num_steps": 4, "global_batch_size": 8, "micro_batch_size": 2, "engine": ENGINES[engine]},
    }
    spec = load_spec(content)
    model = family_class(spec.family).create(spec.model, (6,), (), 0)
    sizes = [parameter.numel() for parameter in model.networks()["autoencoder"].parameters()]
    made = make_engine(processes, spec.fit)
    made.prepare(model.networks())
    marks: list[int] = []

    class Rows(TensorRows):
        def take(self, indices: torch.Tensor) -> Block:
            marks.append(len(_counts))
            return super().take(indices)

    for _ in train(model, made, Rows(torch.rand(8, 6)), spec.fit, 0):
        pass
    said = engine_class(spec.fit).traffic(spec.fit, "autoencoder", sizes, processes.world_size, 2)
    return sum(_counts[marks[4] : marks[6]]), said.sent_bytes


@pytest.fixture(scope="module")
def traffic() -> Any:
    return worlds.run([worlds.Job(name, 2, sent, (name,)) for name in ENGINES], timeout_s=200.0)


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_sends_what_it_says(traffic, engine):
    for counted, said in traffic[engine]:
        assert counted == pytest.approx(said, rel=0.05)
