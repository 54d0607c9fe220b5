// Fake quantisation over a dense tensor, per tensor (one channel) or per channel.
//
//   x_hat = (clamp(round(x / scale_c) + zero_point_c, 0, 2^bits - 1) - zero_point_c) * scale_c
//   grad  = grad where round(x / scale_c) + zero_point_c is in 0..2^bits - 1, else 0
//
// The arithmetic is csrc/common/quantizer.h, the same as on the CPU; build with --fmad=false.
// Bytes an element, float32: 8 forward, 12 backward; 16-bit types half of that. A thread handles 16
// bytes where the pointers are aligned to that, else one element.
//
// Test: python -m pytest -m gpu tests
// Build alone: nvcc -std=c++17 -O3 --fmad=false -c csrc/cuda/fake_quantize.cu -o fake_quantize.o
#include "fake_quantize.h"

#include <algorithm>

#include "../common/quantizer.h"

namespace adadfq {
namespace cuda {
namespace {

constexpr int kThreads = 256;

template <typename T, int kCount>
struct alignas(sizeof(T) * kCount) Pack {
  T values[kCount];
};

struct Arguments {
  const float* scale;
  const int32_t* zero_point;
  int64_t elements;
  int64_t channels;
  int64_t inner;
  int32_t qmax;

  __device__ int64_t channel(int64_t i) const {
    if (channels == 1) return 0;
    // A 32-bit division is several times cheaper; every thread takes the same branch.
    if (elements <= INT32_MAX) {
      return static_cast<uint32_t>(i) / static_cast<uint32_t>(inner) %
             static_cast<uint32_t>(channels);
    }
    return i / inner % channels;
  }
};

template <typename T>
__device__ T forward_value(T x, float scale, CodeBounds bounds) {
  return from_float<T>(fake_quantize_value(to_float(x), scale, bounds.lo, bounds.hi));
}

template <typename T>
__device__ T backward_value(T grad, T x, float scale, CodeBounds bounds) {
  return inside_range(to_float(x), scale, bounds.lo, bounds.hi) ? grad : T{};
}

// grad is null in the forward direction.
template <typename T, int kCount, bool kBackward>
__global__ void fake_quantize_kernel(const T* __restrict__ grad, const T* __restrict__ x,
                                     T* __restrict__ out, Arguments arguments) {
  using Values = Pack<T, kCount>;
  const int64_t packs = arguments.elements / kCount;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const bool one_channel = arguments.channels == 1 || arguments.inner % kCount == 0;

  for (int64_t pack = first; pack < packs; pack += step) {
    const Values in = reinterpret_cast<const Values*>(x)[pack];
    Values upstream{};
    if (kBackward) upstream = reinterpret_cast<const Values*>(grad)[pack];
    Values result;
    int64_t channel = arguments.channel(pack * kCount);
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      if (!one_channel) channel = arguments.channel(pack * kCount + j);
      const float scale = arguments.scale[channel];
      const CodeBounds bounds = code_bounds(arguments.zero_point[channel], arguments.qmax);
      result.values[j] = kBackward ? backward_value(upstream.values[j], in.values[j], scale, bounds)
                                   : forward_value(in.values[j], scale, bounds);
    }
    reinterpret_cast<Values*>(out)[pack] = result;
  }

  // Fewer than kCount elements are left.
  const int64_t i = packs * kCount + first;
  if (i < arguments.elements) {
    const int64_t channel = arguments.channel(i);
    const float scale = arguments.scale[channel];
    const CodeBounds bounds = code_bounds(arguments.zero_point[channel], arguments.qmax);
    out[i] = kBackward ? backward_value(grad[i], x[i], scale, bounds)
                       : forward_value(x[i], scale, bounds);
  }
}

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

template <typename T, bool kBackward>
cudaError_t launch(const void* grad, const void* x, void* out, const Arguments& arguments,
                   cudaStream_t stream) {
  constexpr int kCount = 16 / sizeof(T);
  const bool packed = aligned(grad) && aligned(x) && aligned(out);
  const int64_t items = packed ? (arguments.elements + kCount - 1) / kCount : arguments.elements;
  const int64_t blocks = std::min<int64_t>((items + kThreads - 1) / kThreads, INT32_MAX);
  const auto kernel =
      packed ? fake_quantize_kernel<T, kCount, kBackward> : fake_quantize_kernel<T, 1, kBackward>;
  kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(
      static_cast<const T*>(grad), static_cast<const T*>(x), static_cast<T*>(out), arguments);
  return cudaGetLastError();
}

template <bool kBackward>
cudaError_t run(const void* grad, const void* x, const float* scale, const int32_t* zero_point,
                void* out, const Layout& layout, int bits, DType dtype, cudaStream_t stream) {
  if (layout.elements() == 0) return cudaSuccess;
  const Arguments arguments{scale,           zero_point,   layout.elements(),
                            layout.channels, layout.inner, max_code(bits)};
  switch (dtype) {
    case DType::kFloat32:
      return launch<float, kBackward>(grad, x, out, arguments, stream);
    case DType::kBFloat16:
      return launch<BFloat16, kBackward>(grad, x, out, arguments, stream);
    case DType::kFloat16:
      return launch<Float16, kBackward>(grad, x, out, arguments, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t fake_quantize(const void* x, const float* scale, const int32_t* zero_point, void* out,
                          const Layout& layout, int bits, DType dtype, cudaStream_t stream) {
  return run<false>(nullptr, x, scale, zero_point, out, layout, bits, dtype, stream);
}

cudaError_t fake_quantize_backward(const void* grad, const void* x, const float* scale,
                                   const int32_t* zero_point, void* out, const Layout& layout,
                                   int bits, DType dtype, cudaStream_t stream) {
  return run<true>(grad, x, scale, zero_point, out, layout, bits, dtype, stream);
}

}  // namespace cuda
}  // namespace adadfq
