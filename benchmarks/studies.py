"""Named grids of :mod:`benchmarks.accuracy`: the paper's questions, and what each option is worth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from adadfq.errors import InvalidInputError
from benchmarks.accuracy_grid import Grid

__all__ = ["STUDIES", "Study", "study_grid"]

#: Whole runs, as long as a tenth of the paper's: 40 epochs of 200 steps.
_WHOLE = {"epochs": 40, "lr_milestones": (10, 20, 30)}
#: Short ones, to compare settings: 3 epochs of the student's training.
_SHORT = {"epochs": 5, "warmup_epochs": 2, "calibration_epochs": 2}

#: adadfq_plus without its augmentation and its weights' ranges of least error.
_LEAN = {"crop": 0, "flip": False, "weight_range": "minmax"}


@dataclass(frozen=True)
class Study:
    """One question and the grid that answers it.

    Attributes:
        question: in words.
        recipe: named recipe; None: the paper's for CIFAR-10.
        bits: widths of weights and activations alike.
        settings: for all runs.
        variants: one each; the first is what the others are compared with.
    """

    question: str
    bits: tuple[int, ...]
    recipe: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    variants: tuple[Mapping[str, Any], ...] = ({},)


def _bounds(lower: float, upper: float) -> dict[str, Any]:
    return {"lambda_l": lower, "lambda_u": upper}


STUDIES: dict[str, Study] = {
    "paper": Study("The paper's recipe, over 40 epochs.", (3, 4, 5), settings=_WHOLE),
    "plus": Study(
        "The recipe adadfq_plus, over as many steps.", (3, 4, 5), "adadfq_plus", {"epochs": 40, "steps_per_epoch": 200}
    ),
    "schedule": Study("The paper's recipe over its whole schedule, 400 epochs of 200 steps.", (3, 4, 5)),
    "schedule_plus": Study(
        "The recipe adadfq_plus over as many steps.", (3, 4, 5), "adadfq_plus", {"epochs": 400, "steps_per_epoch": 200}
    ),
    "fast": Study(
        "How far does adadfq_plus come in a fifth of the steps?",
        (3, 4),
        "adadfq_plus",
        {"epochs": 8, "steps_per_epoch": 200},
    ),
    "parts": Study(
        "What is each part of adadfq_plus worth within it, in a fifth of the steps? Each but the optimizer and its "
        "schedule is left out alone, and some together; replays and the mirrored teacher are put in.",
        (3,),
        "adadfq_plus",
        {"epochs": 8, "steps_per_epoch": 200},
        (
            {},
            {"gamma": 1.0},
            {"crop": 0, "flip": False},
            {"feature_weight": 0.0},
            {"learn_steps": False},
            {"act_range": "minmax"},
            {"weight_range": "minmax"},
            {"act_range": "minmax", "weight_range": "minmax"},
            _LEAN,
            {**_LEAN, "gamma": 1.0},
            {"replays": 1},
            {"mirror_teacher": True},
        ),
    ),
    "parts_whole": Study(
        "What are those parts of adadfq_plus worth over all its steps that a fifth of them does not ask for?",
        (3,),
        "adadfq_plus",
        {"epochs": 40, "steps_per_epoch": 200},
        ({}, {"gamma": 1.0}, {"crop": 0, "flip": False}, {"weight_range": "minmax"}, _LEAN),
    ),
    "losses": Study(
        "What is each term of the generator's loss worth? Without L_ds, without L_as, without the margin, without "
        "L_bns.",
        (3, 5),
        settings=_SHORT,
        variants=({}, {"alpha_ds": 0.0}, {"alpha_as": 0.0}, _bounds(0.0, 1.0), {"gamma": 0.0}),
    ),
    "bounds": Study(
        "Which bounds of H'?",
        (3,),
        settings=_SHORT,
        variants=tuple(_bounds(lower, upper) for lower, upper in product((0.1, 0.0, 0.3), (0.8, 0.6, 1.0))),
    ),
    "adaptability": Study(
        "Is the largest adaptability the best? H' is drawn into a narrow window: at 0, student and teacher disagree as "
        "far as they can; at 1 they agree.",
        (3,),
        settings=_SHORT,
        variants=(_bounds(0.1, 0.8), *(_bounds(at, at) for at in (0.0, 0.25, 0.5, 0.75, 1.0))),
    ),
    "options": Study(
        "What is each option beyond the paper worth alone?",
        (3,),
        settings=_SHORT,
        variants=(
            {},
            {"weight_range": "mse"},
            {"act_range": "mse"},
            {"learn_steps": True},
            {"feature_weight": 90.0},
            {"feature_weight": 1000.0},
            {"gamma": 10.0},
            {"student_optimizer": "adam", "lr_student": 1e-3, "weight_decay": 0.0},
            {"lr_schedule": "cosine"},
            {"lr_warmup_steps": 50},
            {"low_pass": 0.5},
            {"crop": 2, "flip": True},
            {"mirror_teacher": True},
            {"replays": 1},
            {"replays": 1, "bank_batches": 0},
            {"replays": 1, "bank_batches": 0, "generator_ema": 0.99},
            {"spectral_norm": True},
        ),
    ),
    "efficientnet": Study(
        "The hard case: linear bottlenecks and depthwise convolutions, at 224 pixels. For MODEL "
        "benchmarks.teachers:efficientnet_lite0.",
        (4, 6),
        "adadfq_plus_imagenet",
        {
            **{"batch_size": 16, "epochs": 4, "steps_per_epoch": 40, "warmup_epochs": 1, "calibration_epochs": 1},
            **{"replays": 2, "mean": (127 / 255,) * 3, "std": (128 / 255,) * 3},
        },
    ),
}


def study_grid(
    name: str,
    model: str,
    recipe: str | None,
    seeds: tuple[int, ...],
    bits: tuple[tuple[int, int], ...] = (),
    settings: Mapping[str, Any] | None = None,
) -> Grid:
    """The grid of a study.

    Args:
        name: of :data:`STUDIES`.
        model: the teacher.
        recipe: in place of the study's, which is the paper's for CIFAR-10 where it names none.
        seeds: of every variant.
        bits: instead of the study's.
        settings: for all runs, in place of the study's where it has them.

    Raises:
        InvalidInputError: no such study.
    """
    if name not in STUDIES:
        raise InvalidInputError(f"study must be one of {', '.join(STUDIES)}, got {name!r}")
    study = STUDIES[name]
    widths = bits or tuple((width, width) for width in study.bits)
    return Grid(
        model,
        recipe or study.recipe or "cifar10_resnet20",
        widths,
        seeds,
        {**study.settings, **(settings or {})},
        study.variants,
    )
