// Training-mode BatchNorm and LeakyReLU; weight and bias of a channel c, or of a sample s and c.
//
//   mean_c = sum x / n         var_c = sum (x - mean_c)^2 / n      n elements a channel
//   x_hat  = (x - mean_c) / sqrt(var_c + eps)
//   u      = x_hat weight_sc + bias_sc
//   y      = u where u > 0, else slope u
//   g      = dL/dy where u > 0, else slope dL/dy
//   grad_bias_sc = sum g       grad_weight_sc = sum g x_hat
//   grad_x = (weight_sc g - sum_s weight_sc grad_bias_sc / n
//             - x_hat sum_s weight_sc grad_weight_sc / n) / sqrt(var_c + eps)
//
// Forward: one walk for the statistics (bn_match.cpp), one for y. Backward: one for the sums, one
// for grad_x; u is computed again in both. Sums are in float over a piece or a tile that fits the
// cache, in double beyond; what is summed together depends on the shape only.
//
// Bytes an element, float32: forward 12, backward 20; 16-bit types half of that.
//
// Test: python -m pytest tests/test_native_cpu.py -k batch_norm_act
// Time: python -m benchmarks ops --ops batch_norm_act
#include "batch_norm_act.h"

#include <vector>

#include "../common/batch_norm_act.h"
#include "bn_match.h"
#include "channel_sums.h"
#include "dispatch_dtype.h"
#include "huge_pages.h"
#include "target_clones.h"

namespace adadfq {
namespace {

// Neighbouring elements from which a loop over columns pays.
constexpr int64_t kFewestColumns = 64;
// Elements of a tensor that is taken to be in a cache.
constexpr int64_t kCachedElements = 1 << 21;

// How many rows of `period` elements side by side make kFewestColumns.
int64_t rows_side_by_side(int64_t period) {
  int64_t rows = 1;
  while (rows * period < kFewestColumns) rows *= 2;
  return rows;
}

// The units of a tensor that is walked sample by sample: pieces of rows of a channel where these
// are long, else parts of a sample, rows of columns. Units depend on the shape only.
struct SampleWalk {
  SampleWalk(const Layout& tensor, int64_t count) : layout(tensor), samples(count) {
    outer = layout.outer / samples;
    by_rows = layout.inner >= kRowElements;
    if (by_rows) {
      columns = layout.channels;
      channel_of.resize(columns);
      for (int64_t k = 0; k < columns; ++k) channel_of[k] = k;
      parts = (layout.inner + kPieceElements - 1) / kPieceElements;
      units = layout.outer * layout.channels * parts;
      return;
    }
    const int64_t period = layout.channels * layout.inner;
    columns = period * std::min(outer, rows_side_by_side(period));
    rows = sample_elements() / columns;
    channel_of.resize(columns);
    for (int64_t k = 0; k < columns; ++k) channel_of[k] = k / layout.inner % layout.channels;
    const int64_t elements = std::max(
        {kChunkElements, 64 * columns, (layout.elements() + kMostChunks - 1) / kMostChunks});
    parts = std::min(rows, std::max<int64_t>(1, sample_elements() / elements));
    units = samples * parts;
    tile_rows = std::min(kTileRows, std::max<int64_t>(1, kTileElements / columns));
  }

  int64_t sample_elements() const { return outer * layout.channels * layout.inner; }
  // Numbers that a unit adds to the two sums.
  int64_t width() const { return by_rows ? 2 : 2 * columns; }

