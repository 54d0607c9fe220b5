// Batch statistics against running statistics, per channel of n elements, C channels; and the
// inference BatchNorm of the same tensor.
//
//   mean_c = sum x / n        var_c = sum (x - mean_c)^2 / n
//   loss   = sum_c (mean_c - running_mean_c)^2 / C + sum_c (var_c - running_var_c)^2 / C
//   slope_c = weight_c / sqrt(running_var_c + eps)
//   y       = (x - running_mean_c) slope_c + bias_c
//   factor  = dL/dloss 2 / (C n)
//   dL/dx   = dL/dy slope_c + factor (mean_c - running_mean_c)
//             + factor 2 (var_c - running_var_c) (x - mean_c)
//
// Sums are taken about a value p_c near the channel's mean (the mean of its first elements), so
// that a large mean cancels nothing: mean = p + sum (x - p) / n, var = sum (x - p)^2 / n - (mean -
// p)^2. They are in float over a piece of a row or a tile that fits the cache, in double beyond. A
// piece with NaN, infinities or squares beyond float is summed again in double, and where some p_c
// turns out to be far from the mean, all is summed again about the means found.
//
// Bytes an element, float32: 4 for the statistics, 8 with y; backward 8, 12 with dL/dy.
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
#pragma omp simd
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

// Adds the sums of a row, or of a piece of one; lanes: those of its channel where rows are short.
template <typename T>
ADADFQ_INLINE void row_statistics(const T* ADADFQ_RESTRICT x, int64_t n, float pivot, double* sum,
                                  double* squares, float* lanes) {
  const auto value = [&](int64_t i) ADADFQ_INLINE_LAMBDA {
    const float d = to_float(x[i]) - pivot;
    return Two{d, d * d};
  };
  if (lanes) return add_short_row(n, lanes, value);
  const Two found = sum_of_row(n, value);
  if (!(found.second <= FLT_MAX)) return add_in_double(x, n, 1, pivot, sum, squares);
  *sum += static_cast<double>(found.first);
  *squares += static_cast<double>(found.second);
}

// The lanes of every channel go to its sums; rows [first, last).
template <typename T>
ADADFQ_INLINE void end_short_rows(const ChannelWalk& walk, const Task<T>& task, int64_t first,
                                  int64_t last, double* sum, double* squares, float* lanes) {
  const int64_t channels = walk.layout.channels, inner = walk.layout.inner;
  for (int64_t c = 0; c < channels; ++c, lanes += 2 * kShortLanes) {
    const float found = sum_short_lanes(lanes + kShortLanes);
    if (found <= FLT_MAX) {
      sum[c] += static_cast<double>(sum_short_lanes(lanes));
      squares[c] += static_cast<double>(found);
      continue;
    }
    for (int64_t line = first; line < last; ++line) {
      if (line % channels == c) {
        add_in_double(task.x + line * inner, inner, 1, task.pivot[c], sum + c, squares + c);
      }
    }
  }
}

// The same for `columns` columns side by side; scratch: 2 * columns values.
template <typename T>
ADADFQ_INLINE void tile_statistics(const T* ADADFQ_RESTRICT x, int64_t rows, int64_t columns,
                                   const float* ADADFQ_RESTRICT pivot, double* ADADFQ_RESTRICT sum,
                                   double* ADADFQ_RESTRICT squares,
                                   float* ADADFQ_RESTRICT scratch) {
  float* ADADFQ_RESTRICT first = scratch;
  float* ADADFQ_RESTRICT second = scratch + columns;
  sums_of_columns(rows, columns, first, second, [&](int64_t r, int64_t i) ADADFQ_INLINE_LAMBDA {
    const float d = to_float(x[r * columns + i]) - pivot[i];
    return Two{d, d * d};
  });
  for (int64_t i = 0; i < columns; ++i) {
    if (second[i] <= FLT_MAX) {
      sum[i] += static_cast<double>(first[i]);
      squares[i] += static_cast<double>(second[i]);
    } else {
      add_in_double(x + i, rows, columns, pivot[i], sum + i, squares + i);
    }
  }
}

