"""docs/results.md and its plots: from the stored files of accuracies, and the recipes that tell which are of today."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from adadfq import files as atomic
from benchmarks import groups, plot, recipe_age, results_plots, store
from benchmarks import results_statistics as statistics
from benchmarks.accuracy import Row, Summary, player_name, summarize
from benchmarks.accuracy_report import accuracy_text, percent
from benchmarks.environment import commit, machine
from benchmarks.studies import STUDIES
from benchmarks.tables import markdown_table, number

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "results.md"
RESULTS = ROOT / "benchmarks" / "results"
_HEAD = """# Results

<!-- Written by `python -m benchmarks results` from benchmarks/results/accuracy-*.json: run it, do not edit. -->

Top-1 % of the **last** epoch, mean ± sample deviation over seeds. The images choose no epoch and no seed. "Round to
nearest" is the student as warm-up leaves it: weights untouched, ranges the minima and maxima seen so far, also where
the recipe then takes others; "-" where they still moved after warm-up. The authors' runs are their published trainer
(`benchmarks/authors_training.py`) on the same teacher, scored alike; "of the authors' gap" compares with their recipe
after as many steps of as many images. "On real images" is no result but a comparison: trained on the scoring images
themselves, without their labels, cropped and flipped as the recipe has it, in the place of generated ones, which
tells the generator's share of a gap. "Held-out agreement" is the share of generated images, which no training saw, on
which student and teacher name the same class, "held-out loss" the mean L_Q there in nats, lower being better
(`adadfq.HeldOut`); "mirrored" compares with the teacher's mean over an image and its mirror image. Nothing here
chooses by top-1; that `adadfq_plus` keeps `weight_range` and `gamma`, for which held-out images do not ask, was decided
with it in view. Differences are ± their standard error over the seeds of both. Times are without scoring; on a CPU
they are CPU time, which whatever else ran has no part in. A command trains what its file does not hold yet: where it
names more seeds or settings than a table shows, those have not been run. "As it was" are runs of a recipe that has
changed since, or with an option that is gone; in brackets the start of the digest of their settings, over a table of
its base's.
"""
#: Of the test that tells settings from the base.
LEVEL = 0.05
#: Fewer say nothing of a signal.
LEAST_RUNS = 3
_PLOTS = {
    "time": "Accuracy against time",
    "h-prime": "H' through training",
    "bounds": "The bounds of H'",
    "adaptability": "The largest adaptability is not the best",
    "signals": "What is measured without data, and accuracy",
}


def update(page: Path = PAGE, results: Path = RESULTS) -> list[Path]:
    """Write the page and its plots; returns what changed.

    Raises:
        InvalidInputError: a file of results is not valid.
    """
    stored = _stored(results)
    written = []
    if found := results_plots.plots(stored):
        plot.require_matplotlib()
        _folder(page).mkdir(parents=True, exist_ok=True)
    drawn = [(_folder(page) / f"{name}.png", draw) for name, draw in found.items()]
    drawn += [(image, partial(_spread, held, path)) for path, held in stored.items() for image in _spreads(path, held)]
    for image, draw in drawn:
        before = image.read_bytes() if image.is_file() else None
        draw(image)
        if image.read_bytes() != before:
            written.append(image)
    text = content(stored)
    if not page.is_file() or page.read_text(encoding="utf-8") != text:
        with atomic.atomic_write(page) as temporary:
            temporary.write_text(text, encoding="utf-8")
        written.append(page)
    return written


def stale(page: Path = PAGE, results: Path = RESULTS) -> list[str]:
    """What :func:`update` would change; empty where nothing is."""
    stored = _stored(results)
    reasons = []
    if not page.is_file() or page.read_text(encoding="utf-8") != content(stored):
        reasons.append(f"{page.name} does not show the stored results")
    digest = plot.digest(results_plots.digested(stored))
    images = [(_folder(page) / f"{name}.png", digest) for name in results_plots.plots(stored)]
    images += [(image, plot.digest(held)) for path, held in stored.items() for image in _spreads(path, held)]
    for image, digest in images:
        if not image.is_file():
            reasons.append(f"{image.name} is missing")
        elif digest.encode() not in image.read_bytes():
            reasons.append(f"{image.name} does not show the stored results")
    return reasons


def _spreads(path: Path, held: dict[str, Any]) -> list[Path]:
    """Plots of one file alone, beside it."""
    return [path.with_name(f"{path.stem}-{name}.png") for name in plot.names(held)]


def _spread(held: dict[str, Any], path: Path, _: Path) -> None:
    plot.plot(held, path.stem, path.parent)


def _folder(page: Path) -> Path:
    return page.with_suffix("")


def _stored(results: Path) -> dict[Path, dict[str, Any]]:
    return {path: store.read(path) for path in sorted(results.glob("accuracy-*.json"))}


def content(stored: dict[Path, dict[str, Any]]) -> str:
    """The page's text."""
    rows = statistics.unique(stored.values())
    found = results_plots.plots(stored)
    parts = [_HEAD.rstrip()]
    if not rows:
        parts.append("No run is stored yet.")
    parts += _side_by_side(rows)
    parts += _commands([held for held in stored.values() if not _varied(held)])
    parts += [part for name in ("time", "h-prime") for part in _picture(name, found)]
    parts += [part for path, held in stored.items() for part in _ablation(path, held, rows)]
    parts += [part for name in ("bounds", "adaptability") for part in _picture(name, found)]
    parts += _predictions(rows)
    parts += _picture("signals", found)
    return "\n\n".join(parts) + "\n"


