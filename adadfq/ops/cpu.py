"""CPU backend: the OpenMP kernels of csrc/cpu behind the extension module ``adadfq._C_cpu``."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from adadfq.errors import InvalidInputError
from adadfq.ops import addresses, native_args, operators
from adadfq.ops.native_args import DTYPE_NUMBERS, Layout

NAME = "cpu"
DEVICE_TYPE = "cpu"
INTERPRETED = False
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


def call(op: str, function: str, x: Tensor, *arguments: Any) -> None:
    """See :class:`adadfq.ops.addresses.Module`."""
    getattr(_native(), function)(*arguments, DTYPE_NUMBERS[x.dtype], torch.get_num_threads())


def channel_scratch(x: Tensor, channels: int) -> tuple[Tensor | None, ...]:
    """The functions have memory of their own for sums."""
    return ()


def range_scratch(x: Tensor, layouts: list[Layout]) -> tuple[Tensor | None, ...]:
    """See :func:`channel_scratch`."""
    return ()


_LAUNCHERS = addresses.Launchers(sys.modules[__name__])  # type: ignore[arg-type]


def launch(op: str, launcher: str, x: Tensor, *arguments: Any) -> None:
    """See :class:`adadfq.ops.operators.Backend`."""
    getattr(_LAUNCHERS, launcher)(op, *arguments)


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


_OPERATORS = operators.OPERATORS + operators.PACKING + operators.BATCH_NORM_ACT

KERNELS = {
    **operators.kernels(sys.modules[__name__], _OPERATORS),  # type: ignore[arg-type]
    # Of their own, for what a call costs beside the kernel.
    "margin_loss": margin_loss,
    "entropy_distillation": entropy_distillation,
}


def __getattr__(name: str) -> Callable[..., Any]:
    return operators.attribute(__name__, KERNELS, name)
