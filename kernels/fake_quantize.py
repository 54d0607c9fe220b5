"""Fake quantisation over a dense tensor, and its clipped straight-through backward, in Triton.

x_hat = round(clamp(x / scale_c, -zero_point_c, 2^bits - 1 - zero_point_c)) * scale_c
grad  = grad where round(x / scale_c) + zero_point_c is in 0..2^bits - 1, else 0

The arithmetic is that of csrc/common/quantizer.h: true division, NaN passes every clamp, rounding half to even by
adding and subtracting 1.5 * 2^23 (exact after the clamp; Triton lets no compiler reassociate it, and
tests/test_triton_interpret.py looks for both additions in the PTX).

Bytes an element, float32: 8 forward, 12 backward; 16-bit types half of that.

Test: python -m pytest tests/test_triton_interpret.py
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024

_MAGIC = tl.constexpr(12582912.0)


@triton.jit
def _clamp_keep_nan(v, lo, hi):
    v = tl.where(v < lo, lo, v)
    return tl.where(v > hi, hi, v)


@triton.jit
def _round_half_even(v):
    return (v + _MAGIC) - _MAGIC


@triton.jit
def _offsets(n, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """Linear indices of this program's elements, in 64 bits where 32 could overflow, and which of them exist."""
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    offsets = program * BLOCK + tl.arange(0, BLOCK)
    return offsets, offsets < n


@triton.jit
def _code_params(scale_ptr, zero_point_ptr, offsets, mask, channels, inner, qmax, PER_CHANNEL: tl.constexpr):
    """Scale, smallest and largest x / scale that has a code, of every element (per channel) or of all."""
    if PER_CHANNEL:
        channel = (offsets // inner) % channels
        scale = tl.load(scale_ptr + channel, mask=mask, other=1.0)
        zero_point = tl.load(zero_point_ptr + channel, mask=mask, other=0).to(tl.float32)
    else:
        scale = tl.load(scale_ptr)
        zero_point = tl.load(zero_point_ptr).to(tl.float32)
    return scale, 0.0 - zero_point, qmax - zero_point


@triton.jit
def fake_quantize_kernel(
    x_ptr,
    scale_ptr,
    zero_point_ptr,
    out_ptr,
    n,
    channels,
    inner,
    qmax,
    PER_CHANNEL: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offsets, mask = _offsets(n, WIDE, BLOCK)
    scale, lo, hi = _code_params(scale_ptr, zero_point_ptr, offsets, mask, channels, inner, qmax, PER_CHANNEL)
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    code = _round_half_even(_clamp_keep_nan(tl.div_rn(x, tl.zeros_like(x) + scale), lo, hi))
    tl.store(out_ptr + offsets, (code * scale).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def fake_quantize_backward_kernel(
    grad_ptr,
    x_ptr,
    scale_ptr,
    zero_point_ptr,
    out_ptr,
    n,
    channels,
    inner,
    qmax,
    PER_CHANNEL: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offsets, mask = _offsets(n, WIDE, BLOCK)
    scale, lo, hi = _code_params(scale_ptr, zero_point_ptr, offsets, mask, channels, inner, qmax, PER_CHANNEL)
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    # One more on each side is enough to tell what is outside.
    code = _round_half_even(_clamp_keep_nan(tl.div_rn(x, tl.zeros_like(x) + scale), lo - 1.0, hi + 1.0))
    grad = tl.load(grad_ptr + offsets, mask=mask, other=0.0)
    tl.store(out_ptr + offsets, tl.where((code >= lo) & (code <= hi), grad, tl.zeros_like(grad)), mask=mask)


def _launch_options(x: Tensor, channels: int) -> tuple[tuple[int], dict[str, int | bool]]:
    n = x.numel()
    # The last program's indices may pass n by less than a block.
    wide = n + BLOCK > 2**31 - 1
    # Contraction would change the rounding.
    options = {"PER_CHANNEL": channels > 1, "WIDE": wide, "BLOCK": BLOCK, "enable_fp_fusion": False}
    return (triton.cdiv(n, BLOCK),), options


def fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, out: Tensor, channels: int, inner: int, bits: int
) -> None:
    """Write x_hat to `out`.

    Args:
        x, out: dense, with the same strides; float32, bfloat16 or float16. Element i in memory order belongs to
            channel ``(i // inner) % channels``.
        scale: float32 [channels].
        zero_point: int32 [channels].
    """
    grid, options = _launch_options(x, channels)
    fake_quantize_kernel[grid](x, scale, zero_point, out, x.numel(), channels, inner, 2**bits - 1, **options)


def fake_quantize_backward(
    grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, out: Tensor, channels: int, inner: int, bits: int
) -> None:
    """Write `grad` where `x` has a code and 0 elsewhere to `out`; arguments as in :func:`fake_quantize`."""
    grid, options = _launch_options(x, channels)
    fake_quantize_backward_kernel[grid](
        grad, x, scale, zero_point, out, x.numel(), channels, inner, 2**bits - 1, **options
    )
