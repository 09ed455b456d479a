"""The plan of a fit by gradient: phases are counted on shapes, engines say what they hold and send."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch

from gendist.config import Spec, family_class
from gendist.cost import StateBytes, Traffic
from gendist.one_thread import one_thread
from gendist.planning.answer import Grid, OnWorkers, duration, size
from gendist.planning.counting import PhaseCost, count_phases, sizes_of
from gendist.planning.machines import Machine, Network
from gendist.planning.sizes import Sizes
from gendist.protocols import Block, UserError
from gendist.train import restrictions
from gendist.train.batches import Division
from gendist.train.config import DeepConfig, EngineConfig
from gendist.train.loop import train
from gendist.train.processes import Processes
from gendist.training_job import engine_class

TRIAL_FLOPS, TRIAL_BYTES = 3e10, 1.5e9  # of all steps that are tried; of parameters, gradients and moments
TRIAL_STEPS = 5
LIVE_PARAMETERS = 10**9  # DeepSpeed's stage3_max_live_parameters, where nobody says another
BACKWARD_SHARE = 2 / 3  # of a step's products, behind which gradients travel on a GPU
MICRO_BATCH_S = {True: 5e-3, False: 2e-3}  # of a GPU, of a CPU: what a micro-batch takes besides its products, where not tried


@dataclass(frozen=True)
class Networks:
    """What is known of a model before it is made: the entries of each parameter of each network, and what phases cost."""

    sizes: Mapping[str, list[int]]
    phases: list[PhaseCost]

    @property
    def num_parameters(self) -> int:
        return sum(sum(sizes) for sizes in self.sizes.values())


@dataclass(frozen=True)
class Speed:
    """flops_per_s that a step reaches, and micro_batch_s besides: of each micro-batch of each phase."""

    flops_per_s: float
    micro_batch_s: float
    how: str


@dataclass(frozen=True, kw_only=True)
class Step(OnWorkers):
    """An optimizer step on each of so many processes; waiting_s: of the exchange what no computing hides."""

    PARTS: ClassVar = {"compute": "compute_s", "optimizer": "optimizer_s", "waiting": "waiting_s"}

    micro_batch_size: int
    num_micro_batches: int
    state: StateBytes
    activation_bytes: float
    compute_s: float
    optimizer_s: float
    waiting_s: float


def step(networks: Networks, config: DeepConfig, num_workers: int, machine: Machine, speed: Speed, network: Network) -> Step:
    """UserError where the engine, or the global batch, cannot do with so many."""
    workers = max(1, num_workers)
    division = Division(config.global_batch_size, workers, config.micro_batch_size)
    mine = division.micro_batches(0)
    largest = max(len(batch) for batch in mine)
    engine = engine_class(config)
    state = StateBytes()
    for name, sizes in networks.sizes.items():
        state += engine.memory(config, name, sizes, workers)
    traffic, compute_s, optimizer_s = Traffic(), 0.0, 0.0
    for cost in networks.phases:
        sizes = networks.sizes[cost.phase.network]
        own = engine.traffic(config, cost.phase.network, sizes, workers, len(mine))
        # The counts of the global batch, which every process must know first.
        traffic += (own + Traffic(0.0, workers - 1.0)).times(cost.often)
        compute_s += cost.often * (sum(map(len, mine)) * cost.flops / speed.flops_per_s + len(mine) * speed.micro_batch_s)
        held = engine.memory(config, cost.phase.network, sizes, workers)
        optimizer_s += cost.often * 2.0 * (held.on_device - held.in_transit + held.on_host) / machine.memory_bytes_per_s
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


def largest_micro_batch(networks: Networks, plain: Step, config: DeepConfig, memory_bytes: float) -> int:
    """That fits and divides the global batch; 0 where not even one sample does."""
    room = memory_bytes - plain.state.on_device
    fits = min(
        (room - cost.fixed_bytes) / cost.activation_bytes if cost.activation_bytes > 0 else float("inf")
        for cost in networks.phases
    )
    mine = -(-config.global_batch_size // max(1, plain.num_workers))
    return max((size for size in range(1, mine + 1) if config.global_batch_size % size == 0 and size <= fits), default=0)


def networks_of(spec: Spec, sizes: Sizes, labels: tuple[Any, ...], workers: int) -> Networks:
    """UserError where the configuration does not fit such data, or so many workers."""
    assert isinstance(spec.fit, DeepConfig)
    try:
        with torch.device("meta"):
            model = family_class(spec.family).create(spec.model, sizes.x_shape, labels, spec.seed)
    except (RuntimeError, NotImplementedError) as error:  # of a family that looks at values of tensors
        why = str(error).strip().splitlines()[0]
        raise UserError(f"the family {spec.family} cannot be made of shapes alone, as a plan has to ({why})") from error
    division = Division(spec.fit.global_batch_size, max(1, workers), spec.fit.micro_batch_size)
    for network in model.networks().values():
        network.train()
    restrictions.check(model, 0, spec.fit, division, max(1, sizes.num_rows))
    entries = {name: sizes_of(network) for name, network in model.networks().items()}
    return Networks(entries, count_phases(model, spec.fit, len(labels)))


@dataclass(frozen=True)
class _Noise:
    """`Rows` of zeros and ones, which any likelihood takes; it notes when each step began."""

    x: torch.Tensor
    evidence: torch.Tensor | None
    began: list[float]

    @property
    def num_rows(self) -> int:
        return len(self.x)

    def take(self, indices: torch.Tensor) -> Block:
        self.began.append(time.process_time())
        return Block(self.x[indices], indices, evidence=None if self.evidence is None else self.evidence[indices])

    def labelled(self) -> torch.Tensor:
        return torch.arange(len(self.x))


def try_steps(spec: Spec, sizes: Sizes, labels: tuple[Any, ...], networks: Networks, machine: Machine) -> Speed:
    """Of the training loop itself, here, in steps of few samples and of more; stated where that would be too much."""
    assert isinstance(spec.fit, DeepConfig)
    per_sample = sum(cost.flops for cost in networks.phases)
    fit = spec.fit
    mine = min(64, Division(fit.global_batch_size, 1, fit.micro_batch_size).slice(0).stop, fit.micro_batch_size or 64)
    large = min(mine, int(TRIAL_FLOPS / (TRIAL_STEPS * max(per_sample, 1.0))))
    rate = machine.achieved * machine.flops_per_s[fit.precision]
    peak, besides_s = machine.flops_per_s[fit.precision] / 1e12, MICRO_BATCH_S[machine.is_gpu]
    how = f"{machine.achieved:.0%} of {machine.name}'s {peak:.3g} TFLOP/s in {fit.precision}"
    how += f", {1e3 * besides_s:g} ms a micro-batch and phase besides"
    stated = Speed(rate, besides_s, how)
    if machine.is_gpu or large < 4 or 24.0 * networks.num_parameters > TRIAL_BYTES:
        return stated
    found = []
    for num_samples in (max(1, large // 4), large):
        seconds, flops, num_phases = _fastest_step(spec, sizes, labels, networks, num_samples)
        found.append((flops, seconds / num_phases, num_phases))
    (few, few_s, num_phases), (more, more_s, _) = found
    flops_per_s = (more - few) / num_phases / max(more_s - few_s, 1e-9)
    if not 0.0 < flops_per_s < 4.0 * machine.flops_per_s[fit.precision]:  # a step of few samples took no less
        flops_per_s = more / num_phases / more_s
    micro_batch_s = max(0.0, few_s - few / num_phases / flops_per_s)
    how = f"the training loop in steps of {large // 4} and {large} samples on {machine.name}: {flops_per_s / 1e9:.3g} GFLOP/s"
    return Speed(flops_per_s, micro_batch_s, f"{how}, and {1e3 * micro_batch_s:.2g} ms a micro-batch and phase besides")


def _fastest_step(
    spec: Spec, sizes: Sizes, labels: tuple[Any, ...], networks: Networks, num_samples: int
) -> tuple[float, float, int]:
    """Seconds, products and phases of one of the steps after the first, of the plain engine in one process."""
    changes = {
        "num_steps": TRIAL_STEPS,
        "global_batch_size": num_samples,
        "labelled_batch_size": None,
        "micro_batch_size": None,
        "engine": EngineConfig(),
        "compile": False,
        "eval_every": 0,
    }
    assert isinstance(spec.fit, DeepConfig)
    config = spec.fit.model_copy(update=changes)
    with one_thread():
        model = family_class(spec.family).create(spec.model, sizes.x_shape, labels, spec.seed)
        engine = engine_class(config)(Processes(0, 1, torch.device("cpu")), config)
        engine.prepare(model.networks())
        x = torch.randint(2, (num_samples, model.num_features), generator=torch.Generator().manual_seed(0)).float()
        evidence = torch.zeros(num_samples, len(labels), dtype=torch.float64) if labels else None
        if evidence is not None:  # of one class each: so that every family can take them
            evidence[:] = -torch.inf
            evidence[torch.arange(num_samples), torch.arange(num_samples) % len(labels)] = 0.0
        rows = _Noise(x, evidence, [])
        for _ in train(model, engine, rows, config, spec.seed):
            pass
        ended = time.process_time()
    seconds = [after - before for before, after in zip(rows.began, [*rows.began[1:], ended], strict=True)]
    kinds = Counter(tuple(model.phases(number)) for number in range(1, TRIAL_STEPS))
    phases = kinds.most_common(1)[0][0]
    fastest = min(seconds[number] for number in range(1, TRIAL_STEPS) if tuple(model.phases(number)) == phases)
    by_phase = {cost.phase: cost.flops for cost in networks.phases}
    return fastest, num_samples * sum(by_phase[phase] for phase in phases), len(phases)


ENGINES: Mapping[str, dict[str, Any]] = {
    "ddp": {"kind": "ddp"},
    **{f"ZeRO {stage}": {"kind": "deepspeed", "zero_stage": stage} for stage in (1, 2, 3)},
}


COLUMNS = ("engine", "params", "grads", "optim.", "EMA", "transit", "activ.", "total", "fits", "on host", "sent")


@dataclass(frozen=True)
class DeepPlan:
    """An `Answer`. stages: a step by engine, without a user's DeepSpeed file, and "as said", or why an engine refuses;
    micro_batch: the largest of each that fits."""

    networks: Networks
    speed: Speed
    chosen: Step
    stages: dict[str, Step | str]
    curve: list[Step]
    micro_batch: dict[str, int]
    assumptions: list[str]
    is_stage3: bool

    def summary(self, machine: Machine) -> list[str]:
        step = self.chosen
        lines = [
            f"{self.networks.num_parameters:,} parameters; a step of {step.num_workers} workers x {step.num_micro_batches} "
            f"micro-batches of {step.micro_batch_size} takes [bold]{duration(step.seconds)}[/bold]"
        ]
        for cost in self.networks.phases:
            often = f", in {cost.often:.0%} of all steps" if cost.often < 1.0 else ""
            held = f"{cost.flops:,.4g} FLOP and {size(cost.activation_bytes)} of activations a sample"
            lines.append(f"  {cost.phase.name}: {held}{often}")
        return lines

    def memory(self, machine: Machine) -> Grid:
        rows: list[tuple[str, ...]] = []
        for name, step in self.stages.items():
            if isinstance(step, str):
                rows.append((name, "refused"))
                continue
            state, fits = step.state, "yes" if step.memory_bytes <= machine.memory_bytes else "no"
            held = (state.parameters, state.gradients, state.optimizer, state.average, state.in_transit)
            sizes = map(size, (*held, step.activation_bytes, step.memory_bytes))
            rows.append((name, *sizes, fits, size(state.on_host), size(step.sent_bytes)))
        return Grid(f"on each of {self.chosen.num_workers} workers, and what it sends in a step", COLUMNS, rows)

    def advice(self, machine: Machine) -> list[str]:
        room = machine.memory_bytes
        lines = [f"as the spec says it {'fits' if self.chosen.memory_bytes <= room else 'does not fit'}"]
        fitting = [name for name in ENGINES if self.micro_batch.get(name)]
        steps = {name: step for name in fitting if isinstance(step := self.stages[name], Step)}
        plainest = next((name for name, step in steps.items() if step.memory_bytes <= room), None)
        if plainest:
            lines.append(f"the plainest engine that fits with these micro-batches: {plainest}")
        elif fitting:
            lines.append(f"{fitting[0]} fits with fit.micro_batch_size={self.micro_batch[fitting[0]]}")
        else:
            lines.append("no engine fits without offload: more workers, or fit.engine.config with offload_optimizer to cpu")
        if largest := self.micro_batch["as said"]:
            lines.append(f"the largest micro-batch that fits and divides the global batch: fit.micro_batch_size={largest}")
        at_stage_3 = self.chosen if self.is_stage3 else steps["ZeRO 3"] if plainest == "ZeRO 3" else None
        largest_network = max(map(sum, self.networks.sizes.values()))
        if at_stage_3 and at_stage_3.num_workers > 1 and largest_network < LIVE_PARAMETERS:
            lines.append(
                "at stage 3 DeepSpeed keeps parameters whole until a pass ends, up to 1e9 of them, unless "
                "zero_optimization.stage3_max_live_parameters in fit.engine.config says less"
            )
        return lines

    def as_dict(self) -> dict[str, Any]:
        stages = {name: each if isinstance(each, str) else each.as_dict() for name, each in self.stages.items()}
        return {
            "num_parameters": self.networks.num_parameters,
            "phases": [asdict(cost) for cost in self.networks.phases],
            "step": self.chosen.as_dict(),
            "stages": stages,
            "largest_micro_batch": self.micro_batch,
        }


def deep_plan(
    spec: Spec, sizes: Sizes, labels: tuple[Any, ...], machine: Machine, network: Network, workers: int, counts: list[int]
) -> DeepPlan:
    config = spec.fit
    assert isinstance(config, DeepConfig)
    networks = networks_of(spec, sizes, labels, workers)
    speed = try_steps(spec, sizes, labels, networks, machine)
    chosen = step(networks, config, workers, machine, speed, network)
    stages: dict[str, Step | str] = {}
    micro_batch = {}
    for name, engine in ENGINES.items():
        other = config.model_copy(update={"engine": EngineConfig(**engine)})
        try:
            stages[name] = each = step(networks, other, workers, machine, speed, network)
            micro_batch[name] = largest_micro_batch(networks, each, other, machine.memory_bytes)
        except UserError as error:
            stages[name] = str(error)
    stages["as said"] = chosen
    micro_batch["as said"] = largest_micro_batch(networks, chosen, config, machine.memory_bytes)
    counts = [count for count in counts if count <= config.global_batch_size]
    curve = [step(networks, config, count, machine, speed, network) for count in counts]
    overlap = f"behind {BACKWARD_SHARE:.0%} of the last micro-batch gradients travel" if machine.is_gpu else (
        "nothing is computed while gradients travel, as they take the same cores"
    )  # fmt: skip
    assumptions = [
        f"speed of a step: {speed.how}",
        overlap,
        "the optimizer reads and writes once all that it steps, at the bandwidth of the memory"
        + ("; what is offloaded travels to the host at no cost" if chosen.state.on_host else ""),
        "memory is that of tensors: allocators waste a tenth and more, and PyTorch takes about 0.5 GB of a GPU",
    ]
    if labels:
        assumptions.append("no sample has a label, which a loss that sums over the classes takes the longest for")
    is_stage3 = config.engine.kind == "deepspeed" and config.engine.zero_stage == 3
    if len(networks.sizes) > 1 and is_stage3:
        assumptions.append("what frozen networks are gathered for in the phases of others is not counted")
    return DeepPlan(networks, speed, chosen, stages, curve, micro_batch, assumptions, is_stage3)
