"""Predicted steps as text: for the terminal, and for docs/speed.md."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.predict_step import AUTHORS, OURS, PARTS, SCHEDULE
from benchmarks.tables import markdown_table, number, text_table

Row = dict[str, Any]

_HEADER = ["step", "way", "precision", "kernels", "GB", "GFLOP", "ms on the device", "ms a step"]


def _cells(row: Row) -> list[str]:
    sizes = [str(row["launches"]), number(row["nbytes"] / 1e9), number(row["flops"] / 1e9)]
    return [row["way"], row["precision"], *sizes, _ms(row, "device"), _ms(row, "predicted")]


def _ms(row: Row, which: str) -> str:
    return _span(row[f"{which}_low_us"] / 1e3, row[f"{which}_high_us"] / 1e3)


def _span(low: float, high: float) -> str:
    first, second = number(low), number(high)
    return first if first == second else f"{first} - {second}"


def predictions_text(rows: Sequence[Row]) -> str:
    """Every prediction, its parts, and what follows from it."""
    parts = [
        [
            f"{row['case']} {row['way']} {row['precision']}",
            f"{part['part']} {part['pass']}",
            str(part["launches"]),
            number(part["nbytes"] / 1e9),
            number(part["flops"] / 1e9),
            _ms(part, "device"),
        ]
        for row in rows
        for part in row["parts"]
    ]
    tables = [
        text_table(_HEADER, [[row["case"], *_cells(row)] for row in rows]),
        text_table(["step", "part", "kernels", "GB", "GFLOP", "ms on the device"], parts),
    ]
    return "\n\n".join([*tables, "\n".join(statements(rows))])


def statements(rows: Iterable[Row]) -> list[str]:
    """What the predictions say of the ratio to the authors' way and of the paper's schedule; a sentence each."""
    found: dict[str, dict[tuple[str, str], Row]] = {}
    for row in rows:
        found.setdefault(row["case"], {})[row["way"], row["precision"]] = row
    sentences = []
    for case, ways in found.items():
        if (authors := ways.get((AUTHORS, "float32"))) is None:
            continue
        ratios = [
            _span(
                authors["predicted_low_us"] / row["predicted_high_us"],
                authors["predicted_high_us"] / row["predicted_low_us"],
            )
            + f" times in {precision}"
            for (way, precision), row in ways.items()
            if way == OURS
        ]
        sentence = f"{case}: predicted as fast as the authors' way {', '.join(ratios)}"
        if authors["model"] == "resnet20" and authors["batch_size"] == 16:
            minutes = [
                _span(*(row[f"predicted_{end}_us"] * SCHEDULE / 60e6 for end in ("low", "high"))) + f" in {precision}"
                for (way, precision), row in ways.items()
                if way == OURS
            ]
            sentence += f"; the paper's {SCHEDULE:,} steps in minutes: {', '.join(minutes)}"
        sentences.append(sentence + ".")
    return sentences


def predictions_block(path: Path, content: Row) -> str:
    """For docs/speed.md: totals, this project's parts at the authors' batch size, and what follows."""
    rows, environment = content["rows"], content["environment"]
    gpus = ", ".join(dict.fromkeys(row["gpu"] for row in rows))
    title = f"**A step on an {gpus}: predicted, not yet run on a GPU** (`benchmarks/results/{path.name}`), from what it"
    title += f" launches on fake tensors of PyTorch {environment['versions']['torch']}"
    if environment["git_commit"]:
        title += f", commit {environment['git_commit'][:10]}{' with changes' if environment['git_dirty'] else ''}"
    totals = markdown_table(_HEADER, [[f"`{row['case']}`", *_cells(row)] for row in rows])
    shown = [row for row in rows if row["way"] == OURS and row["batch_size"] == 16]
    parts = [[f"`{row['case']}` {row['precision']}", *(_part(row, part) for part in PARTS)] for row in shown]
    note = (
        "Estimates of `benchmarks/predict_step.py`: every kernel takes what its bytes or its FLOPs take, and at least a"
        " few microseconds. The authors' way is a model of eager PyTorch that does their network work, with 5 to 8 us"
        " of the host an operator; their bookkeeping and their waiting for the device are not in it. Low and high ends"
        " are those of the assumed constants."
    )
    tables = [totals] + ([markdown_table(["kernels, ms on the device", *PARTS], parts)] if parts else [])
    return "\n\n".join([title, *tables, "\n".join(f"- {sentence}" for sentence in statements(rows)), note])


def _part(row: Row, name: str) -> str:
    found = [part for part in row["parts"] if part["part"] == name]
    ends = [sum(part[f"device_{end}_us"] for part in found) / 1e3 for end in ("low", "high")]
    return f"{sum(part['launches'] for part in found)}, {_span(*ends)}"