def _picture(name: str, found: dict[str, Any]) -> list[str]:
    title = _PLOTS[name]
    heading = [] if name == "signals" else [f"## {title}"]
    return [*heading, f"![{title}](results/{name}.png)"] if name in found else []


def _side_by_side(rows: Sequence[Row]) -> list[str]:
    plain = statistics.plain(rows)
    parts = ["## Side by side"] if plain else []
    names = groups.Names(rows)
    networks: dict[Any, list[Summary]] = {}
    for group in plain:
        networks.setdefault(groups.of_network(group.rows[0]), []).append(group)
    header = ["player and recipe", "seeds", "top-1 %", "gap to the teacher", "of the authors' gap"]
    header += ["round to nearest (min/max)", "held-out agreement %", "steps"]
    for found in networks.values():
        first = found[0].rows[0]
        clock = statistics.CLOCKS[statistics.clock(first)]
        lines = [_line(group, found) for group in found]
        parts += [f"### {names.network(first)}", markdown_table([*header, clock], lines)]
        share = first["teacher_accuracy"] / 100
        error = 100 * (share * (1 - share) / first["images"]) ** 0.5
        parts.append(
            f"The teacher (`{first['weights'] or first['model']}`) has {first['teacher_accuracy']:.2f} on the "
            f"{first['images']} images of `{first['data']}`, with a standard error of {error:.2f}."
        )
        if reached := [text for group in found if (text := _reached(group, found))]:
            parts.append("\n".join(f"- {text}" for text in reached))
    return parts


def _line(group: Summary, others: Sequence[Summary]) -> list[str]:
    gap, rival = statistics.gap(group), statistics.rival(group, others)
    theirs = None if rival is None else statistics.gap(rival)
    share = f"{gap / theirs:.2f}" if gap is not None and theirs is not None and theirs > 0 else "-"
    return [
        statistics.label(group),
        str(len(group.accuracies) + group.diverged),
        accuracy_text(group, "±"),
        percent(gap),
        share,
        percent(group.round_to_nearest),
        percent(group.average(lambda row: statistics.last(row, "held_out_agreement"))),
        str(group.steps),
        number(group.average(statistics.seconds)),
    ]


def _reached(group: Summary, others: Sequence[Summary]) -> str | None:
    """When this project's run, if it ends no lower, first had what the authors' has at its end."""
    rival = statistics.rival(group, others)
    if rival is None or rival.mean is None or group.mean is None or group.mean < rival.mean:
        return None
    ours, theirs = statistics.seconds_to(group, rival.mean), rival.average(statistics.seconds)
    if ours is None or not theirs:
        return None
    clock = {"epoch_cpu_seconds": "processor time", "epoch_seconds": "wall time"}[statistics.clock(group.rows[0])]
    share = f"{100 * ours / theirs:.0f} % of their {clock}"
    return f"{statistics.label(group)} first has the authors' last accuracy ({rival.mean:.2f}) after {share}."


def _ablation(path: Path, held: dict[str, Any], rows: Sequence[Row]) -> list[str]:
    """Tables of the file's variants, one each base."""
    if not _varied(held):
        return []
    everything = [*summarize(held["rows"]), *summarize(rows)]
    names = groups.Names(rows)
    study = path.stem.removeprefix("accuracy-")
    parts = [f"## {re.sub('[-_]', ' ', study).capitalize()}"]
    if study in STUDIES:
        parts.append(STUDIES[study].question)
    header = ["setting", "seeds", "top-1 %", "against the base", "held-out agreement %", "against the base"]
    header += ["held-out loss", "against the base", "mean H'", "steps"]
    tables = groups.grouped(held["rows"], statistics.same_base).values()
    for found in sorted(tables, key=lambda found: not recipe_age.base_is_current(found[0])):
        if not any(row["variant"] for row in found):
            continue
        shown = summarize(found)
        base = next((other for group in shown if (other := statistics.base(group, everything)) is not None), None)
        lines = [] if base is None or any(statistics.same(base, group) for group in shown) else [base]
        lines += shown
        first = found[0]
        shared = statistics.setting(first, {field for row in found for field in row["variant"]})
        with_ = f" with `{shared}`" if shared else ""
        age = recipe_age.table_age(first)
        parts.append(f"{player_name(first)}, {names.network(first)}, recipe `{first['recipe']}`{with_}{age}:")
        parts.append(markdown_table(header, [_ablation_line(group, base) for group in lines]))
        parts += _verdict(lines, base)
    pictures = [f"![{name}](../benchmarks/results/{path.stem}-{name}.png)" for name in plot.names(held)]
    made = f"{machine(held['environment'])} (`benchmarks/results/{path.name}`{_other_commits(held)})"
    return [*parts, *pictures, made, *_commands([held])]


