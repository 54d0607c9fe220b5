"""docs/results.md: its numbers from made-up rows, its plots, and that it shows the stored files and today's recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import adadfq
from benchmarks import accuracy, accuracy_report, groups, recipe_age, results_page, results_plots, store
from benchmarks import results_statistics as statistics
from benchmarks.__main__ import main
from benchmarks.accuracy import summarize
from benchmarks.accuracy_grid import recipe_digest
from benchmarks.environment import describe

ENVIRONMENT = describe(torch.device("cpu"))
COMMAND = "python -m benchmarks accuracy resnet20 --recipe cifar10_resnet20 --bits 3"


def digest(weight_bits: int, **settings: Any) -> str:
    """Of the recipe that `row` has."""
    return recipe_digest(adadfq.Recipe.named("cifar10_resnet20", weight_bits=weight_bits, **settings))


BASE = digest(3, epochs=10)


def row(value: float | None, seed: int = 1, **changes: Any) -> dict[str, Any]:
    """A run of ten epochs, the first of them warm-up, that comes nearer to `value` by the same at every epoch."""
    accuracies = [] if value is None else [50 + (value - 50) * i / 9 for i in range(10)]
    return {
        "player": "adadfq",
        "model": "resnet20",
        "weights": "teacher.safetensors",
        "weights_sha256": "0" * 64,
        "data": "images.zip",
        "images": 5000,
        "recipe": "cifar10_resnet20",
        "weight_bits": 3,
        "act_bits": 3,
        "settings": {"epochs": 10},
        "recipe_digest": BASE,
        "base_digest": BASE,
        "variant": {},
        "warmup_epochs": 1,
        "lambda_l": 0.1,
        "lambda_u": 0.8,
        "seed": seed,
        "status": "diverged" if value is None else "ok",
        "error": None,
        "accuracies": accuracies,
        "accuracy": value,
        "teacher_accuracy": 90.0,
        "round_to_nearest": 50.0,
        "train_seconds": 20.0,
        "steps": 2000,
        "images_seen": 32000,
        "step_ms": 10.0,
        "agreement": 0.5,
        "h_prime": 0.5,
        "epoch_seconds": [2.0] * 10,
        "epoch_cpu_seconds": [1.0] * 10,
        "h_prime_quantiles": [[0.0, 0.2, 0.5, 0.7, 1.0]] * 10,
        "losses_student": [-900.0] * 10,
        "held_out_agreement": [value] * 10,
        "held_out_loss": [None if value is None else -value] * 10,
        "held_out_kl": [1.0] * 10,
        "held_out_mirrored_agreement": [80.0] * 10,
        "held_out_mirrored_kl": [1.0] * 10,
        "held_out_digest": "4" * 16,
        **ENVIRONMENT,
        **changes,
    }


def varied(value: float | None, seed: int, **variant: Any) -> dict[str, Any]:
    """A run of `row`'s recipe with other settings."""
    bounds = {name: value for name, value in variant.items() if name.startswith("lambda")}
    settings = {"epochs": 10, **variant}
    return row(value, seed, settings=settings, variant=variant, recipe_digest=digest(3, **settings), **bounds)


def content(*rows: dict[str, Any]) -> dict[str, Any]:
    return {**store.document("accuracy", ENVIRONMENT, {"commands": [COMMAND]}), "rows": list(rows)}


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A folder of files: both players side by side, and a grid of the bounds of H'."""
    folder = tmp_path / "results"
    folder.mkdir()
    authors = [row(value, seed, player="authors", h_prime_quantiles=None) for seed, value in ((1, 79.0), (2, 81.0))]
    for each in authors:
        each |= {"epoch_seconds": [20.0] * 10, "epoch_cpu_seconds": [10.0] * 10, "h_prime": None, "agreement": None}
    ours = [row(value, seed) for seed, value in ((1, 84.0), (2, 86.0))]
    store.write(folder / "accuracy-base.json", content(*authors, *ours))
    grid = [
        varied(70.0 + 10 * low + high + seed, seed, lambda_l=low, lambda_u=high)
        for seed in (1, 2)
        for low in (0.0, 0.3)
        for high in (0.6, 1.0)
    ]
    store.write(folder / "accuracy-bounds.json", content(*grid))
    return folder


