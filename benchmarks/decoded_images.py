"""Scoring images that are decoded once, for trainings that are scored after every epoch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from adadfq.scoring import ScoringSet

#: Larger sets are decoded each time.
MOST_BYTES = 2 << 30


class DecodedImages:
    """What :func:`adadfq.scoring.accuracy` asks of a set of images, from memory on `device` where they fit."""

    def __init__(self, images: ScoringSet, channels: int, device: torch.device) -> None:
        self.images, self.num_classes, self.device = images, images.num_classes, device
        #: Whether they fit.
        self.fit = 4 * len(images) * channels * images.image_size**2 <= MOST_BYTES
        self._kept: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """As :meth:`adadfq.scoring.ScoringSet.batches`."""
        if not self.fit:
            yield from self.images.batches(batch_size)
            return
        if batch_size not in self._kept:
            self._kept[batch_size] = [
                (images.to(self.device), labels.to(self.device)) for images, labels in self.images.batches(batch_size)
            ]
        yield from self._kept[batch_size]
