"""What tests/test_step_on_fake_cuda.py has run in a process of its own: steps on fake CUDA tensors, one JSON a line."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))  # which -m does not
from toy import toy_recipe, toy_teacher

import adadfq
from adadfq.nn import activations
from benchmarks import fake_cuda


def _trainer(fuse: bool, precision: str, generator: str) -> adadfq.Trainer:
    teacher = toy_teacher()
    recipe = toy_recipe(precision=precision, generator=generator)
    return adadfq.Trainer(teacher, adadfq.quantize(teacher, 4, 4), recipe, fuse=fuse, progress=False)


def _steps(trainer: adadfq.Trainer, train_student: bool, calibrating: bool) -> dict[str, Any]:
    for act in activations(trainer.student).values():
        act.set_calibrating(calibrating)
    # The first makes the optimizers' state.
    metrics = [trainer.play(train_student) for _ in range(2)][-1]
    parameters = trainer.game.generator_parameters + train_student * trainer.game.student_parameters
    return {
        "metrics": [str(metrics.device), str(metrics.dtype), *metrics.shape],
        "gradients": sorted({str(p.grad.device) for p in parameters if p.grad is not None}),
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
                trainer = _trainer(fuse, precision, generator)
                with fake_cuda.mode():
                    fake_cuda.to_fake(trainer)
                    for train_student in (False, True):
                        for calibrating in (True, False):
                            case = [fuse, precision, generator, train_student, calibrating]
                            print(json.dumps({"case": case, **_steps(trainer, train_student, calibrating)}))


if __name__ == "__main__":
    main()
