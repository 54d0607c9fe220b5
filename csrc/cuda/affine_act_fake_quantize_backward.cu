// Backward of the per-channel affine map, residual, activation and fake quantisation.
//
//   u  = x scale_c + shift_c + residual
//   du = grad where act is not flat at u, else 0      (straight through the quantiser)
//   grad_x = du scale_c      grad_residual = du
//   grad_scale_c = sum du x  grad_shift_c = sum du
//
// Where the quantiser's step is learned, with q = act(u) / act_scale and k = round(q):
//
//   du             = grad where act is not flat at u and k is a code, else 0
//   grad_act_scale = sum grad (k - q where k is a code, else the code that it is clipped to)
//
// u is computed again instead of reading a mask; without an activation and without sums only grad
// is read. Sums are in float over at most 64 elements, eight such lanes joined, in double beyond.
//
// One launch. Build with --fmad=false. Bytes an element, float32: 12 (grad, x, grad_x), 20 with a
// residual and its gradient; 16-bit types half of that.
//
// Test: ADADFQ_TEST_EMULATED_CUDA=1 python -m pytest tests/test_cuda_kernels.py -k affine
//
// On a GPU: python -m pytest -m gpu tests
//
// Time: python -m benchmarks ops --device cuda --suite gpu --ops affine_act_fake_quantize
//
// Alone: nvcc -std=c++17 -O3 --fmad=false -c csrc/cuda/affine_act_fake_quantize_backward.cu
#include "../common/activation.h"
#include "affine_act_fake_quantize.h"
#include "channel_sums.h"
#include "dispatch_dtype.h"

namespace adadfq {
namespace cuda {
namespace {

// What a quantiser with a learned step adds; nothing.
template <bool kLearned>
struct Step {
  struct Channel {};
  struct Item {};
  struct Sums {};
};

template <>
struct Step<true> {
  const float* scale;
  const int32_t* zero_point;
  int32_t qmax;
  ActBounds act;
  double* block_sums;
  float* grad_scale;

  struct Channel {
    ChannelQuantizer quantizer;
    CodeBounds codes;
  };
  struct Item {
    float term;
  };
  struct Sums {
    float term;
  };
};

template <typename T, bool kLearned>
struct Backward {
  const T* grad;
  const T* x;
  const float* scale;
  const float* shift;
  const T* residual;  // null: none, or it does not matter
  T* grad_x;
  T* grad_residual;   // null: not wanted
  float* grad_scale;  // null: not wanted, as grad_shift
  float* grad_shift;
  ActBounds flat;
  bool reads_x;
  Step<kLearned> step;

  static constexpr int kPacks = 3;
  static constexpr bool kSums = true, kPivot = false, kExact = false, kOverall = false,
                        kTensorSum = kLearned;

  struct Channel : Step<kLearned>::Channel {
    float scale, shift;
  };

  template <int n>
  struct In {
    Loaded<T, n> grad, x, residual;
  };
  template <int n>
  struct Out {
    Pack<T, n> grad_x, grad_residual;
  };

  struct Item : Step<kLearned>::Item {
    float du, x;
  };

  struct Sums : Step<kLearned>::Sums {
    float du_x, du;
  };

  struct Known {};

  __device__ Channel channel(int64_t c) const {
    Channel found;
    found.scale = scale[c];
    found.shift = shift[c];
    if constexpr (kLearned) {
      const int32_t zero_point = *step.zero_point;
      found.quantizer = channel_quantizer(*step.scale, zero_point, step.qmax, kToNeighbours);
      found.codes = code_bounds(zero_point, step.qmax);
    }
    return found;
  }

  template <int n>
  __device__ In<n> load(int64_t i) const {
    using Pack = Loaded<T, n>;
    return {Pack::from(grad + i), reads_x ? Pack::from(x + i) : Pack{},
            residual ? Pack::from(residual + i) : Pack{}};
  }

  template <int n>
  __device__ Item item(const In<n>& in, int j, const Channel& channel) const {
    const float value = in.x.value(j);
    float u = affine(value, channel.scale, channel.shift);
    if (residual) u += in.residual.value(j);
    float passed = in.grad.value(j);
    Item item;
    if constexpr (kLearned) {
      const LearnedStep found =
          learned_step(activation(u, step.act), channel.quantizer, channel.codes);
      item.term = passed * found.slope;
      passed = keep_if(found.inside, passed);
    }
    item.du = activation_gradient(passed, u, flat);
    item.x = value;
    return item;
  }

