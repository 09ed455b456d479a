"""Residual networks: sizes by hand, checkpointing, and that they learn."""

from __future__ import annotations

from math import prod

import pytest
import torch
from torch import Tensor, nn

from gendist.models.ops import networks
from gendist.models.ops.layers import num_groups
from gendist.models.ops.networks import NetworkConfig
from gendist.models.ops.residual import ResidualBlock
from gendist.one_thread import one_thread

SMOOTH = {"channels": [4, 8], "num_blocks": 2, "activation": "silu", "normalization": "group", "spectral_norm": True}


@pytest.fixture(autouse=True)
def _alone():
    """Threads that wait for one another on a busy machine take many times as long."""
    with one_thread():
        yield


def images(num: int, *shape: int) -> Tensor:
    return torch.rand(num, *shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("size", [(28, 28), (9, 14), (8, 8)])
def test_an_image_is_halved_once_for_each_number_of_channels_and_doubled_back(size):
    seen: list[tuple[int, ...]] = []
    chosen = NetworkConfig(channels=[3, 5, 7], num_blocks=2)
    back = chosen.model_copy(update={"channels": (7, 5, 3)})
    there = networks.create(chosen, (2, *size), (4,), "there", 0)
    back = networks.create(back, (4,), (2, *size), "back", 0)
    for network in (there, back):
        for block in network.modules():
            if isinstance(block, ResidualBlock):
                block.register_forward_hook(lambda module, given, result: seen.append(tuple(result.shape[1:])))
    assert back(there(images(1, 2, *size))).shape == (1, 2, *size)
    halves = [(size[0] // 2**i, size[1] // 2**i) for i in range(4)]
    down = [(channels, *half) for channels, half in zip((3, 5, 7), halves[1:], strict=True)]
    up = [(channels, *half) for channels, half in zip((7, 5, 3), halves[2::-1], strict=True)]
    assert seen == [shape for shape in (*down, *up) for _ in range(2)]
    assert sum(p.numel() for p in there.parameters()) == parameters_by_hand((3, 5, 7), 2, 2, halves[-1], 4)


def parameters_by_hand(channels: tuple[int, ...], num_blocks: int, num_inputs: int, last: tuple[int, int], num: int) -> int:
    total, before = 9 * num_inputs * channels[0] + channels[0], channels[0]
    for after in channels:
        total += 9 * before * after + after + 9 * after * after + after
        total += before * after + after if before != after else 0
        total += (num_blocks - 1) * 2 * (9 * after * after + after)
        before = after
    return total + prod(last) * before * num + num


@pytest.mark.parametrize("size", [(7, 4), (2, 3)])
def test_every_pixel_reaches_the_vector_and_every_pixel_is_reached(size):
    """Also the last row and column of an odd size."""
    chosen = NetworkConfig(channels=[4], num_blocks=1, activation="tanh")
    there = networks.create(chosen, (1, *size), (1,), "there", 0)
    x = images(1, 1, *size).requires_grad_()
    there(x).sum().backward()
    assert bool((x.grad != 0).all())
    back = networks.create(chosen, (3,), (1, *size), "back", 0)
    z = images(2, 3)
    assert bool((back(z[:1]) != back(z[1:])).all())


@pytest.mark.parametrize("num_channels", [1, 3, 4, 12, 48, 64, 128, 1000, 1024])
def test_groups_are_of_one_size_and_not_too_small(num_channels):
    groups = num_groups(num_channels)
    assert 1 <= groups <= 32
    assert num_channels % groups == 0
    assert groups == 1 or num_channels // groups >= 4
    assert num_channels < 128 or num_channels % 128 or groups == 32


@pytest.mark.parametrize("penalty", [False, True], ids=["", "penalty"])
@pytest.mark.parametrize(("given", "wanted"), [((1, 9, 9), (2,)), ((2,), (1, 9, 9))])
def test_checkpointing_gives_the_same_bytes(given, wanted, penalty):
    results = []
    for checkpointing in (False, True):
        chosen = NetworkConfig(**SMOOTH, checkpointing=checkpointing)
        network = networks.create(chosen, given, wanted, "x", 0)
        x = images(5, *given).requires_grad_()
        result = network(x)
        loss = result.square().sum()
        if penalty:
            (gradient,) = torch.autograd.grad(result.sum(), x, create_graph=True)
            loss = loss + gradient.square().sum()
        results.append([loss, *torch.autograd.grad(loss, [*network.parameters()])])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_checkpointing_keeps_less_for_the_backward_pass():
    def kept_bytes(checkpointing: bool) -> int:
        network = networks.create(NetworkConfig(**SMOOTH, checkpointing=checkpointing), (1, 16, 16), (2,), "x", 0)
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            network(images(64, 1, 16, 16))
        return sum(kept.values())

    assert kept_bytes(True) < kept_bytes(False) / 2


def test_pieces_of_a_batch_add_up_to_its_gradient():
    """However a step is divided, for nothing that a forward leaves behind reaches the next."""
    network = networks.create(NetworkConfig(**SMOOTH), (1, 8, 8), (1,), "x", 0)
    x, parameters = images(12, 1, 8, 8), list(network.parameters())
    assert not list(network.buffers())

    def gradient(pieces: list[Tensor]) -> list[Tensor]:
        network.zero_grad()
        for piece in pieces:
            torch.nn.functional.softplus(network(piece)).sum().backward()
        return [p.grad.clone() for p in parameters]

    whole = gradient([x])
    for pieces in (x.split(3), x.split(5)):
        for one, other in zip(gradient(list(pieces)), whole, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fields", [{}, {"normalization": "group"}, {"spectral_norm": True}])
def test_a_residual_network_learns(fields):
    """Where a bright square is, which no linear map of pixels tells."""
    generator = torch.Generator().manual_seed(0)
    places = torch.randint(0, 6, (64, 2), generator=generator)
    x = 0.1 * torch.rand(64, 1, 9, 9, generator=generator)
    for image, (row, column) in zip(x, places.tolist(), strict=True):
        image[0, row : row + 3, column : column + 3] = 1.0
    wanted = (places[:, 0] > places[:, 1]).float()
    network = networks.create(NetworkConfig(channels=[8, 8], num_blocks=1, **fields), (1, 9, 9), (1,), "x", 0)
    optimizer = torch.optim.Adam(network.parameters(), 0.01)
    losses = []
    for _ in range(40):
        loss = nn.functional.binary_cross_entropy_with_logits(network(x)[:, 0], wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
