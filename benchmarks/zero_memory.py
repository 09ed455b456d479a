"""Memory of parameters, gradients and moments on each process, by ZeRO stage, against the formula.

python benchmarks/zero_memory.py [NUM_PROCESSES ...]

One network of 20 million parameters under Adam in float32, on the CPU. Counted are the storages of all tensors alive in a
process after a backward pass, with the buckets that gradients travel in, but hardly any activation. The formula, in bytes a
parameter with N processes, leaves the buckets out. The optimizer steps a flat copy of its share of the parameters. At stage
1 the gradients are whole until the end of the backward pass, which adds 4 - 4 / N to the peak within it.

    ddp, 0   4 parameters + 4 gradients + 8 moments
    1, 2     4 parameters + (4 copy + 4 gradients + 8 moments) / N
    3        (4 parameters + 4 copy + 4 gradients + 8 moments) / N
"""

from __future__ import annotations

import gc
import multiprocessing
import sys
import tempfile

import torch
import torch.distributed as dist
from torch import nn

from gendist.train.config import DeepConfig
from gendist.train.ddp_engine import DdpEngine
from gendist.train.deepspeed_engine import DeepSpeedEngine
from gendist.train.processes import Processes

WIDTH, DEPTH = 1000, 20
FORMULA = {
    "ddp": lambda n: 16.0,
    0: lambda n: 16.0,
    1: lambda n: 4.0 + 16.0 / n,
    2: lambda n: 4.0 + 16.0 / n,
    3: lambda n: 20.0 / n,
}


def held_bytes() -> int:
    """Of the storages of all tensors alive."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    tensors += [tensor.grad for tensor in tensors if tensor.is_leaf and tensor.grad is not None]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def measure(rank: int, num_processes: int, kind: str | int, store: str, results: multiprocessing.Queue) -> None:
    torch.set_num_threads(1)
    if num_processes > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=num_processes)
    engine_config = {"kind": "ddp"} if kind == "ddp" else {"kind": "deepspeed", "zero_stage": kind}
    config = DeepConfig.model_validate({"global_batch_size": num_processes, "engine": engine_config})
    engine = (DdpEngine if kind == "ddp" else DeepSpeedEngine)(Processes(rank, num_processes, torch.device("cpu")), config)
    network = nn.Sequential(*(layer for _ in range(DEPTH) for layer in (nn.Linear(WIDTH, WIDTH), nn.Tanh())))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.fill_(1e-3)
    num_parameters = sum(p.numel() for p in network.parameters())
    engine.prepare({"network": network})
    held = 0
    for _ in range(2):  # torch's own optimizer makes its moments with the first step
        engine.begin_phase("network")
        engine.begin_micro_batch("network", is_last=True)
        engine.backward("network", network(torch.ones(1, WIDTH)).sum())
        held = held_bytes()
        engine.step("network", 1e-3)
    if rank == 0:
        results.put(held / num_parameters)


def main() -> None:
    context = multiprocessing.get_context("spawn")
    print("| processes | engine | bytes a parameter | formula |\n|---|---|---|---|")
    for num_processes in [int(number) for number in sys.argv[1:]] or [1, 2]:
        for kind, formula in FORMULA.items():
            with tempfile.TemporaryDirectory() as folder:
                results = context.Queue()
                children = [
                    context.Process(target=measure, args=(rank, num_processes, kind, f"{folder}/store", results))
                    for rank in range(num_processes)
                ]
                for child in children:
                    child.start()
                value = results.get(timeout=120.0)
                for child in children:
                    child.join(60.0)
            name = "ddp" if kind == "ddp" else f"ZeRO {kind}"
            print(f"| {num_processes} | {name} | {value:.1f} | {formula(num_processes):.1f} |", flush=True)


if __name__ == "__main__":
    main()
