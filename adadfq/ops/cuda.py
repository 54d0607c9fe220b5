"""CUDA backend: the kernels of csrc/cuda behind the extension module ``adadfq._C_cuda``."""

from __future__ import annotations

import importlib
import json
import sys
from array import array
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from adadfq.errors import BackendError
from adadfq.ops import gpu, native_args
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
    "dynamic_fake_quantize",
    "observe_fake_quantize",
    "affine_act_fake_quantize",
    "affine_act_quantize",
    "affine_act_fake_quantize_backward",
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


def _call(op: str, function: str, x: Tensor, *arguments: Any) -> None:
    """Queue `function` on the current stream of the device of `x`; only an emulated device has CPU tensors."""
    device = stream = 0
    if x.is_cuda:
        device = x.get_device()
        # The handle alone: a torch.cuda.Stream would be made for every call.
        stream = torch._C._cuda_getCurrentRawStream(device)
    try:
        with gpu.device_guard(x):
            if x.is_cuda:
                _warm_up(_native().warm_up, device)
            getattr(_native(), function)(*arguments, DTYPE_NUMBERS[x.dtype], device, stream)
    except RuntimeError as error:
        raise BackendError(
            f"{op} failed on {x.device} for {x.dtype} {list(x.shape)}: {error} (of this launch, or of a kernel queued "
            "before; CUDA_LAUNCH_BLOCKING=1 tells which); ADADFQ_BACKEND=reference avoids this one"
        ) from error


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _scratch(x: Tensor, doubles: int) -> Tensor:
    """Memory that a call is done with when the next on the same stream begins."""
    return torch.empty(doubles, dtype=torch.float64, device=x.device)


def _channel_scratch(x: Tensor, channels: int) -> Tensor:
    return _scratch(x, _partial_doubles(_native().partial_doubles, channels))


