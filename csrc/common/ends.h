// The least and the greatest of values, NaN where one is NaN.
#ifndef ADADFQ_COMMON_ENDS_H_
#define ADADFQ_COMMON_ENDS_H_

#include <cmath>

#include "quantizer.h"

namespace adadfq {

// NaN where either is; minimum and maximum instructions drop it, but for GPUs' own of sm_80 on.
ADADFQ_HD float min_keep_nan(float a, float b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm("min.NaN.f32 %0, %0, %1;" : "+f"(a) : "f"(b));
  return a;
#endif
  return (b < a) | (b != b) ? b : a;
}

ADADFQ_HD float max_keep_nan(float a, float b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm("max.NaN.f32 %0, %0, %1;" : "+f"(a) : "f"(b));
  return a;
#endif
  return (b > a) | (b != b) ? b : a;
}

// Exact, and but for the sign of zeros independent of order: ends may be joined from parts in any
// way.
struct Ends {
  float lo;
  float hi;

  ADADFQ_HD void widen(float value) {
    lo = min_keep_nan(lo, value);
    hi = max_keep_nan(hi, value);
  }

  ADADFQ_HD void join(const Ends& other) {
    lo = min_keep_nan(lo, other.lo);
    hi = max_keep_nan(hi, other.hi);
  }
};

// Of no values.
ADADFQ_HD Ends no_ends() { return {INFINITY, -INFINITY}; }

// Of 0, which every quantiser's range holds.
ADADFQ_HD Ends zero_ends() { return {0.0f, 0.0f}; }

}  // namespace adadfq

#endif  // ADADFQ_COMMON_ENDS_H_
