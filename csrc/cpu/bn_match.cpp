// Batch statistics against running statistics, per channel of n elements, C channels.
//
//   mean_c = sum x / n        var_c = sum (x - mean_c)^2 / n
//   loss   = sum_c (mean_c - running_mean_c)^2 / C + sum_c (var_c - running_var_c)^2 / C
//   dloss/dx = g 2 / (C n) [(mean_c - running_mean_c) + 2 (var_c - running_var_c) (x - mean_c)]
//
// The tensor is cut into pieces that fit the cache. Of each piece the sum s_i and then the centred
// second moment m_i = sum (x - s_i / n_i)^2 are taken, in double; the pieces of a channel combine
// to
//   sum (x - mean)^2 = sum_i m_i + n_i (s_i / n_i - mean)^2,
// which cancels nothing however large the mean. Pieces, lanes and the order of combination depend
// on the tensor's size only, so the result is the same bit for bit whatever the number of threads.
//
// Bytes an element, float32: 4 forward (the second look at a piece comes from the cache), 8
// backward.
//
// Test: python -m pytest tests/test_native_cpu.py -k bn_match
// Time: python -m timeit -s "import torch, adadfq.ops; x = torch.randn(16, 64, 56, 56); m =
// torch.zeros(64);
//       v = torch.ones(64)" "torch.ops.adadfq.bn_match(x, m, v)"
#include "bn_match.h"

#include <algorithm>
#include <vector>

#include "dispatch_dtype.h"
#include "huge_pages.h"
#include "target_clones.h"

namespace adadfq {
namespace {

constexpr int64_t kPieceElements = 4096;   // of a row: 16 KiB as float32, half an L1 cache
constexpr int64_t kBlockElements = 65536;  // of columns: 256 KiB as float32, within an L2 cache
constexpr int kLanes = 16;

ADADFQ_INLINE double combine_lanes(const double* lanes) {
  double half[kLanes / 2];
  for (int j = 0; j < kLanes / 2; ++j) half[j] = lanes[j] + lanes[j + kLanes / 2];
  double total = 0;
  for (int j = 0; j < kLanes / 2; ++j) total += half[j];
  return total;
}

ADADFQ_INLINE double sum_of(const float* ADADFQ_RESTRICT x, int64_t n) {
  double lanes[kLanes] = {0};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int j = 0; j < kLanes; ++j) lanes[j] += static_cast<double>(x[i + j]);
  }
  for (int j = 0; i + j < n; ++j) lanes[j] += static_cast<double>(x[i + j]);
  return combine_lanes(lanes);
}

ADADFQ_INLINE double centred_squares_of(const float* ADADFQ_RESTRICT x, int64_t n, double mean) {
  double lanes[kLanes] = {0};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int j = 0; j < kLanes; ++j) {
      const double d = static_cast<double>(x[i + j]) - mean;
      lanes[j] += d * d;
    }
  }
  for (int j = 0; i + j < n; ++j) {
    const double d = static_cast<double>(x[i + j]) - mean;
    lanes[j] += d * d;
  }
  return combine_lanes(lanes);
}

ADADFQ_INLINE const float* as_floats(const float* x, int64_t, float*) { return x; }

template <typename T>
ADADFQ_INLINE const float* as_floats(const T* ADADFQ_RESTRICT x, int64_t n,
                                     float* ADADFQ_RESTRICT buffer) {
  for (int64_t i = 0; i < n; ++i) buffer[i] = to_float(x[i]);
  return buffer;
}

template <typename T>
ADADFQ_INLINE void piece(const T* x, int64_t n, double* sum, double* squares) {
  float buffer[kPieceElements];
  const float* values = as_floats(x, n, buffer);
  *sum = sum_of(values, n);
  *squares = centred_squares_of(values, n, *sum / static_cast<double>(n));
}

