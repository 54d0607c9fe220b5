"""Scoring images that are decoded once, for trainings that are scored after every epoch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from adadfq.errors import InvalidInputError
from adadfq.scoring import ScoringSet

#: Larger sets are decoded each time.
MOST_BYTES = 2 << 30


class DecodedImages:
    """What :func:`adadfq.scoring.accuracy` asks of a set of images, from memory on `device` where they fit."""

    def __init__(self, images: ScoringSet, channels: int, device: torch.device) -> None:
        self.images, self.num_classes, self.device = images, images.num_classes, device
        self._fit = 4 * len(images) * channels * images.image_size**2 <= MOST_BYTES
        self._kept: tuple[Tensor, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """As :meth:`adadfq.scoring.ScoringSet.batches`."""
        if not self._fit:
            yield from self.images.batches(batch_size)
            return
        images, labels = self._decoded()
        yield from zip(images.split(batch_size), labels.split(batch_size), strict=True)

    def pixels(self) -> Tensor:
        """All images, [N, C, H, W], normalised; no copy.

        Raises:
            InvalidInputError: they do not fit.
        """
        if not self._fit:
            raise InvalidInputError(
                f"{len(self)} images are more than the {MOST_BYTES >> 30} GiB that are held in memory: give fewer"
            )
        return self._decoded()[0]

    def _decoded(self) -> tuple[Tensor, Tensor]:
        if self._kept is None:
            images, labels = zip(*self.images.batches(100), strict=True)
            self._kept = torch.cat(images).to(self.device), torch.cat(labels).to(self.device)
        return self._kept
