"""The plan of a fit by expectation-maximization: the family says what a pass costs and shows it on a block of noise."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import cycle
from typing import Any

import torch

from gendist.blocks import Leaves, LocalBlocks
from gendist.config import Spec, family_class, model_class
from gendist.cost import PassCost
from gendist.data.dataset import MAX_PASSING_BYTES, MAX_RUN_BYTES
from gendist.data.survey import Summary, summarize
from gendist.em.config import EMConfig
from gendist.em.start import start_from_data
from gendist.one_thread import one_thread
from gendist.planning.counting import Counter
from gendist.planning.machines import Machine, Network, usual_s
from gendist.planning.passes import Iteration, Pass, iteration
from gendist.planning.sizes import Sizes
from gendist.protocols import Block, Compute, UserError

TRIAL_FLOPS, TRIAL_BYTES = 4e9, 512 * 2**20  # of one E-step that is tried; of statistics and model
COLD_BYTES = 64 * 2**20  # more than a core has to itself of a cache


@dataclass(frozen=True)
class Trial:
    """What one thread took for an E-step of a block of noise, a row; the rest as in `Pass`."""

    row_s: float
    merge_s: float
    m_step_s: float
    working_bytes: float
    how: str


def pass_cost(spec: Spec, sizes: Sizes, labels: tuple[Any, ...]) -> tuple[PassCost, Summary, Block]:
    """What the family says, and a block of noise that it takes. UserError where it says nothing, or takes neither."""
    family = family_class(spec.family)
    if not hasattr(family, "pass_cost"):
        raise UserError(
            f"the family {spec.family} does not say what a pass costs: give its model a class method pass_cost "
            "(gendist/protocols.py, StatisticsModel)"
        )
    num_rows = min(sizes.leaves.max_leaf_rows, sizes.num_rows)
    refused, of_classes = None, model_class(spec.family, spec.model)
    for kind in ("normal", "categories"):
        block = sizes.trial_block(num_rows, kind)
        summary = _summary(block, sizes)
        try:
            family.check(spec.model, summary, () if of_classes is not family else labels)
        except UserError as error:
            refused = refused or error
            continue
        return of_classes.pass_cost(spec.model, summary, labels), summary, block
    assert refused is not None
    raise refused


def _summary(block: Block, sizes: Sizes) -> Summary:
    return replace(summarize(None, block), features=sizes.features)


def try_a_pass(spec: Spec, sizes: Sizes, labels: tuple[Any, ...], cost: PassCost, block: Block, machine: Machine) -> Trial:
    """On this machine's CPU; by the machine's rate where it is a GPU, or the trial would be too much for a plan."""
    assert isinstance(spec.fit, EMConfig)
    by_rate_s = cost.flops_per_row / (machine.achieved * machine.flops_per_s[spec.fit.precision])
    stated = f"{machine.achieved:.0%} of {machine.name}'s products a second, of what the family counts"
    small = cost.statistics_bytes + cost.parameters_bytes
    merge_s, solve_s = 3.0 * small / machine.memory_bytes_per_s, 10.0 * small / machine.memory_bytes_per_s
    if machine.is_gpu:
        return Trial(by_rate_s, merge_s, solve_s, float(small), stated)
    num_rows = min(block.num_rows, max(64, sizes.length, int(TRIAL_FLOPS / max(cost.flops_per_row, 1.0))))
    if small > TRIAL_BYTES or cost.flops_per_row * num_rows > 4 * TRIAL_FLOPS:
        return Trial(by_rate_s, merge_s, solve_s, float(small), stated)
    if num_rows < block.num_rows:
        block = sizes.trial_block(num_rows, "categories" if bool(_is_whole(block)) else "normal")
    family, config, compute = family_class(spec.family), _of_one_model(spec.model), Compute(spec.fit.precision)
    labels = labels if config is spec.model else ()
    blocks = LocalBlocks(lambda bounds: [block], Leaves((0, block.num_rows)))
    try:
        with one_thread(), Counter() as counter:
            model = start_from_data(family, config, blocks, _summary(block, sizes), labels, "random_responsibilities", 0).model
            statistics = model.e_step(block, compute)
    except UserError as error:  # such as parameters that are to stay as a start has them
        return Trial(by_rate_s, merge_s, solve_s, float(small), f"{stated} ({error})")
    # As a fit meets them: blocks that are not in the processor's cache, and tables that a pass makes of new parameters.
    num_copies = min(8, 1 + int(COLD_BYTES // (sizes.row_bytes * block.num_rows)))
    copies = cycle([replace(block, x=block.x.clone()) for _ in range(num_copies)])
    with one_thread():
        e_step_s = usual_s(lambda: model.e_step(next(copies), compute))
        merge_s, m_step_s = usual_s(partial(statistics.merge, statistics)), usual_s(partial(model.m_step, statistics))
        update = model.m_step(statistics)
        m_step_s += max(0.0, usual_s(partial(update.model.e_step, block, compute), once=True) - e_step_s)
    how = f"its own E-step of {block.num_rows:,} rows of noise, in {1e3 * e_step_s:.3g} ms on {machine.name}"
    return Trial(e_step_s / block.num_rows, merge_s, m_step_s, float(counter.peak_bytes), how)


def _is_whole(block: Block) -> torch.Tensor:
    x = block.x.values() if block.is_sparse else block.x
    return (x == x.round()).all()


def _of_one_model(config: Any) -> Any:
    """The configuration of one model, where there is to be one a class."""
    if getattr(config, "labels", None) != "classes":
        return config
    return config.model_copy(update={"labels": type(config).model_fields["labels"].default})


@dataclass(frozen=True)
class EMPlan:
    """curve: an iteration by the number of workers; chosen: of the workers that are planned."""

    cost: PassCost
    work: Pass
    chosen: Iteration
    curve: list[Iteration]
    assumptions: list[str]


def em_plan(
    spec: Spec, sizes: Sizes, labels: tuple[Any, ...], machine: Machine, network: Network, workers: int, counts: list[int]
) -> EMPlan:
    assert isinstance(spec.fit, EMConfig)
    cost, _, block = pass_cost(spec, sizes, labels)
    trial = try_a_pass(spec, sizes, labels, cost, block, machine)
    keep = spec.data.cache == "memory"
    leaf_bytes = sizes.row_bytes * sizes.leaves.max_leaf_rows
    is_cut = bool(sizes.length) and sizes.length > sizes.leaves.max_leaf_rows
    of_classes = getattr(spec.model, "labels", None) == "classes"
    work = Pass(
        leaves=sizes.leaves,
        max_leaves_per_run=max(1, int((MAX_RUN_BYTES if keep else MAX_PASSING_BYTES) // leaf_bytes)),
        row_s=trial.row_s * (1.5 if of_classes else 1.0),
        row_bytes=sizes.row_bytes if keep else 0.0,
        statistics_bytes=cost.statistics_bytes,
        parameters_bytes=cost.parameters_bytes,
        merge_s=trial.merge_s * (len(labels) if of_classes else 1),
        m_step_s=trial.m_step_s * (len(labels) if of_classes else 1),
        working_bytes=trial.working_bytes,
        share_held_out=spec.data.validation_fraction,
        num_restarts=spec.fit.num_restarts,
        num_passes=2 if is_cut else 1,
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


def as_dict(each: Iteration) -> dict[str, float]:
    return {**asdict(each), "seconds": each.seconds}
