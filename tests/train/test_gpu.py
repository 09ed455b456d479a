"""Training on a GPU: what `test_exactness.py` has of CPUs, in each precision, and whole fits that are killed.

Tolerances are those of a step that amplifies rounding: what was seen is printed (`-rP`).
"""

from __future__ import annotations

import functools
import json
import math
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import worlds
from safetensors.torch import load_file
from test_exactness import ENGINES, LATE, Case, assert_close, assert_same, plainly_trained, progress_when_left, trained

import gendist
from gendist.train import arithmetic
from gendist.train.processes import Processes

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
    pytest.mark.filterwarnings("error:.*deterministic"),
]
PROGRAM = Path(__file__).parents[2] / "launch.py"
GPU = torch.device("cuda", 0)
NCCL_PORT = 29555
ALONE = Processes(0, 1, GPU)
FAMILIES = (
    "vae",
    "vae, semi-supervised",
    "gan",
    "gan, r1",
    "gan, wasserstein",
    "gan, hinge",
    "gan, residual",
    "gan, conditional",
)
TOYS = ("regression", "adversarial")
SHARDED = [engine for engine in ENGINES if engine != "ddp"]

WHOLE = [Case("ddp", 1, number, model) for number in (1, 2) for model in (*FAMILIES, *TOYS)]
WHOLE += [Case(engine, 1, 2, model) for engine in SHARDED for model in ("vae", "gan, r1", *TOYS)]
ROUNDED = [
    Case(engine, 1, number, model, precision=precision)
    for precision in ("bfloat16", "float16")
    for engine, number, model in (
        ("ddp", 1, "vae"),
        ("ddp", 2, "gan"),
        ("ddp", 1, "gan, r1"),
        ("zero 0", 1, "vae"),
        ("zero 1", 1, "gan"),
        ("zero 2", 2, "vae"),
        ("zero 3", 1, "gan"),
        ("zero 3", 2, "vae"),
    )
]
# With second derivatives float16 overflows, and which of the first steps are skipped is a matter of rounding.
COMPARED = [case for case in ROUNDED if (case.model, case.precision) != ("gan, r1", "float16")]
RESUMED = [case for case in (*WHOLE, *ROUNDED) if case.model in ("vae", "gan", "gan, r1", *TOYS)]


def names(case: Case) -> str:
    return f"{case.engine}-{case.num_accumulation_steps}-{case.model}-{case.precision}"


@pytest.fixture(autouse=True)
def _arranged():
    with arithmetic.arranged("float32", GPU):
        yield


def distance(state, parameters) -> float:
    """Relative, of all parameters."""
    away = sum(float((state[name].cpu() - value.cpu()).square().sum()) for name, value in parameters.items())
    return math.sqrt(away / sum(float(value.square().sum()) for value in parameters.values()))


def difference(state, parameters) -> float:
    return max(float((state[name] - value.cpu()).abs().max()) for name, value in parameters.items())


@pytest.mark.parametrize("case", WHOLE, ids=names)
def test_it_is_plain_training_on_the_same_gpu(case):
    ours, expected = trained(ALONE, case), plainly_trained(case, GPU)
    print(f"MEASURED {names(case)}: {difference(ours.state, expected[-1]):.1e} from plain PyTorch")
    assert_close(ours.late, {name: value.cpu() for name, value in expected[LATE - 1].items()}, 1e-5)
    assert_close(ours.state, {name: value.cpu() for name, value in expected[-1].items()}, 1e-5)


@pytest.mark.parametrize("model", [*FAMILIES, *TOYS])
def test_it_is_training_on_a_cpu(model):
    case = Case("ddp", 1, 1, model)
    ours, expected = trained(ALONE, case), plainly_trained(case)
    print(f"MEASURED {names(case)}: {difference(ours.state, expected[-1]):.1e} from the CPU")
    assert_close(ours.state, expected[-1], 1e-4)


