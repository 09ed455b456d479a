"""Plans: what follows from costs, as numbers that can be no others, and what is refused."""

from __future__ import annotations

import json
import re
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gendist.blocks import Leaves
from gendist.blocks.reduction import _merge_siblings, _Node
from gendist.config import Spec, load_spec
from gendist.cost import PassCost, StateBytes, Traffic
from gendist.launch.cli import main
from gendist.planning import plan_of
from gendist.planning.answer import Plan
from gendist.planning.counting import PhaseCost
from gendist.planning.deep_plan import largest_micro_batch
from gendist.planning.machines import GPUS, Machine, Network, network, this_machine
from gendist.planning.passes import Work, iteration, num_nodes
from gendist.planning.plan import bend_of, efficiency
from gendist.protocols import Phase, UserError

WIRES = Network(8, 1e9, 50e-6, 1e9, 100e-6)


def work(num_leaves: int = 100, statistics_bytes: int = 10_000, **changes: float) -> Work:
    plain = Work(
        leaves=Leaves(tuple(1000 * i for i in range(num_leaves + 1))),
        max_leaves_per_run=1000,
        cost=PassCost(0.0, statistics_bytes, parameters_bytes=5_000),
        row_bytes=80.0,
        working_bytes=1e6,
        row_s=1e-5,
        merge_s=1e-5,
        m_step_s=1e-3,
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


def test_an_iteration_is_its_parts_and_no_more_workers_are_busy_than_there_are_leaves():
    one, hundred, thousand = (iteration(work(), number, WIRES) for number in (1, 100, 1000))
    assert one.compute_s == pytest.approx(100_000 * 1e-5)
    assert hundred.compute_s == pytest.approx(one.compute_s / 100)
    assert thousand.compute_s == hundred.compute_s
    assert one.seconds == one.compute_s + one.tasks_s + one.transfer_s + one.merge_s + one.m_step_s
    assert iteration(work(), 0, WIRES).sent_bytes == 0
    assert iteration(work(num_restarts=3), 4, WIRES).sent_bytes == 3 * iteration(work(), 4, WIRES).sent_bytes


@pytest.mark.parametrize(("start", "stop"), [(0, 1), (0, 8), (3, 8), (5, 6), (7, 61), (0, 100), (64, 96)])
def test_nodes_are_those_of_the_reduction(start, stop):
    class Nothing:
        def merge(self, other: object) -> Nothing:
            return self

    assert num_nodes(start, stop) == len(_merge_siblings(_Node(leaf, 0, Nothing()) for leaf in range(start, stop)))


def test_efficiency_never_passes_one_and_bends_where_doubling_stops_to_pay():
    numbers = [2**i for i in range(10)]
    for changes in (
        {},
        {"num_leaves": 127},
        {"statistics_bytes": 10**7},
        {"share_held_out": 0.2},
        {"num_passes": 2, "once_s": 0.1},
    ):
        seconds = [iteration(work(**changes), number, WIRES).seconds for number in numbers]
        shares = efficiency(numbers, seconds)
        assert shares[0] == 1.0
        assert all(share <= 1.0 + 1e-12 for share in shares)
    assert bend_of([1, 2, 4, 8], [8.0, 4.0, 2.5, 2.0]) == 2 + 2
    assert bend_of([1, 2, 4], [4.0, 2.0, 1.0]) is None


def test_a_message_takes_latency_and_bandwidth_and_between_nodes_more():
    wires = network(workers_per_node=4, is_gpu=False, gbits=8.0, latency_us=200.0)
    traffic = Traffic.ring(1e9, 4).times(2)
    assert traffic == Traffic(1.5e9, 6)
    assert wires.seconds(traffic, 1) == 0.0
    assert wires.seconds(traffic, 4) == pytest.approx(1.5 + 6 * 50e-6)
    assert wires.seconds(traffic, 8) == pytest.approx(1.5 + 6 * 200e-6)
    assert StateBytes(1.0, 2.0) + StateBytes(1.0, on_host=3.0) == StateBytes(2.0, 2.0, on_host=3.0)


@pytest.fixture(scope="module")
def measured() -> Machine:
    return this_machine()


@pytest.fixture(autouse=True)
def _measured_once(measured, monkeypatch):
    monkeypatch.setattr("gendist.planning.plan.this_machine", lambda: measured)


LARGE = "configs/vae_1b.yaml"


@pytest.fixture(scope="module")
def large():
    began = time.process_time()
    plan = plan_of(load_spec(LARGE), 8, gpus_per_node=8)
    return plan.facts, time.process_time() - began


def test_a_thousand_million_parameters_are_planned_in_seconds(large):
    facts, seconds = large
    assert seconds < 60.0
    assert facts["num_parameters"] == 1_052_264_196


def test_it_fits_as_the_comment_of_its_spec_says(large):
    facts, _ = large
    comment = " ".join(line.lstrip("# ") for line in Path(LARGE).read_text().splitlines() if line.startswith("#"))
    stages = facts["stages"]
    for said, num_bytes in (
        (r"a sample takes ([\d.]+) GB", facts["phases"][0]["activation_bytes"]),
        (r"weights in bfloat16, ([\d.]+) GB", facts["step"]["activation_bytes"]),
        (r"([\d.]+) GB on every card by ddp", stages["ddp"]["memory_bytes"]),
        (r"([\d.]+) GB at stage 3,", stages["ZeRO 3"]["memory_bytes"]),
    ):
        (number,) = re.findall(said, comment)
        assert float(number) == round(num_bytes / 1e9, len(number.partition(".")[2]))
    in_order = [facts["stages"][name]["memory_bytes"] for name in ("ddp", "ZeRO 1", "ZeRO 2", "ZeRO 3")]
    assert in_order[0] > GPUS["h100"].memory_bytes > in_order[3]
    assert facts["step"]["state"]["on_host"] > 0
    assert in_order == sorted(in_order, reverse=True)
    assert all(share <= 1.0 for share in facts["efficiency"])
    assert facts["largest_micro_batch"]["as said"] == 224
    phases = [PhaseCost(**cost) for cost in facts["phases"]]
    state_bytes = facts["step"]["memory_bytes"] - facts["step"]["activation_bytes"]
    of_24, of_1 = (largest_micro_batch(phases, 1792, 8, memory_bytes - state_bytes) for memory_bytes in (24e9, 1e9))
    assert of_1 == 0 < of_24 < 100


def run(monkeypatch, capsys, *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["gendist", "plan", *arguments])
    code = 0
    try:
        main()
    except SystemExit as exit:
        code = int(exit.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


def test_the_command_prints_within_100_columns_and_writes_the_same_for_programs(monkeypatch, capsys, tmp_path):
    out = tmp_path / "plan.json"
    code, printed, _ = run(monkeypatch, capsys, "configs/gmm_digits.yaml", "--workers", "4", "--out", str(out))
    assert code == 0
    assert max(map(len, printed.splitlines())) <= 100
    assert "assumed:" in printed
    content = json.loads(out.read_text())
    assert content["num_rows"] == 1797
    assert content["efficiency"][0] == 1.0
    assert content["iteration"]["num_workers"] == 4


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("configs/gmm_parquet.yaml", "data.path=nowhere.parquet"), "--rows and --features"),
        (("configs/gmm_digits.yaml", "--gpus-per-node", "8", "--gpu", "abacus"), "there are a100, h100, h200"),
        (("configs/vae_digits.yaml", "--workers", "4096"), "fit.global_batch_size"),
        (("configs/nothing.yaml",), "no such file"),
        (("configs/gmm_digits.yaml", "--workers", "-1"), "workers"),
        (("configs/gmm_digits.yaml", "--gpus-per-node", "8", "--workers-per-node", "4"), "leave one of them out"),
        (
            ("configs/gmm_parquet.yaml", "data.path=nowhere.parquet", "data.label=y", "--rows", "9", "--features", "2"),
            "data.labels=",
        ),
    ],
)
def test_what_cannot_be_planned_is_one_line(monkeypatch, capsys, arguments, said):
    code, _, error = run(monkeypatch, capsys, *arguments)
    assert code == 2
    assert said in error
    assert len(error.strip().splitlines()) == 1


