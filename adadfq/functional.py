"""Differentiable functions: quantisation, BatchNorm matching and the two players' losses on logits.

Each checks its arguments, runs one operator of ``torch.ops.adadfq`` and attaches the gradient. All take float32,
bfloat16, float16 and float64 tensors of any layout; arithmetic is in float32 (float64 for float64). None of them waits
for the device, and all can be compiled with ``fullgraph=True``. Gradients are first order only.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from adadfq import checks
from adadfq.errors import InvalidInputError
from adadfq.ops import reference
from adadfq.ops.schema import compute_dtype

__all__ = [
    "MarginLoss",
    "bn_match",
    "dynamic_fake_quantize",
    "entropy_distillation",
    "fake_quantize",
    "margin_loss",
    "qparams",
]

_ops = torch.ops.adadfq


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


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, bits: int, axis: int | None, clip_grad: bool
    ) -> Tensor:
        ctx.bits, ctx.axis, ctx.clip_grad = bits, axis, clip_grad
        if clip_grad:
            ctx.save_for_backward(x, scale, zero_point)
        return _ops.fake_quantize(x, scale, zero_point, bits, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.clip_grad:
            x, scale, zero_point = ctx.saved_tensors
            grad = _ops.fake_quantize_backward(grad, x, scale, zero_point, ctx.bits, ctx.axis)
        return grad, None, None, None, None, None


class _DynamicFakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bits: int, axis: int) -> tuple[Tensor, Tensor, Tensor]:
        x_hat, scale, zero_point = _ops.dynamic_fake_quantize(x, bits, axis)
        ctx.mark_non_differentiable(scale, zero_point)
        return x_hat, scale, zero_point

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        return grad, None, None


class _BnMatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, running_mean: Tensor, running_var: Tensor) -> Tensor:
        loss, mean, var = _ops.bn_match(x, running_mean, running_var)
        ctx.save_for_backward(x, mean, var, running_mean, running_var)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _ops.bn_match_backward(grad, *ctx.saved_tensors), None, None


class _MarginLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, teacher_logits: Tensor, student_logits: Tensor, labels: Tensor, *settings: Any) -> Any:
        *losses, grad_teacher, grad_student = _ops.margin_loss(teacher_logits, student_logits, labels, *settings)
        ctx.save_for_backward(grad_teacher, grad_student)
        ctx.mark_non_differentiable(*losses[1:])
        return tuple(losses)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grad_teacher, grad_student = ctx.saved_tensors
        return grad * grad_teacher, grad * grad_student, *[None] * 7


class _EntropyDistillation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, teacher_logits: Tensor, student_logits: Tensor, temperature: float) -> Tensor:
        loss, grad_student = _ops.entropy_distillation(teacher_logits, student_logits, temperature)
        ctx.save_for_backward(grad_student)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (grad_student,) = ctx.saved_tensors
        return None, grad * grad_student, None


def qparams(lo: Tensor, hi: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point of the asymmetric uniform quantiser over the range [lo, hi].

    The range is widened to contain 0, so that 0 is exact: scale = (hi - lo) / (2^bits - 1) and
    zero_point = round(-lo / scale). This is the only definition: training, evaluation and export use it.

    Args:
        lo: lower ends, any shape, floating.
        hi: upper ends, shape of `lo`.
        bits: width, 2..8.

    Returns:
        scale (float32, or float64 for float64 ranges) and zero_point (int32, in 0..2^bits - 1), shaped like `lo`.
        An empty range gives scale 1 and zero point 0; a non-finite end gives a NaN scale.

    Raises:
        InvalidInputError: `bits` outside 2..8, or `lo` and `hi` of different shapes or not floating.
    """
    checks.check_bits("bits", bits)
    checks.check_floating("lo", lo)
    checks.check_floating("hi", hi)
    if lo.shape != hi.shape:
        raise InvalidInputError(f"lo and hi must have equal shapes, got {list(lo.shape)} and {list(hi.shape)}")
    dtype = compute_dtype(lo.dtype)
    return reference.qparams(lo.to(dtype), hi.to(dtype), bits)


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bits: int,
    axis: int | None = None,
    clip_grad: bool = False,
) -> Tensor:
    """Quantise `x` to `bits`-bit codes and back, per tensor or per channel.

    code = clamp(round(x / scale) + zero_point, 0, 2^bits - 1), x_hat = (code - zero_point) * scale, rounding half to
    even (METHOD: the paper's asymmetric quantiser with an integer zero point). NaN stays NaN; infinities saturate.

    The gradient is the straight-through estimator: it passes to `x` unchanged, or, with `clip_grad`, only where `x`
    is inside the range. `scale` and `zero_point` get none.

    Args:
        x: floating tensor, any shape.
        scale: step size; one element when `axis` is None, else ``[x.shape[axis]]``. Must be positive: like torch's own
            fake quantisation this does not look, for on a GPU looking would wait for the device.
        zero_point: code of 0, shaped like `scale`, an integer tensor. Must be in 0..2^bits - 1; it is not looked at
            either.
        bits: width, 2..8.
        axis: channel dimension, or None for one scale for the whole tensor.
        clip_grad: zero the gradient outside the range.

    Returns:
        Tensor with the shape and dtype of `x`.

    Raises:
        InvalidInputError: `bits`, `axis`, a shape, a dtype or a device does not fit.
    """
    checks.check_floating("x", x)
    checks.check_bits("bits", bits)
    checks.check_floating("scale", scale)
    if not isinstance(zero_point, Tensor) or zero_point.is_floating_point() or zero_point.dtype == torch.bool:
        got = zero_point.dtype if isinstance(zero_point, Tensor) else type(zero_point).__name__
        raise InvalidInputError(f"zero_point must be an integer tensor, got {got}")
    checks.check_same_device("x", x, scale=scale, zero_point=zero_point)
    if axis is not None:
        axis = checks.check_axis(axis, x)
    expected = 1 if axis is None else x.shape[axis]
    for name, values in (("scale", scale), ("zero_point", zero_point)):
        if values.numel() != expected or (axis is not None and values.dim() != 1):
            raise InvalidInputError(
                f"{name} must have {expected} element{'s' * (expected != 1)} for axis {axis} of a tensor of shape "
                f"{list(x.shape)}, got shape {list(values.shape)}"
            )
    scale = scale.detach().to(compute_dtype(x.dtype)).reshape(-1)
    zero_point = zero_point.detach().to(torch.int32).reshape(-1)
    return _FakeQuantize.apply(x, scale, zero_point, bits, axis, clip_grad)


