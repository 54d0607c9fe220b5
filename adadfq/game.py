"""One step of the game between generator and student: both players' losses and gradients, each computed once.

Per step the networks run: the teacher forward once (with ``mirror_teacher`` a second time, without a gradient), the
student forward once, one backward through both to the images (L_G, no weight gradients of either), and one backward
through the student to its weights (L_Q, not to the images).
Nothing in a step waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from adadfq import functional
from adadfq.bank import ImageBank
from adadfq.errors import InvalidInputError
from adadfq.extra_losses import feature_loss
from adadfq.fused_layers import BatchNormWatch
from adadfq.ops.schema import compute_dtype
from adadfq.recipe import Recipe
from adadfq.transforms import Transform

__all__ = ["METRICS", "BatchNormMatch", "Game", "draw_noise"]

#: Metrics of a step, in the order of :meth:`Game.step`'s result. The agreement is that of the student with what it
#: learns: the teacher's logits, or with ``mirror_teacher`` their mean.
METRICS = (
    "loss_generator",
    "loss_margin",
    "loss_ds",
    "loss_as",
    "loss_bns",
    "loss_student",
    "loss_features",
    "h_prime",
    "agreement",
    "teacher_accuracy",
)

#: Those that a replay has.
REPLAY_METRICS = ("loss_student", "loss_features", "agreement")


class BatchNormMatch:
    """Sums the BatchNorm-statistics loss over the layers of a teacher during its forward (paper, L_BNS).

    Args:
        teacher: network with BatchNorm layers that keep running statistics; fused (:func:`adadfq.fuse`) or not.

    Raises:
        InvalidInputError: it has none.
    """

    def __init__(self, teacher: nn.Module) -> None:
        self.layers = [
            module
            for module in teacher.modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None
        ]
        if not self.layers:
            raise InvalidInputError(
                f"the teacher ({type(teacher).__name__}) has no BatchNorm layer with running statistics; data-free "
                "training draws its images from them (were they folded into the convolutions? use the unfolded model)"
            )
        self.watches = [module for module in teacher.modules() if isinstance(module, BatchNormWatch)]
        self._losses: list[Tensor] = []

    def _hook(self, module: Any, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        x = args[0] if args else kwargs["input"]
        self._losses.append(functional.bn_match(x, module.running_mean, module.running_var))

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Collect the losses of the forwards run inside the block."""
        self._losses = []
        watched = {norm for watch in self.watches for norm in watch.norms}
        hooked = [layer for layer in self.layers if layer not in watched]
        handles = [layer.register_forward_pre_hook(self._hook, with_kwargs=True) for layer in hooked]
        for watch in self.watches:
            watch.losses = self._losses
        try:
            yield
        finally:
            for watch in self.watches:
                watch.losses = None
            for handle in handles:
                handle.remove()

    def loss(self) -> Tensor:
        """Mean over the BatchNorm calls of the last watched forward; forgets them.

        Raises:
            InvalidInputError: the forward ran no BatchNorm layer.
        """
        losses, self._losses = self._losses, []
        if not losses:
            raise InvalidInputError("the teacher's forward ran none of its BatchNorm layers")
        return torch.stack(losses).mean()


