"""Scoring a student after its epochs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import adadfq
from adadfq import scoring
from benchmarks.decoded_images import DecodedImages
from benchmarks.unfinished import Place

__all__ = ["EpochScores"]


class EpochScores:
    """Scores the student after the last epoch of warm-up and every later one.

    Attributes:
        accuracies: one an epoch that was scored, in percent.
        signals: of :meth:`adadfq.HeldOut.score`, beside each of them.
    """

    def __init__(
        self, images: DecodedImages, held_out: adadfq.HeldOut, warmup_epochs: int, place: Place | None
    ) -> None:
        self.images, self.held_out, self.place = images, held_out, place
        self.first = max(0, warmup_epochs - 1)
        self.take_up({})

    def take_up(self, scores: Mapping[str, list[Any]]) -> None:
        """What an earlier call has kept of a run that goes on."""
        self.accuracies: list[float] = list(scores.get("accuracies", []))
        self.signals: list[dict[str, float]] = list(scores.get("signals", []))

    def __call__(self, epoch: int, training: Any) -> None:
        if epoch < self.first:
            return
        # Training may have gone on from before the last epoch that was scored.
        del self.accuracies[epoch - self.first :], self.signals[epoch - self.first :]
        self.accuracies.append(scoring.accuracy(training.student, self.images).top1)
        self.signals.append(self.held_out.score(training.student))
        if self.place is not None:
            self.place.keep({"accuracies": self.accuracies, "signals": self.signals})
