// k-bit codes (k = 2..8) packed into bytes, and back; the format is csrc/common/packing.h.
//
//   code  = clamp(round(x / scale_c) + zero_point_c, 0, 2^k - 1), 0 for NaN
//   x_hat = (code - zero_point_c) * scale_c
//
// A thread has a group of 8 elements, which is k bytes; a block passes the bytes of its groups
// through shared memory, so that they are stored and loaded 16 at a time. Build with --fmad=false.
// Bytes an element: 4 + k / 8 in float32, 2 + k / 8 in 16-bit types.
//
// Test: ADADFQ_TEST_EMULATED_CUDA=1 python -m pytest tests/test_cuda_kernels.py -k pack
//
// On a GPU: python -m pytest -m gpu tests
//
// Alone: nvcc -std=c++17 -O3 --fmad=false -c csrc/cuda/packing.cu
#include "packing.h"

#include "../common/division.h"
#include "../common/packing.h"
#include "dispatch_dtype.h"
#include "launch.h"
#include "pack.h"

namespace adadfq {
namespace cuda {
namespace {

constexpr int kMostBits = 8;
// Bytes of a block's groups; a multiple of 16 for every width.
constexpr int kTileBytes = kThreads * kMostBits;

struct Arguments {
  const float* scale;
  const int32_t* zero_point;
  int64_t elements;
  int64_t channels;
  int64_t inner;
  int64_t bytes;
  int bits;
  bool is_aligned;         // whole groups can be accessed 16 bytes at a time
  bool bytes_are_aligned;  // so can tiles of bytes
};

// The channel of one element after the other.
class ChannelOf {
 public:
  __device__ ChannelOf(const Arguments& a, int64_t i) : a_(a) {
    if (a.channels == 1) return;
    if (a.elements <= kLast32Bits) {
      const uint32_t n = static_cast<uint32_t>(i), inner = static_cast<uint32_t>(a.inner);
      channel_ = n / inner % static_cast<uint32_t>(a.channels);
      within_ = n % inner;
    } else {
      channel_ = i / a.inner % a.channels;
      within_ = i % a.inner;
    }
  }

  __device__ int64_t channel() const { return channel_; }

  // Whether the next element has another channel.
  __device__ bool advance() {
    if (a_.channels == 1 || ++within_ < a_.inner) return false;
    within_ = 0;
    if (++channel_ == a_.channels) channel_ = 0;
    return true;
  }

