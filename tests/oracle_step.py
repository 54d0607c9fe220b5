"""Training step by step in float64 and plain PyTorch, written from the formulas, importing no package code.

:class:`OracleTraining` plays the steps of both players, and those of the student alone: the generator, the two
networks, every loss, the gradients (by autograd), the optimizers, the schedule, the bank of kept batches and the
average of the generator. The paper's settings are as it says them; where others are from is said beside them.
Parameters are named as the package names them in a state_dict, which is what both sides start from.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import oracle
import torch
from oracle_generator import generate, low_passed
from oracle_optimizers import SGD, Adam
from oracle_players import SHARES, Edges, Network, Range, Student, Teacher, weight_quantizer
from torch import Tensor

#: The paper's CIFAR-10 settings, and every other setting there is, with the value that leaves it out.
PAPER: dict[str, Any] = {
    "num_classes": 10,
    "image_size": 32,
    "image_channels": 3,
    "epochs": 400,
    "steps_per_epoch": 200,
    "batch_size": 16,
    "warmup_epochs": 4,
    "calibration_epochs": 4,
    "generator": "label_embedding",
    "latent_dim": 100,
    "lr_generator": 1e-3,
    "adam_betas": [0.5, 0.999],
    "lr_student": 1e-4,
    "momentum": 0.9,
    "nesterov": True,
    "weight_decay": 1e-4,
    "lr_milestones": [100, 200, 300],
    "lr_decay": 0.1,
    "alpha_ds": 0.2,
    "alpha_as": 0.1,
    "beta": 1.0,
    "gamma": 1.0,
    "lambda_l": 0.1,
    "lambda_u": 0.8,
    "temperature": 20.0,
    "detach_min": False,
    # What is not in the paper.
    "weight_range": "minmax",
    "act_range": "minmax",
    "student_optimizer": "sgd",
    "learn_steps": False,
    "lr_steps": 1e-3,
    "feature_weight": 0.0,
    "crop": 0,
    "flip": False,
    "mirror_teacher": False,
    "low_pass": 0.0,
    "replays": 0,
    "bank_batches": 64,  # of which without replays nothing is drawn
    "generator_ema": 0.0,
    "spectral_norm": False,
    "lr_schedule": "step",
    "lr_warmup_steps": 0,
}
#: Values by name that this file computes.
CHOICES = {
    "generator": ("label_embedding", "conditional_bn"),
    "weight_range": ("minmax", "mse"),
    "act_range": ("minmax", "mse"),
    "student_optimizer": ("sgd", "adam"),
    "lr_schedule": ("step", "cosine"),
}
#: Fields of a recipe without a part in a step's mathematics: here all of it is in float64.
NO_PART = {"name", "source", "mean", "std", "precision", "by_weight_bits"}

STUDENT_BETAS = 0.9, 0.999
#: Generated batches on which an activation's range of least error is found.
RANGE_BATCHES = 8


class Unknown(Exception):
    """A recipe asks for something that this file does not compute."""


def settled(recipe: Mapping[str, Any], weight_bits: int) -> dict[str, Any]:
    """The paper's settings, changed by those a recipe's file sets and by those it sets for one width.

    Raises:
        Unknown: one of them has no oracle.
    """
    by_width = recipe.get("by_weight_bits", {}).get(str(weight_bits), {})
    changes = {**recipe, **by_width}
    if unknown := sorted(set(changes) - set(PAPER) - NO_PART):
        raise Unknown(
            f"the recipe sets {', '.join(unknown)}, which tests/oracle_step.py does not compute: write the oracle of "
            "each there, from its formula, and add it to PAPER with the value that leaves it out"
        )
    settings = {**PAPER, **{name: value for name, value in changes.items() if name in PAPER}}
    for name, known in CHOICES.items():
        if settings[name] not in known:
            raise Unknown(f"the recipe's {name} {settings[name]!r} is not written in tests/oracle_step.py")
    return settings


class Batch(NamedTuple):
    """What is drawn for a generated batch of B images."""

    noise: Tensor
    labels: Tensor
    #: (top, left) of each image's crop in the padded image; of an image that is not cropped (0, 0).
    places: list[tuple[int, int]]
    #: Of each image.
    flipped: list[bool]


class Phase(NamedTuple):
    """What a step does."""

    trains_student: bool
    moves_ranges: bool
    starts_student: bool
    """Whether it is the first to train the student."""
    is_replay: bool
    """Whether the student trains alone."""
    lr_generator: float
    lr_student: float
    lr_steps: float


def phase(settings: Mapping[str, Any], step: int) -> Phase:
    epoch, start = step // settings["steps_per_epoch"], settings["warmup_epochs"] * settings["steps_per_epoch"]
    decay = 1.0
    if settings["lr_schedule"] == "step":
        for milestone in settings["lr_milestones"]:
            if epoch >= milestone:
                decay *= settings["lr_decay"]
    elif step >= start:
        end = settings["epochs"] * settings["steps_per_epoch"]
        decay = math.cos(math.pi / 2 * (step - start) / (end - start)) ** 2
    rise = 1.0
    if start <= step < start + settings["lr_warmup_steps"]:
        rise = (step - start + 1) / (settings["lr_warmup_steps"] + 1)
    return Phase(
        epoch >= settings["warmup_epochs"],
        epoch < settings["calibration_epochs"],
        step == start,
        step >= start and (step - start) % (settings["replays"] + 1) > 0,
        settings["lr_generator"] * decay,
        settings["lr_student"] * decay * rise,
        settings["lr_steps"] * decay * rise,
    )


class Kept(NamedTuple):
    """A batch as the student learns it."""

    number: int
    """How many were kept before it; -1 where it is not kept."""
    shown: Tensor
    target: Tensor
    features: list[Tensor]


class Step(NamedTuple):
    """All that one step computed. Dictionaries are by parameter or statistic; those of the end are after the update."""

    phase: Phase
    values: dict[str, Tensor]
    """images, both logits, those that the student learns, h_prime [B], the losses, and whose labels are soft [B].

    Of a replay only what is the student's.
    """
    gradients: dict[str, Tensor]
    """At the images, and at the logits for either loss."""
    generator_gradients: dict[str, Tensor]
    """Empty where only the student trains."""
    student_gradients: dict[str, Tensor]
    """Empty while only the generator trains."""
    generator: dict[str, Tensor]
    """Parameters, running statistics and vectors of spectral normalisation."""
    averaged: dict[str, Tensor] | None
    """The same of the averaged generator, where there is one."""
    student: dict[str, Tensor]
    """Parameters, running statistics and weights' own steps; a learned scale of a range is "range 0.scale" etc."""
    replayed: int | None
    """Of a replay of a kept batch: how many were kept before that one."""
    ranges: list[tuple[Tensor, Tensor, int, Tensor, Tensor]]
    """Of every activation in the order of the forward: (lo, hi, batches seen, scale, zero point)."""
    edges: Edges


