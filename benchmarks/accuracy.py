"""Accuracy by setting: training with a recipe over a grid of settings and seeds.

The images only score. The last epoch is the result; accuracies of the epochs before it are kept and choose nothing.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn

import adadfq
from adadfq import files, scoring
from adadfq.checkpoint import load_weights, read_state_dict
from adadfq.cli import recipe_options
from adadfq.errors import AdadfqError, InvalidInputError
from adadfq.models import BUILTINS

Row = dict[str, Any]

#: Fields that tell runs apart. The commit is not among them: a grid goes on after a change elsewhere.
IDENTITY = (
    *("model", "weights_sha256", "data", "images", "recipe", "weight_bits", "act_bits", "settings", "seed"),
    *("device", "threads"),
)


def parse_settings(items: Iterable[str]) -> dict[str, Any]:
    """``field=value`` of a recipe, with the values as ``adadfq quantize`` reads its options.

    Raises:
        InvalidInputError: no such field, a field twice, or a value of the wrong type.
    """
    options = {option.name: option for option in recipe_options()}
    settings: dict[str, Any] = {}
    for item in items:
        name, equals, text = item.partition("=")
        if not equals or name not in options:
            raise InvalidInputError(
                f"expected field=value with a field of the recipe, got {item!r}; the fields are "
                f"{', '.join(sorted(map(str, options)))}"
            )
        if name in settings:
            raise InvalidInputError(f"{name} is set twice: give it once")
        try:
            settings[name] = options[name].type.convert(text, options[name], None)
        except click.BadParameter as error:
            raise InvalidInputError(f"{item}: {error.message}") from error
    return settings


@dataclass(frozen=True)
class Run:
    """One training. `settings` are those that differ from the named recipe, `variant` those the grid varies."""

    recipe: adadfq.Recipe
    settings: dict[str, Any]
    variant: dict[str, Any]
    seed: int


@dataclass(frozen=True)
class Grid:
    """Variants of a recipe x seeds.

    Attributes:
        settings: fields of the recipe for all runs.
        variants: fields of the recipe for one variant each.
    """

    model: str
    recipe: str
    weight_bits: int
    act_bits: int
    seeds: tuple[int, ...]
    settings: Mapping[str, Any]
    variants: tuple[Mapping[str, Any], ...] = ({},)

    def runs(self) -> list[Run]:
        """All runs: the first seed of every variant, then the second.

        Raises:
            InvalidInputError: the recipe refuses a setting, two runs are the same, or one field is both in `settings`
                and in a variant.
        """
        base = adadfq.Recipe.named(self.recipe, weight_bits=self.weight_bits)
        runs: list[Run] = []
        for seed in self.seeds:
            if seed < 0:
                raise InvalidInputError(f"seeds must be at least 0, got {seed}")
            for variant in self.variants:
                if both := sorted(set(variant) & set(self.settings)):
                    raise InvalidInputError(f"{', '.join(both)} is set for all runs and varied: leave one out")
                recipe = adadfq.Recipe.named(self.recipe, weight_bits=self.weight_bits, **{**self.settings, **variant})
                usual, ours = base.to_dict(), recipe.to_dict()
                settings = {name: value for name, value in ours.items() if value != usual[name]}
                run = Run(recipe, settings, {name: ours[name] for name in variant}, seed)
                if any((run.settings, run.seed) == (other.settings, other.seed) for other in runs):
                    raise InvalidInputError(f"two runs are the same: seed {seed} with {settings or 'nothing changed'}")
                runs.append(run)
        if not runs:
            raise InvalidInputError("the grid is empty: give at least one seed")
        return runs


def key(row: Mapping[str, Any]) -> str:
    """What a row is of, by :data:`IDENTITY`."""
    return json.dumps([row[name] for name in IDENTITY], sort_keys=True)


def load_teacher(model: str, weights: Path | None, num_classes: int) -> nn.Module:
    """The float network in eval mode.

    Raises:
        InvalidInputError: it cannot be built, or a built-in has no weights.
        CheckpointError: the weights cannot be read or do not fit.
    """
    if weights is None and model in BUILTINS:
        raise InvalidInputError(f"model {model!r} has no weights of its own; give them with --weights FILE")
    teacher = adadfq.build_model(model, **({"num_classes": num_classes} if model in BUILTINS else {}))
    if weights is not None:
        load_weights(teacher, read_state_dict(weights), weights)
    return teacher.eval()


def train_grid(
    grid: Grid,
    weights: Path | None,
    data: Path,
    environment: Mapping[str, Any],
    done: Iterable[Mapping[str, Any]] = (),
) -> Iterator[Row]:
    """Train what is not among `done`; a row a run, see :data:`benchmarks.store.FIELDS`, as soon as it is there.

    Raises:
        InvalidInputError: model, weights, recipe and images do not fit together.
        KeyboardInterrupt: a run was interrupted; it has no row.
    """
    runs = grid.runs()
    known = {key(row) for row in done}
    teachers: dict[Any, tuple[nn.Module, scoring.ScoringSet, float]] = {}
    digest = None if weights is None else files.sha256(weights)
    for run in runs:
        recipe = run.recipe
        inputs = (recipe.num_classes, recipe.image_size, recipe.image_channels, recipe.mean, recipe.std)
        if inputs not in teachers:
            images = scoring.open_images(
                data, recipe.image_size, recipe.num_classes, recipe.mean, recipe.std, recipe.image_channels
            )
            teacher = load_teacher(grid.model, weights, recipe.num_classes)
            score = scoring.accuracy(teacher, images, device=environment["device"]).top1
            teachers[inputs] = (teacher, images, score)
        teacher, images, score = teachers[inputs]
        row = {
            "model": _public_name(grid.model),
            "weights": None if weights is None else weights.name,
            "weights_sha256": digest,
            "data": data.name,
            "images": len(images),
            "recipe": grid.recipe,
            "weight_bits": grid.weight_bits,
            "act_bits": grid.act_bits,
            "settings": run.settings,
            "variant": run.variant,
            "seed": run.seed,
            "teacher_accuracy": score,
            **environment,
        }
        if key(row) not in known:
            student = adadfq.quantize(teacher, grid.weight_bits, grid.act_bits)
            yield row | _train(run, teacher, student, images, torch.device(environment["device"]))


def _public_name(model: str) -> str:
    """``file.py:callable`` without the file's folder."""
    file, colon, name = model.rpartition(":")
    return f"{Path(file).name}:{name}" if colon and file.endswith(".py") else model


