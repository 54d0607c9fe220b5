// Batch statistics against running statistics, per channel of n elements, C channels; and the
// inference BatchNorm of the same tensor.
//
//   mean_c = sum x / n        var_c = sum (x - mean_c)^2 / n
//   loss   = sum_c (mean_c - running_mean_c)^2 / C + sum_c (var_c - running_var_c)^2 / C
//   y      = (x - running_mean_c) slope_c + bias_c       slope_c = weight_c / sqrt(running_var_c +
//   eps) dL/dx  = dL/dy slope_c
//            + dL/dloss 2 / (C n) [(mean_c - running_mean_c) + 2 (var_c - running_var_c) (x -
//            mean_c)]
//
// Of each piece of a channel that fits the cache the mean m is taken, then sum (x - m) and sum
// (x - m)^2 in float, which cancels nothing however large the mean; these go, in double, to the
// sums about a value p_c of the channel:
//   sum (x - p)   = sum (x - m) + n_i (m - p)
//   sum (x - p)^2 = sum (x - m)^2 + 2 (m - p) sum (x - m) + n_i (m - p)^2
// A piece with NaN, infinities or squares beyond float is summed again in double.
//
// Bytes an element, float32: 4 for the statistics, 8 with y; backward 8, 12 with dL/dy. The second
// look at a piece comes from the cache.
//
// Test: python -m pytest tests/test_native_cpu.py -k bn_match
// Time: python -m benchmarks ops --ops bn_match,bn_match_forward
#include "bn_match.h"

#include <cfloat>
#include <cmath>
#include <vector>

#include "channel_sums.h"
#include "dispatch_dtype.h"
#include "huge_pages.h"
#include "target_clones.h"

namespace adadfq {
namespace {

// What a chunk needs: y is null where only the statistics are wanted.
template <typename T>
struct Task {
  const T* x;
  T* y;
  const float* pivot;  // one a channel, or a column
  const float* running_mean;
  const float* slope;
  const float* bias;
};

template <typename T, typename Params>
ADADFQ_INLINE void normalise(const T* ADADFQ_RESTRICT x, T* ADADFQ_RESTRICT y, int64_t n,
                             Params running_mean, Params slope, Params bias) {
  for (int64_t i = 0; i < n; ++i) {
    y[i] = from_float<T>((to_float(x[i]) - at(running_mean, i)) * at(slope, i) + at(bias, i));
  }
}

// sum (x - pivot) and its squares, over n elements `stride` apart.
template <typename T>
void add_in_double(const T* x, int64_t n, int64_t stride, float pivot, double* sum,
                   double* squares) {
  for (int64_t i = 0; i < n; ++i) {
    const double d = static_cast<double>(to_float(x[i * stride])) - static_cast<double>(pivot);
    *sum += d;
    *squares += d * d;
  }
}

// Adds sums about `mean` to sums about `pivot`; false, having added nothing, where they are not
// finite.
ADADFQ_INLINE bool add_about(float mean, float offsets, float squares, int64_t n, float pivot,
                             double* sum, double* sum_squares) {
  if (!(squares <= FLT_MAX)) return false;
  const double count = static_cast<double>(n), first = static_cast<double>(offsets);
  const double shift = static_cast<double>(mean) - static_cast<double>(pivot);
  *sum += first + count * shift;
  *sum_squares += static_cast<double>(squares) + 2.0 * shift * first + count * shift * shift;
  return true;
}

template <typename T>
ADADFQ_INLINE void row_statistics(const T* ADADFQ_RESTRICT x, int64_t n, float pivot, double* sum,
                                  double* squares) {
  float total[kLanes] = {0}, first[kLanes] = {0}, second[kLanes] = {0};
  for_lanes(n, [&](int64_t i, int j) ADADFQ_INLINE_LAMBDA { total[j] += to_float(x[i]); });
  const float mean = sum_lanes(total) / static_cast<float>(n);
  for_lanes(n, [&](int64_t i, int j) ADADFQ_INLINE_LAMBDA {
    const float d = to_float(x[i]) - mean;
    first[j] += d;
    second[j] += d * d;
  });
  if (!add_about(mean, sum_lanes(first), sum_lanes(second), n, pivot, sum, squares)) {
    add_in_double(x, n, 1, pivot, sum, squares);
  }
}

// The same for `columns` columns side by side; scratch: 3 * columns values.
template <typename T>
ADADFQ_INLINE void tile_statistics(const T* ADADFQ_RESTRICT x, int64_t rows, int64_t columns,
                                   const float* ADADFQ_RESTRICT pivot, double* ADADFQ_RESTRICT sum,
                                   double* ADADFQ_RESTRICT squares,
                                   float* ADADFQ_RESTRICT scratch) {
  float* ADADFQ_RESTRICT mean = scratch;
  float* ADADFQ_RESTRICT first = scratch + columns;
  float* ADADFQ_RESTRICT second = scratch + 2 * columns;
  for (int64_t i = 0; i < 3 * columns; ++i) scratch[i] = 0;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < columns; ++i) mean[i] += to_float(x[r * columns + i]);
  }
  for (int64_t i = 0; i < columns; ++i) mean[i] /= static_cast<float>(rows);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < columns; ++i) {
      const float d = to_float(x[r * columns + i]) - mean[i];
      first[i] += d;
      second[i] += d * d;
    }
  }
  for (int64_t i = 0; i < columns; ++i) {
    if (!add_about(mean[i], first[i], second[i], rows, pivot[i], sum + i, squares + i)) {
      add_in_double(x + i, rows, columns, pivot[i], sum + i, squares + i);
    }
  }
}