def test_side_by_side(results: Path) -> None:
    text = results_page.content(results_page._stored(results))
    name = "cifar10_resnet20 epochs=10"
    assert f"| authors' code, {name} | 2 | 80.00 ± 1.41 | 10.00 | - | 50.00 | 80.00 | 2000 | 100 |" in text
    assert f"| adadfq, {name} | 2 | 85.00 ± 1.41 | 5.00 | 0.50 | 50.00 | 85.00 | 2000 | 10 |" in text
    assert "### resnet20 3w3a" in text
    assert "has 90.00 on the 5000 images of `images.zip`, with a standard error of 0.42" in text
    # 80 of 85 is reached in the 9th of ten epochs, each a tenth of the authors' in time.
    line = f"- adadfq, {name} first has the authors' last accuracy (80.00) after 9 % of their processor time."
    assert line in text and text.count(COMMAND) == 2
    assert "| processor's s |" in text and "wall time" not in text


def on_gpu(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "device": "cuda"}


def test_an_accuracy_that_was_lost_again_was_not_reached() -> None:
    """A run may pass the authors' last accuracy on its way to a lower one."""
    passing = row(78.0, accuracies=[*[81.0] * 9, 78.0])
    stored = {Path("accuracy-x.json"): content(row(80.0, player="authors", h_prime_quantiles=None), passing)}
    assert "first has" not in results_page.content(stored)
    stored = {Path("accuracy-x.json"): content(row(78.0, player="authors", h_prime_quantiles=None), passing)}
    assert "first has" in results_page.content(stored)


def test_on_a_gpu_the_clock_is_the_walls() -> None:
    authors = row(80.0, player="authors", epoch_seconds=[20.0] * 10)
    text = results_page.content({Path("accuracy-x.json"): content(on_gpu(authors), on_gpu(row(85.0)))})
    assert "after 9 % of their wall time." in text and "processor" not in text.split("## Side by side")[1]
    assert "| steps | s |" in text and "| 2000 | 200 |" in text and "| 2000 | 20 |" in text


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": 4000},
        {"images_seen": 16000},
        {"weights_sha256": "1" * 64},
        {"data": "other.zip"},
        {"images": 10},
        {"weight_bits": 4},
        {"act_bits": 4},
        {"threads": 7},
        {"device": "cuda"},
        {"model": "resnet18"},
        {"settings": {"epochs": 10, "gamma": 0.0}},
        {"player": "adadfq"},
    ],
    ids=str,
)
def test_who_is_no_rival(changes: dict[str, Any]) -> None:
    schedule = {"epochs": 10, "steps_per_epoch": 200, "lr_milestones": [3], "warmup_epochs": 1, "calibration_epochs": 1}
    authors = row(80.0, player="authors", settings=schedule)
    ours, theirs = summarize([row(85.0), authors])
    assert statistics.rival(ours, [ours, theirs]) is theirs and statistics.rival(theirs, [ours, theirs]) is None
    ours, other = summarize([row(85.0), {**authors, **changes}])
    assert statistics.rival(ours, [ours, other]) is None
    # Another recipe of ours has the same rival, but theirs with the same recipe goes first.
    plus, theirs, better = summarize(
        [row(86.0, recipe="adadfq_plus", recipe_digest="1" * 16), authors, {**authors, "seed": 2, "settings": {}}]
    )
    better.rows[0].update(accuracy=82.0, recipe_digest="5" * 16)
    (better,) = summarize(better.rows)
    assert statistics.rival(plus, [theirs, better]) is better
    assert statistics.rival(summarize([row(85.0)])[0], [better, theirs]) is theirs


def test_the_authors_have_no_rival(results: Path) -> None:
    other = row(70.0, player="authors", settings={"epochs": 10, "lr_milestones": [5]}, recipe_digest="1" * 16)
    stored = {**results_page._stored(results), Path("accuracy-other.json"): content(other)}
    lines = [line for line in results_page.content(stored).splitlines() if line.startswith("| authors' code")]
    assert len(lines) == 2 and all(line.split(" | ")[4] == "-" for line in lines)


