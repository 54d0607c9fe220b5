// Minimum and maximum of neighbouring elements, with NaN never lost.
#ifndef ADADFQ_CPU_RANGES_H_
#define ADADFQ_CPU_RANGES_H_

#include <cstdint>
#include <limits>

#include "../common/dtype.h"
#include "../common/quantizer.h"

namespace adadfq {

// Comparisons drop a NaN, so NaN is looked for on its own. Exact and independent of order: a range
// may be joined from parts in any way.
struct Range {
  float lo = std::numeric_limits<float>::infinity();
  float hi = -std::numeric_limits<float>::infinity();
  int32_t nan = 0;

  void join(const Range& other) {
    lo = other.lo < lo ? other.lo : lo;
    hi = other.hi > hi ? other.hi : hi;
    nan |= other.nan;
  }

  // Both ends NaN where there was one.
  Range with_nan() const {
    constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
    return nan ? Range{kNaN, kNaN, 1} : *this;
  }

  QParams qparams(int bits) const {
    const Range range = with_nan();
    return qparams_from_range(range.lo, range.hi, bits);
  }
};

// Widens `range` by n elements.
void find_range(const float* x, int64_t n, Range& range);
void find_range(const BFloat16* x, int64_t n, Range& range);
void find_range(const Float16* x, int64_t n, Range& range);

// The same for `columns` columns side by side, `rows` long.
void find_ranges(const float* x, int64_t rows, int64_t columns, float* lo, float* hi, int32_t* nan);
void find_ranges(const BFloat16* x, int64_t rows, int64_t columns, float* lo, float* hi,
                 int32_t* nan);
void find_ranges(const Float16* x, int64_t rows, int64_t columns, float* lo, float* hi,
                 int32_t* nan);

}  // namespace adadfq

#endif  // ADADFQ_CPU_RANGES_H_
