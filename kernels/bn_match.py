"""Batch statistics against running statistics, per channel of n elements, C channels; and inference BatchNorm of x.

mean_c = sum x / n        var_c = sum (x - mean_c)^2 / n
loss   = sum_c (mean_c - running_mean_c)^2 / C + sum_c (var_c - running_var_c)^2 / C
slope_c = weight_c / sqrt(running_var_c + eps)
y       = (x - running_mean_c) slope_c + bias_c
factor  = dL/dloss 2 / (C n)
dL/dx   = dL/dy slope_c + factor (mean_c - running_mean_c) + factor 2 (var_c - running_var_c) (x - mean_c)

Each lane (what one thread reads of one channel) sums d = x - pivot and d^2 in float32, its pivot being the mean of its
elements in the first tile. Whatever the data, pivot and mean of a lane of T tiles differ so little that rounding weighs
at most T times what it does about the mean itself: an outlier that moves the pivot is part of the lane's variance too.
About the chunk's mean m, the lane's squares are sum (d + (pivot - m))^2, in float64 from there on. A program whose sums
are not finite (NaN, infinities, squares beyond float32) reads its chunk again in float64. Chunks are combined by Chan's
formula.

Launches: the chunks' means and squares, to a scratch tensor [2, splits, C] of float64; their combination and the loss,
two launches where there are many chunks. Backward one.

Bytes an element, float32: 4 for the statistics, 8 with y; backward 8, 12 with dL/dy; 16-bit types half of that.

Test: python -m pytest tests/test_triton.py -k bn_match
Time: python -m benchmarks ops --device cuda --suite gpu --ops bn_match,bn_match_forward --json out.json
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from adadfq.kernels.tiles import (
    Plan,
    channel_numbers,
    chunk,
    chunk_base,
    lane_counts,
    per_channel,
    plan,
    positions,
    store_per_channel,
    tile,
)
from adadfq.ops.native_args import Layout

#: Elements of a tile of chunks and channels; splits of such a tile; channels of the loss's.
_COMBINED, _MOST_SPLITS, _LOSS_BLOCK = 2048, 512, 1024


@triton.jit
def _load64(ptr, channel):
    return tl.load(ptr + channel).to(tl.float64)


@triton.jit
def _batch_norm_slope(running_var_ptr, weight_ptr, channel, EPS: tl.constexpr, HAS_WEIGHT: tl.constexpr):
    """weight / sqrt(running_var + eps), in float64 and then rounded."""
    slope = 1.0 / tl.sqrt(_load64(running_var_ptr, channel) + tl.full([], EPS, tl.float64))
    if HAS_WEIGHT:
        slope = _load64(weight_ptr, channel) * slope
    return slope.to(tl.float32)


@triton.jit
def _lane_sum(v, FOLD: tl.constexpr, R: tl.constexpr, K: tl.constexpr, COLUMNS: tl.constexpr):
    """Sum what a thread has of the tile `v` for one channel: [R / FOLD], or [R / FOLD, K]."""
    v = tl.reshape(v, [FOLD, R // FOLD, K])
    if COLUMNS:
        return tl.sum(v, 0)
    else:
        return tl.sum(tl.sum(v, 2), 0)


@triton.jit
def _to_tile(v, FOLD: tl.constexpr, R: tl.constexpr, K: tl.constexpr, COLUMNS: tl.constexpr):
    """The values of lanes, as :func:`_lane_sum` has them, at each of their elements."""
    if COLUMNS:
        v = v[None, :, :]
    else:
        v = v[None, :, None]
    return tl.reshape(tl.broadcast_to(v, [FOLD, R // FOLD, K]), [R, K])


@triton.jit
def bn_match_chunks_kernel(
    x_ptr,
    running_mean_ptr,
    running_var_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    chunks_ptr,
    splits,
    blocks,
    channels,
    inner,
    length: tl.int64,
    tiles,
    multiplier: tl.int64,
    shift,
    EPS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_Y: tl.constexpr,
    FOLD: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
    VECTOR: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
):
    block, start, count = chunk(blocks, length, tiles, R, K, COLUMNS, WIDE)
    base, lead = chunk_base(block, start, channels, inner, K, VECTOR, COLUMNS, WIDE)
    steps = tl.cdiv(count, positions(R, K, COLUMNS))
    if HAS_Y:
        channel = channel_numbers(block, channels, K, COLUMNS)
        slope = per_channel(_batch_norm_slope(running_var_ptr, weight_ptr, channel, EPS, HAS_WEIGHT), COLUMNS)
        running_mean = per_channel(tl.load(running_mean_ptr + channel), COLUMNS)
        if HAS_BIAS:
            bias = per_channel(tl.load(bias_ptr + channel), COLUMNS)

    offset, mask = tile(0, block, lead, count, channels, inner, multiplier, shift, R, K, VECTOR, COLUMNS, WIDE)
    x = tl.load(x_ptr + base + offset, mask=mask, other=0.0).to(tl.float32)
    first = _lane_sum(x, FOLD, R, K, COLUMNS)
    pivot = tl.div_rn(first, tl.maximum(_lane_sum(mask.to(tl.float32), FOLD, R, K, COLUMNS), 1.0))
    pivot = tl.where(tl.abs(pivot) < float("inf"), pivot, 0.0)
    total = tl.zeros_like(pivot)
    squares = tl.zeros_like(pivot)
    for t in range(0, steps):
        offset, mask = tile(t, block, lead, count, channels, inner, multiplier, shift, R, K, VECTOR, COLUMNS, WIDE)
        x = tl.load(x_ptr + base + offset, mask=mask, other=0.0).to(tl.float32)
        d = tl.where(mask, x - _to_tile(pivot, FOLD, R, K, COLUMNS), 0.0)
        total += _lane_sum(d, FOLD, R, K, COLUMNS)
        squares += _lane_sum(d * d, FOLD, R, K, COLUMNS)
        if HAS_Y:
            y = (x - running_mean) * slope
            if HAS_BIAS:
                y += bias
            tl.store(y_ptr + base + offset, y.to(y_ptr.dtype.element_ty), mask=mask)

    # An infinite sum has infinite or NaN squares.
    broken = tl.max(tl.where(squares < float("inf"), 0, 1), 0)
    if COLUMNS:
        broken = tl.max(broken, 0)
    all_n = count.to(tl.float64)
    if broken == 0:
        n = tl.broadcast_to(lane_counts(count, R, K, COLUMNS), [R, K])
        n = _lane_sum(n, FOLD, R, K, COLUMNS).to(tl.float64)
        pivot64 = pivot.to(tl.float64)
        total64 = total.to(tl.float64)
        mean = tl.sum(n * pivot64 + total64, 0) / all_n
        d64 = pivot64 - per_channel(mean, COLUMNS)
        m2 = tl.sum(squares.to(tl.float64) + (2.0 * total64 + n * d64) * d64, 0)
        m2 = tl.where(m2 < 0.0, 0.0, m2)
    else:
        total64 = tl.zeros(pivot.shape, tl.float64)
        for t in range(0, steps):
            offset, mask = tile(t, block, lead, count, channels, inner, multiplier, shift, R, K, VECTOR, COLUMNS, WIDE)
            x64 = tl.load(x_ptr + base + offset, mask=mask, other=0.0).to(tl.float64)
            total64 += _lane_sum(x64, FOLD, R, K, COLUMNS)
        mean = tl.sum(total64, 0) / all_n
        total64 = tl.zeros(pivot.shape, tl.float64)
        for t in range(0, steps):
            offset, mask = tile(t, block, lead, count, channels, inner, multiplier, shift, R, K, VECTOR, COLUMNS, WIDE)
            x64 = tl.load(x_ptr + base + offset, mask=mask, other=0.0).to(tl.float64)
            d64 = tl.where(mask, x64 - per_channel(mean, COLUMNS), 0.0)
            total64 += _lane_sum(d64 * d64, FOLD, R, K, COLUMNS)
        m2 = tl.sum(total64, 0)
    out_ptr = chunks_ptr + (tl.program_id(0) // blocks) * channels
    store_per_channel(out_ptr, mean, block, channels, K, COLUMNS)
    store_per_channel(out_ptr + splits * channels, m2, block, channels, K, COLUMNS)


@triton.jit
def bn_match_combine_kernel(
    chunks_ptr,
    running_mean_ptr,
    running_var_ptr,
    loss_ptr,
    mean_ptr,
    var_ptr,
    splits,
    size: tl.int64,
    length: tl.int64,
    channels,
    LOSS: tl.constexpr,
    SPLITS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """mean and var of CHANNELS channels a program from those of `splits` chunks; with LOSS one program does all."""
    all_n = tl.cast(length, tl.float64)
    loss = tl.zeros([CHANNELS], tl.float64)
    first = tl.program_id(0) * CHANNELS
    stop = channels
    if not LOSS:
        stop = tl.minimum(first + CHANNELS, channels)
    for c in range(first, stop, CHANNELS):
        channel = c + tl.arange(0, CHANNELS)
        inside = channel < channels
        total = tl.zeros([SPLITS, CHANNELS], tl.float64)
        for s in range(0, splits, SPLITS):
            split = s + tl.arange(0, SPLITS)[:, None]
            n = tl.maximum(tl.minimum(length - split * size, size), 0).to(tl.float64)
            mask = (split < splits) & inside[None, :]
            total += n * tl.load(chunks_ptr + split * channels + channel[None, :], mask=mask, other=0.0)
        mean = tl.sum(total, 0) / all_n
        total = tl.zeros([SPLITS, CHANNELS], tl.float64)
        for s in range(0, splits, SPLITS):
            split = s + tl.arange(0, SPLITS)[:, None]
            n = tl.maximum(tl.minimum(length - split * size, size), 0).to(tl.float64)
            mask = (split < splits) & inside[None, :]
            at = chunks_ptr + split * channels + channel[None, :]
            d = tl.load(at, mask=mask, other=0.0) - mean[None, :]
            total += tl.load(at + splits * channels, mask=mask, other=0.0) + n * (d * d)
        var = tl.sum(total, 0) / all_n
        tl.store(mean_ptr + channel, mean, mask=inside)
        tl.store(var_ptr + channel, var, mask=inside)
        if LOSS:
            loss += _distance(mean, var, running_mean_ptr, running_var_ptr, channel, inside)
    if LOSS:
        tl.store(loss_ptr, (tl.sum(loss, 0) / tl.cast(channels, tl.float64)).to(tl.float32))


@triton.jit
def _distance(mean, var, running_mean_ptr, running_var_ptr, channel, inside):
    """(mean - running_mean)^2 + (var - running_var)^2, 0 outside."""
    dm = mean - tl.load(running_mean_ptr + channel, mask=inside, other=0.0).to(tl.float64)
    dv = var - tl.load(running_var_ptr + channel, mask=inside, other=0.0).to(tl.float64)
    return tl.where(inside, dm * dm + dv * dv, 0.0)


@triton.jit
def bn_match_loss_kernel(
    running_mean_ptr, running_var_ptr, loss_ptr, mean_ptr, var_ptr, channels, CHANNELS: tl.constexpr
):
    loss = tl.zeros([CHANNELS], tl.float64)
    for c in range(0, channels, CHANNELS):
        channel = c + tl.arange(0, CHANNELS)
        inside = channel < channels
        mean = tl.load(mean_ptr + channel, mask=inside, other=0.0)
        var = tl.load(var_ptr + channel, mask=inside, other=0.0)
        loss += _distance(mean, var, running_mean_ptr, running_var_ptr, channel, inside)
    tl.store(loss_ptr, (tl.sum(loss, 0) / tl.cast(channels, tl.float64)).to(tl.float32))


@triton.jit
def bn_match_backward_kernel(
    grad_y_ptr,
    grad_loss_ptr,
    x_ptr,
    mean_ptr,
    var_ptr,
    running_mean_ptr,
    running_var_ptr,
    weight_ptr,
    out_ptr,
    numel: tl.int64,
    blocks,
    channels,
    inner,
    length: tl.int64,
    tiles,
    multiplier: tl.int64,
    shift,
    EPS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_GRAD_Y: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
    VECTOR: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
):
    block, start, count = chunk(blocks, length, tiles, R, K, COLUMNS, WIDE)
    base, lead = chunk_base(block, start, channels, inner, K, VECTOR, COLUMNS, WIDE)
    channel = channel_numbers(block, channels, K, COLUMNS)
    factor = tl.load(grad_loss_ptr).to(tl.float64) * (2.0 / tl.cast(numel, tl.float64))
    mean64 = tl.load(mean_ptr + channel)
    mean = mean64.to(tl.float32)
    slope64 = factor * 2.0 * (tl.load(var_ptr + channel) - _load64(running_var_ptr, channel))
    # What rounding the mean leaves out goes to the shift: it may be much of the deviation.
    shift64 = factor * (mean64 - _load64(running_mean_ptr, channel)) + slope64 * (mean.to(tl.float64) - mean64)
    mean = per_channel(mean, COLUMNS)
    slope = per_channel(slope64.to(tl.float32), COLUMNS)
    constant = per_channel(shift64.to(tl.float32), COLUMNS)
    if HAS_GRAD_Y:
        factor_y = per_channel(_batch_norm_slope(running_var_ptr, weight_ptr, channel, EPS, HAS_WEIGHT), COLUMNS)
    for t in range(0, tl.cdiv(count, positions(R, K, COLUMNS))):
        offset, mask = tile(t, block, lead, count, channels, inner, multiplier, shift, R, K, VECTOR, COLUMNS, WIDE)
        x = tl.load(x_ptr + base + offset, mask=mask, other=0.0).to(tl.float32)
        out = constant + slope * (x - mean)
        if HAS_GRAD_Y:
            out = tl.load(grad_y_ptr + base + offset, mask=mask, other=0.0).to(tl.float32) * factor_y + out
        tl.store(out_ptr + base + offset, out.to(out_ptr.dtype.element_ty), mask=mask)


def _fold(options: dict[str, Any]) -> int:
    """How many rows of a tile a thread has, by 16-byte vectors."""
    return max(1, options["R"] * options["K"] // (options["num_warps"] * 32 * options["VECTOR"]))


def _moments_of_chunks(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    y: Tensor | None,
    layout: Layout,
) -> tuple[Tensor, Plan]:
    """(means and squares of every chunk, how many there are); y is written."""
    found = plan(x, layout)
    channels = layout.channels
    chunks = torch.empty((2, found.splits, channels), dtype=torch.float64, device=x.device)
    bn_match_chunks_kernel[found.grid](
        x,
        running_mean,
        running_var,
        running_var if weight is None else weight,
        running_mean if bias is None else bias,
        x if y is None else y,
        chunks,
        found.splits,
        *found.walk,
        EPS=0.0 if y is None else float(eps),
        HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None,
        HAS_Y=y is not None,
        FOLD=_fold(found.options),
        **found.options,
    )
    return chunks, found


def _combine(
    chunks: Tensor,
    found: Plan,
    running_mean: Tensor,
    running_var: Tensor,
    loss: Tensor,
    mean: Tensor,
    var: Tensor,
    with_loss: bool,
) -> bool:
    """Write mean and var, and the loss if it is wanted and one program does all; whether it did."""
    channels = mean.numel()
    splits = min(triton.next_power_of_2(found.splits), _MOST_SPLITS)
    width = min(triton.next_power_of_2(channels), _COMBINED // splits)
    together = with_loss and channels <= 4 * width
    bn_match_combine_kernel[(1 if together else triton.cdiv(channels, width),)](
        chunks,
        running_mean,
        running_var,
        loss,
        mean,
        var,
        found.splits,
        found.size,
        found.length,
        channels,
        LOSS=together,
        SPLITS=splits,
        CHANNELS=width,
        num_warps=8 if splits * width >= 512 else 4,
        enable_fp_fusion=False,
    )
    return together


def channel_moments(x: Tensor, mean: Tensor, var: Tensor, layout: Layout) -> None:
    """Write the means and biased variances of dense `x`, float64 [C]."""
    # What is not wanted is not read or written, but has an address.
    chunks, found = _moments_of_chunks(x, mean, var, None, None, 0.0, None, layout)
    _combine(chunks, found, mean, var, mean, mean, var, with_loss=False)


def bn_match(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    y: Tensor | None,
    loss: Tensor,
    mean: Tensor,
    var: Tensor,
    layout: Layout,
) -> None:
    """Write the loss, the statistics and, unless it is None, y.

    Args:
        x, y: dense, with the same strides; float32, bfloat16 or float16.
        running_mean, running_var, weight, bias: float32 [C]; the last two and `eps` matter to y only.
        loss: float32, one element.
        mean, var: float64 [C].
        layout: how to walk `x`.
    """
    chunks, found = _moments_of_chunks(x, running_mean, running_var, weight, bias, eps, y, layout)
    if not _combine(chunks, found, running_mean, running_var, loss, mean, var, with_loss=True):
        bn_match_loss_kernel[(1,)](
            running_mean,
            running_var,
            loss,
            mean,
            var,
            layout.channels,
            CHANNELS=_LOSS_BLOCK,
            num_warps=8,
            enable_fp_fusion=False,
        )


def bn_match_backward(
    grad_y: Tensor | None,
    grad_loss: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    eps: float,
    out: Tensor,
    layout: Layout,
) -> None:
    """Write dL/dx to `out`, through the loss only where `grad_y` is None; arguments as in :func:`bn_match`.

    Args:
        grad_y, out: with the dtype and strides of `x`.
        grad_loss: float32, one element.
    """
    found = plan(x, layout)
    bn_match_backward_kernel[found.grid](
        x if grad_y is None else grad_y,
        grad_loss,
        x,
        mean,
        var,
        running_mean,
        running_var,
        running_var if weight is None else weight,
        out,
        x.numel(),
        *found.walk,
        EPS=0.0 if grad_y is None else float(eps),
        HAS_WEIGHT=weight is not None,
        HAS_GRAD_Y=grad_y is not None,
        **found.options,
    )
