// Per-channel affine map, residual, activation and per-tensor fake quantisation in one pass.
//
//   u     = x scale_c + shift_c + residual
//   x_hat = fake_quantize(act(u))                     act: none, relu, relu6
//   du    = grad where act is not flat at u, else 0   (straight through the quantiser)
//   grad_x = du scale_c      grad_residual = du
//   grad_scale_c = sum du x  grad_shift_c = sum du
//
// Where the quantiser's step is learned (learned_fake_quantize.cpp), du is 0 beside where act(u) is
// outside the codes, and grad_act_scale = sum grad d x_hat / d act_scale over all elements.
//
// The backward computes u again instead of reading a mask. Sums are in float over a piece or a tile
// that fits the cache, in double beyond (channel_sums.h).
//
// Bytes an element, float32: 8 forward, 12 with a residual, 5 and 9 where codes are stored;
// backward 12 (grad, x, grad_x), 20 with a residual and its gradient. 16-bit types half of that.
//
// Test: python -m pytest tests/test_native_cpu.py -k affine
// Time: python -m benchmarks ops --ops affine_act_fake_quantize
#include "affine_act_fake_quantize.h"

#include <type_traits>
#include <vector>

#include "../common/activation.h"
#include "../common/quantizer.h"
#include "channel_sums.h"
#include "dispatch_dtype.h"
#include "huge_pages.h"
#include "target_clones.h"

