"""The tail of a quantised layer in one pass: per-channel affine map, residual, activation, quantisation; its backward.

u    = act(x * scale_c + shift_c + residual)
out  = round(clamp(u / s, -zero_point, 2^bits - 1 - zero_point)) * s, or that code + zero_point as uint8, or u
du   = grad where act is not flat at x * scale_c + shift_c + residual, else 0
grad_x = du * scale_c, grad_residual = du, grad_scale_c = sum du * x, grad_shift_c = sum du

Bytes an element, float32: 8 forward, 5 where codes are stored, and 4 more with a residual; 12 backward, and 4 more for
each of residual and grad_residual. 16-bit types half of that, and 3 where codes are stored.

One launch; where grad_scale is wanted two, unless a channel's sums are one program's. A lane sums at most 256 products
in float32, everything beyond is float64. Scratch for the second launch: two float64 a channel and chunk.

Test: python -m pytest tests/test_triton.py -k affine_act_fake_quantize
Time: python -m benchmarks ops --device cuda --suite gpu --ops affine_act_fake_quantize --json out.json
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from adadfq.kernels import segments, tiles
from adadfq.kernels.arithmetic import clamp, divisor, quotient, round_half_even
from adadfq.kernels.segments import channels_at, elements, first_element, load, load_params, store, to_tile
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

#: Activations, numbered as in adadfq.ops.reference.ACTS.
_NONE, _RELU6 = tl.constexpr(0), tl.constexpr(2)
#: Splits that :func:`add_splits` adds at a time.
_MOST_SPLITS = 512


@triton.jit
def _activation(u, ACT: tl.constexpr):
    """Comparisons, as the reference: NaN and -0 pass."""
    if ACT != _NONE:
        u = tl.where(u < 0.0, 0.0, u)
    if ACT == _RELU6:
        u = tl.where(u > 6.0, 6.0, u)
    return u


@triton.jit
def _where_sloped(grad, u, ACT: tl.constexpr):
    """`grad` where the activation is not flat at u, else 0."""
    if ACT != _NONE:
        grad = tl.where(u <= 0.0, 0.0, grad)
    if ACT == _RELU6:
        grad = tl.where(u >= 6.0, 0.0, grad)
    return grad


@triton.jit
def affine_act_fake_quantize_kernel(
    x_ptr,
    scale_ptr,
    shift_ptr,
    residual_ptr,
    act_scale_ptr,
    act_zero_point_ptr,
    out_ptr,
    n: tl.int64,
    segment: tl.int64,
    channels,
    inner,
    qmax,
    ACT: tl.constexpr,
    PARAMS: tl.constexpr,
    GROUP: tl.constexpr,
    SEGMENTS: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    start = first_element(WIDE, BLOCK)
    channel = channels_at(start, channels, inner, PARAMS, GROUP, BLOCK)
    scale = to_tile(load_params(scale_ptr, channel, PARAMS, GROUP, BLOCK), PARAMS, GROUP, BLOCK)
    shift = to_tile(load_params(shift_ptr, channel, PARAMS, GROUP, BLOCK), PARAMS, GROUP, BLOCK)
    offsets, mask, whole = elements(start, n, segment, SEGMENTS, BLOCK)
    u = load(x_ptr, offsets, mask, whole).to(tl.float32) * scale + shift
    if residual_ptr is not None:
        u += load(residual_ptr, offsets, mask, whole).to(tl.float32)
    if act_scale_ptr is None:
        u = _activation(u, ACT)
    else:
        act_scale = tl.load(act_scale_ptr)
        zero_point = tl.load(act_zero_point_ptr).to(tl.float32)
        factor, s, r = divisor(act_scale)
        lo = (-0.25 - zero_point) * s
        hi = (qmax + 0.25 - zero_point) * s
        # The quotient is clamped anyway: the activation's own bounds, scaled like u, only make that narrower.
        if ACT != _NONE:
            least = clamp(tl.zeros_like(lo), lo, hi)
            if ACT == _RELU6:
                hi = clamp(6.0 * factor, lo, hi)
            lo = least
        code = round_half_even(quotient(u, factor, s, r, lo, hi))
        if out_ptr.dtype.element_ty == tl.uint8:
            # The larger of NaN and 0 is 0; what NaN becomes as an integer is not the device's to say.
            u = tl.maximum(code + zero_point, 0.0, propagate_nan=tl.PropagateNan.NONE).to(tl.int32)
        else:
            u = code * act_scale
    store(out_ptr, offsets, u, mask, whole)


@triton.jit
def affine_act_backward_kernel(
    grad_ptr,
    x_ptr,
    scale_ptr,
    shift_ptr,
    residual_ptr,
    grad_x_ptr,
    grad_residual_ptr,
    n: tl.int64,
    segment: tl.int64,
    channels,
    inner,
    ACT: tl.constexpr,
    PARAMS: tl.constexpr,
    GROUP: tl.constexpr,
    SEGMENTS: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """grad_x and grad_residual; reads no more than `grad` where the activation is never flat."""
    start = first_element(WIDE, BLOCK)
    channel = channels_at(start, channels, inner, PARAMS, GROUP, BLOCK)
    scale = to_tile(load_params(scale_ptr, channel, PARAMS, GROUP, BLOCK), PARAMS, GROUP, BLOCK)
    if ACT != _NONE:
        shift = to_tile(load_params(shift_ptr, channel, PARAMS, GROUP, BLOCK), PARAMS, GROUP, BLOCK)
    offsets, mask, whole = elements(start, n, segment, SEGMENTS, BLOCK)
    du = load(grad_ptr, offsets, mask, whole).to(tl.float32)
    if ACT != _NONE:
        u = load(x_ptr, offsets, mask, whole).to(tl.float32) * scale + shift
        if residual_ptr is not None:
            u += load(residual_ptr, offsets, mask, whole).to(tl.float32)
        du = _where_sloped(du, u, ACT)
    store(grad_x_ptr, offsets, du * scale, mask, whole)
    if grad_residual_ptr is not None:
        store(grad_residual_ptr, offsets, du, mask, whole)


@triton.jit
def affine_act_backward_sums_kernel(
    grad_ptr,
    x_ptr,
    scale_ptr,
    shift_ptr,
    residual_ptr,
    grad_x_ptr,
    grad_residual_ptr,
    grad_scale_ptr,
    grad_shift_ptr,
    blocks,
    channels,
    inner,
    length: tl.int64,
    tiles,
    multiplier: tl.int64,
    digits,
    ACT: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
    VECTOR: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """:func:`affine_act_backward_kernel`, and this chunk's sums to grad_scale and grad_shift [splits, channels]."""
    block, start, count = chunk(blocks, length, tiles, R, K, COLUMNS, WIDE)
    channel = channel_numbers(block, channels, K, COLUMNS)
    base, lead = chunk_base(block, start, channels, inner, K, VECTOR, COLUMNS, WIDE)
    scale = per_channel(tl.load(scale_ptr + channel), COLUMNS)
    shift = per_channel(tl.load(shift_ptr + channel), COLUMNS)
    sum_dux = tl.zeros([R, K], tl.float32)
    sum_du = tl.zeros([R, K], tl.float32)
    for t in range(0, tl.cdiv(count, positions(R, K, COLUMNS))):
        offset, mask = tile(t, block, lead, count, channels, inner, multiplier, digits, R, K, VECTOR, COLUMNS, WIDE)
        du = tl.load(grad_ptr + base + offset, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + base + offset, mask=mask, other=0.0).to(tl.float32)
        if ACT != _NONE:
            u = x * scale + shift
            if residual_ptr is not None:
                u += tl.load(residual_ptr + base + offset, mask=mask, other=0.0).to(tl.float32)
            du = _where_sloped(du, u, ACT)
        tl.store(grad_x_ptr + base + offset, (du * scale).to(grad_x_ptr.dtype.element_ty), mask=mask)
        if grad_residual_ptr is not None:
            tl.store(grad_residual_ptr + base + offset, du.to(grad_residual_ptr.dtype.element_ty), mask=mask)
        sum_dux += du * x
        sum_du += du
    # One split's sums are the results themselves.
    place = (tl.program_id(0) // blocks).to(tl.int64) * channels
    total = channel_sum(sum_dux.to(tl.float64), COLUMNS).to(grad_scale_ptr.dtype.element_ty)
    store_per_channel(grad_scale_ptr + place, total, block, channels, K, COLUMNS)
    total = channel_sum(sum_du.to(tl.float64), COLUMNS).to(grad_shift_ptr.dtype.element_ty)
    store_per_channel(grad_shift_ptr + place, total, block, channels, K, COLUMNS)


@triton.jit
def add_splits_kernel(
    partial_ptr,
    grad_scale_ptr,
    grad_shift_ptr,
    splits,
    channels,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Sums over the splits of partial [2, splits, channels], for COLUMNS channels of one of the two a program."""
    channel = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    exists = channel < channels
    partial_ptr += tl.program_id(1).to(tl.int64) * splits * channels
    total = tl.zeros([ROWS, COLUMNS], tl.float64)
    for first in range(0, splits, ROWS):
        split = first + tl.arange(0, ROWS)[:, None]
        mask = (split < splits) & exists[None, :]
        total += tl.load(partial_ptr + split.to(tl.int64) * channels + channel[None, :], mask=mask, other=0.0)
    result = tl.sum(total, 0).to(tl.float32)
    if tl.program_id(1) == 0:
        tl.store(grad_scale_ptr + channel, result, mask=exists)
    else:
        tl.store(grad_shift_ptr + channel, result, mask=exists)


def add_splits(partial: Tensor, results: tuple[Tensor, ...]) -> None:
    """Sum `partial` [len(results), splits, channels], float64, over the splits into one or two `results` [channels]."""
    _, splits, channels = partial.shape
    columns = 4  # 32 bytes, the least that memory hands out
    add_splits_kernel[(triton.cdiv(channels, columns), len(results))](
        partial,
        results[0],
        results[-1],
        splits,
        channels,
        ROWS=min(triton.next_power_of_2(splits), _MOST_SPLITS),
        COLUMNS=columns,
        num_warps=8,
        enable_fp_fusion=False,
    )


def affine_act_fake_quantize(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    act: int,
    act_scale: Tensor | None,
    act_zero_point: Tensor | None,
    out: Tensor,
    channels: int,
    inner: int,
    bits: int,
) -> None:
    """Write the result to `out`, which may be `x` or `residual`.

    Args:
        x, residual: dense, with the same strides; float32, bfloat16 or float16. Element i in memory order belongs to
            channel ``(i // inner) % channels``.
        scale, shift: float32 [channels].
        act: position in adadfq.ops.reference.ACTS.
        act_scale, act_zero_point: one float32 and one int32; None leaves the result as it is.
        out: like `x`; or uint8 with its strides, for the codes 0..2^bits - 1 themselves (0 where there is NaN), which
            needs `act_scale`.
    """
    grid, segment, options = segments.plan(x, channels, inner)
    affine_act_fake_quantize_kernel[grid](
        x,
        scale,
        shift,
        residual,
        act_scale,
        act_zero_point,
        out,
        x.numel(),
        segment,
        channels,
        inner,
        2**bits - 1,
        ACT=act,
        **options,
    )


def affine_act_fake_quantize_backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    act: int,
    grad_x: Tensor,
    grad_residual: Tensor | None,
    grad_scale: Tensor | None,
    grad_shift: Tensor | None,
    layout: Layout,
) -> None:
    """Write the gradients that are not None; quantisation passes them unchanged.

    Args:
        grad, grad_x, grad_residual: like `x`; the others as in :func:`affine_act_fake_quantize`.
        grad_scale, grad_shift: float32 [channels], both or neither.
    """
    if act == 0:
        residual = None  # one variant less to compile: u does not matter
    if grad_scale is None or grad_shift is None:
        grid, segment, options = segments.plan(x, layout.channels, layout.inner)
        affine_act_backward_kernel[grid](
            grad,
            x,
            scale,
            shift,
            residual,
            grad_x,
            grad_residual,
            x.numel(),
            segment,
            layout.channels,
            layout.inner,
            ACT=act,
            **options,
        )
        return
    plan = tiles.plan(x, layout)
    sums, partial = (grad_scale, grad_shift), None
    if plan.splits > 1:
        partial = torch.empty(2, plan.splits, layout.channels, dtype=torch.float64, device=x.device)
        sums = partial.unbind()
    affine_act_backward_sums_kernel[plan.grid](
        grad, x, scale, shift, residual, grad_x, grad_residual, *sums, *plan.walk, ACT=act, **plan.options
    )
    if partial is not None:
        add_splits(partial, (grad_scale, grad_shift))
