"""BatchNorm in training with its activation; matching a layer's batch statistics with running statistics."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from adadfq import checks
from adadfq.errors import InvalidInputError
from adadfq.functional.autograd import first_order_only
from adadfq.ops.run import needs_gradient, run
from adadfq.ops.schema import compute_dtype

__all__ = ["BatchNormAct", "batch_norm_act", "bn_match", "bn_match_forward"]


class BatchNormAct(NamedTuple):
    """Result of :func:`batch_norm_act`.

    Attributes:
        y: shape and dtype of the input; the only one with a gradient.
        mean: float64 [C], of the batch.
        var: float64 [C], biased, of the batch.
    """

    y: Tensor
    mean: Tensor
    var: Tensor


class _BnMatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, running_mean: Tensor, running_var: Tensor) -> Tensor:
        loss, mean, var = run("bn_match", x, running_mean, running_var)
        ctx.save_for_backward(x, mean, var, running_mean, running_var)
        return loss

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return run("bn_match_backward", grad, *ctx.saved_tensors), None, None


class _BnMatchForward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
    ) -> tuple[Tensor, Tensor]:
        y, loss, mean, var = run("bn_match_forward", x, running_mean, running_var, weight, bias, eps)
        ctx.eps = eps
        ctx.save_for_backward(x, mean, var, running_mean, running_var, weight)
        ctx.set_materialize_grads(False)
        return y, loss

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad_y: Tensor | None, grad_loss: Tensor | None) -> tuple[Tensor | None, ...]:
        x, mean, var, running_mean, running_var, weight = ctx.saved_tensors
        if grad_y is None and grad_loss is None:
            return (None,) * 6
        if grad_y is None:
            grad_x = run("bn_match_backward", grad_loss, x, mean, var, running_mean, running_var)
            return grad_x, None, None, None, None, None
        if grad_loss is None:
            grad_loss = running_mean.new_zeros(())
        grad_x = run(
            "bn_match_forward_backward", grad_y, x, grad_loss, mean, var, running_mean, running_var, weight, ctx.eps
        )
        return grad_x, None, None, None, None, None


class _BatchNormAct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, negative_slope: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, mean, var = run("batch_norm_act", x, weight, bias, eps, negative_slope)
        ctx.settings = eps, negative_slope
        ctx.save_for_backward(x, mean, var, weight, bias)
        ctx.mark_non_differentiable(mean, var)
        ctx.set_materialize_grads(False)
        return y, mean, var

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad_y: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad_y is None:
            return (None,) * 5
        grads = run("batch_norm_act_backward", grad_y, *ctx.saved_tensors, *ctx.settings)
        grads = (grad if needed else None for grad, needed in zip(grads, ctx.needs_input_grad, strict=False))
        return *grads, None, None


def _check_layer(x: Tensor, **channelwise: Tensor | None) -> None:
    checks.check_floating("x", x)
    if x.dim() < 2 or x.numel() == 0:
        raise InvalidInputError(f"x must be a non-empty [N, C, ...] tensor, got shape {list(x.shape)}")
    for name, values in channelwise.items():
        if values is not None:
            checks.check_channelwise(name, values, x)


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
    _check_layer(x, running_mean=running_mean, running_var=running_var)
    dtype = compute_dtype(x.dtype)
    running_mean, running_var = checks.as_constant(running_mean, dtype), checks.as_constant(running_var, dtype)
    if not needs_gradient(x):
        return run("bn_match", x, running_mean, running_var)[0]
    return _BnMatch.apply(x, running_mean, running_var)


def bn_match_forward(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """Inference BatchNorm of `x` and its :func:`bn_match` loss, reading `x` once.

    y = (x - running_mean) * (weight / sqrt(running_var + eps)) + bias, as ``torch.nn.functional.batch_norm`` with
    ``training=False``. For a frozen teacher: the gradients of y and of the loss reach `x`, in one pass, and nothing
    else.

    Args:
        x: the layer's input, [N, C, ...], floating.
        running_mean: [C].
        running_var: [C].
        weight: [C], or None for ones; must not require a gradient.
        bias: [C], or None for zeros; must not require a gradient.
        eps: added to the variance, at least 0.

    Returns:
        y (shape and dtype of `x`) and the loss, a scalar as :func:`bn_match` returns.

    Raises:
        InvalidInputError: as :func:`bn_match`; `weight` or `bias` not of shape [C] or requiring a gradient; bad `eps`.
    """
    _check_layer(x, running_mean=running_mean, running_var=running_var, weight=weight, bias=bias)
    eps = checks.check_number("eps", eps, 0)
    for name, values in (("weight", weight), ("bias", bias)):
        if values is not None and values.requires_grad and torch.is_grad_enabled():
            raise InvalidInputError(f"{name} must not require a gradient, which it would not get: detach it")
    dtype = compute_dtype(x.dtype)
    mean, var = checks.as_constant(running_mean, dtype), checks.as_constant(running_var, dtype)
    weight = None if weight is None else checks.as_constant(weight, dtype)
    bias = None if bias is None else checks.as_constant(bias, dtype)
    if not needs_gradient(x):
        return run("bn_match_forward", x, mean, var, weight, bias, eps)[:2]
    return _BnMatchForward.apply(x, mean, var, weight, bias, eps)


def batch_norm_act(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    negative_slope: float = 1.0,
) -> BatchNormAct:
    """BatchNorm with the statistics of the batch and LeakyReLU: ``batch_norm(training=True)``, ``leaky_relu``.

    u = (x - mean) / sqrt(var + eps) * weight + bias; y = u where u > 0, else negative_slope u. A weight and a bias for
    every sample and channel make it class-conditional, without a table expanded over the pixels. Arithmetic is in
    float32 (float64 for float64) from end to end; the backward computes u again. Running statistics are the caller's.

    Args:
        x: the layer's input, [N, C, ...], floating, with at least two values a channel.
        weight: [C] or [N, C], or None for ones.
        bias: in the form of `weight`, or None for zeros.
        eps: added to the variance, positive.
        negative_slope: in 0..1: 1 is no activation, 0 is ReLU.

    Returns:
        y (shape and dtype of `x`, with a gradient to `x`, `weight` and `bias`), and the batch's mean and biased
        variance over every dimension but 1, float64 [C], without a gradient.

    Raises:
        InvalidInputError: a shape, a dtype, a device or a number does not fit; fewer than two values a channel.
    """
    _check_layer(x)
    if x.numel() == x.shape[1]:
        raise InvalidInputError(
            f"x must have at least two values a channel, or it has no variance; got shape {list(x.shape)}"
        )
    for name, values in (("weight", weight), ("bias", bias)):
        if values is not None:
            checks.check_per_sample(name, values, x)
    checks.check_same_form(weight, bias)
    eps = checks.check_number("eps", eps)
    if eps <= 0:
        raise InvalidInputError(f"eps must be positive, got {eps!r}")
    negative_slope = checks.check_number("negative_slope", negative_slope, 0, 1)
    dtype = compute_dtype(x.dtype)
    weight = None if weight is None else weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    if not needs_gradient(x, weight, bias):
        return BatchNormAct(*run("batch_norm_act", x, weight, bias, eps, negative_slope))
    return BatchNormAct(*_BatchNormAct.apply(x, weight, bias, eps, negative_slope))
