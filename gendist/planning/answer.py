"""What a plan says: to people within 100 columns, and as plain values to programs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from textwrap import fill
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

WIDTH = 100


@dataclass(frozen=True, kw_only=True)
class OnWorkers:
    """An iteration or a step on so many workers: bytes that are sent, and that a worker holds. Fields in seconds are its parts,
    one after the other."""

    num_workers: int
    sent_bytes: float
    memory_bytes: float

    @property
    def parts_s(self) -> dict[str, float]:
        """By the name of the part."""
        return {field.name[:-2]: getattr(self, field.name) for field in fields(self) if field.name.endswith("_s")}

    @property
    def seconds(self) -> float:
        return sum(self.parts_s.values())

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "seconds": self.seconds}


@dataclass(frozen=True)
class Plan:
    """The answer. curve: by the number of workers; summary: lines with rich's markup; facts: plain values, for programs."""

    chosen: OnWorkers
    curve: list[OnWorkers]
    summary: list[str]
    tables: list[Table]
    advice: list[str]
    assumptions: list[str]
    facts: dict[str, Any]

    def show(self) -> None:
        console = Console(width=WIDTH)
        for part in (*self.summary, *self.tables):
            console.print(part, highlight=False)
        for title, lines in (("advice", self.advice), ("assumed", self.assumptions)):
            console.print(f"{title}:")
            for line in lines:
                said = fill(line, WIDTH, initial_indent="  - ", subsequent_indent="    ")
                console.print(said, highlight=False, markup=False)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """The first column names the rows."""
    made = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for number, name in enumerate(columns):
        made.add_column(name, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        made.add_row(*row)
    return made


def duration(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def size(num_bytes: float) -> str:
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "KB")):
        if num_bytes >= unit:
            return f"{num_bytes / unit:.3g} {name}"
    return f"{num_bytes:.0f} B" if num_bytes else "-"