def test_a_family_that_does_not_say_what_it_costs_is_told_so(monkeypatch, counter):
    spec = load_spec({"name": "x", "family": counter, "model": {}})
    with pytest.raises(ValueError, match="pass_cost"):
        plan_of(spec, 2, num_rows=1000, num_features=4)


def test_one_whose_networks_cannot_be_made_of_shapes_is_told_so(toy):
    spec = load_spec({"name": "x", "family": toy, "model": {}, "fit": {"global_batch_size": 8}})
    with pytest.raises(ValueError, match="of shapes alone"):
        plan_of(spec, 2, num_rows=1000, num_features=4)


def test_one_line_says_what_stage_3_holds_of_smaller_networks():
    spec = load_spec("configs/vae_digits.yaml", ["fit.engine={kind: deepspeed, zero_stage: 3}"])
    small = plan_of(spec, 4, gpus_per_node=8)
    assert sum("stage3_max_live_parameters" in line for line in small.advice) == 1
    alone = plan_of(spec, 1, gpus_per_node=8)
    assert not any("stage3_max_live_parameters" in line for line in alone.advice)


NETWORK = {"hidden_sizes": [16]}


def small(family: str, model: dict, fit: dict, data: dict | None = None) -> Spec:
    content = {
        "name": "x",
        "family": family,
        "model": model,
        "data": {"path": "/nowhere/x.parquet", **(data or {})},
        "fit": fit,
    }
    return load_spec(content)