  Layout layout;
  int64_t samples;
  int64_t outer;  // of a sample
  bool by_rows;
  int64_t columns;                  // by rows: channels
  std::vector<int64_t> channel_of;  // a column
  int64_t rows = 0;                 // of columns in a sample; some elements may be left over
  int64_t parts;                    // of a row, or of a sample
  int64_t units;
  int64_t tile_rows = 0;
};

// What the loops need. One value a column: mean, offset, factor; a sample and column: slope, shift.
template <typename T>
struct Norm {
  const T* x;
  const T* grad;
  T* out;
  const float* mean;
  const float* slope;
  const float* shift;
  const float* offset;
  const float* factor;
  float negative_slope;
};

// row(unit, begin, n, channel, sample * channels + channel) for units [first, last).
template <typename Row>
ADADFQ_INLINE void for_rows(const SampleWalk& walk, int64_t first, int64_t last, const Row& row) {
  const int64_t inner = walk.layout.inner, channels = walk.layout.channels;
  int64_t line = first / walk.parts, piece = first % walk.parts;
  for (int64_t unit = first; unit < last; ++line, piece = 0) {
    const int64_t channel = line % channels, sample = line / channels / walk.outer;
    for (; piece < walk.parts && unit < last; ++piece, ++unit) {
      const int64_t begin = piece * kPieceElements;
      row(unit, line * inner + begin, std::min(kPieceElements, inner - begin), channel,
          sample * channels + channel);
    }
  }
}

// tile(unit, begin, rows, columns, sample) for every tile in units [first, last); the last tile of
// a sample may have fewer columns.
template <typename Tile>
ADADFQ_INLINE void for_tiles(const SampleWalk& walk, int64_t first, int64_t last,
                             const Tile& tile) {
  for (int64_t unit = first; unit < last; ++unit) {
    const int64_t sample = unit / walk.parts, part = unit % walk.parts;
    const int64_t origin = sample * walk.sample_elements();
    const int64_t stop = (part + 1) * walk.rows / walk.parts;
    for (int64_t row = part * walk.rows / walk.parts; row < stop; row += walk.tile_rows) {
      tile(unit, origin + row * walk.columns, std::min(walk.tile_rows, stop - row), walk.columns,
           sample);
    }
    const int64_t left = walk.sample_elements() - walk.rows * walk.columns;
    if (part + 1 == walk.parts && left) {
      tile(unit, origin + walk.rows * walk.columns, int64_t{1}, left, sample);
    }
  }
}

template <typename T, typename Params>
ADADFQ_INLINE void apply(const T* ADADFQ_RESTRICT x, T* ADADFQ_RESTRICT y, int64_t n, Params mean,
                         Params slope, Params shift, float negative_slope) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const float u = (to_float(x[i]) - at(mean, i)) * at(slope, i) + at(shift, i);
    y[i] = from_float<T>(leaky_relu(u, negative_slope));
  }
}

template <typename T>
ADADFQ_INLINE void apply_units(const SampleWalk& walk, const Norm<T>& norm, int64_t first,
                               int64_t last) {
  const Norm<T> t = norm;
  if (walk.by_rows) {
    for_rows(walk, first, last,
             [&](int64_t, int64_t begin, int64_t n, int64_t c, int64_t at_sample)
                 ADADFQ_INLINE_LAMBDA {
                   apply(t.x + begin, t.out + begin, n, t.mean[c], t.slope[at_sample],
                         t.shift[at_sample], t.negative_slope);
                 });
    return;
  }
  for_tiles(walk, first, last,
            [&](int64_t, int64_t begin, int64_t rows, int64_t columns,
                int64_t sample) ADADFQ_INLINE_LAMBDA {
              const float* slope = t.slope + sample * walk.columns;
              const float* shift = t.shift + sample * walk.columns;
              for (int64_t r = 0; r < rows; ++r, begin += columns) {
                apply(t.x + begin, t.out + begin, columns, t.mean, slope, shift, t.negative_slope);
              }
            });
}

// g, and g (x - mean).
template <typename T, typename Params>
ADADFQ_INLINE Two products_at(const T* ADADFQ_RESTRICT grad, const T* ADADFQ_RESTRICT x, int64_t i,
                              Params mean, Params slope, Params shift, float negative_slope) {
  const float d = to_float(x[i]) - at(mean, i);
  const float u = d * at(slope, i) + at(shift, i);
  const float g = leaky_relu_gradient(to_float(grad[i]), u, negative_slope);
  return {g, g * d};
}

// sums: walk.width() values a unit, that start at 0; scratch: as many, of any value.
template <typename T>
ADADFQ_INLINE void sum_units(const SampleWalk& walk, const Norm<T>& norm, int64_t first,
                             int64_t last, double* sums, float* scratch) {
  const Norm<T> t = norm;
  if (walk.by_rows) {
    for_rows(walk, first, last,
             [&](int64_t unit, int64_t begin, int64_t n, int64_t c, int64_t at_sample)
                 ADADFQ_INLINE_LAMBDA {
                   const T* grad = t.grad + begin;
                   const T* x = t.x + begin;
                   const float mean = t.mean[c], slope = t.slope[at_sample],
                               shift = t.shift[at_sample], negative_slope = t.negative_slope;
                   const Two found = sum_of_row(n, [&](int64_t i) ADADFQ_INLINE_LAMBDA {
                     return products_at(grad, x, i, mean, slope, shift, negative_slope);
                   });
                   sums[2 * unit] = static_cast<double>(found.first);
                   sums[2 * unit + 1] = static_cast<double>(found.second);
                 });
    return;
  }
  for_tiles(walk, first, last,
            [&](int64_t unit, int64_t begin, int64_t rows, int64_t columns, int64_t sample)
                ADADFQ_INLINE_LAMBDA {
                  const float* ADADFQ_RESTRICT mean = t.mean;
                  const float* ADADFQ_RESTRICT slope = t.slope + sample * walk.columns;
                  const float* ADADFQ_RESTRICT shift = t.shift + sample * walk.columns;
                  const T* ADADFQ_RESTRICT grad = t.grad + begin;
                  const T* ADADFQ_RESTRICT x = t.x + begin;
                  float* ADADFQ_RESTRICT second = scratch + columns;
                  sums_of_columns(rows, columns, scratch, second,
                                  [&](int64_t r, int64_t i) ADADFQ_INLINE_LAMBDA {
                                    return products_at(grad + r * columns, x + r * columns, i, mean,
                                                       slope, shift, t.negative_slope);
                                  });
                  double* ADADFQ_RESTRICT to = sums + unit * walk.width();
                  for (int64_t i = 0; i < columns; ++i) to[i] += static_cast<double>(scratch[i]);
                  for (int64_t i = 0; i < columns; ++i) {
                    to[walk.columns + i] += static_cast<double>(second[i]);
                  }
                });
}

