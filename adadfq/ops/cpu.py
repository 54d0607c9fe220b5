"""CPU backend: the OpenMP kernels of csrc/cpu behind the extension module ``adadfq._C_cpu``."""

from __future__ import annotations

import importlib
from array import array
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from adadfq.errors import InvalidInputError
from adadfq.ops import native_args, reference
from adadfq.ops.native_args import DTYPE_NUMBERS

NAME = "cpu"
DEVICE_TYPE = "cpu"
DTYPES = native_args.DTYPES


@cache
def _load() -> tuple[ModuleType | None, str | None]:
    """(module, None), or (None, why it could not be imported)."""
    # After torch, whose libgomp.so.1 then serves both: one thread pool, not two that fight for the cores.
    try:
        return importlib.import_module("adadfq._C_cpu"), None
    except ImportError as error:
        return None, f"adadfq._C_cpu could not be imported ({error}); build it with 'pip install -e .'"


def why_unavailable() -> str | None:
    """Why the extension module is not there; None when it is."""
    return _load()[1]


def _native() -> Any:
    return _load()[0]


def _call(op: str, x: Tensor, *arguments: Any) -> None:
    getattr(_native(), op)(*arguments, DTYPE_NUMBERS[x.dtype], torch.get_num_threads())


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int, axis: int | None = None) -> Tensor:
    """See :func:`adadfq.ops.reference.fake_quantize`; equal to it bit for bit."""
    op = "fake_quantize"
    out = torch.empty_like(x)
    if x.numel() == 0:
        return out
    x, scale, zero_point, layout = native_args.quantizer(op, x, scale, zero_point, bits, axis, DEVICE_TYPE)
    _call(op, x, x.data_ptr(), scale.data_ptr(), zero_point.data_ptr(), out.data_ptr(), *layout, bits)
    return out


def fake_quantize_(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int, axis: int | None = None) -> None:
    """See :func:`adadfq.ops.reference.fake_quantize_`; equal to it bit for bit."""
    op = "fake_quantize"
    if x.numel() == 0:
        return
    dense, scale, zero_point, layout = native_args.quantizer(op, x, scale, zero_point, bits, axis, DEVICE_TYPE)
    _call(op, x, dense.data_ptr(), scale.data_ptr(), zero_point.data_ptr(), dense.data_ptr(), *layout, bits)
    if dense is not x:
        x.copy_(dense)


def fake_quantize_backward(
    grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, bits: int, axis: int | None = None
) -> Tensor:
    """See :func:`adadfq.ops.reference.fake_quantize_backward`; equal to it bit for bit."""
    op = "fake_quantize_backward"
    out = torch.empty_like(x)
    if x.numel() == 0:
        return out
    x, scale, zero_point, layout = native_args.quantizer(op, x, scale, zero_point, bits, axis, DEVICE_TYPE)
    grad = native_args.like(op, "grad", grad, x)
    pointers = (grad.data_ptr(), x.data_ptr(), scale.data_ptr(), zero_point.data_ptr(), out.data_ptr())
    _call(op, x, *pointers, *layout, bits)
    return out


