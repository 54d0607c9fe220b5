"""Learning rates by step."""

from __future__ import annotations

import itertools
import math

import pytest
from toy import toy_recipe

from adadfq.schedule import generator_factor, student_factor


def test_step_decay_counts_the_milestones_that_the_epoch_has_reached() -> None:
    recipe = toy_recipe(epochs=6, steps_per_epoch=4, lr_milestones=(2, 4), lr_decay=0.5)
    factors = [generator_factor(recipe, step) for step in range(24)]
    assert factors == [1.0] * 8 + [0.5] * 8 + [0.25] * 8
    assert [student_factor(recipe, step) for step in range(24)] == factors


def test_cosine_falls_from_the_students_first_step_to_the_end() -> None:
    recipe = toy_recipe(epochs=5, steps_per_epoch=4, warmup_epochs=1, lr_schedule="cosine")
    factors = [generator_factor(recipe, step) for step in range(20)]
    assert factors[:5] == [1.0] * 5
    assert factors[12] == pytest.approx(0.5)
    assert factors[19] == pytest.approx(0.5 * (1 + math.cos(math.pi * 15 / 16)))
    assert all(later < earlier for earlier, later in itertools.pairwise(factors[4:]))


def test_the_students_rate_rises_over_its_first_steps() -> None:
    recipe = toy_recipe(epochs=5, steps_per_epoch=4, warmup_epochs=1, lr_warmup_steps=3, lr_milestones=(2,))
    factors = [student_factor(recipe, step) for step in range(12)]
    assert factors == pytest.approx([1.0] * 4 + [0.25, 0.5, 0.75, 1.0] + [0.1] * 4)
    assert generator_factor(recipe, 4) == 1.0
