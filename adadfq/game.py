"""One step of the game between generator and student: both players' losses and gradients, each computed once.

Per step the networks run: the teacher forward once, the student forward once, one backward through both to the images
(L_G, no weight gradients of either), and one backward through the student to its weights (L_Q, not to the images).
Nothing in a step waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from adadfq import functional
from adadfq.errors import InvalidInputError
from adadfq.fused_layers import BatchNormWatch
from adadfq.recipe import Recipe

__all__ = ["METRICS", "BatchNormMatch", "Game"]

#: Metrics of a step, in the order of :meth:`Game.step`'s result.
METRICS = (
    "loss_generator",
    "loss_margin",
    "loss_ds",
    "loss_as",
    "loss_bns",
    "loss_student",
    "h_prime",
    "agreement",
    "teacher_accuracy",
)


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
        student: quantised network in eval mode, fused or not; its parameters require gradients.
        generator: in train mode; ``forward(noise, labels)`` gives images.
        recipe: weights and bounds of the losses, and the precision: with "bfloat16" the networks run under autocast;
            parameters, statistics, ranges and losses stay as they are.
        optimizer_generator: over the generator's parameters.
        optimizer_student: over the student's parameters.

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
    ) -> None:
        self.teacher, self.student, self.generator = teacher, student, generator
        self.recipe = recipe
        self.optimizer_generator, self.optimizer_student = optimizer_generator, optimizer_student
        self.bn_match = BatchNormMatch(teacher)
        self.generator_parameters = [p for p in generator.parameters() if p.requires_grad]
        self.student_parameters = [p for p in student.parameters() if p.requires_grad]
        self.device_type = self.generator_parameters[0].device.type
        self.autocast = recipe.precision == "bfloat16"

    def step(self, noise: Tensor, labels: Tensor, train_student: bool) -> Tensor:
        """Play one step: update the generator and, if `train_student`, the student.

        Both gradients are taken at the parameters before the step.

        Args:
            noise: [B, latent_dim].
            labels: int64 [B], the classes to generate.
            train_student: False while only the generator trains.

        Returns:
            The metrics named by :data:`METRICS`, float32 [len(METRICS)], on the device.
        """
        recipe = self.recipe
        with torch.autocast(self.device_type, torch.bfloat16, enabled=self.autocast):
            images = self.generator(noise, labels).contiguous(memory_format=torch.channels_last)
            with self.bn_match.watching():
                teacher_logits = self.teacher(images)
            # No gradient path into the student's weights while they do not train.
            with _requires_grad(self.student_parameters, train_student):
                student_logits = self.student(images)
        loss_bns = self.bn_match.loss()

        logits_loss = functional.margin_loss(
            teacher_logits,
            student_logits,
            labels,
            recipe.lambda_l,
            recipe.lambda_u,
            recipe.alpha_ds,
            recipe.alpha_as,
            recipe.beta,
            recipe.detach_min,
        )
        loss_generator = logits_loss.total + recipe.gamma * loss_bns
        loss_student = functional.entropy_distillation(teacher_logits.detach(), student_logits, recipe.temperature)

        # Asking for one player's parameters alone keeps autograd from computing the other's weight gradients. The
        # generator's come last: from then on every layer's memory is free as soon as its gradient is through.
        if train_student:
            _set_gradients(self.student_parameters, loss_student, keep_graph=True)
        _set_gradients(self.generator_parameters, loss_generator, keep_graph=False)
        if train_student:
            self.optimizer_student.step()
        self.optimizer_generator.step()

        with torch.no_grad():
            teacher_class = teacher_logits.argmax(1)
            return torch.stack(
                [
                    loss_generator.detach(),
                    logits_loss.margin,
                    logits_loss.disagreement,
                    logits_loss.agreement,
                    loss_bns.detach(),
                    loss_student.detach(),
                    logits_loss.h_prime.mean(),
                    (teacher_class == student_logits.argmax(1)).float().mean(),
                    (teacher_class == labels).float().mean(),
                ]
            ).float()


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
