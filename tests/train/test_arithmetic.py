"""What is set for a training run, and put back; what it does on a GPU is tested in `test_gpu.py`."""

from __future__ import annotations

import pytest
import torch

from gendist.protocols import UserError
from gendist.train import arithmetic

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def settings():
    """Of torch, of this process."""
    return {
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "fills": torch.utils.deterministic.fill_uninitialized_memory,
        "benchmark": torch.backends.cudnn.benchmark,
        "tf32 of convolutions": torch.backends.cudnn.allow_tf32,
        "products": torch.get_float32_matmul_precision(),
    }


@pytest.fixture
def others(monkeypatch):
    """What somebody else may have set."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    torch.set_float32_matmul_precision("medium")
    yield settings()
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("precision", ["float32", "tfloat32", "bfloat16"])
def test_on_a_gpu_kernels_are_deterministic_and_float32_is_float32(others, precision):
    is_rounded = precision == "tfloat32"
    with arithmetic.arranged(precision, GPU):
        assert settings() == {
            "threads": others["threads"],
            "deterministic": True,
            "fills": False,
            "benchmark": False,
            "tf32 of convolutions": is_rounded,
            "products": "high" if is_rounded else "highest",
        }
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    assert settings() == others


def test_a_run_that_fails_leaves_nothing_set(others):
    with pytest.raises(ZeroDivisionError), arithmetic.arranged("float32", GPU):
        raise ZeroDivisionError
    assert settings() == others


def test_on_a_cpu_there_is_one_thread_and_nothing_else_is_touched(others):
    with arithmetic.arranged("float32", CPU):
        assert settings() == {**others, "threads": 1}
    assert settings() == others


def test_what_a_device_cannot_compute_in_is_refused():
    for precision in ("float16", "tfloat32"):
        arithmetic.check(precision, GPU)
        with pytest.raises(UserError, match=f"{precision} needs a GPU; allowed on a CPU are float32 and bfloat16"):
            arithmetic.check(precision, CPU)
    for precision in ("float32", "bfloat16"):
        arithmetic.check(precision, CPU)


def test_products_are_cast_under_half_precision_alone():
    x = torch.ones(2, 2)
    found = {}
    for precision in ("float32", "tfloat32", "bfloat16"):
        with arithmetic.autocast(precision, CPU):
            found[precision] = (x @ x).dtype
    assert found == {"float32": torch.float32, "tfloat32": torch.float32, "bfloat16": torch.bfloat16}