class OracleTraining:
    """Both players from the state_dicts they start with.

    Args:
        settings: of :func:`settled`.
        network: one of the networks above.
        activations: how many activations it has.
        teacher, student, generator: their parameters and running statistics.
        weight_bits, act_bits: widths.
    """

    def __init__(
        self,
        settings: Mapping[str, Any],
        network: Network,
        activations: int,
        teacher: Mapping[str, Tensor],
        student: Mapping[str, Tensor],
        generator: Mapping[str, Tensor],
        weight_bits: int,
        act_bits: int,
    ) -> None:
        self.settings, self.network, self.bits = settings, network, weight_bits
        self.teacher, self.student, self.generator = (
            {key: value.double() if value.is_floating_point() else value.clone() for key, value in state.items()}
            for state in (teacher, student, generator)
        )
        self.ranges = [Range(act_bits) for _ in range(activations)]
        betas = settings["adam_betas"]
        self.adam = Adam(_parameters(self.generator), (betas[0], betas[1]))
        trained, decay = _parameters(self.student), settings["weight_decay"]
        self.optimizer: Adam | SGD
        if settings["student_optimizer"] == "adam":
            self.optimizer = Adam(trained, STUDENT_BETAS, decay)
        else:
            self.optimizer = SGD(trained, settings["momentum"], settings["nesterov"], decay)
        #: Of the learned step sizes, from when there are any.
        self.adam_steps: Adam | None = None
        #: Average of the generator's weights from when the student's training starts; its own running statistics.
        self.averaged: dict[str, Tensor] | None = None
        #: By place; the batches stored so far take the places in turn.
        self.bank: dict[int, Kept] = {}
        self.stored = self.steps = 0

    def looks(self) -> int:
        """How many generated batches the next step is preceded by, to be looked at alone."""
        settings = self.settings
        epoch = max(settings["warmup_epochs"], settings["calibration_epochs"])
        if self.steps != epoch * settings["steps_per_epoch"]:
            return 0
        fixed = settings["learn_steps"] or settings["weight_range"] != "minmax"
        return RANGE_BATCHES * (settings["act_range"] != "minmax") + fixed

    def shown(self, images: Tensor, batch: Batch) -> Tensor:
        """Low-passed, padded by zeros, cropped back, and flipped left to right: what the networks see of images."""
        margin, size = self.settings["crop"], images.shape[2]
        if self.settings["low_pass"]:
            images = low_passed(low_passed(images, self.settings["low_pass"], 2), self.settings["low_pass"], 3)
        seen = []
        for image, (top, left), flipped in zip(images, batch.places, batch.flipped, strict=True):
            padded = image.new_zeros(len(image), size + 2 * margin, size + 2 * margin)
            padded[:, margin : margin + size, margin : margin + size] = image
            cropped = padded[:, top : top + size, left : left + size]
            seen.append(torch.stack(cropped.unbind(2)[::-1], 2) if flipped else cropped)
        return torch.stack(seen)

    def begin_student(self, batches: list[Batch], edges: Edges) -> None:
        """The student's training starts and its ranges stand still: set what keeps a step of its own."""
        settings, images = self.settings, []
        with torch.no_grad():
            for batch in batches:
                made, statistics = generate(
                    settings["generator"], self.generator, batch.noise.double(), batch.labels, edges
                )
                self.generator.update(statistics)
                images.append(self.shown(made, batch))
            if settings["act_range"] == "mse":
                for range_ in self.ranges:
                    range_.errors = torch.zeros(len(SHARES), dtype=torch.float64)
                for shown in images[:RANGE_BATCHES]:
                    self.network(Student(self.student, edges, self.bits, self.ranges, False), shown)
                for range_ in self.ranges:
                    range_.shrink(edges)
        if settings["learn_steps"] or settings["weight_range"] == "mse":
            for key, value in list(self.student.items()):
                if key.endswith(".weight") and value.dim() > 1:
                    scale, zero_point = weight_quantizer(value, self.bits, settings["weight_range"], edges)
                    self.student.update({f"{key}_scale": scale, f"{key}_zero_point": zero_point})
        if settings["learn_steps"]:
            self.student.update({f"range {i}.scale": range_.scale for i, range_ in enumerate(self.ranges)})
            self.adam_steps = Adam(_step_sizes(self.student), STUDENT_BETAS)

    def step(self, batch: Batch, looked_at: list[Batch]) -> Step:
        """One step on this batch; `looked_at` are those of :meth:`looks` before it."""
        settings, (now, edges) = self.settings, self._begin(looked_at, False)
        generator = {k: v.requires_grad_() for k, v in _parameters(self.generator).items()}
        student = self._learned_by_student()

        images, statistics = generate(
            settings["generator"], {**self.generator, **generator}, batch.noise.double(), batch.labels, edges
        )
        shown = self.shown(images, batch)
        watching = Teacher(self.teacher, edges)
        t = self.network(watching, shown)
        quantised = Student({**self.student, **student}, edges, self.bits, self.ranges, now.moves_ranges)
        q = self.network(quantised, shown)

        total, margin, disagreement, agreement, h_prime = oracle.margin_loss(
            t,
            q,
            batch.labels,
            settings["lambda_l"],
            settings["lambda_u"],
            settings["alpha_ds"],
            settings["alpha_as"],
            settings["beta"],
            settings["detach_min"],
        )
        for name in ("lambda_l", "lambda_u"):
            edges.add(f"H' at {name}", h_prime - settings[name])
        statistics_loss = sum(watching.statistics_losses) / len(watching.statistics_losses)
        loss_generator = total + settings["gamma"] * statistics_loss
        target = self._target(t, shown, edges) if now.trains_student else t.detach()
        loss_logits, loss_features = self._student_losses(target, watching.features, q, quantised.features)
        loss_student = loss_logits + loss_features

        gradients, student_gradients = {}, {}
        places = {"images": images, "teacher_logits": t, "student_logits": q}
        found = torch.autograd.grad(loss_generator, [*places.values(), *generator.values()], retain_graph=True)
        gradients.update({f"loss_generator at {key}": g for key, g in zip(places, found, strict=False)})
        generator_gradients = dict(zip(generator, found[len(places) :], strict=True))
        if now.trains_student:
            found = torch.autograd.grad(loss_student, [q, *student.values()])
            gradients["loss_student at student_logits"] = found[0]
            student_gradients = dict(zip(student, found[1:], strict=True))

        with torch.no_grad():
            self.adam.step(self.generator, generator_gradients, now.lr_generator)
            if now.trains_student:
                self._update_student(student_gradients, now)
            if now.trains_student and settings["replays"] and settings["bank_batches"]:
                features = [feature.detach() for feature in watching.features]
                place = self.stored % settings["bank_batches"]
                self.bank[place] = Kept(self.stored, shown.detach(), target, features)
                self.stored += 1
            if self.averaged is not None:
                d = settings["generator_ema"]
                for key in generator:
                    self.averaged[key] = d * self.averaged[key] + (1 - d) * self.generator[key]
            self.generator.update(statistics)
        values = {
            "images": images,
            "teacher_logits": t,
            "targets": target,
            "student_logits": q,
            "h_prime": h_prime,
            "loss_generator": loss_generator,
            "loss_margin": margin,
            "loss_ds": disagreement,
            "loss_as": agreement,
            "loss_bns": statistics_loss,
            "loss_logits": loss_logits,
            "loss_features": loss_features,
            "loss_student": loss_student,
        }
        return self._as_step(now, values, gradients, generator_gradients, student_gradients, edges)

    def _begin(self, looked_at: list[Batch], is_replay: bool) -> tuple[Phase, Edges]:
        """Count the step, and do what comes before the first ones of the student's training."""
        now, edges = phase(self.settings, self.steps), Edges()
        assert now.is_replay == is_replay and len(looked_at) == self.looks()
        if now.starts_student and self.settings["generator_ema"]:
            self.averaged = dict(self.generator)
        if looked_at:
            self.begin_student(looked_at, edges)
        self.steps += 1
        return now, edges

    def replay(self, source: int | Batch, looked_at: list[Batch]) -> Step:
        """One step of the student alone.

        Args:
            source: place of the kept batch that it learns, or what new images are generated from.
            looked_at: as of :meth:`step`.
        """
        now, edges = self._begin(looked_at, True)
        student = self._learned_by_student()
        kept = self.bank[source] if isinstance(source, int) else self._new(source, edges)
        quantised = Student({**self.student, **student}, edges, self.bits, self.ranges, now.moves_ranges)
        q = self.network(quantised, kept.shown)
        loss_logits, loss_features = self._student_losses(kept.target, kept.features, q, quantised.features)
        loss_student = loss_logits + loss_features
        at_logits, *found = torch.autograd.grad(loss_student, [q, *student.values()])
        student_gradients = dict(zip(student, found, strict=True))
        self._update_student(student_gradients, now)
        values = {
            "targets": kept.target,
            "student_logits": q,
            "loss_logits": loss_logits,
            "loss_features": loss_features,
            "loss_student": loss_student,
        }
        gradients = {"loss_student at student_logits": at_logits}
        replayed = kept.number if isinstance(source, int) else None
        return self._as_step(now, values, gradients, {}, student_gradients, edges, replayed)

    @torch.no_grad()
    def _new(self, batch: Batch, edges: Edges) -> Kept:
        state = self.generator if self.averaged is None else self.averaged
        images, statistics = generate(self.settings["generator"], state, batch.noise.double(), batch.labels, edges)
        state.update(statistics)
        shown = self.shown(images, batch)
        watching = Teacher(self.teacher, edges)
        return Kept(-1, shown, self._target(self.network(watching, shown), shown, edges), watching.features)

    def _learned_by_student(self) -> dict[str, Tensor]:
        """Copies of the student's parameters and learned step sizes, which require gradients."""
        student = _parameters(self.student)
        if self.adam_steps is not None:
            student.update({key: value.clone() for key, value in _step_sizes(self.student).items()})
        return {key: value.requires_grad_() for key, value in student.items()}

    @torch.no_grad()
    def _target(self, t: Tensor, shown: Tensor, edges: Edges) -> Tensor:
        target = t.detach()
        if self.settings["mirror_teacher"]:
            mirrored = torch.stack(shown.unbind(3)[::-1], 3)
            target = 0.5 * target + 0.5 * self.network(Teacher(self.teacher, edges), mirrored)
        return target

    def _student_losses(
        self, target: Tensor, theirs: list[Tensor], q: Tensor, ours: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        errors = [
            (their.detach() - our).square().sum() / their.detach().square().sum()
            for their, our in zip(theirs, ours, strict=True)
        ]
        matching = self.settings["feature_weight"] * sum(errors) / len(errors)
        return oracle.student_loss(target, q, self.settings["temperature"]), matching

    @torch.no_grad()
    def _update_student(self, gradients: Mapping[str, Tensor], now: Phase) -> None:
        of_steps = {k: g for k, g in gradients.items() if k.endswith("scale")}
        self.optimizer.step(self.student, {k: g for k, g in gradients.items() if k not in of_steps}, now.lr_student)
        if self.adam_steps is not None:
            # Adam moves the logarithm of a step, whose gradient is s dL/ds.
            logarithms = {k: self.student[k].log() for k in of_steps}
            self.adam_steps.step(logarithms, {k: g * self.student[k] for k, g in of_steps.items()}, now.lr_steps)
            self.student.update({k: value.exp() for k, value in logarithms.items()})

    def _as_step(
        self,
        now: Phase,
        values: Mapping[str, Tensor],
        gradients: dict[str, Tensor],
        generator_gradients: dict[str, Tensor],
        student_gradients: dict[str, Tensor],
        edges: Edges,
        replayed: int | None = None,
    ) -> Step:
        return Step(
            now,
            {key: value.detach() for key, value in values.items()},
            gradients,
            generator_gradients,
            student_gradients,
            dict(self.generator),
            None if self.averaged is None else dict(self.averaged),
            dict(self.student),
            replayed,
            [(r.lo, r.hi, r.batches, r.scale, r.zero_point) for r in self.ranges],
            edges,
        )

    def adopt_step_sizes(self, step_sizes: Mapping[str, Tensor]) -> None:
        """Go on from the package's learned step sizes, which it keeps in float32: the rounding would grow by step."""
        self.student.update({name: value.double() for name, value in step_sizes.items()})


def _step_sizes(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if key.endswith("scale")}


def _parameters(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of what trains: all but the running statistics and what belongs to quantisers."""
    others = ("running_mean", "running_var", "num_batches_tracked", "scale", "zero_point", "._u", "._v")
    return {key: value.detach().clone() for key, value in state.items() if not key.endswith(others)}
