"""The demo, at toy length, and the teacher it ships."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image

import adadfq
from adadfq import Recipe
from adadfq.demo import digits, run

pytest.importorskip("sklearn")


def test_the_shipped_teacher_is_small_and_good() -> None:
    assert digits.WEIGHTS.stat().st_size < 300_000
    teacher = digits.load_teacher()
    held_out, seen = digits.load_images(held_out=True), digits.load_images(held_out=False)
    assert digits.accuracy(teacher, *held_out) > 98
    assert len(held_out[1]) + len(seen[1]) == 1797 and len(held_out[1]) == 599
    assert not {tuple(x.flatten().tolist()) for x in held_out[0]} & {tuple(x.flatten().tolist()) for x in seen[0]}


def test_normalisation_is_that_of_the_recipe() -> None:
    recipe = Recipe.named("digits")
    assert (recipe.mean, recipe.std) == ((digits.MEAN,), (digits.STD,))
    images, _ = digits.load_images(held_out=False)
    assert math.isclose(float(images.mean()), 0, abs_tol=0.01) and math.isclose(float(images.std()), 1, abs_tol=0.01)


def test_the_demo_writes_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    short = partial(Recipe.named, epochs=3, steps_per_epoch=3, warmup_epochs=2, calibration_epochs=2, lr_milestones=())
    monkeypatch.setattr(run.Recipe, "named", short)
    threads = torch.get_num_threads()
    summary = run.run(tmp_path / "demo", bits=(4, 3), seed=1)
    assert torch.get_num_threads() == threads
    out = capsys.readouterr().out
    for width in (4, 3):
        images, labels = digits.load_images(held_out=True)
        student = adadfq.load(tmp_path / "demo" / f"w{width}a{width}")
        assert digits.accuracy(student, images, labels) == pytest.approx(summary[width]["adadfq"])
        assert f"{width}-bit weights and activations: round to nearest" in out
    assert json.loads((tmp_path / "demo" / "summary.json").read_text())["teacher"] == summary["teacher"]
    for name in ("images.png", "curves.png"):
        with Image.open(tmp_path / "demo" / name) as picture:
            assert min(picture.size) > 300 and len(picture.convert("L").getcolors(256) or []) > 20
    with pytest.raises(adadfq.InvalidInputError):
        run.run(tmp_path / "demo")
