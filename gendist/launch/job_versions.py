"""Whether the machine that submits a job and the cluster have the same versions: looked at before any of them is needed."""

from __future__ import annotations

from collections.abc import Mapping

from gendist.errors import UserError
from gendist.machine import NOT_INSTALLED

# To so many places; those of the tested packages that a result depends on.
COMPARED = {"ray": 3, "python": 2, "torch": 2, "numpy": 2, "pyarrow": 2}


def check_versions(here: Mapping[str, str], there: Mapping[str, str]) -> None:
    """UserError where they differ, with both. What is not installed here is no matter; nor what nothing is said of there, as a
    head says nothing of torch. The build ("+cpu") may differ."""
    different = [
        f"{package} is {here[package]} here and {there[package]} there"
        for package, places in COMPARED.items()
        if here.get(package, NOT_INSTALLED) != NOT_INSTALLED
        and package in there
        and _places(here[package], places) != _places(there[package], places)
    ]
    if different:
        raise UserError(
            f"versions differ between this machine and the cluster: {', '.join(different)}; install the same on both"
        )


def _places(version: str, places: int) -> list[str]:
    return version.partition("+")[0].split(".")[:places]