@pytest.mark.parametrize("case", COMPARED, ids=names)
def test_rounded_it_is_as_far_from_float32_as_plain_training_under_autocast(case):
    """Not the same: two orders of additions differ in a bit of float32, which may become one of a product's factors."""
    exact, rounded = plainly_trained(replace(case, precision="float32"), GPU)[-1], plainly_trained(case, GPU)[-1]
    found, expected = distance(trained(ALONE, case).state, exact), distance(rounded, exact)
    print(f"MEASURED {names(case)}: {found:.1e} from float32, plain PyTorch {expected:.1e}")
    assert 1e-5 < found < 1.5 * expected  # less would be float32


@pytest.mark.parametrize("case", RESUMED, ids=names)
def test_a_resumed_run_is_an_unbroken_one_to_the_byte(case):
    whole = trained(ALONE, case)
    resumed = trained(ALONE, case, (progress_when_left(case, whole), whole.late))
    assert_same(resumed.state, whole.state)
    assert_same(resumed.averaged, whole.averaged)
    assert resumed.records == [record for record in whole.records if record["step"] > LATE]


@dataclass(frozen=True)
class Offloaded(Case):
    """file: DeepSpeed's configuration."""

    file: str = ""

    @property
    def config(self):
        config = super().config
        return config.model_copy(update={"engine": config.engine.model_copy(update={"config": self.file})})


OFFLOADED = [(engine, ["offload_optimizer"]) for engine in ("zero 1", "zero 2", "zero 3")]
OFFLOADED += [("zero 3", ["offload_optimizer", "offload_param"])]


@pytest.mark.parametrize(("engine", "what"), OFFLOADED)
@pytest.mark.parametrize("model", ["vae", "gan, r1"])
def test_offloaded_to_the_host_it_is_plain_training_and_goes_on_to_the_byte(model, engine, what, tmp_path):
    zero = {key: {"device": "cpu", "pin_memory": True} for key in what}
    (tmp_path / "deepspeed.json").write_text(json.dumps({"zero_optimization": zero}))
    case = Offloaded(engine, 1, 2, model, file=str(tmp_path / "deepspeed.json"))
    whole, expected = trained(ALONE, case), plainly_trained(case, GPU)
    print(f"MEASURED {names(case)}, offloaded: {difference(whole.state, expected[-1]):.1e} from plain PyTorch")
    assert_close(whole.state, {name: value.cpu() for name, value in expected[-1].items()}, 1e-5)
    resumed = trained(ALONE, case, (progress_when_left(case, whole), whole.late))
    assert_same(resumed.state, whole.state)


def test_tfloat32_is_asked_for_and_only_then():
    x = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    exact = x.double() @ x.double().T
    error = {}
    for precision in ("float32", "tfloat32"):
        with arithmetic.arranged(precision, GPU):
            error[precision] = float(((x.to(GPU) @ x.to(GPU).T).cpu() - exact).norm() / exact.norm())
    assert error["float32"] < 1e-6 < 1e-5 < error["tfloat32"]


def fit(run: Path, *more: str, kill_at: str | None = None) -> None:
    here = ("cluster.num_workers=0", "cluster.use_gpu=true", "tracking.wandb=disabled", "--run-dir", run)
    command = [sys.executable, PROGRAM, "fit", *more, *here]
    log = run.with_name(f"{run.name}.log")
    with log.open("w") as said:
        process = subprocess.Popen(command, stderr=said, stdout=subprocess.DEVNULL)
    try:
        if kill_at is not None:
            while not (run / "checkpoints" / kill_at / "training.json").exists():
                assert process.poll() is None, log.read_text()
                time.sleep(0.01)
            process.kill()
        process.wait(timeout=200)
        assert process.returncode == (0 if kill_at is None else -9), log.read_text()
        assert "deterministic" not in log.read_text()
    finally:
        process.kill()


SHORT = ("fit.num_steps=100", "fit.checkpoint_every=20", "fit.eval_every=0")
BFLOAT16, CHANNELS_LAST = "fit.precision=bfloat16", "fit.channels_last=true"
AUGMENTED = "model.augmentation=[color,translation,cutout]"
# Of the last a killed fit was seen to end in other bytes, before backward passes were those of one thread.
CONVOLUTIONS = ("model.generator={channels: [32, 16]}", "model.discriminator={channels: [16, 32]}")
SPECS = {
    "vae": ("vae_digits",),
    "gan": ("gan_digits",),  # with R1, as all of them
    "gan, bfloat16": ("gan_digits", BFLOAT16),
    "gan, augmented": ("gan_digits", AUGMENTED),
    "gan, convolutions": ("gan_digits", CHANNELS_LAST, *CONVOLUTIONS),
    "gan, bfloat16, augmented": ("gan_digits", BFLOAT16, CHANNELS_LAST, AUGMENTED),
}


