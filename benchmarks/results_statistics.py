"""What docs/results.md says of rows of accuracies, as numbers: groups, differences, correlations."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks import groups
from benchmarks.accuracy import AUTHORS, IDENTITY, OURS, REAL, Row, Summary, key, summarize
from benchmarks.accuracy_report import group_label
from benchmarks.recipe_age import is_current, run_age

#: Signal of :class:`adadfq.HeldOut` -> sign that makes larger better.
SIGNALS = {"held_out_agreement": 1, "held_out_loss": -1, "held_out_kl": -1, "held_out_mirrored_kl": -1}


#: In a heading, where rows of several widths are together.
ALL_WIDTHS = "at all widths"
#: What a run of the authors' may change of their recipe and stay theirs: how long it takes.
SCHEDULE = ("epochs", "steps_per_epoch", "lr_milestones", "warmup_epochs", "calibration_epochs")


def unique(files: Iterable[Mapping[str, Any]]) -> list[Row]:
    """Rows of several files; a run that is in two is taken once, as the grid made it that varied least."""
    rows: dict[str, Row] = {}
    for content in files:
        for row in content["rows"]:
            held = rows.setdefault(key(row), row)
            if len(row["variant"]) < len(held["variant"]):
                rows[key(row)] = row
    return list(rows.values())


def is_plain(row: Row) -> bool:
    """Whether a run is of its recipe as set: the grid varied nothing, or to what was set anyway."""
    return not row["variant"] or row["recipe_digest"] == row.get("base_digest")


def label(group: Summary) -> str:
    """A group's player and recipe, and whether that was another recipe then."""
    return group_label(group) + run_age(group.rows[0])


def setting(row: Row, leave_out: Iterable[str] = ()) -> str:
    """``field=value`` of what a row's run has changed of its recipe."""
    return " ".join(f"{name}={value}" for name, value in row["settings"].items() if name not in set(leave_out))


def last(row: Row, name: str) -> float | None:
    """The last epoch's value of a field that has one a scored epoch; None where there is none."""
    values = row.get(name)
    return values[-1] if values else None


def plain(rows: Sequence[Row]) -> list[Summary]:
    """The groups of runs as set: by teacher, then by width, those of today's recipes first, then by number of steps."""
    found = summarize([row for row in rows if is_plain(row)])
    return sorted(
        found,
        key=lambda group: (
            group.rows[0]["model"],
            group.rows[0]["data"],
            group.rows[0]["weight_bits"],
            group.rows[0]["act_bits"],
            not is_current(group.rows[0]),
            group.steps,
        ),
    )


def rival(group: Summary, summaries: Sequence[Summary]) -> Summary | None:
    """The authors' runs to judge this project's by; None where there are none, and for the authors' own.

    They have the same teacher, images, widths, device and threads, played as many steps of as many images, and changed
    nothing of their recipe but :data:`SCHEDULE`. Of several, the one with the same recipe, then the most accurate.
    """
    first = group.rows[0]
    if first["player"] != OURS:
        return None
    found = [
        other
        for other in summaries
        if (row := other.rows[0])["player"] == AUTHORS
        and groups.of_network(row) == groups.of_network(first)
        and all(row[name] == first[name] for name in ("steps", "images_seen"))
        and set(row["settings"]) <= set(SCHEDULE)
        and other.mean is not None
    ]
    return max(
        found, key=lambda other: (other.rows[0]["recipe_digest"] == first["recipe_digest"], other.mean), default=None
    )


def gap(group: Summary) -> float | None:
    """Points that the mean lacks to the teacher."""
    return None if group.mean is None else group.teacher - group.mean


def base(group: Summary, summaries: Sequence[Summary]) -> Summary | None:
    """The first group that differs from this one in nothing but what its variant sets; itself, where that is nothing.

    That is said by the digest of the whole recipe, so that neither a recipe that has changed in between nor another
    setting passes for the base.
    """
    if is_plain(group.rows[0]):
        return group
    digest = group.rows[0].get("base_digest")
    found = (other for other in summaries if digest is not None and other.rows[0]["recipe_digest"] == digest)
    return next((other for other in found if alike(other, group)), None)


def same_base(row: Row) -> tuple[Any, ...]:
    """What rows share that are compared with one base."""
    return row["player"], *groups.of_network(row), row["recipe"], row.get("base_digest")


def alike(group: Summary, other: Summary) -> bool:
    """Whether nothing but settings, seeds and the age of their recipe tells both apart."""
    names = [name for name in IDENTITY if name not in ("settings", "seed", "recipe_digest")]
    return all(group.rows[0][name] == other.rows[0][name] for name in names)


