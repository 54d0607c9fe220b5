"""Runs of ``python -m benchmarks accuracy`` that are cut off, and processes that share a file."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import adadfq
from adadfq import trainer as training
from adadfq.demo import digits
from adadfq.errors import InvalidInputError
from adadfq.result import CHECKPOINT
from benchmarks import accuracy, held_out_images, unfinished
from benchmarks.accuracy_grid import Grid

pytest.importorskip("sklearn")

SET = {"batch_size": 8, "epochs": 5, "steps_per_epoch": 3, "warmup_epochs": 2, "calibration_epochs": 2}
GRID = Grid("adadfq.demo.digits:DigitsNet", "digits", ((2, 4),), (1, 2), SET)
HERE = {"device": "cpu", "threads": 1, "git_commit": "a" * 40, "git_dirty": False}
TIMES = ("train_seconds", "step_ms", "epoch_seconds", "epoch_cpu_seconds")


@pytest.fixture(scope="module", autouse=True)
def few_held_out_images() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(held_out_images, "SMALL", {"images": 20, "steps": 3, "batch_size": 8, "seed": 0})
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    images, labels = digits.load_images(held_out=True)
    path = tmp_path_factory.mktemp("digits") / "images.npz"
    pixels = (images[:50] * digits.STD + digits.MEAN).clamp(0, 1)
    np.savez(path, images=pixels.numpy(), labels=labels[:50].numpy())
    return path


@pytest.fixture(scope="module")
def unbroken(data: Path) -> list[dict[str, Any]]:
    return list(accuracy.train_grid(GRID, digits.WEIGHTS, data, HERE))


class Folder:
    """The grid trained with a folder, call by call; rows are stored as the command stores them."""

    def __init__(self, data: Path, path: Path, real_images: bool = False) -> None:
        self.data, self.path, self.rows, self.said = data, path, [], []
        self.real_images = real_images

    def train(self, environment: dict[str, Any] = HERE) -> None:
        found = accuracy.train_grid(
            GRID,
            digits.WEIGHTS,
            self.data,
            environment,
            lambda: self.rows,
            None,
            self.path,
            self.said.append,
            real_images=self.real_images,
        )
        for row in found:
            self.rows.append(row)

    def interrupted(self, at: int) -> Path:
        """Train until Ctrl-C after so many steps of all runs; the place that is left."""
        with pytest.MonkeyPatch.context() as patch:
            steps_played(patch, at, lambda: signal.raise_signal(signal.SIGINT))
            with pytest.raises(KeyboardInterrupt):
                self.train()
        (place,) = self.places()
        return place

    def places(self) -> list[Path]:
        return sorted(self.path.glob(".run-*"))


@pytest.fixture
def folder(data: Path, tmp_path: Path) -> Folder:
    return Folder(data, tmp_path)


def timeless(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def steps_played(monkeypatch: pytest.MonkeyPatch, at: int | None = None, stop: Any = None) -> list[int]:
    """The list gets every step played; the one of number `at`, counted from 0 over all runs, calls `stop` after it."""
    played: list[int] = []
    play = adadfq.Trainer.play

    def counted(trainer: adadfq.Trainer, train_student: bool = True) -> Any:
        row = play(trainer, train_student)
        played.append(trainer.step)
        if len(played) - 1 == at:
            stop()
        return row

    monkeypatch.setattr(adadfq.Trainer, "play", counted)
    return played


def die() -> None:
    raise SystemExit("killed")


def test_an_interrupted_run_goes_on_within_its_epoch(
    folder: Folder, unbroken: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.interrupted(at=15 + 10)  # the second run's epoch 3, of 0 to 4
    assert len(folder.rows) == 1
    played = steps_played(monkeypatch)
    folder.train()
    assert played == [11, 12, 13, 14] and folder.said[1:] == []  # the first is of held-out images
    assert timeless(folder.rows) == timeless(unbroken) and folder.places() == []
    row = folder.rows[1]
    assert [len(row[name]) for name in TIMES[2:]] == [5, 5] and sum(row["epoch_seconds"]) == row["train_seconds"]


@pytest.mark.parametrize("seconds", [0.0, 1e9])
def test_a_killed_run_goes_on_from_its_checkpoint(
    folder: Folder, unbroken: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    """Of its scores, those of epochs that are played again are forgotten."""
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", seconds)
    monkeypatch.setattr(training, "CHECKPOINT_SHARE", 0)
    with monkeypatch.context() as patch:
        steps_played(patch, at=13, stop=die)
        with pytest.raises(SystemExit):
            folder.train()
    (place,) = folder.places()
    kept = json.loads((place / "scores.json").read_text())
    assert [len(kept[name]) for name in ("accuracies", "signals")] == [3, 3]
    played = steps_played(monkeypatch)
    folder.train()
    assert played[:-15] == list(range(12 if seconds == 0 else 3, 15))
    assert timeless(folder.rows) == timeless(unbroken) and folder.places() == []
    assert [[len(row[name]) for name in TIMES[2:]] for row in folder.rows] == [[5, 5]] * 2


@pytest.mark.parametrize("change", ["threads", "sources", "held_out_digest", "model"])
def test_a_run_begun_otherwise_begins_anew(
    folder: Folder, unbroken: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    place = folder.interrupted(at=7)
    known = json.loads((place / "known.json").read_text())
    assert known["held_out_digest"] == unbroken[0]["held_out_digest"]
    assert len(known["sources"]) == len(known["model"]) == 64
    (place / "known.json").write_text(json.dumps({**known, change: "other"}))
    played = steps_played(monkeypatch)
    folder.train()
    assert played == [*range(15), *range(15)] and folder.said[1:] == [f"begun anew: it differs in {change}"]
    assert timeless(folder.rows) == timeless(unbroken)


def test_a_network_is_known_by_the_files_that_define_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    base, block, net = (tmp_path / f"my_{name}_of_unfinished.py" for name in ("base", "block", "net"))
    base.write_text("from torch import nn\nclass Base(nn.Sequential): pass\n")
    block.write_text("from my_base_of_unfinished import *\nclass Block(Base): pass\n")
    net.write_text("from my_block_of_unfinished import *\ndef build(): return nn.Sequential(Block(nn.Linear(2, 2)))\n")
    for spec in (f"{net}:build", f"{net.stem}:build"):

        def digest(spec: str = spec) -> str:
            return accuracy._digest_of_code(adadfq.build_model(spec), spec)

        found = [digest(), digest()]
        for path in (base, block, net):
            path.write_text(path.read_text() + "# another\n")
            found.append(digest())
        assert found[0] == found[1] and len(set(found)) == 4


def test_a_run_on_real_images_goes_on_with_the_same_images(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unbroken = list(accuracy.train_grid(GRID, digits.WEIGHTS, data, HERE, real_images=True))
    folder = Folder(data, tmp_path, real_images=True)
    folder.interrupted(at=7)
    played = steps_played(monkeypatch)
    folder.train()
    assert played == [*range(8, 15), *range(15)] and timeless(folder.rows) == timeless(unbroken)

    folder.rows.clear()
    monkeypatch.undo()
    folder.interrupted(at=7)
    found = dict(np.load(data))
    folder.data = tmp_path / data.name
    np.savez(folder.data, images=1 - found["images"], labels=found["labels"])
    folder.train()
    assert folder.said[1:] == ["begun anew: it differs in pixels"]


def test_a_commit_of_the_same_sources_is_gone_on_with(
    folder: Folder, unbroken: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Storing a row, and committing it, changes the commit."""
    folder.interrupted(at=7)
    played = steps_played(monkeypatch)
    folder.train({**HERE, "git_commit": "b" * 40, "git_dirty": True})
    assert played == [*range(8, 15), *range(15)]
    assert [row["accuracies"] for row in folder.rows] == [row["accuracies"] for row in unbroken]


