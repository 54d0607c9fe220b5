// Backward of fake quantisation with a learned step (LSQ: Esser et al., ICLR 2020).
//
//   q = x / scale_c, k = round(q), codes are lo <= k <= hi      lo = -zero_point_c, hi = lo +
//   2^bits - 1 grad_x       = grad where k is a code, else 0 grad_scale_c = sum grad (k - q where k
//   is a code; lo where k < lo; hi where k > hi)
//
// Channels that are one row of memory each, as those of weights: the channels of all such tensors
// of a list are shared out together, each is summed by one thread. Others are summed in chunks
// (channel_sums.h). Sums are in float over a piece or tile that fits the cache, in double beyond,
// and the same for any number of threads. Bytes an element, float32: 12; 16-bit types: 6.
//
// Test: python -m pytest tests/test_learned_steps.py tests/test_properties.py -k learned
#include "learned_fake_quantize.h"

#include <vector>

#include "../common/quantizer.h"
#include "channel_sums.h"
#include "code_params.h"
#include "dispatch_dtype.h"
#include "huge_pages.h"
#include "target_clones.h"

namespace adadfq {
namespace {

// Longer rows are cut.
constexpr int64_t kLongestRow = 65536;

// What element i gives its step's gradient; grad_x is written.
template <typename T, typename Params>
ADADFQ_INLINE float gradient_at(const T* ADADFQ_RESTRICT grad, const T* ADADFQ_RESTRICT x,
                                T* ADADFQ_RESTRICT grad_x, int64_t i, Params scale, Params lo,
                                Params hi) {
  const LearnedStep step = learned_step(to_float(x[i]), at(scale, i), at(lo, i), at(hi, i));
  grad_x[i] = keep_if(step.inside, grad[i]);
  return to_float(grad[i]) * step.slope;
}

template <typename T>
ADADFQ_INLINE double row_gradients(const T* ADADFQ_RESTRICT grad, const T* ADADFQ_RESTRICT x,
                                   T* ADADFQ_RESTRICT grad_x, int64_t n, float scale, float lo,
                                   float hi) {
  float terms[kPieceElements];
  double sum = 0;
  for (int64_t begin = 0; begin < n; begin += kPieceElements) {
    const int64_t count = std::min(kPieceElements, n - begin);
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      terms[i] = gradient_at(grad + begin, x + begin, grad_x + begin, i, scale, lo, hi);
    }
    sum += static_cast<double>(sum_of_values(count, terms));
  }
  return sum;
}

// Adds the sums of `columns` columns side by side to `sum`; scratch: `columns` values.
template <typename T>
ADADFQ_INLINE void tile_gradients(const T* ADADFQ_RESTRICT grad, const T* ADADFQ_RESTRICT x,
                                  T* ADADFQ_RESTRICT grad_x, int64_t rows, int64_t columns,
                                  const float* ADADFQ_RESTRICT scale,
                                  const float* ADADFQ_RESTRICT lo, const float* ADADFQ_RESTRICT hi,
                                  double* ADADFQ_RESTRICT sum, float* ADADFQ_RESTRICT scratch) {
  for (int64_t i = 0; i < columns; ++i) scratch[i] = 0;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t row = r * columns;
#pragma omp simd
    for (int64_t i = 0; i < columns; ++i) {
      scratch[i] += gradient_at(grad + row, x + row, grad_x + row, i, scale, lo, hi);
    }
  }
  for (int64_t i = 0; i < columns; ++i) sum[i] += static_cast<double>(scratch[i]);
}

}  // namespace

#define ADADFQ_DEFINE(T)                                                                         \
  ADADFQ_CLONES double learned_row(const T* grad, const T* x, T* grad_x, int64_t n, float scale, \
                                   float lo, float hi) {                                         \
    return row_gradients(grad, x, grad_x, n, scale, lo, hi);                                     \
  }                                                                                              \
  ADADFQ_CLONES void learned_tile(const T* grad, const T* x, T* grad_x, int64_t rows,            \
                                  int64_t columns, const float* scale, const float* lo,          \
                                  const float* hi, double* sum, float* scratch) {                \
    tile_gradients(grad, x, grad_x, rows, columns, scale, lo, hi, sum, scratch);                 \
  }