def dynamic_fake_quantize(x: Tensor, bits: int, axis: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Fake quantisation of each channel over its own min/max, recomputed at every call: for weights.

    Equal to ``fake_quantize(x, *qparams(channel minima, channel maxima, bits), bits, axis)`` in one pass. The gradient
    passes to `x` unchanged. A channel that holds NaN or infinity comes out as NaN.

    Args:
        x: floating tensor with at least one dimension.
        bits: width, 2..8.
        axis: channel dimension.

    Returns:
        x_hat (shape and dtype of `x`), scale ``[x.shape[axis]]`` (float32, or float64 for float64) and
        zero_point ``[x.shape[axis]]`` (int32). Only x_hat carries a gradient.

    Raises:
        InvalidInputError: `bits` or `axis` does not fit, or `x` is not floating.
    """
    checks.check_floating("x", x)
    checks.check_bits("bits", bits)
    return _DynamicFakeQuantize.apply(x, bits, checks.check_axis(axis, x))


def bn_match(x: Tensor, running_mean: Tensor, running_var: Tensor) -> Tensor:
    """How far the batch statistics of a BatchNorm layer's input are from the layer's running statistics.

    MSE(mean, running_mean) + MSE(var, running_var) over channels, with the per-channel mean and *biased* variance of
    `x` over every dimension but 1 (paper, L_BNS; the average over layers is the caller's).

    Args:
        x: the layer's input, [N, C, ...], floating.
        running_mean: [C].
        running_var: [C].

    Returns:
        Scalar, float32 (float64 for float64), with a gradient to `x` only.

    Raises:
        InvalidInputError: fewer than two dimensions, an empty batch, no channels, or statistics not of shape [C].
    """
    checks.check_floating("x", x)
    if x.dim() < 2 or x.numel() == 0:
        raise InvalidInputError(f"x must be a non-empty [N, C, ...] tensor, got shape {list(x.shape)}")
    for name, values in (("running_mean", running_mean), ("running_var", running_var)):
        checks.check_floating(name, values)
        if values.shape != x.shape[1:2]:
            raise InvalidInputError(
                f"{name} must have shape [{x.shape[1]}], one element a channel, got {list(values.shape)}"
            )
    checks.check_same_device("x", x, running_mean=running_mean, running_var=running_var)
    dtype = compute_dtype(x.dtype)
    return _BnMatch.apply(x, running_mean.detach().to(dtype), running_var.detach().to(dtype))


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
        InvalidInputError: shapes, bounds or, for CPU tensors, a label out of range. For other devices a label out of
            range fails an assertion on the device.
    """
    checks.check_logits(teacher_logits, student_logits)
    checks.check_labels(labels, teacher_logits)
    lambda_u = checks.check_number("lambda_u", lambda_u, 0, 1)
    lambda_l = checks.check_number("lambda_l", lambda_l, 0, lambda_u)
    weights = [checks.check_number(n, v) for n, v in (("alpha_ds", alpha_ds), ("alpha_as", alpha_as), ("beta", beta))]
    teacher_logits, student_logits = _same_dtype(teacher_logits, student_logits)
    labels = labels.to(torch.int64)
    return MarginLoss(
        *_MarginLoss.apply(teacher_logits, student_logits, labels, lambda_l, lambda_u, *weights, bool(detach_min))
    )


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
    teacher_logits, student_logits = _same_dtype(teacher_logits.detach(), student_logits)
    return _EntropyDistillation.apply(teacher_logits, student_logits, temperature)
