"""What families and engines say they cost, against counts of what they do."""

from __future__ import annotations

import json
from dataclasses import fields, is_dataclass, replace
from typing import Any

import pytest
import torch
from torch import nn

from gendist.blocks import Leaves, LocalBlocks
from gendist.config import family_class, load_spec
from gendist.cost import StateBytes
from gendist.data.survey import summarize
from gendist.em.start import start_from_data
from gendist.planning.counting import Counter, count_phases
from gendist.planning.em_plan import pass_cost
from gendist.planning.sizes import Sizes
from gendist.protocols import Block, Feature, Phase
from gendist.train.batches import noise
from gendist.training_job import engine_class


def storage_bytes(value: Any) -> int:
    """Of all tensors inside statistics."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, tuple):
        return sum(map(storage_bytes, value))
    if is_dataclass(value):
        return sum(storage_bytes(getattr(value, field.name)) for field in fields(value))
    return 0


PASSES = {
    **{
        f"gmm {kind} {width}": ("gmm", {"num_components": 5, "covariance_type": kind}, width, 0)
        for kind, width in (("full", 7), ("full", 130), ("tied", 7), ("diag", 7), ("spherical", 7))
    },
    **{
        f"naive_bayes {kind}": ("naive_bayes", {"num_classes": 4, "kind": kind}, 9, 0)
        for kind in ("gaussian", "multinomial", "bernoulli", "categorical", "poisson", "mixed")
    },
    "hmm": ("hmm", {"num_states": 6}, 3, 50),
    "hmm mixture": ("hmm", {"num_states": 4, "emission": {"num_components": 3, "covariance_type": "full"}}, 3, 50),
    "hmm categorical": ("hmm", {"num_states": 4, "emission": {"kind": "categorical"}}, 2, 50),
    "hmm long": ("hmm", {"num_states": 4}, 2, 20_000),
}


@pytest.mark.parametrize("name", PASSES)
def test_a_pass_costs_what_its_family_says(name):
    family_name, model, width, length = PASSES[name]
    spec = load_spec({"name": "x", "family": family_name, "model": model})
    features = tuple(Feature(f"x{d}", f"x{d}") for d in range(width))
    num_rows = max(1000, length)
    sizes = Sizes(num_rows, features, (width,), Leaves((0, num_rows)), length=length)
    cost, kind = pass_cost(spec, sizes)
    (block,) = sizes.trial_blocks(1, num_rows, kind)
    summary = replace(summarize(None, block), features=features)
    family = family_class(family_name)
    blocks = LocalBlocks(lambda bounds: [block], Leaves((0, num_rows)))
    fitted = start_from_data(family, spec.model, blocks, summary, (), "random_responsibilities", 0).model
    fitted.e_step(block)  # what is made once for all blocks of a pass
    with Counter() as counter:
        statistics = fitted.e_step(block)
    # A Gaussian keeps the worst row of each block, of up to 8.
    assert storage_bytes(statistics) == pytest.approx(cost.statistics_bytes, abs=8 * 8 * (width + 2))
    assert sum(map(storage_bytes, fitted.tensors().values())) == pytest.approx(
        cost.parameters_bytes,
        abs=8 * (2 * width + 16),  # vectors beside the tables
    )
    if "categorical" not in name:  # whose products are sparse, and not counted
        assert counter.flops / num_rows == pytest.approx(cost.flops_per_row, rel=0.35 if "hmm" in name else 0.02)


SMALL = {"hidden_sizes": [5]}


def tiny(*overrides: str) -> Any:
    content = {
        "name": "x",
        "family": "vae",
        "model": {
            "latent_dim": 3,
            "encoder": {"hidden_sizes": [5]},
            "decoder": {"hidden_sizes": [5]},
            "likelihood": "bernoulli",
        },
        "fit": {"global_batch_size": 8},
    }
    return load_spec(content, overrides)


def on_shapes(spec: Any, shape: tuple[int, ...]) -> Any:
    with torch.device("meta"):
        return family_class(spec.family).create(spec.model, shape, (), 0)


def test_a_small_network_is_counted_as_by_hand():
    """Linear layers 6 -> 5 -> 2 x 3 and 3 -> 5 -> 6; the gradient of the input is not needed."""
    model = on_shapes(tiny(), (6,))
    (cost,) = count_phases(model, tiny().fit, 0)
    layers = [(6, 5), (5, 6), (3, 5), (5, 6)]
    assert sum(p.numel() for p in model.networks()["autoencoder"].parameters()) == sum(a * b + b for a, b in layers)
    forward = sum(2 * a * b for a, b in layers)
    assert cost.flops == 3 * forward - 2 * 6 * 5
    assert cost.often == 1.0


class _Saved:
    """Bytes that autograd keeps in a real run, each storage once."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.own = {p.untyped_storage().data_ptr() for p in parameters}
        self.found: dict[int, torch.UntypedStorage] = {}

    def pack(self, value: torch.Tensor) -> torch.Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in self.own:
            self.found[storage.data_ptr()] = storage  # kept, so that no other takes its place
        return value

    @property
    def num_bytes(self) -> int:
        return sum(storage.nbytes() for storage in self.found.values())