template <typename T>
ADADFQ_INLINE void statistics(const ChannelWalk& walk, const Task<T>& task, int64_t first,
                              int64_t last, double* sum, double* squares, float* scratch) {
  if (walk.by_rows) {
    walk_rows(walk, first, last, [&](int64_t begin, int64_t n, int64_t c) ADADFQ_INLINE_LAMBDA {
      row_statistics(task.x + begin, n, task.pivot[c], sum + c, squares + c);
      if (task.y) {
        normalise(task.x + begin, task.y + begin, n, task.running_mean[c], task.slope[c],
                  task.bias[c]);
      }
    });
    return;
  }
  const int64_t columns = walk.columns();
  walk_tiles(walk, first, last, [&](int64_t begin, int64_t rows) ADADFQ_INLINE_LAMBDA {
    tile_statistics(task.x + begin, rows, columns, task.pivot, sum, squares, scratch);
    if (!task.y) return;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t row = begin + r * columns;
      normalise(task.x + row, task.y + row, columns, task.running_mean, task.slope, task.bias);
    }
  });
}

template <typename T, typename Params>
ADADFQ_INLINE void gradient(const T* ADADFQ_RESTRICT x, T* ADADFQ_RESTRICT out, int64_t n,
                            Params shift, Params slope, Params mean) {
  for (int64_t i = 0; i < n; ++i) {
    out[i] = from_float<T>(at(shift, i) + at(slope, i) * (to_float(x[i]) - at(mean, i)));
  }
}

template <typename T, typename Params>
ADADFQ_INLINE void gradient_of_both(const T* ADADFQ_RESTRICT grad, const T* ADADFQ_RESTRICT x,
                                    T* ADADFQ_RESTRICT out, int64_t n, Params shift, Params slope,
                                    Params mean, Params factor) {
  for (int64_t i = 0; i < n; ++i) {
    const float matched = at(shift, i) + at(slope, i) * (to_float(x[i]) - at(mean, i));
    out[i] = from_float<T>(to_float(grad[i]) * at(factor, i) + matched);
  }
}

}  // namespace

#define ADADFQ_DEFINE(T)                                                                           \
  ADADFQ_CLONES void statistics_chunk(const ChannelWalk& walk, const Task<T>& task, int64_t first, \
                                      int64_t last, double* sum, double* squares,                  \
                                      float* scratch) {                                            \
    statistics(walk, task, first, last, sum, squares, scratch);                                    \
  }                                                                                                \
  ADADFQ_CLONES void gradient_row(const T* x, T* out, int64_t n, float shift, float slope,         \
                                  float mean) {                                                    \
    gradient(x, out, n, shift, slope, mean);                                                       \
  }                                                                                                \
  ADADFQ_CLONES void gradient_pattern(const T* x, T* out, int64_t n, const float* shift,           \
                                      const float* slope, const float* mean) {                     \
    gradient(x, out, n, shift, slope, mean);                                                       \
  }                                                                                                \
  ADADFQ_CLONES void gradient_of_both_row(const T* grad, const T* x, T* out, int64_t n,            \
                                          float shift, float slope, float mean, float factor) {    \
    gradient_of_both(grad, x, out, n, shift, slope, mean, factor);                                 \
  }                                                                                                \
  ADADFQ_CLONES void gradient_of_both_pattern(const T* grad, const T* x, T* out, int64_t n,        \
                                              const float* shift, const float* slope,              \
                                              const float* mean, const float* factor) {            \
    gradient_of_both(grad, x, out, n, shift, slope, mean, factor);                                 \
  }

ADADFQ_DEFINE(float)
ADADFQ_DEFINE(BFloat16)
ADADFQ_DEFINE(Float16)

#undef ADADFQ_DEFINE

