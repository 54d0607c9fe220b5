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
// A thread sums d = x - pivot and d^2 in float over runs of some hundred elements, about the mean
// of the run's first ones: an outlier that moves the pivot is part of the run's variance too, so
// rounding weighs little whatever the data. From there on sums are about the channel's first
// element, in double, whose digits outlast even one that is far from the mean. A run that is not
// finite in float (NaN, infinities, large squares) is read again in double.
//
// One launch. Build with --fmad=false. Bytes an element, float32: 4 for the statistics, 8 with y;
// backward 8, 12 with dL/dy; 16-bit types half of that.
//
// Test: ADADFQ_TEST_EMULATED_CUDA=1 python -m pytest tests/test_cuda_kernels.py -k bn_match
//
// On a GPU: python -m pytest -m gpu tests
//
// Time: python -m benchmarks ops --device cuda --suite gpu --ops bn_match,bn_match_forward
//
// Alone: nvcc -std=c++17 -O3 --fmad=false -c csrc/cuda/bn_match.cu
#include "bn_match.h"

#include "../common/batch_norm.h"
#include "channel_sums.h"
#include "dispatch_dtype.h"

namespace adadfq {
namespace cuda {
namespace {

__device__ __forceinline__ float slope_of(const BatchNorm& norm, int64_t c) {
  return batch_norm_slope(norm.running_var[c], norm.weight ? norm.weight[c] : 1.0f, norm.eps);
}

template <typename T>
struct Match {
  const T* x;
  BatchNorm norm;
  T* y;  // null: not wanted
  float* loss;
  double* mean;
  double* var;
  int64_t inner;
  double inverse_count;
  double inverse_channels;

  static constexpr int kPacks = 1;
  static constexpr bool kSums = true, kPivot = true, kExact = true, kOverall = true,
                        kTensorSum = false;

  struct alignas(16) Channel {
    float running_mean, slope, bias;  // for y
    float origin;
  };

  template <int n>
  using In = Loaded<T, n>;
  template <int n>
  using Out = Pack<T, n>;
  using Item = float;

  struct Sums {
    float sum, squares;
  };

  struct Known {
    float running_mean, running_var, origin;
  };

  __device__ float origin(int64_t c) const { return finite_or_zero(to_float(x[c * inner])); }

  __device__ Channel channel(int64_t c) const {
    if (!y) return {0.0f, 0.0f, 0.0f, origin(c)};
    return {norm.running_mean[c], slope_of(norm, c), norm.bias ? norm.bias[c] : -0.0f, origin(c)};
  }

  template <int n>
  __device__ In<n> load(int64_t i) const {
    return In<n>::from(x + i);
  }

  template <int n>
  __device__ float item(const In<n>& in, int j, const Channel&) const {
    return in.value(j);
  }

  __device__ bool stores() const { return y != nullptr; }

  template <int n>
  __device__ void put(float value, const Channel& channel, int j, Out<n>& out) const {
    out.values[j] =
        from_float<T>(batch_norm(value, channel.running_mean, channel.slope, channel.bias));
  }

  template <int n>
  __device__ void store(int64_t i, const Out<n>& out) const {
    cuda::store(y + i, out);
  }

  template <int n>
  __device__ void store_one(int64_t i, int j, const Out<n>& out) const {
    y[i] = out.values[j];
  }

  __device__ float value(float item) const { return item; }

  __device__ float nothing(float pivot) const { return pivot; }

  __device__ void add(float item, float pivot, Sums& sums) const {
    const float d = item - pivot;
    sums.sum += d;
    sums.squares = fmaf(d, d, sums.squares);
  }

  __device__ void join(Sums& into, const Sums& other) const {
    into.sum += other.sum;
    into.squares += other.squares;
  }

  __device__ bool run_totals(const Sums& sums, float pivot, int count, const Channel& channel,
                             Totals& totals) const {
    const float largest = 3.40282347e+38f;
    if (!(sums.squares <= largest)) return false;  // an infinite sum has such squares
    const SumsAbout moved = moved_sums(sums.sum, sums.squares, count, pivot, channel.origin);
    totals = {moved.sum, moved.squares};
    return true;
  }

