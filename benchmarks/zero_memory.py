"""Memory of parameters, gradients and moments on each process, by ZeRO stage, against the formula.

python benchmarks/zero_memory.py [connected | residual] [NUM_PROCESSES ...] ['ZeRO 3' ...]

A network under Adam in float32, on the CPU: 20 million parameters of fully connected layers, or `configs/vae_1b.yaml` with an
eighth of its channels, 16 million, checkpointing, moving average and bfloat16 included. Counted are the storages of all tensors
alive in a process after a backward pass, with the buckets that gradients travel in, but hardly any activation. The formula
(`gendist/train/memory.py`), in bytes a parameter with N processes, leaves the buckets out.
"""

from __future__ import annotations

import gc
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gendist.config import family_class, load_spec
from gendist.protocols import Block
from gendist.train.batches import noise
from gendist.train.config import DeepConfig
from gendist.train.ddp_engine import DdpEngine
from gendist.train.deepspeed_engine import DeepSpeedEngine
from gendist.train.memory import bytes_per_parameter
from gendist.train.processes import Processes

WIDTH, DEPTH = 1000, 20
SHARE, SIDE = 8, 64  # of the channels of vae_1b; pixels, which do not matter here
CONFIG = Path(__file__).parents[1] / "configs" / "vae_1b.yaml"
ENGINES = {
    "ddp": {"kind": "ddp"},
    **{f"ZeRO {stage}": {"kind": "deepspeed", "zero_stage": stage} for stage in range(4)},
}


def held_bytes() -> int:
    """Of the storages of all tensors alive."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    tensors += [tensor.grad for tensor in tensors if tensor.is_leaf and tensor.grad is not None]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def connected() -> tuple[nn.Module, Callable[[], Tensor]]:
    """A network, and a loss of one sample."""
    network = nn.Sequential(*(layer for _ in range(DEPTH) for layer in (nn.Linear(WIDTH, WIDTH), nn.Tanh())))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.fill_(1e-3)
    return network, lambda: network(torch.ones(1, WIDTH)).sum()


def residual() -> tuple[nn.Module, Callable[[], Tensor]]:
    large = load_spec(CONFIG).model
    channels = {part: [each // SHARE for each in getattr(large, part).channels] for part in ("encoder", "decoder")}
    spec = load_spec(CONFIG, [f"model.{part}.channels={numbers}" for part, numbers in channels.items()])
    model = family_class(spec.family).create(spec.model, (SIDE, SIDE, 3), (), 0)
    (network,) = model.networks().values()
    batch = Block(torch.full((1, SIDE * SIDE * 3), 0.5), torch.arange(1))

    def loss() -> Tensor:
        (phase,) = model.phases(0)
        drawn = noise(0, "x", model.draws(phase), 0, 1)
        return sum(model.loss(phase, batch, drawn, 0).terms.values(), torch.zeros(())).sum()

    return network, loss


NETWORKS = {"connected": connected, "residual": residual}


def config_of(shape: str, engine: str, num_processes: int) -> DeepConfig:
    more = {"ema": 0.05, "precision": "bfloat16"} if shape == "residual" else {}
    return DeepConfig.model_validate({"global_batch_size": num_processes, "engine": ENGINES[engine], **more})


def measure(rank: int, num_processes: int, shape: str, kind: str, store: str, results: multiprocessing.Queue) -> None:
    torch.set_num_threads(1)
    if num_processes > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=num_processes)
    config = config_of(shape, kind, num_processes)
    engine = (DdpEngine if kind == "ddp" else DeepSpeedEngine)(Processes(rank, num_processes, torch.device("cpu")), config)
    network, loss = NETWORKS[shape]()
    num_parameters = sum(p.numel() for p in network.parameters())
    engine.prepare({"network": network})
    held = 0
    for _ in range(2):  # torch's own optimizer makes its moments with the first step
        engine.begin_phase("network")
        engine.begin_micro_batch("network", is_last=True)
        with engine.precision():
            value = loss()
        engine.backward("network", value)
        held = held_bytes()
        engine.step("network", 1e-3)
    if rank == 0:
        results.put(held / num_parameters)


def main() -> None:
    shape = next((each for each in sys.argv[1:] if each in NETWORKS), "connected")
    context = multiprocessing.get_context("spawn")
    print("| processes | engine | bytes a parameter | formula | s |\n|---|---|---|---|---|")
    for num_processes in [int(number) for number in sys.argv[1:] if number.isdigit()] or [1, 2]:
        for kind in [each for each in ENGINES if each in sys.argv] or ENGINES:
            began = time.monotonic()
            with tempfile.TemporaryDirectory() as folder:
                results = context.Queue()
                children = [
                    context.Process(target=measure, args=(rank, num_processes, shape, kind, f"{folder}/store", results))
                    for rank in range(num_processes)
                ]
                for child in children:
                    child.start()
                value = results.get(timeout=220.0)
                for child in children:
                    child.join(60.0)
            formula = bytes_per_parameter(config_of(shape, kind, num_processes), "network", num_processes)
            taken_s = time.monotonic() - began
            print(f"| {num_processes} | {kind} | {value:.1f} | {formula:.1f} | {taken_s:.0f} |", flush=True)


if __name__ == "__main__":
    main()
