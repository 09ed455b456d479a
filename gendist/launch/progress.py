"""What a command shows while it runs: one bar, and log lines above it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn

from gendist.em.config import EMConfig
from gendist.run import Watch
from gendist.train.config import DeepConfig

SECONDS_A_LINE = 10.0
MAX_TERMS = 2  # of a loss, on one line


def log_to(console: Console) -> None:
    """Show the package's messages on the console."""
    logger = logging.getLogger("gendist")
    logger.handlers = [RichHandler(console=console, show_path=False, show_time=False, show_level=False, markup=False)]
    logger.setLevel(logging.INFO)


BAR = (
    TextColumn("{task.description}"),
    BarColumn(bar_width=24),
    TextColumn("{task.completed:,.0f}/{task.total:,.0f}"),
    TextColumn("{task.fields[state]}"),
    TimeElapsedColumn(),
)


def fit_progress(console: Console, config: Any) -> AbstractContextManager[Watch]:
    """A bar of a fit with this `fit:` block; yields what is to be called with each record."""
    if isinstance(config, EMConfig):
        return _iterations(console, config)
    return _steps(console, config)


@contextmanager
def _iterations(console: Console, config: EMConfig) -> Iterator[Watch]:
    """Of EM."""
    max_iterations, num_restarts = config.max_iterations, config.num_restarts
    newest: dict[int, dict[str, Any]] = {}  # the newest record of each restart
    with _shown(console, BAR) as show:

        def watch(record: dict[str, Any]) -> None:
            where = f"iteration {record['iteration']}" + (f", restart {record['restart']}" if num_restarts > 1 else "")
            for repair in record["repairs"]:
                console.print(f"{where}: {repair}", highlight=False)
            if record.get("fell"):
                console.print(f"{where}: the log-likelihood fell", highlight=False)
            newest[record["restart"]] = record
            state = _state(list(newest.values()))
            line = f"iteration {record['iteration']}/{max_iterations}  {state}"
            show(line, description="EM", completed=record["iteration"], total=max_iterations, state=state)

        yield watch


@contextmanager
def _steps(console: Console, config: DeepConfig) -> Iterator[Watch]:
    """Of training."""
    validation: dict[str, float] = {}  # the newest
    with _shown(console, BAR) as show:

        def watch(record: dict[str, Any]) -> None:
            step = record["step"]
            for skipped in record.get("skipped", ()):
                console.print(f"step {skipped['step']}: {skipped['phase']} was not finite and is skipped", highlight=False)
            held_out = {key: value for key, value in record.items() if key.startswith("validation/")}
            validation.update(list(held_out.items())[:1])
            seconds_left = (config.num_steps - step) * config.global_batch_size / record["samples_per_s"]
            state = "  ".join(
                [
                    *(f"{name} {value:.4g}" for name, value in (_losses(record) | validation).items()),
                    f"{record['samples_per_s']:,.0f} samples/s",
                    f"{timedelta(seconds=round(seconds_left))} left",
                ]
            )
            line = f"step {step}/{config.num_steps}  {state}"
            show(line, description="training", completed=step, total=config.num_steps, state=state)

        yield watch


def _losses(record: dict[str, Any]) -> dict[str, float]:
    """What each phase minimises; of a single phase its terms, too."""
    values = {
        tuple(key.split("/")): value
        for key, value in record.items()
        if "/" in key and not key.startswith("validation/") and value is not None
    }
    losses = {phase: value for (phase, name), value in values.items() if name == "loss"}
    if len(losses) != 1:
        return losses
    terms = {name: value for (_, name), value in values.items() if name not in ("loss", "gradient_norm", "learning_rate")}
    return {"loss": next(iter(losses.values())), **dict(list(terms.items())[:MAX_TERMS])}


@contextmanager
def rows_progress(console: Console, what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar of rows; yields what is to be called with how many are written, and with how many there will be."""
    began: tuple[float, int] | None = None
    with _shown(console, BAR) as show:

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


def _state(newest: list[dict[str, Any]]) -> str:
    """Where the best restart is, and how many go on."""
    best = max(newest, key=lambda record: record["log_likelihood"])
    gain = "" if best["gain"] is None else f"  gain {best['gain']:.2e}"
    restarts = f"  {sum('stopped' not in record for record in newest)} of {len(newest)} go on" if len(newest) > 1 else ""
    return f"log-likelihood {best['log_likelihood']:.6f}{gain}{restarts}  {best['seconds']:.2f} s"
