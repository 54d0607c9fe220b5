"""CPU backend: the OpenMP kernels of csrc/cpu behind the extension module ``adadfq._C_cpu``."""

from __future__ import annotations

import importlib
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


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int, axis: int | None = None) -> Tensor:
    """See :func:`adadfq.ops.reference.fake_quantize`; equal to it bit for bit."""
    op = "fake_quantize"
    out = torch.empty_like(x)
    if x.numel() == 0:
        return out
    x, scale, zero_point, layout = native_args.quantizer(op, x, scale, zero_point, axis, DEVICE_TYPE)
    pointers = (x.data_ptr(), scale.data_ptr(), zero_point.data_ptr(), out.data_ptr())
    _native().fake_quantize(*pointers, *layout, bits, DTYPE_NUMBERS[x.dtype], torch.get_num_threads())
    return out


def fake_quantize_backward(
    grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, bits: int, axis: int | None = None
) -> Tensor:
    """See :func:`adadfq.ops.reference.fake_quantize_backward`; equal to it bit for bit."""
    op = "fake_quantize_backward"
    out = torch.empty_like(x)
    if x.numel() == 0:
        return out
    x, scale, zero_point, layout = native_args.quantizer(op, x, scale, zero_point, axis, DEVICE_TYPE)
    grad = native_args.like(op, "grad", grad, x)
    pointers = (grad.data_ptr(), x.data_ptr(), scale.data_ptr(), zero_point.data_ptr(), out.data_ptr())
    _native().fake_quantize_backward(*pointers, *layout, bits, DTYPE_NUMBERS[x.dtype], torch.get_num_threads())
    return out


def dynamic_fake_quantize(x: Tensor, bits: int, axis: int) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`adadfq.ops.reference.dynamic_fake_quantize`; equal to it bit for bit."""
    if x.numel() == 0:
        return reference.dynamic_fake_quantize(x, bits, axis)
    op = "dynamic_fake_quantize"
    out = torch.empty_like(x)
    x = native_args.main_tensor(op, "x", x, "cpu")
    layout = native_args.layout(op, x, axis)
    scale = x.new_empty(layout.channels, dtype=torch.float32)
    zero_point = x.new_empty(layout.channels, dtype=torch.int32)
    _native().dynamic_fake_quantize(
        x.data_ptr(),
        out.data_ptr(),
        scale.data_ptr(),
        zero_point.data_ptr(),
        *layout,
        bits,
        DTYPE_NUMBERS[x.dtype],
        torch.get_num_threads(),
    )
    return out, scale, zero_point


def bn_match(x: Tensor, running_mean: Tensor, running_var: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`adadfq.ops.reference.bn_match`; sums are in float64."""
    if x.numel() == 0:
        return reference.bn_match(x, running_mean, running_var)
    op = "bn_match"
    x = native_args.main_tensor(op, "x", x, "cpu")
    layout = native_args.layout(op, x, 1)
    running_mean = native_args.vector(op, "running_mean", running_mean, layout.channels, torch.float32, x.device)
    running_var = native_args.vector(op, "running_var", running_var, layout.channels, torch.float32, x.device)
    loss = x.new_empty((), dtype=torch.float32)
    mean, var = torch.empty_like(running_mean), torch.empty_like(running_var)
    _native().bn_match(
        x.data_ptr(),
        running_mean.data_ptr(),
        running_var.data_ptr(),
        loss.data_ptr(),
        mean.data_ptr(),
        var.data_ptr(),
        *layout,
        DTYPE_NUMBERS[x.dtype],
        torch.get_num_threads(),
    )
    return loss, mean, var


def bn_match_backward(
    grad_loss: Tensor, x: Tensor, mean: Tensor, var: Tensor, running_mean: Tensor, running_var: Tensor
) -> Tensor:
    """See :func:`adadfq.ops.reference.bn_match_backward`; equal to it bit for bit."""
    op = "bn_match_backward"
    out = torch.empty_like(x)
    if x.numel() == 0:
        return out
    x = native_args.main_tensor(op, "x", x, "cpu")
    layout = native_args.layout(op, x, 1)
    grad_loss = native_args.vector(op, "grad_loss", grad_loss, 1, torch.float32, x.device)
    mean, var, running_mean, running_var = (
        native_args.vector(op, name, tensor, layout.channels, torch.float32, x.device)
        for name, tensor in (
            ("mean", mean),
            ("var", var),
            ("running_mean", running_mean),
            ("running_var", running_var),
        )
    )
    _native().bn_match_backward(
        grad_loss.data_ptr(),
        x.data_ptr(),
        mean.data_ptr(),
        var.data_ptr(),
        running_mean.data_ptr(),
        running_var.data_ptr(),
        out.data_ptr(),
        *layout,
        DTYPE_NUMBERS[x.dtype],
        torch.get_num_threads(),
    )
    return out


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
    teacher, student = native_args.logits(op, teacher_logits, student_logits, "cpu")
    batch, classes = teacher.shape
    labels = native_args.vector(op, "labels", labels, batch, torch.int64, teacher.device)
    losses = torch.empty(4, dtype=torch.float32, device=teacher.device)
    h_prime = torch.empty(batch, dtype=torch.float32, device=teacher.device)
    grad_teacher, grad_student = torch.empty_like(teacher), torch.empty_like(student)
    bad = _native().margin_loss(
        teacher.data_ptr(),
        student.data_ptr(),
        labels.data_ptr(),
        losses.data_ptr(),
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
    # Operators may not return views of one tensor.
    total, margin, disagreement, agreement = (value.clone() for value in losses.unbind())
    return total, margin, disagreement, agreement, h_prime, grad_teacher, grad_student


def entropy_distillation(teacher_logits: Tensor, student_logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """See :func:`adadfq.ops.reference.entropy_distillation`; computed in float64."""
    teacher, student = native_args.logits("entropy_distillation", teacher_logits, student_logits, "cpu")
    batch, classes = teacher.shape
    loss = torch.empty((), dtype=torch.float32, device=teacher.device)
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
    "fake_quantize_backward": fake_quantize_backward,
    "dynamic_fake_quantize": dynamic_fake_quantize,
    "bn_match": bn_match,
    "bn_match_backward": bn_match_backward,
    "margin_loss": margin_loss,
    "entropy_distillation": entropy_distillation,
}
