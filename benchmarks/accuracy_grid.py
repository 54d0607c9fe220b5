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


@dataclass(frozen=True)
class Run:
    """One training. `settings` are those that differ from the named recipe, `variant` those the grid varies."""

    recipe: adadfq.Recipe
    weight_bits: int
    act_bits: int
    settings: dict[str, Any]
    variant: dict[str, Any]
    seed: int

    @property
    def digest(self) -> str:
        """Of all settings that are not the defaults: what a named recipe was when it was played."""
        defaults = adadfq.Recipe().to_dict()
        changed = {
            name: value
            for name, value in self.recipe.to_dict().items()
            if name not in ("name", "source", "by_weight_bits") and value != defaults[name]
        }
        return hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()[:16]

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

    def _run(self, weight_bits: int, act_bits: int, variant: Mapping[str, Any], seed: int) -> Run:
        if both := sorted(set(variant) & set(self.settings)):
            raise InvalidInputError(f"{', '.join(both)} is set for all runs and varied: leave one out")
        recipe = adadfq.Recipe.named(self.recipe, weight_bits=weight_bits, **{**self.settings, **variant})
        usual, ours = adadfq.Recipe.named(self.recipe, weight_bits=weight_bits).to_dict(), recipe.to_dict()
        settings = {name: value for name, value in ours.items() if value != usual[name]}
        return Run(recipe, weight_bits, act_bits, settings, {name: ours[name] for name in variant}, seed)


def command_line(
    grid: Grid,
    study: str | None,
    settings: Sequence[str],
    variants: Sequence[str],
    weights: Path | None,
    data: Path,
    authors: Path | None,
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