namespace adadfq {
namespace {

// What follows the affine map: a clamp, and the quantiser's scale and code bounds.
struct Tail {
  ActBounds act;
  float scale, code_lo, code_hi;
};

Tail tail_of(Act act, const float* scale, const int32_t* zero_point, int bits) {
  const CodeBounds bounds =
      scale ? code_bounds(*zero_point, max_code(bits)) : CodeBounds{0.0f, 0.0f};
  return {act_bounds(static_cast<int>(act)), scale ? *scale : 1.0f, bounds.lo, bounds.hi};
}

// What is stored for act(u): x_hat, or its code as uint8_t, which cannot hold NaN.
template <bool kQuantise, typename Out>
ADADFQ_INLINE Out finish(float u, const Tail& t) {
  if constexpr (std::is_same_v<Out, uint8_t>) {
    const float code = round_half_even(clamp_keep_nan(u / t.scale, t.code_lo, t.code_hi));
    return static_cast<uint8_t>(static_cast<int32_t>(code == code ? code - t.code_lo : 0.0f));
  } else {
    if (kQuantise) u = fake_quantize_value(u, t.scale, t.code_lo, t.code_hi);
    return from_float<Out>(u);
  }
}

template <bool kResidual, bool kQuantise, typename T, typename Out, typename Params>
ADADFQ_INLINE void apply(const T* ADADFQ_RESTRICT x, const T* ADADFQ_RESTRICT residual,
                         Out* ADADFQ_RESTRICT out, int64_t n, Params scale, Params shift,
                         const Tail& tail) {
  const Tail t = tail;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    float u = to_float(x[i]) * at(scale, i) + at(shift, i);
    if (kResidual) u += to_float(residual[i]);
    out[i] = finish<kQuantise, Out>(activation(u, t.act), t);
  }
}

template <typename T, typename Out, typename Params>
ADADFQ_INLINE void apply_any(const T* x, const T* residual, Out* out, int64_t n, Params scale,
                             Params shift, const Tail& tail, bool quantise) {
  if (residual && quantise) {
    apply<true, true>(x, residual, out, n, scale, shift, tail);
  } else if (residual) {
    apply<true, false>(x, residual, out, n, scale, shift, tail);
  } else if (quantise) {
    apply<false, true>(x, residual, out, n, scale, shift, tail);
  } else {
    apply<false, false>(x, residual, out, n, scale, shift, tail);
  }
}

// The activation's bounds, and a learned quantiser's scale and code bounds.
struct LearnedTail {
  ActBounds act;
  float scale, lo, hi;
};

template <typename T>
struct Gradients {
  const T* grad;
  const T* x;
  const T* residual;
  T* grad_x;
  T* grad_residual;
  const float* scale;  // one a channel, or a column
  const float* shift;
  ActBounds flat;
  LearnedTail learned;
};

// du of element i, its share of grad_x written; with kLearned *term is what it gives the gradient
// of the quantiser's step.
template <bool kResidual, bool kWriteResidual, bool kLearned, typename T, typename Params>
ADADFQ_INLINE float gradient_at(const T* ADADFQ_RESTRICT grad, const T* ADADFQ_RESTRICT x,
                                const T* ADADFQ_RESTRICT residual, T* ADADFQ_RESTRICT grad_x,
                                T* ADADFQ_RESTRICT grad_residual, int64_t i, Params scale,
                                Params shift, ActBounds flat, const LearnedTail& learned,
                                float* ADADFQ_RESTRICT term) {
  float u = to_float(x[i]) * at(scale, i) + at(shift, i);
  if (kResidual) u += to_float(residual[i]);
  float passed = to_float(grad[i]);
  if (kLearned) {
    const LearnedStep step =
        learned_step(activation(u, learned.act), learned.scale, learned.lo, learned.hi);
    *term = passed * step.slope;
    passed = keep_if(step.inside, passed);
  }
  const float du = activation_gradient(passed, u, flat);
  grad_x[i] = from_float<T>(du * at(scale, i));
  if (kWriteResidual) grad_residual[i] = from_float<T>(du);
  return du;
}

template <bool kResidual, bool kWriteResidual, bool kSums, bool kLearned, typename T>
ADADFQ_INLINE void row_gradients(const Gradients<T>& g, int64_t begin, int64_t n, int64_t c,
                                 double* sum_x, double* sum, double* overall,
                                 float* ADADFQ_RESTRICT lanes) {
  const T* ADADFQ_RESTRICT grad = g.grad + begin;
  const T* ADADFQ_RESTRICT x = g.x + begin;
  const T* ADADFQ_RESTRICT residual = kResidual ? g.residual + begin : nullptr;
  T* ADADFQ_RESTRICT grad_x = g.grad_x + begin;
  T* ADADFQ_RESTRICT grad_residual = kWriteResidual ? g.grad_residual + begin : nullptr;
  const float scale = g.scale[c], shift = g.shift[c];
  const ActBounds flat = g.flat;
  const LearnedTail learned = g.learned;
  // In two steps: sums kept in lanes do not stay in registers beside all these pointers.
  float du[kPieceElements], terms[kLearned ? kPieceElements : 1];
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const float value = gradient_at<kResidual, kWriteResidual, kLearned>(
        grad, x, residual, grad_x, grad_residual, i, scale, shift, flat, learned,
        kLearned ? terms + i : nullptr);
    if (kSums) du[i] = value;
  }
  if (kLearned) *overall += static_cast<double>(sum_of_values(n, terms));
  if (!kSums) return;
  const auto value = [&](int64_t i)
                         ADADFQ_INLINE_LAMBDA { return Two{du[i] * to_float(x[i]), du[i]}; };
  if (lanes) return add_short_row(n, lanes, value);
  const Two found = sum_of_row(n, value);
  sum_x[c] += static_cast<double>(found.first);
  sum[c] += static_cast<double>(found.second);
}