def dynamic_fake_quantize(x: Tensor, bits: int, axis: int) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`adadfq.ops.reference.dynamic_fake_quantize`; equal to it bit for bit."""
    x_hats, scales, zero_points = foreach_dynamic_fake_quantize([x], [bits], axis)
    return x_hats[0], scales[0], zero_points[0]


def foreach_dynamic_fake_quantize(
    tensors: list[Tensor], bits: list[int], axis: int
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """See :func:`adadfq.ops.reference.foreach_dynamic_fake_quantize`; equal to it bit for bit."""
    op = "dynamic_fake_quantize"
    x_hats, scales, zero_points, kept, structs = [], [], [], [], array("q")
    for x, width in zip(tensors, bits, strict=True):
        native_args.check_bits(op, width)
        if x.numel() == 0:
            out, scale, zero_point = reference.dynamic_fake_quantize(x, width, axis)
        else:
            out = torch.empty_like(x)
            x = native_args.main_tensor(op, "x", x, DEVICE_TYPE)
            layout = native_args.layout(op, x, axis)
            scale = torch.empty(layout.channels, dtype=torch.float32, device=x.device)
            zero_point = torch.empty(layout.channels, dtype=torch.int32, device=x.device)
            # The fields of DynamicTensor in csrc/cpu/dynamic_fake_quantize.h.
            structs.extend((x.data_ptr(), out.data_ptr(), scale.data_ptr(), zero_point.data_ptr(), *layout, width))
            kept.append(x)
            if x.dtype != kept[0].dtype:
                raise InvalidInputError(f"{op}: tensors must have one dtype, got {kept[0].dtype} and {x.dtype}")
        x_hats.append(out)
        scales.append(scale)
        zero_points.append(zero_point)
    if kept:
        _call(op, kept[0], structs.buffer_info()[0], len(kept))
    return x_hats, scales, zero_points


def observe_fake_quantize(
    x: Tensor,
    running_min: Tensor,
    running_max: Tensor,
    num_batches: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bits: int,
    momentum: float,
) -> Tensor:
    """See :func:`adadfq.ops.reference.observe_fake_quantize`."""
    op = "observe_fake_quantize"
    native_args.check_bits(op, bits)
    out = torch.empty_like(x)
    x = native_args.main_tensor(op, "x", x, DEVICE_TYPE)
    if x.numel() == 0:
        raise InvalidInputError(f"{op}: x must hold at least one element, got shape {list(x.shape)}")
    state = [
        native_args.scalar(op, name, tensor, dtype, x.device).data_ptr()
        for name, tensor, dtype in (
            ("running_min", running_min, torch.float32),
            ("running_max", running_max, torch.float32),
            ("num_batches", num_batches, torch.int64),
            ("scale", scale, torch.float32),
            ("zero_point", zero_point, torch.int32),
        )
    ]
    _call(op, x, x.data_ptr(), out.data_ptr(), x.numel(), *state, bits, momentum)
    return out


def affine_act_fake_quantize(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    act: str,
    act_scale: Tensor | None,
    act_zero_point: Tensor | None,
    bits: int,
) -> Tensor:
    """See :func:`adadfq.ops.reference.affine_act_fake_quantize`; equal to it bit for bit."""
    out = torch.empty_like(x)
    return _affine_act("affine_act_fake_quantize", out, x, scale, shift, residual, act, act_scale, act_zero_point, bits)


def affine_act_quantize(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    act: str,
    act_scale: Tensor,
    act_zero_point: Tensor,
    bits: int,
) -> Tensor:
    """See :func:`adadfq.ops.reference.affine_act_quantize`; equal to it."""
    out = torch.empty_like(x, dtype=torch.uint8)
    return _affine_act("affine_act_quantize", out, x, scale, shift, residual, act, act_scale, act_zero_point, bits)


def _affine_act(
    op: str,
    out: Tensor,
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    act: str,
    act_scale: Tensor | None,
    act_zero_point: Tensor | None,
    bits: int,
) -> Tensor:
    native_args.check_bits(op, bits)
    act_number = reference.act_number(act)
    if x.numel() == 0:
        return out
    x = native_args.main_tensor(op, "x", x, DEVICE_TYPE)
    layout = native_args.layout(op, x, 1)
    scale = native_args.vector(op, "scale", scale, x.shape[1], torch.float32, x.device)
    shift = native_args.vector(op, "shift", shift, x.shape[1], torch.float32, x.device)
    if residual is not None:
        residual = native_args.like(op, "residual", residual, x)
    if reference.is_quantised(act_scale, act_zero_point):
        act_scale = native_args.scalar(op, "act_scale", act_scale, torch.float32, x.device)
        act_zero_point = native_args.scalar(op, "act_zero_point", act_zero_point, torch.int32, x.device)
    _call(
        op,
        x,
        x.data_ptr(),
        scale.data_ptr(),
        shift.data_ptr(),
        _address(residual),
        act_number,
        _address(act_scale),
        _address(act_zero_point),
        bits,
        out.data_ptr(),
        *layout,
    )
    return out


def quantize_pack(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int, axis: int | None = None) -> Tensor:
    """See :func:`adadfq.ops.reference.quantize_pack`; equal to it."""
    op = "quantize_pack"
    packed = torch.empty(reference.packed_bytes(x.numel(), bits), dtype=torch.uint8, device=x.device)
    if x.numel() == 0:
        return packed
    # The stream's order is that of a contiguous tensor.
    x = native_args.main_tensor(op, "x", x, DEVICE_TYPE).contiguous()
    x, scale, zero_point, layout = native_args.quantizer(op, x, scale, zero_point, bits, axis, DEVICE_TYPE)
    _call(op, x, x.data_ptr(), scale.data_ptr(), zero_point.data_ptr(), packed.data_ptr(), *layout, bits)
    return packed


def unpack_dequantize(
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bits: int,
    shape: list[int],
    axis: int | None,
    dtype: torch.dtype,
) -> Tensor:
    """See :func:`adadfq.ops.reference.unpack_dequantize`; equal to it bit for bit."""
    op = "unpack_dequantize"
    reference.check_packed(packed, shape, bits)
    out = torch.empty(shape, dtype=dtype, device=packed.device)
    if out.numel() == 0:
        return out
    out, scale, zero_point, layout = native_args.quantizer(op, out, scale, zero_point, bits, axis, DEVICE_TYPE)
    packed = native_args.vector(op, "packed", packed, packed.numel(), torch.uint8, out.device)
    _call(op, out, packed.data_ptr(), scale.data_ptr(), zero_point.data_ptr(), out.data_ptr(), *layout, bits)
    return out


def affine_act_fake_quantize_backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    act: str,
    need_residual: bool,
    need_params: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`adadfq.ops.reference.affine_act_fake_quantize_backward`; sums beyond 4096 elements in float64."""
    op = "affine_act_fake_quantize_backward"
    act_number = reference.act_number(act)
    grad_x = torch.empty_like(x)
    x = native_args.main_tensor(op, "x", x, DEVICE_TYPE)
    channels = x.shape[1]
    grad_residual = torch.empty_like(x) if need_residual else x.new_empty(0)
    grad_scale = torch.empty(channels if need_params else 0, dtype=torch.float32, device=x.device)
    grad_shift = torch.empty_like(grad_scale)
    if x.numel() == 0:
        return grad_x, grad_residual, grad_scale.zero_(), grad_shift.zero_()
    layout = native_args.layout(op, x, 1)
    scale = native_args.vector(op, "scale", scale, channels, torch.float32, x.device)
    shift = native_args.vector(op, "shift", shift, channels, torch.float32, x.device)
    grad = native_args.like(op, "grad", grad, x)
    if residual is not None:
        residual = native_args.like(op, "residual", residual, x)
    _call(
        op,
        x,
        grad.data_ptr(),
        x.data_ptr(),
        scale.data_ptr(),
        shift.data_ptr(),
        _address(residual),
        act_number,
        grad_x.data_ptr(),
        grad_residual.data_ptr() if need_residual else 0,
        grad_scale.data_ptr() if need_params else 0,
        grad_shift.data_ptr() if need_params else 0,
        *layout,
    )
    return grad_x, grad_residual, grad_scale, grad_shift


