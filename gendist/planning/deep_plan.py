"""The plan of a fit by gradient: phases are counted on shapes, engines say what they hold and send."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import torch

from gendist.config import Spec, family_class
from gendist.cost import StateBytes, Traffic
from gendist.data.rows import RowSet
from gendist.one_thread import one_thread
from gendist.planning.answer import OnWorkers, Plan, duration, size, table
from gendist.planning.counting import PhaseCost, count_phases
from gendist.planning.machines import Machine, Network
from gendist.planning.sizes import Sizes
from gendist.protocols import UserError
from gendist.train import restrictions
from gendist.train.batches import Division
from gendist.train.config import DeepConfig, EngineConfig
from gendist.train.loop import train
from gendist.train.processes import Processes
from gendist.training_job import engine_class

TRIAL_FLOPS, TRIAL_BYTES = 3e10, 1.5e9  # of all steps that are tried; of parameters, gradients and moments
TRIAL_STEPS, TRIAL_SAMPLES = 5, 64
LIVE_PARAMETERS = 10**9  # DeepSpeed's stage3_max_live_parameters, where nobody says another
BACKWARD_SHARE = 2 / 3  # of a step's products, behind which gradients travel on a GPU
MICRO_BATCH_S = {True: 5e-3, False: 2e-3}  # of a GPU, of a CPU: what a micro-batch takes besides its products, where not tried

ENGINES = {"ddp": EngineConfig(kind="ddp")} | {
    f"ZeRO {stage}": EngineConfig(kind="deepspeed", zero_stage=stage) for stage in (1, 2, 3)
}
AS_SAID = "as said"
COLUMNS = ("engine", "params", "grads", "optim.", "EMA", "transit", "activ.", "total", "fits", "on host", "sent")


class Networks(NamedTuple):
    """What is known of a model before it is made: its networks as shapes, the entries of each of their parameters, and what
    phases cost."""

    model: Any
    sizes: Mapping[str, list[int]]
    phases: list[PhaseCost]

    @property
    def num_parameters(self) -> int:
        return sum(map(sum, self.sizes.values()))


class Speed(NamedTuple):
    """flops_per_s that a step reaches, and micro_batch_s besides: of each micro-batch of each phase."""

    flops_per_s: float
    micro_batch_s: float
    how: str


@dataclass(frozen=True, kw_only=True)
class Step(OnWorkers):
    """An optimizer step on each of so many processes; waiting_s: of the exchange what no computing hides."""

    micro_batch_size: int
    num_micro_batches: int
    state: StateBytes
    activation_bytes: float
    compute_s: float
    optimizer_s: float
    waiting_s: float


def deep_plan(spec: Spec, sizes: Sizes, machine: Machine, network: Network, workers: int, counts: list[int]) -> Plan:
    config, room, labels = spec.fit, machine.memory_bytes, sizes.labels
    assert isinstance(config, DeepConfig)
    networks = networks_of(spec, sizes, workers, machine)
    speed = speed_of(spec, sizes, networks, machine)
    step_of = partial(step, networks, machine=machine, speed=speed, network=network)
    chosen = step_of(config, workers)
    curve, not_trained = list[OnWorkers](), dict[int, str]()
    for count in counts:
        try:
            curve.append(step_of(config, count))
        except UserError as error:
            not_trained[count] = str(error)
    stages, refused = dict[str, Step](), dict[str, str]()
    for name, engine in ENGINES.items():
        try:
            stages[name] = step_of(config.model_copy(update={"engine": engine}), workers)
        except UserError as error:
            refused[name] = str(error)
    stages[AS_SAID] = chosen
    largest = dict[str, int]()
    for name, each in stages.items():
        there = config.model_copy(update={"engine": ENGINES.get(name, config.engine)})
        allowed = partial(_allows, networks.model, there, workers, machine)
        left = room - each.state.on_device
        largest[name] = largest_micro_batch(networks.phases, config.global_batch_size, workers, left, allowed)

    summary = [
        f"{networks.num_parameters:,} parameters; a step of {workers} workers x {chosen.num_micro_batches} micro-batches of "
        f"{chosen.micro_batch_size} takes [bold]{duration(chosen.seconds)}[/bold]"
    ]
    for cost in networks.phases:
        often = f", in {cost.often:.0%} of all steps" if cost.often < 1.0 else ""
        summary.append(
            f"  {cost.phase.name}: {cost.flops:,.4g} FLOP and {size(cost.activation_bytes)} of activations a sample{often}"
        )
    rows: list[tuple[str, ...]] = []
    for name in (*ENGINES, AS_SAID):
        if name in refused:
            rows.append((name, "refused"))
            continue
        each, state = stages[name], stages[name].state
        held = (state.parameters, state.gradients, state.optimizer, state.average, state.in_transit, each.activation_bytes)
        fits = "yes" if each.memory_bytes <= room else "no"
        rows.append((name, *map(size, (*held, each.memory_bytes)), fits, size(state.on_host), size(each.sent_bytes)))
    by_engine = table(f"on each of {workers} workers, and what it sends in a step", COLUMNS, rows)

    overlap = "nothing is computed while gradients travel, as they take the same cores"
    if machine.is_gpu:
        overlap = f"behind {BACKWARD_SHARE:.0%} of the last micro-batch gradients travel"
    offloaded = "; what is offloaded travels to the host at no cost" if chosen.state.on_host else ""
    if chosen.state.on_disk:
        offloaded += f", and so do the {size(chosen.state.on_disk)} of each worker that lie on its disk"
    assumptions = [
        f"speed of a step: {speed.how}",
        overlap,
        f"the optimizer reads and writes once all that it steps, at the bandwidth of the memory{offloaded}",
        "memory is that of tensors: allocators waste a tenth and more, and PyTorch takes about 0.5 GB of a GPU",
    ]
    if labels:
        assumptions.append("no sample has a label, which a loss that sums over the classes takes the longest for")
    if len(networks.sizes) > 1 and config.engine.stage == 3:
        assumptions.append("what frozen networks are gathered for in the phases of others is not counted")
    advice = _advice(networks, config, stages, largest, room)
    if not_trained:
        advice.append(f"a fit refuses {', '.join(map(str, not_trained))} workers: {next(iter(not_trained.values()))}")
    return Plan(
        chosen=chosen,
        curve=curve,
        summary=summary,
        tables=[by_engine],
        advice=advice,
        assumptions=assumptions,
        facts={
            "num_parameters": networks.num_parameters,
            "phases": [asdict(cost) for cost in networks.phases],
            "step": chosen.as_dict(),
            "not_trained": not_trained,
            "stages": refused | {name: each.as_dict() for name, each in stages.items()},
            "largest_micro_batch": largest,
        },
    )


def _advice(
    networks: Networks, config: DeepConfig, stages: Mapping[str, Step], largest: Mapping[str, int], room: float
) -> list[str]:
    chosen = stages[AS_SAID]
    lines = [f"as the spec says it {'fits' if chosen.memory_bytes <= room else 'does not fit'}"]
    fitting = [name for name in ENGINES if largest.get(name)]
    plainest = next((name for name in fitting if stages[name].memory_bytes <= room), None)
    if plainest:
        lines.append(f"the plainest engine that fits with these micro-batches: {plainest}")
    elif fitting:
        lines.append(f"{fitting[0]} fits with fit.micro_batch_size={largest[fitting[0]]}")
    else:
        lines.append("no engine fits without offload: more workers, or fit.engine.config with offload_optimizer to cpu")
    if largest[AS_SAID]:
        lines.append(f"the largest micro-batch that fits and divides the global batch: fit.micro_batch_size={largest[AS_SAID]}")
    at_stage3 = config.engine.stage == 3 or plainest == "ZeRO 3"
    if at_stage3 and chosen.num_workers > 1 and max(map(sum, networks.sizes.values())) < LIVE_PARAMETERS:
        lines.append(
            "at stage 3 DeepSpeed keeps parameters whole until a pass ends, up to 1e9 of them, unless "
            "zero_optimization.stage3_max_live_parameters in fit.engine.config says less"
        )
    return lines


def check(model: Any, config: DeepConfig, num_workers: int, machine: Machine) -> None:
    """UserError where a fit would refuse so many workers."""
    workers = max(1, num_workers)
    division = Division(config.global_batch_size, workers, config.micro_batch_size)
    restrictions.check(model, 0, config, division, num_rows=1)
    device = torch.device("cuda" if machine.is_gpu else "cpu")
    engine_class(config).check(Processes(0, workers, device), config)


def _allows(model: Any, config: DeepConfig, num_workers: int, machine: Machine, micro_batch_size: int) -> bool:
    try:
        check(model, config.model_copy(update={"micro_batch_size": micro_batch_size}), num_workers, machine)
    except UserError:
        return False
    return True


def networks_of(spec: Spec, sizes: Sizes, workers: int, machine: Machine) -> Networks:
    """UserError where the configuration does not fit such data, or so many workers."""
    assert isinstance(spec.fit, DeepConfig)
    try:
        with torch.device("meta"):
            model = family_class(spec.family).create(spec.model, sizes.x_shape, sizes.labels, spec.seed)
    except (RuntimeError, NotImplementedError) as error:  # of a family that looks at values of tensors
        why = str(error).strip().splitlines()[0]
        raise UserError(f"the family {spec.family} cannot be made of shapes alone, as a plan has to ({why})") from error
    for network in model.networks().values():
        network.train()
    check(model, spec.fit, workers, machine)
    entries = {name: [p.numel() for p in network.parameters()] for name, network in model.networks().items()}
    return Networks(model, entries, count_phases(model, spec.fit, len(sizes.labels)))


def step(networks: Networks, config: DeepConfig, num_workers: int, machine: Machine, speed: Speed, network: Network) -> Step:
    """UserError where a fit would refuse so many."""
    check(networks.model, config, num_workers, machine)
    workers, engine = max(1, num_workers), engine_class(config)
    mine = Division(config.global_batch_size, workers, config.micro_batch_size).micro_batches(0)
    largest = max(map(len, mine))
    held = {name: engine.memory(config, name, sizes, workers) for name, sizes in networks.sizes.items()}
    state = sum(held.values(), StateBytes())
    traffic, compute_s, optimizer_s = Traffic(), 0.0, 0.0
    for cost in networks.phases:
        name = cost.phase.network
        own = engine.traffic(config, name, networks.sizes[name], workers, len(mine))
        # The counts of the global batch, which every process must know first.
        traffic += (own + Traffic(0.0, workers - 1.0)).times(cost.often)
        compute_s += cost.often * (sum(map(len, mine)) * cost.flops / speed.flops_per_s + len(mine) * speed.micro_batch_s)
        stepped = held[name].on_device - held[name].in_transit + held[name].on_host + held[name].on_disk
        optimizer_s += cost.often * 2.0 * stepped / machine.memory_bytes_per_s
    hidden_s = BACKWARD_SHARE * compute_s / len(mine) if machine.is_gpu else 0.0
    activation_bytes = max(largest * cost.activation_bytes + cost.fixed_bytes for cost in networks.phases)
    return Step(
        num_workers=num_workers,
        memory_bytes=state.on_device + activation_bytes,
        micro_batch_size=largest,
        num_micro_batches=len(mine),
        state=state,
        activation_bytes=activation_bytes,
        sent_bytes=traffic.sent_bytes,
        compute_s=compute_s,
        optimizer_s=optimizer_s,
        waiting_s=max(0.0, network.seconds(traffic, workers) - hidden_s),
    )


def largest_micro_batch(
    phases: Sequence[PhaseCost],
    global_batch_size: int,
    num_workers: int,
    room: float,
    allowed: Callable[[int], bool] = lambda number: True,
) -> int:
    """Whose activations fit into `room`, which divides the global batch and is allowed; 0 where there is none."""

    def fits(number: int) -> bool:
        return all(number * cost.activation_bytes + cost.fixed_bytes <= room for cost in phases)

    numbers = range(1, -(-global_batch_size // max(1, num_workers)) + 1)
    suitable = (number for number in reversed(numbers) if global_batch_size % number == 0 and fits(number) and allowed(number))
    return next(suitable, 0)


def speed_of(spec: Spec, sizes: Sizes, networks: Networks, machine: Machine) -> Speed:
    """Of the training loop itself, here, in steps of few samples and of more; stated where that would be too much."""
    fit = spec.fit
    assert isinstance(fit, DeepConfig)
    rate, besides_s = machine.flops_per_s[fit.precision], MICRO_BATCH_S[machine.is_gpu]
    per_sample = max(1.0, sum(cost.flops for cost in networks.phases))
    mine = min(TRIAL_SAMPLES, fit.global_batch_size, fit.micro_batch_size or TRIAL_SAMPLES)
    large = min(mine, int(TRIAL_FLOPS / (TRIAL_STEPS * per_sample)))
    if machine.is_gpu or large < 4 or 24.0 * networks.num_parameters > TRIAL_BYTES:
        how = f"{machine.achieved:.0%} of {machine.name}'s {rate / 1e12:.3g} TFLOP/s in {fit.precision}"
        return Speed(machine.achieved * rate, besides_s, f"{how}, {1e3 * besides_s:g} ms a micro-batch and phase besides")
    (few, few_s), (more, more_s) = (_fastest_step(spec, sizes, networks, number) for number in (large // 4, large))
    flops_per_s = (more - few) / max(more_s - few_s, 1e-9)
    if not 0.0 < flops_per_s < 4.0 * rate:  # a step of few samples took no less
        flops_per_s = more / more_s
    micro_batch_s = max(0.0, few_s - few / flops_per_s)
    how = f"the training loop in steps of {large // 4} and {large} samples on {machine.name}: {flops_per_s / 1e9:.3g} GFLOP/s"
    return Speed(flops_per_s, micro_batch_s, f"{how}, and {1e3 * micro_batch_s:.2g} ms a micro-batch and phase besides")


def _fastest_step(spec: Spec, sizes: Sizes, networks: Networks, num_samples: int) -> tuple[float, float]:
    """Products and seconds of a phase, in the fastest step after the first, of the plain engine in one process."""
    plain = {"engine": EngineConfig(), "labelled_batch_size": None, "micro_batch_size": None, "compile": False, "eval_every": 0}
    assert isinstance(spec.fit, DeepConfig)
    steps = {"num_steps": TRIAL_STEPS, "global_batch_size": num_samples, "record_every": 1}
    config = spec.fit.model_copy(update=plain | steps)
    # Of one class each, so that every family can take them; zeros and ones, which any likelihood takes.
    numbers, classes = torch.arange(num_samples), torch.arange(len(sizes.labels))
    evidence = torch.where(numbers[:, None] % len(classes) == classes, 0.0, -torch.inf).numpy() if sizes.labels else None
    (block,) = sizes.trial_blocks(1, num_samples, "categories")
    rows = RowSet(block.x.float().numpy(), numbers.numpy(), evidence=evidence)
    with one_thread():
        model = family_class(spec.family).create(spec.model, sizes.x_shape, sizes.labels, spec.seed)
        engine = engine_class(config)(Processes(0, 1, torch.device("cpu")), config)
        engine.prepare(model.networks())
        ended = [time.process_time() for _ in train(model, engine, rows, config, spec.seed)]
    taken = {step: ended[step] - ended[step - 1] for step in range(1, TRIAL_STEPS)}
    fastest = min(taken, key=taken.__getitem__)
    phases = model.phases(fastest)
    flops = num_samples * sum(cost.flops for cost in networks.phases if cost.phase in phases)
    return flops / len(phases), taken[fastest] / len(phases)
