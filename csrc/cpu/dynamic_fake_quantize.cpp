// Fake quantisation over each channel's own range.
//
//   lo_c = min(0, min x_c), hi_c = max(0, max x_c); NaN if the channel holds a NaN
//   scale_c, zero_point_c = qparams_from_range(lo_c, hi_c)        (csrc/common/quantizer.h)
//   x_hat = round(clamp(x / scale_c, -zero_point_c, 2^bits - 1 - zero_point_c)) * scale_c
//
// Where a channel's elements lie together (weights), each thread finds the range of a channel and
// quantises it while it is in the cache: 8 bytes an element of memory traffic in float32. Otherwise
// (channel axis innermost, or rows too short to vectorise along) the ranges of all columns are
// taken side by side, then the tensor is quantised in a second pass: 12 bytes.
//
// Test: python -m pytest tests/test_native_cpu.py -k dynamic
// Time: python -m timeit -s "import torch, adadfq.ops; x = torch.randn(512, 4608)"
//       "torch.ops.adadfq.dynamic_fake_quantize(x, 4, 0)"
#include "dynamic_fake_quantize.h"

#include <limits>
#include <vector>

#include "../common/quantizer.h"
#include "dispatch_dtype.h"
#include "fake_quantize.h"
#include "huge_pages.h"
#include "quantize_loops.h"
#include "target_clones.h"

namespace adadfq {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

struct Range {
  float lo = kInf;
  float hi = -kInf;
  int32_t nan = 0;

  void join(float other_lo, float other_hi, int32_t other_nan) {
    lo = other_lo < lo ? other_lo : lo;
    hi = other_hi > hi ? other_hi : hi;
    nan |= other_nan;
  }

  QParams qparams(int bits) const {
    return nan ? qparams_from_range(kNaN, kNaN, bits) : qparams_from_range(lo, hi, bits);
  }
};

// Comparisons drop a NaN, so NaN is looked for on its own.
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

#define ADADFQ_DEFINE(T)                                                                          \
  ADADFQ_CLONES void find_range(const T* x, int64_t n, Range& range) { row_range(x, n, range); }  \
  ADADFQ_CLONES void find_ranges(const T* x, int64_t rows, int64_t columns, float* lo, float* hi, \
                                 int32_t* nan) {                                                  \
    column_ranges(x, rows, columns, lo, hi, nan);                                                 \
  }

}  // namespace

ADADFQ_DEFINE(float)
ADADFQ_DEFINE(BFloat16)
ADADFQ_DEFINE(Float16)

#undef ADADFQ_DEFINE

namespace {

template <typename T>
void by_rows(const T* x, T* out, float* scale, int32_t* zero_point, const Layout& layout, int bits,
             int threads) {
  const int64_t stride = layout.channels * layout.inner;
  const int32_t qmax = max_code(bits);
  parallel_for(layout.channels, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      Range range;
      for (int64_t o = 0; o < layout.outer; ++o) {
        find_range(x + o * stride + c * layout.inner, layout.inner, range);
      }
      const QParams q = range.qparams(bits);
      const CodeBounds bounds = code_bounds(q.zero_point, qmax);
      scale[c] = q.scale;
      zero_point[c] = q.zero_point;
      for (int64_t o = 0; o < layout.outer; ++o) {
        const int64_t at = o * stride + c * layout.inner;
        quantize_row(x + at, out + at, layout.inner, q.scale, bounds.lo, bounds.hi);
      }
    }
  });
}

template <typename T>
void qparams_by_columns(const T* x, float* scale, int32_t* zero_point, const Layout& layout,
                        int bits, int threads) {
  const int64_t columns = layout.channels * layout.inner;
  const int64_t parts = std::min<int64_t>(threads, layout.outer);
  std::vector<float> lo(parts * columns, kInf), hi(parts * columns, -kInf);
  std::vector<int32_t> nan(parts * columns, 0);
  parallel_for(parts, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const int64_t first = p * layout.outer / parts, last = (p + 1) * layout.outer / parts;
      find_ranges(x + first * columns, last - first, columns, &lo[p * columns], &hi[p * columns],
                  &nan[p * columns]);
    }
  });
  for (int64_t c = 0; c < layout.channels; ++c) {
    Range range;
    for (int64_t p = 0; p < parts; ++p) {
      for (int64_t k = 0; k < layout.inner; ++k) {
        const int64_t i = p * columns + c * layout.inner + k;
        range.join(lo[i], hi[i], nan[i]);
      }
    }
    const QParams q = range.qparams(bits);
    scale[c] = q.scale;
    zero_point[c] = q.zero_point;
  }
}

}  // namespace

void dynamic_fake_quantize(const void* x, void* out, float* scale, int32_t* zero_point,
                           const Layout& layout, int bits, DType dtype, int threads) {
  const int useful = useful_threads(layout.elements(), threads);
  dispatch_dtype(dtype, [&](auto tag) {
    using T = decltype(tag);
    const T* from = static_cast<const T*>(x);
    prefer_huge_pages(out, layout.elements() * sizeof(T));
    if (layout.outer == 1 || layout.inner >= kRowElements) {
      by_rows(from, static_cast<T*>(out), scale, zero_point, layout, bits, useful);
    } else {
      qparams_by_columns(from, scale, zero_point, layout, bits, useful);
      fake_quantize(x, scale, zero_point, out, layout, bits, dtype, threads);
    }
  });
}

}  // namespace adadfq