class Game:
    """The players, their losses and one step.

    Args:
        teacher: frozen network in eval mode (no parameter requires a gradient), fused (:func:`adadfq.fuse`) or not.
            With ``feature_weight`` above 0 in the recipe, teacher and student return (logits, features):
            :func:`adadfq.fusion.with_features`.
        student: quantised network in eval mode, fused or not; its parameters require gradients.
        generator: in train mode; ``forward(noise, labels)`` gives images.
        recipe: weights and bounds of the losses, and the precision: with "bfloat16" the networks run under autocast;
            parameters, statistics, ranges and losses stay as they are.
        optimizer_generator: over the generator's parameters.
        optimizer_student: over the student's parameters, learned step sizes excepted.
        averaged: a copy of the generator, for recipes with ``generator_ema``.

    Raises:
        InvalidInputError: the teacher has no BatchNorm.
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        generator: nn.Module,
        recipe: Recipe,
        optimizer_generator: torch.optim.Optimizer,
        optimizer_student: torch.optim.Optimizer,
        averaged: nn.Module | None = None,
    ) -> None:
        self.teacher, self.student, self.generator, self.averaged = teacher, student, generator, averaged
        self.recipe = recipe
        self.optimizer_generator, self.optimizer_student = optimizer_generator, optimizer_student
        self.bn_match = BatchNormMatch(teacher)
        self.generator_parameters = [p for p in generator.parameters() if p.requires_grad]
        self.student_parameters = [p for p in student.parameters() if p.requires_grad]
        self.log_steps: list[tuple[nn.Parameter, nn.Parameter]] = []
        self.optimizer_steps: torch.optim.Optimizer | None = None
        device = self.generator_parameters[0].device
        self.device_type = device.type
        self.autocast = recipe.precision == "bfloat16"
        self.transform = Transform(recipe, device)
        self.bank = ImageBank(recipe.bank_batches) if recipe.replays and recipe.bank_batches else None
        #: H' of every sample of the last step of both players, [B]; overwritten by the next.
        self.h_prime = torch.zeros(recipe.batch_size, device=device)

    def learn_steps(self, log_steps: list[tuple[nn.Parameter, nn.Parameter]], optimizer: torch.optim.Optimizer) -> None:
        """Train the student's learned step sizes too (:func:`adadfq.nn.step_sizes`).

        Their logarithms are what the optimizer moves: a learning rate is then the same share of a small step size and
        of a large one, and none reaches 0.

        Args:
            log_steps: (step size, its logarithm) of each.
            optimizer: over the logarithms.
        """
        self.log_steps, self.optimizer_steps = log_steps, optimizer
        self.student_parameters = [p for p in self.student.parameters() if p.requires_grad]

    def images(
        self, noise: Tensor, labels: Tensor, random: torch.Generator | None, generator: nn.Module | None = None
    ) -> Tensor:
        """What the networks are shown: `generator`'s images (the game's own by default), low-passed, cropped, flipped.

        Arguments as :meth:`step`; returns [B, C, H, W], channels_last.
        """
        images = (self.generator if generator is None else generator)(noise, labels)
        if not self.transform.is_identity:
            images = self.transform(images, random)
        return images.contiguous(memory_format=torch.channels_last)

    def step(self, noise: Tensor, labels: Tensor, train_student: bool, random: torch.Generator | None = None) -> Tensor:
        """Play one step: update the generator and, if `train_student`, the student.

        Both gradients are taken at the parameters before the step.

        Args:
            noise: [B, latent_dim].
            labels: int64 [B], the classes to generate.
            train_student: False while only the generator trains.
            random: what crops and flips are drawn from, on the images' device; needed where the recipe asks for them.

        Returns:
            The metrics named by :data:`METRICS`, float32 [len(METRICS)], on the device.
        """
        recipe = self.recipe
        if len(noise) != len(self.h_prime):
            self.h_prime = self.h_prime.new_zeros(len(noise))
        with torch.autocast(self.device_type, torch.bfloat16, enabled=self.autocast):
            images = self.images(noise, labels, random)
            with self.bn_match.watching():
                teacher_logits, teacher_features = self._outputs(self.teacher, images)
            # No gradient path into the student's weights while they do not train.
            with _requires_grad(self.student_parameters, train_student):
                student_logits, student_features = self._outputs(self.student, images)
            # While only the generator trains, the student's loss is only shown.
            targets = self._targets(images, teacher_logits) if train_student else teacher_logits
        loss_bns = self.bn_match.loss()
        logits_loss = self._logits_loss(teacher_logits, student_logits, labels)
        loss_generator = logits_loss.total + recipe.gamma * loss_bns
        loss_student, loss_features = self._student_loss(targets, teacher_features, student_logits, student_features)

        # Asking for one player's parameters alone keeps autograd from computing the other's weight gradients. The
        # generator's come last: from then on every layer's memory is free as soon as its gradient is through.
        if train_student:
            _set_gradients(self.student_parameters, loss_student, keep_graph=True)
        _set_gradients(self.generator_parameters, loss_generator, keep_graph=False)
        if train_student:
            self._update_student()
            if self.bank is not None:
                self.bank.store(images, targets, teacher_features)
        self.optimizer_generator.step()
        self._follow_generator()

        with torch.no_grad():
            self.h_prime.copy_(logits_loss.h_prime)
            return torch.stack(
                [
                    loss_generator.detach(),
                    logits_loss.margin,
                    logits_loss.disagreement,
                    logits_loss.agreement,
                    loss_bns.detach(),
                    loss_student.detach(),
                    loss_features.detach(),
                    logits_loss.h_prime.mean(),
                    (targets.argmax(1) == student_logits.argmax(1)).float().mean(),
                    (teacher_logits.argmax(1) == labels).float().mean(),
                ]
            ).float()

    def replay(self, random: torch.Generator) -> Tensor:
        """Update the student alone, on a batch of the bank or, without one, on new images that nothing learns from.

        Args:
            random: what the batch, or noise, labels, crops and flips are drawn from, on the images' device.

        Returns:
            The metrics as :meth:`step`, NaN where not in :data:`REPLAY_METRICS`.
        """
        with torch.autocast(self.device_type, torch.bfloat16, enabled=self.autocast):
            if self.bank is not None:
                images, targets, teacher_features = self.bank.draw(random)
            else:
                images, targets, teacher_features = self._new_batch(random)
            student_logits, student_features = self._outputs(self.student, images)
        loss_student, loss_features = self._student_loss(targets, teacher_features, student_logits, student_features)
        _set_gradients(self.student_parameters, loss_student, keep_graph=False)
        self._update_student()
        agreement = (targets.argmax(1) == student_logits.argmax(1)).float().mean()
        nothing = torch.full_like(agreement, torch.nan)
        found = dict(zip(REPLAY_METRICS, (loss_student, loss_features, agreement), strict=True))
        return torch.stack([found.get(name, nothing).detach().float() for name in METRICS])

    @torch.no_grad()
    def _new_batch(self, random: torch.Generator) -> tuple[Tensor, Tensor, list[Tensor]]:
        noise, labels = draw_noise(self.recipe, random)
        generator = self.generator if self.averaged is None else self.averaged
        images = self.images(noise, labels, random, generator)
        teacher_logits, teacher_features = self._outputs(self.teacher, images)
        return images, self._targets(images, teacher_logits), teacher_features

    def _outputs(self, network: nn.Module, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        if not self.recipe.feature_weight:
            return network(images), []
        logits, features = network(images)
        return logits, features

    @torch.no_grad()
    def _targets(self, images: Tensor, teacher_logits: Tensor) -> Tensor:
        """What the student's logits learn, [B, K]: the teacher's, or their mean with those of the mirror images."""
        if not self.recipe.mirror_teacher:
            return teacher_logits
        mirrored, _ = self._outputs(self.teacher, images.flip(3).contiguous(memory_format=torch.channels_last))
        dtype = compute_dtype(teacher_logits.dtype)
        return (teacher_logits.to(dtype) + mirrored.to(dtype)) / 2

    def _logits_loss(self, teacher: Tensor, student: Tensor, labels: Tensor) -> functional.MarginLoss:
        """L_margin + beta (alpha_ds L_ds + alpha_as L_as)."""
        recipe = self.recipe
        bounds, alphas = (recipe.lambda_l, recipe.lambda_u), (recipe.alpha_ds, recipe.alpha_as)
        return functional.margin_loss(teacher, student, labels, *bounds, *alphas, recipe.beta, recipe.detach_min)

    def _student_loss(
        self, teacher: Tensor, teacher_features: list[Tensor], student: Tensor, student_features: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """L_Q, and the part of it that matches features."""
        loss = functional.entropy_distillation(teacher.detach(), student, self.recipe.temperature)
        if not teacher_features:
            return loss, torch.zeros_like(loss)
        matching = self.recipe.feature_weight * feature_loss(teacher_features, student_features)
        return loss + matching, matching

    @torch.no_grad()
    def _update_student(self) -> None:
        self.optimizer_student.step()
        if self.optimizer_steps is None:
            return
        reached = [(step.data, log, step.grad) for step, log in self.log_steps if step.grad is not None]
        steps, logs = [step for step, _, _ in reached], [log for _, log, _ in reached]
        # d / d log s = s d / ds
        for log, gradient in zip(logs, torch._foreach_mul([g for _, _, g in reached], steps), strict=True):
            log.grad = gradient
        self.optimizer_steps.step()
        torch._foreach_copy_(steps, torch._foreach_exp([log.data for log in logs]))

    def start_average(self) -> None:
        """Let the averaged generator begin where the generator is now."""
        if self.averaged is not None:
            self.averaged.load_state_dict(self.generator.state_dict())

    @torch.no_grad()
    def _follow_generator(self) -> None:
        if self.averaged is not None:
            followers = [p.data for p in self.averaged.parameters()]
            leaders = [p.data for p in self.generator.parameters()]
            torch._foreach_lerp_(followers, leaders, 1 - self.recipe.generator_ema)


def draw_noise(recipe: Recipe, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Noise [B, latent_dim] and labels int64 [B] for one batch, on the device of `random`."""
    batch, device = recipe.batch_size, random.device
    noise = torch.randn(batch, recipe.latent_dim, generator=random, device=device)
    return noise, torch.randint(recipe.num_classes, (batch,), generator=random, device=device)


@contextmanager
def _requires_grad(parameters: list[nn.Parameter], enabled: bool) -> Iterator[None]:
    for parameter in parameters:
        parameter.requires_grad_(enabled)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def _set_gradients(parameters: list[nn.Parameter], loss: Tensor, keep_graph: bool) -> None:
    gradients = torch.autograd.grad(loss, parameters, retain_graph=keep_graph, allow_unused=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None and not _same_layout(gradient, parameter):
            # Fused optimizers walk both by address.
            gradient = torch.empty_like(parameter).copy_(gradient)
        parameter.grad = gradient


def _same_layout(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape have their elements in the same order in memory."""
    return all(n == 1 or i == j for n, i, j in zip(a.shape, a.stride(), b.stride(), strict=True))
