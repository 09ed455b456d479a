"""Micro-batches and their noise are functions of addresses, however the work is divided."""

from __future__ import annotations

import threading

import pytest
import torch
from toys import TensorRows

from gendist.noise import Noise
from gendist.protocols import Draw, Phase
from gendist.train.batches import Division, MicroBatches, ahead, moved
from gendist.train.order import Order, indices

CPU = torch.device("cpu")
PHASE = Phase("phase", "network")


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


class Drawing:
    """What a model says of its draws."""

    def phases(self, step):
        return [PHASE]

    def draws(self, phase):
        return {"a": Draw("normal", 3), "b": Draw("uniform", 2)}


@pytest.mark.parametrize(("world_size", "micro_batch_size"), [(1, None), (1, 5), (2, None), (3, 2)])
def test_each_sample_meets_the_same_noise_on_any_number_of_processes(world_size, micro_batch_size):
    data = TensorRows(torch.arange(30.0)[:, None])
    step, found = 4, []
    for rank in range(world_size):
        division = Division(14, world_size, micro_batch_size)
        for batch in MicroBatches(Drawing(), data, Order(30, 9, 14), division, rank, 9)(step):
            assert torch.equal(batch.block.x[:, 0].long(), batch.block.rows)
            drawn = batch.noise[PHASE]
            found.append(torch.cat([batch.block.x, drawn["a"], drawn["b"]], dim=1))
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


def test_what_is_made_ahead_is_what_was_asked_for_and_one_step_more_at_most():
    made, following = [], threading.Event()

    def make(step):
        made.append((step, threading.current_thread() is not threading.main_thread()))
        if step == 9:
            following.set()
        return 10 * step

    with ahead(make, 1) as at:
        assert [at(step) for step in (5, 6, 7)] == [50, 60, 70]
        assert at(8) == 80
        assert following.wait(10.0)  # while nobody asks for it
    assert made == [(step, True) for step in (5, 6, 7, 8, 9)]


def test_what_fails_ahead_fails_where_it_is_asked_for():
    def make(step):
        if step == 2:
            raise OSError("gone")
        return step

    with ahead(make, 2) as at:
        assert at(1) == 1
        with pytest.raises(OSError, match="gone"):
            at(2)
