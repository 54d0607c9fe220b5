"""The generated images that :mod:`benchmarks.accuracy` judges students on: the same for all runs of a teacher.

They depend on the teacher and the shape of its images alone, never on a recipe, so that rows of all grids compare.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import adadfq
from adadfq import game, generator, held_out
from benchmarks import store

#: From this size on, a generator as for ImageNet, and fewer images: at 224 pixels one takes a CPU 0.2 s to generate.
LARGE_FROM = 64
#: Of :class:`adadfq.HeldOut`: a minute for ResNet-20 at 32 pixels on one thread.
SMALL = {"images": 1024, "steps": 200, "batch_size": 32, "seed": 0}
#: Minutes for a network at 224 pixels.
LARGE = {"images": 128, "steps": 40, "batch_size": 8, "seed": 0}

#: Weight of the BatchNorm statistics: with the paper's 1, those of ResNet-20's images are 0.70 from the teacher's after
#: so few steps, with 10 they are 0.25 from them; nearer images tell more about the ones that are missing.
GAMMA = 10.0


def sizes(image_size: int) -> dict[str, int]:
    """How many images, of how many steps, for a teacher of that size of images."""
    return LARGE if image_size >= LARGE_FROM else SMALL


def shape(recipe: adadfq.Recipe) -> adadfq.Recipe:
    """The recipe of the images for the teacher that `recipe` is for: its shapes, and nothing of its training."""
    return adadfq.Recipe(
        name="held out",
        num_classes=recipe.num_classes,
        image_size=recipe.image_size,
        image_channels=recipe.image_channels,
        mean=recipe.mean,
        std=recipe.std,
        gamma=GAMMA,
        generator="conditional_bn" if recipe.image_size >= LARGE_FROM else "label_embedding",
    )


def make(
    teacher: nn.Module, recipe: adadfq.Recipe, folder: Path | None = None, say: Callable[[str], None] = print
) -> adadfq.HeldOut:
    """The held-out images of a teacher.

    Args:
        teacher: float classifier in eval mode.
        recipe: of any run; only the shapes count.
        folder: where they are kept from one call to the next; None: nowhere.
        say: is told, once, that they are being made.

    Raises:
        InvalidInputError: as :class:`adadfq.HeldOut`, or the file in `folder` is not readable.
    """
    own, amount = shape(recipe), sizes(recipe.image_size)
    path = None if folder is None else folder / f".held-out-{_name(teacher, own, amount)}.pt"
    if path is not None and path.is_file():
        return adadfq.HeldOut.load(path, teacher, own)
    say(
        f"making {amount['images']} held-out images: {held_out.GENERATORS} generators of {amount['steps']} steps at "
        f"batch {amount['batch_size']}, {own.image_size} pixels"
    )
    found = adadfq.HeldOut(teacher, own, **amount)
    if path is None:
        return found
    with store.locked(path.parent):
        if path.is_file():  # by another process meanwhile: all judge by the same images
            return adadfq.HeldOut.load(path, teacher, own)
        found.save(path)
    return found


def _name(teacher: nn.Module, recipe: adadfq.Recipe, amount: dict[str, Any]) -> str:
    """Of all that decides the images: teacher, shapes, sizes, the code that makes them, and PyTorch's version."""
    digest = hashlib.sha256()
    for name, tensor in sorted(teacher.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    digest.update(json.dumps([recipe.to_dict(), amount, torch.__version__], sort_keys=True).encode())
    for code in (held_out, generator, game.BatchNormMatch):
        digest.update(inspect.getsource(code).encode())
    return digest.hexdigest()[:16]
