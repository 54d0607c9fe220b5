"""CUDA backend: the kernels of csrc/cuda behind the extension module ``adadfq._C_cuda``."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from adadfq.errors import BackendError
from adadfq.ops import native_args
from adadfq.ops.native_args import DTYPE_NUMBERS

NAME = "cuda"
DEVICE_TYPE = "cuda"
DTYPES = native_args.DTYPES


@cache
def build_info() -> dict[str, Any]:
    """What the build recorded: "cxx", "cuda_left_out" (why, or None), and with CUDA "nvcc" and "cuda_archs".

    Empty where the package was never built.
    """
    try:
        return json.loads(Path(__file__).parents[1].joinpath("_build_info.json").read_text())
    except FileNotFoundError:
        return {}


def runs_on(archs: Iterable[str], capability: tuple[int, int]) -> bool:
    """Whether code for `archs` ("80", ...) with PTX for the newest runs on a GPU of this compute capability."""
    built = [divmod(int(arch), 10) for arch in archs]
    machine_code = any(major == capability[0] and minor <= capability[1] for major, minor in built)
    return machine_code or max(built) <= capability


@cache
def _load() -> tuple[ModuleType | None, str | None]:
    """(module, None), or (None, why the kernels cannot be used)."""
    info = build_info()
    if reason := info.get("cuda_left_out"):
        return None, f"not built: {reason}"
    try:
        module = importlib.import_module("adadfq._C_cuda")
    except ImportError as error:
        return None, f"not built: adadfq._C_cuda could not be imported ({error})"
    if not torch.cuda.is_available():
        return None, "no CUDA device"
    archs = info.get("cuda_archs", [])
    for index in range(torch.cuda.device_count() if archs else 0):
        if not runs_on(archs, torch.cuda.get_device_capability(index)):
            name = torch.cuda.get_device_name(index)
            return None, f"built for {', '.join(f'sm_{arch}' for arch in archs)}, which does not run on {name}"
    return module, None


def why_unavailable() -> str | None:
    """Why the kernels cannot be used; None when they can."""
    return _load()[1]


def _launch(op: str, x: Tensor, *arguments: Any) -> None:
    """Queue `op` on the current stream of `x`'s device."""
    stream = torch.cuda.current_stream(x.device).cuda_stream
    try:
        with torch.cuda.device(x.device):
            getattr(_load()[0], op)(*arguments, DTYPE_NUMBERS[x.dtype], x.device.index, stream)
    except RuntimeError as error:
        raise BackendError(
            f"{op} failed on {x.device} for {x.dtype} {list(x.shape)}: {error}; ADADFQ_BACKEND=reference avoids it"
        ) from error


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int, axis: int | None = None) -> Tensor:
    """See :func:`adadfq.ops.reference.fake_quantize`; the same arithmetic."""
    op = "fake_quantize"
    out = torch.empty_like(x)
    if x.numel() == 0:
        return out
    x, scale, zero_point, layout = native_args.quantizer(op, x, scale, zero_point, bits, axis, DEVICE_TYPE)
    pointers = (x.data_ptr(), scale.data_ptr(), zero_point.data_ptr(), out.data_ptr())
    _launch(op, x, *pointers, *layout, bits)
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
    pointers = (grad.data_ptr(), x.data_ptr(), scale.data_ptr(), zero_point.data_ptr(), out.data_ptr())
    _launch(op, x, *pointers, *layout, bits)
    return out


KERNELS = {"fake_quantize": fake_quantize, "fake_quantize_backward": fake_quantize_backward}