// The same for `columns` columns side by side; scratch: 3 * columns values.
template <bool kResidual, bool kWriteResidual, bool kSums, bool kLearned, typename T>
ADADFQ_INLINE void tile_gradients(const Gradients<T>& g, int64_t begin, int64_t rows,
                                  int64_t columns, double* ADADFQ_RESTRICT sum_x,
                                  double* ADADFQ_RESTRICT sum, double* ADADFQ_RESTRICT overall,
                                  float* ADADFQ_RESTRICT scratch) {
  float* ADADFQ_RESTRICT first = scratch;
  float* ADADFQ_RESTRICT second = kSums ? scratch + columns : nullptr;
  float* ADADFQ_RESTRICT third = kLearned ? scratch + 2 * columns : nullptr;
  const float* ADADFQ_RESTRICT scale = g.scale;
  const float* ADADFQ_RESTRICT shift = g.shift;
  const ActBounds flat = g.flat;
  const LearnedTail learned = g.learned;
  for (int64_t i = 0; kSums && i < (kLearned ? 3 : 2) * columns; ++i) scratch[i] = 0;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t row = begin + r * columns;
    const T* ADADFQ_RESTRICT grad = g.grad + row;
    const T* ADADFQ_RESTRICT x = g.x + row;
    const T* ADADFQ_RESTRICT residual = kResidual ? g.residual + row : nullptr;
    T* ADADFQ_RESTRICT grad_x = g.grad_x + row;
    T* ADADFQ_RESTRICT grad_residual = kWriteResidual ? g.grad_residual + row : nullptr;
#pragma omp simd
    for (int64_t i = 0; i < columns; ++i) {
      float term = 0;
      const float du = gradient_at<kResidual, kWriteResidual, kLearned>(
          grad, x, residual, grad_x, grad_residual, i, scale, shift, flat, learned, &term);
      if (kSums) {
        first[i] += du * to_float(x[i]);
        second[i] += du;
      }
      if (kLearned) third[i] += term;
    }
  }
  for (int64_t i = 0; kSums && i < columns; ++i) {
    sum_x[i] += static_cast<double>(first[i]);
    sum[i] += static_cast<double>(second[i]);
  }
  if (kLearned) *overall += static_cast<double>(sum_of_values(columns, third));
}

template <bool kResidual, bool kWriteResidual, bool kSums, bool kLearned, typename T>
ADADFQ_INLINE void gradients(const ChannelWalk& walk, const Gradients<T>& g, int64_t first,
                             int64_t last, double* sum_x, double* sum, double* overall,
                             float* scratch) {
  if (!walk.by_rows) {
    walk_tiles(walk, first, last, [&](int64_t begin, int64_t rows) ADADFQ_INLINE_LAMBDA {
      tile_gradients<kResidual, kWriteResidual, kSums, kLearned>(g, begin, rows, walk.columns(),
                                                                 sum_x, sum, overall, scratch);
    });
    return;
  }
  const bool in_lanes = kSums && walk.short_rows;
  for (int64_t stop; first < last; first = stop) {
    stop = in_lanes ? std::min(last, first + walk.flush_units()) : last;
    for (int64_t i = 0; in_lanes && i < walk.scratch(); ++i) scratch[i] = 0;
    walk_rows(walk, first, stop, [&](int64_t begin, int64_t n, int64_t c) ADADFQ_INLINE_LAMBDA {
      float* lanes = in_lanes ? scratch + 2 * kShortLanes * c : nullptr;
      row_gradients<kResidual, kWriteResidual, kSums, kLearned>(g, begin, n, c, sum_x, sum, overall,
                                                                lanes);
    });
    for (int64_t c = 0; in_lanes && c < walk.layout.channels; ++c) {
      float* lanes = scratch + 2 * kShortLanes * c;
      sum_x[c] += static_cast<double>(sum_short_lanes(lanes));
      sum[c] += static_cast<double>(sum_short_lanes(lanes + kShortLanes));
    }
  }
}

template <bool kSums, bool kLearned, typename T>
ADADFQ_INLINE void gradients_any(const ChannelWalk& walk, const Gradients<T>& g, int64_t first,
                                 int64_t last, double* sum_x, double* sum, double* overall,
                                 float* scratch) {
  if (g.residual && g.grad_residual) {
    gradients<true, true, kSums, kLearned>(walk, g, first, last, sum_x, sum, overall, scratch);
  } else if (g.residual) {
    gradients<true, false, kSums, kLearned>(walk, g, first, last, sum_x, sum, overall, scratch);
  } else if (g.grad_residual) {
    gradients<false, true, kSums, kLearned>(walk, g, first, last, sum_x, sum, overall, scratch);
  } else {
    gradients<false, false, kSums, kLearned>(walk, g, first, last, sum_x, sum, overall, scratch);
  }
}

}  // namespace

