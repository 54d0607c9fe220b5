"""The authors' published step: their trainer, one iteration a step, as a player of :mod:`benchmarks.step`.

Their average of ranges does not settle (it applies its bias correction recursively): ranges are given, and frozen, as
they are in all but the first epochs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import adadfq
from benchmarks import authors_code
from benchmarks.contest import Start, Step

#: This project's name of a module of the generator -> theirs.
_GENERATOR_MODULES = {
    "label_embedding": {
        "label_embedding": "label_emb",
        "project": "l1.0",
        "norm1": "conv_blocks0.0",
        "conv2": "conv_blocks1.0",
        "norm2": "conv_blocks1.1",
        "conv3": "conv_blocks2.0",
        "norm3": "conv_blocks2.1",
        "to_image": "conv_blocks2.3",
        "image_norm": "conv_blocks2.5",
    },
    "conditional_bn": {
        "project": "l1.0",
        "conv2": "conv_blocks1_0",
        "conv3": "conv_blocks2_0",
        "to_image": "conv_blocks2_3",
        "image_norm": "conv_blocks2_5",
        **{
            f"{ours}.{part}": theirs + suffix
            for ours, theirs in (("norm1", "conv_blocks0_0"), ("norm2", "conv_blocks1_1"), ("norm3", "conv_blocks2_1"))
            for part, suffix in (("norm", ""), ("weight", ".weights"), ("bias", ".biases"))
        },
    },
}


class AuthorsStep:
    """Their trainer, one iteration a step: see :class:`benchmarks.players.Player`.

    Args:
        start: where every player begins.
        checkout: see :func:`benchmarks.authors_code.load`, which also says what is refused.

    Raises:
        InvalidInputError: `checkout` is not theirs, or the recipe's temperature is not the one written into their code.
    """

    def __init__(self, start: Start, checkout: Path) -> None:
        recipe = start.recipe
        self._start = start
        code = authors_code.load(checkout, recipe, iterations=1)
        options = authors_code.settings(recipe, warmup_epochs=0)  # both networks train
        student = authors_code.student(start.student(), code.quantizers, _give_range).to(start.device).eval()
        with authors_code.running(start.device):
            generator = code.generator(options).to(start.device)
            self._names = _GENERATOR_MODULES[recipe.generator]
            self._take_weights(generator, start)
            self.trainer = authors_code.make_trainer(code, options, recipe, start.teacher(), student, generator)
        # They hook the teacher's BatchNorm in epoch 0, whatever the call.
        self._epoch = 0
        self.parts = {"teacher": self.trainer.model_teacher, "student": self.trainer.model, "generator": generator}
        quantizers = code.quantizers
        self.quantizers = (quantizers.QuantAct, quantizers.Quant_Conv2d, quantizers.Quant_Linear)

    def _take_weights(self, generator: nn.Module, start: Start) -> None:
        source = start.generator().state_dict()
        state = {_their_name(name, self._names): value for name, value in source.items()}
        generator.load_state_dict(state)

    def __call__(self) -> None:
        with authors_code.running(self._start.device):
            self.trainer.train(self._epoch)
        self._epoch = 1

    eagerly = __call__

    def checked(self, noise: Tensor, labels: Tensor) -> Step:
        with (
            mock.patch.object(torch, "randn", lambda *_, **__: noise.clone()),
            mock.patch.object(torch, "randint", lambda *_, **__: labels.clone()),
        ):
            self()
        losses = [self.trainer.scalar_info[f"{player} loss every epoch"] for player in "GS"]
        theirs = dict(self.trainer.generator.named_parameters())
        generator = {
            name: theirs[_their_name(name, self._names)].grad for name, _ in self._start.generator().named_parameters()
        }
        student = {name: p.grad for name, p in self.trainer.model.network.named_parameters()}
        return Step(*(float(loss.detach()) for loss in losses), generator, student)


def _their_name(name: str, modules: dict[str, str]) -> str:
    module, _, parameter = name.rpartition(".")
    return f"{modules[module]}.{parameter}"


def _give_range(theirs: Any, ours: adadfq.nn.QuantAct) -> None:
    theirs.x_min, theirs.x_max = ours.running_min.reshape(1).clone(), ours.running_max.reshape(1).clone()
    theirs.fix()
