// The quantiser's arithmetic, once, for host and device.
//
//   scale      = (hi - lo) / (2^bits - 1)                       lo <= 0 <= hi
//   zero_point = clamp(round(-lo / scale), 0, 2^bits - 1)
//   x_hat      = round(clamp(x / scale, -zero_point, 2^bits - 1 - zero_point)) * scale
//
// Rounding is half to even. Clamping to whole numbers commutes with it, so x_hat is
// (clamp(round(x / scale) + zero_point, 0, 2^bits - 1) - zero_point) * scale, bit for bit.
// Division is a true division: x * (1 / scale) rounds differently next to ties.
// Every clamp lets NaN through and saturates infinities. Compile without floating-point
// contraction, reassociation or finite-math assumptions.
#ifndef ADADFQ_COMMON_QUANTIZER_H_
#define ADADFQ_COMMON_QUANTIZER_H_

#include <cstdint>

#if defined(__CUDACC__)
#define ADADFQ_HD __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define ADADFQ_HD inline __attribute__((always_inline))
#else
#define ADADFQ_HD inline
#endif

namespace adadfq {

struct QParams {
  float scale;
  int32_t zero_point;
};

// Smallest and largest value of x / scale that has a code of its own.
struct CodeBounds {
  float lo;
  float hi;
};

ADADFQ_HD float clamp_keep_nan(float v, float lo, float hi) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm("max.NaN.f32 %0, %0, %1;" : "+f"(v) : "f"(lo));
  asm("min.NaN.f32 %0, %0, %1;" : "+f"(v) : "f"(hi));
  return v;
#endif
  v = v < lo ? lo : v;
  return v > hi ? hi : v;
}

// Half to even, exact for |v| < 2^22: adding 1.5 * 2^23 leaves no bits for the fraction. Zeros
// become +0.
ADADFQ_HD float round_half_even(float v) {
  const float magic = 12582912.0f;
  return (v + magic) - magic;
}

ADADFQ_HD int32_t max_code(int bits) { return (int32_t{1} << bits) - 1; }

// Exact for |zero_point| < 2^22, far outside anything that leaves zero representable. In float, so
// that no zero point overflows.
ADADFQ_HD CodeBounds code_bounds(int32_t zero_point, int32_t qmax) {
  return {0.0f - static_cast<float>(zero_point),
          static_cast<float>(qmax) - static_cast<float>(zero_point)};
}

ADADFQ_HD float fake_quantize_value(float x, float scale, float lo, float hi) {
  return round_half_even(clamp_keep_nan(x / scale, lo, hi)) * scale;
}

// Whether round(x / scale) + zero_point is a code; false for NaN. One more on each side is enough
// to tell.
ADADFQ_HD bool inside_range(float x, float scale, float lo, float hi) {
  const float q = round_half_even(clamp_keep_nan(x / scale, lo - 1.0f, hi + 1.0f));
  return (q >= lo) & (q <= hi);
}

// What fake quantisation with a learned step does to the gradient of x_hat at x: whether it passes
// to x, and its factor for the step, d x_hat / d scale with the derivative of rounding taken for 1.
// For NaN it does not pass and the factor is NaN.
struct LearnedStep {
  int32_t inside;  // as a bool GCC would keep it in memory, and no loop around it would vectorise
  float slope;
};

// `quotient` is x / scale where that rounds to a code, else it rounds beyond the same bound.
ADADFQ_HD LearnedStep learned_step_of(float quotient, float lo, float hi) {
  const float whole = round_half_even(quotient);
  const float code = clamp_keep_nan(whole, lo, hi);
  const bool inside = code == whole;
  return {inside, code - (inside ? quotient : 0.0f)};
}

ADADFQ_HD LearnedStep learned_step(float x, float scale, float lo, float hi) {
  return learned_step_of(x / scale, lo, hi);
}

// A range narrower than float32's smallest normal number has scale 1 and zero point 0. A NaN or
// infinite end gives a NaN scale and zero point 0, so that it cannot pass unseen.
ADADFQ_HD QParams qparams_from_range(float lo, float hi, int bits) {
  const float smallest_normal = 1.17549435e-38f, largest = 3.40282347e+38f;
  const float levels = static_cast<float>(max_code(bits));
  lo = lo > 0.0f ? 0.0f : lo;
  hi = hi < 0.0f ? 0.0f : hi;
  float scale = (hi - lo) / levels;
  if (scale > largest) scale = scale - scale;  // inf - inf: NaN
  if (scale < smallest_normal) scale = 1.0f;
  float zero_point = clamp_keep_nan(-lo / scale, 0.0f, levels);
  if (!(zero_point == zero_point)) zero_point = 0.0f;
  return {scale, static_cast<int32_t>(round_half_even(zero_point))};
}

}  // namespace adadfq

#endif  // ADADFQ_COMMON_QUANTIZER_H_
