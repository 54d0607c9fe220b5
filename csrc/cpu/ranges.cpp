// Minimum and maximum over neighbouring elements (4 bytes an element read, 2 of 16-bit types).
//
// Test: python -m pytest tests/test_native_cpu.py -k "dynamic or observe or ranges"
// Time: python -m benchmarks ops --ops dynamic_fake_quantize,observe_fake_quantize
#include "ranges.h"

#include "target_clones.h"

namespace adadfq {
namespace {

template <typename T>
ADADFQ_INLINE void row_range(const T* ADADFQ_RESTRICT x, int64_t n, Range& range) {
  float lo = range.lo, hi = range.hi;
  int32_t nan = range.nan;
#pragma omp simd reduction(min : lo) reduction(max : hi) reduction(| : nan)
  for (int64_t i = 0; i < n; ++i) {
    const float v = to_float(x[i]);
    lo = v < lo ? v : lo;
    hi = v > hi ? v : hi;
    nan |= v != v;
  }
  range = {lo, hi, nan};
}

template <typename T>
ADADFQ_INLINE void column_ranges(const T* ADADFQ_RESTRICT x, int64_t rows, int64_t columns,
                                 float* ADADFQ_RESTRICT lo, float* ADADFQ_RESTRICT hi,
                                 int32_t* ADADFQ_RESTRICT nan) {
  for (int64_t r = 0; r < rows; ++r, x += columns) {
    for (int64_t i = 0; i < columns; ++i) {
      const float v = to_float(x[i]);
      lo[i] = v < lo[i] ? v : lo[i];
      hi[i] = v > hi[i] ? v : hi[i];
      nan[i] |= v != v;
    }
  }
}

}  // namespace

#define ADADFQ_DEFINE(T)                                                                          \
  ADADFQ_CLONES void find_range(const T* x, int64_t n, Range& range) { row_range(x, n, range); }  \
  ADADFQ_CLONES void find_ranges(const T* x, int64_t rows, int64_t columns, float* lo, float* hi, \
                                 int32_t* nan) {                                                  \
    column_ranges(x, rows, columns, lo, hi, nan);                                                 \
  }

ADADFQ_DEFINE(float)
ADADFQ_DEFINE(BFloat16)
ADADFQ_DEFINE(Float16)

#undef ADADFQ_DEFINE

}  // namespace adadfq
