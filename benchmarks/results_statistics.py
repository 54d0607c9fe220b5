"""What docs/results.md says of rows of accuracies, as numbers: groups, differences, correlations."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.accuracy import AUTHORS, IDENTITY, Row, Summary, key, summarize

#: Signal of :class:`adadfq.HeldOut` -> sign that makes larger better.
SIGNALS = {"held_out_agreement": 1, "held_out_loss": -1, "held_out_kl": -1}


def unique(files: Iterable[Mapping[str, Any]]) -> list[Row]:
    """Rows of several files; a run that is in two is taken once."""
    rows: dict[str, Row] = {}
    for content in files:
        for row in content["rows"]:
            rows.setdefault(key(row), row)
    return list(rows.values())


def bits(row: Mapping[str, Any]) -> str:
    """Widths, such as "4w4a"."""
    return f"{row['weight_bits']}w{row['act_bits']}a"


def setting(row: Row, leave_out: Iterable[str] = ()) -> str:
    """``field=value`` of what a row's run has changed of its recipe."""
    return " ".join(f"{name}={value}" for name, value in row["settings"].items() if name not in set(leave_out))


def last(row: Row, name: str) -> float | None:
    """The last epoch's value of a field that has one a scored epoch; None where there is none."""
    values = row.get(name)
    return values[-1] if values else None


def plain(rows: Sequence[Row]) -> list[Summary]:
    """The groups in which the grid varied nothing: by teacher, then by width, then by number of steps."""
    found = summarize([row for row in rows if not row["variant"]])
    return sorted(
        found,
        key=lambda group: (
            group.rows[0]["model"],
            group.rows[0]["data"],
            group.rows[0]["weight_bits"],
            group.rows[0]["act_bits"],
            group.steps,
        ),
    )


def rival(group: Summary, groups: Sequence[Summary]) -> Summary | None:
    """The authors' runs with the same teacher, images, widths and number of steps; None where there are none."""
    same = ("model", "weights_sha256", "data", "images", "weight_bits", "act_bits", "device")
    for other in groups:
        first, second = group.rows[0], other.rows[0]
        alike = all(first[name] == second[name] for name in same) and group.steps == other.steps
        if other is not group and second["player"] == AUTHORS and alike and other.accuracies:
            return other
    return None


def gap(group: Summary) -> float | None:
    """Points that the mean lacks to the teacher."""
    return None if group.mean is None else group.teacher - group.mean


def base(group: Summary, groups: Sequence[Summary]) -> Summary | None:
    """The first group that differs from this one in nothing but what its variant sets; itself, where that is nothing.

    Recipes are compared by name: those of `groups` that come first should be as old as the group.
    """
    first = group.rows[0]
    settings = {name: value for name, value in first["settings"].items() if name not in first["variant"]}
    return next((other for other in groups if other.rows[0]["settings"] == settings and alike(other, group)), None)


def alike(group: Summary, other: Summary) -> bool:
    """Whether nothing but settings, seeds and the age of their recipe tells both apart."""
    names = [name for name in IDENTITY if name not in ("settings", "seed", "recipe_digest")]
    return all(group.rows[0][name] == other.rows[0][name] for name in names)


def same(group: Summary, other: Summary) -> bool:
    """Whether both are of one setting."""
    return key({**group.rows[0], "seed": None}) == key({**other.rows[0], "seed": None})


def difference(group: Summary, other: Summary) -> tuple[float, float | None] | None:
    """(difference of the means, its standard error from both groups' deviations or None); None without accuracies."""
    if group.mean is None or other.mean is None:
        return None
    if group.deviation is None or other.deviation is None:
        return group.mean - other.mean, None
    variances = (each.deviation**2 / len(each.accuracies) for each in (group, other) if each.deviation is not None)
    return group.mean - other.mean, math.sqrt(sum(variances))


def seconds_to(group: Summary, accuracy: float, name: str) -> float | None:
    """Mean seconds of training after which the mean accuracy over the seeds first reached `accuracy`; None: never.

    Args:
        name: "epoch_seconds" or "epoch_cpu_seconds".
    """
    rows = [row for row in group.rows if row["status"] == "ok"]
    if not rows or any(name not in row for row in rows):
        return None
    accuracies = np.mean([row["accuracies"] for row in rows], axis=0)
    seconds = np.cumsum(np.mean([row[name] for row in rows], axis=0))[-len(accuracies) :]
    reached = np.flatnonzero(accuracies >= accuracy)
    return float(seconds[reached[0]]) if len(reached) else None


def ranks(values: Sequence[float]) -> np.ndarray:
    """Ranks from 1, equal values sharing their mean."""
    array = np.asarray(values, dtype=float)
    return np.array([((array < value).sum() + 1 + (array <= value).sum()) / 2 for value in array])


def pearson(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Correlation; None with fewer than three pairs or where one side is constant."""
    first, second = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if len(first) < 3 or first.std() == 0 or second.std() == 0:
        return None
    return float(np.corrcoef(first, second)[0, 1])


def spearman(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Correlation of the ranks."""
    return pearson(ranks(a), ranks(b)) if len(a) else None


@dataclass(frozen=True)
class Prediction:
    """How well a signal predicts accuracy among some rows.

    Attributes:
        count: rows.
        lost: points of accuracy that the run of the best signal has less than the best run.
    """

    count: int
    spearman: float | None
    pearson: float | None
    lost: float


def prediction(rows: Sequence[Row], signal: str) -> Prediction | None:
    """Of the last epochs' signal; None where no row has it."""
    pairs = signal_pairs(rows, signal)
    if not pairs:
        return None
    signals, accuracies = zip(*pairs, strict=True)
    chosen = accuracies[int(np.argmax(signals))]
    return Prediction(len(pairs), spearman(signals, accuracies), pearson(signals, accuracies), max(accuracies) - chosen)


def signal_pairs(rows: Sequence[Row], signal: str) -> list[tuple[float, float]]:
    """(signal, larger being better; accuracy) of the rows that have both and are finite."""
    sign = SIGNALS[signal]
    pairs = [(last(row, signal), row["accuracy"]) for row in rows if row["status"] == "ok"]
    return [(sign * value, accuracy) for value, accuracy in pairs if value is not None and accuracy is not None]


def grouped(rows: Sequence[Row], by: Callable[[Row], str]) -> dict[str, list[Row]]:
    """Rows by a text, in the order of their first."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(by(row), []).append(row)
    return groups


def network(row: Row) -> str:
    """A teacher, its images and the widths, in short: what correlations are made within."""
    return f"{row['model']} {bits(row)}"
