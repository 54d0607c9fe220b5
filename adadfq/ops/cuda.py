"""CUDA backend: the kernels of csrc/cuda behind the extension module ``adadfq._C_cuda``."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from adadfq.errors import BackendError
from adadfq.ops import addresses, native_args, operators
from adadfq.ops.native_args import DTYPE_NUMBERS, Layout

NAME = "cuda"
DEVICE_TYPE = "cuda"
#: What emulates the device on the host replaces DEVICE_TYPE, this and :func:`_load`, and nothing else.
INTERPRETED = False
DTYPES = native_args.DTYPES

#: What the extension module must have.
FUNCTIONS = (
    "fake_quantize",
    "fake_quantize_backward",
    "learned_fake_quantize_backward",
    "foreach_fake_quantize",
    "dynamic_fake_quantize",
    "observe_fake_quantize",
    "affine_act_fake_quantize",
    "affine_act_quantize",
    "affine_act_fake_quantize_backward",
    "affine_act_learned_fake_quantize_backward",
    "quantize_pack",
    "unpack_dequantize",
    "bn_match",
    "bn_match_backward",
    "margin_loss",
    "entropy_distillation",
    "partial_doubles",
    "longest_row",
    "warm_up",
)


@cache
def build_info() -> dict[str, Any]:
    """What the build recorded: "cxx", "cuda_left_out" (why, or None), and with CUDA "nvcc" and "cuda_archs".

    Empty where the package was never built.
    """
    try:
        name = f"_build_info.{sys.implementation.cache_tag}.json"  # every Python has modules of its own
        return json.loads(Path(__file__).parents[1].joinpath(name).read_text())
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
    if missing := [name for name in FUNCTIONS if not hasattr(module, name)]:
        return None, f"built from other sources, without {', '.join(missing)}: build it again with 'pip install -e .'"
    if not torch.cuda.is_available():
        return None, "no CUDA device"
    archs = info.get("cuda_archs", [])
    for index in range(torch.cuda.device_count() if archs else 0):
        major, minor = torch.cuda.get_device_capability(index)
        if not runs_on(archs, (major, minor)):
            built, name = ", ".join(f"sm_{arch}" for arch in archs), torch.cuda.get_device_name(index)
            return None, (
                f"built for {built}, which does not run on cuda:{index} ({name}): build again with "
                f"ADADFQ_CUDA_ARCHS={major}{minor}, or leave the device out of CUDA_VISIBLE_DEVICES"
            )
    return module, None


def why_unavailable() -> str | None:
    """Why the kernels cannot be used; None when they can."""
    return _load()[1]


def _native() -> Any:
    return _load()[0]


@cache
def _warm_up(native_warm_up: Callable[[int], None], device: int) -> None:
    """Before the first launch on a device: rather in an eager call than in the capture of a graph, which works too."""
    native_warm_up(device)


@cache
def _partial_doubles(native_partial_doubles: Callable[[int], int], channels: int) -> int:
    return native_partial_doubles(channels)


def call(op: str, function: str, x: Tensor, *arguments: Any) -> None:
    """Queue `function` on the current stream of the device of `x`; only an emulated device has CPU tensors."""
    device = stream = 0
    if x.is_cuda:
        device = x.get_device()
        # The handle alone: a torch.cuda.Stream would be made for every call.
        stream = torch._C._cuda_getCurrentRawStream(device)
    try:
        with operators.device_guard(x):
            if x.is_cuda:
                _warm_up(_native().warm_up, device)
            getattr(_native(), function)(*arguments, DTYPE_NUMBERS[x.dtype], device, stream)
    except RuntimeError as error:
        raise BackendError(
            f"{op} failed on {x.device} for {x.dtype} {list(x.shape)}: {error} (of this launch, or of a kernel queued "
            "before; CUDA_LAUNCH_BLOCKING=1 tells which); ADADFQ_BACKEND=reference avoids this one"
        ) from error


def _scratch(x: Tensor, doubles: int) -> Tensor:
    """Memory that a call is done with when the next on the same stream begins."""
    return torch.empty(doubles, dtype=torch.float64, device=x.device)


def channel_scratch(x: Tensor, channels: int) -> tuple[Tensor | None, ...]:
    """See :class:`adadfq.ops.addresses.Module`."""
    if channels == 0:
        return (None,)
    return (_scratch(x, _partial_doubles(_native().partial_doubles, channels)),)


def range_scratch(x: Tensor, layouts: list[Layout]) -> tuple[Tensor | None, ...]:
    """See :class:`adadfq.ops.addresses.Module`; channels that are rows of moderate length need none."""
    longest = _native().longest_row
    channels = [layout.channels for layout in layouts if layout.outer != 1 or layout.inner > longest]
    return channel_scratch(x, max(channels, default=0))


#: Float64 numbers that the losses on logits keep for a row.
_ROW_DOUBLES = 5


def _margin_loss(op: str, teacher: Tensor, student: Tensor, labels: Tensor, *results_and_settings: Any) -> None:
    *results, lambda_l, lambda_u, alpha_ds, alpha_as, beta, detach_min = results_and_settings
    batch, classes = teacher.shape
    scratch = _scratch(teacher, _ROW_DOUBLES * batch)
    call(
        op,
        "margin_loss",
        teacher,
        teacher.data_ptr(),
        student.data_ptr(),
        labels.data_ptr(),
        *(result.data_ptr() for result in results),
        scratch.data_ptr(),
        batch,
        classes,
        lambda_l,
        lambda_u,
        alpha_ds,
        alpha_as,
        beta,
        detach_min,
    )


def _entropy_distillation(
    op: str, teacher: Tensor, student: Tensor, loss: Tensor, grad_student: Tensor, temperature: float
) -> None:
    batch, classes = teacher.shape
    scratch = _scratch(teacher, _ROW_DOUBLES * batch)
    pointers = (teacher.data_ptr(), student.data_ptr(), loss.data_ptr(), grad_student.data_ptr(), scratch.data_ptr())
    call(op, "entropy_distillation", teacher, *pointers, batch, classes, temperature)


_LAUNCHERS = addresses.Launchers(sys.modules[__name__])  # type: ignore[arg-type]
_LOSSES = {"margin_loss": _margin_loss, "entropy_distillation": _entropy_distillation}


def launch(op: str, launcher: str, x: Tensor, *arguments: Any) -> None:
    """See :class:`adadfq.ops.operators.Backend`."""
    (_LOSSES.get(launcher) or getattr(_LAUNCHERS, launcher))(op, *arguments)


KERNELS = operators.kernels(sys.modules[__name__], operators.OPERATORS + operators.PACKING)  # type: ignore[arg-type]
