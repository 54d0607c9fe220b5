"""Training-mode BatchNorm and LeakyReLU; weight and bias of a channel c, or of a sample s and c; n elements a channel.

mean_c = sum x / n        var_c = sum (x - mean_c)^2 / n        x_hat = (x - mean_c) / sqrt(var_c + eps)
u      = x_hat weight_sc + bias_sc
y      = u where u > 0, else slope u
g      = dL/dy where u > 0, else slope dL/dy
grad_bias_sc = sum g        grad_weight_sc = sum g x_hat
grad_x = (weight_sc g - sum_s weight_sc grad_bias_sc / n - x_hat sum_s weight_sc grad_weight_sc / n) / sqrt(var_c + eps)

Where parameters change with the sample, a program's chunk lies within one: programs have a second dimension, samples,
and each of them is walked as a tensor of its own. So a program finds its parameters once, in float64, for its block of
channels, and nothing is looked up for an element.

Launches: forward the statistics (see :mod:`adadfq.kernels.bn_match`), two, and y, one. Backward three: sums of g and of
g (x - mean), in float32 for the few elements a lane sees and in float64 between lanes, to a scratch tensor
[2, samples, splits, C] of float64; their combination, which gives grad_weight, grad_bias and the part of grad_x that
came through the statistics; grad_x. u is computed again in both walks.

Bytes an element, float32: forward 12, backward 20; 16-bit types half of that.

Test: python -m pytest tests/test_triton.py -k batch_norm_act
Time: python -m benchmarks ops --device cuda --suite gpu --ops batch_norm_act --json out.json
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from adadfq.kernels.bn_match import channel_moments
from adadfq.kernels.tiles import (
    Plan,
    channel_numbers,
    channel_sum,
    chunk,
    chunk_base,
    per_channel,
    plan,
    positions,
    store_per_channel,
    tile,
)
from adadfq.ops.native_args import Layout

#: The most programs of a grid's second and third dimension.
_MOST_SAMPLES = 65535
#: Channels that a program combines: 32 bytes of sums, the least that memory hands out. Sums in a tile of them.
_CHANNELS, _COMBINED = 4, 2048


@triton.jit
def _sample(samples):
    """The program's sample, in 64 bits; those past the last do its work again, and write the same."""
    sample = tl.minimum(tl.program_id(1) + tl.program_id(2) * tl.num_programs(1), samples - 1)
    return sample.to(tl.int64)