def autoencoder(zero_stage: int | None, **fit: Any) -> Spec:
    engine = {"kind": "ddp"} if zero_stage is None else {"kind": "deepspeed", "zero_stage": zero_stage}
    return small("vae", {"latent_dim": 2, "encoder": NETWORK, "decoder": NETWORK}, {"engine": engine, **fit})


def numbers_of(plan: Plan) -> list[int]:
    return [each["num_workers"] for each in plan.facts["curve"]]


def test_what_a_fit_refuses_is_refused():
    """Of 10 samples one by one, stage 2 needs as many on each process: of 8, some have one and some two."""
    with pytest.raises(ValueError, match="a sample in every micro-batch of every process"):
        plan_of(autoencoder(2, global_batch_size=10, micro_batch_size=1), 8, num_rows=1000, num_features=20)
    with pytest.raises(ValueError, match="float16 needs a GPU"):
        plan_of(autoencoder(None, precision="float16"), 2, num_rows=1000, num_features=20)
    spec = autoencoder(None, precision="float16")
    assert plan_of(spec, 2, gpus_per_node=8, num_rows=1000, num_features=20).facts["step"]["num_workers"] == 2


def test_an_engine_that_cannot_train_so_is_refused_in_its_row(capsys):
    plan = plan_of(autoencoder(None, global_batch_size=10, micro_batch_size=1), 8, num_rows=1000, num_features=20)
    for name, stage in plan.facts["stages"].items():
        assert isinstance(stage, str) == (name in ("ZeRO 2", "ZeRO 3")), name
        assert (name in plan.facts["largest_micro_batch"]) == isinstance(stage, dict)
    plan.show()
    assert capsys.readouterr().out.count("refused") == 2
    with_channels_last = plan_of(autoencoder(None, channels_last=True), 2, num_rows=1000, num_features=20).facts["stages"]
    assert [name for name, stage in with_channels_last.items() if isinstance(stage, str)] == ["ZeRO 1", "ZeRO 2", "ZeRO 3"]


def test_the_curve_has_the_numbers_of_workers_that_a_fit_takes_and_says_why_it_ends():
    plan = plan_of(autoencoder(2, global_batch_size=10, micro_batch_size=1), 5, num_rows=1000, num_features=20)
    assert numbers_of(plan) == [1, 2, 5]
    assert sorted(plan.facts["not_trained"]) == [4, 8, 16]
    assert any("refuses 4, 8, 16 workers: fit.engine.zero_stage" in line for line in plan.advice)
    labels = {"label": "y", "labels": [0, 1]}
    for matching, expected in (("batch", [1]), ("pairs", [1, 2, 4, 8, 16])):
        model = {"latent_dim": 2, "labels": "semi_supervised", "feature_matching": matching, "penalty": "none"}
        spec = small("gan", {**model, "generator": NETWORK, "discriminator": NETWORK}, {"global_batch_size": 64}, labels)
        plan = plan_of(spec, 1, num_rows=1000, num_features=20)
        assert numbers_of(plan) == expected
        assert any("refuses" in line and "feature matching" in line for line in plan.advice) == (matching == "batch")
        assert any("twice as many" in line for line in plan.advice) == (matching == "pairs")
    beyond = plan_of(autoencoder(None, global_batch_size=8), 4, num_rows=1000, num_features=20)
    assert numbers_of(beyond) == [1, 2, 4, 8]
    assert any("refuses 16 workers: fit.global_batch_size 8" in line for line in beyond.advice)


def test_a_micro_batch_that_a_fit_refuses_is_not_advised():
    (phase,) = [PhaseCost(Phase("p", "p"), flops=1.0, activation_bytes=1.0, fixed_bytes=0.0, often=1.0)]
    assert largest_micro_batch([phase], 12, 1, 6.5) == 6
    assert largest_micro_batch([phase], 12, 1, 6.5, lambda number: number < 6) == 4
    assert largest_micro_batch([phase], 12, 1, 6.5, lambda number: number > 6) == 0


def test_pieces_of_a_long_sequence_are_tried_as_pieces():
    content = {"name": "x", "family": "hmm", "model": {"num_states": 3}, "data": {"image_shape": [40_000, 2]}}
    plan = plan_of(load_spec(content), 2, num_rows=40_000)
    assert plan.facts["num_passes"] == 2
    assert "2 blocks" in plan.assumptions[0]


def test_data_that_are_not_there_are_named_before_what_they_would_have_told():
    spec = load_spec(
        {
            "name": "absent",
            "family": "gan",
            "model": {"latent_dim": 2},
            "data": {"path": "nowhere/at_all.parquet", "label": "y", "image_shape": [8, 8]},
        }
    )
    with pytest.raises(UserError, match=r"nowhere/at_all\.parquet.*number of classes.*data\.labels"):
        plan_of(spec, workers=2)