ADADFQ_DEFINE(float)
ADADFQ_DEFINE(BFloat16)
ADADFQ_DEFINE(Float16)

#undef ADADFQ_DEFINE

namespace {

template <typename T>
struct Pointers {
  explicit Pointers(const LearnedTensor& t)
      : grad(static_cast<const T*>(t.grad)),
        x(static_cast<const T*>(t.x)),
        grad_x(static_cast<T*>(t.grad_x)) {}

  const T* grad;
  const T* x;
  T* grad_x;
};

// By the layout alone, or sums would depend on the number of threads.
bool channels_are_rows(const Layout& layout) {
  return layout.outer == 1 && layout.inner <= kLongestRow;
}

template <typename T>
void channels_of_rows(const LearnedTensor& t, int64_t begin, int64_t end) {
  const Pointers<T> p(t);
  const int32_t qmax = max_code(static_cast<int>(t.bits));
  for (int64_t c = begin; c < end; ++c) {
    const CodeBounds codes = code_bounds(t.zero_point[c], qmax);
    const int64_t at = c * t.layout.inner;
    t.grad_scale[c] = static_cast<float>(learned_row(
        p.grad + at, p.x + at, p.grad_x + at, t.layout.inner, t.scale[c], codes.lo, codes.hi));
  }
}

template <typename T>
void by_chunks(const LearnedTensor& t, int threads) {
  const ChannelWalk walk(t.layout);
  const Pointers<T> p(t);
  const ChannelParams<3> params =
      code_params(t.scale, t.zero_point, t.layout.channels, static_cast<int>(t.bits));
  const std::vector<float> scale = spread(walk, params.each[0].data()),
                           lo = spread(walk, params.each[1].data()),
                           hi = spread(walk, params.each[2].data());
  std::vector<double> sum, nothing;
  channel_sums(walk, threads, sum, nothing,
               [&](int64_t first, int64_t last, double* sums, double*, float* scratch) {
                 if (walk.by_rows) {
                   walk_rows(walk, first, last, [&](int64_t i, int64_t n, int64_t c) {
                     sums[c] +=
                         learned_row(p.grad + i, p.x + i, p.grad_x + i, n, scale[c], lo[c], hi[c]);
                   });
                   return;
                 }
                 walk_tiles(walk, first, last, [&](int64_t i, int64_t rows) {
                   learned_tile(p.grad + i, p.x + i, p.grad_x + i, rows, walk.columns(),
                                scale.data(), lo.data(), hi.data(), sums, scratch);
                 });
               });
  for (int64_t c = 0; c < t.layout.channels; ++c) t.grad_scale[c] = static_cast<float>(sum[c]);
}

}  // namespace

void learned_fake_quantize_backward(const LearnedTensor* tensors, int64_t count, DType dtype,
                                    int threads) {
  dispatch_dtype(dtype, [&](auto tag) {
    using T = decltype(tag);
    std::vector<const LearnedTensor*> rows;
    int64_t total = 0;
    for (const LearnedTensor* t = tensors; t != tensors + count; ++t) {
      prefer_huge_pages(t->grad_x, t->layout.elements() * sizeof(T));
      if (!channels_are_rows(t->layout)) {
        by_chunks<T>(*t, threads);
        continue;
      }
      rows.push_back(t);
      total += t->layout.elements();
    }
    parallel_for(total, useful_threads(total, threads), 1, [&](int64_t begin, int64_t end) {
      for (const LearnedTensor* t : rows) {
        // A channel belongs to the thread whose part holds its first element.
        const int64_t channels = t->layout.channels, length = t->layout.inner;
        const int64_t first = (std::max<int64_t>(begin, 0) + length - 1) / length;
        const int64_t last = (std::max<int64_t>(end, 0) + length - 1) / length;
        channels_of_rows<T>(*t, std::min(first, channels), std::min(last, channels));
        begin -= t->layout.elements();
        end -= t->layout.elements();
      }
    });
  });
}

}  // namespace adadfq
