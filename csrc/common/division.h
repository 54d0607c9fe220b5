// x / scale, correctly rounded, in six instructions and without a branch.
//
// A quotient on the wrong side of k + 1/2 is another code, so it must be the rounded one; IEEE
// division costs a GPU twice as much. Scale's power of two comes off both sides, exactly (what then
// underflows has a quotient next to 0). After that Markstein's theorem holds: with r = RN(1 / s)
// and q within one unit in the last place of x / s, x - s q is exact in a fused multiply-add and
// RN(q + r (x - s q)) is RN(x / s). The first of the two corrections makes q that near.
#ifndef ADADFQ_COMMON_DIVISION_H_
#define ADADFQ_COMMON_DIVISION_H_

#include <cmath>
#include <cstdint>

#include "dtype.h"
#include "quantizer.h"

namespace adadfq {

// x / scale == x * factor / s, factor a power of two, s of moderate size, r = RN(1 / s).
struct Divisor {
  float factor;
  float s;
  float r;
};

// RN(1 / s) for s of moderate size. A GPU's division has branches; its approximation of 1 / s is
// within one unit in the last place. Two Newton steps make RN(1 / s) of anything within 64 units,
// but for mantissas of ones alone, where the result may be an even one instead of the odd one above
// it. Scaling by powers of two is exact, so 2^23 mantissas are all there is to try; all were tried.
ADADFQ_HD float refined_reciprocal(float s, float near) {
  near = fmaf(near, fmaf(-s, near, 1.0f), near);
  near = fmaf(near, fmaf(-s, near, 1.0f), near);
  const uint32_t ones = ((float_to_bits(s) & 0x7fffffu) + 1) >> 23;
  return bits_to_float(float_to_bits(near) | ones);
}

ADADFQ_HD float reciprocal(float s) {
#if defined(__CUDA_ARCH__)
  float near;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(near) : "f"(s));
  return refined_reciprocal(s, near);
#else
  return 1.0f / s;
#endif
}

ADADFQ_HD Divisor divisor(float scale) {
  int32_t exponent = static_cast<int32_t>(float_to_bits(scale) >> 23) & 255;
  exponent = exponent < 1 ? 1 : exponent;
  exponent = exponent > 253 ? 253 : exponent;
  const float factor = bits_to_float(static_cast<uint32_t>(254 - exponent) << 23);
  // For an infinite scale any large number does: finite x / inf has code 0.
  const float s = scale * factor, large = 1.32922800e+36f;
  const float finite = s > large ? large : s;
  return {factor, finite, reciprocal(finite)};
}

// The quantiser of a channel, ready for many values.
struct ChannelQuantizer {
  Divisor by;
  float scale;
  // Bounds of x * factor: beyond them the quotient need not be exact, only rounded beyond the
  // codes'.
  float lo;
  float hi;
};

// With a margin of 1/4 what is clamped rounds to the codes' bounds; with 1 + 1/4 to one more on
// each side, which tells what was inside.
constexpr float kToCodes = 0.25f, kToNeighbours = 1.25f;

ADADFQ_HD ChannelQuantizer channel_quantizer(float scale, int32_t zero_point, int32_t qmax,
                                             float margin) {
  const Divisor by = divisor(scale);
  const CodeBounds codes = code_bounds(zero_point, qmax);
  // Infinite for an infinite scale: an infinite x stays, and inf / inf is NaN.
  const float s = scale * by.factor;
  return {by, scale, (codes.lo - margin) * s, (codes.hi + margin) * s};
}

// x / scale between the bounds, rounded correctly where it has a code; NaN stays.
ADADFQ_HD float centred_quotient(float x, const ChannelQuantizer& q) {
  const float scaled = clamp_keep_nan(x * q.by.factor, q.lo, q.hi);
  float quotient = scaled * q.by.r;
  quotient = fmaf(fmaf(-q.by.s, quotient, scaled), q.by.r, quotient);
  return fmaf(fmaf(-q.by.s, quotient, scaled), q.by.r, quotient);
}

// round(x / scale) between the bounds; NaN stays.
ADADFQ_HD float centred_code(float x, const ChannelQuantizer& q) {
  return round_half_even(centred_quotient(x, q));
}

// Needs bounds made with kToCodes.
ADADFQ_HD float fake_quantize_value(float x, const ChannelQuantizer& q) {
  return centred_code(x, q) * q.scale;
}

// Whether round(x / scale) + zero_point is a code, for bounds made with kToNeighbours; false for
// NaN.
ADADFQ_HD bool inside_range(float x, const ChannelQuantizer& q, CodeBounds codes) {
  const float code = centred_code(x, q);
  return (code >= codes.lo) & (code <= codes.hi);
}

// Needs bounds made with kToNeighbours.
ADADFQ_HD LearnedStep learned_step(float x, const ChannelQuantizer& q, CodeBounds codes) {
  return learned_step_of(centred_quotient(x, q), codes.lo, codes.hi);
}

}  // namespace adadfq

#endif  // ADADFQ_COMMON_DIVISION_H_
