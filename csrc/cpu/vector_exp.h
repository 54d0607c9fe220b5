// exp in plain C++ that vectorises on every instruction set and gives the same bits on all of them.
//
//   n = round(x / ln 2), r = x - n ln 2, |r| <= 0.347       e^x = 2^n (1 + r + r^2 g(r))
//
// g minimises the largest relative error: 1.7e-14 in double, 3e-9 and what rounding adds in float.
// One product is enough for n ln 2: it rounds by as much as x itself was rounded. Constants and
// operations are few because the callers are bound by them.
//
// Made for softmax, whose arguments are at most 0 but for rounding: up to 700 (80 in float) is
// right, above is not. Below -708 (-87) the result is 0, for -infinity too. NaN stays NaN.
//
// Test: python -m pytest tests/test_native_cpu.py -k exp
#ifndef ADADFQ_CPU_VECTOR_EXP_H_
#define ADADFQ_CPU_VECTOR_EXP_H_

#include <cstdint>
#include <cstring>

#include "../common/dtype.h"
#include "target_clones.h"

namespace adadfq {

ADADFQ_INLINE double vector_exp(double x) {
  // Adding it leaves the nearest integer in the low bits of the mantissa.
  constexpr double kRounder = 0x1.8p52;
  const double shifted = x * 0x1.71547652b82fep0 + kRounder;
  const double n = shifted - kRounder;
  const double r = x - n * 0x1.62e42fefa39efp-1;
  const double r2 = r * r, r4 = r2 * r2;
  const double g01 = 0x1.fffffffff12e2p-2 + r * 0x1.555555558a2e7p-3;
  const double g23 = 0x1.5555557e12afep-5 + r * 0x1.1111108db8b90p-7;
  const double g45 = 0x1.6c163b9aa1c82p-10 + r * 0x1.a01b745d1c352p-13;
  const double g67 = 0x1.a16e96d6ddf0ep-16 + r * 0x1.7101438919fc5p-19;
  const double g = (g01 + r2 * g23) + r4 * (g45 + r2 * g67);
  const double power = 1.0 + (r + r2 * g);
  uint64_t bits;
  memcpy(&bits, &shifted, sizeof bits);
  bits = (bits << 52) + (uint64_t{1023} << 52);
  double scale;
  memcpy(&scale, &bits, sizeof scale);
  return x < -708.0 ? 0.0 : power * scale;
}

ADADFQ_INLINE float vector_exp(float x) {
  constexpr float kRounder = 0x1.8p23f;
  const float shifted = x * 0x1.715476p0f + kRounder;
  const float n = shifted - kRounder;
  const float r = x - n * 0x1.62e430p-1f;
  const float r2 = r * r;
  const float g01 = 0x1.fffffcp-2f + r * 0x1.555490p-3f;
  const float g23 = 0x1.5558f4p-5f + r * 0x1.123a2cp-7f;
  const float g = g01 + r2 * (g23 + r2 * 0x1.6a23b8p-10f);
  const float power = 1.0f + (r + r2 * g);
  const float scale = bits_to_float((float_to_bits(shifted) << 23) + (127u << 23));
  return x < -87.0f ? 0.0f : power * scale;
}

}  // namespace adadfq

#endif  // ADADFQ_CPU_VECTOR_EXP_H_
