"""Fake quantisation of each channel over its own range; see adadfq.ops.reference.dynamic_fake_quantize.

lo, hi = min and max of channel c;  scale_c, zero_point_c = qparams(lo, hi)
x_hat  = round(clamp(x / scale_c, -zero_point_c, 2^bits - 1 - zero_point_c)) * scale_c
A NaN or infinite element makes scale_c NaN, and so x_hat of its channel.

Channels that are rows of memory, as in weights: one launch for up to 64 tensors. A program has a row, or several short
ones; it reads the row twice, the second time from a cache (never, where it is one block), and so moves, float32, 8
bytes an element; 16-bit types half of that. Triton takes tensors and sizes as tuples, which lie in the kernel's
parameters (4 KB of them): nothing is copied to the device.

Other channels, and rows that are very long: three launches a tensor. Programs store the ends of their parts of a
channel to scratch memory (8 bytes each), a small kernel finishes the ranges, and kernels.fake_quantize does the rest.
That moves 12 bytes an element, or 8 where the tensor stays in a cache.

Test: python -m pytest tests/test_triton.py -k dynamic_fake_quantize
Time: python -m benchmarks ops --device cuda --suite gpu --ops dynamic_fake_quantize --json out.json
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from adadfq.kernels import configs, tiles
from adadfq.kernels.arithmetic import divisor, qparams, quotient, round_half_even
from adadfq.kernels.fake_quantize import fake_quantize
from adadfq.kernels.tiles import chunk, chunk_base, store_per_channel, tile
from adadfq.ops.native_args import Layout

#: (x, out, scale, zero_point, layout, bits)
Call = tuple[Tensor, Tensor, Tensor, Tensor, Layout, int]

#: Rows of at most so many elements share a program: tiny ones have a warp for several, short ones all warps for each.
TINY, SHORT = 32, 256
#: Longer rows are split over programs.
LONGEST = 2**16
#: Tensors of a launch, and how many of them a program tries at once: for each it selects 8 values.
TENSORS, GROUP = 64, 4
#: Rows of a launch.
ROWS = 2**26
#: Triton compiles for an int of 1 and for multiples of 16 apart: all sizes are passed as multiples of it.
UNIT = 16

_TINY, _SHORT = tl.constexpr(TINY), tl.constexpr(SHORT)
_GROUP, _UNIT = tl.constexpr(GROUP), tl.constexpr(UNIT)


@triton.jit
def _range_end(hi):
    # tl.min and tl.max lose NaN, which has come to both ends; an infinity does as well, and stays.
    return tl.where(hi == hi, hi, float("inf"))


@triton.jit
def _load(x_ptr, first, inner, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    local = first + tl.arange(0, BLOCK)
    x_ptr += local
    if ALIGNED:
        x_ptr = tl.multiple_of(x_ptr, 16)
    # The range holds 0 in any case.
    return tl.load(x_ptr, mask=local < inner, other=0.0).to(tl.float32)


@triton.jit
def _store(out_ptr, v, first, inner, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    local = first + tl.arange(0, BLOCK)
    out_ptr += local
    if ALIGNED:
        out_ptr = tl.multiple_of(out_ptr, 16)
    tl.store(out_ptr, v.to(out_ptr.dtype.element_ty), mask=local < inner)


@triton.jit
def _long_row(x_ptr, out_ptr, scale_ptr, zero_point_ptr, row, inner, qmax, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    if ALIGNED:
        vector: tl.constexpr = 128 // x_ptr.dtype.element_ty.primitive_bitwidth
        inner = inner // vector * vector  # the same number, as the compiler now knows
    x_ptr += row.to(tl.int64) * inner
    out_ptr += row.to(tl.int64) * inner
    x = _load(x_ptr, 0, inner, ALIGNED, BLOCK)
    lo = tl.minimum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    hi = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    last = (inner - 1) // BLOCK * BLOCK
    for first in range(BLOCK, inner, BLOCK):
        x = _load(x_ptr, first, inner, ALIGNED, BLOCK)
        lo = tl.minimum(lo, x, propagate_nan=tl.PropagateNan.ALL)
        hi = tl.maximum(hi, x, propagate_nan=tl.PropagateNan.ALL)
    scale, zero_point = qparams(tl.min(lo, 0), tl.max(_range_end(hi), 0), qmax)
    tl.store(scale_ptr + row, scale)
    tl.store(zero_point_ptr + row, zero_point.to(tl.int32))
    factor, s, r = divisor(scale)
    low, high = (-0.25 - zero_point) * s, (qmax + 0.25 - zero_point) * s
    # The last block is still in registers.
    code = round_half_even(quotient(x, factor, s, r, low, high))
    _store(out_ptr, code * scale, last, inner, ALIGNED, BLOCK)
    for first in range(0, last, BLOCK):
        x = _load(x_ptr, first, inner, ALIGNED, BLOCK)
        code = round_half_even(quotient(x, factor, s, r, low, high))
        _store(out_ptr, code * scale, first, inner, ALIGNED, BLOCK)


@triton.jit
def _short_rows(
    x_ptr,
    out_ptr,
    scale_ptr,
    zero_point_ptr,
    program,
    rows,
    inner,
    qmax,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK // WIDTH rows of at most WIDTH elements."""
    first = program * (BLOCK // WIDTH)
    x_ptr += first.to(tl.int64) * inner
    out_ptr += first.to(tl.int64) * inner
    local = tl.arange(0, BLOCK // WIDTH)
    row = first + local
    column = tl.arange(0, WIDTH)[None, :]
    exists = row < rows
    place = local[:, None] * inner + column
    mask = exists[:, None] & (column < inner)
    x = tl.load(x_ptr + place, mask=mask, other=0.0).to(tl.float32)
    scale, zero_point = qparams(tl.min(x, 1), tl.max(_range_end(x), 1), qmax)
    tl.store(scale_ptr + row, scale, mask=exists)
    tl.store(zero_point_ptr + row, zero_point.to(tl.int32), mask=exists)
    factor, s, r = divisor(scale)
    low, high = (-0.25 - zero_point) * s, (qmax + 0.25 - zero_point) * s
    code = round_half_even(quotient(x, factor[:, None], s[:, None], r[:, None], low[:, None], high[:, None]))
    tl.store(out_ptr + place, (code * scale[:, None]).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def rows_kernel(
    x_ptrs,
    out_ptrs,
    scale_ptrs,
    zero_point_ptrs,
    firsts,
    many_rows,
    inners,
    many_qmax,
    BLOCK: tl.constexpr,
    SCALARS: tl.constexpr,
):
    """Tensor i has the programs from firsts[i] to firsts[i + 1]."""
    place = tl.program_id(0) * _UNIT
    x_ptr, out_ptr, scale_ptr, zero_point_ptr = x_ptrs[0], out_ptrs[0], scale_ptrs[0], zero_point_ptrs[0]
    first, rows, inner, qmax = firsts[0], many_rows[0], inners[0], many_qmax[0]
    for g in tl.static_range(0, len(x_ptrs), _GROUP):
        if (place >= firsts[g]) & (place < firsts[g + _GROUP]):
            for i in tl.static_range(g, g + _GROUP):
                reached = place >= firsts[i]
                x_ptr = tl.where(reached, x_ptrs[i], x_ptr)
                out_ptr = tl.where(reached, out_ptrs[i], out_ptr)
                scale_ptr = tl.where(reached, scale_ptrs[i], scale_ptr)
                zero_point_ptr = tl.where(reached, zero_point_ptrs[i], zero_point_ptr)
                first = tl.where(reached, firsts[i], first)
                rows = tl.where(reached, many_rows[i], rows)
                inner = tl.where(reached, inners[i], inner)
                qmax = tl.where(reached, many_qmax[i], qmax)
    program, rows, inner, qmax = (place - first) // _UNIT, rows // _UNIT, inner // _UNIT, qmax // _UNIT
    size: tl.constexpr = x_ptr.dtype.element_ty.primitive_bitwidth // 8
    qmax = qmax.to(tl.float32)
    if inner <= _TINY:
        _short_rows(x_ptr, out_ptr, scale_ptr, zero_point_ptr, program, rows, inner, qmax, _TINY, SCALARS // 2)
    elif inner <= _SHORT:
        _short_rows(x_ptr, out_ptr, scale_ptr, zero_point_ptr, program, rows, inner, qmax, _SHORT, SCALARS)
    elif (x_ptr.to(tl.int64) | out_ptr.to(tl.int64) | (inner * size)) % 16 == 0:
        _long_row(x_ptr, out_ptr, scale_ptr, zero_point_ptr, program, inner, qmax, True, BLOCK)
    else:
        _long_row(x_ptr, out_ptr, scale_ptr, zero_point_ptr, program, inner, qmax, False, SCALARS // 2)


@triton.jit
def partial_ranges_kernel(
    x_ptr,
    lo_ptr,
    hi_ptr,
    blocks,
    channels,
    inner,
    length: tl.int64,
    tiles,
    multiplier: tl.int64,
    shift,
    R: tl.constexpr,
    K: tl.constexpr,
    VECTOR: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Ends of each chunk of each channel, to [splits, channels]."""
    block, start, count = chunk(blocks, length, tiles, R, K, COLUMNS, WIDE)
    base, lead = chunk_base(block, start, channels, inner, K, VECTOR, COLUMNS, WIDE)
    lo = tl.zeros([R, K], tl.float32)
    hi = tl.zeros([R, K], tl.float32)
    for t in range(0, tl.cdiv(count, R if COLUMNS else R * K)):
        offset, mask = tile(t, block, lead, count, channels, inner, multiplier, shift, R, K, VECTOR, COLUMNS, WIDE)
        x = tl.load(x_ptr + base + offset, mask=mask, other=0.0).to(tl.float32)
        lo = tl.minimum(lo, x, propagate_nan=tl.PropagateNan.ALL)
        hi = tl.maximum(hi, x, propagate_nan=tl.PropagateNan.ALL)
    lo, hi = tl.min(lo, 0), tl.max(_range_end(hi), 0)
    if not COLUMNS:
        lo, hi = tl.min(lo, 0), tl.max(hi, 0)
    split = (tl.program_id(0) // blocks).to(tl.int64) * channels
    store_per_channel(lo_ptr + split, lo, block, channels, K, COLUMNS)
    store_per_channel(hi_ptr + split, hi, block, channels, K, COLUMNS)


@triton.jit
def finish_ranges_kernel(
    lo_ptr, hi_ptr, scale_ptr, zero_point_ptr, splits, channels, qmax, R: tl.constexpr, K: tl.constexpr
):
    channel = tl.program_id(0) * K + tl.arange(0, K)
    lo = tl.zeros([R, K], tl.float32)
    hi = tl.zeros([R, K], tl.float32)
    for first in range(0, splits, R):
        split = first + tl.arange(0, R)[:, None]
        place = split.to(tl.int64) * channels + channel[None, :]
        mask = (split < splits) & (channel < channels)[None, :]
        lo = tl.minimum(lo, tl.load(lo_ptr + place, mask=mask, other=0.0))
        hi = tl.maximum(hi, tl.load(hi_ptr + place, mask=mask, other=0.0))
    scale, zero_point = qparams(tl.min(lo, 0), tl.max(hi, 0), qmax)
    tl.store(scale_ptr + channel, scale, mask=channel < channels)
    tl.store(zero_point_ptr + channel, zero_point.to(tl.int32), mask=channel < channels)


def _in_rows(layout: Layout) -> bool:
    return layout.outer == 1 and layout.inner <= LONGEST and layout.channels <= ROWS


def _quantize_rows(calls: list[Call]) -> None:
    config = configs.choose("rows", calls[0][0].dtype, sum(call[0].numel() for call in calls))
    threads = config.num_warps * 32
    scalars = max(threads * 8, SHORT)
    # Those that fill the last group have no programs.
    padded = calls + calls[-1:] * (-len(calls) % GROUP)
    x, out, scale, zero_point, layouts, bits = zip(*padded, strict=True)
    firsts = [0]
    for layout in layouts:
        if layout.inner <= TINY:
            rows = scalars // 2 // TINY
        else:
            rows = scalars // SHORT if layout.inner <= SHORT else 1
        programs = triton.cdiv(layout.channels, rows) if len(firsts) <= len(calls) else 0
        firsts.append(firsts[-1] + programs)
    rows_kernel[(firsts[-1],)](
        x,
        out,
        scale,
        zero_point,
        tuple(first * UNIT for first in firsts),
        tuple(layout.channels * UNIT for layout in layouts),
        tuple(layout.inner * UNIT for layout in layouts),
        tuple((2**width - 1) * UNIT for width in bits),
        BLOCK=threads * config.vectors * (16 // calls[0][0].element_size()),
        SCALARS=scalars,
        num_warps=config.num_warps,
        enable_fp_fusion=False,  # contraction would change the rounding
    )


def _quantize_channels(x: Tensor, out: Tensor, scale: Tensor, zero_point: Tensor, layout: Layout, bits: int) -> None:
    plan = tiles.plan(x, layout)
    lo, hi = torch.empty((2, plan.splits, layout.channels), dtype=torch.float32, device=x.device)
    partial_ranges_kernel[plan.grid](x, lo, hi, *plan.walk, **plan.options)
    columns = min(16, triton.next_power_of_2(layout.channels))
    finish_ranges_kernel[(triton.cdiv(layout.channels, columns),)](
        lo,
        hi,
        scale,
        zero_point,
        plan.splits,
        layout.channels,
        2**bits - 1,
        R=min(1024 // columns, triton.next_power_of_2(plan.splits)),
        K=columns,
        enable_fp_fusion=False,
    )
    fake_quantize(x, scale, zero_point, out, layout.channels, layout.inner, bits)


def dynamic_fake_quantize(calls: list[Call]) -> None:
    """Write x_hat, scale and zero point of every call.

    Args:
        calls: (x, out, scale, zero_point, layout, bits), not none. `x` and `out` are dense with the same strides, not
            empty, and all of one dtype (float32, bfloat16 or float16) and device; `scale` is float32 [channels] and
            `zero_point` int32 [channels].
    """
    batch: list[Call] = []
    rows = 0
    for call in calls:
        layout = call[4]
        if not _in_rows(layout):
            _quantize_channels(*call)
            continue
        if len(batch) == TENSORS or rows + layout.channels > ROWS:
            _quantize_rows(batch)
            batch, rows = [], 0
        batch.append(call)
        rows += layout.channels
    if batch:
        _quantize_rows(batch)