#define ADADFQ_DEFINE_APPLY(T, Out)                                                             \
  ADADFQ_CLONES void apply_row(const T* x, const T* residual, Out* out, int64_t n, float scale, \
                               float shift, const Tail& tail, bool quantise) {                  \
    apply_any(x, residual, out, n, scale, shift, tail, quantise);                               \
  }                                                                                             \
  ADADFQ_CLONES void apply_pattern(const T* x, const T* residual, Out* out, int64_t n,          \
                                   const float* scale, const float* shift, const Tail& tail,    \
                                   bool quantise) {                                             \
    apply_any(x, residual, out, n, scale, shift, tail, quantise);                               \
  }

#define ADADFQ_DEFINE(T)                                                                      \
  ADADFQ_DEFINE_APPLY(T, T)                                                                   \
  ADADFQ_DEFINE_APPLY(T, uint8_t)                                                             \
  ADADFQ_CLONES void gradients_chunk(const ChannelWalk& walk, const Gradients<T>& g,          \
                                     int64_t first, int64_t last, double* sum_x, double* sum, \
                                     float* scratch) {                                        \
    gradients_any<true, false>(walk, g, first, last, sum_x, sum, nullptr, scratch);           \
  }                                                                                           \
  ADADFQ_CLONES void learned_gradients_chunk(const ChannelWalk& walk, const Gradients<T>& g,  \
                                             int64_t first, int64_t last, double* sum_x,      \
                                             double* sum, double* overall, float* scratch) {  \
    gradients_any<true, true>(walk, g, first, last, sum_x, sum, overall, scratch);            \
  }                                                                                           \
  ADADFQ_CLONES void gradients_without_sums(const ChannelWalk& walk, const Gradients<T>& g,   \
                                            int64_t first, int64_t last) {                    \
    gradients_any<false, false>(walk, g, first, last, nullptr, nullptr, nullptr, nullptr);    \
  }

ADADFQ_DEFINE(float)
ADADFQ_DEFINE(BFloat16)
ADADFQ_DEFINE(Float16)

#undef ADADFQ_DEFINE
#undef ADADFQ_DEFINE_APPLY

namespace {

template <typename T, typename Out>
void apply_all(const T* x, const float* scale, const float* shift, const T* residual,
               const Tail& tail, bool quantise, Out* out, const Layout& layout, int threads) {
  ChannelParams<2> params(0);
  params.each[0].assign(scale, scale + layout.channels);
  params.each[1].assign(shift, shift + layout.channels);
  prefer_huge_pages(out, layout.elements() * sizeof(Out));
  for_each_segment(
      layout, params, threads,
      [&](int64_t i, int64_t n, const auto& p) {
        apply_row(x + i, residual ? residual + i : nullptr, out + i, n, p[0], p[1], tail, quantise);
      },
      [&](int64_t i, int64_t n, const auto& p) {
        apply_pattern(x + i, residual ? residual + i : nullptr, out + i, n, p[0], p[1], tail,
                      quantise);
      });
}

}  // namespace

void affine_act_fake_quantize(const void* x, const float* scale, const float* shift,
                              const void* residual, Act act, const float* act_scale,
                              const int32_t* act_zero_point, int bits, void* out,
                              const Layout& layout, DType dtype, int threads) {
  const Tail tail = tail_of(act, act_scale, act_zero_point, bits);
  dispatch_dtype(dtype, [&](auto tag) {
    using T = decltype(tag);
    apply_all(static_cast<const T*>(x), scale, shift, static_cast<const T*>(residual), tail,
              act_scale != nullptr, static_cast<T*>(out), layout, threads);
  });
}

void affine_act_quantize(const void* x, const float* scale, const float* shift,
                         const void* residual, Act act, const float* act_scale,
                         const int32_t* act_zero_point, int bits, uint8_t* codes,
                         const Layout& layout, DType dtype, int threads) {
  const Tail tail = tail_of(act, act_scale, act_zero_point, bits);
  dispatch_dtype(dtype, [&](auto tag) {
    using T = decltype(tag);
    apply_all(static_cast<const T*>(x), scale, shift, static_cast<const T*>(residual), tail, true,
              codes, layout, threads);
  });
}