  __device__ Totals exact_totals(float item, const Channel& channel) const {
    const double d = static_cast<double>(item) - static_cast<double>(channel.origin);
    return {d, d * d};
  }

  __device__ Known known(int64_t c) const {
    return {norm.running_mean[c], norm.running_var[c], origin(c)};
  }

  __device__ double finish(int64_t c, const Totals& totals, const Known& known) const {
    const Moments found = moments({totals.first, totals.second}, known.origin, inverse_count);
    mean[c] = found.mean;
    var[c] = found.var;
    return moments_distance(found, known.running_mean, known.running_var);
  }

  __device__ void end(double sum) const { *loss = static_cast<float>(sum * inverse_channels); }
};

template <typename T>
struct MatchBackward {
  const T* grad_y;  // null: none
  const float* grad_loss;
  const T* x;
  const double* mean;
  const double* var;
  BatchNorm norm;
  T* out;
  double each;  // 2 / (C n)

  static constexpr int kPacks = 2;
  static constexpr bool kSums = false;

  struct Channel {
    MatchGradient matched;
    float slope;  // of y
  };

  template <int n>
  struct In {
    Loaded<T, n> x, grad_y;
  };
  template <int n>
  using Out = Pack<T, n>;
  using Item = float;

  __device__ Channel channel(int64_t c) const {
    const double factor = static_cast<double>(*grad_loss) * each;
    return {match_gradient({mean[c], var[c]}, norm.running_mean[c], norm.running_var[c], factor),
            grad_y ? slope_of(norm, c) : 0.0f};
  }

  template <int n>
  __device__ In<n> load(int64_t i) const {
    using Pack = Loaded<T, n>;
    return {Pack::from(x + i), grad_y ? Pack::from(grad_y + i) : Pack{}};
  }

  template <int n>
  __device__ float item(const In<n>& in, int j, const Channel& channel) const {
    const float matched = match_gradient_at(in.x.value(j), channel.matched);
    return grad_y ? in.grad_y.value(j) * channel.slope + matched : matched;
  }

  __device__ bool stores() const { return true; }

  template <int n>
  __device__ void put(float value, const Channel&, int j, Out<n>& to) const {
    to.values[j] = from_float<T>(value);
  }

  template <int n>
  __device__ void store(int64_t i, const Out<n>& from) const {
    cuda::store(out + i, from);
  }

  template <int n>
  __device__ void store_one(int64_t i, int j, const Out<n>& from) const {
    out[i] = from.values[j];
  }

  struct Sums {};
};

}  // namespace

cudaError_t bn_match(const void* x, const BatchNorm& norm, void* y, float* loss, double* mean,
                     double* var, double* scratch, const Layout& layout, DType dtype,
                     cudaStream_t stream) {
  return dispatch_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    const Match<T> op{static_cast<const T*>(x),
                      norm,
                      static_cast<T*>(y),
                      loss,
                      mean,
                      var,
                      layout.inner,
                      1.0 / static_cast<double>(layout.outer * layout.inner),
                      1.0 / static_cast<double>(layout.channels)};
    return channel_pass<T>(op, layout, common_phase<T>(x, y), scratch, stream);
  });
}

cudaError_t bn_match_backward(const void* grad_y, const float* grad_loss, const void* x,
                              const double* mean, const double* var, const BatchNorm& norm,
                              void* out, const Layout& layout, DType dtype, cudaStream_t stream) {
  return dispatch_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    const MatchBackward<T> op{static_cast<const T*>(grad_y),
                              grad_loss,
                              static_cast<const T*>(x),
                              mean,
                              var,
                              norm,
                              static_cast<T*>(out),
                              2.0 / static_cast<double>(layout.elements())};
    return channel_pass<T>(op, layout, common_phase<T>(grad_y, x, out), nullptr, stream);
  });
}

}  // namespace cuda
}  // namespace adadfq
