"""The demo: quantise the digits teacher without its images, at several widths; print a table, draw two pictures."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from adadfq import files
from adadfq.convert import quantize
from adadfq.demo import digits
from adadfq.demo.plots import curves_figure, images_figure, require_matplotlib
from adadfq.recipe import Recipe
from adadfq.result import Result
from adadfq.trainer import Trainer

IMAGES_A_CLASS = 8


def run(out: Path, bits: Sequence[int] = (4, 3), seed: int = 0) -> dict[str, Any]:
    """Run the demo and write ``OUT/w{b}a{b}`` (a run, see :mod:`adadfq.result`), ``images.png`` and ``curves.png``.

    Accuracies are on digits that the teacher never saw; they are looked at, and decide nothing. "Round to nearest" is
    the student as the warm-up leaves it: weights untouched, activation ranges calibrated on generated images.

    Args:
        out: new directory.
        bits: widths of weights and activations to try.
        seed: of the trainer.

    Returns:
        {"teacher": percent, bits: {"round_to_nearest": percent, "adadfq": percent, "seconds": s}, ...}.

    Raises:
        InvalidInputError: `out` exists, bits out of range, or scikit-learn or matplotlib missing.
    """
    require_matplotlib()
    with _one_thread():
        return _run(out, bits, seed)


@contextmanager
def _one_thread() -> Iterator[None]:
    """8x8 images are too small to share: waking a second thread costs more than it computes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _run(out: Path, bits: Sequence[int], seed: int) -> dict[str, Any]:
    images, labels = digits.load_images(held_out=True)
    teacher = digits.load_teacher()
    students = {b: quantize(teacher, b, b) for b in bits}
    files.new_directory(out)
    summary: dict[Any, Any] = {"teacher": digits.accuracy(teacher, images, labels)}
    print(f"teacher, float: {summary['teacher']:.2f} % of {len(labels)} held-out digits")

    curves: dict[int, list[float]] = {}
    results: dict[int, Result] = {}
    trainer: Trainer | None = None
    for width, student in students.items():
        recipe = Recipe.named("digits")
        scores: list[float] = []

        def score(epoch: int, trainer: Trainer, scores: list[float] = scores) -> None:
            if epoch + 1 >= trainer.recipe.warmup_epochs:
                scores.append(digits.accuracy(trainer.student, images, labels))

        start = time.monotonic()
        trainer = Trainer(teacher, student, recipe, seed=seed, on_epoch_end=score)
        results[width] = trainer.fit(out / f"w{width}a{width}")
        curves[width] = scores
        if results[width].status != "complete":
            raise KeyboardInterrupt
        summary[width] = {
            "round_to_nearest": scores[0],
            "adadfq": scores[-1],
            "seconds": time.monotonic() - start,
        }
        print(
            f"{width}-bit weights and activations: round to nearest {scores[0]:.2f} %, AdaDFQ {scores[-1]:.2f} % "
            f"({summary[width]['seconds']:.0f} s)"
        )

    assert trainer is not None
    with torch.no_grad():
        recipe = trainer.recipe
        classes = torch.arange(recipe.num_classes).repeat_interleave(IMAGES_A_CLASS)
        noise = torch.randn(len(classes), recipe.latent_dim, generator=torch.Generator().manual_seed(seed))
        generated = trainer.generator(noise, classes)[:, 0]
    images_figure(generated, IMAGES_A_CLASS, out / "images.png")
    curves_figure(
        {width: _epoch_means(out / f"w{width}a{width}" / "metrics.jsonl") for width in results},
        curves,
        float(summary["teacher"]),
        recipe.warmup_epochs,
        out / "curves.png",
    )
    files.write_json(out / "summary.json", summary)
    print(f"generated images: {out / 'images.png'}\ncurves: {out / 'curves.png'}")
    return summary


def _epoch_means(path: Path) -> dict[str, list[float]]:
    """Mean of every metric over each epoch of a ``metrics.jsonl``."""
    epochs: dict[int, list[dict[str, float]]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        epochs.setdefault(row["epoch"], []).append(row)
    names = [name for name in epochs[0][0] if name not in ("step", "epoch")]
    return {name: [sum(r[name] for r in rows) / len(rows) for rows in epochs.values()] for name in names}
