"""A plan as people read it, within 100 columns."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import fill

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from gendist.planning.deep_plan import Step
from gendist.planning.em_plan import EMPlan
from gendist.planning.passes import Iteration
from gendist.planning.plan import Plan

WIDTH = 100


def show(plan: Plan, console: Console) -> None:
    found = plan.found
    num_rows = f"{plan.sizes.num_rows:,} " if plan.sizes.num_rows else ""
    what = f"{plan.spec.name}: family {plan.spec.family}, {num_rows}rows of {plan.sizes.num_features:,} features"
    console.print(what, highlight=False)
    if isinstance(found, EMPlan):
        each, cost = found.chosen, found.cost
        console.print(
            f"a pass: {cost.flops_per_row:,.4g} FLOP a row, statistics of {size(cost.statistics_bytes)}, parameters of "
            f"{size(cost.parameters_bytes)}; {found.work.leaves.num_leaves:,} blocks\n"
            f"on {each.num_workers} workers an iteration takes [bold]{duration(each.seconds)}[/bold], sends "
            f"{size(each.sent_bytes)} to the driver and {size(each.broadcast_bytes)} from it; a worker holds "
            f"{size(each.memory_bytes)}, {_fits(each.memory_bytes, plan)}",
            highlight=False,
        )
    else:
        step = found.chosen
        console.print(
            f"{found.networks.num_parameters:,} parameters; a step of {step.num_workers} workers x {step.num_micro_batches} "
            f"micro-batches of {step.micro_batch_size} takes [bold]{duration(step.seconds)}[/bold]",
            highlight=False,
        )
        for each_phase in found.networks.phases:
            console.print(
                f"  {each_phase.phase.name}: {each_phase.flops:,.4g} FLOP and {size(each_phase.activation_bytes)} of "
                "activations a sample" + (f", in {each_phase.often:.0%} of all steps" if each_phase.often < 1.0 else ""),
                highlight=False,
            )
        console.print(_memory(plan))
    console.print(_curve(plan))
    for title, lines in (("advice", plan.advice), ("assumed", plan.assumptions)):
        console.print(f"{title}:")
        for line in lines:
            said = fill(line, WIDTH, initial_indent="  - ", subsequent_indent="    ")
            console.print(said, highlight=False, markup=False)


COLUMNS = ("engine", "params", "grads", "optim.", "EMA", "transit", "activ.", "total", "fits", "on host", "sent")


def _memory(plan: Plan) -> Table:
    table = _table(f"on each of {plan.found.chosen.num_workers} workers, and what it sends in a step", COLUMNS)
    assert not isinstance(plan.found, EMPlan)
    for name, step in plan.found.stages.items():
        if isinstance(step, str):
            table.add_row(name, "refused")
            continue
        state, fits = step.state, "yes" if step.memory_bytes <= plan.machine.memory_bytes else "no"
        held = (state.parameters, state.gradients, state.optimizer, state.average, state.in_transit, step.activation_bytes)
        sizes = [size(value) for value in (*held, step.memory_bytes)]
        table.add_row(name, *sizes, fits, size(state.on_host), size(step.sent_bytes))
    return table


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for number, name in enumerate(columns):
        table.add_column(name, justify="right" if number else "left", no_wrap=True)
    return table


def _curve(plan: Plan) -> Table:
    found = plan.found
    names = (
        ("compute", "tasks", "transfer", "merge", "M-step")
        if isinstance(found, EMPlan)
        else ("compute", "optimizer", "waiting")
    )
    table = _table("by the number of workers", ("workers", "total", *names, "a worker holds", "efficiency"))
    if isinstance(found, EMPlan):
        rows = [(it, (it.compute_s, it.tasks_s, it.transfer_s, it.merge_s, it.m_step_s)) for it in found.curve]
        _add_rows(table, plan, rows)
    else:
        _add_rows(table, plan, [(step, (step.compute_s, step.optimizer_s, step.waiting_s)) for step in found.curve])
    return table


def _add_rows(table: Table, plan: Plan, rows: Sequence[tuple[Iteration | Step, tuple[float, ...]]]) -> None:
    for (each, parts), share in zip(rows, plan.efficiency, strict=True):
        bends = " < bends" if each.num_workers == plan.bend else ""
        held = f"{size(each.memory_bytes)}{'' if each.memory_bytes <= plan.machine.memory_bytes else ' (!)'}"
        shown = [duration(value) for value in (each.seconds, *parts)]
        table.add_row(f"{each.num_workers}", *shown, held, f"{share:.0%}{bends}")


def _fits(num_bytes: float, plan: Plan) -> str:
    return f"{'of' if num_bytes <= plan.machine.memory_bytes else 'which does not fit into'} {size(plan.machine.memory_bytes)}"


def duration(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def size(num_bytes: float) -> str:
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "KB")):
        if num_bytes >= unit:
            return f"{num_bytes / unit:.3g} {name}"
    return f"{num_bytes:.0f} B" if num_bytes else "-"
