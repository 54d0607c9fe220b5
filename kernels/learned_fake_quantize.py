"""Backward of fake quantisation with a learned step (LSQ), alone and in the tail of a quantised layer.

q = x / scale_c, k = round(q), codes are lo <= k <= hi with lo = -zero_point_c, hi = lo + 2^bits - 1
grad_x       = grad where k is a code, else 0
grad_scale_c = sum grad * (k - q where k is a code; lo where k < lo; hi where k > hi)
In the tail of a layer x is act(x * scale_c + shift_c + residual) and the quantiser is one for the tensor; what passes
it goes on as in kernels/affine_act_fake_quantize.py.

Bytes an element, float32: 12, and in the tail 4 more for each of residual and grad_residual; 16-bit types half of that.

A launch for each tensor of a list. Steps of channels: one more unless a channel's sums are one program's; in the tail:
one more, and another then. A lane sums at most 256 terms in float32, everything beyond is float64. Scratch: one float64
a channel and chunk, in the tail up to three.

Test: python -m pytest tests/test_triton.py -k learned
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from adadfq.kernels import fake_quantize, tiles
from adadfq.kernels.affine_act_fake_quantize import _activation, _where_sloped, add_splits
from adadfq.kernels.arithmetic import divisor, quotient, round_half_even
from adadfq.kernels.tiles import (
    channel_numbers,
    channel_sum,
    chunk,
    chunk_base,
    per_channel,
    positions,
    store_per_channel,
    tile,
)
from adadfq.ops.native_args import Layout

#: (grad, x, grad_x, scale, zero_point, grad_scale, layout, bits)
Call = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Layout, int]

#: Sums that one program adds at a time to the gradient of a layer's step.
ADDED = 1024


@triton.jit
def _learned_step(x, factor, s, r, zero_point, qmax):
    """(whether `x` has a code, the factor of its gradient for the step); false and NaN where `x` is NaN."""
    # One more on each side is enough to tell what is outside.
    q = quotient(x, factor, s, r, (-1.25 - zero_point) * s, (qmax + 1.25 - zero_point) * s)
    whole = round_half_even(q)
    lo = 0.0 - zero_point
    hi = qmax - zero_point
    slope = tl.where(whole < lo, lo, tl.where(whole > hi, hi, whole - q))
    return (whole >= lo) & (whole <= hi), slope


@triton.jit
def learned_backward_kernel(
    grad_ptr,
    x_ptr,
    grad_x_ptr,
    scale_ptr,
    zero_point_ptr,
    grad_scale_ptr,
    blocks,
    channels,
    inner,
    length: tl.int64,
    tiles,
    multiplier: tl.int64,
    digits,
    qmax,
    R: tl.constexpr,
    K: tl.constexpr,
    VECTOR: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """grad_x, and this chunk's sums to grad_scale [splits, channels]."""
    block, start, count = chunk(blocks, length, tiles, R, K, COLUMNS, WIDE)
    channel = channel_numbers(block, channels, K, COLUMNS)
    base, lead = chunk_base(block, start, channels, inner, K, VECTOR, COLUMNS, WIDE)
    factor, s, r = divisor(tl.load(scale_ptr + channel))
    factor, s, r = per_channel(factor, COLUMNS), per_channel(s, COLUMNS), per_channel(r, COLUMNS)
    zero_point = per_channel(tl.load(zero_point_ptr + channel).to(tl.float32), COLUMNS)
    total = tl.zeros([R, K], tl.float32)
    for t in range(0, tl.cdiv(count, positions(R, K, COLUMNS))):
        offset, mask = tile(t, block, lead, count, channels, inner, multiplier, digits, R, K, VECTOR, COLUMNS, WIDE)
        grad = tl.load(grad_ptr + base + offset, mask=mask, other=0.0)
        x = tl.load(x_ptr + base + offset, mask=mask, other=0.0).to(tl.float32)
        inside, slope = _learned_step(x, factor, s, r, zero_point, qmax)
        tl.store(grad_x_ptr + base + offset, tl.where(inside, grad, tl.zeros_like(grad)), mask=mask)
        total += grad.to(tl.float32) * slope
    # One split's sums are the results themselves.
    place = (tl.program_id(0) // blocks).to(tl.int64) * channels
    result = channel_sum(total.to(tl.float64), COLUMNS).to(grad_scale_ptr.dtype.element_ty)
    store_per_channel(grad_scale_ptr + place, result, block, channels, K, COLUMNS)


@triton.jit
def affine_act_learned_backward_kernel(
    grad_ptr,
    x_ptr,
    scale_ptr,
    shift_ptr,
    residual_ptr,
    act_scale_ptr,
    act_zero_point_ptr,
    grad_x_ptr,
    grad_residual_ptr,
    grad_scale_ptr,
    grad_shift_ptr,
    steps_ptr,
    blocks,
    channels,
    inner,
    length: tl.int64,
    tiles,
    multiplier: tl.int64,
    digits,
    qmax,
    ACT: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
    VECTOR: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Gradients of elements; this chunk's sums to grad_scale, grad_shift and steps (float64), [splits, channels]."""
    block, start, count = chunk(blocks, length, tiles, R, K, COLUMNS, WIDE)
    channel = channel_numbers(block, channels, K, COLUMNS)
    base, lead = chunk_base(block, start, channels, inner, K, VECTOR, COLUMNS, WIDE)
    scale = per_channel(tl.load(scale_ptr + channel), COLUMNS)
    shift = per_channel(tl.load(shift_ptr + channel), COLUMNS)
    factor, s, r = divisor(tl.load(act_scale_ptr))
    zero_point = tl.load(act_zero_point_ptr).to(tl.float32)
    sum_dux = tl.zeros([R, K], tl.float32)
    sum_du = tl.zeros([R, K], tl.float32)
    sum_step = tl.zeros([R, K], tl.float32)
    for t in range(0, tl.cdiv(count, positions(R, K, COLUMNS))):
        offset, mask = tile(t, block, lead, count, channels, inner, multiplier, digits, R, K, VECTOR, COLUMNS, WIDE)
        grad = tl.load(grad_ptr + base + offset, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + base + offset, mask=mask, other=0.0).to(tl.float32)
        u = x * scale + shift
        if residual_ptr is not None:
            u += tl.load(residual_ptr + base + offset, mask=mask, other=0.0).to(tl.float32)
        inside, slope = _learned_step(_activation(u, ACT), factor, s, r, zero_point, qmax)
        # Where there is no element u is the shift, which may be anything.
        sum_step += tl.where(mask, grad * slope, 0.0)
        du = _where_sloped(tl.where(inside, grad, 0.0), u, ACT)
        tl.store(grad_x_ptr + base + offset, (du * scale).to(grad_x_ptr.dtype.element_ty), mask=mask)
        if grad_residual_ptr is not None:
            tl.store(grad_residual_ptr + base + offset, du.to(grad_residual_ptr.dtype.element_ty), mask=mask)
        if grad_scale_ptr is not None:
            sum_dux += du * x
            sum_du += du
    place = (tl.program_id(0) // blocks).to(tl.int64) * channels
    if grad_scale_ptr is not None:
        total = channel_sum(sum_dux.to(tl.float64), COLUMNS).to(grad_scale_ptr.dtype.element_ty)
        store_per_channel(grad_scale_ptr + place, total, block, channels, K, COLUMNS)
        total = channel_sum(sum_du.to(tl.float64), COLUMNS).to(grad_shift_ptr.dtype.element_ty)
        store_per_channel(grad_shift_ptr + place, total, block, channels, K, COLUMNS)
    total = channel_sum(sum_step.to(tl.float64), COLUMNS)
    store_per_channel(steps_ptr + place, total, block, channels, K, COLUMNS)


@triton.jit
def add_all_kernel(partial_ptr, total_ptr, count, BLOCK: tl.constexpr):
    """The sum of `count` float64 numbers, in float32; one program."""
    total = tl.zeros([BLOCK], tl.float64)
    for first in range(0, count, BLOCK):
        place = first + tl.arange(0, BLOCK)
        total += tl.load(partial_ptr + place, mask=place < count, other=0.0)
    tl.store(total_ptr, tl.sum(total, 0).to(tl.float32))


def foreach_fake_quantize(calls: list[tuple[Tensor, Tensor, Tensor, Tensor, Layout, int]]) -> None:
    """:func:`adadfq.kernels.fake_quantize.fake_quantize` of every call: (x, out, scale, zero_point, layout, bits)."""
    for x, out, scale, zero_point, layout, bits in calls:
        fake_quantize.fake_quantize(x, scale, zero_point, out, layout.channels, layout.inner, bits)


def learned_fake_quantize_backward(calls: list[Call]) -> None:
    """Write grad_x and grad_scale of every call.

    Args:
        calls: (grad, x, grad_x, scale, zero_point, grad_scale, layout, bits), not none. `grad`, `x` and `grad_x` are
            dense with the same strides, not empty; float32, bfloat16 or float16. `scale` and `grad_scale` are float32
            [channels], `zero_point` is int32 [channels].
    """
    for grad, x, grad_x, scale, zero_point, grad_scale, layout, bits in calls:
        plan = tiles.plan(x, layout)
        sums = grad_scale
        if plan.splits > 1:
            sums = torch.empty(1, plan.splits, layout.channels, dtype=torch.float64, device=x.device)
        learned_backward_kernel[plan.grid](
            grad, x, grad_x, scale, zero_point, sums, *plan.walk, 2**bits - 1, **plan.options
        )
        if plan.splits > 1:
            add_splits(sums, (grad_scale,))


def affine_act_learned_fake_quantize_backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    act: int,
    act_scale: Tensor,
    act_zero_point: Tensor,
    bits: int,
    grad_x: Tensor,
    grad_residual: Tensor | None,
    grad_scale: Tensor | None,
    grad_shift: Tensor | None,
    grad_act_scale: Tensor,
    layout: Layout,
) -> None:
    """Write the gradients that are not None.

    Args:
        grad, grad_x, grad_residual: like `x`; the others as in
            :func:`adadfq.kernels.affine_act_fake_quantize.affine_act_fake_quantize`.
        grad_scale, grad_shift: float32 [channels], both or neither.
        grad_act_scale: one float32.
    """
    plan = tiles.plan(x, layout)
    partial = torch.empty(3, plan.splits, layout.channels, dtype=torch.float64, device=x.device)
    sums: tuple[Tensor | None, ...] = (grad_scale, grad_shift)
    if grad_scale is not None and plan.splits > 1:
        sums = partial[:2].unbind()
    affine_act_learned_backward_kernel[plan.grid](
        grad,
        x,
        scale,
        shift,
        residual,
        act_scale,
        act_zero_point,
        grad_x,
        grad_residual,
        *sums,
        partial[2],
        *plan.walk,
        2**bits - 1,
        ACT=act,
        **plan.options,
    )
    if grad_scale is not None and grad_shift is not None and plan.splits > 1:
        add_splits(partial[:2], (grad_scale, grad_shift))
    add_all_kernel[(1,)](
        partial[2], grad_act_scale, plan.splits * layout.channels, BLOCK=ADDED, num_warps=8, enable_fp_fusion=False
    )
