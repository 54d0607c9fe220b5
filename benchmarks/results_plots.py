"""The plots of docs/results.md."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from adadfq import Recipe
from benchmarks import plot
from benchmarks import results_statistics as statistics
from benchmarks.accuracy import OURS, Row, Summary, summarize
from benchmarks.accuracy_report import group_label

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

    groups = statistics.plain(rows)
    timed = [group for group in groups if any(_clock(row) in row for row in group.rows) and group.accuracies]
    by_network: dict[str, list[Summary]] = {}
    for group in timed:
        by_network.setdefault(statistics.network(group.rows[0]), []).append(group)
    add("time", _time, list(by_network.items()), "accuracy against time of training, mean over the seeds")
    seen = [group for group in groups if group.rows[0]["player"] == OURS and group.rows[0].get("h_prime_quantiles")]
    add("h-prime", _h_prime, seen, "H' of the samples of each epoch: median, 25 to 75 %, 5 to 95 %; dashed: bounds")
    signals = [(signal, rows) for signal in statistics.SIGNALS if statistics.signal_pairs(rows, signal)]
    add("signals", _signal, signals, "a run's last epoch: accuracy against what is measured without data")
    maps = [panel for path in sorted(files) for panel in _bounds(path, files[path]["rows"])]
    add("bounds", _map, maps, "mean accuracy by the bounds of H'; white: not run")
    add("adaptability", _adaptability, maps, "a run's accuracy against mean H' of its last epoch (low: adaptable)")
    return found


def digested(files: dict[Path, dict[str, Any]]) -> dict[str, Any]:
    """What the plots are made of, all of them."""
    return {"files": [files[path] for path in sorted(files)]}


def _clock(row: Row) -> str:
    """The field with an epoch's time: the processor's own on a CPU, where whatever else runs is in the wall's."""
    return "epoch_cpu_seconds" if row["device"] == "cpu" else "epoch_seconds"


def _time(panel: tuple[str, list[Summary]], axis: Any) -> None:
    title, groups = panel
    for group in groups:
        rows = [row for row in group.rows if row["status"] == "ok" and _clock(row) in row]
        if not rows:
            continue
        accuracies = np.mean([row["accuracies"] for row in rows], axis=0)
        seconds = np.cumsum(np.mean([row[_clock(row)] for row in rows], axis=0))[-len(accuracies) :]
        axis.plot(seconds, accuracies, label=f"{group_label(group)}, {group.steps} steps")
    axis.axhline(groups[0].teacher, color="black", linewidth=0.8, linestyle="--", label="teacher")
    axis.set_xscale("log")
    clock = "seconds of the processor" if groups[0].rows[0]["device"] == "cpu" else "seconds"
    axis.set(title=title, xlabel=clock, ylabel="top-1 %")
    axis.legend(fontsize=6)


def _h_prime(group: Summary, axis: Any) -> None:
    row = group.rows[0]
    low, quarter, median, three_quarters, high = np.asarray(row["h_prime_quantiles"], dtype=float).T
    epochs = np.arange(1, len(median) + 1)
    axis.fill_between(epochs, low, high, alpha=0.15, color="C0")
    axis.fill_between(epochs, quarter, three_quarters, alpha=0.3, color="C0")
    axis.plot(epochs, median, color="C0")
    recipe = Recipe.named(row["recipe"], weight_bits=row["weight_bits"], **row["settings"])
    for bound in BOUNDS:
        axis.axhline(getattr(recipe, bound), color="black", linewidth=0.8, linestyle="--")
    axis.axvline(recipe.warmup_epochs + 0.5, color="gray", linewidth=0.8)
    title = f"{statistics.network(row)} {group_label(group)}, seed {row['seed']}"
    axis.set(title=title, xlabel="epoch (gray: the student starts)", ylabel="H'", ylim=(0, 1))
    axis.title.set_fontsize(8)


def _signal(panel: tuple[str, Sequence[Row]], axis: Any) -> None:
    signal, rows = panel
    for name, found in statistics.grouped(rows, statistics.network).items():
        if pairs := statistics.signal_pairs(found, signal):
            signals, accuracies = zip(*pairs, strict=True)
            axis.plot(signals, accuracies, "o", alpha=0.6, markersize=4, label=name)
    minus = "" if statistics.SIGNALS[signal] > 0 else "-"
    axis.set(xlabel=minus + signal.replace("_", " "), ylabel="top-1 %")
    axis.legend(fontsize=6)


def _bounds(path: Path, rows: Sequence[Row]) -> list[tuple[str, list[Summary]]]:
    """(title, groups) of each network for which a file's rows vary both bounds, and nothing else."""
    panels = []
    for name, found in statistics.grouped(rows, lambda row: f"{row['player']}, {statistics.network(row)}").items():
        groups = [group for group in summarize(found) if set(group.rows[0]["variant"]) == set(BOUNDS)]
        if len(groups) > 3 and any(group.accuracies for group in groups):
            panels.append((f"{path.stem.removeprefix('accuracy-')}: {name}", groups))
    return panels


def _map(panel: tuple[str, list[Summary]], axis: Any) -> None:
    title, groups = panel
    lowers, uppers = (sorted({group.rows[0]["variant"][bound] for group in groups}) for bound in BOUNDS)
    values = np.full((len(uppers), len(lowers)), np.nan)
    for group in groups:
        variant = group.rows[0]["variant"]
        place = uppers.index(variant["lambda_u"]), lowers.index(variant["lambda_l"])
        values[place] = np.nan if group.mean is None else group.mean
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
    title, groups = panel
    for i, group in enumerate(groups):
        found = [(row["h_prime"], row["accuracy"]) for row in group.rows if row["status"] == "ok"]
        if found := [pair for pair in found if None not in pair]:
            variant = group.rows[0]["variant"]
            label = f"{variant['lambda_l']:g} to {variant['lambda_u']:g}"
            axis.plot(*zip(*found, strict=True), "os^v"[i // 10 % 4], alpha=0.6, markersize=4, label=label)
    if axis.has_data():
        axis.legend(fontsize=6, title="bounds", title_fontsize=6)
    axis.set(title=title, xlabel="mean H' of the last epoch", ylabel="top-1 %")
