// Inner loops of fake quantisation (the arithmetic is csrc/common/quantizer.h).
//
//   quantize   out[i] = round(clamp(x[i] / scale, lo, hi)) * scale        lo, hi: bounds of the
//   codes clip       out[i] = lo <= round(x[i] / scale) <= hi ? grad[i] : 0
//
// Bytes an element: quantize reads and writes one value (float32: 8 bytes, 16-bit types: 4), clip
// reads one more (12, 6). Memory-bound as soon as the tensor leaves the cache.
//
// Test:  python -m pytest tests/test_native_cpu.py -k fake_quantize
// Time:  python -m benchmarks ops --ops fake_quantize,fake_quantize_
// Alone: tests/test_sanitize.py builds the launchers without Python.
#include "quantize_loops.h"

#include "../common/quantizer.h"
#include "target_clones.h"

namespace adadfq {
namespace {

// Params is float (one channel) or const float* (a pattern). `out` may be `x` itself: the pragma
// says that no element depends on another, which a restrict qualifier would not allow.
template <typename T, typename Params>
ADADFQ_INLINE void quantize(const T* x, T* out, int64_t n, Params scale, Params lo, Params hi) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    out[i] = from_float<T>(fake_quantize_value(to_float(x[i]), at(scale, i), at(lo, i), at(hi, i)));
  }
}

template <typename T, typename Params>
ADADFQ_INLINE void clip(const T* ADADFQ_RESTRICT grad, const T* ADADFQ_RESTRICT x,
                        T* ADADFQ_RESTRICT out, int64_t n, Params scale, Params lo, Params hi) {
  for (int64_t i = 0; i < n; ++i) {
    const bool inside = inside_range(to_float(x[i]), at(scale, i), at(lo, i), at(hi, i));
    out[i] = keep_if(inside, grad[i]);
  }
}

}  // namespace

#define ADADFQ_DEFINE(T)                                                                           \
  ADADFQ_CLONES void quantize_row(const T* x, T* out, int64_t n, float scale, float lo,            \
                                  float hi) {                                                      \
    quantize(x, out, n, scale, lo, hi);                                                            \
  }                                                                                                \
  ADADFQ_CLONES void quantize_pattern(const T* x, T* out, int64_t n, const float* scale,           \
                                      const float* lo, const float* hi) {                          \
    quantize(x, out, n, scale, lo, hi);                                                            \
  }                                                                                                \
  ADADFQ_CLONES void clip_row(const T* grad, const T* x, T* out, int64_t n, float scale, float lo, \
                              float hi) {                                                          \
    clip(grad, x, out, n, scale, lo, hi);                                                          \
  }                                                                                                \
  ADADFQ_CLONES void clip_pattern(const T* grad, const T* x, T* out, int64_t n,                    \
                                  const float* scale, const float* lo, const float* hi) {          \
    clip(grad, x, out, n, scale, lo, hi);                                                          \
  }

ADADFQ_DEFINE(float)
ADADFQ_DEFINE(BFloat16)
ADADFQ_DEFINE(Float16)

#undef ADADFQ_DEFINE

}  // namespace adadfq
