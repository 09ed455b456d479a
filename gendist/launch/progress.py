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
def fit_progress(console: Console, max_iterations: int) -> Iterator[Watch]:
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

    def watch(record: dict[str, Any]) -> None:
        nonlocal said
        if console.is_terminal:
            progress.start()  # with the first record: a mistake found before leaves no empty bar
        for repair in record["repairs"]:
            progress.console.print(f"iteration {record['iteration']}: {repair}", highlight=False)
        if record.get("fell"):
            progress.console.print(f"iteration {record['iteration']}: the log-likelihood fell", highlight=False)
        gain = "" if record["gain"] is None else f"  gain {record['gain']:.2e}"
        state = f"log-likelihood {record['log_likelihood']:.6f}{gain}  {record['seconds']:.2f} s"
        progress.update(task, completed=record["iteration"], state=state)
        if not console.is_terminal and time.monotonic() - said > SECONDS_A_LINE:  # into a file: a line now and then
            said = time.monotonic()
            console.print(f"iteration {record['iteration']}/{max_iterations}  {state}", highlight=False)

    try:
        yield watch
    finally:
        progress.stop()