template <typename T, typename Params>
ADADFQ_INLINE void gradient(const T* ADADFQ_RESTRICT grad, const T* ADADFQ_RESTRICT x,
                            T* ADADFQ_RESTRICT out, int64_t n, Params mean, Params slope,
                            Params shift, Params offset, Params factor, float negative_slope) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const float d = to_float(x[i]) - at(mean, i);
    const float u = d * at(slope, i) + at(shift, i);
    const float g = leaky_relu_gradient(to_float(grad[i]), u, negative_slope);
    out[i] = from_float<T>(g * at(slope, i) + (at(offset, i) + at(factor, i) * d));
  }
}

// The gradient of a tile, as many columns at a time as there are lanes, whose parameters stay in
// registers.
template <typename T>
ADADFQ_INLINE void gradient_in_blocks(const Norm<T>& t, int64_t begin, int64_t rows,
                                      int64_t columns, const float* slope, const float* shift) {
  int64_t i = 0;
  for (; i + kLanes <= columns; i += kLanes) {
    float m[kLanes], s[kLanes], b[kLanes], o[kLanes], f[kLanes];
    for (int j = 0; j < kLanes; ++j) m[j] = t.mean[i + j];
    for (int j = 0; j < kLanes; ++j) s[j] = slope[i + j];
    for (int j = 0; j < kLanes; ++j) b[j] = shift[i + j];
    for (int j = 0; j < kLanes; ++j) o[j] = t.offset[i + j];
    for (int j = 0; j < kLanes; ++j) f[j] = t.factor[i + j];
    for (int64_t at = begin + i, r = 0; r < rows; ++r, at += columns) {
      const T* ADADFQ_RESTRICT grad = t.grad + at;
      const T* ADADFQ_RESTRICT x = t.x + at;
      T* ADADFQ_RESTRICT out = t.out + at;
#pragma omp simd
      for (int j = 0; j < kLanes; ++j) {
        const float d = to_float(x[j]) - m[j];
        const float u = d * s[j] + b[j];
        const float g = leaky_relu_gradient(to_float(grad[j]), u, t.negative_slope);
        out[j] = from_float<T>(g * s[j] + (o[j] + f[j] * d));
      }
    }
  }
  for (int64_t at = begin + i, r = 0; i < columns && r < rows; ++r, at += columns) {
    gradient(t.grad + at, t.x + at, t.out + at, columns - i, t.mean + i, slope + i, shift + i,
             t.offset + i, t.factor + i, t.negative_slope);
  }
}

template <typename T>
ADADFQ_INLINE void gradient_units(const SampleWalk& walk, const Norm<T>& norm, int64_t first,
                                  int64_t last) {
  const Norm<T> t = norm;
  if (walk.by_rows) {
    for_rows(
        walk, first, last,
        [&](int64_t, int64_t begin, int64_t n, int64_t c, int64_t at_sample) ADADFQ_INLINE_LAMBDA {
          gradient(t.grad + begin, t.x + begin, t.out + begin, n, t.mean[c], t.slope[at_sample],
                   t.shift[at_sample], t.offset[c], t.factor[c], t.negative_slope);
        });
    return;
  }
  // Whole rows are quicker to fetch from memory, and 16-bit ones convert for longer than they load.
  const bool in_blocks = sizeof(T) == 4 && walk.layout.elements() <= kCachedElements;
  for_tiles(walk, first, last,
            [&](int64_t, int64_t begin, int64_t rows, int64_t columns, int64_t sample)
                ADADFQ_INLINE_LAMBDA {
                  const float* slope = t.slope + sample * walk.columns;
                  const float* shift = t.shift + sample * walk.columns;
                  if (in_blocks) return gradient_in_blocks(t, begin, rows, columns, slope, shift);
                  for (int64_t r = 0; r < rows; ++r, begin += columns) {
                    gradient(t.grad + begin, t.x + begin, t.out + begin, columns, t.mean, slope,
                             shift, t.offset, t.factor, t.negative_slope);
                  }
                });
}

}  // namespace

