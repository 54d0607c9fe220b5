"""A run's directory: quantised weights and their description, written atomically, read back with :func:`load`.

======================  ======================================================================================
result.json             written last: status, resolved recipe, seed, model, widths, report, metrics, versions and
                        the SHA-256 of the weight files
student.safetensors     the quantised network's state_dict (float weights, activation ranges)
teacher.safetensors     the float network it was made from
generator.safetensors   the generator
metrics.jsonl           one line a step
checkpoint.pt           everything needed to go on; only while the run is unfinished
======================  ======================================================================================
"""

from __future__ import annotations

import copy
import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adadfq import files
from adadfq.checkpoint import load_weights, read_state_dict, write_state_dict
from adadfq.convert import is_as_quantized, module_bits, quantize, quantized_info, report, set_module_bits
from adadfq.errors import CheckpointError, InvalidInputError
from adadfq.models.build import rebuild_model
from adadfq.recipe import Recipe
from adadfq.version import __version__

__all__ = ["Result", "load", "load_teacher", "read_result"]

RESULT, CHECKPOINT = "result.json", "checkpoint.pt"
FORMAT = 1


@dataclass(frozen=True)
class Result:
    """What :meth:`adadfq.Trainer.fit` returns."""

    student: nn.Module
    """The quantised network, in eval mode, its ranges frozen."""
    recipe: Recipe
    """The recipe as it was used."""
    seed: int
    status: str
    """``complete``, or ``interrupted`` after Ctrl-C."""
    steps: int
    """Steps played."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Mean over the last epoch of each metric (:data:`adadfq.game.METRICS`)."""
    directory: Path | None = None
    """Where it was written, if anywhere."""


@torch.no_grad()
def probe(model: nn.Module, recipe: Recipe) -> list[list[float]] | None:
    """Logits of `model` for fixed images, [B][K]: they tell one architecture from another.

    None where they tell nothing: they differ from call to call, or are not finite.
    """
    shape = (recipe.batch_size, recipe.image_channels, recipe.image_size, recipe.image_size)
    images = torch.randn(shape, generator=torch.Generator("cpu").manual_seed(0), device="cpu")
    images = images.to(next(model.parameters()).device)
    first, second = model(images), model(images)
    return first.tolist() if torch.equal(first, second) and bool(first.isfinite().all()) else None