def same(group: Summary, other: Summary) -> bool:
    """Whether both are of one setting."""
    return key({**group.rows[0], "seed": None}) == key({**other.rows[0], "seed": None})


def difference(
    group: Summary, other: Summary, of: Callable[[Row], float | None] = lambda row: row["accuracy"]
) -> tuple[float, float | None] | None:
    """(difference of the means over the seeds, its standard error from both groups' deviations or None).

    None where one group has no such number. Seeds that diverged have none.
    """
    pair = [
        [value for row in each.rows if row["status"] == "ok" and (value := of(row)) is not None]
        for each in (group, other)
    ]
    if not all(pair):
        return None
    first, second = (math.fsum(values) / len(values) for values in pair)
    if any(len(values) < 2 for values in pair):
        return first - second, None
    return first - second, math.sqrt(sum(statistics.variance(values) / len(values) for values in pair))


def p_value(group: Summary, other: Summary) -> float | None:
    """That means over seeds are so far apart by chance (Welch's t-test, two-sided); None with fewer than two seeds.

    Groups without any deviation differ if their means do.
    """
    if min(len(group.accuracies), len(other.accuracies)) < 2:
        return None
    if not group.deviation and not other.deviation:
        return float(group.mean == other.mean)
    from scipy import stats

    return float(stats.ttest_ind(group.accuracies, other.accuracies, equal_var=False).pvalue)


def pooled_error(groups: Sequence[Summary]) -> float | None:
    """Standard error of the difference of two groups' means where all groups had one deviation, of as many seeds as the
    smallest; None where no group has two seeds."""
    several = [group for group in groups if group.deviation is not None]
    if not several:
        return None
    freedom = sum(len(group.accuracies) - 1 for group in several)
    squares = sum((len(group.accuracies) - 1) * (group.deviation or 0) ** 2 for group in several)
    return math.sqrt(squares / freedom * 2 / min(len(group.accuracies) for group in several))


def held_out_difference(group: Summary, other: Summary, signal: str) -> tuple[float, float | None] | None:
    """:func:`difference` of the last epochs' signal; None where the held-out images are not the same ones."""
    digests = {row.get("held_out_digest") for each in (group, other) for row in each.rows if row["status"] == "ok"}
    return (
        difference(group, other, lambda row: last(row, signal)) if len(digests) == 1 and None not in digests else None
    )


#: Field with an epoch's time -> heading of a column of it.
CLOCKS = {"epoch_cpu_seconds": "processor's s", "epoch_seconds": "s"}


def clock(row: Mapping[str, Any]) -> str:
    """The field with an epoch's time: the processor's own on a CPU, where whatever else runs is in the wall's."""
    return "epoch_cpu_seconds" if row["device"] == "cpu" else "epoch_seconds"


def seconds(row: Row) -> float | None:
    """Of the whole training, by :func:`clock`; None where it was not taken."""
    return sum(row[clock(row)]) if clock(row) in row else None


def seconds_to(group: Summary, accuracy: float) -> float | None:
    """Mean seconds, by :func:`clock`, until the mean accuracy over the seeds first is `accuracy`; None: never."""
    curve = by_time(group)
    if curve is None:
        return None
    reached = np.flatnonzero(curve[1] >= accuracy)
    return float(curve[0][reached[0]]) if len(reached) else None


def by_time(group: Summary) -> tuple[np.ndarray, np.ndarray] | None:
    """(mean seconds of training, mean accuracy) at every scored epoch; None where a seed's time was not taken."""
    rows = [row for row in group.rows if row["status"] == "ok"]
    if not rows or any(clock(row) not in row for row in rows):
        return None
    accuracies = np.mean([row["accuracies"] for row in rows], axis=0)
    return np.cumsum(np.mean([row[clock(row)] for row in rows], axis=0))[-len(accuracies) :], accuracies


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


def comparable(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """(heading, rows) of the same held-out images: a network each, then a teacher each at all widths together.

    Rows whose images are not known are left out: signals of different images do not compare. So are those trained on
    real images, which is nothing that a signal without data could choose.
    """
    known = [row for row in rows if row.get("held_out_digest") is not None and row["player"] != REAL]
    names = groups.Names(known)
    found = []
    for held in groups.grouped(known, lambda row: (groups.of_teacher(row), row["held_out_digest"])).values():
        widths = list(groups.grouped(held, groups.bits).items())
        found += [(names.signals(part[0], width), part) for width, part in widths]
        found += [(names.signals(held[0], ALL_WIDTHS), held)] if len(widths) > 1 else []
    return found