def test_differences_to_the_base(results: Path) -> None:
    text = results_page.content(results_page._stored(results))
    assert "## Bounds\n" in text and "adadfq, resnet20 3w3a, recipe `cifar10_resnet20` with `epochs=10`:" in text
    assert "| `as set` | 2 | 85.00 ± 1.41 | base |" in text
    # 72.1 ± 0.71 against 85 ± 1.41, two seeds each: deviation sqrt(0.5 / 2 + 2 / 2).
    line = "| `lambda_l=0.0 lambda_u=0.6` | 2 | 72.10 ± 0.71 | -12.90 ± 1.12 | 72.10 | -12.90 ± 1.12 | "
    assert line + "-72.100 | +12.900 ± 1.118 | 0.50 | 2000 |" in text
    # A variant that sets what the recipe has anyway is the base itself.
    first = row(60.0, variant={"precision": "float32"})
    second = varied(61.0, 1, precision="bfloat16")
    groups = summarize([first, second])
    assert statistics.base(groups[1], groups) is groups[0]
    lines = [results_page._ablation_line(group, groups[0]) for group in groups]
    assert [line[3] for line in lines] == ["base", "+1.00"] and [line[5] for line in lines] == ["base", "+1.00"]
    diverged = results_page._ablation_line(summarize([varied(None, 1, gamma=0.0)])[0], groups[0])
    assert diverged[2:8] == ["- (1 diverged)", "-", "-", "-", "-", "-"]
    # Held-out measures of other images do not compare.
    (other,) = summarize([varied(61.0, 1, precision="bfloat16") | {"held_out_digest": "5" * 16}])
    assert [results_page._ablation_line(other, groups[0])[i] for i in (3, 5, 7)] == ["+1.00", "-", "-"]


@pytest.mark.parametrize("name", ["accuracy-a.json", "accuracy-z.json"])
def test_a_base_is_found_whatever_its_grid_varied(name: str) -> None:
    """The base is in another file, as a variant of a grid that named its bounds; either file may come first."""
    bounds = {"lambda_l": 0.1, "lambda_u": 0.8}
    grid = [row(80.0, variant=bounds), *(varied(70.0 + at, 1, lambda_l=at, lambda_u=1.0) for at in (0.0, 0.25, 0.5))]
    losses = [varied(75.0, 1, gamma=0.0)]
    stored = {Path("accuracy-m.json"): content(*grid), Path(name): content(*losses)}
    text = results_page.content(dict(sorted(stored.items())))
    assert (
        "| `gamma=0.0` | 1 | 75.00 | -5.00 |" in text and "| adadfq, cifar10_resnet20 epochs=10 | 1 | 80.00 |" in text
    )
    assert [len(group.rows) for group in statistics.plain(statistics.unique(stored.values()))] == [1]


def test_no_other_recipe_or_setting_passes_for_the_base() -> None:
    (variant,) = summarize([varied(70.0, 1, gamma=0.0)])
    others = [row(80.0, recipe_digest="5" * 16), row(80.0, threads=7), row(80.0, player="authors"), row(1.0, images=9)]
    assert statistics.base(variant, summarize(others)) is None
    assert statistics.base(variant, [*summarize(others), base := summarize([row(80.0)])[0]]) is base


def test_a_map_of_bounds_has_the_base_too() -> None:
    """Whichever grid made it, and where a variant names one bound alone."""
    grid = [varied(70.0, 1, lambda_l=0.3), varied(71.0, 1, lambda_u=1.0), varied(72.0, 1, lambda_l=0.3, lambda_u=1.0)]
    ((title, found),) = results_plots._bounds(Path("accuracy-x.json"), grid, [*grid, row(80.0)])
    assert title == "x: adadfq, resnet20 3w3a"
    pairs = {results_plots._of(group): group.mean for group in found}
    assert pairs == {(0.1, 0.8): 80.0, (0.3, 0.8): 70.0, (0.1, 1.0): 71.0, (0.3, 1.0): 72.0}
    assert results_plots._bounds(Path("accuracy-x.json"), [grid[0], {**grid[1], "player": "authors"}], grid) == []
    changed = [held | {"base_digest": "2" * 16} for held in grid]
    ((title, _),) = results_plots._bounds(
        Path("accuracy-x.json"), changed, [*changed, row(80.0, recipe_digest="2" * 16)]
    )
    assert title == "x: adadfq, resnet20 3w3a, as it was (222222)"


class _Axis:
    """Remembers the lines across it."""

    def __init__(self) -> None:
        self.horizontal: list[float] = []
        self.vertical: list[float] = []
        self.title = self

    def axhline(self, value: float, **_: Any) -> None:
        self.horizontal.append(value)

    def axvline(self, value: float, **_: Any) -> None:
        self.vertical.append(value)

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