@triton.jit
def _first_of_sample(sample, size: tl.int64, VECTOR: tl.constexpr, PER_SAMPLE: tl.constexpr):
    """Offset of a sample of `size` elements."""
    if PER_SAMPLE:
        return sample * ((size // VECTOR) * VECTOR)  # tells the compiler what divides it
    else:
        return 0


@triton.jit
def _inverse_deviation(var_ptr, channel, EPS: tl.constexpr):
    return 1.0 / tl.sqrt(tl.load(var_ptr + channel) + tl.full([], EPS, tl.float64))


@triton.jit
def _load_map(mean_ptr, var_ptr, weight_ptr, bias_ptr, channel, parameter, EPS: tl.constexpr, COLUMNS: tl.constexpr):
    """(mean, slope, shift) with u = (x - mean) slope + shift, for tiles of these channels."""
    mean64 = tl.load(mean_ptr + channel)
    slope = _inverse_deviation(var_ptr, channel, EPS)
    if weight_ptr is not None:
        slope = tl.load(weight_ptr + parameter).to(tl.float64) * slope
    mean = mean64.to(tl.float32)
    # What rounding the mean leaves out goes to the shift: it may be much of the deviation.
    shift = slope * (mean.to(tl.float64) - mean64)
    if bias_ptr is not None:
        shift = tl.load(bias_ptr + parameter).to(tl.float64) + shift
    return (
        per_channel(mean, COLUMNS),
        per_channel(slope.to(tl.float32), COLUMNS),
        per_channel(shift.to(tl.float32), COLUMNS),
    )


@triton.jit
def batch_norm_act_kernel(
    x_ptr,
    mean_ptr,
    var_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    negative_slope,
    samples,
    size: tl.int64,
    blocks,
    channels,
    inner,
    length: tl.int64,
    tiles,
    multiplier: tl.int64,
    digits,
    EPS: tl.constexpr,
    PER_SAMPLE: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
    VECTOR: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
):
    sample = _sample(samples)
    block, start, count = chunk(blocks, length, tiles, R, K, COLUMNS, WIDE)
    base, lead = chunk_base(block, start, channels, inner, K, VECTOR, COLUMNS, WIDE)
    base += _first_of_sample(sample, size, VECTOR, PER_SAMPLE)
    channel = channel_numbers(block, channels, K, COLUMNS)
    mean, slope, shift = _load_map(
        mean_ptr, var_ptr, weight_ptr, bias_ptr, channel, sample * channels + channel, EPS, COLUMNS
    )
    for t in range(0, tl.cdiv(count, positions(R, K, COLUMNS))):
        offset, mask = tile(t, block, lead, count, channels, inner, multiplier, digits, R, K, VECTOR, COLUMNS, WIDE)
        x = tl.load(x_ptr + base + offset, mask=mask, other=0.0).to(tl.float32)
        u = (x - mean) * slope + shift
        y = tl.where(u > 0, u, negative_slope * u)
        tl.store(y_ptr + base + offset, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def batch_norm_act_sums_kernel(
    grad_y_ptr,
    x_ptr,
    mean_ptr,
    var_ptr,
    weight_ptr,
    bias_ptr,
    sums_ptr,
    negative_slope,
    samples,
    splits,
    size: tl.int64,
    blocks,
    channels,
    inner,
    length: tl.int64,
    tiles,
    multiplier: tl.int64,
    digits,
    EPS: tl.constexpr,
    PER_SAMPLE: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
    VECTOR: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """This chunk's sums of g and g (x - mean) to sums [2, samples, splits, channels]."""
    sample = _sample(samples)
    block, start, count = chunk(blocks, length, tiles, R, K, COLUMNS, WIDE)
    base, lead = chunk_base(block, start, channels, inner, K, VECTOR, COLUMNS, WIDE)
    base += _first_of_sample(sample, size, VECTOR, PER_SAMPLE)
    channel = channel_numbers(block, channels, K, COLUMNS)
    mean, slope, shift = _load_map(
        mean_ptr, var_ptr, weight_ptr, bias_ptr, channel, sample * channels + channel, EPS, COLUMNS
    )
    sum_g = tl.zeros([R, K], tl.float32)
    sum_product = tl.zeros([R, K], tl.float32)
    for t in range(0, tl.cdiv(count, positions(R, K, COLUMNS))):
        offset, mask = tile(t, block, lead, count, channels, inner, multiplier, digits, R, K, VECTOR, COLUMNS, WIDE)
        g = tl.load(grad_y_ptr + base + offset, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + base + offset, mask=mask, other=0.0).to(tl.float32)
        d = x - mean
        g = tl.where(d * slope + shift > 0, g, negative_slope * g)
        sum_g += g
        sum_product += tl.where(mask, g * d, 0.0)
    row = sample * splits + tl.program_id(0) // blocks
    out_ptr = sums_ptr + row * channels
    store_per_channel(out_ptr, channel_sum(sum_g.to(tl.float64), COLUMNS), block, channels, K, COLUMNS)
    out_ptr += tl.cast(samples, tl.int64) * splits * channels
    store_per_channel(out_ptr, channel_sum(sum_product.to(tl.float64), COLUMNS), block, channels, K, COLUMNS)


@triton.jit
def batch_norm_act_combine_kernel(
    sums_ptr,
    mean_ptr,
    var_ptr,
    weight_ptr,
    grad_weight_ptr,
    grad_bias_ptr,
    offset_ptr,
    factor_ptr,
    samples,
    splits,
    count: tl.int64,
    channels,
    EPS: tl.constexpr,
    SAMPLES: tl.constexpr,
    SPLITS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """grad_weight and grad_bias; offset and factor [channels] of what came through the statistics, of (x - mean)."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    exists = channel < channels
    last = tl.minimum(channel, channels - 1)
    mean = tl.load(mean_ptr + last)
    inverse = _inverse_deviation(var_ptr, last, EPS)
    left_out = mean.to(tl.float32).to(tl.float64) - mean
    apart = tl.cast(samples, tl.int64) * splits * channels
    weighted = tl.zeros([SAMPLES, CHANNELS], tl.float64)
    weighted_hat = tl.zeros([SAMPLES, CHANNELS], tl.float64)
    for s in range(0, samples, SAMPLES):
        sample = (s + tl.arange(0, SAMPLES)).to(tl.int64)
        partial = tl.zeros([SAMPLES, SPLITS, CHANNELS], tl.float64)
        partial_product = tl.zeros([SAMPLES, SPLITS, CHANNELS], tl.float64)
        for p in range(0, splits, SPLITS):
            split = p + tl.arange(0, SPLITS)
            mask = (sample < samples)[:, None, None] & (split < splits)[None, :, None] & exists[None, None, :]
            row = sample[:, None, None] * splits + split[None, :, None]
            at = sums_ptr + row * channels + channel[None, None, :]
            partial += tl.load(at, mask=mask, other=0.0)
            partial_product += tl.load(at + apart, mask=mask, other=0.0)
        sum_g = tl.sum(partial, 1)
        sum_hat = inverse[None, :] * (tl.sum(partial_product, 1) + left_out[None, :] * sum_g)
        mask = (sample < samples)[:, None] & exists[None, :]
        parameter = sample[:, None] * channels + channel[None, :]
        if grad_bias_ptr is not None:
            tl.store(grad_bias_ptr + parameter, sum_g.to(tl.float32), mask=mask)
        if grad_weight_ptr is not None:
            tl.store(grad_weight_ptr + parameter, sum_hat.to(tl.float32), mask=mask)
        if weight_ptr is not None:
            weight = tl.load(weight_ptr + parameter, mask=mask, other=0.0).to(tl.float64)
            weighted += weight * sum_g
            weighted_hat += weight * sum_hat
        else:
            weighted += sum_g
            weighted_hat += sum_hat
    n = tl.cast(count, tl.float64)
    factor = -inverse * inverse * (tl.sum(weighted_hat, 0) / n)
    offset = factor * left_out - inverse * (tl.sum(weighted, 0) / n)
    tl.store(offset_ptr + channel, offset.to(tl.float32), mask=exists)
    tl.store(factor_ptr + channel, factor.to(tl.float32), mask=exists)


@triton.jit
def batch_norm_act_backward_kernel(
    grad_y_ptr,
    x_ptr,
    mean_ptr,
    var_ptr,
    weight_ptr,
    bias_ptr,
    offset_ptr,
    factor_ptr,
    grad_x_ptr,
    negative_slope,
    samples,
    size: tl.int64,
    blocks,
    channels,
    inner,
    length: tl.int64,
    tiles,
    multiplier: tl.int64,
    digits,
    EPS: tl.constexpr,
    PER_SAMPLE: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
    VECTOR: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
):
    sample = _sample(samples)
    block, start, count = chunk(blocks, length, tiles, R, K, COLUMNS, WIDE)
    base, lead = chunk_base(block, start, channels, inner, K, VECTOR, COLUMNS, WIDE)
    base += _first_of_sample(sample, size, VECTOR, PER_SAMPLE)
    channel = channel_numbers(block, channels, K, COLUMNS)
    mean, slope, shift = _load_map(
        mean_ptr, var_ptr, weight_ptr, bias_ptr, channel, sample * channels + channel, EPS, COLUMNS
    )
    constant = per_channel(tl.load(offset_ptr + channel), COLUMNS)
    factor = per_channel(tl.load(factor_ptr + channel), COLUMNS)
    for t in range(0, tl.cdiv(count, positions(R, K, COLUMNS))):
        offset, mask = tile(t, block, lead, count, channels, inner, multiplier, digits, R, K, VECTOR, COLUMNS, WIDE)
        g = tl.load(grad_y_ptr + base + offset, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + base + offset, mask=mask, other=0.0).to(tl.float32)
        d = x - mean
        g = tl.where(d * slope + shift > 0, g, negative_slope * g)
        grad_x = g * slope + (constant + factor * d)
        tl.store(grad_x_ptr + base + offset, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)


def _plan(x: Tensor, layout: Layout, samples: int) -> tuple[Plan, tuple[int, int, int], dict[str, Any]]:
    """(plan of a sample, grid of all of them, constants and launch options)."""
    found = plan(x, layout._replace(outer=layout.outer // samples), samples)
    # The third dimension first, so that few of its programs find no sample left.
    thirds = triton.cdiv(samples, _MOST_SAMPLES)
    grid = (*found.grid, triton.cdiv(samples, thirds), thirds)
    return found, grid, {"PER_SAMPLE": samples > 1, **found.options}


def batch_norm_act(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    negative_slope: float,
    y: Tensor,
    mean: Tensor,
    var: Tensor,
    layout: Layout,
    samples: int,
) -> None:
    """Write y and the batch statistics.

    Args:
        x, y: dense, with the same strides; float32, bfloat16 or float16.
        weight, bias: float32, contiguous, [samples, C].
        mean, var: float64 [C].
        layout: how to walk `x`.
        samples: 1, or into how many blocks of memory with parameters of their own `x` is divided.
    """
    channel_moments(x, mean, var, layout)
    found, grid, options = _plan(x, layout, samples)
    size = x.numel() // samples
    batch_norm_act_kernel[grid](
        x, mean, var, weight, bias, y, negative_slope, samples, size, *found.walk, EPS=float(eps), **options
    )


def batch_norm_act_backward(
    grad_y: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    negative_slope: float,
    grad_x: Tensor,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
    layout: Layout,
    samples: int,
) -> None:
    """Write grad_x, and the gradients of the parameters that are not None; arguments as in :func:`batch_norm_act`.

    Args:
        grad_y, grad_x: with the dtype and strides of `x`.
        grad_weight, grad_bias: float32, contiguous, [samples, C].
    """
    found, grid, options = _plan(x, layout, samples)
    size, channels = x.numel() // samples, layout.channels
    sums = torch.empty((2, samples, found.splits, channels), dtype=torch.float64, device=x.device)
    batch_norm_act_sums_kernel[grid](
        grad_y,
        x,
        mean,
        var,
        weight,
        bias,
        sums,
        negative_slope,
        samples,
        found.splits,
        size,
        *found.walk,
        EPS=float(eps),
        **options,
    )
    offset, factor = (torch.empty(channels, dtype=torch.float32, device=x.device) for _ in range(2))
    splits = min(triton.next_power_of_2(found.splits), _COMBINED // _CHANNELS)
    batch_norm_act_combine_kernel[(triton.cdiv(channels, _CHANNELS),)](
        sums,
        mean,
        var,
        weight,
        grad_weight,
        grad_bias,
        offset,
        factor,
        samples,
        found.splits,
        x.numel() // channels,
        channels,
        EPS=float(eps),
        SAMPLES=min(triton.next_power_of_2(samples), _COMBINED // _CHANNELS // splits),
        SPLITS=splits,
        CHANNELS=_CHANNELS,
        num_warps=8,
        enable_fp_fusion=False,
    )
    batch_norm_act_backward_kernel[grid](
        grad_y,
        x,
        mean,
        var,
        weight,
        bias,
        offset,
        factor,
        grad_x,
        negative_slope,
        samples,
        size,
        *found.walk,
        EPS=float(eps),
        **options,
    )