  __device__ bool stores() const { return true; }

  template <int n>
  __device__ void put(const Item& item, const Channel& channel, int j, Out<n>& out) const {
    out.grad_x.values[j] = from_float<T>(item.du * channel.scale);
    out.grad_residual.values[j] = from_float<T>(item.du);
  }

  template <int n>
  __device__ void store(int64_t i, const Out<n>& out) const {
    cuda::store(grad_x + i, out.grad_x);
    if (grad_residual) cuda::store(grad_residual + i, out.grad_residual);
  }

  template <int n>
  __device__ void store_one(int64_t i, int j, const Out<n>& out) const {
    grad_x[i] = out.grad_x.values[j];
    if (grad_residual) grad_residual[i] = out.grad_residual.values[j];
  }

  __device__ float value(const Item& item) const { return item.du; }

  __device__ Item nothing(float) const { return Item{}; }

  __device__ void add(const Item& item, float, Sums& sums) const {
    sums.du_x += item.du * item.x;
    sums.du += item.du;
    if constexpr (kLearned) sums.term += item.term;
  }

  __device__ void join(Sums& into, const Sums& other) const {
    into.du_x += other.du_x;
    into.du += other.du;
    if constexpr (kLearned) into.term += other.term;
  }

  __device__ bool run_totals(const Sums& sums, float, int, const Channel&, Totals& totals) const {
    totals = {static_cast<double>(sums.du_x), static_cast<double>(sums.du)};
    return true;
  }

  __device__ Known known(int64_t) const { return {}; }

  __device__ double finish(int64_t c, const Totals& totals, const Known&) const {
    if (kLearned && !grad_scale) return 0.0;
    grad_scale[c] = static_cast<float>(totals.first);
    grad_shift[c] = static_cast<float>(totals.second);
    return 0.0;
  }

  __device__ double tensor_sum(const Sums& sums) const { return static_cast<double>(sums.term); }
  __device__ double* block_sums() const { return step.block_sums; }
  __device__ void end_tensor(double sum) const { *step.grad_scale = static_cast<float>(sum); }
};

}  // namespace

cudaError_t affine_act_fake_quantize_backward(const void* grad, const void* x, const float* scale,
                                              const float* shift, const void* residual, int act,
                                              void* grad_x, void* grad_residual, float* grad_scale,
                                              float* grad_shift, double* scratch,
                                              const Layout& layout, DType dtype,
                                              cudaStream_t stream) {
  if (act == 0) residual = nullptr;  // u does not matter
  const bool reads_x = act != 0 || grad_scale != nullptr;
  return dispatch_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    const Backward<T, false> op{static_cast<const T*>(grad),
                                static_cast<const T*>(x),
                                scale,
                                shift,
                                static_cast<const T*>(residual),
                                static_cast<T*>(grad_x),
                                static_cast<T*>(grad_residual),
                                grad_scale,
                                grad_shift,
                                flat_bounds(act),
                                reads_x,
                                {}};
    return channel_pass<T>(
        op, layout, common_phase<T>(grad, reads_x ? x : nullptr, residual, grad_x, grad_residual),
        grad_scale ? scratch : nullptr, stream);
  });
}

cudaError_t affine_act_learned_fake_quantize_backward(
    const void* grad, const void* x, const float* scale, const float* shift, const void* residual,
    int act, const float* act_scale, const int32_t* act_zero_point, int bits, void* grad_x,
    void* grad_residual, float* grad_scale, float* grad_shift, float* grad_act_scale,
    double* scratch, double* block_sums, const Layout& layout, DType dtype, cudaStream_t stream) {
  return dispatch_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    const Backward<T, true> op{
        static_cast<const T*>(grad),
        static_cast<const T*>(x),
        scale,
        shift,
        static_cast<const T*>(residual),
        static_cast<T*>(grad_x),
        static_cast<T*>(grad_residual),
        grad_scale,
        grad_shift,
        flat_bounds(act),
        true,
        {act_scale, act_zero_point, max_code(bits), act_bounds(act), block_sums, grad_act_scale}};
    return channel_pass<T>(op, layout, common_phase<T>(grad, x, residual, grad_x, grad_residual),
                           scratch, stream);
  });
}

}  // namespace cuda
}  // namespace adadfq
