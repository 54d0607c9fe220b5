"""Fake quantisation over a dense tensor, and its clipped straight-through backward.

x_hat = round(clamp(x / scale_c, -zero_point_c, 2^bits - 1 - zero_point_c)) * scale_c
grad  = grad where round(x / scale_c) + zero_point_c is in 0..2^bits - 1, else 0

Bytes an element, float32: 8 forward (also in place), 12 backward; 16-bit types half of that.

Test: python -m pytest tests/test_triton.py -k fake_quantize
Time: python -m benchmarks ops --device cuda --suite gpu --ops fake_quantize --json out.json
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from adadfq.kernels.arithmetic import divisor, quotient, round_half_even
from adadfq.kernels.segments import channels_at, elements, first_element, load, load_params, plan, store, to_tile


@triton.jit
def fake_quantize_kernel(
    x_ptr,
    scale_ptr,
    zero_point_ptr,
    out_ptr,
    n: tl.int64,
    segment: tl.int64,
    channels,
    inner,
    qmax,
    PARAMS: tl.constexpr,
    GROUP: tl.constexpr,
    SEGMENTS: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    start = first_element(WIDE, BLOCK)
    channel = channels_at(start, channels, inner, PARAMS, GROUP, BLOCK)
    scale = load_params(scale_ptr, channel, PARAMS, GROUP, BLOCK)
    zero_point = load_params(zero_point_ptr, channel, PARAMS, GROUP, BLOCK).to(tl.float32)
    factor, s, r = divisor(scale)
    lo = to_tile((-0.25 - zero_point) * s, PARAMS, GROUP, BLOCK)
    hi = to_tile((qmax + 0.25 - zero_point) * s, PARAMS, GROUP, BLOCK)
    factor = to_tile(factor, PARAMS, GROUP, BLOCK)
    s = to_tile(s, PARAMS, GROUP, BLOCK)
    r = to_tile(r, PARAMS, GROUP, BLOCK)
    scale = to_tile(scale, PARAMS, GROUP, BLOCK)
    offsets, mask, whole = elements(start, n, segment, SEGMENTS, BLOCK)
    x = load(x_ptr, offsets, mask, whole).to(tl.float32)
    code = round_half_even(quotient(x, factor, s, r, lo, hi))
    store(out_ptr, offsets, code * scale, mask, whole)


@triton.jit
def fake_quantize_backward_kernel(
    grad_ptr,
    x_ptr,
    scale_ptr,
    zero_point_ptr,
    out_ptr,
    n: tl.int64,
    segment: tl.int64,
    channels,
    inner,
    qmax,
    PARAMS: tl.constexpr,
    GROUP: tl.constexpr,
    SEGMENTS: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    start = first_element(WIDE, BLOCK)
    channel = channels_at(start, channels, inner, PARAMS, GROUP, BLOCK)
    zero_point = load_params(zero_point_ptr, channel, PARAMS, GROUP, BLOCK).to(tl.float32)
    factor, s, r = divisor(load_params(scale_ptr, channel, PARAMS, GROUP, BLOCK))
    # One more on each side is enough to tell what is outside.
    lo = to_tile((-1.25 - zero_point) * s, PARAMS, GROUP, BLOCK)
    hi = to_tile((qmax + 1.25 - zero_point) * s, PARAMS, GROUP, BLOCK)
    factor = to_tile(factor, PARAMS, GROUP, BLOCK)
    s = to_tile(s, PARAMS, GROUP, BLOCK)
    r = to_tile(r, PARAMS, GROUP, BLOCK)
    zero_point = to_tile(zero_point, PARAMS, GROUP, BLOCK)
    offsets, mask, whole = elements(start, n, segment, SEGMENTS, BLOCK)
    x = load(x_ptr, offsets, mask, whole).to(tl.float32)
    grad = load(grad_ptr, offsets, mask, whole)
    code = round_half_even(quotient(x, factor, s, r, lo, hi)) + zero_point
    inside = (code >= 0.0) & (code <= qmax)
    store(out_ptr, offsets, tl.where(inside, grad, tl.zeros_like(grad)), mask, whole)


def fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, out: Tensor, channels: int, inner: int, bits: int
) -> None:
    """Write x_hat to `out`, which may be `x`.

    Args:
        x, out: dense, with the same strides; float32, bfloat16 or float16. Element i in memory order belongs to
            channel ``(i // inner) % channels``.
        scale: float32 [channels].
        zero_point: int32 [channels].
    """
    grid, segment, options = plan(x, channels, inner)
    fake_quantize_kernel[grid](x, scale, zero_point, out, x.numel(), segment, channels, inner, 2**bits - 1, **options)


def fake_quantize_backward(
    grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, out: Tensor, channels: int, inner: int, bits: int
) -> None:
    """Write `grad` where `x` has a code and 0 elsewhere to `out`; arguments as in :func:`fake_quantize`."""
    grid, segment, options = plan(x, channels, inner)
    fake_quantize_backward_kernel[grid](
        grad, x, scale, zero_point, out, x.numel(), segment, channels, inner, 2**bits - 1, **options
    )