def test_bounds_and_start_are_of_the_row() -> None:
    """The named recipe may have changed since, or be gone."""
    found = row(80.0, recipe="of long ago", lambda_l=0.25, lambda_u=0.5, warmup_epochs=3)
    axis = _Axis()
    results_plots._h_prime(("name", summarize([found])[0]), axis)
    assert (axis.horizontal, axis.vertical) == ([0.25, 0.5], [3.5])


@pytest.mark.parametrize(
    ("changes", "headings"),
    [
        ({"weights_sha256": "1" * 64}, ("resnet20 3w3a, weights 00000000", "resnet20 3w3a, weights 11111111")),
        ({"weights_sha256": None}, ("resnet20 3w3a, weights 00000000", "resnet20 3w3a, weights of its own")),
        ({"data": "other.zip"}, ("resnet20 3w3a, images.zip", "resnet20 3w3a, other.zip")),
        ({"images": 10}, ("resnet20 3w3a, 5000 images", "resnet20 3w3a, 10 images")),
        ({"device": "cuda"}, ("resnet20 3w3a, cpu", "resnet20 3w3a, cuda")),
        ({"threads": 7}, ("resnet20 3w3a, 1 thread", "resnet20 3w3a, 7 threads")),
        ({"act_bits": 8}, ("resnet20 3w3a", "resnet20 3w8a")),
    ],
    ids=str,
)
def test_what_does_not_compare_stands_apart(changes: dict[str, Any], headings: tuple[str, str]) -> None:
    rows = [row(80.0 + i, seed=i, threads=1) for i in range(3)]
    rows += [row(60.0 - i, seed=i, **{"threads": 1, **changes}, teacher_accuracy=70.0) for i in range(3)]
    stored = {Path("accuracy-x.json"): content(*rows)}
    text = results_page.content(stored)
    names = groups.Names(rows)
    for heading, held in zip(headings, (rows[:3], rows[3:]), strict=True):
        assert f"### {heading}\n" in text and f"| {heading} | held out agreement | 3 |" in text
        assert names.network(held[0]) == heading
    assert set(accuracy_report._fields(rows)) == {f"{heading} cifar10_resnet20" for heading in headings}
    assert all(heading in accuracy_report.text(rows) for heading in headings)


def test_signals_of_other_images_do_not_correlate() -> None:
    rows = [row(80.0 + i, seed=i) for i in range(3)]
    rows += [row(90.0 - i, seed=9 + i, held_out_digest="5" * 16) for i in range(3)]
    rows += [row(50.0, seed=20 + i, held_out_digest=None) for i in range(3)]
    found = statistics.comparable(rows)
    assert [(name, len(held)) for name, held in found] == [
        ("resnet20 3w3a, held-out images 44444444", 3),
        ("resnet20 3w3a, held-out images 55555555", 3),
    ]
    assert [len(held) for _, held in statistics.comparable([*rows[:3], row(85.0, weight_bits=4)])] == [3, 1, 4]
    assert [len(held) for _, held in statistics.comparable([*rows[:3], row(85.0, player="real images")])] == [3]


def test_a_bound_is_off_the_plot_of_speed() -> None:
    for player, drawn in (("adadfq", True), ("authors", True), ("real images", False)):
        assert ("time" in results_plots.plots({Path("accuracy-x.json"): content(row(80.0, player=player))})) == drawn
    page = results_page.content({Path("accuracy-x.json"): content(row(80.0, player="real images"))})
    assert "| on real images, cifar10_resnet20" in page


def test_a_recipe_that_changed_is_told_apart() -> None:
    stored = {Path("accuracy-x.json"): content(row(82.0, recipe_digest="1" * 16, steps=1000), row(80.0))}
    text = results_page.content(stored)
    today, then = (text.find(f"| adadfq, cifar10_resnet20 epochs=10{age} |") for age in ("", ", as it was (111111)"))
    assert 0 < today < then  # though it is the longer run
    # Of two bases, the one in the file itself.
    other = {Path("accuracy-y.json"): content(row(70.0, recipe_digest="1" * 16), varied(71.0, 1, gamma=0.0))}
    assert "| 71.00 | +1.00 |" in results_page.content({**stored, **other})