def _check_probe(model: nn.Module, saved: Any, recipe: Recipe, tolerance: float, directory: Path) -> None:
    """Refuse a network that has a run's weights but computes something else.

    The median over images of the largest change of a logit, relative to how far logits differ between images: another
    stride or pooling changes every image, a code that rounds the other way on another device only few.
    """
    if saved is None or (now := probe(model, recipe)) is None:
        return
    try:
        then = torch.tensor(saved)
    except (TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{directory / RESULT} holds a probe that cannot be read: {error}") from None
    found = torch.tensor(now)
    same = found.shape == then.shape
    if same:
        spread = (then - then.mean(0)).abs().max() if len(then) > 1 else then.abs().max()
        # The second term is for a network that answers every image alike.
        same = bool((found - then).abs().amax(1).median() <= tolerance * spread + 1e-3 * then.abs().max())
    if not same:
        raise CheckpointError(
            f"the weights in {directory} fit this {type(model).__name__}, but it computes something else than the "
            "network they come from: pass model=, an instance of that very architecture"
        )


def save_result(directory: Path, result: Result, teacher: nn.Module, generator: nn.Module) -> None:
    """Write the student, the generator and then ``result.json`` into `directory`, which holds the teacher."""
    write_state_dict(directory / "student.safetensors", result.student.state_dict())
    write_state_dict(directory / "generator.safetensors", generator.state_dict())
    info = quantized_info(result.student) if is_as_quantized(result.student) else None
    description = {
        "format": FORMAT,
        "status": result.status,
        "steps": result.steps,
        "seed": result.seed,
        "recipe": result.recipe.to_dict(),
        "model": info.model if info else None,
        "model_class": type(result.student).__name__,
        "quantization": {
            "weight_bits": info.weight_bits if info else None,
            "act_bits": info.act_bits if info else None,
            "modules": module_bits(result.student),
        },
        "report": report(result.student).to_dict(),
        "metrics": result.metrics,
        "versions": {"adadfq": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "probes": {"student": probe(result.student, result.recipe), "teacher": probe(teacher, result.recipe)},
        "files": {
            name: files.sha256(directory / name)
            for name in ("student.safetensors", "teacher.safetensors", "generator.safetensors")
        },
    }
    files.write_json(directory / RESULT, description)


def read_result(path: str | Path) -> dict[str, Any]:
    """The contents of a run's ``result.json``.

    Raises:
        CheckpointError: not the directory of a run, unfinished without a result, unreadable, or of a newer format.
    """
    directory = Path(path)
    file = directory / RESULT
    if not file.is_file():
        if (directory / CHECKPOINT).is_file():
            raise CheckpointError(f"{directory} holds an unfinished run without a result; resume it, then load it")
        raise CheckpointError(f"{directory} is not the directory of a run: it has no {RESULT}")
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from None
    if not isinstance(result, dict) or result.get("format") != FORMAT:
        found = result.get("format") if isinstance(result, dict) else type(result).__name__
        raise CheckpointError(f"{file} has format {found!r}, this version of adadfq reads {FORMAT}; use a matching one")
    if missing := {"files", "model", "probes", "quantization", "recipe", "status"} - set(result):
        raise CheckpointError(f"{file} lacks {', '.join(sorted(missing))}; it was damaged or edited")
    return result


def load(
    path: str | Path,
    model: nn.Module | None = None,
    device: str | torch.device = "cpu",
    trust_model_code: bool = False,
) -> nn.Module:
    """The quantised network of a finished or interrupted run, in eval mode with frozen ranges.

    Args:
        path: the run's directory.
        model: the float network's architecture (any weights), where the run does not record how to build it. For a
            student that :func:`adadfq.quantize` did not make, or whose layers were replaced since: the quantised
            architecture itself.
        device: where to put it.
        trust_model_code: allow importing the module or file that the run names as the model's code. Built-in models
            and those of torchvision, pytorchcv and timm need no such consent.

    Raises:
        CheckpointError: the run cannot be read, a file is damaged, weights do not fit, or the model's code would have
            to be trusted.
        InvalidInputError: the model cannot be built.
    """
    result = read_result(path)
    widths = result["quantization"]
    architecture = _architecture(result, Path(path), model, trust_model_code)
    if widths["weight_bits"] is None:
        student = copy.deepcopy(architecture)
    else:
        student = quantize(architecture, widths["weight_bits"], widths["act_bits"])
        set_module_bits(student, widths["modules"])
    return _finished(student, "student", result, Path(path), device)


def load_teacher(
    path: str | Path,
    model: nn.Module | None = None,
    device: str | torch.device = "cpu",
    trust_model_code: bool = False,
) -> nn.Module:
    """The float network a run started from, in eval mode. Arguments and errors as :func:`load`."""
    result = read_result(path)
    teacher = copy.deepcopy(_architecture(result, Path(path), model, trust_model_code))
    return _finished(teacher, "teacher", result, Path(path), device)


PROBE_TOLERANCE = {"student": 0.1, "teacher": 0.02}


def _finished(
    model: nn.Module, name: str, result: Mapping[str, Any], directory: Path, device: str | torch.device
) -> nn.Module:
    """`model` with the run's weights of that name, in eval mode on `device`, proven to compute what it did."""
    _load_file(model, directory, f"{name}.safetensors", result["files"])
    model = model.to(device).eval()
    recipe = Recipe.from_dict(result["recipe"])
    _check_probe(model, result["probes"].get(name), recipe, PROBE_TOLERANCE[name], directory)
    return model


def _architecture(result: Mapping[str, Any], path: Path, model: nn.Module | None, trust_model_code: bool) -> nn.Module:
    if model is not None:
        if not isinstance(model, nn.Module):
            raise InvalidInputError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        return model
    if result["model"] is None:
        raise CheckpointError(
            f"{path} does not record how its {result.get('model_class', 'model')} is built: pass model=, an instance "
            "of the float network (any weights), or build the teacher with adadfq.build_model() before quantising"
        )
    return rebuild_model(result["model"], trust_model_code, source=str(path / RESULT))


def _load_file(model: nn.Module, directory: Path, name: str, hashes: Mapping[str, str]) -> None:
    file = directory / name
    state = read_state_dict(file)
    if files.sha256(file) != hashes.get(name):
        raise CheckpointError(f"{file} is not the file that {RESULT} describes: it was damaged or replaced")
    load_weights(model, state, str(file))