def bn_match(x: Tensor, running_mean: Tensor, running_var: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`adadfq.ops.reference.bn_match`; sums beyond 4096 elements in float64."""
    return _bn_match("bn_match", x, running_mean, running_var, None, None, 0.0, None)


def bn_match_forward(
    x: Tensor, running_mean: Tensor, running_var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`adadfq.ops.reference.bn_match_forward`; y is equal to it bit for bit."""
    y = torch.empty_like(x)
    return y, *_bn_match("bn_match_forward", x, running_mean, running_var, weight, bias, eps, y)


def _bn_match(
    op: str,
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    y: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    x = native_args.main_tensor(op, "x", x, DEVICE_TYPE)
    if x.numel() == 0:
        return reference.bn_match(x, running_mean, running_var)
    layout = native_args.layout(op, x, 1)
    channels, device = x.shape[1], x.device
    running_mean = native_args.vector(op, "running_mean", running_mean, channels, torch.float32, device)
    running_var = native_args.vector(op, "running_var", running_var, channels, torch.float32, device)
    if weight is not None:
        weight = native_args.vector(op, "weight", weight, channels, torch.float32, device)
    if bias is not None:
        bias = native_args.vector(op, "bias", bias, channels, torch.float32, device)
    loss = torch.empty((), dtype=torch.float32, device=device)
    mean = torch.empty(channels, dtype=torch.float64, device=device)
    var = torch.empty(channels, dtype=torch.float64, device=device)
    _call(
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
        *layout,
    )
    return loss, mean, var


def bn_match_backward(
    grad_loss: Tensor, x: Tensor, mean: Tensor, var: Tensor, running_mean: Tensor, running_var: Tensor
) -> Tensor:
    """See :func:`adadfq.ops.reference.bn_match_backward`; equal to it bit for bit."""
    op = "bn_match_backward"
    return _bn_match_backward(op, None, grad_loss, x, mean, var, running_mean, running_var, None, 0.0)


def bn_match_forward_backward(
    grad_y: Tensor,
    x: Tensor,
    grad_loss: Tensor,
    mean: Tensor,
    var: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    eps: float,
) -> Tensor:
    """See :func:`adadfq.ops.reference.bn_match_forward_backward`; equal to it bit for bit."""
    op = "bn_match_forward_backward"
    return _bn_match_backward(op, grad_y, grad_loss, x, mean, var, running_mean, running_var, weight, eps)


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
) -> Tensor:
    out = torch.empty_like(x)
    if x.numel() == 0:
        return out
    x = native_args.main_tensor(op, "x", x, DEVICE_TYPE)
    layout = native_args.layout(op, x, 1)
    grad_loss = native_args.scalar(op, "grad_loss", grad_loss, torch.float32, x.device)
    channels, device = x.shape[1], x.device
    mean = native_args.vector(op, "mean", mean, channels, torch.float64, device)
    var = native_args.vector(op, "var", var, channels, torch.float64, device)
    running_mean = native_args.vector(op, "running_mean", running_mean, channels, torch.float32, device)
    running_var = native_args.vector(op, "running_var", running_var, channels, torch.float32, device)
    if weight is not None:
        weight = native_args.vector(op, "weight", weight, channels, torch.float32, device)
    if grad_y is not None:
        grad_y = native_args.like(op, "grad_y", grad_y, x)
    _call(
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
    return out


#: What empty scalars are made like, which takes half the time of torch.empty(()) and ignores the default device.
_SCALAR = torch.zeros((), dtype=torch.float32, device="cpu")


def _is_ready(x: Tensor) -> bool:
    """Whether `x`, which is not complex, is a contiguous CPU tensor whose memory holds its values."""
    return x.is_cpu and x.layout == torch.strided and x.is_contiguous() and not x.is_neg()


def _logits(op: str, teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`native_args.logits`, quicker for tensors it would return as they are."""
    if (
        teacher.dtype in DTYPES
        and student.dtype == teacher.dtype
        and teacher.dim() == 2
        and teacher.shape == student.shape
        and teacher.numel()
        and _is_ready(teacher)
        and _is_ready(student)
    ):
        return teacher, student
    return native_args.logits(op, teacher, student, DEVICE_TYPE)


def margin_loss(
    teacher_logits: Tensor,
    student_logits: Tensor,
    labels: Tensor,
    lambda_l: float,
    lambda_u: float,
    alpha_ds: float,
    alpha_as: float,
    beta: float,
    detach_min: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See :func:`adadfq.ops.reference.margin_loss`; computed in float64.

    Raises:
        InvalidInputError: a label is outside 0..K - 1.
    """
    op = "margin_loss"
    teacher, student = _logits(op, teacher_logits, student_logits)
    batch, classes = teacher.shape
    if not (labels.dtype == torch.int64 and labels.dim() == 1 and labels.numel() == batch and _is_ready(labels)):
        labels = native_args.vector(op, "labels", labels, batch, torch.int64, teacher.device)
    # Four tensors, for operators may not return views of one.
    total, margin = torch.empty_like(_SCALAR), torch.empty_like(_SCALAR)
    disagreement, agreement = torch.empty_like(_SCALAR), torch.empty_like(_SCALAR)
    h_prime = _SCALAR.new_empty(batch)
    grad_teacher, grad_student = torch.empty_like(teacher), torch.empty_like(student)
    bad = _native().margin_loss(
        teacher.data_ptr(),
        student.data_ptr(),
        labels.data_ptr(),
        total.data_ptr(),
        margin.data_ptr(),
        disagreement.data_ptr(),
        agreement.data_ptr(),
        h_prime.data_ptr(),
        grad_teacher.data_ptr(),
        grad_student.data_ptr(),
        batch,
        classes,
        lambda_l,
        lambda_u,
        alpha_ds,
        alpha_as,
        beta,
        detach_min,
        DTYPE_NUMBERS[teacher.dtype],
        torch.get_num_threads(),
    )
    if bad >= 0:
        raise InvalidInputError(f"labels must be in 0..{classes - 1}, got {int(labels[bad])}")
    return total, margin, disagreement, agreement, h_prime, grad_teacher, grad_student


def entropy_distillation(teacher_logits: Tensor, student_logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """See :func:`adadfq.ops.reference.entropy_distillation`; computed in float64."""
    teacher, student = _logits("entropy_distillation", teacher_logits, student_logits)
    batch, classes = teacher.shape
    loss = torch.empty_like(_SCALAR)
    grad_student = torch.empty_like(student)
    _native().entropy_distillation(
        teacher.data_ptr(),
        student.data_ptr(),
        loss.data_ptr(),
        grad_student.data_ptr(),
        batch,
        classes,
        temperature,
        DTYPE_NUMBERS[teacher.dtype],
        torch.get_num_threads(),
    )
    return loss, grad_student


KERNELS = {
    "fake_quantize": fake_quantize,
    "fake_quantize_": fake_quantize_,
    "fake_quantize_backward": fake_quantize_backward,
    "dynamic_fake_quantize": dynamic_fake_quantize,
    "foreach_dynamic_fake_quantize": foreach_dynamic_fake_quantize,
    "observe_fake_quantize": observe_fake_quantize,
    "affine_act_fake_quantize": affine_act_fake_quantize,
    "affine_act_quantize": affine_act_quantize,
    "quantize_pack": quantize_pack,
    "unpack_dequantize": unpack_dequantize,
    "affine_act_fake_quantize_backward": affine_act_fake_quantize_backward,
    "bn_match": bn_match,
    "bn_match_backward": bn_match_backward,
    "bn_match_forward": bn_match_forward,
    "bn_match_forward_backward": bn_match_forward_backward,
    "margin_loss": margin_loss,
    "entropy_distillation": entropy_distillation,
}
