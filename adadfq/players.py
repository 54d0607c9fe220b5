"""Do teacher, student, generator and recipe fit together? Asked once, before anything is changed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from adadfq import checks
from adadfq.errors import BackendError, InvalidInputError
from adadfq.game import BatchNormMatch
from adadfq.nn import activations, frozen_ranges
from adadfq.recipe import Recipe


def check_network(name: str, model: Any) -> None:
    """Refuse what is not a module, not float32 and finite, or a player without anything to train."""
    if not isinstance(model, nn.Module):
        raise InvalidInputError(f"{name} must be a torch.nn.Module, got {type(model).__name__}")
    if not list(model.parameters()):
        raise InvalidInputError(f"the {name} ({type(model).__name__}) has no parameters")
    for key, value in checks.learned_tensors(model).items():
        if value.dtype != torch.float32:
            raise InvalidInputError(f"the {name} must be float32, got {value.dtype} in {key}; convert it with .float()")
        if not bool(torch.isfinite(value).all()):
            raise InvalidInputError(f"the {name} must have finite weights, got NaN or infinity in {key}")
    if name != "teacher" and not any(p.requires_grad for p in model.parameters()):
        raise InvalidInputError(f"the {name} has no parameter that requires a gradient: nothing would train")


@torch.no_grad()
def count_classes(network: nn.Module, recipe: Recipe) -> int | None:
    """How many logits `network` gives for an image of the recipe's shape; None where it takes none or gives no logits.

    `network` is in eval mode.
    """
    device = next(network.parameters()).device
    image = torch.zeros(1, recipe.image_channels, recipe.image_size, recipe.image_size, device=device)
    try:
        logits = network(image)
    except (RuntimeError, ValueError, TypeError, IndexError):
        return None  # check_players says what is wrong
    return int(logits.shape[1]) if isinstance(logits, Tensor) and logits.dim() == 2 else None


def check_generator(generator: Any, recipe: Recipe) -> None:
    """Refuse a generator whose attributes contradict the recipe."""
    check_network("generator", generator)
    for name in ("num_classes", "latent_dim"):
        if (found := getattr(generator, name, None)) != getattr(recipe, name):
            raise InvalidInputError(
                f"the generator has {name}={found!r} and the recipe {getattr(recipe, name)}: make them agree"
            )


def check_players(teacher: nn.Module, student: nn.Module, generator: nn.Module, recipe: Recipe) -> set[str]:
    """Run every network once, and the gradient back to the images, on one batch of the recipe's size.

    Moves no range, no statistic, no gradient of a parameter and no global random state.

    Returns:
        Names of the student's activation quantisers that its forward does not reach.

    Raises:
        InvalidInputError: the teacher has no BatchNorm, or a shape does not fit; says which network it is.
    """
    matching = BatchNormMatch(teacher)
    device = next(teacher.parameters()).device
    with _untouched(generator, device):
        noise = torch.randn(recipe.batch_size, recipe.latent_dim, device=device)
        labels = torch.randint(recipe.num_classes, (recipe.batch_size,), device=device)
        images = _attempt("generator", "noise and labels", generator, noise, labels)
    expected = [recipe.batch_size, recipe.image_channels, recipe.image_size, recipe.image_size]
    if not isinstance(images, Tensor) or list(images.shape) != expected:
        got = list(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise InvalidInputError(f"the generator must return images of shape {expected}, got {got}")
    images = images.detach().requires_grad_()

    what = f"images of shape {expected} (image_channels and image_size of the recipe)"
    with matching.watching():
        teacher_logits = _logits("teacher", _attempt("teacher", what, teacher, images), recipe)
    loss = matching.loss() + teacher_logits.sum()
    reached: set[str] = set()
    found = activations(student)
    hooks = [act.register_forward_hook(lambda *_, name=name: reached.add(name)) for name, act in found.items()]
    try:
        with frozen_ranges(student):
            loss = loss + _logits("student", _attempt("student", what, student, images), recipe).sum()
    finally:
        for hook in hooks:
            hook.remove()
    try:
        torch.autograd.grad(loss, images)
    except RuntimeError as error:
        raise InvalidInputError(f"no gradient reaches the images through teacher and student: {error}") from error
    return set(found) - reached


@contextmanager
def _untouched(generator: nn.Module, device: torch.device) -> Iterator[None]:
    """Leave the generator's buffers (its norms' statistics) and the random state as they are."""
    kept = [(buffer, buffer.clone()) for buffer in generator.buffers()]
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        try:
            yield
        finally:
            for buffer, value in kept:
                buffer.copy_(value)


def _attempt(name: str, what: str, model: nn.Module, *inputs: Tensor) -> Any:
    try:
        return model(*inputs)
    except (BackendError, torch.OutOfMemoryError):
        raise
    except (InvalidInputError, RuntimeError, ValueError, TypeError, IndexError) as error:
        raise InvalidInputError(f"the {name} does not take {what}: {error}") from error


def _logits(name: str, logits: Any, recipe: Recipe) -> Tensor:
    if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.shape[0] != recipe.batch_size:
        got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise InvalidInputError(f"the {name} must return logits [B, K] for a batch of {recipe.batch_size}, got {got}")
    if logits.shape[1] != recipe.num_classes:
        raise InvalidInputError(
            f"the {name} has {logits.shape[1]} classes and the recipe {recipe.num_classes}: "
            f"set num_classes={logits.shape[1]}"
        )
    return logits
