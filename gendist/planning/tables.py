"""A plan as people read it, within 100 columns."""

from __future__ import annotations

from textwrap import fill

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from gendist.planning.answer import Grid, duration, size
from gendist.planning.plan import Plan

WIDTH = 100


def show(plan: Plan, console: Console) -> None:
    num_rows = f"{plan.sizes.num_rows:,} " if plan.sizes.num_rows else ""
    what = f"{plan.spec.name}: family {plan.spec.family}, {num_rows}rows of {plan.sizes.num_features:,} features"
    console.print(what, highlight=False, markup=False)
    for line in plan.found.summary(plan.machine):
        console.print(line, highlight=False)
    for grid in (plan.found.memory(plan.machine), _curve(plan)):
        if grid is not None:
            console.print(_table(grid))
    for title, lines in (("advice", plan.advice), ("assumed", plan.assumptions)):
        console.print(f"{title}:")
        for line in lines:
            said = fill(line, WIDTH, initial_indent="  - ", subsequent_indent="    ")
            console.print(said, highlight=False, markup=False)


def _curve(plan: Plan) -> Grid:
    rows = []
    for each, share in zip(plan.found.curve, plan.efficiency, strict=True):
        bends = " < bends" if each.num_workers == plan.bend else ""
        held = f"{size(each.memory_bytes)}{'' if each.memory_bytes <= plan.machine.memory_bytes else ' (!)'}"
        rows.append((f"{each.num_workers}", *map(duration, (each.seconds, *each.parts_s)), held, f"{share:.0%}{bends}"))
    columns = ("workers", "total", *plan.found.chosen.PARTS, "a worker holds", "efficiency")
    return Grid("by the number of workers", columns, rows)


def _table(grid: Grid) -> Table:
    table = Table(title=grid.title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for number, name in enumerate(grid.columns):
        table.add_column(name, justify="right" if number else "left", no_wrap=True)
    for row in grid.rows:
        table.add_row(*row)
    return table
