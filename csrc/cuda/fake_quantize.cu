// Fake quantisation over a dense tensor, per tensor (one channel) or per channel.
//
//   x_hat = (clamp(round(x / scale_c) + zero_point_c, 0, 2^bits - 1) - zero_point_c) * scale_c
//   grad  = grad where round(x / scale_c) + zero_point_c is in 0..2^bits - 1, else 0
//
// The arithmetic is csrc/common/division.h; build with --fmad=false.
// Bytes an element, float32: 8 forward, 12 backward; 16-bit types half of that.
//
// Test: ADADFQ_TEST_EMULATED_CUDA=1 python -m pytest tests/test_cuda_kernels.py -k fake_quantize
//
// On a GPU: python -m pytest -m gpu tests
//
// Time: python -m benchmarks ops --device cuda --suite gpu --ops fake_quantize
//
// Alone: nvcc -std=c++17 -O3 --fmad=false -c csrc/cuda/fake_quantize.cu
#include "fake_quantize.h"

#include "../common/division.h"
#include "dispatch_dtype.h"
#include "elementwise.h"

namespace adadfq {
namespace cuda {
namespace {

template <typename T>
struct Forward {
  const T* x;
  const float* scale;
  const int32_t* zero_point;
  T* out;
  int32_t qmax;

  using Parameters = QParams;
  using Channel = ChannelQuantizer;

  __device__ Parameters parameters(int64_t c) const { return {scale[c], zero_point[c]}; }

  __device__ Channel channel(const Parameters& from) const {
    return channel_quantizer(from.scale, from.zero_point, qmax, kToCodes);
  }

  template <int n>
  using In = Pack<T, n>;

  template <int n>
  struct Out {
    float values[n];
  };

  template <int n>
  __device__ In<n> load(int64_t i) const {
    return cuda::load<n>(x + i);
  }

  template <int n>
  __device__ void apply(const In<n>& in, int j, const Channel& channel, Out<n>& out) const {
    out.values[j] = fake_quantize_value(to_float(in.values[j]), channel);
  }

  template <int n>
  __device__ void store(int64_t i, const Out<n>& values) const {
    store_global(out + i, to_pack<T>(values.values));
  }
};

template <typename T>
struct Backward {
  const T* grad;
  const T* x;
  const float* scale;
  const int32_t* zero_point;
  T* out;
  int32_t qmax;

  using Parameters = QParams;

  struct Channel {
    ChannelQuantizer quantizer;
    CodeBounds codes;
  };

  __device__ Parameters parameters(int64_t c) const { return {scale[c], zero_point[c]}; }

  __device__ Channel channel(const Parameters& from) const {
    return {channel_quantizer(from.scale, from.zero_point, qmax, kToNeighbours),
            code_bounds(from.zero_point, qmax)};
  }

  template <int n>
  struct In {
    Pack<T, n> grad, x;
  };

  template <int n>
  using Out = Pack<T, n>;

  template <int n>
  __device__ In<n> load(int64_t i) const {
    return {cuda::load<n>(grad + i), cuda::load<n>(x + i)};
  }

  template <int n>
  __device__ void apply(const In<n>& in, int j, const Channel& channel, Out<n>& out) const {
    const bool inside = inside_range(to_float(in.x.values[j]), channel.quantizer, channel.codes);
    out.values[j] = inside ? in.grad.values[j] : T{};
  }

  template <int n>
  __device__ void store(int64_t i, const Out<n>& values) const {
    store_global(out + i, values);
  }
};

}  // namespace

cudaError_t fake_quantize(const void* x, const float* scale, const int32_t* zero_point, void* out,
                          const Layout& layout, int bits, DType dtype, cudaStream_t stream) {
  return dispatch_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    const Forward<T> op{static_cast<const T*>(x), scale, zero_point, static_cast<T*>(out),
                        max_code(bits)};
    return elementwise<kPackOf<T>>(op, layout, pack_phase<kPackOf<T>>(op.x, op.out), stream);
  });
}

cudaError_t fake_quantize_backward(const void* grad, const void* x, const float* scale,
                                   const int32_t* zero_point, void* out, const Layout& layout,
                                   int bits, DType dtype, cudaStream_t stream) {
  return dispatch_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    const Backward<T> op{static_cast<const T*>(grad),
                         static_cast<const T*>(x),
                         scale,
                         zero_point,
                         static_cast<T*>(out),
                         max_code(bits)};
    return elementwise<kPackOf<T>>(op, layout, pack_phase<kPackOf<T>>(op.grad, op.x, op.out),
                                   stream);
  });
}

}  // namespace cuda
}  // namespace adadfq
