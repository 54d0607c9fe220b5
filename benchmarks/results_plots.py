"""The plots of docs/results.md."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import groups, plot, recipe_age
from benchmarks import results_statistics as statistics
from benchmarks.accuracy import OURS, REAL, Row, Summary, player_name, summarize

#: Fields whose grid is drawn as a map.
BOUNDS = ("lambda_l", "lambda_u")
_COLUMNS = 3


def plots(files: dict[Path, dict[str, Any]]) -> dict[str, Callable[[Path], Path]]:
    """Name of a plot that these files have something for -> what draws it to a path."""
    rows = statistics.unique(files.values())
    content = digested(files)
    found: dict[str, Callable[[Path], Path]] = {}

    def add(name: str, draw: Callable[[Any, Any], None], panels: Sequence[Any], title: str) -> None:
        if not panels:
            return
        columns = min(_COLUMNS, len(panels))
        lines = -(-len(panels) // columns)

        def draw_all(_: Any, axes: Sequence[Any]) -> None:
            for axis, panel in zip(axes, panels, strict=False):
                draw(panel, axis)
            for axis in axes[len(panels) :]:
                axis.set_axis_off()

        found[name] = lambda path: plot.save(content, path, draw_all, lines, columns, 0.6 + 3.6 * lines, title)

    names = groups.Names(rows)
    plain = statistics.plain(rows)
    by_network: dict[Any, list[Summary]] = {}
    for group in plain:
        if statistics.by_time(group) is not None and group.rows[0]["player"] != REAL:
            by_network.setdefault(groups.of_network(group.rows[0]), []).append(group)
    timed = [(names.network(found[0].rows[0]), found) for found in by_network.values()]
    add("time", _time, timed, "accuracy against time of training, mean over the seeds")
    seen = [
        (names.network(group.rows[0]), group)
        for group in plain
        if group.rows[0]["player"] == OURS and group.rows[0].get("h_prime_quantiles")
    ]
    add("h-prime", _h_prime, seen, "H' of the samples of each epoch: median, 25 to 75 %, 5 to 95 %; dashed: bounds")
    comparable = [(name, held) for name, held in statistics.comparable(rows) if len(set(map(groups.bits, held))) == 1]
    signals = [
        (signal, comparable)
        for signal in statistics.SIGNALS
        if any(statistics.signal_pairs(held, signal) for _, held in comparable)
    ]
    add("signals", _signal, signals, "a run's last epoch: accuracy against what is measured without data")
    maps = [panel for path in sorted(files) for panel in _bounds(path, files[path]["rows"], rows)]
    add("bounds", _map, maps, "mean accuracy by the bounds of H'; white: not run")
    add("adaptability", _adaptability, maps, "a run's accuracy against mean H' of its last epoch (low: adaptable)")
    return found


def digested(files: dict[Path, dict[str, Any]]) -> dict[str, Any]:
    """What the plots are made of, all of them."""
    ages = [recipe_age.run_age(row) for path in sorted(files) for row in files[path]["rows"]]
    return {"files": [files[path] for path in sorted(files)], "ages": ages}


def _wrapped(label: str) -> str:
    """In lines that fit under a panel."""
    return textwrap.fill(label, 50)


def _time(panel: tuple[str, list[Summary]], axis: Any) -> None:
    title, found = panel
    for group in found:
        if (curve := statistics.by_time(group)) is not None:
            axis.plot(*curve, label=_wrapped(f"{statistics.label(group)}, {group.steps} steps"))
    axis.axhline(found[0].teacher, color="black", linewidth=0.8, linestyle="--", label="teacher")
    axis.set_xscale("log")
    clock = "seconds of the processor" if found[0].rows[0]["device"] == "cpu" else "seconds"
    axis.set(title=_wrapped(title), xlabel=clock, ylabel="top-1 %")
    axis.legend(fontsize=6, loc="upper center", bbox_to_anchor=(0.5, -0.18))


def _h_prime(panel: tuple[str, Summary], axis: Any) -> None:
    name, group = panel
    row = group.rows[0]
    low, quarter, median, three_quarters, high = np.asarray(row["h_prime_quantiles"], dtype=float).T
    epochs = np.arange(1, len(median) + 1)
    axis.fill_between(epochs, low, high, alpha=0.15, color="C0")
    axis.fill_between(epochs, quarter, three_quarters, alpha=0.3, color="C0")
    axis.plot(epochs, median, color="C0")
    # Of the row, not of the recipe of its name: that may have changed since. Rows of before do not say.
    for value in (row.get(bound) for bound in BOUNDS):
        if value is not None:
            axis.axhline(value, color="black", linewidth=0.8, linestyle="--")
    if row.get("warmup_epochs") is not None:
        axis.axvline(row["warmup_epochs"] + 0.5, color="gray", linewidth=0.8)
    title = f"{name} {statistics.label(group)}, seed {row['seed']}"
    axis.set(title=title, xlabel="epoch (gray: the student starts)", ylabel="H'", ylim=(0, 1))
    axis.title.set_fontsize(8)


def _signal(panel: tuple[str, Sequence[tuple[str, list[Row]]]], axis: Any) -> None:
    signal, comparable = panel
    for name, found in comparable:
        if pairs := statistics.signal_pairs(found, signal):
            signals, accuracies = zip(*pairs, strict=True)
            axis.plot(signals, accuracies, "o", alpha=0.6, markersize=4, label=_wrapped(name))
    minus = "" if statistics.SIGNALS[signal] > 0 else "-"
    axis.set(xlabel=minus + signal.replace("_", " "), ylabel="top-1 %")
    axis.legend(fontsize=6, loc="upper center", bbox_to_anchor=(0.5, -0.18))


def _bounds(path: Path, rows: Sequence[Row], everything: Sequence[Row]) -> list[tuple[str, list[Summary]]]:
    """(title, groups) of each base of which a file's rows vary the bounds, and nothing else; with the base itself."""
    names = groups.Names(everything)
    bounded = [row for row in rows if set(row["variant"]) <= set(BOUNDS) and None not in _pair(row)]
    panels = []
    for held in groups.grouped(bounded, statistics.same_base).values():
        shown = summarize(held)
        base = next((each for group in shown if (each := statistics.base(group, summarize(everything)))), None)
        if base is not None and None not in _pair(base.rows[0]) and _pair(base.rows[0]) not in map(_of, shown):
            shown.insert(0, base)
        if len(shown) > 3 and any(group.accuracies for group in shown):
            first = held[0]
            title = f"{path.stem.removeprefix('accuracy-')}: {player_name(first)}, {names.network(first)}"
            panels.append((title + recipe_age.table_age(first), shown))
    return panels


