"""Whether a row's recipe, which it has by name, still is what it was when the row was made."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from typing import Any

import adadfq
from adadfq.errors import InvalidInputError
from benchmarks.accuracy_grid import recipe_digest

__all__ = ["as_it_was", "base_is_current", "is_current", "run_age", "table_age"]

Row = Mapping[str, Any]


def is_current(row: Row) -> bool:
    """Whether the recipe of that name, with the row's settings, is the one that the row is of."""
    return _today(row["recipe"], row["weight_bits"], json.dumps(row["settings"])) == row["recipe_digest"]


def base_is_current(row: Row) -> bool:
    """The same of what the row is compared with, its recipe without its variant; of itself, where it names no base."""
    digest = row.get("base_digest")
    if digest is None:
        return is_current(row)
    settings = {name: value for name, value in row["settings"].items() if name not in row["variant"]}
    return _today(row["recipe"], row["weight_bits"], json.dumps(settings)) == digest


def as_it_was(digest: str | None = None) -> str:
    """Said of a recipe that is another by now."""
    return ", as it was" + ("" if digest is None else f" ({digest[:6]})")


def run_age(row: Row) -> str:
    """What a row's label says of the age of its recipe: nothing, where it is today's."""
    return "" if is_current(row) else as_it_was(row["recipe_digest"])


def table_age(row: Row) -> str:
    """What the heading over rows with the same base says of its age."""
    return "" if base_is_current(row) else as_it_was(row.get("base_digest"))


@cache
def _today(recipe: str, weight_bits: int, settings: str) -> str | None:
    try:
        return recipe_digest(adadfq.Recipe.named(recipe, weight_bits=weight_bits, **json.loads(settings)))
    except InvalidInputError:  # a recipe or a field that there is no more
        return None
