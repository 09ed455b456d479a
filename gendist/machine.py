"""What equal bytes depend on beside the spec and the data: the type of processor and the libraries that compute."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

NOT_INSTALLED = "not installed"


def machine_type() -> dict[str, str]:
    """The processor, the instructions that torch uses on it, and torch's version."""
    import torch

    return {"cpu": _cpu_name(), "instructions": torch.backends.cpu.get_cpu_capability(), "torch": torch.__version__}


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that a result may depend on."""
    found = {"python": platform.python_version()}
    for package in ("gendist", "torch", "numpy", "pyarrow", "ray"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = NOT_INSTALLED
    return found


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
