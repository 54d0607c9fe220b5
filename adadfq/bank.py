"""A bank of generated batches on the device, with what the student learns of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from adadfq import checks

__all__ = ["ImageBank"]


class ImageBank:
    """Keeps the last batches of images with the logits and features that the student learns, to train it on them again.

    A step on a kept batch needs no generator and no teacher: 3 forward-equivalents of network work instead of 6. No
    method waits for the device, and all memory stays where it is once the first batch is in.

    Args:
        batches: how many are kept; the oldest makes room.

    Raises:
        InvalidInputError: `batches` below 1.
    """

    def __init__(self, batches: int) -> None:
        checks.check_number("bank_batches", batches, 1)
        self.batches = batches
        self._kept: list[Tensor] = []
        self._count: Tensor | None = None

    @property
    def is_empty(self) -> bool:
        """Whether nothing was stored yet."""
        return not self._kept

    def store(self, images: Tensor, logits: Tensor, features: Sequence[Tensor] = ()) -> None:
        """Keep one batch: images [B, C, H, W], logits [B, K], features of any shape; always of the same shapes."""
        values = [value.detach() for value in (images, logits, *features)]
        if self._count is None:
            self._count = torch.zeros((), dtype=torch.int64, device=images.device)
            # Joined along the batch, where channels_last stays what it is.
            self._kept = [torch.cat([torch.zeros_like(value)] * self.batches) for value in values]
        rows = self._rows(self._count % self.batches, len(images))
        for kept, value in zip(self._kept, values, strict=True):
            kept.index_copy_(0, rows, value)
        self._count += 1

    def draw(self, random: torch.Generator) -> tuple[Tensor, Tensor, list[Tensor]]:
        """(images, logits, features) of one kept batch, drawn uniformly from `random`, a generator on their device."""
        assert self._count is not None
        filled = self._count.clamp(max=self.batches)
        place = torch.rand((), generator=random, device=self._count.device, dtype=torch.float64) * filled
        rows = self._rows(place.long().clamp(max=self.batches - 1), len(self._kept[0]) // self.batches)
        images, logits, *features = (_select(kept, rows) for kept in self._kept)
        return images, logits, features

    @staticmethod
    def _rows(slot: Tensor, batch: int) -> Tensor:
        return slot * batch + torch.arange(batch, device=slot.device)

    def state(self) -> dict[str, object]:
        """All that is kept, for a checkpoint."""
        return {"count": self._count, "kept": self._kept}

    def load_state(self, state: dict[str, object], device: torch.device) -> None:
        """Take up what :meth:`state` gave."""
        count, kept = state["count"], state["kept"]
        assert isinstance(kept, list)
        self._count = count.to(device) if isinstance(count, Tensor) else None
        self._kept = [value.to(device) for value in kept]


def _select(kept: Tensor, rows: Tensor) -> Tensor:
    selected = kept.index_select(0, rows)
    if kept.dim() == 4 and kept.is_contiguous(memory_format=torch.channels_last):
        return selected.contiguous(memory_format=torch.channels_last)
    return selected
