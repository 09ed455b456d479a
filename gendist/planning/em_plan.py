"""The plan of a fit by expectation-maximization: the family says what a pass costs, noise how fast passes are here."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from gendist.blocks import Leaves, LocalBlocks
from gendist.config import Spec, family_class, model_class
from gendist.cost import PassCost
from gendist.data.dataset import MAX_PASSING_BYTES, MAX_RUN_BYTES
from gendist.data.survey import survey
from gendist.em.config import EMConfig
from gendist.em.engine import em_steps
from gendist.em.start import start_from_data
from gendist.one_thread import one_thread
from gendist.planning.answer import duration, size
from gendist.planning.counting import Counter
from gendist.planning.machines import Machine, Network, quickest_quarter, usual_s
from gendist.planning.passes import Iteration, Pass, Trial, iteration
from gendist.planning.sizes import Sizes
from gendist.protocols import Block, Compute, Statistics, StatisticsModel, UserError

TRIAL_FLOPS, TRIAL_BYTES = 4e9, 512 * 2**20  # of a leaf that is tried; of statistics and model
COLD_BYTES, MOST_LEAVES = 64 * 2**20, 64  # that are tried: more than a core has to itself of a cache
TRIAL_S, LEAST_ITERATIONS = 0.5, 4


def pass_cost(spec: Spec, sizes: Sizes, labels: tuple[Any, ...]) -> tuple[PassCost, str]:
    """What the family says, and the kind of noise that it takes. UserError where it says nothing, or takes neither."""
    family = family_class(spec.family)
    if not hasattr(family, "pass_cost"):
        raise UserError(
            f"the family {spec.family} does not say what a pass costs: give its model a class method pass_cost "
            "(gendist/protocols.py, StatisticsModel)"
        )
    refused, of_classes = None, model_class(spec.family, spec.model)
    for kind in ("normal", "categories"):
        (block,) = sizes.trial_blocks(1, min(sizes.leaves.max_leaf_rows, sizes.num_rows), kind)
        summary = replace(survey(_blocks([block])), features=sizes.features)
        try:
            family.check(spec.model, summary, () if of_classes is not family else labels)
        except UserError as error:
            refused = refused or error
            continue
        return of_classes.pass_cost(spec.model, summary, labels), kind
    assert refused is not None
    raise refused


def _blocks(leaves: list[Block]) -> LocalBlocks:
    bounds = tuple(sum(leaf.num_rows for leaf in leaves[:number]) for number in range(len(leaves) + 1))
    return LocalBlocks(lambda bounds: leaves, Leaves(bounds))


def try_iterations(spec: Spec, sizes: Sizes, labels: tuple[Any, ...], cost: PassCost, kind: str, machine: Machine) -> Trial:
    """Iterations of the engine on this machine's CPU, over leaves as long as the data's own; stated by the machine's rate where
    it is a GPU, or they would be too much for a plan."""
    assert isinstance(spec.fit, EMConfig)
    small = cost.statistics_bytes + cost.parameters_bytes
    stated = Trial(
        row_s=cost.flops_per_row / (machine.achieved * machine.flops_per_s[spec.fit.precision]),
        merge_s=3.0 * small / machine.memory_bytes_per_s,
        m_step_s=10.0 * small / machine.memory_bytes_per_s,
        working_bytes=float(small),
        how=f"{machine.achieved:.0%} of {machine.name}'s products a second, of what the family counts",
        num_passes=2 if sizes.is_cut else 1,
    )
    most_rows = max(64, sizes.length, int(TRIAL_FLOPS / max(cost.flops_per_row, 1.0)))
    num_rows = min(sizes.leaves.max_leaf_rows, sizes.num_rows, most_rows)
    if machine.is_gpu or small > TRIAL_BYTES or cost.flops_per_row * num_rows > 4 * TRIAL_FLOPS:
        return stated
    number = min(int(COLD_BYTES // (sizes.row_bytes * num_rows)), sizes.leaves.num_leaves, MOST_LEAVES)
    leaves = sizes.trial_blocks(max(2, number), num_rows, kind)
    config, blocks, compute = _of_one_model(spec.model), _blocks(leaves), Compute(spec.fit.precision)
    summary = replace(survey(blocks), features=sizes.features)
    own = labels if config is spec.model else ()
    try:
        with one_thread(), Counter() as counter:
            found = start_from_data(family_class(spec.family), config, blocks, summary, own, "random_responsibilities", 0)
            found.model.e_step(leaves[0], compute)
    except UserError as error:  # such as parameters that are to stay as a start has them
        return replace(stated, how=f"{stated.how} ({error})")
    return replace(_timed(found.model, leaves, compute, machine.name), working_bytes=float(counter.peak_bytes))


def _timed(model: StatisticsModel, leaves: list[Block], compute: Compute, where: str) -> Trial:
    took: list[float] = []  # of each leaf of each pass of an iteration
    latest: list[Statistics] = []

    def e_step(model: StatisticsModel, block: Block) -> Statistics:
        began = time.thread_time()
        latest[:] = [model.e_step(block, compute)]
        took.append(time.thread_time() - began)
        return latest[0]

    each, first, rest, passes = list[float](), list[float](), list[float](), list[int]()
    blocks, number, began = _blocks(leaves), len(leaves), time.perf_counter()
    while len(rest) < LEAST_ITERATIONS or time.perf_counter() - began < TRIAL_S:
        took.clear()
        start = time.thread_time()
        ((_, update),) = em_steps(e_step, blocks, [model])
        rest.append(time.thread_time() - start - sum(took))
        passes.append(len(took) // number)
        begin, *others = (sum(took[leaf::number]) for leaf in range(number))
        first.append(begin)
        each += others
        if update is None:
            break
        model = update.model
    with one_thread():
        merge_s = usual_s(partial(latest[0].merge, latest[0]))
    leaf_s, num_passes, num_rows = quickest_quarter(each), sorted(passes)[len(passes) // 2], leaves[0].num_rows
    return Trial(
        row_s=leaf_s / num_rows,
        merge_s=merge_s,
        m_step_s=max(0.0, quickest_quarter(rest) - num_passes * (number - 1) * merge_s),
        working_bytes=0.0,
        how=f"iterations over {number} blocks of {num_rows:,} rows of noise, in {duration(leaf_s)} each, on {where}",
        once_s=max(0.0, quickest_quarter(first) - leaf_s),
        num_passes=num_passes,
    )


def _of_one_model(config: Any) -> Any:
    """The configuration of one model, where there is to be one a class."""
    if getattr(config, "labels", None) != "classes":
        return config
    return config.model_copy(update={"labels": type(config).model_fields["labels"].default})


@dataclass(frozen=True)
class EMPlan:
    """An `Answer`."""

    cost: PassCost
    work: Pass
    chosen: Iteration
    curve: list[Iteration]
    assumptions: list[str]

    def summary(self, machine: Machine) -> list[str]:
        cost, each = self.cost, self.chosen
        fits = "of" if each.memory_bytes <= machine.memory_bytes else "which does not fit into"
        return [
            f"a pass: {cost.flops_per_row:,.4g} FLOP a row, statistics of {size(cost.statistics_bytes)}, parameters of "
            f"{size(cost.parameters_bytes)}; {self.work.leaves.num_leaves:,} blocks",
            f"on {each.num_workers} workers an iteration takes [bold]{duration(each.seconds)}[/bold], sends "
            f"{size(each.sent_bytes)} to the driver and {size(each.broadcast_bytes)} from it; a worker holds "
            f"{size(each.memory_bytes)}, {fits} {size(machine.memory_bytes)}",
        ]

    def memory(self, machine: Machine) -> None:
        """No table: nobody has a choice."""

    def advice(self, machine: Machine) -> list[str]:
        leaves, chosen = self.work.leaves, self.chosen
        lines = [
            f"a block is {leaves.max_leaf_rows:,} rows, by the shape of the data: results hang on blocks, not on workers; "
            f"{leaves.num_leaves:,} blocks keep as many workers busy, and no more"
        ]
        if chosen.memory_bytes > machine.memory_bytes:
            lines.append("a worker's share of the rows does not fit into its memory: more workers, or data.cache=none")
        most = "compute" if 2.0 * chosen.compute_s >= chosen.seconds else "the driver's part"
        return [*lines, f"most of an iteration is {most}"]

    def as_dict(self) -> dict[str, Any]:
        return {"iteration": self.chosen.as_dict(), "pass_cost": asdict(self.cost), "num_leaves": self.work.leaves.num_leaves}


def em_plan(
    spec: Spec, sizes: Sizes, labels: tuple[Any, ...], machine: Machine, network: Network, workers: int, counts: list[int]
) -> EMPlan:
    assert isinstance(spec.fit, EMConfig)
    cost, kind = pass_cost(spec, sizes, labels)
    trial = try_iterations(spec, sizes, labels, cost, kind, machine)
    keep = spec.data.cache == "memory"
    leaf_bytes = sizes.row_bytes * sizes.leaves.max_leaf_rows
    of_classes = getattr(spec.model, "labels", None) == "classes"
    if of_classes:  # each row is of the model of its class, which tells its density first
        trial = replace(
            trial, row_s=1.5 * trial.row_s, merge_s=len(labels) * trial.merge_s, m_step_s=len(labels) * trial.m_step_s
        )
    work = Pass(
        leaves=sizes.leaves,
        max_leaves_per_run=max(1, int((MAX_RUN_BYTES if keep else MAX_PASSING_BYTES) // leaf_bytes)),
        trial=trial,
        row_bytes=sizes.row_bytes if keep else 0.0,
        statistics_bytes=cost.statistics_bytes,
        parameters_bytes=cost.parameters_bytes,
        share_held_out=spec.data.validation_fraction,
        num_restarts=spec.fit.num_restarts,
    )
    assumptions = [
        f"time of a row: {trial.how}",
        "no label is known, and nothing is missing" if not of_classes else "every row has the label of its class",
        "workers do not slow each other down, as cores that share a memory do",
        "a task of Ray takes the driver 1.15 ms, a pass 4 ms; parts of an iteration follow one another",
    ]
    if not keep:
        assumptions.append("reading the rows again in every pass (data.cache: none) is not counted")
    curve = [iteration(work, count, network) for count in counts]
    return EMPlan(cost, work, iteration(work, workers, network), curve, assumptions)
