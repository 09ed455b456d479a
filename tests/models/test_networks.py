"""Networks from a configuration: shapes, first weights, modules of the user's own, and rows that do not know each other."""

from __future__ import annotations

import importlib
import math
import sys

import pytest
import torch
from pydantic import ValidationError

from gendist.artifact import Artifact, save
from gendist.data import Schema
from gendist.fitted_model import load
from gendist.models.ops import networks
from gendist.models.ops.layout import Layout
from gendist.models.ops.networks import NetworkConfig
from gendist.models.ops.tiles import TILE, evaluating, map_in_tiles, rows_in_tiles
from gendist.models.vae import VariationalAutoencoder, VariationalAutoencoderConfig
from gendist.protocols import UserError

OWN = """
from torch import nn

class Net(nn.Module):
    def __init__(self, input_shape, output_shape, width=7):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(input_shape[0] * 64, width), nn.Dropout(0.5))
        self.layers.append(nn.Linear(width, output_shape[0]))
    def forward(self, x):
        return self.layers(x)

class Narrow(Net):
    def forward(self, x):
        return super().forward(x)[:, 1:]

class Fails(Net):
    def __init__(self, input_shape, output_shape):
        raise RuntimeError("no\\nluck")

def function(input_shape, output_shape):
    return Net(input_shape, output_shape)
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module of the user's own that can be imported."""
    (tmp_path / "ownnets.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    return "ownnets"


def config(**fields) -> NetworkConfig:
    return NetworkConfig(**fields)


@pytest.mark.parametrize("normalization", ["none", "layer", "group"])
@pytest.mark.parametrize("shape", [(8, 8), (28, 28), (7, 9), (5, 4, 3)])
@pytest.mark.parametrize(
    "choice",
    [
        {"hidden_sizes": [6]},
        {"hidden_sizes": []},
        {"channels": [3]},
        {"channels": [4, 3]},
        {"channels": [4, 3], "num_blocks": 2},
        {"channels": [4, 8], "spectral_norm": True},
    ],
)
def test_every_image_has_a_way_in_and_a_way_out(choice, shape, normalization):
    layout = Layout(shape)
    x = torch.rand(3, layout.num_features)
    there = networks.create(config(normalization=normalization, **choice), layout.network_shape, (5,), "there", 0)
    back = networks.create(config(normalization=normalization, **choice), (5,), layout.network_shape, "back", 0)
    code = there(layout.to_network(x))
    assert code.shape == (3, 5)
    assert layout.to_rows(back(code)).shape == x.shape
    assert there.features(layout.to_network(x)).ndim == 2


@pytest.mark.parametrize("shape", [(6,), (2, 3), (2, 3, 4)])
def test_a_layout_goes_there_and_back(shape):
    layout, x = Layout(shape), torch.rand(5, math.prod(shape))
    inside = layout.to_network(x)
    assert torch.equal(layout.to_rows(inside), x)
    if len(shape) == 3:  # a row is (H, W, C), a network's image (C, H, W)
        assert torch.equal(inside[1, 3, 0], x[1].reshape(shape)[0, :, 3])
    assert torch.equal(layout.rows(x.reshape(5, *shape)), x)
    assert Layout.from_tensors(layout.tensors()) == layout


def test_the_first_weights_are_a_function_of_the_seed_and_the_place():
    def weights(seed: int, where: str) -> list[torch.Tensor]:
        return [p.detach() for p in networks.create(config(channels=[4, 8]), (1, 8, 8), (3,), where, seed).parameters()]

    torch.manual_seed(1)
    state, first = torch.random.get_rng_state(), weights(0, "a")
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(2)
    assert all(torch.equal(a, b) for a, b in zip(first, weights(0, "a"), strict=True))
    assert not torch.equal(first[0], weights(1, "a")[0])
    assert not torch.equal(first[0], weights(0, "b")[0])


@pytest.mark.parametrize("activation", networks.ACTIVATIONS)
@pytest.mark.parametrize(
    ("choice", "input_shape", "output_shape"),
    [
        ({"hidden_sizes": [400, 300, 400]}, (300,), (400,)),
        ({"channels": [32, 64, 128]}, (3, 32, 32), (300,)),
        ({"channels": [128, 64, 32]}, (50,), (3, 32, 32)),
        ({"channels": [128, 64, 32], "num_blocks": 2}, (50,), (3, 32, 32)),
        ({"channels": [32, 64, 128], "num_blocks": 2, "normalization": "group"}, (3, 32, 32), (300,)),
    ],
)
def test_signals_keep_their_size_on_the_way_through_a_fresh_network(choice, input_shape, output_shape, activation):
    network = networks.create(config(activation=activation, **choice), input_shape, output_shape, "x", 0)
    x = torch.randn(64, *input_shape, generator=torch.Generator().manual_seed(0))
    assert 0.2 < float(network(x).detach().std()) < 3.0


def test_shapes_alone_take_no_memory_and_are_those_of_the_network():
    chosen = config(channels=[4, 8], num_blocks=2, normalization="group")
    with torch.device("meta"):
        shapes = networks.create(chosen, (1, 8, 8), (3,), "x", 0)
    assert {p.device.type for p in shapes.parameters()} == {"meta"}
    whole = networks.create(chosen, (1, 8, 8), (3,), "x", 0)
    assert [(n, p.shape) for n, p in shapes.named_parameters()] == [(n, p.shape) for n, p in whole.named_parameters()]


def test_what_no_image_can_be_is_refused():
    with pytest.raises(UserError, match=r"model.encoder.channels: 4 convolutions.*8 x 9 can be halved 3 times"):
        networks.build(config(channels=[4] * 4), (1, 8, 9), (3,), "model.encoder")
    with pytest.raises(UserError, match=r"model.decoder.channels: 4 convolutions.*9 x 8 can be halved 3 times"):
        networks.build(config(channels=[4] * 4, num_blocks=1), (3,), (1, 9, 8), "model.decoder")
    with pytest.raises(UserError, match=r"12 features; give hidden_sizes"):
        networks.build(config(channels=[4]), (12,), (3,), "model.encoder")
    with pytest.raises(UserError, match=r"needed"):
        Layout((1, 2, 3, 4))


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"channels": [3], "hidden_sizes": [3]}, "a network has one of them"),
        ({"channels": []}, "at least 1"),
        ({"hidden_sizes": [0]}, "greater than or equal to 1"),
        ({"options": {"width": 3}}, "options are those of a module"),
        ({"num_blocks": 2}, "give channels"),
        ({"channels": [4], "checkpointing": True}, "give channels and num_blocks"),
        ({"module": "a:B", "spectral_norm": True}, "let the module normalize its own"),
        ({"module": "a:B", "activation": "silu"}, "let the module have its own"),
        ({"module": "a:B", "normalization": "layer"}, "let the module have its own"),
    ],
)
def test_a_configuration_is_of_one_network(fields, match):
    with pytest.raises(ValidationError, match=match):
        config(**fields)


