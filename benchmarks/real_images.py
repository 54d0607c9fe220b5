"""Real images in the generator's place: what training comes to where nothing has to be generated."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from adadfq.recipe import Recipe
from benchmarks.decoded_images import DecodedImages

__all__ = ["WITHOUT_EFFECT", "RealImages"]

#: Fields of a recipe that move the generator alone.
WITHOUT_EFFECT = (
    *("gamma", "beta", "alpha_ds", "alpha_as", "lambda_l", "lambda_u", "detach_min"),
    *("generator", "lr_generator", "spectral_norm", "generator_ema"),
)


class RealImages(nn.Module):
    """Stands where a generator does and gives images of a set, drawn uniformly with replacement; nothing in it learns.

    What a recipe does between generator and networks (crop, flip, low-pass) is done to these images too.

    Args:
        images: those that score, whose labels are not looked at.
        recipe: of the run; the image is chosen by the noise, so that a seed gives the same images.

    Raises:
        InvalidInputError: see :meth:`benchmarks.decoded_images.DecodedImages.pixels`.
    """

    def __init__(self, images: DecodedImages, recipe: Recipe) -> None:
        super().__init__()
        self.num_classes, self.latent_dim = recipe.num_classes, recipe.latent_dim
        self.nothing = nn.Parameter(torch.zeros(()))
        self.images = images.pixels()  # no buffer: a checkpoint needs no copy of them

    def forward(self, noise: Tensor, labels: Tensor) -> Tensor:
        """Images [B, C, H, W] for noise [B, latent_dim]; of classes as they come, whatever `labels` are."""
        share = 0.5 * (1 + torch.erf(noise[:, 0].float() / math.sqrt(2)))  # uniform, as the noise is normal
        chosen = (share * len(self.images)).long().clamp(max=len(self.images) - 1)
        return self.images[chosen] + 0 * self.nothing