def _other_commits(held: dict[str, Any]) -> str:
    """Those of rows that were stored before the last: a file is gone on with."""
    last = held["environment"]
    others = {commit(row) for row in held["rows"] if row.get("git_commit")} - {commit(last)}
    return f"; rows also of {', '.join(sorted(others))}" if others else ""


def _verdict(shown: Sequence[Summary], base: Summary | None) -> list[str]:
    """Which settings' top-1 differs from the base's by more than seeds do; nothing where too few have run."""
    if base is None:
        return []
    tested = [(group, statistics.p_value(group, base)) for group in shown if not statistics.same(base, group)]
    known = [group for group, p in tested if p is not None]
    if not known:
        return []
    found = [
        f"{_setting(group)} ({by[0]:+.2f})"
        for group, p in tested
        if p is not None and p < LEVEL and (by := statistics.difference(group, base)) is not None
    ]
    pooled = statistics.pooled_error([base, *known])
    exact = (
        ""
        if base.deviation or not pooled
        else (
            f" The base's runs agree to the digit by accident, so the test sees too much: the standard error of a "
            f"difference, with the deviation of all settings pooled, is {pooled:.2f}."
        )
    )
    return [
        f"Of {len(known)} settings with two seeds or more, top-1 of {', '.join(found) or 'none'} differs from the "
        f"base's at the level of {LEVEL:g} (Welch's t-test; one in {1 / LEVEL:.0f} does by chance).{exact}"
    ]


def _setting(group: Summary) -> str:
    """A line's label; marked where its table's recipe is today's and its own is not, as of an option that is gone."""
    first = group.rows[0]
    stale = recipe_age.base_is_current(first) and not recipe_age.is_current(first)
    return f"`{group.label}`" + (recipe_age.as_it_was() if stale else "")


def _varied(held: dict[str, Any]) -> list[Row]:
    return [row for row in held["rows"] if row["variant"]]


def _ablation_line(group: Summary, base: Summary | None) -> list[str]:
    """Top-1 and the held-out measures, each with its difference to the base."""

    def against(difference: Callable[[Summary, Summary], tuple[float, float | None] | None], digits: int) -> str:
        if base is None or (found := difference(group, base)) is None:
            return "-"
        if statistics.same(base, group):
            return "base"
        return f"{found[0]:+.{digits}f}" + ("" if found[1] is None else f" ± {found[1]:.{digits}f}")

    agreement, loss = (
        partial(statistics.held_out_difference, signal=name) for name in ("held_out_agreement", "held_out_loss")
    )
    mean_loss = group.average(lambda row: statistics.last(row, "held_out_loss"))
    nearest = group.round_to_nearest
    collapsed = group.mean is not None and nearest is not None and group.mean < nearest
    return [
        _setting(group),
        str(len(group.accuracies) + group.diverged),
        accuracy_text(group, "±") + (f", below round to nearest ({nearest:.2f})" if collapsed else ""),
        against(statistics.difference, 2),
        percent(group.average(lambda row: statistics.last(row, "held_out_agreement"))),
        against(agreement, 2),
        "-" if mean_loss is None else f"{mean_loss:.3f}",
        against(loss, 3),
        percent(group.average(lambda row: row["h_prime"])),
        str(group.steps),
    ]


def _predictions(rows: Sequence[Row]) -> list[str]:
    header = ["rows", "signal", "runs", "Spearman", "Pearson", "lost by choosing with it"]
    lines = []
    for name, found in statistics.comparable(rows):
        mixed = len({groups.bits(row) for row in found}) > 1
        if (recipes := len({row["recipe"] for row in found})) > 1:
            name += f", {recipes} recipes"
        for signal in statistics.SIGNALS:
            if (held := statistics.prediction(found, signal)) is not None and held.count >= LEAST_RUNS:
                lost = "-" if mixed else f"{held.lost:.2f}"
                correlations = (_signed(value) for value in (held.spearman, held.pearson))
                lines.append([name, signal.replace("_", " "), str(held.count), *correlations, lost])
    if not lines:
        return []
    note = (
        "Correlation with accuracy over the last epochs of runs judged on the same held-out images; of the losses, "
        "with their negative. The last column: how many points less than the best run that run has which the signal "
        "would choose."
    )
    return [f"## {_PLOTS['signals']}", markdown_table(header, lines), note]


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.2f}"


def _commands(stored: Sequence[dict[str, Any]]) -> list[str]:
    lines = [line for held in stored for line in held["options"].get("commands", [])]
    return ["```sh\n" + "\n".join(lines) + "\n```"] if lines else []