def test_a_module_of_the_users_own_is_built_with_its_options_and_drawn_from_the_seed(own):
    chosen = config(module=f"{own}:Net", options={"width": 5})
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    first, again, other = (networks.create(chosen, (1, 8, 8), (3,), "x", seed) for seed in (0, 0, 1))
    rebuilt = networks.build(chosen, (1, 8, 8), (3,), "x")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert first.layers[1].out_features == 5
    assert first.training
    assert torch.equal(first.layers[1].weight, again.layers[1].weight)
    assert not torch.equal(first.layers[1].weight, other.layers[1].weight)
    networks.load(rebuilt, first.state_dict())
    x = torch.rand(4, 1, 8, 8)
    assert torch.equal(rebuilt.eval()(x), first.eval()(x))


def test_an_artifact_with_networks_of_the_users_own_is_loaded_where_they_can_be_imported(own, tmp_path, monkeypatch):
    chosen = VariationalAutoencoderConfig(latent_dim=2, encoder={"module": f"{own}:Net", "options": {"width": 5}})
    schema = Schema(columns=("image",), feature_names=tuple(f"p{i}" for i in range(64)), image_shape=(8, 8))
    save(Artifact("vae", VariationalAutoencoder.create(chosen, (8, 8), (), 0), schema), tmp_path / "artifact")
    x = torch.rand(3, 64)
    first = load(tmp_path / "artifact").encode(x)
    assert torch.equal(load(tmp_path / "artifact").encode(x), first)
    (tmp_path / "ownnets.py").unlink()
    monkeypatch.delitem(sys.modules, own)
    importlib.invalidate_caches()
    with pytest.raises(UserError, match=r"artifact: model.encoder.module 'ownnets:Net': cannot be imported"):
        load(tmp_path / "artifact")


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("nowhere_at_all:Net", r"model.encoder.module 'nowhere_at_all:Net': cannot be imported.*PYTHONPATH"),
        ("{own}:Missing", r"cannot be imported \(AttributeError"),
        *[
            (name, r"write package.module:Class")
            for name in (
                "{own}",
                "{own}:",
                ":Net",
                ".{own}:Net",
                "./{own}:Net",
                "/tmp/{own}.py:Net",
                "{own}:Net.layers",
                "{own}:Net()",
            )
        ],
        ("{own}:function", r"a class derived from torch.nn.Module is needed"),
        ("os:system", r"a class derived from torch.nn.Module is needed"),
        ("{own}:Narrow", r"gives \(2, 2\) for 2 samples of shape \(1, 8, 8\); \(2, 3\) is needed"),
        ("{own}:Fails", r"fails for samples of shape \(1, 8, 8\) \(RuntimeError: no luck\)$"),
    ],
)
def test_a_module_that_cannot_be_used_is_explained_in_one_line(own, name, match):
    with pytest.raises(UserError, match=match) as error:
        networks.create(config(module=name.format(own=own)), (1, 8, 8), (3,), "model.encoder", 0)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "choice",
    [
        {"hidden_sizes": [100, 50]},
        {"channels": [8, 16], "normalization": "layer"},
        {"channels": [8, 16], "num_blocks": 1, "normalization": "group", "spectral_norm": True},
    ],
)
def test_in_tiles_a_row_is_the_same_bytes_whatever_its_neighbours(choice):
    there = networks.create(config(**choice), (1, 8, 8), (10,), "there", 0)
    x = torch.rand(3 * TILE + 5, 64)

    def through(rows: torch.Tensor) -> torch.Tensor:
        with evaluating(there):
            return map_in_tiles(lambda _, tile: there(tile.reshape(-1, 1, 8, 8)), rows, torch.device("cpu"))

    whole = through(x)
    assert whole.shape == (len(x), 10)
    for stop in (0, 1, TILE - 1, TILE, TILE + 1):
        assert torch.equal(through(x[:stop]), whole[:stop])
    changed = x.clone()
    changed[TILE + 1 :] = 0.5
    assert torch.equal(through(changed)[: TILE + 1], whole[: TILE + 1])
    torch.testing.assert_close(whole, there(x.reshape(-1, 1, 8, 8)).detach())


@pytest.mark.parametrize("start", [0, 1, TILE - 1, TILE, 1000])
@pytest.mark.parametrize("num_rows", [0, 1, TILE, TILE + 1, 3 * TILE])
def test_tiles_begin_at_multiples_and_are_whole(start, num_rows):
    asked = []

    def numbers(first: int) -> torch.Tensor:
        asked.append(first)
        return torch.arange(first, first + TILE)

    assert rows_in_tiles(numbers, start, num_rows).tolist() == list(range(start, start + num_rows))
    assert all(first % TILE == 0 for first in asked)


def test_evaluating_gives_every_module_its_mode_back():
    network = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Sequential(torch.nn.Dropout()))
    network[1].eval()
    with evaluating(network):
        assert not any(module.training for module in network.modules())
        assert not torch.is_grad_enabled()
    assert [module.training for module in network.modules()] == [True, True, False, False]
