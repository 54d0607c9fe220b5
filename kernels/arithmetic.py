"""The quantiser's arithmetic, inlined into every kernel: float32, rounded exactly as the reference rounds.

Division. x / scale must be the correctly rounded quotient, for a quotient on the wrong side of k + 1/2 is another code.
IEEE division takes some 14 instructions an element with a branch, which 16-bit tensors have no time for; here it takes
6 without one. Scale's power of two comes off both sides (exactly; what then underflows has a quotient next to 0), then
Markstein's theorem: with r = RN(1 / s) and q within one unit in the last place of x / s, x - s q is exact in a fused
multiply-add and RN(q + r (x - s q)) is RN(x / s). The first of the two corrections makes q that near.

Rounding half to even adds and subtracts 1.5 * 2^23, exact for |q| < 2^22. NaN passes everything.
"""

from __future__ import annotations

import triton
import triton.language as tl

_ROUND = tl.constexpr(12582912.0)
_FLOAT_MAX = tl.constexpr(3.4028234663852886e38)
_FLOAT_TINY = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def clamp(v, lo, hi):
    """min(max(v, lo), hi), NaN where `v` is."""
    v = tl.maximum(v, lo, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(v, hi, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def round_half_even(v):
    return (v + _ROUND) - _ROUND


@triton.jit
def divisor(scale):
    """(factor, s, r): x / scale == (x * factor) / s, `factor` a power of two, `s` of moderate size, r = 1 / s."""
    exponent = (scale.to(tl.int32, bitcast=True) >> 23) & 255
    exponent = tl.minimum(tl.maximum(exponent, 1), 253)
    factor = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    # For an infinite scale any finite number does: finite x / inf has code 0.
    s = tl.minimum(scale * factor, _FLOAT_MAX, propagate_nan=tl.PropagateNan.ALL)
    return factor, s, tl.div_rn(tl.zeros_like(s) + 1.0, s)


@triton.jit
def quotient(x, factor, s, r, lo, hi):
    """x / scale, correctly rounded in [lo, hi] and within 1/8 of them outside; `lo` and `hi` times `s`."""
    x = clamp(x * factor, lo, hi)
    q = x * r
    q = tl.fma(tl.fma(-s, q, x), r, q)
    return tl.fma(tl.fma(-s, q, x), r, q)


@triton.jit
def qparams(lo, hi, qmax):
    """Scale and zero point (float32, an integer) over [lo, hi] widened to hold 0; see adadfq.ops.reference.qparams."""
    lo = tl.minimum(lo, 0.0, propagate_nan=tl.PropagateNan.ALL)
    hi = tl.maximum(hi, 0.0, propagate_nan=tl.PropagateNan.ALL)
    levels = tl.zeros_like(lo) + qmax
    scale = tl.div_rn(hi - lo, levels)
    scale = tl.where(scale == float("inf"), float("nan"), scale)
    scale = tl.where(scale < _FLOAT_TINY, 1.0, scale)
    zero_point = round_half_even(clamp(tl.div_rn(0.0 - lo, scale), 0.0, levels))
    return scale, tl.where(zero_point == zero_point, zero_point, 0.0)