def test_variants_of_a_recipe_that_changed_are_told_apart() -> None:
    gone = varied(60.0, 1, gamma=2.0)
    gone["variant"] = {"no_option": 0.5}
    gone["settings"] = {"epochs": 10, "no_option": 0.5}
    # What the variant sets is all that has changed: its own digest is today's, its base's is not.
    old = varied(70.0, 1, gamma=3.0) | {"base_digest": "2" * 16}
    text = results_page.content({Path("accuracy-x.json"): content(old, row(80.0), varied(81.0, 1, gamma=0.0), gone)})
    now, before = text.split("recipe `cifar10_resnet20` with `epochs=10`:")[1].split(
        "recipe `cifar10_resnet20` with `epochs=10`, as it was (222222):"
    )
    assert "| `gamma=0.0` |" in now and "| `no_option=0.5`, as it was |" in now and "gamma=3.0" not in now
    assert "| `gamma=3.0` |" in before
    # A stale setting is marked where it is named once more.
    spread = [row(80.0 + seed, seed) for seed in (1, 2)] + [gone | {"seed": seed} for seed in (1, 2)]
    assert "top-1 of `no_option=0.5`, as it was (" in results_page.content({Path("accuracy-x.json"): content(*spread)})
    heading = "resnet20 3w3a cifar10_resnet20"
    assert list(accuracy_report._fields([old, row(80.0), gone])) == [heading, f"{heading}, as it was (222222)"]
    other, unsaid = row(81.0, settings={"epochs": 20}), row(82.0)
    other["recipe_digest"] = other["base_digest"] = digest(3, epochs=20)
    del unsaid["base_digest"]
    assert list(accuracy_report._fields([row(80.0), other, unsaid])) == [heading]
    lines = accuracy_report.text([row(80.0), row(81.0, recipe_digest="1" * 16)]).splitlines()
    assert [("as set, as it was (111111)" in line) for line in lines[-2:]] == [False, True]


def test_a_recipe_that_changes_makes_page_and_plots_stale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page, results = tmp_path / "results.md", tmp_path / "stored"
    results.mkdir()
    store.write(results / "accuracy-x.json", content(row(80.0), varied(81.0, 1, gamma=0.0)))
    results_page.update(page, results)
    assert results_page.stale(page, results) == []
    monkeypatch.setattr(recipe_age, "_today", lambda *_: "9" * 16)
    names = ("results.md", "time.png", "h-prime.png", "accuracy-x-spread.png")
    stale = results_page.stale(page, results)
    assert all(f"{name} does not show the stored results" in stale for name in names), stale
    assert {path.name for path in results_page.update(page, results)} >= set(names)
    assert results_page.stale(page, results) == []


def test_correlations() -> None:
    assert statistics.ranks([3, 1, 3, 2]).tolist() == [3.5, 1, 3.5, 2]
    assert statistics.spearman([1, 2, 3, 4], [1, 10, 100, 50]) == pytest.approx(0.8)
    assert statistics.pearson([1, 2, 3], [2, 4, 6]) == pytest.approx(1)
    assert statistics.pearson([1, 1, 1], [2, 4, 6]) is None and statistics.pearson([1, 2], [1, 2]) is None
    rows = [row(value, held_out_kl=[kl]) for value, kl in ((80.0, 0.3), (82.0, 0.2), (81.0, 0.1))]
    found = statistics.prediction([*rows, row(None), row(70.0, held_out_kl=[None])], "held_out_kl")
    assert found is not None and (found.count, found.lost) == (3, 1.0)
    assert found.spearman == pytest.approx(0.5) and found.pearson == pytest.approx(0.5)
    old = row(70.0)
    del old["held_out_kl"]
    assert statistics.prediction([old], "held_out_kl") is None


def test_signals_are_judged_within_a_width(results: Path) -> None:
    stored = {**results_page._stored(results), Path("accuracy-y.json"): content(row(89.0, weight_bits=4))}
    text = results_page.content(stored)
    assert "| resnet20 3w3a | held out agreement | 12 | +1.00 | +1.00 | 0.00 |" in text
    assert "| resnet20 at all widths | held out loss | 13 | +1.00 | +1.00 | - |" in text
    assert "| resnet20 3w3a | held out kl | 12 | - | - |" in text


