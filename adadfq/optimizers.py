"""The optimizers of a run: fused, with learning rates on the device, so that nothing in a step is read back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from adadfq.nn import step_sizes
from adadfq.recipe import Recipe

__all__ = ["for_generator", "for_step_sizes", "for_student"]

#: Adam's betas for the student's weights and steps.
MOMENTS = (0.9, 0.999)


def for_generator(generator: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Adam over the generator's parameters."""
    parameters = [p for p in generator.parameters() if p.requires_grad]
    return _adam(parameters, recipe.lr_generator, (recipe.adam_betas[0], recipe.adam_betas[1]))


def for_student(student: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """SGD or AdamW over the student's parameters, learned step sizes excepted."""
    learned = set(step_sizes(student))
    parameters = [p for p in student.parameters() if p.requires_grad and p not in learned]
    if recipe.student_optimizer == "adam":
        return _adam(parameters, recipe.lr_student, MOMENTS, recipe.weight_decay)
    return torch.optim.SGD(
        parameters,
        lr=torch.tensor(recipe.lr_student, device=parameters[0].device),
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        nesterov=recipe.nesterov,
        fused=True,
    )


def for_step_sizes(logarithms: Sequence[nn.Parameter], recipe: Recipe) -> torch.optim.Optimizer:
    """Adam over the logarithms of learned step sizes, without weight decay."""
    return _adam(logarithms, recipe.lr_steps, MOMENTS)


def _adam(
    parameters: Sequence[nn.Parameter], lr: float, betas: tuple[float, float], weight_decay: float = 0.0
) -> torch.optim.Optimizer:
    device = parameters[0].device
    kind = torch.optim.AdamW if weight_decay else torch.optim.Adam
    return kind(
        parameters,
        lr=torch.tensor(lr, device=device),
        betas=betas,
        weight_decay=weight_decay,
        fused=True,
        capturable=device.type == "cuda",
    )
