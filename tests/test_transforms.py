"""Low-pass, crops and flips of generated images."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from toy import toy_recipe

from adadfq.transforms import Transform

CPU = torch.device("cpu")


def _random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_nothing_asked_is_the_identity() -> None:
    assert Transform(toy_recipe(), CPU).is_identity
    for field, value in (("low_pass", 0.5), ("crop", 1), ("flip", True)):
        assert not Transform(toy_recipe(**{field: value}), CPU).is_identity


def _low_pass(images: Tensor, deviation: float) -> Tensor:
    """Pixel by pixel, with edges repeated."""
    radius = math.ceil(3 * deviation)
    weights = {d: math.exp(-0.5 * (d / deviation) ** 2) for d in range(-radius, radius + 1)}
    total = sum(weights.values())
    size = images.shape[-1]
    result = torch.zeros_like(images, dtype=torch.float64)
    for y in range(size):
        for x in range(size):
            for dy, wy in weights.items():
                for dx, wx in weights.items():
                    row, column = min(max(y + dy, 0), size - 1), min(max(x + dx, 0), size - 1)
                    result[..., y, x] += wy * wx / total**2 * images[..., row, column].double()
    return result


@pytest.mark.parametrize("deviation", [0.4, 1.0])
def test_low_pass_is_a_gaussian(deviation: float) -> None:
    images = torch.randn(2, 3, 8, 8, generator=_random())
    found = Transform(toy_recipe(low_pass=deviation), CPU)(images, _random())
    torch.testing.assert_close(found.double(), _low_pass(images, deviation), rtol=1e-5, atol=1e-6)


def test_crop_moves_each_image_within_its_margin_and_fills_with_zeros() -> None:
    images = torch.rand(64, 3, 8, 8, generator=_random()) + 1
    found = Transform(toy_recipe(crop=2), CPU)(images, _random(1))
    places = set()
    for image, cropped in zip(images, found, strict=True):
        padded = torch.nn.functional.pad(image, (2, 2, 2, 2))
        matches = [(y, x) for y in range(5) for x in range(5) if torch.equal(padded[:, y : y + 8, x : x + 8], cropped)]
        assert len(matches) == 1
        places.add(matches[0])
    assert len(places) > 15  # of 25


def test_flip_swaps_about_half_of_the_images() -> None:
    images = torch.randn(200, 3, 8, 8, generator=_random())
    found = Transform(toy_recipe(flip=True), CPU)(images, _random(1))
    flipped = [torch.equal(a.flip(2), b) for a, b in zip(images, found, strict=True)]
    kept = [torch.equal(a, b) for a, b in zip(images, found, strict=True)]
    assert all(a != b for a, b in zip(flipped, kept, strict=True))
    assert 70 < sum(flipped) < 130


def test_everything_passes_gradients_and_repeats_under_a_seed() -> None:
    transform = Transform(toy_recipe(low_pass=0.5, crop=1, flip=True), CPU)
    images = torch.randn(4, 3, 8, 8, generator=_random(), dtype=torch.float64, requires_grad=True)
    assert torch.equal(transform(images, _random(3)), transform(images, _random(3)))
    assert not torch.equal(transform(images, _random(3)), transform(images, _random(4)))
    transform(images, _random(3)).square().sum().backward()
    assert images.grad is not None
    assert bool(images.grad.abs().sum((1, 2, 3)).min() > 0)