namespace {

float batch_norm_slope(const BatchNorm& norm, int64_t c) {
  const double slope = 1.0 / std::sqrt(static_cast<double>(norm.running_var[c]) + norm.eps);
  const double weight = norm.weight ? static_cast<double>(norm.weight[c]) : 1.0;
  return static_cast<float>(weight * slope);
}

// A value of every channel to take sums about. Any will do; one that is not finite would turn every
// sum to NaN.
template <typename T>
std::vector<float> first_values(const T* x, const Layout& layout) {
  std::vector<float> values(layout.channels);
  for (int64_t c = 0; c < layout.channels; ++c) {
    const float value = to_float(x[c * layout.inner]);
    values[c] = std::fabs(value) <= FLT_MAX ? value : 0.0f;
  }
  return values;
}

template <typename T>
void channel_moments(const T* x, T* y, const BatchNorm& norm, double* mean, double* var,
                     const Layout& layout, int threads) {
  const ChannelWalk walk(layout);
  const std::vector<float> pivot = first_values(x, layout);
  std::vector<float> running_mean(layout.channels), slope(layout.channels), bias(layout.channels);
  for (int64_t c = 0; y && c < layout.channels; ++c) {
    running_mean[c] = norm.running_mean[c];
    slope[c] = batch_norm_slope(norm, c);
    bias[c] = norm.bias ? norm.bias[c] : -0.0f;  // adding -0 changes nothing, not even a -0
  }
  const std::vector<float> pivots = spread(walk, pivot.data()),
                           means = spread(walk, running_mean.data()),
                           slopes = spread(walk, slope.data()), biases = spread(walk, bias.data());
  const Task<T> task{x, y, pivots.data(), means.data(), slopes.data(), biases.data()};
  std::vector<double> sum, squares;
  channel_sums(walk, threads, sum, squares, [&](int64_t first, int64_t last, double* a, double* b) {
    std::vector<float> scratch(walk.by_rows ? 0 : 3 * walk.columns());
    statistics_chunk(walk, task, first, last, a, b, scratch.data());
  });
  const double count = static_cast<double>(layout.outer * layout.inner);
  for (int64_t c = 0; c < layout.channels; ++c) {
    const double offset = sum[c] / count, variance = squares[c] / count - offset * offset;
    mean[c] = static_cast<double>(pivot[c]) + offset;
    var[c] = variance < 0 ? 0 : variance;
  }
}

}  // namespace

void bn_match(const void* x, const BatchNorm& norm, void* y, float* loss, double* mean, double* var,
              const Layout& layout, DType dtype, int threads) {
  dispatch_dtype(dtype, [&](auto tag) {
    using T = decltype(tag);
    if (y) prefer_huge_pages(y, layout.elements() * sizeof(T));
    channel_moments(static_cast<const T*>(x), static_cast<T*>(y), norm, mean, var, layout, threads);
  });
  double mean_error = 0, var_error = 0;
  for (int64_t c = 0; c < layout.channels; ++c) {
    const double dm = mean[c] - static_cast<double>(norm.running_mean[c]);
    const double dv = var[c] - static_cast<double>(norm.running_var[c]);
    mean_error += dm * dm;
    var_error += dv * dv;
  }
  *loss = static_cast<float>((mean_error + var_error) / static_cast<double>(layout.channels));
}

void bn_match_backward(const void* grad_y, const float* grad_loss, const void* x,
                       const double* mean, const double* var, const BatchNorm& norm, void* out,
                       const Layout& layout, DType dtype, int threads) {
  // shift, slope and mean of the loss's gradient, slope of the BatchNorm. What rounding the mean to
  // float leaves out goes to the shift: it may be much of the deviation.
  const double factor =
      static_cast<double>(*grad_loss) * (2.0 / static_cast<double>(layout.elements()));
  ChannelParams<4> params(layout.channels);
  for (int64_t c = 0; c < layout.channels; ++c) {
    const float rounded = static_cast<float>(mean[c]);
    const double slope = factor * 2.0 * (var[c] - static_cast<double>(norm.running_var[c]));
    const double shift = factor * (mean[c] - static_cast<double>(norm.running_mean[c]));
    params.each[0][c] =
        static_cast<float>(shift + slope * (static_cast<double>(rounded) - mean[c]));
    params.each[1][c] = static_cast<float>(slope);
    params.each[2][c] = rounded;
    params.each[3][c] = grad_y ? batch_norm_slope(norm, c) : 0.0f;
  }
  dispatch_dtype(dtype, [&](auto tag) {
    using T = decltype(tag);
    const T* upstream = static_cast<const T*>(grad_y);
    const T* from = static_cast<const T*>(x);
    T* to = static_cast<T*>(out);
    prefer_huge_pages(out, layout.elements() * sizeof(T));
    for_each_segment(
        layout, params, threads,
        [=](int64_t i, int64_t n, const auto& p) {
          if (upstream) {
            gradient_of_both_row(upstream + i, from + i, to + i, n, p[0], p[1], p[2], p[3]);
          } else {
            gradient_row(from + i, to + i, n, p[0], p[1], p[2]);
          }
        },
        [=](int64_t i, int64_t n, const auto& p) {
          if (upstream) {
            gradient_of_both_pattern(upstream + i, from + i, to + i, n, p[0], p[1], p[2], p[3]);
          } else {
            gradient_pattern(from + i, to + i, n, p[0], p[1], p[2]);
          }
        });
  });
}

}  // namespace adadfq
