"""The runs of :mod:`benchmarks.accuracy`: widths x variants of a recipe x seeds."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

import adadfq
from adadfq.checks import check_bits
from adadfq.cli import recipe_options
from adadfq.errors import InvalidInputError


def parse_bits(items: Iterable[str]) -> tuple[tuple[int, int], ...]:
    """``4w8a``, or ``4`` for ``4w4a``, as (bits of the weights, bits of the activations).

    Raises:
        InvalidInputError: an item reads otherwise.
    """
    bits = []
    for item in items:
        if (found := re.fullmatch(r"(\d+)(?:w(\d+)a)?", item)) is None:
            raise InvalidInputError(f"bits must be such as 4, or 4w8a with other activations, got {item!r}")
        bits.append((int(found[1]), int(found[2] or found[1])))
    return tuple(bits)


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


#: Fields that say where settings come from, and none itself.
NO_SETTINGS = ("name", "source", "by_weight_bits")

#: Settings beyond the paper, at the values at which they leave its method as it is. Never changed: a digest leaves out
#: what is at them, so that a new field with its line here changes no digest, while a changed default of an older one
#: does.
OFF: dict[str, Any] = {
    "weight_range": "minmax",
    "act_range": "minmax",
    "student_optimizer": "sgd",
    "learn_steps": False,
    "lr_steps": 1e-3,
    "feature_weight": 0.0,
    "low_pass": 0.0,
    "crop": 0,
    "flip": False,
    "mirror_teacher": False,
    "replays": 0,
    "bank_batches": 64,
    "generator_ema": 0.0,
    "spectral_norm": False,
    "lr_schedule": "step",
    "lr_warmup_steps": 0,
}


def recipe_digest(recipe: adadfq.Recipe) -> str:
    """16 hexadecimal digits of all settings, whatever the recipe is called; see :data:`OFF`."""
    settings = {
        name: value
        for name, value in recipe.to_dict().items()
        if name not in NO_SETTINGS and not (name in OFF and value == OFF[name])
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        recipe: settled for the width.
        base: without what the grid varies; None where that alone is no valid recipe.
        settings: fields that differ from the named recipe.
        variant: fields the grid varies.
    """

    recipe: adadfq.Recipe
    base: adadfq.Recipe | None
    weight_bits: int
    act_bits: int
    settings: dict[str, Any]
    variant: dict[str, Any]
    seed: int

    @property
    def digest(self) -> str:
        """Of the resolved recipe: what a named recipe was when it was played."""
        return recipe_digest(self.recipe)

    @property
    def base_digest(self) -> str | None:
        """Of the recipe without what the grid varies: what a variant is compared with; None where it has no base."""
        return None if self.base is None else recipe_digest(self.base)

    @property
    def identity(self) -> tuple[Any, ...]:
        """What no other run of a grid may share."""
        return self.weight_bits, self.act_bits, self.settings, self.seed


@dataclass(frozen=True)
class Grid:
    """Widths x variants of a recipe x seeds.

    Attributes:
        bits: of the weights and of the activations.
        settings: fields of the recipe for all runs.
        variants: fields of the recipe for one variant each.
    """

    model: str
    recipe: str
    bits: tuple[tuple[int, int], ...]
    seeds: tuple[int, ...]
    settings: Mapping[str, Any]
    variants: tuple[Mapping[str, Any], ...] = ({},)

    def runs(self) -> list[Run]:
        """All runs: the first seed of every width and variant, then the second.

        Raises:
            InvalidInputError: the recipe refuses a setting or a width, two runs are the same, or one field is both in
                `settings` and in a variant.
        """
        runs: list[Run] = []
        for seed in self.seeds:
            if seed < 0:
                raise InvalidInputError(f"seeds must be at least 0, got {seed}")
            for weight_bits, act_bits in self.bits:
                check_bits("weight_bits", weight_bits)
                check_bits("act_bits", act_bits)
                for variant in self.variants:
                    run = self._run(weight_bits, act_bits, variant, seed)
                    if run.identity in [other.identity for other in runs]:
                        what = f"seed {seed}, {weight_bits}w{act_bits}a with {run.settings or 'nothing changed'}"
                        raise InvalidInputError(f"two runs are the same: {what}")
                    runs.append(run)
        if not runs:
            raise InvalidInputError("the grid is empty: give at least one seed and one width")
        return runs

    def _base(self, weight_bits: int) -> adadfq.Recipe | None:
        try:
            return adadfq.Recipe.named(self.recipe, weight_bits=weight_bits, **self.settings)
        except InvalidInputError:  # such as generator_ema for all runs and replays, which it needs, in each variant
            return None

    def _run(self, weight_bits: int, act_bits: int, variant: Mapping[str, Any], seed: int) -> Run:
        if both := sorted(set(variant) & set(self.settings)):
            raise InvalidInputError(f"{', '.join(both)} is set for all runs and varied: leave one out")
        recipe = adadfq.Recipe.named(self.recipe, weight_bits=weight_bits, **{**self.settings, **variant})
        if recipe.epochs < recipe.warmup_epochs:
            raise InvalidInputError(
                f"epochs={recipe.epochs} is below warmup_epochs={recipe.warmup_epochs}: no student would be scored; "
                "give more epochs or a shorter warm-up"
            )
        base = self._base(weight_bits) if variant else recipe
        usual, ours = adadfq.Recipe.named(self.recipe, weight_bits=weight_bits).to_dict(), recipe.to_dict()
        settings = {name: value for name, value in ours.items() if value != usual[name]}
        return Run(recipe, base, weight_bits, act_bits, settings, {name: ours[name] for name in variant}, seed)


def command_line(
    grid: Grid,
    study: str | None,
    settings: Sequence[str],
    variants: Sequence[str],
    weights: Path | None,
    data: Path,
    authors: Path | None,
    real_images: bool,
    device: str,
    threads: int,
    json_path: Path | None,
) -> str:
    """The command that trains the grid, with files by their names alone."""
    words = ["python", "-m", "benchmarks", "accuracy", public_name(grid.model)]
    words += [] if study is None else ["--study", study]
    words += ["--recipe", grid.recipe, "--bits", ",".join(_width(*pair) for pair in grid.bits)]
    words += ["--seeds", ",".join(map(str, grid.seeds))]
    words += [word for setting in settings for word in ("--set", setting)]
    words += [word for variant in variants for word in ("--vary", variant)]
    words += ["--real-images"] if real_images else []
    words += [] if device == "cpu" else ["--device", device]
    words += [] if threads == 1 else ["--threads", str(threads)]
    paths = {"--weights": weights, "--data": data, "--authors": authors, "--json": json_path}
    words += [word for option, path in paths.items() if path is not None for word in (option, path.name)]
    return shlex.join(words)


def _width(weight_bits: int, act_bits: int) -> str:
    return str(weight_bits) if weight_bits == act_bits else f"{weight_bits}w{act_bits}a"


def public_name(model: str) -> str:
    """``file.py:callable`` without the file's folder."""
    file, colon, name = model.rpartition(":")
    return f"{Path(file).name}:{name}" if colon and file.endswith(".py") else model
