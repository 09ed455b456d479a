"""What a command shows while it runs: one bar, and log lines above it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn

from gendist.fitting import Watch

SECONDS_A_LINE = 10.0


def log_to(console: Console) -> None:
    """Show the package's messages on the console."""
    logger = logging.getLogger("gendist")
    logger.handlers = [RichHandler(console=console, show_path=False, show_time=False, show_level=False, markup=False)]
    logger.setLevel(logging.INFO)


@contextmanager
def fit_progress(console: Console, max_iterations: int) -> Iterator[Watch]:
    """A bar of EM iterations; yields what is to be called with each record."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TextColumn("{task.fields[state]}"),
        TimeElapsedColumn(),
    )
    with _shown(console, columns) as show:

        def watch(record: dict[str, Any]) -> None:
            for repair in record["repairs"]:
                console.print(f"iteration {record['iteration']}: {repair}", highlight=False)
            if record.get("fell"):
                console.print(f"iteration {record['iteration']}: the log-likelihood fell", highlight=False)
            gain = "" if record["gain"] is None else f"  gain {record['gain']:.2e}"
            state = f"log-likelihood {record['log_likelihood']:.6f}{gain}  {record['seconds']:.2f} s"
            line = f"iteration {record['iteration']}/{max_iterations}  {state}"
            show(line, description="EM", completed=record["iteration"], total=max_iterations, state=state)

        yield watch


@contextmanager
def rows_progress(console: Console, what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar of rows; yields what is to be called with how many are written, and with how many there will be."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.completed:,.0f}/{task.total:,.0f}"),
        TextColumn("{task.fields[state]}"),
        TimeElapsedColumn(),
    )
    began: tuple[float, int] | None = None
    with _shown(console, columns) as show:

        def watch(done: int, num_rows: int) -> None:
            nonlocal began
            began = began or (time.monotonic(), done)  # what an earlier process wrote says nothing about this one's speed
            per_s = (done - began[1]) / max(time.monotonic() - began[0], 1e-9)
            state = f"{per_s:,.0f} a second, {(num_rows - done) / per_s:,.0f} s to go" if per_s else ""
            show(f"{done:,}/{num_rows:,} {what}  {state}", description=what, completed=done, total=num_rows, state=state)

        yield watch


@contextmanager
def _shown(console: Console, columns: Sequence[ProgressColumn]) -> Iterator[Callable[..., None]]:
    """Yields show(line, **fields of the bar): on a terminal a bar, else, into a file, a line now and then."""
    progress = Progress(*columns, console=console)
    task = progress.add_task("", total=None, state="")
    said = time.monotonic()

    def show(line: str, **fields: Any) -> None:
        nonlocal said
        progress.update(task, **fields)
        if console.is_terminal:
            progress.start()  # with the first call: a mistake found before leaves no empty bar
        elif time.monotonic() - said > SECONDS_A_LINE:
            said = time.monotonic()
            console.print(line, highlight=False)

    try:
        yield show
    finally:
        if console.is_terminal:
            progress.stop()