def test_the_sources_are_all_that_a_training_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = (
        "adadfq/ops/cpu.py",
        "adadfq/ops/routes.json",
        "adadfq/recipes/digits.json",
        "kernels/a.py",
        "csrc/cpu/a.h",
    )
    for name in (*names, "benchmarks/accuracy.py", "adadfq/_build_info.x.json", "benchmarks/results/ops.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("before")
    found = [unfinished.known(HERE, tmp_path)]
    for name in (*names, "benchmarks/accuracy.py"):
        (tmp_path / name).write_text("after")
        found.append(unfinished.known(HERE, tmp_path))
    assert len({each["sources"] for each in found}) == len(found) == 7
    for name in ("adadfq/_build_info.x.json", "benchmarks/results/ops.json"):
        (tmp_path / name).write_text("after")
    assert unfinished.known({**HERE, "git_commit": "b" * 40}, tmp_path) == found[-1]
    (tmp_path / "routes.json").write_text("{}")
    monkeypatch.setenv("ADADFQ_ROUTES", str(tmp_path / "routes.json"))
    routed = unfinished.known(HERE, tmp_path)
    (tmp_path / "routes.json").write_text("{ }")
    assert unfinished.known(HERE, tmp_path) != routed != found[-1]


def test_a_broken_checkpoint_begins_anew(folder: Folder, unbroken: list[dict[str, Any]]) -> None:
    place = folder.interrupted(at=7)
    (place / "training" / CHECKPOINT).write_bytes(b"half of one")
    folder.train()
    assert "begun anew" in folder.said[1] and "cannot be read" in folder.said[1]
    assert timeless(folder.rows) == timeless(unbroken) and folder.places() == []


def test_what_is_refused_leaves_nothing(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> Any:
        raise InvalidInputError("no")

    monkeypatch.setattr(adadfq, "Trainer", refused)
    with pytest.raises(InvalidInputError, match="no"):
        folder.train()
    assert folder.places() == []


def test_what_is_refused_once_goes_on_when_that_is_mended(
    folder: Folder, unbroken: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of images that cannot be read at an epoch's end costs no training."""

    def unreadable(*_: Any, **__: Any) -> Any:
        raise InvalidInputError("an image cannot be decoded")

    with monkeypatch.context() as patch:
        steps_played(patch, at=8, stop=lambda: patch.setattr(adadfq.HeldOut, "score", unreadable))
        with pytest.raises(InvalidInputError, match="decoded"):
            folder.train()
    played = steps_played(monkeypatch)
    folder.train()
    assert played[0] == 3 and timeless(folder.rows) == timeless(unbroken)


def test_a_run_that_diverges_leaves_nothing(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    def diverged(*_: Any) -> None:
        raise adadfq.AdadfqError("loss_student is nan")

    monkeypatch.setattr(adadfq.Trainer, "_check_finite", diverged)
    folder.train()
    assert [row["status"] for row in folder.rows] == ["diverged"] * 2 and folder.places() == []


def test_a_run_that_another_process_trains_is_left_to_it(folder: Folder, unbroken: list[dict[str, Any]]) -> None:
    held = unfinished.take(folder.path, accuracy.key(unbroken[0]), HERE)
    assert held is not None
    with held, pytest.raises(accuracy.RunsTakenError, match="1 of 2 runs were left to other processes"):
        folder.train()
    assert [row["seed"] for row in folder.rows] == [2]
    assert "seed 1 of 2w4a {}: another process trains it" in folder.said
    assert accuracy.RunsTakenError.exit_status == 75 and folder.places() == []
    folder.train()
    assert timeless(folder.rows) == timeless(unbroken[::-1])


def test_a_run_that_another_process_has_ended_meanwhile_is_not_missing(
    folder: Folder, unbroken: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    held = unfinished.take(folder.path, accuracy.key(unbroken[0]), {})
    assert held is not None
    steps_played(monkeypatch, at=0, stop=lambda: folder.rows.append(unbroken[0]))
    with held:
        folder.train()
    assert [row["seed"] for row in folder.rows] == [1, 2]


@pytest.mark.parametrize("where", ["in this file", "in another file"])
def test_a_row_that_comes_while_a_place_is_taken_is_seen(
    folder: Folder, unbroken: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    take, elsewhere = unfinished.take, {}

    def taken_late(path: Path, key: str, environment: Any) -> Any:
        row = next(row for row in unbroken if accuracy.key(row) == key)
        if where == "in this file":
            folder.rows.append(row)
        else:
            elsewhere[key] = row
        return take(path, key, environment)

    monkeypatch.setattr(unfinished, "take", taken_late)
    played = steps_played(monkeypatch)
    found = accuracy.train_grid(
        GRID,
        digits.WEIGHTS,
        folder.data,
        HERE,
        lambda: folder.rows,
        None,
        folder.path,
        folder.said.append,
        lambda row: elsewhere.get(accuracy.key(row)),
    )
    folder.rows += list(found)
    assert played == [] and timeless(folder.rows) == timeless(unbroken) and folder.places() == []


def test_a_row_that_could_not_be_stored_is_kept(
    folder: Folder, unbroken: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = accuracy.train_grid(
        GRID, digits.WEIGHTS, folder.data, HERE, lambda: folder.rows, None, folder.path, folder.said.append
    )
    next(found)
    found.close()  # as where the command dies of a full disk
    assert len(folder.places()) == 1
    played = steps_played(monkeypatch)
    folder.train()
    assert played == list(range(15)) and timeless(folder.rows) == timeless(unbroken) and folder.places() == []


def test_what_is_left_of_a_run_that_has_its_row_is_removed(folder: Folder, unbroken: list[dict[str, Any]]) -> None:
    folder.rows += unbroken
    place = unfinished.take(folder.path, accuracy.key(unbroken[0]), HERE)
    assert place is not None
    with place:
        place.keep({"accuracies": [1.0]})
    assert len(folder.places()) == 1
    folder.train()
    assert folder.places() == [] and folder.rows == unbroken


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    code = (
        "import os, sys, time; from pathlib import Path; from benchmarks import unfinished\n"
        "place = unfinished.take(Path(sys.argv[1]), 'a run', {})\n"
        "print('none' if place is None else 'taken', flush=True)\n"
        "(place.training.parent / 'something').touch() if place else None\n"
        "time.sleep(60 if place and sys.argv[2] == 'stay' else 0)\n"
    )

    def start(how: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", code, str(tmp_path), how]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1])

    first = start("stay")
    assert first.stdout is not None and first.stdout.readline() == "taken\n"
    assert start("go").communicate()[0] == "none\n"
    assert unfinished.take(tmp_path, "a run", {}) is None
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    assert start("go").communicate()[0] == "taken\n"


def test_a_place_that_was_removed_is_made_again(tmp_path: Path) -> None:
    first = unfinished.take(tmp_path, "a run", {})
    assert first is not None
    with first:
        first.remove()
        second = unfinished.take(tmp_path, "a run", {})  # while the first is still held
        assert second is not None and unfinished.take(tmp_path, "a run", {}) is None
    with second:
        assert unfinished.take(tmp_path, "a run", {}) is None
    assert list(tmp_path.iterdir()) == []


def test_many_may_take_and_remove_at_once(tmp_path: Path) -> None:
    holders, most = 0, 0

    def take_and_remove(_: int) -> None:
        nonlocal holders, most
        taken = 0
        while taken < 50:
            if (place := unfinished.take(tmp_path, "a run", {})) is not None:
                with place:
                    holders += 1
                    most = max(most, holders)
                    time.sleep(1e-4)
                    taken += 1
                    holders -= 1
                    place.remove()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(take_and_remove, range(4)))
    assert most == 1 and list(tmp_path.iterdir()) == []
