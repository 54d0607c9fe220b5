"""The demo's two pictures."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from adadfq import files
from adadfq.errors import InvalidInputError


def require_matplotlib() -> None:
    """Raise :class:`InvalidInputError` where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise InvalidInputError("the demo needs matplotlib: pip install -e '.[demo]'")


def _figure(width: float, height: float) -> Any:
    # Not pyplot: no window system is asked for and no global state is left behind.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Any, path: Path) -> None:
    with files.atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=110)


def images_figure(images: Tensor, columns: int, path: Path) -> None:
    """Write a grid of grayscale images, [N, H, W], row by row, each stretched to its own range."""
    rows = len(images) // columns
    figure = _figure(columns * 0.8, rows * 0.8 + 0.4)
    figure.suptitle("generated for the classes 0 to 9, a class a row", fontsize=10)
    axes = figure.subplots(rows, columns)
    for axis, image in zip(axes.flat, images, strict=True):
        axis.imshow(image.numpy(), cmap="gray")
        axis.set_axis_off()
    _save(figure, path)


def curves_figure(
    metrics: Mapping[int, Mapping[str, Sequence[float]]],
    accuracies: Mapping[int, Sequence[float]],
    teacher: float,
    warmup_epochs: int,
    path: Path,
) -> None:
    """Write the losses of both players, H' and the held-out accuracy over epochs, a line a width.

    Args:
        metrics: width -> metric -> mean of every epoch.
        accuracies: width -> percent, from the end of the warm-up on.
        teacher: the teacher's accuracy in percent.
        warmup_epochs: where the student starts to train.
        path: PNG to write.
    """
    figure = _figure(10, 6.4)
    axes = list(figure.subplots(2, 2).flat)
    titles = {
        "loss_generator": "loss of the generator",
        "loss_student": "loss of the student",
        "h_prime": "H' (1: student and teacher agree)",
    }
    for axis, (name, title) in zip(axes, titles.items(), strict=False):
        for width, means in metrics.items():
            axis.plot(range(1, len(means[name]) + 1), means[name], label=f"{width} bits")
        axis.set_title(title, fontsize=10)
    axis = axes[-1]
    for width, scores in accuracies.items():
        axis.plot(range(warmup_epochs, warmup_epochs + len(scores)), scores, marker=".", label=f"{width} bits")
    axis.axhline(teacher, color="gray", linestyle=":", label="teacher")
    axis.set_title("held-out accuracy, % (first point: round to nearest)", fontsize=10)
    for axis in figure.axes:
        axis.axvline(warmup_epochs, color="gray", linewidth=0.6)
        axis.set_xlabel("epoch")
        axis.legend(fontsize=8)
    _save(figure, path)
