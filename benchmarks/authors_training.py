"""The authors' published trainer over a whole schedule: what :mod:`benchmarks.accuracy` trains with ``--authors``.

An epoch is a call of their ``train``; around it stands what their `main.py` does: activation ranges move in the first
epochs, by their average, and are frozen at the end of every epoch; the student trains after warm-up. Their generator is
initialised by their code, under the run's seed, from which PyTorch's global generators then draw noise and labels.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

import adadfq
from adadfq.errors import AdadfqError, InvalidInputError
from benchmarks import authors_code

#: Fields of a recipe that their code follows, or that are none of training.
_FOLLOWED = {
    *("name", "source", "by_weight_bits", "num_classes", "image_size", "image_channels", "mean", "std"),
    *("epochs", "steps_per_epoch", "batch_size", "warmup_epochs", "calibration_epochs"),
    *("generator", "latent_dim", "lr_generator", "adam_betas", "lr_student", "momentum", "weight_decay"),
    *("lr_milestones", "lr_decay", "alpha_ds", "alpha_as", "beta", "gamma", "lambda_l", "lambda_u"),
    "temperature",  # written into their trainer, and checked where that is read
}


def check(recipe: adadfq.Recipe) -> None:
    """Refuse settings that their trainer does not have.

    Raises:
        InvalidInputError: says which, and what is played instead.
    """
    for field in fields(recipe):
        value = getattr(recipe, field.name)
        if field.name not in _FOLLOWED and value != field.default:
            raise InvalidInputError(
                f"the authors' code knows no {field.name}={value}: leave it at {field.default}, or train without "
                "--authors"
            )
    if recipe.lr_milestones == (1,):  # a share of the epochs to their schedule
        raise InvalidInputError(
            "the authors' code cannot lower its learning rates at epoch 1 only: change lr_milestones"
        )


class AuthorsTraining:
    """A run of their trainer.

    Args:
        teacher: float network; a copy is used.
        student: its copy made by :func:`adadfq.quantize`; their quantisers take the places of this project's in it.
        recipe: settled for the width. Everything that their code does not follow must be at its default.
        seed: of the generator's weights, the noise and the labels.
        device: where to train.
        checkout: folder that holds AdaDFQ/CIFAR and AdaDFQ/ImageNet.
        on_epoch_end: called as ``on_epoch_end(epoch, self)`` after each epoch, counted from 0.

    Attributes:
        student: the network with their quantisers, in eval mode.
        losses_student: mean L_Q of every epoch.
        epoch_seconds: of every epoch, without `on_epoch_end`.
        epoch_cpu_seconds: the processor's seconds in them.
        step: steps played.

    Raises:
        InvalidInputError: see :func:`check` and :func:`benchmarks.authors_code.load`.
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        recipe: adadfq.Recipe,
        *,
        seed: int,
        device: torch.device,
        checkout: Path,
        on_epoch_end: Callable[[int, AuthorsTraining], None] | None = None,
    ) -> None:
        check(recipe)
        self.recipe, self.seed, self.device, self.on_epoch_end = recipe, seed, device, on_epoch_end
        self._code = authors_code.load(checkout, recipe, iterations=recipe.steps_per_epoch)
        self.teacher = copy.deepcopy(teacher).to(device).eval()
        student = authors_code.student(student, self._code.quantizers, lambda *_: None)
        self.student = student.requires_grad_(True).to(device).eval()
        self.losses_student: list[float] = []
        self.epoch_seconds: list[float] = []
        self.epoch_cpu_seconds: list[float] = []
        self.step = 0

    def fit(self) -> None:
        """Train for the recipe's epochs; PyTorch's global random state is as before afterwards.

        Raises:
            AdadfqError: a loss is no longer finite.
        """
        devices = [self.device] if self.device.type == "cuda" else []
        options = authors_code.settings(self.recipe, self.recipe.warmup_epochs)
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(self.seed)
            with authors_code.running(self.device):
                generator = self._code.generator(options).to(self.device)
                trainer = authors_code.make_trainer(
                    self._code, options, self.recipe, self.teacher, self.student, generator
                )
            for epoch in range(self.recipe.epochs):
                since = time.perf_counter(), time.process_time()
                self._play_epoch(trainer, epoch)
                self.epoch_seconds.append(time.perf_counter() - since[0])
                self.epoch_cpu_seconds.append(time.process_time() - since[1])
                if self.on_epoch_end is not None:
                    self.on_epoch_end(epoch, self)

    def _play_epoch(self, trainer: Any, epoch: int) -> None:
        quantizers = [m for m in self.student.modules() if isinstance(m, self._code.quantizers.QuantAct)]
        if epoch < self.recipe.calibration_epochs:
            for quantizer in quantizers:
                quantizer.unfix()
        with authors_code.running(self.device):
            _, loss, _ = trainer.train(epoch)
        for quantizer in quantizers:
            quantizer.fix()
        self.step += self.recipe.steps_per_epoch
        if not math.isfinite(loss):
            raise AdadfqError(f"loss_student is {loss} in epoch {epoch + 1}: training diverged")
        self.losses_student.append(loss)
