"""What of a user's own DeepSpeed file is passed on, and what of it contradicts the spec."""

from __future__ import annotations

import json

import pytest

from gendist.protocols import UserError
from gendist.train.config import DeepConfig
from gendist.train.deepspeed_config import merged, read_user_config

WORLD_SIZE = 3
SPEC = {
    "global_batch_size": 24,
    "micro_batch_size": 4,
    "optimizer": {"gradient_clipping": 0.5},
    "precision": "bfloat16",
    "engine": {"kind": "deepspeed", "zero_stage": 2},
}

STAGE_3 = {"kind": "deepspeed", "zero_stage": 3}
NVME = {"device": "nvme", "nvme_path": "/scratch"}


def merge(user, num_parameters=10_000, **changes):
    config = DeepConfig.model_validate(SPEC | changes)
    return merged(user, config, config.optimizer, num_parameters, WORLD_SIZE)


def test_what_it_does_not_say_comes_from_the_spec():
    own = merge({})
    assert own["zero_optimization"]["stage"] == 2
    assert own["gradient_clipping"] == 0.5


def test_no_clipping_is_written_down_since_deepspeed_clips_unless_told_not_to():
    assert merge({}, optimizer={})["gradient_clipping"] == 0.0


def test_buckets_are_no_larger_than_the_network():
    for numel in (10, 7_999, 10**9):
        zero = merge({}, num_parameters=numel)["zero_optimization"]
        for key in ("reduce_bucket_size", "allgather_bucket_size"):
            assert zero[key] % 2 == 0
            assert zero[key] <= max(2 * numel, 1000)


def test_places_buckets_and_communication_pass_through():
    user = {
        "communication_data_type": "bf16",
        "wall_clock_breakdown": True,
        "zero_optimization": {"offload_optimizer": {"device": "cpu"}, "reduce_bucket_size": 12, "overlap_comm": False},
    }
    own = merge(user)
    assert own["communication_data_type"] == "bf16"
    assert own["wall_clock_breakdown"] is True
    assert user["zero_optimization"].items() <= own["zero_optimization"].items()


def test_what_agrees_with_the_spec_may_be_said_twice_and_auto_agrees():
    user = {
        "train_batch_size": 24,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": "auto",
        "optimizer": "auto",
        "bf16": {"enabled": True},
        "fp16": {"enabled": False},
        "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"},
    }
    assert merge(user) == merge({})


CONTRADICTIONS = {
    "train_batch_size": ({"train_batch_size": 32}, "32", "24"),
    "train_micro_batch_size_per_gpu": ({"train_micro_batch_size_per_gpu": 8}, "8", "4"),
    "gradient_accumulation_steps": ({"gradient_accumulation_steps": 1}, "1", "2"),
    "gradient_clipping": ({"gradient_clipping": 1.0}, "1.0", "0.5"),
    "gradient_allreduce_op": ({"gradient_allreduce_op": "sum"}, "sum", "mean"),
    "optimizer": ({"optimizer": {"type": "Lion"}}, "Lion", "adam"),
    "scheduler": ({"scheduler": {"type": "WarmupLR"}}, "WarmupLR", "constant"),
    "bf16.enabled": ({"bf16": {"enabled": False}}, "false", "bfloat16"),
    "fp16.enabled": ({"fp16": {"enabled": True}}, "true", "bfloat16"),
    "zero_optimization.stage": ({"zero_optimization": {"stage": 3}}, "3", "2"),
    "zero_optimization.zero_quantized_gradients": (
        {"zero_optimization": {"zero_quantized_gradients": True}}, "true", "False"
    ),
    "zero_optimization.offload_optimizer.ratio": (
        {"zero_optimization": {"offload_optimizer": {"device": "cpu", "ratio": 0.3}}}, "0.3", "1.0"
    ),
}  # fmt: skip


@pytest.mark.parametrize("key", CONTRADICTIONS)
def test_a_contradiction_names_the_key_and_both_values(key):
    user, *values = CONTRADICTIONS[key]
    with pytest.raises(UserError) as raised:
        merge(user)
    for expected in (key, *values):
        assert expected in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("user", "words"),
    [
        ({"zero_optimisation": {}}, ["zero_optimisation", "zero_optimization"]),
        ({"tensor_parallel": {"autotp_size": 2}}, ["tensor_parallel"]),
        ({"zero_optimization": 3}, ["zero_optimization", "block"]),
        ({"zero_optimization": {"offload_param": {"device": "cpu"}}}, ["offload_param", "3", "2"]),
        ({"zero_optimization": {"offload_optimizer": {"device": "moon"}}}, ["offload_optimizer", "moon", "cpu", "nvme"]),
        ({"zero_optimization": {"offload_optimizer": NVME}}, ["offload_optimizer", "nvme", "stage 3", "2", "cpu"]),
        ({"zero_optimization": {"offload_param": NVME}}, ["offload_param", "nvme", "3", "2"]),
    ],
)
def test_what_would_be_ignored_or_cannot_be_is_refused(user, words):
    with pytest.raises(UserError) as raised:
        merge(user)
    assert all(word in str(raised.value) for word in words)


@pytest.mark.parametrize(
    ("block", "words"),
    [
        ({"device": "nvme"}, ["nvme_path", "folder"]),
        ({**NVME, "nvme_path": None}, ["nvme_path", "folder"]),
        ({**NVME, "fast_init": True}, ["fast_init", "leave the key out"]),
        ({**NVME, "buffer_count": 3}, ["buffer_count is 3", "4"]),
        ({**NVME, "buffer_count": 11, "pipeline_read": True, "pipeline_write": True}, ["buffer_count is 11", "12"]),
    ],
)
def test_what_nvme_lacks_is_refused(block, words):
    with pytest.raises(UserError) as raised:
        merge({"zero_optimization": {"offload_optimizer": block}}, engine=STAGE_3, ema=0.1)
    assert all(word in str(raised.value) for word in words)
    assert "\n" not in str(raised.value)


def test_buffers_of_nvme_hold_what_is_kept_and_are_no_larger_than_the_network():
    user = {"zero_optimization": {"offload_optimizer": NVME, "offload_param": NVME}}
    for changes, buffer_count in (({}, 3), ({"ema": 0.1}, 4), ({"optimizer": {"kind": "sgd", "gradient_clipping": 0.5}}, 1)):
        zero = merge(user, engine=STAGE_3, **changes)["zero_optimization"]
        assert zero["offload_optimizer"] == {**NVME, "buffer_count": buffer_count}
        assert zero["offload_param"] == {**NVME, "buffer_size": -(-10_000 // WORLD_SIZE)}
    zero = merge({"zero_optimization": {"offload_param": {**NVME, "buffer_size": 9}}}, engine=STAGE_3)["zero_optimization"]
    assert zero["offload_param"]["buffer_size"] == 9


@pytest.mark.parametrize("content", [None, "{stage: 2", "[1, 2]"])
def test_a_file_that_is_no_configuration_is_one_line(tmp_path, content):
    path = tmp_path / "zero.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=r"fit\.engine\.config") as raised:
        read_user_config(str(path))
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_file_is_read(tmp_path):
    path = tmp_path / "zero.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    assert merge(read_user_config(str(path))) == merge({})
