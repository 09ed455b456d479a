"""The order of samples and their noise are functions of addresses, however the work is divided."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from toys import TensorRows

from gendist.noise import Noise
from gendist.protocols import Draw
from gendist.train import batches
from gendist.train.batches import Division, indices, moved, noise, training_batches

CPU = torch.device("cpu")


@pytest.fixture(params=["sorted", "feistel"])
def _method(request, monkeypatch):
    """Small data take the one way, large data the other; here, both sizes both."""
    if request.param == "feistel":
        monkeypatch.setattr(batches, "SORTED_UP_TO", 0)


@pytest.mark.usefixtures("_method")
@pytest.mark.parametrize("num_rows", [1, 2, 3, 17, 64, 1000, 5000])
def test_every_epoch_is_a_permutation_of_its_own(num_rows):
    order = indices(num_rows, 5, 0, 4 * num_rows).reshape(4, num_rows)
    for epoch in order:
        assert sorted(epoch.tolist()) == list(range(num_rows))
    if num_rows >= 17:
        assert len({tuple(epoch.tolist()) for epoch in order}) == 4
        assert not torch.equal(indices(num_rows, 6, 0, num_rows), order[0])


@pytest.mark.usefixtures("_method")
def test_any_position_is_known_without_those_before_it():
    whole = indices(100, 1, 0, 1000)
    for start, number in ((0, 1), (99, 2), (250, 330), (999, 1), (7, 0)):
        assert torch.equal(indices(100, 1, start, number), whole[start : start + number])


@pytest.mark.usefixtures("_method")
def test_the_order_is_even():
    """Each row comes equally often at each place, and after each other: chi-square of many epochs."""
    num_rows, num_epochs = 20, 4000
    order = indices(num_rows, 2, 0, num_rows * num_epochs).reshape(num_epochs, num_rows).numpy()
    places = np.zeros((num_rows, num_rows))
    followers = np.zeros((num_rows, num_rows))
    np.add.at(places, (np.broadcast_to(np.arange(num_rows), order.shape), order), 1)
    np.add.at(followers, (order[:, :-1], order[:, 1:]), 1)
    expected = num_epochs / num_rows
    assert ((places - expected) ** 2 / expected).sum() < (num_rows - 1) ** 2 + 6 * (2 * (num_rows - 1) ** 2) ** 0.5
    pairs = num_rows * (num_rows - 1)
    expected = num_epochs * (num_rows - 1) / pairs
    off_diagonal = followers[~np.eye(num_rows, dtype=bool)]
    assert ((off_diagonal - expected) ** 2 / expected).sum() < pairs + 6 * (2 * pairs) ** 0.5


def test_the_order_of_a_billion_rows_costs_no_memory():
    places = indices(10**9, 0, 12 * 10**9 + 5, 256)
    assert len(set(places.tolist())) == 256
    assert 0 <= int(places.min()) < int(places.max()) < 10**9


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
        for start, block in training_batches(data, 9, step, Division(14, world_size, micro_batch_size), rank):
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