def test_two_runs_say_nothing_of_a_signal() -> None:
    rows = [row(80.0 + i, seed=i) for i in range(3)]
    said = "| held out kl |"
    assert said not in results_page.content({Path("accuracy-x.json"): content(*rows[:2])})
    assert said in results_page.content({Path("accuracy-x.json"): content(*rows)})
    other = row(70.0, seed=9, recipe="adadfq_plus", recipe_digest="1" * 16)
    text = results_page.content({Path("accuracy-x.json"): content(*rows, other)})
    assert "| resnet20 3w3a, 2 recipes | held out kl | 4 |" in text


def test_what_training_spoilt_is_marked() -> None:
    text = results_page.content(
        {Path("accuracy-x.json"): content(varied(49.0, 1, gamma=0.0), varied(51.0, 1, gamma=2.0))}
    )
    assert "| `gamma=0.0` | 1 | 49.00, below round to nearest (50.00) |" in text
    assert "| `gamma=2.0` | 1 | 51.00 |" in text


def test_what_differs_by_more_than_seeds_do_is_named() -> None:
    def page(**values: tuple[float, ...]) -> str:
        rows = [row(value, seed) for seed, value in enumerate(values.pop("base"), 1)]
        for name, found in values.items():
            rows += [varied(value, seed, gamma=float(name[1:])) for seed, value in enumerate(found, 1)]
        return results_page.content({Path("accuracy-options.json"): content(*rows)})

    # By tables: t of 4 degrees of freedom is 2.776 at 0.05; here it is 3.67 and 2.45.
    text = page(
        base=(80.0, 81.0, 82.0), g2=(83.0, 84.0, 85.0), g3=(82.0, 83.0, 84.0), g4=(77.0, 78.0, 79.0), g5=(90.0,)
    )
    assert (
        "Of 3 settings with two seeds or more, top-1 of `gamma=2.0` (+3.00), `gamma=4.0` (-3.00) differs from the "
        "base's at the level of 0.05"
    ) in text
    assert "What is each option beyond the paper worth alone?" in text
    assert "top-1 of none differs" in page(base=(80.0, 81.0), g2=(80.0, 82.0))
    assert "`gamma=2.0` (+1.00) differs" in page(base=(80.0, 80.0), g2=(81.0, 81.0))
    assert "differs from the" not in page(base=(80.0,), g2=(84.0,))
    # Pooled variance (2 * 0 + 2 * 1) / 4, of three seeds each: sqrt(0.5 * 2 / 3).
    assert "by accident" not in text
    assert "settings pooled, is 0.58" in page(base=(80.0, 80.0, 80.0), g2=(81.0, 82.0, 83.0))


def test_p_values_are_those_of_welchs_test() -> None:
    def groups_of(*values: float) -> accuracy.Summary:
        (group,) = summarize([row(value, seed) for seed, value in enumerate(values, 1)])
        return group

    base = groups_of(80.0, 81.0, 82.0)
    # t = 3.674 at 4 degrees of freedom; with unequal deviations t = -0.840 at 2.25 of them (0.448 at 4).
    assert statistics.p_value(groups_of(83.0, 84.0, 85.0), base) == pytest.approx(0.0213, abs=1e-4)
    assert statistics.p_value(base, groups_of(79.0, 83.0, 87.0)) == pytest.approx(0.4807, abs=1e-4)
    assert statistics.p_value(groups_of(83.0), base) is None


def test_commits_of_earlier_rows_are_named() -> None:
    old = varied(81.0, 1, gamma=2.0) | {"git_commit": "a" * 40, "git_dirty": True}
    new = row(80.0) | {"git_commit": "b" * 40, "git_dirty": False}
    held = content(new, old)
    held["environment"] = held["environment"] | {"git_commit": "b" * 40, "git_dirty": False}
    text = results_page.content({Path("accuracy-options.json"): held})
    assert "rows also of aaaaaaaaaa with changes)" in text and "commit bbbbbbbbbb (" in text


def test_a_label_leaves_out_what_the_teachers_input_is() -> None:
    rows = [row(80.0, settings={"epochs": 10, "mean": [0.5], "std": [0.2]})]
    (summary,) = summarize(rows)
    assert accuracy_report.group_label(summary) == "adadfq, cifar10_resnet20 epochs=10"


