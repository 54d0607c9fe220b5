"""The tail of a quantised layer in one pass: per-channel affine map, residual, activation, fake quantisation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from adadfq import checks
from adadfq.errors import InvalidInputError
from adadfq.functional.autograd import first_order_only
from adadfq.ops import reference
from adadfq.ops.run import needs_gradient, run
from adadfq.ops.schema import compute_dtype

__all__ = ["affine_act_fake_quantize", "affine_act_quantize"]


class _AffineActFakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        shift: Tensor,
        residual: Tensor | None,
        act: str,
        act_scale: Tensor | None,
        act_zero_point: Tensor | None,
        bits: int,
    ) -> Tensor:
        ctx.act = act
        # Without an activation the backward asks nothing of u, and so not the residual.
        ctx.save_for_backward(x, scale, shift, residual if act != "none" else None)
        return run("affine_act_fake_quantize", x, scale, shift, residual, act, act_scale, act_zero_point, bits)

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _, scale_needed, shift_needed, residual_needed, *_ = ctx.needs_input_grad
        # Without an activation the gradient of the residual is the gradient itself.
        write_residual = residual_needed and ctx.act != "none"
        grad_x, grad_residual, grad_scale, grad_shift = run(
            "affine_act_fake_quantize_backward",
            grad,
            *ctx.saved_tensors,
            ctx.act,
            write_residual,
            scale_needed or shift_needed,
        )
        return (
            grad_x,
            grad_scale if scale_needed else None,
            grad_shift if shift_needed else None,
            (grad_residual if write_residual else grad) if residual_needed else None,
            None,
            None,
            None,
            None,
        )


class _AffineActLearnedFakeQuantize(torch.autograd.Function):
    """The quantiser's step is learned: nothing passes from outside its range, and the step has a gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        shift: Tensor,
        residual: Tensor | None,
        act: str,
        act_scale: Tensor,
        act_zero_point: Tensor,
        bits: int,
    ) -> Tensor:
        ctx.act, ctx.bits = act, bits
        ctx.save_for_backward(x, scale, shift, residual, act_scale, act_zero_point)
        return run("affine_act_fake_quantize", x, scale, shift, residual, act, act_scale, act_zero_point, bits)

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x_needed, scale_needed, shift_needed, residual_needed, *_ = ctx.needs_input_grad
        x, scale, shift, residual, act_scale, act_zero_point = ctx.saved_tensors
        grad_x, grad_residual, grad_scale, grad_shift, grad_act_scale = run(
            "affine_act_learned_fake_quantize_backward",
            grad,
            x,
            scale,
            shift,
            residual,
            ctx.act,
            act_scale,
            act_zero_point,
            ctx.bits,
            residual_needed,
            scale_needed or shift_needed,
        )
        return (
            grad_x if x_needed else None,
            grad_scale if scale_needed else None,
            grad_shift if shift_needed else None,
            grad_residual if residual_needed else None,
            None,
            grad_act_scale,
            None,
            None,
        )


def affine_act_fake_quantize(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None = None,
    act: str = "none",
    qparams: tuple[Tensor, Tensor, int] | None = None,
) -> Tensor:
    """fake_quantize(act(x * scale_c + shift_c + residual)) in one read and one write.

    With scale = weight / sqrt(running_var + eps) and shift = bias - running_mean * scale this is the tail of a layer in
    inference: BatchNorm, the residual addition, the activation and its quantiser. Arithmetic is in float32 (float64 for
    float64) from end to end; nothing between is rounded to a 16-bit dtype.

    The gradient reaches x, scale, shift and residual, where the activation is not flat; it passes the quantiser
    unchanged (straight-through estimator). Where the quantiser's scale requires a gradient, that is a learned step size
    as in :func:`adadfq.functional.fake_quantize`: it gets its gradient in the same pass, and nothing passes from
    outside the quantiser's range.

    Args:
        x: [N, C, ...], floating.
        scale: [C], multiplier of every channel.
        shift: [C], added to every channel.
        residual: added before the activation; shape and dtype of `x`.
        act: "none", "relu" or "relu6".
        qparams: (scale, zero_point, bits) of the per-tensor quantiser of the result, one element each and a width in
            2..8, or None to leave it in float.

    Returns:
        Tensor with the shape and dtype of `x`.

    Raises:
        InvalidInputError: a shape, a dtype, a device, `act` or the width does not fit.
    """
    arguments = _checked(x, scale, shift, residual, act, qparams)
    if checks.is_learned(arguments[5]):
        return _AffineActLearnedFakeQuantize.apply(*arguments)
    if not needs_gradient(x, scale, shift, residual):
        return run("affine_act_fake_quantize", *arguments)
    return _AffineActFakeQuantize.apply(*arguments)


def affine_act_quantize(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None = None,
    act: str = "none",
    qparams: tuple[Tensor, Tensor, int] | None = None,
) -> Tensor:
    """The codes of :func:`affine_act_fake_quantize`, whose result is (codes - zero_point) * scale, in one pass.

    What integer inference stores between layers: one byte an element. Codes have no gradient. NaN, which an integer
    cannot hold, has code 0.

    Args:
        x, scale, shift, residual, act: as in :func:`affine_act_fake_quantize`.
        qparams: (scale, zero_point, bits) of the quantiser, one element each and a width in 2..8; it must be given.

    Returns:
        uint8 tensor with the shape of `x` and values in 0..2^bits - 1.

    Raises:
        InvalidInputError: as :func:`affine_act_fake_quantize`, or `qparams` is None.
    """
    if qparams is None:
        raise InvalidInputError("qparams must be (scale, zero_point, bits): without a quantiser there are no codes")
    with torch.no_grad():
        return run("affine_act_quantize", *_checked(x, scale, shift, residual, act, qparams))


def _checked(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    act: str,
    qparams: tuple[Tensor, Tensor, int] | None,
) -> tuple[Any, ...]:
    """The operators' arguments, after every check."""
    checks.check_floating("x", x)
    if x.dim() < 2:
        raise InvalidInputError(f"x must have at least the dimensions [N, C], got shape {list(x.shape)}")
    checks.check_channelwise("scale", scale, x)
    checks.check_channelwise("shift", shift, x)
    reference.act_number(act)
    if residual is not None:
        checks.check_floating("residual", residual)
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype or residual.device != x.device):
        raise InvalidInputError(
            f"residual must be {x.dtype} {list(x.shape)} on {x.device} like x, got {residual.dtype} "
            f"{list(residual.shape)} on {residual.device}"
        )
    dtype = compute_dtype(x.dtype)
    act_scale = act_zero_point = None
    bits = checks.MAX_BITS
    if qparams is not None:
        if not isinstance(qparams, (tuple, list)) or len(qparams) != 3:
            raise InvalidInputError(f"qparams must be (scale, zero_point, bits) or None, got {qparams!r}")
        act_scale, act_zero_point, bits = qparams
        checks.check_bits("bits", bits)
        act_scale, act_zero_point = checks.check_quantizer(act_scale, act_zero_point, None, x, dtype)
    if scale.dtype is not dtype or shift.dtype is not dtype:
        scale, shift = scale.to(dtype), shift.to(dtype)
    return x, scale, shift, residual, act, act_scale, act_zero_point, bits
