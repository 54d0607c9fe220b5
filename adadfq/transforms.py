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

    - ``low_pass``: convolution with a Gaussian of that deviation in pixels, at the edges with what of it lies inside
      (the idea of SynQ, ICLR 2025: generators put energy into high frequencies that photographs lack).
    - ``crop``: the image padded by that many zeros on every side, cropped back at a random place, a sample at a time.
    - ``flip``: left and right swapped with probability 1/2, a sample at a time.

    Args:
        recipe: fields ``low_pass``, ``crop`` and ``flip``.
        device: where the images are.
    """

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        self._crop, self._flip = recipe.crop, recipe.flip
        self._kernel = _gaussian(recipe.low_pass, recipe.image_channels, device) if recipe.low_pass > 0 else None
        if self._kernel is not None:
            ones = torch.ones(1, recipe.image_channels, recipe.image_size, recipe.image_size, device=device)
            self._inside = _blur(ones, self._kernel)  # padding by repetition has no deterministic gradient on CUDA

    @property
    def is_identity(self) -> bool:
        """Whether images stay as they are."""
        return self._kernel is None and not self._crop and not self._flip

    def __call__(self, images: Tensor, random: torch.Generator) -> Tensor:
        """Transform [B, C, H, W], with places and flips drawn from `random`, a generator on the images' device."""
        if self._kernel is not None:
            images = _blur(images, self._kernel.to(images.dtype)) / self._inside.to(images.dtype)
        if self._crop:
            images = _crop(images, self._crop, random)
        if self._flip:
            swapped = torch.rand(len(images), 1, 1, 1, generator=random, device=images.device) < 0.5
            images = torch.where(swapped, images.flip(3), images)
        return images


def _blur(images: Tensor, kernel: Tensor) -> Tensor:
    """Column by column, then row by row: a Gaussian is a product."""
    radius = kernel.shape[2] // 2
    images = F.conv2d(images, kernel, padding=(radius, 0), groups=images.shape[1])
    return F.conv2d(images, kernel.transpose(2, 3), padding=(0, radius), groups=images.shape[1])


def _gaussian(deviation: float, channels: int, device: torch.device) -> Tensor:
    """Kernel [channels, 1, 2 r + 1, 1], r three deviations, summing to 1 a channel."""
    radius = math.ceil(3 * deviation)
    places = torch.arange(-radius, radius + 1, dtype=torch.float32, device=device)
    kernel = torch.exp(-0.5 * (places / deviation).square())
    return (kernel / kernel.sum()).view(1, 1, -1, 1).repeat(channels, 1, 1, 1)


def _crop(images: Tensor, margin: int, random: torch.Generator) -> Tensor:
    batch, channels, height, width = images.shape
    device = images.device
    top, left = torch.randint(2 * margin + 1, (2, batch, 1), generator=random, device=device)
    rows, columns = top + torch.arange(height, device=device), left + torch.arange(width, device=device)
    padded = F.pad(images, (margin, margin, margin, margin))
    samples = torch.arange(batch, device=device)[:, None, None, None]
    planes = torch.arange(channels, device=device)[:, None, None]
    return padded[samples, planes, rows[:, None, :, None], columns[:, None, None, :]]
