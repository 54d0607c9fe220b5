"""Fake quantisation: with given scales, over each channel's own range, or over a moving range."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from adadfq import checks
from adadfq.errors import InvalidInputError
from adadfq.functional.autograd import first_order_only
from adadfq.ops import reference
from adadfq.ops.run import needs_gradient, run
from adadfq.ops.schema import compute_dtype

__all__ = [
    "dynamic_fake_quantize",
    "fake_quantize",
    "foreach_dynamic_fake_quantize",
    "foreach_fake_quantize",
    "observe_fake_quantize",
    "qparams",
]


#: State of an activation range, in the order the operator takes it.
_RANGE_STATE = (
    ("running_min", torch.float32),
    ("running_max", torch.float32),
    ("num_batches", torch.int64),
    ("scale", torch.float32),
    ("zero_point", torch.int32),
)


class _FakeQuantize(torch.autograd.Function):
    """Straight-through: the gradient passes unchanged, at any order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, bits: int, axis: int | None) -> Tensor:
        return run("fake_quantize", x, scale, zero_point, bits, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, None, None, None, None


class _FakeQuantizeClipped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, bits: int, axis: int | None) -> Tensor:
        ctx.bits, ctx.axis = bits, axis
        ctx.save_for_backward(x, scale, zero_point)
        return run("fake_quantize", x, scale, zero_point, bits, axis)

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, zero_point = ctx.saved_tensors
        return run("fake_quantize_backward", grad, x, scale, zero_point, ctx.bits, ctx.axis), None, None, None, None


class _LearnedFakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, bits: int, axis: int | None) -> Tensor:
        ctx.bits, ctx.axis = bits, axis
        ctx.save_for_backward(x, scale, zero_point)
        return run("fake_quantize", x, scale, zero_point, bits, axis)

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, zero_point = ctx.saved_tensors
        grad_x, grad_scale = run("learned_fake_quantize_backward", grad, x, scale, zero_point, ctx.bits, ctx.axis)
        return grad_x if ctx.needs_input_grad[0] else None, grad_scale, None, None, None


class _ForeachFakeQuantize(torch.autograd.Function):
    """Straight-through for every tensor."""

    @staticmethod
    def forward(ctx: Any, count: int, bits: list[int], axis: int | None, *inputs: Tensor) -> tuple[Tensor, ...]:
        tensors, scales, zero_points = (list(inputs[i : i + count]) for i in range(0, 3 * count, count))
        x_hats = run("foreach_fake_quantize", tensors, scales, zero_points, bits, axis)
        constant = [x for x, needed in zip(x_hats, ctx.needs_input_grad[3:], strict=False) if not needed]
        ctx.mark_non_differentiable(*constant)
        ctx.set_materialize_grads(False)
        ctx.count = count
        return tuple(x_hats)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, None, None, *grads, *[None] * (2 * ctx.count)


class _ForeachLearnedFakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, count: int, bits: list[int], axis: int | None, *inputs: Tensor) -> tuple[Tensor, ...]:
        tensors, scales, zero_points = (list(inputs[i : i + count]) for i in range(0, 3 * count, count))
        ctx.count, ctx.bits, ctx.axis = count, bits, axis
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)
        return tuple(run("foreach_fake_quantize", tensors, scales, zero_points, bits, axis))

    @staticmethod
    @first_order_only
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        n, inputs = ctx.count, ctx.saved_tensors
        results: list[Tensor | None] = [None] * (3 * n)
        # Those that reach the loss.
        members = [i for i, grad in enumerate(grads) if grad is not None]
        if members:
            lists = [[grads[i] for i in members], *([inputs[k * n + i] for i in members] for k in range(3))]
            bits = [ctx.bits[i] for i in members]
            grad_tensors, grad_scales = run("foreach_learned_fake_quantize_backward", *lists, bits, ctx.axis)
            for i, grad_x, grad_scale in zip(members, grad_tensors, grad_scales, strict=True):
                results[i] = grad_x if ctx.needs_input_grad[3 + i] else None
                results[n + i] = grad_scale
        return None, None, None, *results


