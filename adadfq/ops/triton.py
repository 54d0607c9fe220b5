"""Triton backend: the kernels of :mod:`adadfq.kernels`, for CUDA devices where ``adadfq._C_cuda`` is missing or slower.

With ``TRITON_INTERPRET=1`` in the environment Triton runs kernels in Python, on CPU tensors and slowly: then this
backend serves those, where it is asked for by name.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from adadfq.ops import native_args, operators

NAME = "triton"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE_TYPE = "cpu" if INTERPRETED else "cuda"
DTYPES = native_args.DTYPES

#: Launcher -> the module of adadfq.kernels that has it.
_FAMILIES = {
    "fake_quantize": "fake_quantize",
    "fake_quantize_backward": "fake_quantize",
    "dynamic_fake_quantize": "dynamic_fake_quantize",
    "observe_fake_quantize": "observe_fake_quantize",
    "affine_act_fake_quantize": "affine_act_fake_quantize",
    "affine_act_fake_quantize_backward": "affine_act_fake_quantize",
    "foreach_fake_quantize": "learned_fake_quantize",
    "learned_fake_quantize_backward": "learned_fake_quantize",
    "affine_act_learned_fake_quantize_backward": "learned_fake_quantize",
    "bn_match": "bn_match",
    "bn_match_backward": "bn_match",
    "batch_norm_act": "batch_norm_act",
    "batch_norm_act_backward": "batch_norm_act",
    "margin_loss": "logit_losses",
    "entropy_distillation": "logit_losses",
}


@cache
def _load() -> tuple[dict[str, ModuleType], str | None]:
    """(modules, None), or ({}, why the kernels cannot be used)."""
    try:
        modules = {
            name: importlib.import_module(f"adadfq.kernels.{name}") for name in dict.fromkeys(_FAMILIES.values())
        }
    except ImportError as error:
        return {}, f"could not be imported ({error})"
    if not INTERPRETED and not torch.cuda.is_available():
        return {}, "no CUDA device"
    return modules, None


def why_unavailable() -> str | None:
    """Why the kernels cannot be used; None when they can."""
    return _load()[1]


def _kernels(family: str) -> ModuleType:
    return _load()[0][family]


def launch(op: str, launcher: str, x: Tensor, *arguments: Any) -> None:
    """See :class:`adadfq.ops.operators.Backend`. Triton launches on the current device's current stream."""
    with operators.device_guard(x):
        getattr(_kernels(_FAMILIES[launcher]), launcher)(*arguments)


KERNELS = operators.kernels(
    sys.modules[__name__],  # type: ignore[arg-type]
    operators.OPERATORS + operators.BATCH_NORM_ACT,
)


def __getattr__(name: str) -> Callable[..., Any]:
    return operators.attribute(__name__, KERNELS, name)