class _Scorer:
    """Scores the student after the last epoch of warm-up and every later one; its time is none of training's."""

    def __init__(self, images: scoring.ScoringSet) -> None:
        self.images = images
        self.accuracies: list[float] = []
        self.epoch_seconds: list[float] = []
        self.since = time.perf_counter()

    def __call__(self, epoch: int, trainer: adadfq.Trainer) -> None:
        # The trainer has read the epoch's metrics from the device, which has thus finished.
        self.epoch_seconds.append(time.perf_counter() - self.since)
        if epoch + 1 >= trainer.recipe.warmup_epochs:
            self.accuracies.append(scoring.accuracy(trainer.student, self.images).top1)
        self.since = time.perf_counter()


def _train(run: Run, teacher: nn.Module, student: nn.Module, images: scoring.ScoringSet, device: torch.device) -> Row:
    recipe = run.recipe
    scorer = _Scorer(images)
    trainer = adadfq.Trainer(
        teacher, student, recipe, seed=run.seed, device=device, progress=False, on_epoch_end=scorer
    )
    scorer.since = time.perf_counter()
    metrics: Mapping[str, float] = {}
    error = None
    try:
        result = trainer.fit()
        if result.status != "complete":
            raise KeyboardInterrupt
        metrics = result.metrics
    except InvalidInputError:
        raise
    except AdadfqError as diverged:
        error = str(diverged)
    training = scorer.epoch_seconds[recipe.warmup_epochs :]
    return {
        "status": "ok" if error is None else "diverged",
        "error": error,
        "accuracies": scorer.accuracies,
        "accuracy": scorer.accuracies[-1] if error is None else None,
        # As warm-up leaves it: weights untouched, ranges calibrated on generated images.
        "round_to_nearest": scorer.accuracies[0] if recipe.warmup_epochs and scorer.accuracies else None,
        "train_seconds": sum(scorer.epoch_seconds),
        "steps": trainer.step,
        "images_seen": trainer.step * recipe.batch_size,
        "step_ms": 1e3 * statistics.median(training) / recipe.steps_per_epoch if training else None,
        "agreement": metrics.get("agreement"),
        "h_prime": metrics.get("h_prime"),
    }


@dataclass(frozen=True)
class Summary:
    """All seeds of one variant.

    Attributes:
        network: model, recipe and bits.
        label: what is varied.
        accuracies: of the last epoch, one a seed that did not diverge.
        diverged: how many did.
        round_to_nearest: mean over the seeds.
        ms_per_image: median over the seeds; while the student trains.
    """

    network: str
    label: str
    accuracies: tuple[float, ...]
    diverged: int
    round_to_nearest: float | None
    teacher: float
    steps: int
    ms_per_image: float | None

    @property
    def mean(self) -> float | None:
        """Mean accuracy; None where every seed diverged."""
        return statistics.fmean(self.accuracies) if self.accuracies else None

    @property
    def deviation(self) -> float | None:
        """Sample deviation of the accuracies; None with fewer than two."""
        return statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else None


def summarize(rows: Sequence[Row]) -> list[Summary]:
    """Rows by variant, in the order of their first rows."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(key({**row, "seed": None}), []).append(row)
    summaries = []
    for found in groups.values():
        first = found[0]
        varied = " ".join(f"{name}={value}" for name, value in first["variant"].items()) or "as set"
        ok = [row for row in found if row["status"] == "ok"]
        nearest = [row["round_to_nearest"] for row in found if row["round_to_nearest"] is not None]
        times = [row["step_ms"] * row["steps"] / row["images_seen"] for row in found if row["step_ms"] is not None]
        summaries.append(
            Summary(
                network=network(first),
                label=varied,
                accuracies=tuple(row["accuracy"] for row in ok),
                diverged=len(found) - len(ok),
                round_to_nearest=statistics.fmean(nearest) if nearest else None,
                teacher=first["teacher_accuracy"],
                steps=first["steps"],
                ms_per_image=statistics.median(times) if times else None,
            )
        )
    return summaries


def network(row: Row) -> str:
    """Model, recipe and bits, in short."""
    return f"{row['model']} {row['recipe']} {row['weight_bits']}w{row['act_bits']}a"
