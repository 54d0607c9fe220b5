"""What :mod:`benchmarks.accuracy` found, as text and as a plot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks import groups
from benchmarks.accuracy import Row, Summary, player_name, summarize
from benchmarks.recipe_age import run_age, table_age
from benchmarks.tables import number, text_table


def run_text(row: Row) -> str:
    """One run."""
    (summary,) = summarize([row])
    head = f"{summary.label}, seed {row['seed']}: "
    if row["status"] != "ok":
        return f"{head}{row['status']}: {row['error']}"
    nearest = "" if row["round_to_nearest"] is None else f", round to nearest {row['round_to_nearest']:.2f}"
    return (
        f"{head}{row['accuracy']:.2f} % (teacher {row['teacher_accuracy']:.2f}{nearest}), {row['train_seconds']:.0f} s"
    )


def text(rows: Sequence[Row]) -> str:
    """A line a variant."""
    header = ["setting", "seeds", "top-1 %", "teacher", "round to nearest (min/max)", "steps", "ms an image"]
    names = groups.Names(rows)
    lines = [
        [
            f"{names.network(summary.rows[0])} {summary.rows[0]['recipe']} {summary.label}{run_age(summary.rows[0])}",
            str(len(summary.accuracies) + summary.diverged),
            accuracy_text(summary, "+-"),
            f"{summary.teacher:.2f}",
            percent(summary.round_to_nearest),
            str(summary.steps),
            number(summary.ms_per_image),
        ]
        for summary in summarize(rows)
    ]
    return text_table(header, lines)


def _fields(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows of one network and recipe, by a heading of theirs; those of a recipe as it was apart, and last."""
    names = groups.Names(rows)
    found = groups.grouped(rows, lambda row: (groups.of_network(row), row["recipe"], table_age(row)))
    ordered = sorted(found.items(), key=lambda item: item[0][2] != "")
    return {f"{names.network(held[0])} {recipe}{age}": held for (_, recipe, age), held in ordered}


def group_label(summary: Summary) -> str:
    """Who trained, by which recipe and with what changed in it, but for what the teacher's input is."""
    row = summary.rows[0]
    settings = " ".join(f"{name}={value}" for name, value in row["settings"].items() if name not in ("mean", "std"))
    return f"{player_name(row)}, {row['recipe']}" + (f" {settings}" if settings else "")


def percent(value: float | None) -> str:
    """Two decimals; "-" where there is none."""
    return "-" if value is None else f"{value:.2f}"


def accuracy_text(summary: Summary, plus_minus: str) -> str:
    """Mean and deviation, and how many diverged."""
    spread = "" if summary.deviation is None else f" {plus_minus} {summary.deviation:.2f}"
    diverged = f" ({summary.diverged} diverged)" if summary.diverged else ""
    return f"{percent(summary.mean)}{spread}{diverged}"


def draw(content: dict[str, Any], axes: Sequence[Any]) -> None:
    """A row of fields a network: accuracy of every seed with mean and deviation by variant; on a GPU, time an image."""
    on_cpu = content["environment"]["device"] == "cpu"
    for i, (title, rows) in enumerate(_fields(content["rows"]).items()):
        summaries = summarize(rows)
        left, right = axes[2 * i], axes[2 * i + 1]
        places = list(range(len(summaries)))
        left.axvline(summaries[0].teacher, color="black", linewidth=0.8, linestyle="--", label="teacher")
        for place, summary in zip(places, summaries, strict=True):
            left.plot(summary.accuracies, [place] * len(summary.accuracies), "o", color="C0", alpha=0.4)
            if summary.mean is not None:
                left.errorbar(
                    summary.mean, place, xerr=summary.deviation, fmt="|", markersize=14, color="C0", capsize=4
                )
            if summary.round_to_nearest is not None:
                label = None if place else "round to nearest (min/max)"
                left.plot(summary.round_to_nearest, place, "x", color="C1", label=label)
        left.set_yticks(places, [summary.label.replace(" ", "\n") for summary in summaries], fontsize=7)
        left.set(title=title, xlabel="top-1 %: seeds, mean ± sample deviation", ylim=(len(summaries) - 0.5, -0.5))
        left.legend(fontsize=7)

        if on_cpu:
            right.set_visible(False)
            continue
        right.barh(places, [summary.ms_per_image or 0.0 for summary in summaries], color="C2")
        right.set_yticks(places, [""] * len(summaries))
        right.set(xlabel="ms an image", ylim=left.get_ylim())


def networks(rows: Sequence[Row]) -> int:
    """How many rows of fields :func:`draw` fills."""
    return len(_fields(rows))
