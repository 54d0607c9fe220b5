"""Argument checks shared by functions, modules and recipes: refuse bad input before anything is changed."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from adadfq.errors import InvalidInputError

MIN_BITS, MAX_BITS = 2, 8


def check_bits(name: str, bits: Any) -> int:
    """Return `bits` if it is an integer in 2..8; otherwise raise :class:`InvalidInputError` naming `name`."""
    if type(bits) is int and MIN_BITS <= bits <= MAX_BITS:
        return bits
    if not isinstance(bits, int) or isinstance(bits, bool) or not MIN_BITS <= bits <= MAX_BITS:
        raise InvalidInputError(f"{name} must be {MIN_BITS}..{MAX_BITS}, got {bits!r}")
    return bits


def check_number(name: str, value: Any, lowest: float = -math.inf, highest: float = math.inf) -> float:
    """Return `value` if it is a finite number in [lowest, highest]."""
    if type(value) is float and lowest <= value <= highest and -math.inf < value < math.inf:
        return value  # nearly every call, in half the time
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not -math.inf < value < math.inf:
        raise InvalidInputError(f"{name} must be a finite number, got {value!r}")
    if not lowest <= value <= highest:
        expected = f"{lowest:g}..{highest:g}" if math.isfinite(highest) else f"at least {lowest:g}"
        raise InvalidInputError(f"{name} must be {expected}, got {value!r}")
    return float(value)


def check_floating(name: str, x: Any) -> Tensor:
    """Return `x` if it is a floating-point tensor."""
    if not isinstance(x, Tensor):
        raise InvalidInputError(f"{name} must be a tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise InvalidInputError(f"{name} must be a floating-point tensor, got {x.dtype}; convert it with .float()")
    return x


def check_axis(axis: Any, x: Tensor) -> int:
    """Return `axis` counted from the front if it is a dimension of `x`."""
    if type(axis) is int and 0 <= axis < x.dim():
        return axis
    if not isinstance(axis, int) or isinstance(axis, bool) or not -x.dim() <= axis < x.dim():
        raise InvalidInputError(
            f"axis must be {-x.dim()}..{x.dim() - 1} for a tensor of shape {tuple(x.shape)}, got {axis!r}"
        )
    return axis % x.dim()


def check_channelwise(name: str, values: Any, x: Tensor) -> None:
    """Raise unless `values` is a floating [C] on the device of `x`, which is [N, C, ...]."""
    if not isinstance(values, Tensor) or not values.is_floating_point():
        check_floating(name, values)
    if values.dim() != 1 or values.shape[0] != x.shape[1]:
        raise InvalidInputError(
            f"{name} must have shape [{x.shape[1]}], one element a channel, got {list(values.shape)}"
        )
    if values.device != x.device:
        raise InvalidInputError(f"{name} must be on {x.device} like x, got {values.device}")


def check_per_sample(name: str, values: Any, x: Tensor) -> None:
    """Raise unless `values` is a floating [C] or [N, C] on the device of `x`, which is [N, C, ...]."""
    check_floating(name, values)
    if values.shape not in (x.shape[1:2], x.shape[:2]):
        raise InvalidInputError(
            f"{name} must have shape {list(x.shape[1:2])}, one element a channel, or {list(x.shape[:2])}, one a sample "
            f"and channel, got {list(values.shape)}"
        )
    if values.device != x.device:
        raise InvalidInputError(f"{name} must be on {x.device} like x, got {values.device}")


def check_same_form(weight: Tensor | None, bias: Tensor | None) -> None:
    """Raise unless `weight` and `bias`, where both are given, are both [C] or both [N, C]."""
    if weight is not None and bias is not None and weight.dim() != bias.dim():
        raise InvalidInputError(
            f"weight and bias must both be [C] or both [N, C], got {list(weight.shape)} and {list(bias.shape)}"
        )


def as_constant(values: Tensor, dtype: torch.dtype) -> Tensor:
    """`values` in `dtype`, without a gradient."""
    return values.detach().to(dtype) if values.requires_grad or values.dtype is not dtype else values


def is_learned(scale: Any) -> bool:
    """Whether a quantiser's scale is to get a gradient."""
    return isinstance(scale, Tensor) and scale.requires_grad and torch.is_grad_enabled()


def check_quantizer(
    scale: Any, zero_point: Any, axis: int | None, x: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Scale and zero point of a quantiser of `x`, `dtype` and int32, one element a channel (or one).

    Detached, but for a scale that is to get a gradient (:func:`is_learned`).
    """
    check_floating("scale", scale)
    if not isinstance(zero_point, Tensor) or zero_point.is_floating_point() or zero_point.dtype == torch.bool:
        got = zero_point.dtype if isinstance(zero_point, Tensor) else type(zero_point).__name__
        raise InvalidInputError(f"zero_point must be an integer tensor, got {got}")
    device = x.device
    expected = 1 if axis is None else x.shape[axis]
    for name, values in (("scale", scale), ("zero_point", zero_point)):
        if values.numel() != expected or (axis is not None and values.dim() != 1):
            raise InvalidInputError(
                f"{name} must have {expected} element{'s' * (expected != 1)} for axis {axis} of a tensor of shape "
                f"{list(x.shape)}, got shape {list(values.shape)}"
            )
        if values.device != device:
            raise InvalidInputError(f"{name} must be on {device} like x, got {values.device}")
    scale = scale.to(dtype) if is_learned(scale) else as_constant(scale, dtype)
    if zero_point.dtype != torch.int32:
        zero_point = zero_point.to(torch.int32)
    if scale.dim() > 1 or zero_point.dim() > 1:
        return scale.reshape(-1), zero_point.reshape(-1)
    return scale, zero_point


def check_logits(teacher_logits: Any, student_logits: Any) -> None:
    """Raise unless both are floating [B, K] on one device, with B, K >= 1 and equal shapes."""
    teacher = check_floating("teacher_logits", teacher_logits)
    student = check_floating("student_logits", student_logits)
    shape = teacher.shape
    if len(shape) != 2 or shape != student.shape:
        raise InvalidInputError(
            "teacher_logits and student_logits must be [B, K] with equal B and K, "
            f"got {list(teacher.shape)} and {list(student.shape)}"
        )
    if 0 in shape:
        raise InvalidInputError(f"logits must hold at least one sample and one class, got {list(teacher.shape)}")
    if student.device != teacher.device:
        raise InvalidInputError(f"student_logits must be on {teacher.device} like teacher_logits, got {student.device}")


def check_labels(labels: Any, logits: Tensor) -> None:
    """Raise unless `labels` is an integer tensor [B]; its values are checked where they are read."""
    if not isinstance(labels, Tensor) or labels.dtype not in (torch.int64, torch.int32, torch.uint8, torch.int16):
        got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise InvalidInputError(f"labels must be an integer tensor, got {got}")
    if labels.shape != logits.shape[:1]:
        raise InvalidInputError(
            f"labels must have shape [{logits.shape[0]}], one a row of the logits, got {list(labels.shape)}"
        )
    if labels.device != logits.device:
        raise InvalidInputError(f"labels must be on {logits.device} like teacher_logits, got {labels.device}")


def learned_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Floating parameters and running statistics of `model` by name; its other buffers may hold anything."""
    found = dict(model.named_parameters())
    for path, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            found.update(module.named_buffers(prefix=path, recurse=False))
    return {name: tensor for name, tensor in found.items() if tensor.is_floating_point()}
