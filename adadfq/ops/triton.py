"""Triton backend: the kernels of :mod:`adadfq.kernels`, for CUDA devices where ``adadfq._C_cuda`` was not built."""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from adadfq.ops import native_args

NAME = "triton"
DEVICE_TYPE = "cuda"
DTYPES = native_args.DTYPES


@cache
def _load() -> tuple[ModuleType | None, str | None]:
    """(module, None), or (None, why the kernels cannot be used)."""
    try:
        module = importlib.import_module("adadfq.kernels.fake_quantize")
    except ImportError as error:
        return None, f"could not be imported ({error})"
    if not torch.cuda.is_available():
        return None, "no CUDA device"
    return module, None


def why_unavailable() -> str | None:
    """Why the kernels cannot be used; None when they can."""
    return _load()[1]


def _kernels() -> Any:
    return _load()[0]


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int, axis: int | None = None) -> Tensor:
    """See :func:`adadfq.ops.reference.fake_quantize`; the same arithmetic."""
    op = "fake_quantize"
    out = torch.empty_like(x)
    if x.numel() == 0:
        return out
    x, scale, zero_point, layout = native_args.quantizer(op, x, scale, zero_point, bits, axis, DEVICE_TYPE)
    with torch.cuda.device(x.device):
        _kernels().fake_quantize(x, scale, zero_point, out, layout.channels, layout.inner, bits)
    return out


def fake_quantize_backward(
    grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, bits: int, axis: int | None = None
) -> Tensor:
    """See :func:`adadfq.ops.reference.fake_quantize_backward`; the same arithmetic."""
    op = "fake_quantize_backward"
    out = torch.empty_like(x)
    if x.numel() == 0:
        return out
    x, scale, zero_point, layout = native_args.quantizer(op, x, scale, zero_point, bits, axis, DEVICE_TYPE)
    grad = native_args.like(op, "grad", grad, x)
    with torch.cuda.device(x.device):
        _kernels().fake_quantize_backward(grad, x, scale, zero_point, out, layout.channels, layout.inner, bits)
    return out


KERNELS = {"fake_quantize": fake_quantize, "fake_quantize_backward": fake_quantize_backward}
