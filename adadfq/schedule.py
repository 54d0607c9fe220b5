"""Learning rates by step."""

from __future__ import annotations

import math

from adadfq.recipe import Recipe

__all__ = ["generator_factor", "student_factor"]


def generator_factor(recipe: Recipe, step: int) -> float:
    """What the generator's learning rate is multiplied by in a step, counted from 0.

    "step": ``lr_decay`` for every milestone that the step's epoch has reached (the paper's). "cosine": half a cosine
    from the start of the student's training, 1, to the end of the run, 0.
    """
    epoch = step // recipe.steps_per_epoch
    if recipe.lr_schedule == "step":
        return recipe.lr_decay ** sum(epoch >= milestone for milestone in recipe.lr_milestones)
    start, end = recipe.warmup_epochs * recipe.steps_per_epoch, recipe.epochs * recipe.steps_per_epoch
    if step < start:
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - start) / (end - start)))


def student_factor(recipe: Recipe, step: int) -> float:
    """What the student's learning rates are multiplied by in a step: the generator's factor, rising linearly over the
    first ``lr_warmup_steps`` of the student's training."""
    trained = step - recipe.warmup_epochs * recipe.steps_per_epoch
    rise = min(1.0, (trained + 1) / (recipe.lr_warmup_steps + 1)) if trained >= 0 else 1.0
    return rise * generator_factor(recipe, step)