class _DynamicFakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bits: int, axis: int) -> tuple[Tensor, Tensor, Tensor]:
        x_hat, scale, zero_point = run("dynamic_fake_quantize", x, bits, axis)
        ctx.mark_non_differentiable(scale, zero_point)
        ctx.set_materialize_grads(False)
        return x_hat, scale, zero_point

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        return grad, None, None


class _FakeQuantizeInplace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, bits: int, axis: int | None) -> Tensor:
        ctx.mark_dirty(x)
        run("fake_quantize_", x, scale, zero_point, bits, axis)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, None, None, None, None


class _ForeachDynamicFakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, bits: list[int], axis: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        x_hats, scales, zero_points = run("foreach_dynamic_fake_quantize", list(tensors), bits, axis)
        constant = [x for x, needed in zip(x_hats, ctx.needs_input_grad[2:], strict=True) if not needed]
        ctx.mark_non_differentiable(*constant, *scales, *zero_points)
        ctx.set_materialize_grads(False)
        return *x_hats, *scales, *zero_points

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, None, *grads[: len(grads) // 3]


class _ObserveFakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *state_and_settings: Any) -> Tensor:
        return run("observe_fake_quantize", x, *state_and_settings)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, *[None] * 7


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
    inplace: bool = False,
) -> Tensor:
    """Quantise `x` to `bits`-bit codes and back, per tensor or per channel.

    code = clamp(round(x / scale) + zero_point, 0, 2^bits - 1), x_hat = (code - zero_point) * scale, rounding half to
    even (METHOD: the paper's asymmetric quantiser with an integer zero point). NaN stays NaN; infinities saturate.

    The gradient is the straight-through estimator: it passes to `x` unchanged, or, with `clip_grad`, only where `x`
    is inside the range. `zero_point` gets none.

    A `scale` that requires a gradient is a learned step size (LSQ: Esser et al., ICLR 2020). Then the gradient passes
    to `x` only where `x` is inside the range, and `scale` gets the sum, over the tensor or each channel, of the
    gradient times round(x / scale) - x / scale inside the range and times code - zero_point outside. It is not scaled
    by the number of elements or codes: that is the optimizer's learning rate. Where `x` is NaN, so is the gradient of
    `scale`.

    Args:
        x: floating tensor, any shape.
        scale: step size, floating; one element when `axis` is None, else ``[x.shape[axis]]``. It is converted to
            float32 (float64 for float64), and its gradient back. Must be positive: like torch's own
            fake quantisation this does not look, for on a GPU looking would wait for the device.
        zero_point: code of 0, shaped like `scale`, an integer tensor. Must be in 0..2^bits - 1; it is not looked at
            either.
        bits: width, 2..8.
        axis: channel dimension, or None for one scale for the whole tensor.
        clip_grad: zero the gradient outside the range, as it is anyway with a learned `scale`.
        inplace: write over `x` and return it, as ``nn.ReLU(inplace=True)`` does. Not with `clip_grad` or a learned
            `scale`, whose backward needs the old values.

    Returns:
        Tensor with the shape and dtype of `x`.

    Raises:
        InvalidInputError: `bits`, `axis`, a shape, a dtype or a device does not fit; `inplace` with `clip_grad` or
            with a `scale` that requires a gradient.
    """
    checks.check_floating("x", x)
    checks.check_bits("bits", bits)
    if axis is not None:
        axis = checks.check_axis(axis, x)
    scale, zero_point = checks.check_quantizer(scale, zero_point, axis, x, compute_dtype(x.dtype))
    learned = checks.is_learned(scale)
    if inplace:
        if clip_grad or learned:
            what = "clip_grad" if clip_grad else "a scale that requires a gradient"
            raise InvalidInputError(f"inplace must be False with {what}, whose backward needs the old values of x")
        if x.requires_grad and x.is_leaf and torch.is_grad_enabled():
            raise InvalidInputError("inplace must be False for a leaf that requires a gradient")
        if not needs_gradient(x):
            run("fake_quantize_", x, scale, zero_point, bits, axis)
            return x
        return _FakeQuantizeInplace.apply(x, scale, zero_point, bits, axis)
    if learned:
        return _LearnedFakeQuantize.apply(x, scale, zero_point, bits, axis)
    if not needs_gradient(x):
        return run("fake_quantize", x, scale, zero_point, bits, axis)
    function = _FakeQuantizeClipped if clip_grad else _FakeQuantize
    return function.apply(x, scale, zero_point, bits, axis)


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
    axis = checks.check_axis(axis, x)
    if not needs_gradient(x):
        return run("dynamic_fake_quantize", x, bits, axis)
    return _DynamicFakeQuantize.apply(x, bits, axis)