def _pair(row: Row) -> tuple[Any, Any]:
    return row.get("lambda_l"), row.get("lambda_u")


def _of(group: Summary) -> tuple[Any, Any]:
    return _pair(group.rows[0])


def _map(panel: tuple[str, list[Summary]], axis: Any) -> None:
    title, found = panel
    lowers, uppers = (sorted(set(values)) for values in zip(*map(_of, found), strict=True))
    values = np.full((len(uppers), len(lowers)), np.nan)
    for group in found:
        lower, upper = _of(group)
        values[uppers.index(upper), lowers.index(lower)] = np.nan if group.mean is None else group.mean
    axis.imshow(values, origin="lower", cmap="viridis", aspect="auto")
    middle = np.nanmean([np.nanmin(values), np.nanmax(values)])
    for (y, x), value in np.ndenumerate(values):
        if not np.isnan(value):
            color = "white" if value < middle else "black"
            axis.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=8, color=color)
    axis.set_xticks(range(len(lowers)), [f"{value:g}" for value in lowers])
    axis.set_yticks(range(len(uppers)), [f"{value:g}" for value in uppers])
    axis.set(title=title, xlabel="lambda_l", ylabel="lambda_u")


def _adaptability(panel: tuple[str, list[Summary]], axis: Any) -> None:
    title, summaries = panel
    for i, group in enumerate(summaries):
        found = [(row["h_prime"], row["accuracy"]) for row in group.rows if row["status"] == "ok"]
        if found := [pair for pair in found if None not in pair]:
            lower, upper = _of(group)
            label = f"{lower:g} to {upper:g}"
            axis.plot(*zip(*found, strict=True), "os^v"[i // 10 % 4], alpha=0.6, markersize=4, label=label)
    if axis.has_data():
        axis.legend(fontsize=6, title="bounds", title_fontsize=6)
    axis.set(title=title, xlabel="mean H' of the last epoch", ylabel="top-1 %")
