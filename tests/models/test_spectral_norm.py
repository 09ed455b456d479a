"""Spectral norms without a state, against singular values and against torch's own layers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from gendist.models.ops.spectral_norm import SpectralConv2d, SpectralConvTranspose2d, SpectralLinear, schatten_norm

P = 512


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3), dtype=dtype)


WEIGHTS = {
    "wide": normal(20, 300),
    "tall": normal(300, 20),
    "a row": normal(1, 50),
    "of rank 1": normal(30, 1) @ normal(1, 40),
    "one value many times": torch.eye(256),
    "small": 1e-9 * normal(20, 30),
    "large": 1e9 * normal(20, 30),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_it_is_the_schatten_norm_and_within_its_bounds_of_the_largest_singular_value(name):
    weight = WEIGHTS[name]
    values = torch.linalg.svdvals(weight.double())
    largest, norm = float(values[0]), float(schatten_norm(weight))
    assert norm == pytest.approx(largest * float(((values / largest) ** P).sum()) ** (1 / P), rel=1e-5)
    assert largest * (1 - 1e-5) <= norm <= largest * 256 ** (1 / P) * (1 + 1e-5)


def test_a_weight_of_0_stays_0_with_a_finite_gradient():
    weight = torch.zeros(3, 4, requires_grad=True)
    effective = weight / schatten_norm(weight)
    assert torch.equal(effective, torch.zeros(3, 4))
    effective.sum().backward()
    assert bool(weight.grad.isfinite().all())


def test_its_gradient_is_that_of_the_largest_singular_value():
    """Where that stands alone; u v^T, of the first singular vectors."""
    left, _, right = torch.linalg.svd(normal(6, 9), full_matrices=False)
    weight = (left * torch.tensor([3.0, 2.0, 1.0, 0.5, 0.2, 0.1]) @ right).requires_grad_()
    schatten_norm(weight).backward()
    torch.testing.assert_close(weight.grad, left[:, :1] @ right[:1], atol=1e-5, rtol=0)


def test_half_precision_around_it_changes_nothing():
    weight = normal(30, 40)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(schatten_norm(weight), schatten_norm(weight.clone()))
        inside = schatten_norm(weight)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, schatten_norm(weight))


def layers() -> list[tuple[nn.Module, nn.Module, int, Tensor]]:
    """Ours, torch's, the dimension of the channels out, and what they are given."""
    return [
        (SpectralLinear(12, 7), nn.Linear(12, 7), 0, normal(3, 12)),
        (SpectralConv2d(3, 5, 4, stride=2, padding=1), nn.Conv2d(3, 5, 4, stride=2, padding=1), 0, normal(2, 3, 9, 8)),
        (
            SpectralConvTranspose2d(3, 5, 4, stride=2, padding=1, output_padding=(1, 0)),
            nn.ConvTranspose2d(3, 5, 4, stride=2, padding=1, output_padding=(1, 0)),
            1,
            normal(2, 3, 4, 5),
        ),
    ]


@pytest.mark.parametrize("case", range(3))
def test_layers_are_those_of_torch_after_many_power_iterations(case):
    ours, torchs, dim, x = layers()[case]
    torchs.load_state_dict(ours.state_dict())
    torchs = spectral_norm(torchs, n_power_iterations=1000, dim=dim)
    torch.testing.assert_close(ours(x), torchs(x), rtol=5e-3, atol=1e-4)
    assert set(ours.state_dict()) == {"weight", "bias"}


@pytest.mark.parametrize("case", range(3))
def test_a_layer_depends_on_the_weight_and_not_on_how_often_it_was_called(case):
    layer, _, _, x = layers()[case]
    first = layer(x)
    for _ in range(3):
        layer(2 * x)
    assert torch.equal(layer(x), first)
    with torch.no_grad():
        layer.weight *= 4.0  # which the norm takes out again
    torch.testing.assert_close(layer(x), first)


def test_a_linear_layer_makes_no_difference_larger():
    layer = SpectralLinear(40, 30)
    difference = layer(normal(50, 40)) - layer(normal(50, 40).flip(0))
    assert bool((difference.norm(dim=1) <= (normal(50, 40) - normal(50, 40).flip(0)).norm(dim=1) * (1 + 1e-5)).all())
