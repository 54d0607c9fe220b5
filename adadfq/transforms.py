"""What happens to generated images on their way to the networks: a Gaussian low-pass, random crops and flips."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from adadfq.recipe import Recipe

__all__ = ["Transform"]


class Transform:
    """Low-pass, crop and flip of generated images, as a recipe asks for; differentiable, for the generator's gradient.

    - ``low_pass``: convolution with a Gaussian of that deviation in pixels, edges repeated (the idea of SynQ, ICLR
      2025: generators put energy into high frequencies that photographs lack).
    - ``crop``: the image padded by that many zeros on every side, cropped back at a random place, a sample at a time.
    - ``flip``: left and right swapped with probability 1/2, a sample at a time.

    Args:
        recipe: fields ``low_pass``, ``crop`` and ``flip``.
        device: where the images are.
    """

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        self._crop, self._flip = recipe.crop, recipe.flip
        self._blur = _gaussian(recipe.low_pass, recipe.image_size, device) if recipe.low_pass > 0 else None

    @property
    def is_identity(self) -> bool:
        """Whether images stay as they are."""
        return self._blur is None and not self._crop and not self._flip

    def __call__(self, images: Tensor, random: torch.Generator) -> Tensor:
        """Transform [B, C, H, W], with places and flips drawn from `random`, a generator on the images' device."""
        if self._blur is not None:
            # Row by row, then column by column: the Gaussian is a product.
            blur = self._blur.to(images.dtype)
            images = blur @ images @ blur.T
        if self._crop:
            images = _crop(images, self._crop, random)
        if self._flip:
            swapped = torch.rand(len(images), 1, 1, 1, generator=random, device=images.device) < 0.5
            images = torch.where(swapped, images.flip(3), images)
        return images


def _gaussian(deviation: float, size: int, device: torch.device) -> Tensor:
    """Matrix [size, size], float64, that filters a column of pixels, cut off at three deviations.

    Rows sum to 1. A matrix, for the gradient of padding with repeated edges would sum in any order on a GPU.
    """
    radius = math.ceil(3 * deviation)
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float64, device=device)
    kernel = torch.exp(-0.5 * (offsets / deviation).square())
    rows = torch.arange(size, device=device)
    sources = (rows[:, None] + offsets.long()).clamp(0, size - 1)
    return ((sources[:, :, None] == rows) * (kernel / kernel.sum())[:, None]).sum(1)


def _crop(images: Tensor, margin: int, random: torch.Generator) -> Tensor:
    batch, channels, height, width = images.shape
    device = images.device
    top, left = torch.randint(2 * margin + 1, (2, batch, 1), generator=random, device=device)
    rows, columns = top + torch.arange(height, device=device), left + torch.arange(width, device=device)
    padded = F.pad(images, (margin, margin, margin, margin))
    samples = torch.arange(batch, device=device)[:, None, None, None]
    planes = torch.arange(channels, device=device)[:, None, None]
    return padded[samples, planes, rows[:, None, :, None], columns[:, None, None, :]]