template <typename T>
ADADFQ_INLINE void statistics(const ChannelWalk& walk, const Task<T>& task, int64_t first,
                              int64_t last, double* sum, double* squares, float* scratch) {
  const auto row = [&](int64_t begin, int64_t n, int64_t c, float* lanes) ADADFQ_INLINE_LAMBDA {
    row_statistics(task.x + begin, n, task.pivot[c], sum + c, squares + c, lanes);
    if (task.y) {
      normalise(task.x + begin, task.y + begin, n, task.running_mean[c], task.slope[c],
                task.bias[c]);
    }
  };
  if (walk.short_rows) {
    for (int64_t stop; first < last; first = stop) {
      stop = std::min(last, first + walk.flush_units());
      for (int64_t i = 0; i < walk.scratch(); ++i) scratch[i] = 0;
      walk_rows(walk, first, stop, [&](int64_t begin, int64_t n, int64_t c) ADADFQ_INLINE_LAMBDA {
        row(begin, n, c, scratch + 2 * kShortLanes * c);
      });
      end_short_rows(walk, task, first, stop, sum, squares, scratch);
    }
    return;
  }
  if (walk.by_rows) {
    walk_rows(walk, first, last, [&](int64_t begin, int64_t n, int64_t c) ADADFQ_INLINE_LAMBDA {
      row(begin, n, c, nullptr);
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
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    out[i] = from_float<T>(at(shift, i) + at(slope, i) * (to_float(x[i]) - at(mean, i)));
  }
}

template <typename T, typename Params>
ADADFQ_INLINE void gradient_of_both(const T* ADADFQ_RESTRICT grad, const T* ADADFQ_RESTRICT x,
                                    T* ADADFQ_RESTRICT out, int64_t n, Params shift, Params slope,
                                    Params mean, Params factor) {
#pragma omp simd
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

// Rounded to T, so that the difference from a value of T is exact or nearly so; finite.
template <typename T>
float as_pivot(double mean) {
  const float rounded = to_float(from_float<T>(static_cast<float>(mean)));
  return std::fabs(rounded) <= FLT_MAX ? rounded : 0.0f;
}

// A value near the mean of every channel, from a few of its elements.
template <typename T>
std::vector<float> guess_means(const T* x, const Layout& layout) {
  const int64_t rows = layout.inner < kRowElements ? std::min<int64_t>(layout.outer, 16) : 1;
  const int64_t length = std::min<int64_t>(layout.inner, 64);
  std::vector<double> sums(layout.channels);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < layout.channels; ++c) {
      const T* row = x + (r * layout.channels + c) * layout.inner;
      for (int64_t i = 0; i < length; ++i) sums[c] += static_cast<double>(to_float(row[i]));
    }
  }
  std::vector<float> means(layout.channels);
  for (int64_t c = 0; c < layout.channels; ++c) {
    means[c] = as_pivot<T>(sums[c] / static_cast<double>(rows * length));
  }
  return means;
}

// Mean and biased variance about `pivot`, and y if it is not null; false where some pivot was so
// far from its mean that the variance lost digits.
template <typename T>
bool moments_about(const std::vector<float>& pivot, const T* x, T* y, const BatchNorm& norm,
                   double* mean, double* var, const Layout& layout, int threads) {
  const ChannelWalk walk(layout);
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
  channel_sums(walk, threads, sum, squares,
               [&](int64_t first, int64_t last, double* a, double* b, float* scratch) {
                 statistics_chunk(walk, task, first, last, a, b, scratch);
               });
  const double count = static_cast<double>(layout.outer * layout.inner);
  bool near = true;
  for (int64_t c = 0; c < layout.channels; ++c) {
    const double offset = sum[c] / count, variance = squares[c] / count - offset * offset;
    mean[c] = static_cast<double>(pivot[c]) + offset;
    var[c] = variance < 0 ? 0 : variance;
    // Offsets whose squares are next to nothing in float leave the variance as it is.
    near &= !(offset * offset > 64 * var[c] && offset * offset > FLT_MIN);
  }
  return near;
}

template <typename T>
void channel_moments(const T* x, T* y, const BatchNorm& norm, double* mean, double* var,
                     const Layout& layout, int threads) {
  if (moments_about(guess_means(x, layout), x, y, norm, mean, var, layout, threads)) return;
  std::vector<float> means(layout.channels);
  for (int64_t c = 0; c < layout.channels; ++c) means[c] = as_pivot<T>(mean[c]);
  moments_about<T>(means, x, nullptr, norm, mean, var, layout, threads);
}

}  // namespace

void channel_moments(const void* x, double* mean, double* var, const Layout& layout, DType dtype,
                     int threads) {
  dispatch_dtype(dtype, [&](auto tag) {
    using T = decltype(tag);
    channel_moments<T>(static_cast<const T*>(x), nullptr, BatchNorm{}, mean, var, layout, threads);
  });
}

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