def foreach_dynamic_fake_quantize(
    tensors: Sequence[Tensor], bits: int | Sequence[int], axis: int = 0
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """:func:`dynamic_fake_quantize` of every tensor of a list in one call: all the weights of a network.

    Args:
        tensors: floating tensors with at least one dimension, of one dtype, on one device.
        bits: width, 2..8, of all or one a tensor.
        axis: channel dimension of every tensor.

    Returns:
        x_hats, scales and zero_points, a list each, in the order of `tensors`. Only x_hats carry gradients.

    Raises:
        InvalidInputError: a width, the axis, a dtype or a device does not fit, or there are not as many widths as
            tensors.
    """
    tensors, widths = _checked_list(tensors, bits)
    if not tensors:
        return [], [], []
    axis = _checked_axis(axis, tensors)
    if not needs_gradient(*tensors):
        return run("foreach_dynamic_fake_quantize", tensors, widths, axis)
    results = _ForeachDynamicFakeQuantize.apply(widths, axis, *tensors)
    n = len(tensors)
    return list(results[:n]), list(results[n : 2 * n]), list(results[2 * n :])


def foreach_fake_quantize(
    tensors: Sequence[Tensor],
    scales: Sequence[Tensor],
    zero_points: Sequence[Tensor],
    bits: int | Sequence[int],
    axis: int | None = 0,
) -> list[Tensor]:
    """:func:`fake_quantize` of every tensor of a list in one call: all the weights of a network with given steps.

    One call each way also where all scales are learned; where some are, those are a call of their own.

    Args:
        tensors: floating tensors of one dtype, on one device.
        scales: of every tensor, as in :func:`fake_quantize`; where it requires a gradient, gradients are those of a
            learned step size, for other tensors they pass unchanged.
        zero_points: of every tensor, as in :func:`fake_quantize`.
        bits: width, 2..8, of all or one a tensor.
        axis: channel dimension of every tensor, or None for one scale a tensor.

    Returns:
        x_hats, in the order of `tensors`.

    Raises:
        InvalidInputError: a width, the axis, a shape, a dtype or a device does not fit, or the lists differ in length.
    """
    tensors, widths = _checked_list(tensors, bits)
    scales, zero_points = list(scales), list(zero_points)
    if not len(tensors) == len(scales) == len(zero_points):
        raise InvalidInputError(
            f"there must be a scale and a zero point for each of {len(tensors)} tensors, got {len(scales)} and "
            f"{len(zero_points)}"
        )
    if not tensors:
        return []
    if axis is not None:
        axis = _checked_axis(axis, tensors)
    dtype = compute_dtype(tensors[0].dtype)
    for i, x in enumerate(tensors):
        scales[i], zero_points[i] = checks.check_quantizer(scales[i], zero_points[i], axis, x, dtype)
    learned = [i for i, scale in enumerate(scales) if checks.is_learned(scale)]
    given = [i for i, scale in enumerate(scales) if not checks.is_learned(scale)]
    x_hats = list(tensors)
    for members, function in ((learned, _ForeachLearnedFakeQuantize), (given, _ForeachFakeQuantize)):
        if not members:
            continue
        lists = [[values[i] for i in members] for values in (tensors, scales, zero_points)]
        group = [widths[i] for i in members]
        if needs_gradient(*lists[0], *lists[1]):
            results = function.apply(len(members), group, axis, *lists[0], *lists[1], *lists[2])
        else:
            results = run("foreach_fake_quantize", *lists, group, axis)
        for i, x_hat in zip(members, results, strict=True):
            x_hats[i] = x_hat
    return x_hats


def _checked_list(tensors: Sequence[Tensor], bits: int | Sequence[int]) -> tuple[list[Tensor], list[int]]:
    """The tensors, of one dtype and device, and the width of each."""
    if isinstance(tensors, Tensor):
        raise InvalidInputError("tensors must be a list of tensors, got one: its rows would be quantised on their own")
    tensors = list(tensors)
    widths = list(bits) if isinstance(bits, Sequence) else [checks.check_bits("bits", bits)] * len(tensors)
    if len(widths) != len(tensors):
        raise InvalidInputError(f"bits must be one width or one a tensor, got {len(widths)} for {len(tensors)} tensors")
    for i, (x, width) in enumerate(zip(tensors, widths, strict=True)):
        checks.check_floating(f"tensors[{i}]", x)
        checks.check_bits("bits", width)
        if x.dtype != tensors[0].dtype or x.device != tensors[0].device:
            raise InvalidInputError(
                f"tensors must have one dtype and device, got {tensors[0].dtype} on {tensors[0].device} and {x.dtype} "
                f"on {x.device} at position {i}"
            )
    return tensors, widths


def _checked_axis(axis: int, tensors: list[Tensor]) -> int:
    """`axis` counted from the front, a dimension of every tensor."""
    for x in tensors:
        if checks.check_axis(axis, x) != axis and x.dim() != tensors[0].dim():
            raise InvalidInputError("axis must be counted from the front for tensors of different dimensions")
    return checks.check_axis(axis, tensors[0])


def observe_fake_quantize(
    x: Tensor,
    running_min: Tensor,
    running_max: Tensor,
    num_batches: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bits: int,
    momentum: float = 0.9,
) -> Tensor:
    """Move an activation range by the min/max of `x`, then quantise `x` per tensor with it.

    After n batches the average weighs batch i by momentum^(n - i), divided by the sum of those weights: unbiased from
    the first batch on (METHOD: the authors' average is not). scale and zero_point follow by :func:`qparams`. The five
    state tensors are updated in place; the gradient passes to `x` unchanged.

    Args:
        x: floating tensor, not empty.
        running_min: float32, one element.
        running_max: float32, one element.
        num_batches: int64, one element: how many batches the range has seen.
        scale: float32, one element; overwritten.
        zero_point: int32, one element; overwritten.
        bits: width, 2..8.
        momentum: weight of the past, 0 <= momentum < 1.

    Returns:
        Tensor with the shape and dtype of `x`.

    Raises:
        InvalidInputError: `x` is empty or not floating, `bits` or `momentum` is out of range, or a state tensor has
            another dtype, size or device. Nothing is changed then.
    """
    checks.check_floating("x", x)
    checks.check_bits("bits", bits)
    if checks.check_number("momentum", momentum, 0, 1) == 1:
        raise InvalidInputError("momentum must be below 1, got 1: the range would never move")
    if x.numel() == 0:
        raise InvalidInputError(f"x must hold at least one element, got shape {list(x.shape)}")
    state = (running_min, running_max, num_batches, scale, zero_point)
    for values, (name, dtype) in zip(state, _RANGE_STATE, strict=True):
        if not isinstance(values, Tensor) or values.requires_grad:
            raise InvalidInputError(f"{name} must be a tensor without a gradient, got {values!r}")
        if values.numel() != 1 or values.dtype != dtype or values.device != x.device:
            raise InvalidInputError(
                f"{name} must hold one {dtype} on {x.device}, got {values.numel()} of {values.dtype} on {values.device}"
            )
    # The other two have dtypes of their own. Not by id(): Dynamo then compiles each range anew, and that of torch 2.11
    # has none for tensors made in the graph.
    if running_min is running_max or scale is running_min or scale is running_max:
        raise InvalidInputError("running_min, running_max and scale must be different tensors")
    if not needs_gradient(x):
        return run("observe_fake_quantize", x, *state, bits, float(momentum))
    return _ObserveFakeQuantize.apply(x, *state, bits, float(momentum))