// The same for `columns` columns side by side, `rows` long; mean is scratch.
template <typename T>
ADADFQ_INLINE void columns_piece(const T* ADADFQ_RESTRICT x, int64_t rows, int64_t columns,
                                 double* ADADFQ_RESTRICT sum, double* ADADFQ_RESTRICT squares,
                                 double* ADADFQ_RESTRICT mean) {
  for (int64_t i = 0; i < columns; ++i) sum[i] = squares[i] = 0;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < columns; ++i) {
      sum[i] += static_cast<double>(to_float(x[r * columns + i]));
    }
  }
  for (int64_t i = 0; i < columns; ++i) mean[i] = sum[i] / static_cast<double>(rows);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < columns; ++i) {
      const double d = static_cast<double>(to_float(x[r * columns + i])) - mean[i];
      squares[i] += d * d;
    }
  }
}

template <typename T, typename Params>
ADADFQ_INLINE void gradient(const T* ADADFQ_RESTRICT x, T* ADADFQ_RESTRICT out, int64_t n,
                            Params shift, Params slope, Params mean) {
  for (int64_t i = 0; i < n; ++i) {
    out[i] = from_float<T>(at(shift, i) + at(slope, i) * (to_float(x[i]) - at(mean, i)));
  }
}

}  // namespace

#define ADADFQ_DEFINE(T)                                                                    \
  ADADFQ_CLONES void moments(const T* x, int64_t n, double* sum, double* squares) {         \
    piece(x, n, sum, squares);                                                              \
  }                                                                                         \
  ADADFQ_CLONES void column_moments(const T* x, int64_t rows, int64_t columns, double* sum, \
                                    double* squares, double* mean) {                        \
    columns_piece(x, rows, columns, sum, squares, mean);                                    \
  }                                                                                         \
  ADADFQ_CLONES void gradient_row(const T* x, T* out, int64_t n, float shift, float slope,  \
                                  float mean) {                                             \
    gradient(x, out, n, shift, slope, mean);                                                \
  }                                                                                         \
  ADADFQ_CLONES void gradient_pattern(const T* x, T* out, int64_t n, const float* shift,    \
                                      const float* slope, const float* mean) {              \
    gradient(x, out, n, shift, slope, mean);                                                \
  }

ADADFQ_DEFINE(float)
ADADFQ_DEFINE(BFloat16)
ADADFQ_DEFINE(Float16)

#undef ADADFQ_DEFINE

namespace {

// Moments of the pieces of all channels, in order [outer, channels, inner].
struct Pieces {
  Pieces(int64_t outer_pieces, int64_t channels, int64_t inner_pieces)
      : outer(outer_pieces),
        inner(inner_pieces),
        sum(outer * channels * inner),
        squares(outer * channels * inner) {}

  int64_t outer, inner;
  std::vector<double> sum, squares;
};

int64_t piece_length(int64_t index, int64_t piece, int64_t total) {
  return std::min(piece, total - index * piece);
}

// Mean and biased variance of channel c; length(o, k) is the number of elements of piece (o, c, k).
template <typename Length>
void combine(const Pieces& pieces, int64_t c, int64_t channels, int64_t n, const Length& length,
             double* mean, double* var) {
  double sum = 0, squares = 0;
  for (int64_t o = 0; o < pieces.outer; ++o) {
    for (int64_t k = 0; k < pieces.inner; ++k) {
      sum += pieces.sum[(o * channels + c) * pieces.inner + k];
    }
  }
  *mean = sum / static_cast<double>(n);
  for (int64_t o = 0; o < pieces.outer; ++o) {
    for (int64_t k = 0; k < pieces.inner; ++k) {
      const int64_t i = (o * channels + c) * pieces.inner + k;
      const double count = static_cast<double>(length(o, k));
      const double offset = pieces.sum[i] / count - *mean;
      squares += pieces.squares[i] + count * offset * offset;
    }
  }
  *var = squares / static_cast<double>(n);
}

template <typename T>
void statistics_by_rows(const T* x, const Layout& layout, int threads, double* mean, double* var) {
  const int64_t inner_pieces = (layout.inner + kPieceElements - 1) / kPieceElements;
  Pieces pieces(layout.outer, layout.channels, inner_pieces);
  const auto length = [&](int64_t, int64_t k) {
    return piece_length(k, kPieceElements, layout.inner);
  };
  parallel_for(pieces.sum.size(), threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / inner_pieces, k = i % inner_pieces;
      moments(x + row * layout.inner + k * kPieceElements, length(0, k), &pieces.sum[i],
              &pieces.squares[i]);
    }
  });
  for (int64_t c = 0; c < layout.channels; ++c) {
    combine(pieces, c, layout.channels, layout.outer * layout.inner, length, mean + c, var + c);
  }
}

