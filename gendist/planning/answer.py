"""What a plan of any kind says of itself: all that `plan.py` and `tables.py` know of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

from gendist.planning.machines import Machine


@dataclass(frozen=True, kw_only=True)
class OnWorkers:
    """An iteration or a step on so many workers: bytes that are sent, and that a worker holds.

    PARTS  fields of seconds, one part after the other, by what a table calls them
    """

    PARTS: ClassVar[Mapping[str, str]] = {}

    num_workers: int
    sent_bytes: float
    memory_bytes: float

    @property
    def parts_s(self) -> list[float]:
        return [getattr(self, field) for field in self.PARTS.values()]

    @property
    def seconds(self) -> float:
        return sum(self.parts_s)

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "seconds": self.seconds}


class Grid(NamedTuple):
    """A table, whose first column names its rows."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


class Answer(Protocol):
    """chosen: of the workers that are planned; curve: by the number of workers."""

    @property
    def chosen(self) -> OnWorkers: ...
    @property
    def curve(self) -> Sequence[OnWorkers]: ...
    @property
    def assumptions(self) -> Sequence[str]: ...
    def summary(self, machine: Machine) -> list[str]:
        """The first lines that a reader sees; [bold] stands for itself."""
        ...

    def memory(self, machine: Machine) -> Grid | None: ...
    def advice(self, machine: Machine) -> list[str]: ...
    def as_dict(self) -> dict[str, Any]:
        """What this kind alone has, as plain values."""
        ...


def duration(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def size(num_bytes: float) -> str:
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "KB")):
        if num_bytes >= unit:
            return f"{num_bytes / unit:.3g} {name}"
    return f"{num_bytes:.0f} B" if num_bytes else "-"
