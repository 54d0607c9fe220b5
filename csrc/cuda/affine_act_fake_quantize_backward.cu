// Backward of the per-channel affine map, residual, activation and fake quantisation.
//
//   u  = x scale_c + shift_c + residual
//   du = grad where act is not flat at u, else 0      (straight through the quantiser)
//   grad_x = du scale_c      grad_residual = du
//   grad_scale_c = sum du x  grad_shift_c = sum du
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

template <typename T>
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

  static constexpr int kPacks = 3;
  static constexpr bool kSums = true, kPivot = false, kExact = false, kOverall = false;

  struct Channel {
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

  struct Item {
    float du, x;
  };

  struct Sums {
    float du_x, du;
  };

  struct Known {};

  __device__ Channel channel(int64_t c) const { return {scale[c], shift[c]}; }

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
    return {activation_gradient(in.grad.value(j), u, flat), value};
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

  __device__ Item nothing(float) const { return {0.0f, 0.0f}; }

  __device__ void add(const Item& item, float, Sums& sums) const {
    sums.du_x += item.du * item.x;
    sums.du += item.du;
  }

  __device__ void join(Sums& into, const Sums& other) const {
    into.du_x += other.du_x;
    into.du += other.du;
  }

  __device__ bool run_totals(const Sums& sums, float, int, const Channel&, Totals& totals) const {
    totals = {static_cast<double>(sums.du_x), static_cast<double>(sums.du)};
    return true;
  }

  __device__ Known known(int64_t) const { return {}; }

  __device__ double finish(int64_t c, const Totals& totals, const Known&) const {
    grad_scale[c] = static_cast<float>(totals.first);
    grad_shift[c] = static_cast<float>(totals.second);
    return 0.0;
  }
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
    const Backward<T> op{static_cast<const T*>(grad),
                         static_cast<const T*>(x),
                         scale,
                         shift,
                         static_cast<const T*>(residual),
                         static_cast<T*>(grad_x),
                         static_cast<T*>(grad_residual),
                         grad_scale,
                         grad_shift,
                         flat_bounds(act),
                         reads_x};
    return channel_pass<T>(
        op, layout, common_phase<T>(grad, reads_x ? x : nullptr, residual, grad_x, grad_residual),
        grad_scale ? scratch : nullptr, stream);
  });
}

}  // namespace cuda
}  // namespace adadfq
