"""Micro-batches and their noise are functions of addresses, however the work is divided."""

from __future__ import annotations

import pytest
import torch
from toys import TensorRows

from gendist.noise import Noise
from gendist.protocols import Draw
from gendist.train.batches import Division, moved, noise, training_batches
from gendist.train.order import Order, indices

CPU = torch.device("cpu")


@pytest.mark.parametrize("micro_batch_size", [None, 1, 3, 4, 100])
@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize("global_batch_size", [7, 12, 20])
def test_a_division_covers_every_position_once_and_in_order(global_batch_size, world_size, micro_batch_size):
    division = Division(global_batch_size, world_size, micro_batch_size)
    parts = [division.micro_batches(rank) for rank in range(world_size)]
    assert [position for rank in parts for part in rank for position in part] == list(range(global_batch_size))
    for rank, mine in enumerate(parts):
        assert len(mine) == division.num_micro_batches
        assert sum(map(len, mine)) == len(division.slice(rank))
        assert max(map(len, mine)) <= (micro_batch_size or global_batch_size)
        assert max(map(len, mine)) - min(map(len, mine)) <= 1
        assert len(mine[-1]) > 0  # the one whose backward pass sends the gradients
    sizes = [len(division.slice(rank)) for rank in range(world_size)]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(("world_size", "micro_batch_size"), [(1, None), (1, 5), (2, None), (3, 2)])
def test_each_sample_meets_the_same_noise_on_any_number_of_processes(world_size, micro_batch_size):
    data = TensorRows(torch.arange(30.0)[:, None])
    draws = {"a": Draw("normal", 3), "b": Draw("uniform", 2)}
    step, found = 4, []
    for rank in range(world_size):
        for start, block in training_batches(data, Order(30, 9, 14), step, Division(14, world_size, micro_batch_size), rank):
            assert torch.equal(block.x[:, 0].long(), block.rows)
            drawn = noise(9, "train.phase", draws, start, block.num_rows, CPU)
            found.append(torch.cat([block.x, drawn["a"], drawn["b"]], dim=1))
    expected = [
        indices(30, 9, 14 * step, 14)[:, None].float(),
        Noise(9, "train.phase.a").normal(14 * step, 14, 3).float(),
        Noise(9, "train.phase.b").uniform(14 * step, 14, 2).float(),
    ]
    assert torch.equal(torch.cat(found), torch.cat(expected, dim=1))


def test_a_block_goes_to_a_device_with_all_that_is_computed_with():
    block = TensorRows(torch.ones(2, 3), torch.ones(2), torch.zeros(2, 4)).take(torch.tensor([0, 1]))
    there = moved(block, torch.device("meta"))
    assert (there.x.device.type, there.weights.device.type, there.evidence.device.type) == ("meta",) * 3
    assert there.missing is None
    assert moved(block, CPU) is block
