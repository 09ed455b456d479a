"""How benchmarks print: the machine, and tables of medians with their range."""

from __future__ import annotations

import argparse
import os
import platform
import statistics
from collections.abc import Sequence


def scale_option(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=int, default=1, help="divide the rows by this, for a quick look")
    return parser


def print_machine(scale: int) -> None:
    from gendist.machine import machine_type, versions

    print(f"{machine_type()}, {os.cpu_count()} cores, {platform.system()}; {versions()}")
    if scale != 1:
        print(f"A QUICK LOOK: the rows are divided by {scale}")


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Markdown, with columns that also line up as plain text: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    print()
    for row in (header, rule, *rows):
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        print("| " + " | ".join(cells) + " |")
    print(flush=True)


def with_range(values: Sequence[float], digits: int = 3) -> str:
    """The median, and what it lies between."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"