template <typename T>
void statistics_by_columns(const T* x, const Layout& layout, int threads, double* mean,
                           double* var) {
  const int64_t columns = layout.channels * layout.inner;
  const int64_t rows = std::max<int64_t>(16, kBlockElements / columns);
  const int64_t blocks = (layout.outer + rows - 1) / rows;
  Pieces pieces(blocks, layout.channels, layout.inner);
  std::vector<double> scratch(blocks * columns);
  const auto length = [&](int64_t o, int64_t) { return piece_length(o, rows, layout.outer); };
  parallel_for(blocks, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      column_moments(x + b * rows * columns, length(b, 0), columns, &pieces.sum[b * columns],
                     &pieces.squares[b * columns], &scratch[b * columns]);
    }
  });
  for (int64_t c = 0; c < layout.channels; ++c) {
    combine(pieces, c, layout.channels, layout.outer * layout.inner, length, mean + c, var + c);
  }
}

}  // namespace

void bn_match(const void* x, const float* running_mean, const float* running_var, float* loss,
              float* mean, float* var, const Layout& layout, DType dtype, int threads) {
  std::vector<double> means(layout.channels), vars(layout.channels);
  threads = useful_threads(layout.elements(), threads);
  dispatch_dtype(dtype, [&](auto tag) {
    const auto* values = static_cast<const decltype(tag)*>(x);
    if (layout.outer == 1 || layout.inner >= kRowElements) {
      statistics_by_rows(values, layout, threads, means.data(), vars.data());
    } else {
      statistics_by_columns(values, layout, threads, means.data(), vars.data());
    }
  });
  double mean_error = 0, var_error = 0;
  for (int64_t c = 0; c < layout.channels; ++c) {
    const double dm = means[c] - static_cast<double>(running_mean[c]);
    const double dv = vars[c] - static_cast<double>(running_var[c]);
    mean_error += dm * dm;
    var_error += dv * dv;
    mean[c] = static_cast<float>(means[c]);
    var[c] = static_cast<float>(vars[c]);
  }
  *loss = static_cast<float>((mean_error + var_error) / static_cast<double>(layout.channels));
}

void bn_match_backward(const float* grad_loss, const void* x, const float* mean, const float* var,
                       const float* running_mean, const float* running_var, void* out,
                       const Layout& layout, DType dtype, int threads) {
  // In float, in the reference's order of operations.
  const float factor =
      *grad_loss * static_cast<float>(2.0 / static_cast<double>(layout.elements()));
  ChannelParams params(layout.channels);
  for (int64_t c = 0; c < layout.channels; ++c) {
    params.a[c] = factor * (mean[c] - running_mean[c]);
    params.b[c] = factor * 2.0f * (var[c] - running_var[c]);
    params.c[c] = mean[c];
  }
  dispatch_dtype(dtype, [&](auto tag) {
    using T = decltype(tag);
    const T* from = static_cast<const T*>(x);
    T* to = static_cast<T*>(out);
    prefer_huge_pages(out, layout.elements() * sizeof(T));
    for_each_segment(
        layout, params, threads,
        [=](int64_t i, int64_t n, float shift, float slope, float m) {
          gradient_row(from + i, to + i, n, shift, slope, m);
        },
        [=](int64_t i, int64_t n, const float* shift, const float* slope, const float* m) {
          gradient_pattern(from + i, to + i, n, shift, slope, m);
        });
  });
}

}  // namespace adadfq
