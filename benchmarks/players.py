"""Who plays a training step: the authors' code, plain PyTorch, that compiled, and this project.

Every player begins at the same :class:`benchmarks.contest.Start` with networks of its own. Called, it plays a step on
noise and labels that it draws itself.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

import adadfq
from adadfq.game import METRICS
from adadfq.nn import QuantAct, QuantConv2d, QuantLinear
from benchmarks import plain_step
from benchmarks.contest import Start, Step, swap_quantizers

AUTHORS = "authors"
PLAIN = "plain"
COMPILE = "torch.compile"
OURS = "adadfq"
OURS_BF16 = "adadfq-bf16"
EAGER = "adadfq-eager"
EAGER_BF16 = "adadfq-bf16-eager"
REFERENCE = "eager reference"


class Player(Protocol):
    """One way to play a step."""

    def __call__(self) -> Any:
        """Play a step."""

    def checked(self, noise: Tensor, labels: Tensor) -> Step:
        """Play a step on given noise [B, latent_dim] and labels [B]."""

    def eagerly(self) -> Any:
        """Play a step so that hooks on the networks run: not from a CUDA graph."""

    parts: dict[str, nn.Module]
    """The networks that play: "teacher", "student" and "generator"."""
    quantizers: tuple[type[nn.Module], ...]
    """Classes of the student's modules whose forward is quantisation, apart from a convolution in it."""


class Plain:
    """:class:`benchmarks.plain_step.PlainStep`, compiled or not."""

    def __init__(self, start: Start, compiled: bool = False) -> None:
        self._start, self._compiled = start, compiled
        student = swap_quantizers(
            start.student(),
            lambda layer: plain_step.Conv2d(layer, layer.weight_bits),
            lambda layer: plain_step.Linear(layer, layer.weight_bits),
            lambda act: plain_step.Activation(act.running_min, act.running_max, act.act_bits),
        )
        generator = plain_step.Generator(start.recipe)
        generator.load_state_dict(start.generator().state_dict())
        self._student, self._generator = student.to(start.device).eval(), generator.to(start.device).train()
        players = (start.teacher(), self._student, self._generator, start.recipe)
        if compiled:
            # One worker: a pool of them would go on using the cores that the next player is timed on.
            os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
            torch.compiler.reset()
            self.game = plain_step.PlainStep(*players, compile=lambda function: torch.compile(function, dynamic=False))
        else:
            self.game = plain_step.PlainStep(*players)
        self.parts = {"teacher": self.game.teacher, "student": self.game.student, "generator": self.game.generator}
        # Inside of a compiled network, hooks would have it compiled anew.
        self.quantizers = () if compiled else (plain_step.Activation, plain_step.Weight)

    def __call__(self) -> tuple[Tensor, Tensor]:
        return self._play(*self._start.draw())

    eagerly = __call__

    def _play(self, noise: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        if not self._compiled:
            return self.game.step(noise, labels)
        with _kept_buffers():
            return self.game.step(noise, labels)

    def checked(self, noise: Tensor, labels: Tensor) -> Step:
        losses = self._play(noise, labels)
        gradients = ({name: p.grad for name, p in m.named_parameters()} for m in (self._generator, self._student))
        return Step(*map(float, losses), *gradients)


@contextmanager
def _kept_buffers() -> Iterator[None]:
    """What is compiled inside can be run backward twice: it gives none of its buffers away."""
    from torch._functorch import config

    with config.patch(donated_buffer=False):
        yield


class Ours:
    """:class:`adadfq.Trainer`, with both networks in training; `trainer_options` are its."""

    def __init__(self, start: Start, precision: str = "float32", **trainer_options: Any) -> None:
        self._start = start
        recipe = start.recipe.replace(precision=precision)
        self.trainer = adadfq.Trainer(
            start.teacher(),
            start.student(),
            recipe,
            start.generator(),
            device=start.device,
            progress=False,
            **trainer_options,
        )
        game = self.trainer.game
        self.parts = {"teacher": game.teacher, "student": game.student, "generator": game.generator}
        self.quantizers = (QuantAct, QuantConv2d, QuantLinear)

    def __call__(self) -> Tensor:
        return self.trainer.play()

    def eagerly(self) -> Tensor:
        return self.trainer.game.step(*self._start.draw(), train_student=True)

    def checked(self, noise: Tensor, labels: Tensor) -> Step:
        metrics = dict(zip(METRICS, self.trainer.game.step(noise, labels, train_student=True).tolist(), strict=True))
        players = (self.trainer.generator, self.trainer.student)
        gradients = ({name: p.grad for name, p in m.named_parameters()} for m in players)
        return Step(metrics["loss_generator"], metrics["loss_student"], *gradients)


def _authors(start: Start, checkout: Path | None) -> Player:
    from benchmarks.authors import AuthorsStep

    if checkout is None:
        raise Unavailable("give the path of a checkout of hfutqian/AdaDFQ with --authors")
    return AuthorsStep(start, checkout)


class Unavailable(Exception):
    """A player cannot play here; says why."""


@dataclass(frozen=True)
class Kind:
    """One sort of player."""

    name: str
    build: Callable[[Start, Path | None], Player]
    """Gets where to begin and the authors' checkout."""
    precision: str = "float32"
    backend: str | None = None
    """What serves adadfq's operators meanwhile; None where it calls none of them."""
    devices: tuple[str, ...] = ("cpu", "cuda")
    """Types of device it plays on."""


#: Who can play. The last one's checked step is what the others' are compared with.
KINDS: tuple[Kind, ...] = (
    Kind(AUTHORS, _authors),
    Kind(PLAIN, lambda start, _: Plain(start)),
    Kind(COMPILE, lambda start, _: Plain(start, compiled=True)),
    Kind(OURS, lambda start, _: Ours(start), backend="auto"),
    Kind(OURS_BF16, lambda start, _: Ours(start, "bfloat16"), "bfloat16", "auto"),
    Kind(EAGER, lambda start, _: Ours(start, capture=False), backend="auto", devices=("cuda",)),
    Kind(
        EAGER_BF16,
        lambda start, _: Ours(start, "bfloat16", capture=False),
        "bfloat16",
        "auto",
        devices=("cuda",),
    ),
    Kind(REFERENCE, lambda start, _: Ours(start, fuse=False, capture=False), backend="reference"),
)
