"""The two players' losses on logits."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from adadfq import checks
from adadfq.errors import InvalidInputError
from adadfq.functional.autograd import first_order_only
from adadfq.ops.run import needs_gradient, run

__all__ = ["MarginLoss", "entropy_distillation", "margin_loss"]


class MarginLoss(NamedTuple):
    """What :func:`margin_loss` returns. Only `total` carries a gradient."""

    total: Tensor
    """L_margin + beta (alpha_ds L_ds + alpha_as L_as), a scalar."""
    margin: Tensor
    """L_margin, a scalar, detached."""
    disagreement: Tensor
    """L_ds, a scalar in nats, detached."""
    agreement: Tensor
    """L_as, a scalar in nats, detached."""
    h_prime: Tensor
    """H' of every sample, [B] in [0, 1], detached: high where teacher and student agree."""


def _is_one(grad: Tensor) -> bool:
    """Whether `grad` is known to be 1, as where the loss is a term of a sum: then nothing needs to be multiplied.

    Looked up on the CPU only, where it waits for nothing, and not where somebody traces or batches the call.
    """
    return (
        type(grad) is Tensor
        and grad.is_cpu
        and not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._functorch.is_batchedtensor(grad)
        and not torch._C._functorch.is_legacy_batchedtensor(grad)
        and not grad.requires_grad
        and grad.item() == 1
    )


class _MarginLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, teacher_logits: Tensor, student_logits: Tensor, labels: Tensor, settings: Any) -> Any:
        results = run("margin_loss", teacher_logits, student_logits, labels, *settings)
        ctx.save_for_backward(results[5], results[6])
        ctx.mark_non_differentiable(*results[1:5])
        ctx.set_materialize_grads(False)  # else each of those gets a gradient of zeros
        return results[:5]

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, None, None, None
        grad_teacher, grad_student = ctx.saved_tensors
        if not _is_one(grad):
            grad_teacher, grad_student = grad * grad_teacher, grad * grad_student
        return grad_teacher, grad_student, None, None


class _EntropyDistillation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, teacher_logits: Tensor, student_logits: Tensor, temperature: float) -> Tensor:
        loss, grad_student = run("entropy_distillation", teacher_logits, student_logits, temperature)
        ctx.save_for_backward(grad_student)
        return loss

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (grad_student,) = ctx.saved_tensors
        return None, grad_student if _is_one(grad) else grad * grad_student, None


def _same_dtype(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    if a.dtype == b.dtype:
        return a, b
    dtype = torch.promote_types(a.dtype, b.dtype)
    return a.to(dtype), b.to(dtype)


def margin_loss(
    teacher_logits: Tensor,
    student_logits: Tensor,
    labels: Tensor,
    lambda_l: float,
    lambda_u: float,
    alpha_ds: float,
    alpha_as: float,
    beta: float,
    detach_min: bool = False,
) -> MarginLoss:
    """The generator's loss on logits: adaptability held between two bounds, plus the class losses (paper, Eq. 5-9).

    With t, q the logits, H the entropy of softmax(t - q) and H' = (H - min_b H) / (log K - min_b H):
    total = mean max(lambda_l - H', 0) + mean max(H' - lambda_u, 0)
    + beta (alpha_ds CE(t - q, labels) + alpha_as CE(t + q, labels)).

    Where every entropy of the batch is within 1e-6 nats of log K (the student equals the teacher, or K = 1), H' is 1
    and its gradient stays bounded. A single sample has H' = 0.

    Args:
        teacher_logits: t, [B, K].
        student_logits: q, [B, K].
        labels: the classes the images were generated for, integer [B], in 0..K-1.
        lambda_l: lower bound of H', 0 <= lambda_l <= lambda_u.
        lambda_u: upper bound of H', at most 1.
        alpha_ds: weight of the disagreement cross-entropy.
        alpha_as: weight of the agreement cross-entropy.
        beta: weight of both cross-entropies.
        detach_min: treat the batch minimum of H as a constant. False, the default, lets the gradient through it, as the
            authors' code does.

    Returns:
        :class:`MarginLoss`; scalars in nats, float32 (float64 for float64); gradients reach both logits.

    Raises:
        InvalidInputError: shapes, bounds or, for CPU tensors, a label out of range. On other devices, for which finding
            out would be waiting, such a label makes the losses NaN (Triton) or fails an assertion on the device
            (reference).
    """
    checks.check_logits(teacher_logits, student_logits)
    checks.check_labels(labels, teacher_logits)
    lambda_u = checks.check_number("lambda_u", lambda_u, 0, 1)
    lambda_l = checks.check_number("lambda_l", lambda_l, 0, lambda_u)
    alpha_ds = checks.check_number("alpha_ds", alpha_ds)
    alpha_as = checks.check_number("alpha_as", alpha_as)
    beta = checks.check_number("beta", beta)
    teacher_logits, student_logits = _same_dtype(teacher_logits, student_logits)
    if labels.dtype != torch.int64:
        labels = labels.to(torch.int64)
    settings = (lambda_l, lambda_u, alpha_ds, alpha_as, beta, bool(detach_min))
    if not needs_gradient(teacher_logits, student_logits):
        return MarginLoss(*run("margin_loss", teacher_logits, student_logits, labels, *settings)[:5])
    return MarginLoss(*_MarginLoss.apply(teacher_logits, student_logits, labels, settings))


def entropy_distillation(teacher_logits: Tensor, student_logits: Tensor, temperature: float) -> Tensor:
    """The student's loss: -T^2 mean_b H(softmax((t - q) / T)), least where q equals t up to a constant a sample.

    Args:
        teacher_logits: t, [B, K]; gets no gradient.
        student_logits: q, [B, K].
        temperature: T > 0.

    Returns:
        Scalar in nats, float32 (float64 for float64), between -T^2 log K and 0.

    Raises:
        InvalidInputError: shapes do not fit, or the temperature is not positive.
    """
    checks.check_logits(teacher_logits, student_logits)
    temperature = checks.check_number("temperature", temperature)
    if temperature <= 0:
        raise InvalidInputError(f"temperature must be positive, got {temperature!r}")
    if teacher_logits.requires_grad:
        teacher_logits = teacher_logits.detach()
    teacher_logits, student_logits = _same_dtype(teacher_logits, student_logits)
    if not needs_gradient(student_logits):
        return run("entropy_distillation", teacher_logits, student_logits, temperature)[0]
    return _EntropyDistillation.apply(teacher_logits, student_logits, temperature)
