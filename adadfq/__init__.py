"""Data-free quantisation of vision networks to 2-8 bits by an adaptive generator (AdaDFQ, CVPR 2023)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from adadfq.version import __version__ as __version__

if TYPE_CHECKING:
    from adadfq import functional as functional
    from adadfq.convert import quantize as quantize
    from adadfq.convert import report as report
    from adadfq.errors import AdadfqError as AdadfqError
    from adadfq.errors import BackendError as BackendError
    from adadfq.errors import CheckpointError as CheckpointError
    from adadfq.errors import InvalidInputError as InvalidInputError
    from adadfq.fusion import fuse as fuse
    from adadfq.fusion import unfuse as unfuse
    from adadfq.held_out import HeldOut as HeldOut
    from adadfq.models.build import build_model as build_model
    from adadfq.nn import QuantAct as QuantAct
    from adadfq.nn import QuantConv2d as QuantConv2d
    from adadfq.nn import QuantLinear as QuantLinear
    from adadfq.ops.dispatch import use_backend as use_backend
    from adadfq.recipe import Recipe as Recipe
    from adadfq.result import Result as Result
    from adadfq.result import load as load
    from adadfq.trainer import Trainer as Trainer

#: Public name -> module that defines it (None: a submodule). Imported when first asked for, so that
#: ``adadfq --help`` does not wait for torch.
_PUBLIC: dict[str, str | None] = {
    "AdadfqError": "adadfq.errors",
    "BackendError": "adadfq.errors",
    "CheckpointError": "adadfq.errors",
    "HeldOut": "adadfq.held_out",
    "InvalidInputError": "adadfq.errors",
    "QuantAct": "adadfq.nn",
    "QuantConv2d": "adadfq.nn",
    "QuantLinear": "adadfq.nn",
    "Recipe": "adadfq.recipe",
    "Result": "adadfq.result",
    "Trainer": "adadfq.trainer",
    "build_model": "adadfq.models.build",
    "functional": None,
    "fuse": "adadfq.fusion",
    "load": "adadfq.result",
    "quantize": "adadfq.convert",
    "report": "adadfq.convert",
    "unfuse": "adadfq.fusion",
    "use_backend": "adadfq.ops.dispatch",
}

__all__ = sorted(["__version__", *_PUBLIC])


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'adadfq' has no attribute {name!r}")
    module = _PUBLIC[name]
    value = (
        importlib.import_module(f"adadfq.{name}") if module is None else getattr(importlib.import_module(module), name)
    )
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