CONVOLUTIONAL = [
    "model.encoder={channels: [8, 16], num_blocks: 1}",
    "model.decoder={channels: [16, 8], num_blocks: 1}",
]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_at_least_what_a_real_run_saves_and_not_much_more(checkpointing):
    said = [f"model.{part}.checkpointing={str(checkpointing).lower()}" for part in ("encoder", "decoder")]
    spec, shape, number = tiny(*CONVOLUTIONAL, *said), (16, 16), 6
    (cost,) = count_phases(on_shapes(spec, shape), spec.fit, 0)
    model = family_class(spec.family).create(spec.model, shape, (), 0)
    phase = model.phases(0)[0]
    saved = _Saved(list(model.networks()["autoencoder"].parameters()))
    drawn = noise(0, "x", model.draws(phase), 0, number)
    batch = Block(torch.full((number, 256), 0.5), torch.arange(number))
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda value: value):
        loss = model.loss(phase, batch, drawn, 0)
    assert loss.terms
    counted = number * cost.activation_bytes + cost.fixed_bytes
    assert saved.num_bytes <= 1.02 * counted
    assert counted < (2.5 if not checkpointing else 6.0) * saved.num_bytes  # of what is saved again within a block


def test_checkpointing_and_half_precision_take_less_memory_and_checkpointing_more_products():
    checkpointed = [f"model.{part}.checkpointing=true" for part in ("encoder", "decoder")]

    def counted(*overrides: str) -> Any:
        spec = tiny(*CONVOLUTIONAL, *overrides)
        return count_phases(on_shapes(spec, (16, 16)), spec.fit, 0)[0]

    plain, again, half = counted(), counted(*checkpointed), counted("fit.precision=bfloat16")
    assert again.activation_bytes < plain.activation_bytes
    assert 1.1 * plain.flops < again.flops < 1.4 * plain.flops
    assert half.activation_bytes < 0.8 * plain.activation_bytes
    assert half.flops == plain.flops


ENGINES = [{"kind": "ddp"}, *({"kind": "deepspeed", "zero_stage": stage} for stage in range(4))]


def test_memory_falls_with_the_stage_and_adds_up():
    spec, sizes = tiny(), [10_000_000] * 4
    held = []
    for engine in ENGINES:
        config = tiny(f"fit.engine={engine}", "fit.ema=0.1").fit
        held.append(engine_class(config).memory(config, "autoencoder", sizes, 8))
    plain, zero0, *others = (each.on_device - each.in_transit for each in held)
    assert plain == zero0 == 20 * sum(sizes)
    assert plain > others[0] >= others[1] > others[2] == 24 * sum(sizes) / 8
    assert held[1].on_device > held[2].on_device > held[3].on_device
    assert spec.fit.engine.kind == "ddp"


def test_what_is_offloaded_lies_elsewhere(tmp_path):
    """On NVMe is what is large; gradients and buffers are on the host."""
    sizes, num_processes = [3_000_000, 100, 3_000_000, 200_000], 2
    file = tmp_path / "zero.json"
    spec = tiny(f"fit.engine={{kind: deepspeed, zero_stage: 3, config: {file}}}", "fit.ema=0.1")

    def held(**zero: Any) -> StateBytes:
        file.write_text(json.dumps({"zero_optimization": {"sub_group_size": 10**6, **zero}}))
        return engine_class(spec.fit).memory(spec.fit, "autoencoder", sizes, num_processes)

    cpu, nvme = {"device": "cpu"}, {"device": "nvme", "nvme_path": "/scratch"}
    share, small = 4 * sum(sizes) / num_processes, 4 * 200_000 / num_processes
    none, half, all_of_it = held(), held(offload_optimizer=cpu), held(offload_optimizer=cpu, offload_param=cpu)
    assert none.on_host == none.on_disk == half.on_disk == all_of_it.on_disk == 0
    assert half.on_host == none.gradients + none.optimizer + none.average == 5 * share
    assert all_of_it.on_host == 6 * share

    half = held(offload_optimizer=nvme)
    largest = 4 * 3_000_100 / num_processes  # of three sub-groups, the last of which is small
    assert half.on_disk == pytest.approx(4 * (share - small))
    assert half.on_host == pytest.approx(share + 4 * small + 4 * largest)
    assert half.parameters == none.parameters == share

    buffers = 5 * share
    by_default = held(offload_optimizer=nvme, offload_param=nvme)
    assert by_default.on_disk == half.on_disk  # DeepSpeed keeps thousand million parameters on the host
    assert by_default.on_host == pytest.approx(half.on_host + share + buffers)
    all_of_it = held(offload_optimizer=nvme, offload_param={**nvme, "max_in_cpu": 0})
    assert all_of_it.on_disk == pytest.approx(half.on_disk + 2 * 4 * 3_000_000 / num_processes)
    assert all_of_it.on_device == all_of_it.in_transit
    coarse = held(offload_optimizer=nvme, sub_group_size=10**9)
    assert coarse.on_disk == pytest.approx(4 * share)
    assert coarse.on_host == pytest.approx(share + 4 * share)


def test_every_phase_of_every_loss_is_counted():
    spec = load_spec({
        "name": "x",
        "family": "gan",
        "model": {"latent_dim": 3, "penalty": "r1", "penalty_every": 4},
        "fit": {"global_batch_size": 8},
    })  # fmt: skip
    costs = {cost.phase: cost for cost in count_phases(on_shapes(spec, (8, 8)), spec.fit, 0)}
    assert {phase.network for phase in costs} == {"generator", "discriminator"}
    assert sorted(cost.often for cost in costs.values()) == [0.25, 1.0, 1.0]
    assert all(cost.flops > 0 and cost.activation_bytes > 0 for cost in costs.values())
    assert isinstance(next(iter(costs)), Phase)


def test_what_is_counted_leaves_summaries_as_they_are():
    block = Block(torch.ones(4, 2).double(), torch.arange(4))
    with Counter() as counter:
        summarize(None, block)
    assert counter.live_bytes <= counter.peak_bytes
