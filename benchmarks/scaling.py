"""How the time of this project's step grows with the batch and with the pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks import step, timing
from benchmarks.contest import Setting
from benchmarks.players import OURS
from benchmarks.tables import number

BATCHES = (8, 16, 32, 64, 128)
SIZES = (16, 24, 32, 48, 64)
#: What grows -> its name on an axis.
AXES = {"batch_size": "images in a batch", "pixels": "pixels of an image"}


@dataclass(frozen=True)
class Line:
    """A straight line through points, by least squares."""

    slope: float
    intercept: float
    r2: float
    """Share of the variance of the ordinates that the line explains."""


def fit(xs: Sequence[float], ys: Sequence[float]) -> Line:
    """The line through at least two points of different abscissae."""
    n = len(xs)
    mean_x, mean_y = sum(xs) / n, sum(ys) / n
    slope = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / sum((x - mean_x) ** 2 for x in xs)
    intercept = mean_y - slope * mean_x
    left = sum((y - intercept - slope * x) ** 2 for x, y in zip(xs, ys, strict=True))
    whole = sum((y - mean_y) ** 2 for y in ys)
    return Line(slope, intercept, 1.0 if whole == 0 else 1 - left / whole)


def points(rows: Sequence[dict[str, Any]], axis: str) -> list[tuple[float, float]]:
    """(abscissa, median in ms) of the timed rows along one of :data:`AXES`, from the smallest on.

    Along an axis lie the rows that differ in nothing else from most.
    """
    timed = [row for row in rows if row["status"] == "ok" and row["provider"] == OURS]
    other = "image_size" if axis == "batch_size" else "batch_size"
    values = [row[other] for row in timed]
    common = max(set(values), key=values.count) if values else None
    found = {
        row["batch_size"] if axis == "batch_size" else row["image_size"] ** 2: row["p50_ms"]
        for row in timed
        if row[other] == common
    }
    return sorted(found.items())


def run_scaling(
    setting: Setting,
    device: torch.device,
    environment: dict[str, Any],
    rounds: int,
    seconds: float,
    batches: Sequence[int] = BATCHES,
    sizes: Sequence[int] = SIZES,
) -> list[dict[str, Any]]:
    """One row a point, all of them taking turns: `batches` at the setting's size, `sizes` at its batch.

    Every point is checked against the reference before it is timed.
    """
    size = setting.resolved().image_size
    settings = [replace(setting, batch_size=batch, image_size=size) for batch in batches]
    settings += [replace(setting, image_size=other) for other in sizes]
    entries = {}
    for each in dict.fromkeys(settings):
        first, _ = step.prepared(each, device, environment, None, step.chosen([OURS]))
        entries[each.case()] = first
    timed = {case: entry for case, entry in entries.items() if entry.row["status"] == "ok"}
    providers = [entry.provider(case) for case, entry in timed.items()]
    samples = timing.measure(providers, device, rounds, seconds, step.MIN_ROUNDS)
    for case, entry in timed.items():
        step.finish(entry, samples[case], device)
    return [entry.row for entry in entries.values()]


def scaling_text(rows: Sequence[dict[str, Any]]) -> str:
    """The line along each axis, in words."""
    lines = []
    for axis, name in AXES.items():
        found = points(rows, axis)
        if len(found) < 2:
            continue
        line = fit(*zip(*found, strict=True))
        last = found[-1][1]
        lines.append(
            f"time against {name}, {number(found[0][0])} to {number(found[-1][0])}: r^2 {line.r2:.4f}, "
            f"intercept {100 * line.intercept / last:.3g} % of the time at {number(found[-1][0])}"
        )
    return "\n".join(lines)
