"""What tests/test_step_on_fake_cuda.py has run in a process of its own: steps on fake CUDA tensors, one JSON a line."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parent))  # which -m does not
from toy import plus_settings, toy_recipe, toy_teacher

import adadfq
from adadfq.nn import activations, set_calibrating, step_sizes
from benchmarks import fake_cuda

#: Options beyond the paper that change a step; the schedule of learning rates is the host's.
OPTIONS: dict[str, dict[str, Any]] = {
    "weight_range": {"weight_range": "mse"},
    "learn_steps": {"learn_steps": True},
    "feature_weight": {"feature_weight": 3.0},
    "low_pass": {"low_pass": 0.5},
    "crop and flip": {"crop": 1, "flip": True},
    "mirror_teacher": {"mirror_teacher": True},
    "bank": {"replays": 1, "bank_batches": 2},
    "no bank": {"replays": 1, "bank_batches": 0},
    "generator_ema": {"replays": 1, "bank_batches": 0, "generator_ema": 0.9},
    "spectral_norm": {"spectral_norm": True},
    "spectral_norm, conditional": {"spectral_norm": True, "generator": "conditional_bn"},
    "adam": {"student_optimizer": "adam"},
    "adadfq_plus": plus_settings(),
}
#: All that go together; replays from a bank, and then from an average of the generator.
_ALL = {name: value for option in OPTIONS.values() for name, value in option.items()} | OPTIONS["adadfq_plus"]
OPTIONS["all, bank"] = {**_ALL, "generator_ema": 0.0, "bank_batches": 2}
OPTIONS["all, generator_ema"] = {**_ALL, "generator_ema": 0.9, "bank_batches": 0}


def _trainer(fuse: bool, precision: str, **settings: Any) -> adadfq.Trainer:
    teacher = toy_teacher()
    recipe = toy_recipe(precision=precision, **settings)
    return adadfq.Trainer(teacher, adadfq.quantize(teacher, 4, 4), recipe, fuse=fuse, progress=False)


def _begin(trainer: adadfq.Trainer) -> None:
    """What a run does on its way to the student's training, which may wait for the device."""
    for images in trainer._some_images():
        trainer.student(images)
    set_calibrating(trainer.student, False)
    trainer._begin_student()


def _steps(trainer: adadfq.Trainer, train_student: bool, calibrating: bool) -> dict[str, Any]:
    for act in activations(trainer.student).values():
        act.set_calibrating(calibrating)
    # The first makes the optimizers' state.
    metrics = [trainer.play(train_student) for _ in range(2)][-1]
    parameters = trainer.game.generator_parameters + train_student * trainer.game.student_parameters
    return _described(metrics, parameters)


def _described(metrics: torch.Tensor, parameters: list[torch.nn.Parameter]) -> dict[str, Any]:
    return {
        "metrics": [str(metrics.device), str(metrics.dtype), *metrics.shape],
        "gradients": sorted({str(p.grad.device) for p in parameters if p.grad is not None}),
        "without gradient": sum(p.grad is None for p in parameters),
    }


class _Products(TorchDispatchMode):
    """Collects the dtypes of matrix-vector products, which are the spectral norms'."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.mv.default:
            self.dtypes.add(str(result.dtype))
        return result


def _option_steps(trainer: adadfq.Trainer) -> dict[str, Any]:
    """Two steps of both players, each followed by the replays that the recipe asks for."""
    game, replay = trainer.game, None
    with _Products() as products:
        for _ in range(2):
            described = _described(trainer.play(), game.generator_parameters + game.student_parameters)
            for _ in range(trainer.recipe.replays):
                replay = _described(trainer.replay(), game.student_parameters)
    kept = [] if game.bank is None else game.bank._kept
    return {
        **described,
        "replay": replay,
        "bank": sorted({str(tensor.device) for tensor in kept}),
        "learned": len(step_sizes(trainer.student)),
        "norms": sorted(products.dtypes),
    }


def _error(function: Callable[[torch.Tensor], Any]) -> str | None:
    try:
        function(torch.ones(3, device="cuda", requires_grad=True))
    except RuntimeError as error:
        return type(error).__name__
    return None


#: Name -> what must not go unseen in a step.
WAITING: dict[str, Callable[[torch.Tensor], Any]] = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool(x.sum() > 0),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "cpu": lambda x: x.cpu(),
    "numpy": lambda x: x.detach().cpu().numpy(),
    "tolist": lambda x: x.tolist(),
    "to the device": lambda x: x + torch.tensor([1.0, 2.0, 3.0]).to("cuda"),
    "copied in": lambda x: x.detach().copy_(torch.ones(3)),
    "in a backward": lambda x: (x.register_hook(lambda grad: grad.sum().item()), x.sum().backward()),
}


def main() -> None:
    warnings.simplefilter("error")  # such as autocast's, that it switched itself off
    with fake_cuda.mode():
        for name, function in WAITING.items():
            print(json.dumps({"waiting": name, "error": _error(function)}))
    for fuse in (True, False):
        for precision in ("float32", "bfloat16"):
            for generator in ("label_embedding", "conditional_bn"):
                trainer = _trainer(fuse, precision, generator=generator)
                with fake_cuda.mode():
                    fake_cuda.to_fake(trainer)
                    for train_student in (False, True):
                        for calibrating in (True, False):
                            case = [fuse, precision, generator, train_student, calibrating]
                            print(json.dumps({"case": case, **_steps(trainer, train_student, calibrating)}))
            for name, settings in OPTIONS.items():
                trainer = _trainer(fuse, precision, **settings)
                _begin(trainer)
                with fake_cuda.mode():
                    fake_cuda.to_fake(trainer)
                    print(json.dumps({"option": [name, fuse, precision], **_option_steps(trainer)}))


if __name__ == "__main__":
    main()