namespace {

template <typename T>
Gradients<T> pointers_of(const void* grad, const void* x, const void* residual, Act act,
                         void* grad_x, void* grad_residual, const std::vector<float>& scales,
                         const std::vector<float>& shifts, const Layout& layout) {
  prefer_huge_pages(grad_x, layout.elements() * sizeof(T));
  if (grad_residual) prefer_huge_pages(grad_residual, layout.elements() * sizeof(T));
  return {static_cast<const T*>(grad),
          static_cast<const T*>(x),
          static_cast<const T*>(residual),
          static_cast<T*>(grad_x),
          static_cast<T*>(grad_residual),
          scales.data(),
          shifts.data(),
          flat_bounds(static_cast<int>(act)),
          {}};
}

void store_sums(const std::vector<double>& sum_x, const std::vector<double>& sum, float* grad_scale,
                float* grad_shift) {
  for (size_t c = 0; c < sum.size(); ++c) {
    grad_scale[c] = static_cast<float>(sum_x[c]);
    grad_shift[c] = static_cast<float>(sum[c]);
  }
}

}  // namespace

void affine_act_fake_quantize_backward(const void* grad, const void* x, const float* scale,
                                       const float* shift, const void* residual, Act act,
                                       void* grad_x, void* grad_residual, float* grad_scale,
                                       float* grad_shift, const Layout& layout, DType dtype,
                                       int threads) {
  const ChannelWalk walk(layout);
  const std::vector<float> scales = spread(walk, scale), shifts = spread(walk, shift);
  dispatch_dtype(dtype, [&](auto tag) {
    using T = decltype(tag);
    const Gradients<T> g =
        pointers_of<T>(grad, x, residual, act, grad_x, grad_residual, scales, shifts, layout);
    if (!grad_scale) {
      parallel_for(
          walk.units, useful_threads(layout.elements(), threads), 1,
          [&](int64_t first, int64_t last) { gradients_without_sums(walk, g, first, last); });
      return;
    }
    std::vector<double> sum_x, sum;
    channel_sums(walk, threads, sum_x, sum,
                 [&](int64_t first, int64_t last, double* a, double* b, float* scratch) {
                   gradients_chunk(walk, g, first, last, a, b, scratch);
                 });
    store_sums(sum_x, sum, grad_scale, grad_shift);
  });
}

void affine_act_learned_fake_quantize_backward(const void* grad, const void* x, const float* scale,
                                               const float* shift, const void* residual, Act act,
                                               const float* act_scale,
                                               const int32_t* act_zero_point, int bits,
                                               void* grad_x, void* grad_residual, float* grad_scale,
                                               float* grad_shift, float* grad_act_scale,
                                               const Layout& layout, DType dtype, int threads) {
  const ChannelWalk walk(layout);
  const std::vector<float> scales = spread(walk, scale), shifts = spread(walk, shift);
  const CodeBounds codes = code_bounds(*act_zero_point, max_code(bits));
  dispatch_dtype(dtype, [&](auto tag) {
    using T = decltype(tag);
    Gradients<T> g =
        pointers_of<T>(grad, x, residual, act, grad_x, grad_residual, scales, shifts, layout);
    g.learned = {act_bounds(static_cast<int>(act)), *act_scale, codes.lo, codes.hi};
    std::vector<double> sum_x, sum;
    *grad_act_scale = static_cast<float>(channel_sums_and_overall(
        walk, threads, sum_x, sum,
        [&](int64_t first, int64_t last, double* a, double* b, double* overall, float* scratch) {
          learned_gradients_chunk(walk, g, first, last, a, b, overall, scratch);
        }));
    if (grad_scale) store_sums(sum_x, sum, grad_scale, grad_shift);
  });
}

}  // namespace adadfq
