"""What :mod:`benchmarks.accuracy` found, as text, as a part of the README, and as a plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.accuracy import Row, Summary, network, summarize
from benchmarks.environment import machine
from benchmarks.tables import markdown_table, number, text_table


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
    header = ["setting", "seeds", "top-1 %", "teacher", "round to nearest", "steps", "ms an image"]
    lines = [
        [
            f"{summary.network} {summary.label}",
            str(len(summary.accuracies) + summary.diverged),
            _accuracy(summary, "+-"),
            f"{summary.teacher:.2f}",
            _percent(summary.round_to_nearest),
            str(summary.steps),
            number(summary.ms_per_image),
        ]
        for summary in summarize(rows)
    ]
    return text_table(header, lines)


def block(path: Path, content: dict[str, Any]) -> str:
    """The README's part about one file: a table for each network and bits. A CPU's times are not shown: whatever
    else ran during one of these long runs is in them, and no two ran side by side."""
    parts = [f"**{machine(content['environment'])}** (`benchmarks/results/{path.name}`)"]
    if not content["rows"]:
        parts.append("No run is stored yet.")
    for rows in _by_network(content["rows"]).values():
        parts += _network_parts(rows, content["environment"]["device"] == "cpu")
    return "\n\n".join(parts)


def _network_parts(rows: Sequence[Row], on_cpu: bool) -> list[str]:
    first, summaries = rows[0], summarize(rows)
    changed = ", ".join(f"`{setting}`" for setting in _shared(rows))
    title = f"{first['model']}, {first['weight_bits']}-bit weights and {first['act_bits']}-bit activations, recipe "
    title += f"`{first['recipe']}`{' with ' + changed if changed else ''}:"
    lines = []
    for summary in summaries:
        cells = [_accuracy(summary, "±"), _percent(summary.round_to_nearest), str(summary.steps)]
        lines.append([f"`{summary.label}`", *cells, *([] if on_cpu else [number(summary.ms_per_image)])])
    header = ["setting", "top-1 %", "round to nearest", "steps", *([] if on_cpu else ["ms an image"])]
    seeds = ", ".join(map(str, sorted({row["seed"] for row in rows})))
    share = first["teacher_accuracy"] / 100
    error = 100 * (share * (1 - share) / first["images"]) ** 0.5
    note = (
        f"Top-1 of the last epoch on {first['images']} images, mean ± sample deviation over seeds {seeds}; the teacher "
        f"has {first['teacher_accuracy']:.2f} (standard error {error:.2f})."
    )
    return [title, markdown_table(header, lines), note]


def _by_network(rows: Sequence[Row]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(network(row), []).append(row)
    return groups


def _shared(rows: Sequence[Row]) -> list[str]:
    """``field=value`` of what every run has changed, and no variant varies."""
    varied = {name for row in rows for name in row["variant"]}
    items = [(name, value) for name, value in rows[0]["settings"].items() if name not in varied]
    return [f"{name}={value}" for name, value in items if all(row["settings"].get(name) == value for row in rows)]


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _accuracy(summary: Summary, plus_minus: str) -> str:
    spread = "" if summary.deviation is None else f" {plus_minus} {summary.deviation:.2f}"
    diverged = f" ({summary.diverged} diverged)" if summary.diverged else ""
    return f"{_percent(summary.mean)}{spread}{diverged}"


def draw(content: dict[str, Any], axes: Sequence[Any]) -> None:
    """A row of fields a network: accuracy of every seed with mean and deviation by variant; on a GPU, time an image."""
    on_cpu = content["environment"]["device"] == "cpu"
    for i, (title, rows) in enumerate(_by_network(content["rows"]).items()):
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
                label = None if place else "round to nearest"
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
    return len(_by_network(rows))