def _fake_quantize(
    op: str, x: Tensor, scale: Tensor, zero_point: Tensor, out: Tensor, channels: int, inner: int, bits: int
) -> None:
    layout = Layout(x.numel() // (channels * inner), channels, inner)
    pointers = (x.data_ptr(), scale.data_ptr(), zero_point.data_ptr(), out.data_ptr())
    _call(op, "fake_quantize", x, *pointers, *layout, bits)


def _fake_quantize_backward(
    op: str,
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    out: Tensor,
    channels: int,
    inner: int,
    bits: int,
) -> None:
    layout = Layout(x.numel() // (channels * inner), channels, inner)
    pointers = (grad.data_ptr(), x.data_ptr(), scale.data_ptr(), zero_point.data_ptr(), out.data_ptr())
    _call(op, "fake_quantize_backward", x, *pointers, *layout, bits)


def _dynamic_fake_quantize(op: str, calls: list[tuple[Tensor, Tensor, Tensor, Tensor, Layout, int]]) -> None:
    structs = array("q")
    for x, out, scale, zero_point, layout, bits in calls:
        # The fields of DynamicTensor in csrc/common/dynamic_tensor.h.
        structs.extend((x.data_ptr(), out.data_ptr(), scale.data_ptr(), zero_point.data_ptr(), *layout, bits))
    first = calls[0][0]
    longest = _native().longest_row
    channels = [call[4].channels for call in calls if call[4].outer != 1 or call[4].inner > longest]
    scratch = _channel_scratch(first, max(channels)) if channels else None
    _call(op, "dynamic_fake_quantize", first, structs.buffer_info()[0], len(calls), _address(scratch))


def _observe_fake_quantize(
    op: str,
    x: Tensor,
    out: Tensor,
    running_min: Tensor,
    running_max: Tensor,
    num_batches: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bits: int,
    momentum: float,
) -> None:
    scratch = _channel_scratch(x, 1)
    _call(
        op,
        "observe_fake_quantize",
        x,
        x.data_ptr(),
        out.data_ptr(),
        x.numel(),
        running_min.data_ptr(),
        running_max.data_ptr(),
        num_batches.data_ptr(),
        scale.data_ptr(),
        zero_point.data_ptr(),
        scratch.data_ptr(),
        bits,
        momentum,
    )


def _affine_act_fake_quantize(
    op: str,
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    act: int,
    act_scale: Tensor | None,
    act_zero_point: Tensor | None,
    out: Tensor,
    channels: int,
    inner: int,
    bits: int,
) -> None:
    _call(
        op,
        "affine_act_quantize" if out.dtype is torch.uint8 else "affine_act_fake_quantize",
        x,
        x.data_ptr(),
        scale.data_ptr(),
        shift.data_ptr(),
        _address(residual),
        act,
        _address(act_scale),
        _address(act_zero_point),
        bits,
        out.data_ptr(),
        x.numel() // (channels * inner),
        channels,
        inner,
    )


def _affine_act_fake_quantize_backward(
    op: str,
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    act: int,
    grad_x: Tensor,
    grad_residual: Tensor | None,
    grad_scale: Tensor | None,
    grad_shift: Tensor | None,
    layout: Layout,
) -> None:
    # Nothing is summed where the parameters have no gradient.
    scratch = None if grad_scale is None else _channel_scratch(x, layout.channels)
    _call(
        op,
        "affine_act_fake_quantize_backward",
        x,
        grad.data_ptr(),
        x.data_ptr(),
        scale.data_ptr(),
        shift.data_ptr(),
        _address(residual),
        act,
        grad_x.data_ptr(),
        _address(grad_residual),
        _address(grad_scale),
        _address(grad_shift),
        _address(scratch),
        *layout,
    )


def _quantize_pack(
    op: str, x: Tensor, scale: Tensor, zero_point: Tensor, packed: Tensor, layout: Layout, bits: int
) -> None:
    pointers = (x.data_ptr(), scale.data_ptr(), zero_point.data_ptr(), packed.data_ptr())
    _call(op, "quantize_pack", x, *pointers, *layout, bits)


def _unpack_dequantize(
    op: str, packed: Tensor, scale: Tensor, zero_point: Tensor, out: Tensor, layout: Layout, bits: int
) -> None:
    pointers = (packed.data_ptr(), scale.data_ptr(), zero_point.data_ptr(), out.data_ptr())
    _call(op, "unpack_dequantize", out, *pointers, *layout, bits)


def _bn_match(
    op: str,
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    y: Tensor | None,
    loss: Tensor,
    mean: Tensor,
    var: Tensor,
    layout: Layout,
) -> None:
    scratch = _channel_scratch(x, layout.channels)
    _call(
        op,
        "bn_match",
        x,
        x.data_ptr(),
        running_mean.data_ptr(),
        running_var.data_ptr(),
        _address(weight),
        _address(bias),
        eps,
        _address(y),
        loss.data_ptr(),
        mean.data_ptr(),
        var.data_ptr(),
        scratch.data_ptr(),
        *layout,
    )


def _bn_match_backward(
    op: str,
    grad_y: Tensor | None,
    grad_loss: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    eps: float,
    out: Tensor,
    layout: Layout,
) -> None:
    _call(
        op,
        "bn_match_backward",
        x,
        _address(grad_y),
        grad_loss.data_ptr(),
        x.data_ptr(),
        mean.data_ptr(),
        var.data_ptr(),
        running_mean.data_ptr(),
        running_var.data_ptr(),
        _address(weight),
        eps,
        out.data_ptr(),
        *layout,
    )


#: Float64 numbers that the losses on logits keep for a row.
_ROW_DOUBLES = 5


def _margin_loss(op: str, teacher: Tensor, student: Tensor, labels: Tensor, *results_and_settings: Any) -> None:
    *results, lambda_l, lambda_u, alpha_ds, alpha_as, beta, detach_min = results_and_settings
    batch, classes = teacher.shape
    scratch = _scratch(teacher, _ROW_DOUBLES * batch)
    _call(
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
    _call(op, "entropy_distillation", teacher, *pointers, batch, classes, temperature)


#: Launcher -> what calls its function of the extension module: the launcher's arguments behind the operator's name.
_LAUNCHERS: dict[str, Callable[..., None]] = {
    "fake_quantize": _fake_quantize,
    "fake_quantize_backward": _fake_quantize_backward,
    "dynamic_fake_quantize": _dynamic_fake_quantize,
    "observe_fake_quantize": _observe_fake_quantize,
    "affine_act_fake_quantize": _affine_act_fake_quantize,
    "affine_act_fake_quantize_backward": _affine_act_fake_quantize_backward,
    "quantize_pack": _quantize_pack,
    "unpack_dequantize": _unpack_dequantize,
    "bn_match": _bn_match,
    "bn_match_backward": _bn_match_backward,
    "margin_loss": _margin_loss,
    "entropy_distillation": _entropy_distillation,
}


def launch(op: str, launcher: str, x: Tensor, *arguments: Any) -> None:
    """See :class:`adadfq.ops.gpu.Backend`."""
    _LAUNCHERS[launcher](op, *arguments)


KERNELS = gpu.kernels(sys.modules[__name__], gpu.OPERATORS + gpu.PACKING)  # type: ignore[arg-type]
