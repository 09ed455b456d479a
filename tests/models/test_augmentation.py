"""Differentiable augmentation: what it does to pixels, its gradients, and that a sample's is its own."""

from __future__ import annotations

import pytest
import torch

from gendist.models.ops.augmentation import augment, num_uniforms

ALL = ("color", "translation", "cutout")


def images(num_samples: int, shape=(3, 8, 12), seed: int = 0) -> torch.Tensor:
    return torch.rand(num_samples, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 1


def uniforms(num_samples: int, names=ALL, seed: int = 1) -> torch.Tensor:
    return torch.rand(num_samples, num_uniforms(names), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_color_by_its_definition():
    x, u = images(4), uniforms(4, ["color"])
    for i, (image, (brightness, saturation, contrast)) in enumerate(zip(x, u, strict=True)):
        image = image + brightness - 0.5
        image = image.mean(0) + (image - image.mean(0)) * saturation * 2
        image = image.mean() + (image - image.mean()) * (contrast + 0.5)
        torch.testing.assert_close(augment(x, ["color"], u)[i], image)


def test_gray_images_have_no_saturation():
    x, u = images(1, (1, 8, 8)), torch.tensor([[0.5, 0.1, 0.5]], dtype=torch.float64)
    torch.testing.assert_close(augment(x, ["color"], u), x)


def test_translation_moves_all_pixels_by_the_same_and_every_way_as_often():
    x, u = images(3000, (2, 8, 16)), uniforms(3000, ["translation"])
    moved, counts = augment(x, ["translation"], u), torch.zeros(3, 5)
    padded = torch.nn.functional.pad(x, (2, 2, 1, 1))
    for down in range(3):
        for right in range(5):
            window = padded[:, :, down : down + 8, right : right + 16]
            counts[down, right] = (window == moved).flatten(1).all(1).sum()
    assert counts.sum() == 3000  # each of them is one of these
    assert float(counts.min()) > 140
    assert float(counts.max()) < 260


def test_cutout_takes_a_rectangle_of_half_of_each_side_with_its_middle_in_the_image():
    x, u = images(2000, (2, 8, 12)).abs() + 0.1, uniforms(2000, ["cutout"])
    cut = augment(x, ["cutout"], u)
    gone = cut == 0
    assert torch.equal(gone[:, 0], gone[:, 1])
    assert torch.equal(cut[~gone], x[~gone])
    heights, widths = gone[:, 0].any(2).sum(1), gone[:, 0].any(1).sum(1)
    assert torch.equal(gone[:, 0].sum((1, 2)), heights * widths)
    # Rectangles 4 high, whose first row is -2 to 6, with what is outside of 8 rows cut off.
    assert heights.double().mean() == pytest.approx((2 + 3 + 4 * 5 + 3 + 2) / 9, abs=0.06)
    assert widths.double().mean() == pytest.approx((2 * (3 + 4 + 5) + 6 * 7) / 13, abs=0.1)


@pytest.mark.parametrize("names", [ALL, ("translation",), ("cutout", "color")])
def test_gradients_go_through(names):
    x, u = images(3, (2, 4, 5)).requires_grad_(), uniforms(3, names)
    assert torch.autograd.gradcheck(lambda y: augment(y, names, u), (x,))


def test_a_sample_is_augmented_by_itself():
    x, u = images(10), uniforms(10)
    whole = augment(x, ALL, u)
    parts = torch.cat([augment(x[a:b], ALL, u[a:b]) for a, b in ((0, 1), (1, 7), (7, 10))])
    assert torch.equal(parts, whole)
    assert augment(x[:0], ALL, u[:0]).shape == (0, 3, 8, 12)
    assert not torch.equal(augment(x, ALL[::-1], u), whole)


def test_numbers_that_are_rounded_to_1_stay_inside():
    x = images(2).float()
    assert bool(augment(x, ALL, torch.ones(2, num_uniforms(ALL))).isfinite().all())
