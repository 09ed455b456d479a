"""Training on one GPU that is kept busy: images a second, share of its peak, and memory, beside plain PyTorch, in one run.

    python benchmarks/deep_gpu.py [--cases ...] [--parts speed memory large] [--seconds 15] [--turns 3]

speed   gendist's loop against one written by hand (`deep_cases.py`), which has the data in the card's memory: they take turns
        of a few steps in one process, and a ratio is the median over the turns. Ours takes rows and noise from the host, and
        chooses kernels that add in one order; a third contender is the loop written by hand with such kernels. The share of
        the peak is of the products of a step (torch's FlopCounterMode, products and convolutions alone) in the 989 TFLOP/s
        of bfloat16, dense, or 67 of float32, of the data sheet; what a product of 8192 x 8192 reaches here is printed first
memory  most of the card's memory that is in use, by ZeRO stage, beside the formula (`gendist/train/memory.py`)
large   steps of `configs/vae_1b.yaml`, 1,052 million parameters, in the micro-batches that the card holds
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from deep_cases import Case, gendist_loop, plain_adversarial_step, plain_autoencoder_step, plain_loop, rows_of
from tables import print_machine, print_table, with_range
from torch.utils.flop_counter import FlopCounterMode

from gendist.config import family_class, load_spec
from gendist.data.rows import RowSet
from gendist.train import arithmetic
from gendist.train.config import DeepConfig
from gendist.train.ddp_engine import DdpEngine
from gendist.train.deepspeed_engine import DeepSpeedEngine
from gendist.train.loop import train
from gendist.train.memory import state_bytes
from gendist.train.processes import Processes

GPU = torch.device("cuda", 0)
ALONE = Processes(0, 1, GPU)
PEAK = {"float32": 67e12, "tfloat32": 494.5e12, "bfloat16": 989e12}
NUM_WARM_UP = 2  # turns
COLOURS = (64, 64, 3)
RESIDUAL = {"num_blocks": 2, "normalization": "group", "activation": "silu"}
VAE = {
    "latent_dim": 128,
    "encoder": {"channels": [128, 256, 512], **RESIDUAL},
    "decoder": {"channels": [512, 256, 128], **RESIDUAL},
}
GAN = {
    "latent_dim": 128,
    "generator": {"channels": [1024, 512, 256, 128]},
    "discriminator": {"channels": [128, 256, 512, 1024]},
    "penalty": "none",
}
ADAM = {"learning_rate": 1e-4, "betas": [0.5, 0.999]}
HALF = {"precision": "bfloat16", "channels_last": True}


def _case(title: str, model: dict[str, Any], batch_size: int, at_once: int, fit: dict[str, Any], shape: Any = COLOURS) -> Case:
    family, step = ("vae", plain_autoencoder_step) if "encoder" in model else ("gan", plain_adversarial_step)
    return Case(title, family, model, ADAM, step, at_once, shape, batch_size, fit, "cuda")


CASES = {
    "vae": _case("VAE 64 x 64 x 3, residual 128-256-512, 512 a step, bfloat16", VAE, 512, 4, HALF),
    "vae32": _case("the same, 256 a step, float32", VAE, 256, 2, {}),
    "gan": _case("GAN 64 x 64 x 3, DCGAN of 1024-128 channels, 1024 a step, bfloat16", GAN, 1024, 8, HALF),
    "gan32": _case("the same, 512 a step, float32", GAN, 512, 4, {}),
    "gan32_fast": _case("the same with fit.deterministic: false", GAN, 512, 4, {"deterministic": False}),
    "vae_compiled": _case("VAE as above, compiled", VAE, 512, 4, {**HALF, "compile": True}),
    "small": _case(
        "VAE 28 x 28, convolutions 32-64, 128 a step, float32",
        {"latent_dim": 16, "encoder": {"channels": [32, 64]}, "decoder": {"channels": [64, 32]}},
        128, 100, {}, (28, 28),
    ),
}  # fmt: skip


def plain_deterministic(case: Case, x: np.ndarray, rank: int, world_size: int) -> Iterator[None]:
    """The loop written by hand, with kernels that add in one order, as ours chooses them."""
    turns = plain_loop(case, x, rank, world_size)
    while True:
        with arithmetic.arranged(case.fit.get("precision", "float32"), GPU):
            next(turns)
        yield


def ours(case: Case, x: np.ndarray, rank: int, world_size: int) -> Iterator[None]:
    turns = gendist_loop(case, x, rank, world_size)
    while True:
        with arithmetic.arranged(case.fit.get("precision", "float32"), GPU, case.fit.get("deterministic", True)):
            next(turns)
        yield


CONTENDERS: dict[str, Callable[..., Iterator[None]]] = {
    "gendist's loop": ours,
    "plain PyTorch": plain_loop,
    "plain PyTorch, deterministic kernels": plain_deterministic,
}


def random_images(num: int, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (num, *shape), dtype=np.uint8)


def flops_of_step(case: Case, x: np.ndarray) -> float:
    """Products of the loop written by hand, of a step."""
    one = dataclasses.replace(case, steps_at_once=1, fit={**case.fit, "compile": False})
    with FlopCounterMode(display=False) as counter:
        next(plain_loop(one, x[: case.batch_size], 0, 1))
    return float(counter.get_total_flops())


def race(case: Case, x: np.ndarray, seconds: float, turns: int) -> dict[str, list[float]]:
    """Of each contender the seconds of every turn."""
    contenders = {name: make(case, x, 0, 1) for name, make in CONTENDERS.items()}
    for contender in contenders.values():
        for _ in range(NUM_WARM_UP):
            next(contender)
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    began = time.perf_counter()
    while len(taken["plain PyTorch"]) < turns or time.perf_counter() - began < seconds:
        for name, contender in contenders.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            next(contender)
            torch.cuda.synchronize()
            taken[name].append(time.perf_counter() - start)
    for contender in contenders.values():
        contender.close()
    return taken


def compare(case: Case, seconds: float, turns: int) -> None:
    precision = case.fit.get("precision", "float32")
    torch.backends.cudnn.allow_tf32 = False  # of the plain loop; ours sees to it itself
    x = random_images(8 * case.batch_size, case.x_shape)
    flops = flops_of_step(case, x)
    torch.cuda.reset_peak_memory_stats()
    taken = race(case, x, seconds, turns)
    rows = []
    for name, times in taken.items():
        rate = case.steps_at_once * case.batch_size / statistics.median(times)
        share = flops * rate / case.batch_size / PEAK[precision]
        ratios = [theirs / ours for ours, theirs in zip(taken["gendist's loop"], times, strict=True)]
        step_ms = 1e3 * case.batch_size / rate
        rows.append([name, f"{rate:,.0f}", f"{step_ms:.2f}", f"{share:.0%}", with_range(ratios)])
    title = f"{case.title} ({flops / case.batch_size / 1e9:.1f} GFLOP an image)"
    print_table([title, "images/s", "ms a step", f"of the peak of {precision}", "gendist's speed, of this one's"], rows)
    print(f"most memory in use, of all contenders together: {torch.cuda.max_memory_allocated() / 1e9:.1f} GB", flush=True)


def peak_here() -> None:
    rows = []
    for precision in ("float32", "tfloat32", "bfloat16"):
        with arithmetic.arranged(precision, GPU):  # type: ignore[arg-type]
            a = torch.randn(8192, 8192, device=GPU, dtype=torch.bfloat16 if precision == "bfloat16" else torch.float32)
            times = []
            for number in range(8):
                torch.cuda.synchronize()
                start = time.perf_counter()
                a @ a
                torch.cuda.synchronize()
                times += [time.perf_counter() - start] if number > 2 else []
        rate = 2 * 8192**3 / statistics.median(times)
        rows.append([precision, f"{rate / 1e12:.0f}", f"{rate / PEAK[precision]:.0%}"])
    print_table(["a product of 8192 x 8192", "TFLOP/s", "of the data sheet's"], rows)


ENGINES = {"ddp": {"kind": "ddp"}, **{f"ZeRO {stage}": {"kind": "deepspeed", "zero_stage": stage} for stage in range(4)}}


def engine_of(config: DeepConfig) -> Any:
    return (DdpEngine if config.engine.kind == "ddp" else DeepSpeedEngine)(ALONE, config)


@dataclasses.dataclass(frozen=True)
class Trained:
    """
    seconds     of each step after the first
    most_bytes  in use in these, above what there was before
    """

    seconds: list[float]
    num_parameters: int
    most_bytes: int


def trained(spec: Any, config: DeepConfig, shape: tuple[int, ...], num_rows: int) -> Trained:
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()  # DeepSpeed keeps some of the networks before
    model = family_class(spec.family).create(spec.model, shape, (), 0)
    num_parameters = sum(p.numel() for network in model.networks().values() for p in network.parameters())
    engine = engine_of(config)
    engine.prepare(model.networks())
    rows = RowSet(rows_of(random_images(num_rows, shape)).numpy(), np.arange(num_rows))
    with arithmetic.arranged(config.precision, GPU):
        reports, seconds = train(model, engine, rows, config, seed=0), []
        next(reports)
        torch.cuda.reset_peak_memory_stats()
        while True:
            torch.cuda.synchronize()
            start = time.perf_counter()
            if next(reports, None) is None:
                return Trained(seconds, num_parameters, torch.cuda.max_memory_allocated() - before)
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)


def memory() -> None:
    """Of a network of fully connected layers, whose activations are next to nothing."""
    sizes = {"hidden_sizes": [8192] * 4}
    spec = load_spec({"name": "x", "family": "vae", "model": {"latent_dim": 16, "encoder": sizes, "decoder": sizes}})
    rows = []
    for name, engine in ENGINES.items():
        config = DeepConfig.model_validate(
            {
                "num_steps": 3,
                "global_batch_size": 2,
                "record_every": 1,
                "checkpoint_every": 10**6,
                "engine": engine,
                "ema": 0.05,
            }
        )
        found = trained(spec, config, (32, 32), 8)
        formula = state_bytes(config, "autoencoder", found.num_parameters, 1).on_device / found.num_parameters
        rows.append([name, f"{found.most_bytes / found.num_parameters:.2f}", f"{formula:.2f}"])
    print_table([f"{found.num_parameters:,} parameters, Adam, average", "bytes a parameter, at most", "formula"], rows)


def large(micro_batch_size: int, num_steps: int) -> None:
    spec = load_spec("configs/vae_1b.yaml")
    rows = []
    for name in ("ddp", "ZeRO 3"):
        config = DeepConfig.model_validate({
            "num_steps": num_steps, "global_batch_size": 2 * micro_batch_size, "micro_batch_size": micro_batch_size,
            "precision": "bfloat16", "channels_last": name == "ddp", "engine": ENGINES[name], "ema": 0.05, "record_every": 1,
            "optimizer": {"learning_rate": 1e-5, "gradient_clipping": 1.0}, "checkpoint_every": 10**6,
        })  # fmt: skip
        found = trained(spec, config, (256, 256, 3), 2 * micro_batch_size)
        step_s = statistics.median(found.seconds)
        rate = 2 * micro_batch_size / step_s
        rows.append([name, f"{rate:.1f}", f"{step_s:.2f}", f"{found.most_bytes / 1e9:.1f}"])
    title = f"vae_1b, {found.num_parameters:,} parameters, 256 x 256 x 3, bfloat16, micro-batches of {micro_batch_size}"
    print_table([title, "images/s", "s a step of two", "GB at most"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--parts", nargs="+", choices=("speed", "memory", "large"), default=["speed", "memory", "large"])
    parser.add_argument("--seconds", type=float, default=15.0, help="that are measured of each case, at least")
    parser.add_argument("--turns", type=int, default=3, help="of each contender, at least")
    parser.add_argument("--large-batch", type=int, default=32, help="micro-batch of the large network")
    arguments = parser.parse_args()
    print_machine(1)
    print(f"{torch.cuda.get_device_name(GPU)}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}", flush=True)
    if "speed" in arguments.parts:
        peak_here()
        for case in (CASES[name] for name in arguments.cases):
            compare(case, arguments.seconds, arguments.turns)
            gc.collect()
            torch.cuda.empty_cache()
    if "memory" in arguments.parts:
        memory()
    if "large" in arguments.parts:
        large(arguments.large_batch, 4)


if __name__ == "__main__":
    main()