def arguments_of(name: str) -> list[str]:
    config, *changes = SPECS[name]
    return [str(PROGRAM.parent / "configs" / f"{config}.yaml"), *SHORT, *changes]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "artifact" / "model.safetensors")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The weights at the end of each, from a process that nobody disturbs."""

    @functools.cache
    def of(name: str) -> dict[str, torch.Tensor]:
        run = tmp_path_factory.mktemp("unbroken") / "run"
        fit(run, *arguments_of(name))
        return weights(run)

    return of


@pytest.mark.parametrize("name", SPECS)
def test_a_fit_is_the_same_bytes_in_another_process(name, unbroken, tmp_path):
    fit(tmp_path / "again", *arguments_of(name))
    assert_same(weights(tmp_path / "again"), unbroken(name))


@pytest.mark.parametrize("name", SPECS)
def test_a_killed_fit_ends_in_the_same_bytes(name, unbroken, tmp_path):
    fit(tmp_path / "killed", *arguments_of(name), kill_at="00000040")
    assert not (tmp_path / "killed" / "artifact").exists()
    fit(tmp_path / "killed", *arguments_of(name))
    assert_same(weights(tmp_path / "killed"), unbroken(name))


EM = {  # the `model` block of each family
    "gmm": {"num_components": 5},
    "hmm": {"num_states": 4},
    "naive_bayes": {"num_classes": 3, "kind": "gaussian"},
}


@pytest.mark.parametrize("family", EM)
def test_em_gives_the_same_bytes_each_time_and_what_a_cpu_does(family):
    x = np.random.default_rng(0).normal(size=(20_000, 6)) + np.arange(20_000)[:, None] // 37 % 4 * 3.0
    spec = {"name": "x", "family": family, "model": EM[family], "fit": {"max_iterations": 8, "tolerance": 0.0}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        on_gpu = [gendist.fit({**spec, "cluster": {"use_gpu": True}}, data=x) for _ in range(2)]
        on_cpu = gendist.fit(spec, data=x)
    first, second = (run.model.tensors() for run in on_gpu)
    assert_same(first, second)
    ours, theirs = (run.history[-1]["log_likelihood"] for run in (on_gpu[0], on_cpu))
    print(f"MEASURED {family}: mean log-likelihood {abs(ours - theirs):.1e} from the CPU")
    assert ours == pytest.approx(theirs, rel=1e-9)


GROUPS = [
    "gloo",
    pytest.param("nccl", marks=pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are not two GPUs")),
]


@pytest.mark.parametrize("backend", GROUPS)
def test_two_processes_are_one(backend):
    """Over gloo on one GPU, which NCCL does not let them share; over NCCL each has its own."""
    cases = [Case(engine, 2, 2, model) for engine in ENGINES for model in ("vae", "gan, r1")]
    found = worlds.run([worlds.Job(case, 2, _on_gpus, (case, backend)) for case in cases], timeout_s=250.0)
    for case in cases:
        first, second = found[case]
        assert_same(first.averaged, second.averaged)
        expected = plainly_trained(case, GPU)[-1]
        print(f"MEASURED {names(case)}, 2 processes over {backend}: {difference(first.state, expected):.1e} from plain PyTorch")
        assert_close(first.state, {name: value.cpu() for name, value in expected.items()}, 1e-5)


def _on_gpus(processes: Processes, case: Case, backend: str):
    rank, world_size, device = processes.rank, processes.world_size, GPU
    if backend == "nccl":
        device = torch.device("cuda", rank)
        if dist.get_backend() != backend:  # in place of the world's own group
            dist.destroy_process_group()
            dist.init_process_group(backend, init_method=f"tcp://127.0.0.1:{NCCL_PORT}", rank=rank, world_size=world_size)
    torch.cuda.set_device(device)
    with arithmetic.arranged("float32", device):
        return trained(Processes(rank, world_size, device), case)
