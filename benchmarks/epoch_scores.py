"""Scoring a student after its epochs, and how long they took."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import adadfq
from adadfq import scoring
from benchmarks.decoded_images import DecodedImages
from benchmarks.unfinished import Place

__all__ = ["EpochScores"]


class EpochScores:
    """Scores the student after the last epoch of warm-up and every later one; its time is none of training's."""

    def __init__(
        self, images: DecodedImages, held_out: adadfq.HeldOut, warmup_epochs: int, place: Place | None
    ) -> None:
        self.images, self.held_out, self.warmup_epochs, self.place = images, held_out, warmup_epochs, place
        self.take_up({})

    def take_up(self, scores: Mapping[str, list[Any]]) -> None:
        """What an earlier call has kept of a run that goes on."""
        self.accuracies: list[float] = list(scores.get("accuracies", []))
        self.signals: list[dict[str, float]] = list(scores.get("signals", []))
        self.epoch_seconds: list[float] = list(scores.get("epoch_seconds", []))
        self.epoch_cpu_seconds: list[float] = list(scores.get("epoch_cpu_seconds", []))
        #: Of the epoch that was interrupted, before that: seconds and the processor's seconds.
        self.begun = scores.get("begun", [0.0, 0.0])
        self.begin()

    def begin(self) -> None:
        """Training begins, or goes on."""
        self.since, self.cpu_since = time.perf_counter(), time.process_time()

    def __call__(self, epoch: int, training: Any) -> None:
        # The trainer has read the epoch's metrics from the device, which has thus finished.
        seconds, cpu_seconds = self._spent()
        # Training may have gone on from before the last epoch that was scored.
        del self.epoch_seconds[epoch:], self.epoch_cpu_seconds[epoch:]
        scored = max(0, epoch - max(0, self.warmup_epochs - 1))
        del self.accuracies[scored:], self.signals[scored:]
        self.epoch_seconds.append(seconds)
        self.epoch_cpu_seconds.append(cpu_seconds)
        if epoch + 1 >= self.warmup_epochs:
            self.accuracies.append(scoring.accuracy(training.student, self.images).top1)
            self.signals.append(self.held_out.score(training.student))
        self.begun = [0.0, 0.0]
        self.keep()
        self.begin()

    def interrupted(self) -> None:
        """Training ends within an epoch, and is to go on there."""
        self.begun = list(self._spent())
        self.keep()

    def keep(self) -> None:
        """Write what there is for :meth:`take_up`."""
        if self.place is not None:
            names = ("accuracies", "signals", "epoch_seconds", "epoch_cpu_seconds", "begun")
            self.place.keep({name: getattr(self, name) for name in names})

    def _spent(self) -> tuple[float, float]:
        return (
            self.begun[0] + time.perf_counter() - self.since,
            self.begun[1] + time.process_time() - self.cpu_since,
        )
