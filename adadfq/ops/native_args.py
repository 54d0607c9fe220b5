"""Checks every tensor before its address leaves Python, and says how native code is to walk it.

Native kernels see a dense tensor as [outer, channels, inner] in memory order, whatever its strides; see
csrc/cpu/channelwise.h. ``data_ptr()`` belongs in op bodies only, on tensors that came through here.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from adadfq.errors import InvalidInputError

#: dtype -> the number csrc/common/dtype.h gives it.
DTYPE_NUMBERS: dict[torch.dtype, int] = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

#: The dtypes native kernels take.
DTYPES: frozenset[torch.dtype] = frozenset(DTYPE_NUMBERS)


class Layout(NamedTuple):
    """Memory order of a dense tensor: element i belongs to channel ``(i // inner) % channels``."""

    outer: int
    channels: int
    inner: int


def is_dense(x: Tensor) -> bool:
    """Whether the elements of `x` fill one block of memory, each address once, in any order of dimensions."""
    if x.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted((st, n) for st, n in zip(x.stride(), x.shape, strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _refuse(op: str, name: str, problem: str) -> InvalidInputError:
    return InvalidInputError(f"{op}: {name} {problem}")


def _check_kind(op: str, name: str, tensor: Tensor, device: torch.device, dtype: torch.dtype) -> None:
    if tensor.layout is not torch.strided or tensor.is_neg() or tensor.is_conj():
        raise _refuse(op, name, f"must be a plain strided tensor, got layout {tensor.layout}; make it dense first")
    if tensor.device != device:
        raise _refuse(op, name, f"must be on {device}, got {tensor.device}; move it there first")
    if tensor.dtype is not dtype:
        raise _refuse(op, name, f"must be {dtype}, got {tensor.dtype}; convert it first")


def main_tensor(op: str, name: str, x: Tensor, device_type: str) -> Tensor:
    """`x` itself where it is dense, else a dense copy with the strides ``torch.empty_like(x)`` has.

    Args:
        op: operator, for error messages.
        name: argument, for error messages.
        x: float32, bfloat16 or float16, any shape.
        device_type: where `x` must be.

    Raises:
        InvalidInputError: wrong device or dtype, or not a strided tensor.
    """
    if x.device.type != device_type:
        raise _refuse(op, name, f"must be on a {device_type} device, got {x.device}; move it there first")
    if x.dtype not in DTYPE_NUMBERS:
        expected = ", ".join(str(dtype) for dtype in DTYPE_NUMBERS)
        raise _refuse(op, name, f"must be one of {expected}, got {x.dtype}; convert it first")
    _check_kind(op, name, x, x.device, x.dtype)
    return x if x.is_contiguous() or is_dense(x) else torch.empty_like(x).copy_(x)


def like(op: str, name: str, tensor: Tensor, main: Tensor) -> Tensor:
    """`tensor` itself where it has the strides of `main` (which is dense), else a copy that has.

    Raises:
        InvalidInputError: device, dtype or shape differ from those of `main`.
    """
    _check_kind(op, name, tensor, main.device, main.dtype)
    if tensor.shape != main.shape:
        raise _refuse(op, name, f"must have shape {list(main.shape)}, got {list(tensor.shape)}")
    return tensor if tensor.stride() == main.stride() else torch.empty_like(main).copy_(tensor)


def vector(op: str, name: str, tensor: Tensor, length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`tensor` contiguous, after a check that it has `length` values of `dtype` on `device` and at most one dimension.

    Raises:
        InvalidInputError: device, dtype or shape are others.
    """
    # Said in one expression first: a call checks up to six of these.
    if not (
        tensor.dtype is dtype
        and tensor.numel() == length
        and tensor.dim() <= 1
        and tensor.device == device
        and tensor.layout is torch.strided
        and not tensor.is_neg()
    ):
        _check_kind(op, name, tensor, device, dtype)
        raise _refuse(op, name, f"must have shape [{length}], got {list(tensor.shape)}")
    return tensor if tensor.is_contiguous() else tensor.contiguous()


def check_bits(op: str, bits: int) -> None:
    """Raise unless `bits` is in 2..8: native code shifts by it."""
    if not 2 <= bits <= 8:
        raise _refuse(op, "bits", f"must be 2..8, got {bits}")


def scalar(op: str, name: str, tensor: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`tensor` itself, after a check that it holds one value of `dtype` on `device`.

    Raises:
        InvalidInputError: device, dtype or size are others.
    """
    _check_kind(op, name, tensor, device, dtype)
    if tensor.numel() != 1:
        raise _refuse(op, name, f"must hold one element, got shape {list(tensor.shape)}")
    return tensor


def logits(op: str, teacher: Tensor, student: Tensor, device_type: str) -> tuple[Tensor, Tensor]:
    """Both tensors contiguous, after a check that they are [B, K] alike with B, K >= 1.

    Raises:
        InvalidInputError: wrong device, dtype or shape.
    """
    teacher = main_tensor(op, "teacher_logits", teacher, device_type)
    if teacher.dim() != 2 or teacher.numel() == 0:
        raise _refuse(op, "teacher_logits", f"must have shape [B, K] with B, K >= 1, got {list(teacher.shape)}")
    teacher = teacher.contiguous()
    return teacher, like(op, "student_logits", student, teacher)


def layout(op: str, x: Tensor, axis: int | None) -> Layout:
    """How to walk dense `x` with channels along `axis`; one channel where `axis` is None.

    Raises:
        InvalidInputError: `axis` is not a dimension of `x`.
    """
    if axis is None:
        return Layout(1, 1, x.numel())
    if not 0 <= axis < x.dim():
        raise _refuse(op, "axis", f"must be in 0..{x.dim() - 1} for {x.dim()} dimensions, got {axis}")
    channels = x.shape[axis]
    if channels <= 1:  # such a dimension may have any stride
        return Layout(1, 1, x.numel())
    inner = x.stride(axis)
    return Layout(x.numel() // (channels * inner), channels, inner)


def sample_layout(op: str, x: Tensor, per_sample: bool) -> tuple[Tensor, Layout, int]:
    """(x, layout, samples) for dense `x` with channels in dimension 1 and, maybe, parameters for each of dimension 0.

    Without `per_sample` there is one sample. With it each is a block of memory: `x` whose dimension 0 is not the
    outermost is copied.
    """
    if not per_sample or x.shape[0] == 1:
        return x, layout(op, x, 1), 1
    samples = x.shape[0]
    if x.stride(0) != x.numel() // samples:
        x = x.contiguous()
    # A single channel may have any stride, and `layout` then sees no samples.
    return x, layout(op, x, 1) if x.shape[1] > 1 else Layout(samples, 1, x.numel() // samples), samples


def per_sample_vector(op: str, name: str, tensor: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor` contiguous, after a check that it is [C] or [N, C] of `dtype` on the device of `x`.

    Raises:
        InvalidInputError: device, dtype or shape are others.
    """
    _check_kind(op, name, tensor, x.device, dtype)
    if tensor.shape not in (x.shape[:2], x.shape[1:2]):
        raise _refuse(
            op, name, f"must have shape {list(x.shape[1:2])} or {list(x.shape[:2])}, got {list(tensor.shape)}"
        )
    return tensor.contiguous()


def quantizer(
    op: str, x: Tensor, scale: Tensor, zero_point: Tensor, bits: int, axis: int | None, device_type: str
) -> tuple[Tensor, Tensor, Tensor, Layout]:
    """(x, scale, zero_point, layout) of a fake quantisation, checked and dense; `x` must not be empty.

    Raises:
        InvalidInputError: wrong device, dtype, shape or width.
    """
    check_bits(op, bits)
    x = main_tensor(op, "x", x, device_type)
    found = layout(op, x, axis)
    scale = vector(op, "scale", scale, found.channels, torch.float32, x.device)
    return x, scale, vector(op, "zero_point", zero_point, found.channels, torch.int32, x.device), found
