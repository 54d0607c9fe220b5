"""Per-tensor fake quantisation over a moving range that the tensor itself moves first.

lo, hi = min x, max x; running_min, running_max move by `rate` of the way to them, scale and zero_point are those of the
range they then are, and x_hat = fake_quantize(x, scale, zero_point). After n batches

    rate = 1 / (1 + m + ... + m^(n - 1)) = (1 - m) / d_n    with d_n = 1 - m^n.

Taking m^n from 1 would lose the digits of d_n where m is near 1, so d_n is put together from the bits of n without a
subtraction that cancels: d_2n = d_n (2 - d_n), and d_(a + b) = d_a + (1 - d_a) d_b.

Bytes an element, float32: 12, of which 4 from the cache where the tensor stays in it; 16-bit types half of that.
Three launches: the ends of at most 1024 parts, the state, x_hat. Scratch: two float32 a part.

Test: python -m pytest tests/test_triton.py -k observe_fake_quantize
Time: python -m benchmarks ops --device cuda --suite gpu --ops observe_fake_quantize --json out.json
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from adadfq.kernels import configs
from adadfq.kernels.arithmetic import qparams
from adadfq.kernels.fake_quantize import fake_quantize

#: Most parts of a tensor: one program each, and one vector of them for the program that ends the search.
PARTS = 1024


@triton.jit
def _lower(a, b):
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _upper(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _ends(lo, hi):
    """Least of `lo` and greatest of `hi`, NaN where either holds one: plain reductions drop it."""
    has_nan = tl.max(((lo != lo) | (hi != hi)).to(tl.int32), 0) > 0
    return tl.where(has_nan, float("nan"), tl.min(lo, 0)), tl.where(has_nan, float("nan"), tl.max(hi, 0))


@triton.jit
def partial_ends_kernel(
    x_ptr,
    partial_ptr,
    n: tl.int64,
    share: tl.int64,
    VECTORS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Ends of this program's `share` elements, to partial [2, programs]; `share` is a multiple of BLOCK."""
    program = tl.program_id(0)
    start = program.to(tl.int64) * share
    count = tl.minimum(n - start, share).to(tl.int32)
    x_ptr += start
    local = tl.arange(0, BLOCK)
    # Where there is nothing to read, an element of x changes nothing.
    first = tl.load(x_ptr)
    lo = tl.zeros([BLOCK], tl.float32) + first.to(tl.float32)
    hi = lo
    step = VECTORS * BLOCK
    several = count // step * step
    for place in range(0, several, step):
        for v in tl.static_range(VECTORS):
            x = tl.load(x_ptr + place + v * BLOCK + local).to(tl.float32)
            lo = _lower(lo, x)
            hi = _upper(hi, x)
    # Without a mask, which could keep the compiler from loading 16 bytes at once, as long as possible.
    whole = count // BLOCK * BLOCK
    for place in range(several, whole, BLOCK):
        x = tl.load(x_ptr + place + local).to(tl.float32)
        lo = _lower(lo, x)
        hi = _upper(hi, x)
    if whole < count:
        x = tl.load(x_ptr + whole + local, mask=local < count - whole, other=first).to(tl.float32)
        lo = _lower(lo, x)
        hi = _upper(hi, x)
    low, high = _ends(lo, hi)
    tl.store(partial_ptr + program, low)
    tl.store(partial_ptr + tl.num_programs(0) + program, high)


@triton.jit
def update_range_kernel(
    partial_ptr,
    running_min_ptr,
    running_max_ptr,
    num_batches_ptr,
    scale_ptr,
    zero_point_ptr,
    parts,
    qmax,
    momentum: tl.float64,
    BLOCK: tl.constexpr,
):
    """One program; see adadfq.ops.reference.update_range."""
    num_batches = tl.load(num_batches_ptr) + 1
    past_min = tl.load(running_min_ptr).to(tl.float64)
    past_max = tl.load(running_max_ptr).to(tl.float64)
    part = tl.minimum(tl.arange(0, BLOCK), parts - 1)
    lo, hi = _ends(tl.load(partial_ptr + part), tl.load(partial_ptr + parts + part))
    tl.store(num_batches_ptr, num_batches)

    complement = tl.full([], 1.0, tl.float64) - momentum
    power = complement  # 1 - m^(2^k), and of the bits below k in `total`
    total = tl.full([], 0.0, tl.float64)
    while num_batches > 0:
        total = tl.where((num_batches & 1) == 1, total + (1.0 - total) * power, total)
        power = power * (2.0 - power)
        num_batches = num_batches >> 1
    rate = complement / total

    lo = (past_min + rate * (lo.to(tl.float64) - past_min)).to(tl.float32)
    hi = (past_max + rate * (hi.to(tl.float64) - past_max)).to(tl.float32)
    tl.store(running_min_ptr, lo)
    tl.store(running_max_ptr, hi)
    scale, zero_point = qparams(lo, hi, qmax)
    tl.store(scale_ptr, scale)
    tl.store(zero_point_ptr, zero_point.to(tl.int32))


def observe_fake_quantize(
    x: Tensor,
    out: Tensor,
    running_min: Tensor,
    running_max: Tensor,
    num_batches: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bits: int,
    momentum: float,
) -> None:
    """Move the range by the ends of `x`, in place, and write x_hat to `out`.

    Args:
        x, out: dense, with the same strides, not empty; float32, bfloat16 or float16.
        running_min, running_max, scale: one float32.
        num_batches: one int64, how many batches moved the range before.
        zero_point: one int32.
        momentum: in [0, 1).
    """
    n = x.numel()
    config = configs.choose("elementwise", x.dtype, n)
    block = config.num_warps * 32 * (16 // x.element_size())
    blocks = triton.cdiv(n, block)
    share = triton.cdiv(blocks, PARTS) * block
    parts = triton.cdiv(n, share)
    partial = torch.empty(2, parts, dtype=torch.float32, device=x.device)
    partial_ends_kernel[(parts,)](
        x, partial, n, share, VECTORS=config.vectors, BLOCK=block, num_warps=config.num_warps, enable_fp_fusion=False
    )
    update_range_kernel[(1,)](
        partial,
        running_min,
        running_max,
        num_batches,
        scale,
        zero_point,
        parts,
        2**bits - 1,
        momentum,
        BLOCK=triton.next_power_of_2(parts),
        num_warps=4,
        enable_fp_fusion=False,
    )
    fake_quantize(x, scale, zero_point, out, 1, n, bits)
