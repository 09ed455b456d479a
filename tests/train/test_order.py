"""The order of samples is a function of (seed, step)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gendist.protocols import UserError
from gendist.train import order
from gendist.train.batches import Division
from gendist.train.order import Order, indices


@pytest.fixture(params=["sorted", "feistel"])
def _method(request, monkeypatch):
    """Small data take the one way, large data the other; here, both sizes both."""
    if request.param == "feistel":
        monkeypatch.setattr(order, "SORTED_UP_TO", 0)


@pytest.mark.usefixtures("_method")
@pytest.mark.parametrize("num_rows", [1, 2, 3, 17, 64, 1000, 5000])
def test_every_epoch_is_a_permutation_of_its_own(num_rows):
    order_ = indices(num_rows, 5, 0, 4 * num_rows).reshape(4, num_rows)
    for epoch in order_:
        assert sorted(epoch.tolist()) == list(range(num_rows))
    if num_rows >= 17:
        assert len({tuple(epoch.tolist()) for epoch in order_}) == 4
        assert not torch.equal(indices(num_rows, 6, 0, num_rows), order_[0])


@pytest.mark.usefixtures("_method")
def test_any_position_is_known_without_those_before_it():
    whole = indices(100, 1, 0, 1000)
    for start, number in ((0, 1), (99, 2), (250, 330), (999, 1), (7, 0)):
        assert torch.equal(indices(100, 1, start, number), whole[start : start + number])


@pytest.mark.usefixtures("_method")
def test_the_order_is_even():
    """Each row comes equally often at each place, and after each other: chi-square of many epochs."""
    num_rows, num_epochs = 20, 4000
    order_ = indices(num_rows, 2, 0, num_rows * num_epochs).reshape(num_epochs, num_rows).numpy()
    places = np.zeros((num_rows, num_rows))
    followers = np.zeros((num_rows, num_rows))
    np.add.at(places, (np.broadcast_to(np.arange(num_rows), order_.shape), order_), 1)
    np.add.at(followers, (order_[:, :-1], order_[:, 1:]), 1)
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


LABELLED = torch.tensor([0, 3, 4, 11, 18, 29])


def batches(labelled_batch_size, num_steps=60, num_rows=30):
    order_ = Order(num_rows, 7, 10, labelled_batch_size, LABELLED)
    return torch.stack([order_.rows(step, range(10)) for step in range(num_steps)])


@pytest.mark.parametrize("labelled_batch_size", [1, 3, 5, 9, 10])
def test_every_batch_holds_so_many_labelled_rows_which_take_turns(labelled_batch_size):
    rows = batches(labelled_batch_size)
    is_labelled = torch.isin(rows, LABELLED)
    assert (is_labelled.sum(1) == labelled_batch_size).all()
    for chosen, among in (
        (rows[is_labelled], LABELLED),
        (rows[~is_labelled], torch.arange(30)[~torch.isin(torch.arange(30), LABELLED)]),
    ):
        whole = len(chosen) // len(among) * len(among)
        for epoch in chosen[:whole].reshape(-1, len(among)):
            assert torch.equal(epoch.sort().values, among)


@pytest.mark.parametrize(("world_size", "micro_batch_size"), [(2, None), (2, 1), (3, 2), (5, 2)])
def test_micro_batches_have_their_share_of_labels_and_make_the_same_batch(world_size, micro_batch_size):
    order_ = Order(30, 7, 10, 4, LABELLED)
    division = Division(10, world_size, micro_batch_size)
    for step in (0, 3, 17):
        parts = [order_.rows(step, part) for rank in range(world_size) for part in division.micro_batches(rank)]
        assert torch.equal(torch.cat(parts), order_.rows(step, range(10)))
        shares = [int(torch.isin(part, LABELLED).sum()) - 0.4 * len(part) for part in parts]
        assert max(map(abs, shares)) < 1.0


def test_labels_that_are_asked_for_must_be_there():
    with pytest.raises(UserError, match=r"labelled_batch_size is 2 of 10, but no row has a label"):
        Order(30, 0, 10, 2, LABELLED[:0])
    with pytest.raises(UserError, match=r"every row has a label"):
        Order(6, 0, 10, 2, torch.arange(6))
