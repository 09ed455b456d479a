"""What a fit shows while it runs: one bar, and log lines above it."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from gendist.fitting import Watch

SECONDS_A_LINE = 10.0


def log_to(console: Console) -> None:
    """Show the package's messages on the console."""
    logger = logging.getLogger("gendist")
    logger.handlers = [RichHandler(console=console, show_path=False, show_time=False, show_level=False, markup=False)]
    logger.setLevel(logging.INFO)


@contextmanager
def fit_progress(console: Console, max_iterations: int, num_restarts: int) -> Iterator[Watch]:
    """A bar of EM iterations; yields what is to be called with each record."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TextColumn("{task.fields[state]}"),
        TimeElapsedColumn(),
    )
    progress = Progress(*columns, console=console)
    task = progress.add_task("EM", total=max_iterations, state="")

    said = time.monotonic()
    newest: dict[int, dict[str, Any]] = {}  # the newest record of each restart

    def watch(record: dict[str, Any]) -> None:
        nonlocal said
        if console.is_terminal:
            progress.start()  # with the first record: a mistake found before leaves no empty bar
        where = f"iteration {record['iteration']}" + (f", restart {record['restart']}" if num_restarts > 1 else "")
        for repair in record["repairs"]:
            progress.console.print(f"{where}: {repair}", highlight=False)
        if record.get("fell"):
            progress.console.print(f"{where}: the log-likelihood fell", highlight=False)
        newest[record["restart"]] = record
        state = _state(list(newest.values()))
        progress.update(task, completed=record["iteration"], state=state)
        if not console.is_terminal and time.monotonic() - said > SECONDS_A_LINE:  # into a file: a line now and then
            said = time.monotonic()
            console.print(f"iteration {record['iteration']}/{max_iterations}  {state}", highlight=False)

    try:
        yield watch
    finally:
        progress.stop()


def _state(newest: list[dict[str, Any]]) -> str:
    """Where the best restart is, and how many go on."""
    best = max(newest, key=lambda record: record["log_likelihood"])
    gain = "" if best["gain"] is None else f"  gain {best['gain']:.2e}"
    restarts = f"  {sum('stopped' not in record for record in newest)} of {len(newest)} go on" if len(newest) > 1 else ""
    return f"log-likelihood {best['log_likelihood']:.6f}{gain}{restarts}  {best['seconds']:.2f} s"
