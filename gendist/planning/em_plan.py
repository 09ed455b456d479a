"""The plan of a fit by expectation-maximization: the family says what a pass costs, noise how fast passes are here."""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from functools import partial

from gendist.blocks import Leaves, LocalBlocks
from gendist.config import Spec, family_class, model_class
from gendist.cost import PassCost
from gendist.data.dataset import MAX_PASSING_BYTES, MAX_RUN_BYTES
from gendist.data.survey import survey
from gendist.em.config import EMConfig
from gendist.em.engine import em_steps
from gendist.em.start import start_from_data
from gendist.one_thread import one_thread
from gendist.planning.answer import Plan, duration, size
from gendist.planning.counting import Counter
from gendist.planning.machines import Machine, Network, quickest_quarter, usual_s
from gendist.planning.passes import Work, iteration
from gendist.planning.sizes import Sizes
from gendist.protocols import Block, Compute, Statistics, StatisticsModel, UserError

TRIAL_FLOPS, TRIAL_BYTES = 4e9, 512 * 2**20  # of a leaf that is tried; of statistics and model
COLD_BYTES, MOST_LEAVES = 64 * 2**20, 64  # that are tried: more than a core has to itself of a cache
TRIAL_S, LEAST_ITERATIONS = 0.5, 4


def em_plan(spec: Spec, sizes: Sizes, machine: Machine, network: Network, workers: int, counts: list[int]) -> Plan:
    assert isinstance(spec.fit, EMConfig)
    cost, kind = pass_cost(spec, sizes)
    keeps, small = spec.data.cache == "memory", cost.statistics_bytes + cost.parameters_bytes
    leaves, leaf_bytes = sizes.leaves, sizes.row_bytes * sizes.leaves.max_leaf_rows
    stated = Work(
        leaves=leaves,
        max_leaves_per_run=max(1, int((MAX_RUN_BYTES if keeps else MAX_PASSING_BYTES) // leaf_bytes)),
        cost=cost,
        row_bytes=sizes.row_bytes if keeps else 0.0,
        working_bytes=float(small),
        row_s=cost.flops_per_row / (machine.achieved * machine.flops_per_s[spec.fit.precision]),
        merge_s=3.0 * small / machine.memory_bytes_per_s,
        m_step_s=10.0 * small / machine.memory_bytes_per_s,
        num_passes=2 if sizes.is_cut else 1,
        num_restarts=spec.fit.num_restarts,
        share_held_out=spec.data.validation_fraction,
    )
    work, how = try_iterations(stated, spec, sizes, kind, machine)
    chosen = iteration(work, workers, network)

    fits = chosen.memory_bytes <= machine.memory_bytes
    summary = [
        f"a pass: {cost.flops_per_row:,.4g} FLOP a row, statistics of {size(cost.statistics_bytes)}, parameters of "
        f"{size(cost.parameters_bytes)}; {leaves.num_leaves:,} blocks",
        f"on {workers} workers an iteration takes [bold]{duration(chosen.seconds)}[/bold], sends {size(chosen.sent_bytes)} to "
        f"the driver and {size(chosen.broadcast_bytes)} from it; a worker holds {size(chosen.memory_bytes)}, "
        f"{'of' if fits else 'which does not fit into'} {size(machine.memory_bytes)}",
    ]
    advice = [
        f"a block is {leaves.max_leaf_rows:,} rows, by the shape of the data: results hang on blocks, not on workers; "
        f"{leaves.num_leaves:,} blocks keep as many workers busy, and no more"
    ]
    if not fits:
        advice.append("a worker's share of the rows does not fit into its memory: more workers, or data.cache=none")
    most = "compute" if 2.0 * chosen.compute_s >= chosen.seconds else "the driver's part"
    advice.append(f"most of an iteration is {most}")
    assumptions = [
        f"time of a row: {how}",
        "every row has the label of its class" if _is_of_classes(spec) else "no label is known, and nothing is missing",
        "workers do not slow each other down, as cores that share a memory do",
        "a task of Ray takes the driver 1.15 ms, a pass 4 ms; parts of an iteration follow one another",
    ]
    if not keeps:
        assumptions.append("reading the rows again in every pass (data.cache: none) is not counted")
    return Plan(
        chosen=chosen,
        curve=[iteration(work, count, network) for count in counts],
        summary=summary,
        tables=[],  # nobody has a choice
        advice=advice,
        assumptions=assumptions,
        facts={
            "iteration": chosen.as_dict(),
            "pass_cost": asdict(cost),
            "num_leaves": leaves.num_leaves,
            "num_passes": work.num_passes,
        },
    )


def pass_cost(spec: Spec, sizes: Sizes) -> tuple[PassCost, str]:
    """What the family says, and the kind of noise that it takes. UserError where it says nothing, or takes neither."""
    family, labels, refused = family_class(spec.family), () if _is_of_classes(spec) else sizes.labels, None
    if not hasattr(family, "pass_cost"):
        raise UserError(
            f"the family {spec.family} does not say what a pass costs: give its model a class method pass_cost "
            "(gendist/protocols.py, StatisticsModel)"
        )
    for kind in ("normal", "categories"):
        blocks = _blocks(sizes.trial_blocks(1, min(sizes.leaves.max_leaf_rows, sizes.num_rows), kind))
        summary = replace(survey(blocks), features=sizes.features)
        try:
            family.check(spec.model, summary, labels)
        except UserError as error:
            refused = refused or error
        else:
            return model_class(spec.family, spec.model).pass_cost(spec.model, summary, sizes.labels), kind
    assert refused is not None
    raise refused


def _blocks(leaves: list[Block]) -> LocalBlocks:
    """Of leaves of one size."""
    rows = leaves[0].num_rows
    return LocalBlocks(lambda bounds: leaves, Leaves(range(0, (len(leaves) + 1) * rows, rows)))


def try_iterations(stated: Work, spec: Spec, sizes: Sizes, kind: str, machine: Machine) -> tuple[Work, str]:
    """With the times of the engine's iterations on this machine's CPU, over leaves as long as the data's own, and how they were
    found; as they are stated by the machine's rate where it is a GPU, or where that would be too much for a plan."""
    assert isinstance(spec.fit, EMConfig)
    flops_per_row = stated.cost.flops_per_row
    how = f"{machine.achieved:.0%} of {machine.name}'s products a second, of what the family counts"
    most_rows = max(64, sizes.length, int(TRIAL_FLOPS / max(flops_per_row, 1.0)))
    num_rows = min(sizes.leaves.max_leaf_rows, sizes.num_rows, most_rows)
    if machine.is_gpu or stated.working_bytes > TRIAL_BYTES or flops_per_row * num_rows > 4 * TRIAL_FLOPS:
        return stated, how
    number = max(2, min(int(COLD_BYTES // (sizes.row_bytes * num_rows)), sizes.leaves.num_leaves, MOST_LEAVES))
    leaves = sizes.trial_blocks(number, num_rows, kind)
    config, labels, blocks, compute = spec.model, sizes.labels, _blocks(leaves), Compute(spec.fit.precision)
    if _is_of_classes(spec):  # that of one class is tried
        config, labels = config.model_copy(update={"labels": type(config).model_fields["labels"].default}), ()
    summary = replace(survey(blocks), features=sizes.features)
    try:
        with one_thread(), Counter() as counter:
            found = start_from_data(family_class(spec.family), config, blocks, summary, labels, "random_responsibilities", 0)
            found.model.e_step(leaves[0], compute)
    except UserError as error:  # such as parameters that are to stay as a start has them
        return stated, f"{how} ({error})"
    work, leaf_s = _timed(replace(stated, working_bytes=float(counter.peak_bytes)), found.model, leaves, compute)
    if _is_of_classes(spec):  # each row is of the model of its class, which tells its density first
        num = len(sizes.labels)
        work = replace(work, row_s=1.5 * work.row_s, merge_s=num * work.merge_s, m_step_s=num * work.m_step_s)
    how = f"iterations over {number} blocks of {num_rows:,} rows of noise, in {duration(leaf_s)} each, on {machine.name}"
    return work, how


def _timed(work: Work, model: StatisticsModel, leaves: list[Block], compute: Compute) -> tuple[Work, float]:
    """With times that are measured, and that of a leaf."""
    took: list[float] = []  # of each leaf of each pass of an iteration
    latest: list[Statistics] = []

    def e_step(model: StatisticsModel, block: Block) -> Statistics:
        began = time.thread_time()
        latest[:] = [model.e_step(block, compute)]
        took.append(time.thread_time() - began)
        return latest[0]

    firsts, others, rests = list[float](), list[float](), list[float]()
    blocks, number, began = _blocks(leaves), len(leaves), time.perf_counter()
    while len(rests) < LEAST_ITERATIONS or time.perf_counter() - began < TRIAL_S:
        took.clear()
        start = time.thread_time()
        ((_, update),) = em_steps(e_step, blocks, [model])
        rests.append(time.thread_time() - start - sum(took))
        first, *more = (sum(took[leaf::number]) for leaf in range(number))
        firsts.append(first)
        others += more
        if update is None:
            break
        model = update.model
    with one_thread():
        merge_s = usual_s(partial(latest[0].merge, latest[0]))
    leaf_s, num_passes = quickest_quarter(others), len(took) // number
    timed = replace(
        work,
        row_s=leaf_s / leaves[0].num_rows,
        merge_s=merge_s,
        m_step_s=max(0.0, quickest_quarter(rests) - num_passes * (number - 1) * merge_s),
        once_s=max(0.0, quickest_quarter(firsts) - leaf_s),
        num_passes=num_passes,
    )
    return timed, leaf_s


def _is_of_classes(spec: Spec) -> bool:
    """Whether there is to be a model a class."""
    return getattr(spec.model, "labels", None) == "classes"
