"""Plots of a file of results, as PNG. matplotlib comes with the extras "test" and "demo"."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from adadfq import files
from adadfq.errors import InvalidInputError
from benchmarks import accuracy_report, ratios, scaling
from benchmarks.breakdown import PARTS
from benchmarks.cases import TINY
from benchmarks.environment import machine
from benchmarks.providers import CLONE, COPY
from benchmarks.ratios import RIVALS, Row
from benchmarks.recipe_age import run_age, table_age
from benchmarks.store import TIMED

_MARKERS = {"forward": "o", "backward": "v", "both": "s"}


def names(content: dict[str, Any]) -> tuple[str, ...]:
    """The plots of a file; none where no row has a time that was measured, or an accuracy."""
    if content["kind"] == "accuracy":
        return ("spread",) if any(row["status"] == "ok" for row in content["rows"]) else ()
    if content["kind"] not in TIMED or not any(row["status"] == "ok" for row in content["rows"]):
        return ()
    if content["kind"] == "step":
        return ("scaling",) if content["options"].get("scaling") else ("step",)
    return ("speedup", "roofline")


def digest(content: dict[str, Any]) -> str:
    """SHA-256 of what a file's plots show. They carry it in their metadata, which PNG stores as it is."""
    if content.get("kind") == "accuracy":
        content = {**content, "ages": [(run_age(row), table_age(row)) for row in content["rows"]]}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def plot(content: dict[str, Any], stem: str, folder: Path) -> list[Path]:
    """Write the plots of a file to `folder` as ``<stem>-<plot>.png``; returns their paths.

    Raises:
        InvalidInputError: matplotlib is missing, `folder` does not exist, or no row has a time or an accuracy.
    """
    if not folder.is_dir():
        raise InvalidInputError(f"the directory {folder} does not exist; create it first")
    if not names(content):
        what = "an accuracy" if content["kind"] == "accuracy" else "a time"
        raise InvalidInputError(f"{stem}: no row has {what}: there is nothing to plot")
    require_matplotlib()
    if content["kind"] == "accuracy":
        fields = accuracy_report.networks(content["rows"])
        return [save(content, folder / f"{stem}-spread.png", accuracy_report.draw, fields, 2)]
    if content["kind"] == "step":
        (name,) = names(content)
        bars = sum(row["status"] == "ok" for row in content["rows"])
        height = 1.5 + 0.35 * max(bars, 8) if name == "step" else None
        return [save(content, folder / f"{stem}-{name}.png", _STEPS[name], 1, 2, height)]
    ops = list(dict.fromkeys(row["op"] for row in _timed(content)))
    columns = min(3, len(ops))
    return [
        save(content, folder / f"{stem}-speedup.png", _speed_up, -(-len(ops) // columns), columns),
        save(content, folder / f"{stem}-roofline.png", _roofline, 1, 1),
    ]


def require_matplotlib() -> None:
    """Make matplotlib draw to files; raise :class:`InvalidInputError` where it is missing."""
    try:
        import matplotlib
    except ImportError as error:
        raise InvalidInputError("plots need matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")


def _timed(content: dict[str, Any]) -> list[Row]:
    timed = {row["case"] for row in content["rows"] if row["status"] == "ok"}
    rows = [row for row in content["rows"] if row["case"] in timed]
    # Next to no data is a point of its own, far from every other; where there is nothing else, it is the plot.
    return [row for row in rows if row.get("where") != TINY] or rows


def _on_gpu(content: dict[str, Any]) -> bool:
    return content["environment"]["device"] != "cpu"


def save(
    content: dict[str, Any],
    path: Path,
    draw: Callable[[Any, Sequence[Any]], None],
    rows: int,
    columns: int,
    height: float | None = None,
    title: str | None = None,
) -> Path:
    """Write a figure of rows x columns of axes, drawn from `content`, whose digest it carries; returns `path`."""
    from matplotlib.figure import Figure

    if height is None:
        height = 1 + 3.5 * rows if rows * columns > 1 else 5
    figure = Figure(figsize=(max(10, 4.5 * columns), height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    draw(content, axes)
    figure.suptitle(machine(content["environment"]) if title is None else title, fontsize=9)
    # No creation date or version of matplotlib: the same results give the same file.
    with files.atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110, metadata={"Software": None, "Results": digest(content)})
    return path


def _logarithmic(axis: Any) -> None:
    """Logarithmic in both directions, with plain numbers at 1, 2 and 5."""
    from matplotlib.ticker import LogLocator, NullFormatter

    for scale, side in ((axis.set_xscale, axis.xaxis), (axis.set_yscale, axis.yaxis)):
        scale("log")
        side.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
        side.set_major_formatter("{x:g}")
        side.set_minor_formatter(NullFormatter())


def _speed_up(content: dict[str, Any], axes: Sequence[Any]) -> None:
    """One field an operator: how many times as fast as each rival, against the size of the main tensor."""
    points: dict[str, dict[tuple[str, str], list[tuple[float, float]]]] = {}
    for providers in ratios.by_case(_timed(content)).values():
        own = ratios.ours(providers)
        any_row = next(iter(providers.values()))
        field = points.setdefault(any_row["op"], {})
        for name in RIVALS:
            other = ratios.rival(providers, name)
            if own is not None and other is not None:
                value = other["p50_ms"] / own["p50_ms"]
                field.setdefault((name, own["pass"]), []).append((own["nbytes"] / 1e6, value))
    for axis, (op, field) in zip(axes, points.items(), strict=False):
        for (name, pass_), values in sorted(field.items()):
            color = f"C{RIVALS.index(name)}"
            axis.plot(*zip(*values, strict=True), _MARKERS[pass_], color=color, label=f"{name}, {pass_}", alpha=0.7)
        axis.axhline(1, color="black", linewidth=0.8)
        _logarithmic(axis)
        axis.set(title=op, xlabel="main tensor, MB", ylabel="times as fast")
        if field:
            axis.legend(fontsize=7)
    for axis in axes[len(points) :]:
        axis.set_axis_off()


def _roofline(content: dict[str, Any], axes: Sequence[Any]) -> None:
    """GB/s of the bytes a case must move, against them; the copies are the limit.

    Where the device is a CPU, in parts of the copy: its speed says more about the machine than about the code.
    """
    (axis,) = axes
    field, label = ("gb_per_s", "GB/s") if _on_gpu(content) else ("fraction_of_copy", "of the copy")
    timed = ratios.by_case(_timed(content))
    for name, style in ((COPY, "-"), (CLONE, "--")):
        line: dict[int, list[float]] = {}
        for providers in timed.values():
            if (row := ratios.timed(providers, name)) is not None:
                line.setdefault(row["bytes_moved"], []).append(row[field])
        sizes = sorted(size for size in line if size)
        if sizes:
            speeds = [sorted(line[size])[len(line[size]) // 2] for size in sizes]
            axis.plot([size / 1e6 for size in sizes], speeds, style, color="black", linewidth=1, label=name)
    ops = list(dict.fromkeys(row["op"] for row in _timed(content)))
    for i, op in enumerate(ops):
        for pass_, marker in _MARKERS.items():
            values = []
            for providers in timed.values():
                own = ratios.ours(providers)
                if own is not None and (own["op"], own["pass"]) == (op, pass_) and own["bytes_moved"] and own[field]:
                    values.append((own["bytes_moved"] / 1e6, own[field]))
            if values:
                axis.plot(*zip(*values, strict=True), marker, color=f"C{i}", label=f"{op}, {pass_}", alpha=0.7)
    _logarithmic(axis)
    axis.set(xlabel="bytes moved, MB", ylabel=label)
    axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))


def _step(content: dict[str, Any], axes: Sequence[Any]) -> None:
    """A bar a player: its time, divided by part; and its peak memory.

    On a CPU, time in that of the case's slowest player.
    """
    times, memory = axes
    rows = [row for row in _timed(content) if row["status"] == "ok"]
    labels = [f"{row['case'].removeprefix('step/')}  {row['provider']}" for row in rows]
    slowest: dict[str, float] = {}
    for row in rows:
        slowest[row["case"]] = max(slowest.get(row["case"], 0.0), row["p50_ms"])
    whole = [row["p50_ms"] if _on_gpu(content) else row["p50_ms"] / slowest[row["case"]] for row in rows]
    left = [0.0] * len(rows)
    for i, part in enumerate(PARTS):
        widths = [row["parts"][part] * time for row, time in zip(rows, whole, strict=True)]
        times.barh(labels, widths, left=left, color=f"C{i}", label=part)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    times.set(xlabel="ms" if _on_gpu(content) else "time, in that of the slowest")
    times.legend(fontsize=7, ncols=4, loc="lower center", bbox_to_anchor=(0.4, 1))
    memory.barh(labels, [row["peak_memory_bytes"] / 1e6 for row in rows], color="gray")
    memory.set(xlabel="peak memory, MB")
    memory.tick_params(labelleft=False)
    for axis in axes:
        axis.invert_yaxis()


def _scaling(content: dict[str, Any], axes: Sequence[Any]) -> None:
    """Time against the batch and against the pixels, with the straight line through it; on a CPU, in the longest."""
    for axis, (key, name) in zip(axes, scaling.AXES.items(), strict=True):
        found = scaling.points(content["rows"], key)
        axis.set(xlabel=name, ylabel="ms" if _on_gpu(content) else "time, in the longest")
        if len(found) < 2:
            continue
        xs, ys = zip(*found, strict=True)
        unit = 1.0 if _on_gpu(content) else ys[-1]
        line = scaling.fit(xs, [y / unit for y in ys])
        axis.plot(xs, [y / unit for y in ys], "o")
        ends = (0, xs[-1])
        label = f"$r^2$ = {line.r2:.4f}, intercept {line.intercept:.3g}"
        axis.plot(ends, [line.intercept + line.slope * x for x in ends], linewidth=1, label=label)
        axis.set_xlim(left=0)
        axis.set_ylim(bottom=min(0.0, 1.1 * line.intercept))
        axis.legend()


#: Name of a plot of steps -> what draws it.
_STEPS = {"step": _step, "scaling": _scaling}