#define ADADFQ_DEFINE(T)                                                                           \
  ADADFQ_CLONES void norm_act_units(const SampleWalk& walk, const Norm<T>& norm, int64_t first,    \
                                    int64_t last) {                                                \
    apply_units(walk, norm, first, last);                                                          \
  }                                                                                                \
  ADADFQ_CLONES void norm_act_sums(const SampleWalk& walk, const Norm<T>& norm, int64_t first,     \
                                   int64_t last, double* sums, float* scratch) {                   \
    sum_units(walk, norm, first, last, sums, scratch);                                             \
  }                                                                                                \
  ADADFQ_CLONES void norm_act_gradient(const SampleWalk& walk, const Norm<T>& norm, int64_t first, \
                                       int64_t last) {                                             \
    gradient_units(walk, norm, first, last);                                                       \
  }

ADADFQ_DEFINE(float)
ADADFQ_DEFINE(BFloat16)
ADADFQ_DEFINE(Float16)

#undef ADADFQ_DEFINE

namespace {

// Means and variances. Few channels side by side are slow to walk: elements of so many rows of them
// are taken for channels of their own, whose statistics are then put together.
void statistics(const void* x, double* mean, double* var, const Layout& layout, DType dtype,
                int threads) {
  const int64_t folds = rows_side_by_side(layout.channels);
  if (layout.inner > 1 || folds == 1 || layout.outer % folds || layout.outer == folds) {
    return channel_moments(x, mean, var, layout, dtype, threads);
  }
  const int64_t channels = layout.channels;
  std::vector<double> means(folds * channels), vars(folds * channels);
  channel_moments(x, means.data(), vars.data(), {layout.outer / folds, folds * channels, 1}, dtype,
                  threads);
  for (int64_t c = 0; c < channels; ++c) {
    double sum = 0, squares = 0;
    for (int64_t f = 0; f < folds; ++f) sum += means[f * channels + c];
    mean[c] = sum / static_cast<double>(folds);
    for (int64_t f = 0; f < folds; ++f) {
      const double d = means[f * channels + c] - mean[c];
      squares += vars[f * channels + c] + d * d;
    }
    var[c] = squares / static_cast<double>(folds);
  }
}

// The maps of every sample and column, and the rounded mean of every column.
struct Maps {
  Maps(const SampleWalk& walk, const BatchNormAct& norm, const double* batch_mean,
       const double* var)
      : mean(walk.columns),
        slope(walk.samples * walk.columns),
        shift(walk.samples * walk.columns),
        inverse(walk.layout.channels) {
    const int64_t channels = walk.layout.channels;
    for (int64_t c = 0; c < channels; ++c) inverse[c] = inverse_deviation(var[c], norm.eps);
    for (int64_t k = 0; k < walk.columns; ++k) {
      mean[k] = static_cast<float>(batch_mean[walk.channel_of[k]]);
    }
    for (int64_t s = 0; s < walk.samples; ++s) {
      for (int64_t k = 0; k < walk.columns; ++k) {
        const int64_t c = walk.channel_of[k], i = s * channels + c;
        const NormMap map = norm_map(batch_mean[c], inverse[c],
                                     norm.weight ? static_cast<double>(norm.weight[i]) : 1.0,
                                     norm.bias ? static_cast<double>(norm.bias[i]) : 0.0);
        slope[s * walk.columns + k] = map.slope;
        shift[s * walk.columns + k] = map.shift;
      }
    }
  }