def test_a_run_in_two_files_counts_once() -> None:
    first, again, other = row(80.0), row(70.0), row(75.0, seed=2)
    assert statistics.unique([content(first), content(again, other)]) == [first, other]


def test_a_run_in_two_files_is_of_the_grid_that_varied_least() -> None:
    first, second = row(80.0, settings={"gamma": 0.0}, variant={"gamma": 0.0}), row(80.0, settings={"gamma": 0.0})
    assert statistics.unique([content(first), content(second)]) == [second]
    assert statistics.unique([content(second), content(first)]) == [second]


def test_time_to_an_accuracy() -> None:
    (group,) = summarize([row(80.0), row(90.0, 2)])
    assert statistics.seconds_to(group, 50.0) == 1 and statistics.seconds_to(group, 99.0) is None
    assert statistics.seconds_to(group, 85.0) == 10
    (gpu,) = summarize([on_gpu(row(80.0))])
    assert statistics.seconds_to(gpu, 80.0) == 20 and statistics.seconds(gpu.rows[0]) == 20
    short = row(80.0, accuracies=[70.0, 80.0])  # scored after the last two epochs
    assert statistics.seconds_to(summarize([short])[0], 70.0) == 9


def test_the_page_and_its_plots(results: Path, tmp_path: Path) -> None:
    page = tmp_path / "docs" / "results.md"
    page.parent.mkdir()
    assert results_page.stale(page, results)[0] == "results.md does not show the stored results"
    written = results_page.update(page, results)
    names = {"time.png", "h-prime.png", "signals.png", "bounds.png", "adaptability.png"}
    spreads = {"accuracy-base-spread.png", "accuracy-bounds-spread.png"}
    assert {path.name for path in written} == names | spreads | {"results.md"}
    assert results_page.stale(page, results) == [] and results_page.update(page, results) == []
    text = page.read_text()
    for name in names:
        assert f"(results/{name})" in text and (page.parent / "results" / name).is_file()
    assert "(../benchmarks/results/accuracy-bounds-spread.png)" in text and str(tmp_path) not in text
    (page.parent / "results" / "time.png").unlink()
    assert results_page.stale(page, results) == ["time.png is missing"]
    held = store.read(results / "accuracy-base.json")
    held["rows"][0]["accuracy"] = 1.0
    store.write(results / "accuracy-base.json", held)
    assert "h-prime.png does not show the stored results" in results_page.stale(page, results)
    results_page.update(page, results)
    assert results_page.stale(page, results) == []


def test_rows_of_before_have_no_times_and_no_signals(tmp_path: Path) -> None:
    old = row(80.0)
    for name in store.OPTIONAL_FIELDS["accuracy"]:
        del old[name]
    store.write(
        tmp_path / "accuracy-old.json", content(old, {**old, "status": "diverged", "accuracy": None, "seed": 2})
    )
    stored = results_page._stored(tmp_path)
    text = results_page.content(stored)
    assert "| 2 | 80.00 (1 diverged) | 10.00 | - | 50.00 | - | 2000 | - |" in text
    assert results_plots.plots(stored) == {} and "Spearman" not in text


def test_a_file_without_commands() -> None:
    held = {**content(row(80.0), varied(70.0, 1, gamma=0.0)), "options": {"rounds": 3}}
    assert "| `gamma=0.0` | 1 | 70.00 | -10.00 |" in results_page.content({Path("accuracy-x.json"): held})


def test_nothing_stored(tmp_path: Path) -> None:
    assert "No run is stored yet." in results_page.content({})
    assert results_page.update(tmp_path / "results.md", tmp_path) == [tmp_path / "results.md"]


def test_the_command(results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "results.md"
    monkeypatch.setattr(results_page.update, "__defaults__", (page, results))
    monkeypatch.setattr(results_page.stale, "__defaults__", (page, results))
    before = CliRunner().invoke(main, ["results", "--check"])
    assert before.exit_code == 1 and "results.md does not show the stored results: run" in before.output
    assert "time.png" in CliRunner().invoke(main, ["results"]).output
    assert CliRunner().invoke(main, ["results", "--check"]).exit_code == 0


def test_the_stored_page_is_of_the_stored_files() -> None:
    assert results_page.stale() == []


def test_a_key_knows_the_player() -> None:
    assert accuracy.key(row(80.0)) != accuracy.key(row(80.0, player="authors"))