 private:
  const Arguments& a_;
  int64_t channel_ = 0, within_ = 0;
};

// Between shared memory and the stream, bytes [0, count) of a tile.
template <typename From, typename To>
__device__ void copy_bytes(const From* from, To* to, int count, bool is_aligned) {
  const int words = is_aligned ? count / kPackBytes : 0;
  for (int i = threadIdx.x; i < words; i += kThreads)
    store(to + i * kPackBytes, load<kPackBytes>(from + i * kPackBytes));
  for (int i = words * kPackBytes + threadIdx.x; i < count; i += kThreads) to[i] = from[i];
}

template <typename T>
__device__ void load_group_values(const T* x, int count, bool is_aligned, T (&values)[kGroup]) {
  constexpr int n = kPackOf<T>;
  if (is_aligned && count == kGroup) {
#pragma unroll
    for (int j = 0; j < kGroup; j += n) {
      const Pack<T, n> pack = load<n>(x + j);
#pragma unroll
      for (int k = 0; k < n; ++k) values[j + k] = pack.values[k];
    }
  } else {
#pragma unroll
    for (int j = 0; j < kGroup; ++j) values[j] = j < count ? x[j] : T{};
  }
}

template <typename T>
__device__ void store_group_values(const T (&values)[kGroup], T* out, int count, bool is_aligned) {
  constexpr int n = kPackOf<T>;
  if (is_aligned && count == kGroup) {
#pragma unroll
    for (int j = 0; j < kGroup; j += n) {
      Pack<T, n> pack;
#pragma unroll
      for (int k = 0; k < n; ++k) pack.values[k] = values[j + k];
      store(out + j, pack);
    }
  } else {
#pragma unroll
    for (int j = 0; j < kGroup; ++j)
      if (j < count) out[j] = values[j];
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    quantize_pack_kernel(const T* x, uint8_t* packed, const Arguments a) {
  alignas(kPackBytes) __shared__ uint8_t tile[kTileBytes];
  const int64_t groups = (a.elements + kGroup - 1) / kGroup;
  const int32_t qmax = max_code(a.bits);
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads; first < groups;
       first += static_cast<int64_t>(gridDim.x) * kThreads) {
    const int64_t begin = (first + threadIdx.x) * kGroup;
    if (begin < a.elements) {
      const int count = static_cast<int>(min(int64_t{kGroup}, a.elements - begin));
      T values[kGroup];
      load_group_values(x + begin, count, a.is_aligned, values);
      ChannelOf channel(a, begin);
      ChannelQuantizer quantizer = channel_quantizer(
          a.scale[channel.channel()], a.zero_point[channel.channel()], qmax, kToCodes);
      int32_t zero_point = a.zero_point[channel.channel()];
      uint64_t group = 0;
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
        const float steps = centred_code(to_float(values[j]), quantizer);
        const int32_t code = steps == steps ? static_cast<int32_t>(steps) + zero_point : 0;
        if (j < count) group |= place_code(static_cast<uint32_t>(code), j, a.bits);
        if (channel.advance()) {
          zero_point = a.zero_point[channel.channel()];
          quantizer = channel_quantizer(a.scale[channel.channel()], zero_point, qmax, kToCodes);
        }
      }
      store_group(group, a.bits, tile + threadIdx.x * a.bits);
    }
    __syncthreads();
    const int64_t base = first * a.bits;
    const int bytes = static_cast<int>(min(int64_t{kThreads} * a.bits, a.bytes - base));
    copy_bytes(tile, packed + base, bytes, a.bytes_are_aligned);
    __syncthreads();
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    unpack_dequantize_kernel(const uint8_t* packed, T* out, const Arguments a) {
  alignas(kPackBytes) __shared__ uint8_t tile[kTileBytes];
  const int64_t groups = (a.elements + kGroup - 1) / kGroup;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads; first < groups;
       first += static_cast<int64_t>(gridDim.x) * kThreads) {
    const int64_t base = first * a.bits;
    const int bytes = static_cast<int>(min(int64_t{kThreads} * a.bits, a.bytes - base));
    copy_bytes(packed + base, tile, bytes, a.bytes_are_aligned);
    __syncthreads();
    const int64_t begin = (first + threadIdx.x) * kGroup;
    if (begin < a.elements) {
      const int count = static_cast<int>(min(int64_t{kGroup}, a.elements - begin));
      const int here = min(a.bits, bytes - static_cast<int>(threadIdx.x) * a.bits);
      const uint64_t group = load_group(tile + threadIdx.x * a.bits, here);
      ChannelOf channel(a, begin);
      float scale = a.scale[channel.channel()];
      float lo = code_bounds(a.zero_point[channel.channel()], 0).lo;
      T values[kGroup];
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
        values[j] = from_float<T>(value_from_code(code_at(group, j, a.bits), scale, lo));
        if (channel.advance()) {
          scale = a.scale[channel.channel()];
          lo = code_bounds(a.zero_point[channel.channel()], 0).lo;
        }
      }
      store_group_values(values, out + begin, count, a.is_aligned);
    }
    __syncthreads();
  }
}

Arguments arguments(const float* scale, const int32_t* zero_point, const void* x,
                    const uint8_t* packed, const Layout& layout, int bits) {
  const int64_t elements = layout.elements();
  return {scale,          zero_point,
          elements,       layout.channels,
          layout.inner,   packed_bytes(elements, bits),
          bits,           aligned(x),
          aligned(packed)};
}

dim3 grid(const Arguments& a) {
  const int64_t groups = (a.elements + kGroup - 1) / kGroup;
  return dim3(static_cast<unsigned>(persistent_blocks((groups + kThreads - 1) / kThreads, 8)));
}

}  // namespace

cudaError_t quantize_pack(const void* x, const float* scale, const int32_t* zero_point,
                          uint8_t* packed, const Layout& layout, int bits, DType dtype,
                          cudaStream_t stream) {
  if (layout.elements() == 0) return cudaSuccess;
  const Arguments a = arguments(scale, zero_point, x, packed, layout, bits);
  return dispatch_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    return launch(quantize_pack_kernel<T>, grid(a), dim3(kThreads), stream,
                  static_cast<const T*>(x), packed, a);
  });
}

cudaError_t unpack_dequantize(const uint8_t* packed, const float* scale, const int32_t* zero_point,
                              void* out, const Layout& layout, int bits, DType dtype,
                              cudaStream_t stream) {
  if (layout.elements() == 0) return cudaSuccess;
  const Arguments a = arguments(scale, zero_point, out, packed, layout, bits);
  return dispatch_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    return launch(unpack_dequantize_kernel<T>, grid(a), dim3(kThreads), stream, packed,
                  static_cast<T*>(out), a);
  });
}

}  // namespace cuda
}  // namespace adadfq