  std::vector<float> mean, slope, shift;
  std::vector<double> inverse;  // of every channel's deviation
};

template <typename T>
Norm<T> norm_of(const Maps& maps, const void* x, const void* grad, void* out,
                const BatchNormAct& norm) {
  return {static_cast<const T*>(x),
          static_cast<const T*>(grad),
          static_cast<T*>(out),
          maps.mean.data(),
          maps.slope.data(),
          maps.shift.data(),
          nullptr,
          nullptr,
          norm.negative_slope};
}

// The sums of every unit.
template <typename T>
std::vector<double> unit_sums(const SampleWalk& walk, const Norm<T>& norm, int threads) {
  std::vector<double> sums(walk.units * walk.width());
  const int64_t parts =
      std::min<int64_t>(walk.units, useful_threads(walk.layout.elements(), threads));
  // Allocated here: an exception must not leave a parallel region. With room between the threads'.
  const int64_t stride = walk.width() + 64;
  std::vector<float> scratch(parts * stride);
  parallel_for(parts, static_cast<int>(parts), 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      norm_act_sums(walk, norm, part * walk.units / parts, (part + 1) * walk.units / parts,
                    sums.data(), scratch.data() + part * stride);
    }
  });
  return sums;
}

// Their totals, [samples, channels, 2].
std::vector<double> total_sums(const SampleWalk& walk, const std::vector<double>& sums) {
  const int64_t channels = walk.layout.channels;
  std::vector<double> totals(2 * walk.samples * channels);
  const double* from = sums.data();
  if (walk.by_rows) {
    for (int64_t line = 0; line < walk.layout.outer * channels; ++line) {
      double* to = &totals[2 * (line / channels / walk.outer * channels + line % channels)];
      for (int64_t piece = 0; piece < walk.parts; ++piece, from += 2) {
        to[0] += from[0];
        to[1] += from[1];
      }
    }
    return totals;
  }
  for (int64_t unit = 0; unit < walk.units; ++unit, from += walk.width()) {
    double* of_sample = &totals[2 * (unit / walk.parts) * channels];
    for (int64_t k = 0; k < walk.columns; ++k) {
      double* to = of_sample + 2 * walk.channel_of[k];
      to[0] += from[k];
      to[1] += from[walk.columns + k];
    }
  }
  return totals;
}

}  // namespace

void batch_norm_act(const void* x, const BatchNormAct& norm, void* y, double* mean, double* var,
                    const Layout& layout, DType dtype, int threads) {
  statistics(x, mean, var, layout, dtype, threads);
  const SampleWalk walk(layout, norm.samples);
  const Maps maps(walk, norm, mean, var);
  dispatch_dtype(dtype, [&](auto tag) {
    using T = decltype(tag);
    prefer_huge_pages(y, layout.elements() * sizeof(T));
    const Norm<T> task = norm_of<T>(maps, x, nullptr, y, norm);
    parallel_for(walk.units, useful_threads(layout.elements(), threads), 1,
                 [&](int64_t first, int64_t last) { norm_act_units(walk, task, first, last); });
  });
}

void batch_norm_act_backward(const void* grad_y, const void* x, const double* mean,
                             const double* var, const BatchNormAct& norm, void* grad_x,
                             float* grad_weight, float* grad_bias, const Layout& layout,
                             DType dtype, int threads) {
  const SampleWalk walk(layout, norm.samples);
  const Maps maps(walk, norm, mean, var);
  const int64_t channels = layout.channels;
  dispatch_dtype(dtype, [&](auto tag) {
    using T = decltype(tag);
    prefer_huge_pages(grad_x, layout.elements() * sizeof(T));
    Norm<T> task = norm_of<T>(maps, x, grad_y, grad_x, norm);
    const std::vector<double> totals = total_sums(walk, unit_sums(walk, task, threads));
    std::vector<NormSums> weighted(channels, NormSums{0.0, 0.0});
    for (int64_t i = 0; i < walk.samples * channels; ++i) {
      const int64_t c = i % channels;
      const NormSums sums = norm_sums(totals[2 * i], totals[2 * i + 1], mean[c], maps.inverse[c]);
      const double weight = norm.weight ? static_cast<double>(norm.weight[i]) : 1.0;
      weighted[c].g += weight * sums.g;
      weighted[c].g_hat += weight * sums.g_hat;
      if (grad_weight) grad_weight[i] = static_cast<float>(sums.g_hat);
      if (grad_bias) grad_bias[i] = static_cast<float>(sums.g);
    }
    const double count = static_cast<double>(layout.outer * layout.inner);
    std::vector<float> offset(walk.columns), factor(walk.columns);
    for (int64_t k = 0; k < walk.columns; ++k) {
      const int64_t c = walk.channel_of[k];
      const StatisticsGradient found =
          statistics_gradient(weighted[c], mean[c], maps.inverse[c], count);
      offset[k] = found.offset;
      factor[k] = found.factor;
    }
    task.offset = offset.data();
    task.factor = factor.data();
    parallel_for(walk.units, useful_threads(layout.elements(), threads), 1,
                 [&](int64_t first, int64_t last) { norm_act_gradient(walk, task, first, last); });
  });
}

}  // namespace adadfq
