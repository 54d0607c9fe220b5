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
#include "elementwise.h"
#include "launch.h"
#include "pack.h"

namespace adadfq {
namespace cuda {
namespace {

constexpr int kMostBits = 8;
// Bytes of a block's groups; a multiple of 16 for every width.
constexpr int kTileBytes = kThreads * kMostBits;
// Blocks that a multiprocessor is to hold; with more the compiler spills.
constexpr int kBlocksEach = 4;

struct Arguments {
  const float* scale;
  const int32_t* zero_point;
  Positions positions;  // of elements
  int64_t bytes;
  int bits;
  bool is_aligned;         // whole groups can be accessed 16 bytes at a time
  bool bytes_are_aligned;  // so can tiles of bytes
};

// Four codes are at most 32 bits: half a group, at whose place shifts are those of one register.
struct Group {
  uint32_t halves[2];

  __device__ __forceinline__ Group(const uint32_t (&codes)[kGroup], int bits) {
    const uint32_t step = 1u << bits, mask = step - 1;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      halves[h] = codes[4 * h + 3] & mask;
#pragma unroll
      for (int j = 2; j >= 0; --j) halves[h] = halves[h] * step + (codes[4 * h + j] & mask);
    }
  }

  __device__ __forceinline__ Group(uint64_t stream, int bits)
      : halves{static_cast<uint32_t>(stream), static_cast<uint32_t>(stream >> 4 * bits)} {}

  __device__ __forceinline__ uint64_t stream(int bits) const {
    return halves[0] | uint64_t{halves[1]} << 4 * bits;
  }

  __device__ __forceinline__ uint32_t code(int i, int bits) const {
    return halves[i / 4] >> i % 4 * bits & ((1u << bits) - 1);
  }
};

// A group's bytes in shared memory are accessed by the widest words that they are whole ones of.
template <class Use>
__device__ __forceinline__ void with_word(int bits, Use use) {
  if (bits % 8 == 0)
    use(uint64_t{});
  else if (bits % 4 == 0)
    use(uint32_t{});
  else if (bits % 2 == 0)
    use(uint16_t{});
  else
    use(uint8_t{});
}

__device__ __forceinline__ void put_group(uint64_t group, int bits, uint8_t* bytes) {
  with_word(bits, [&](auto word) {
    using Word = decltype(word);
    constexpr int kSize = sizeof(Word);
#pragma unroll
    for (int i = 0; i < kMostBits; i += kSize)
      if (i < bits) *reinterpret_cast<Word*>(bytes + i) = static_cast<Word>(group >> 8 * i);
  });
}

__device__ __forceinline__ uint64_t get_group(const uint8_t* bytes, int bits) {
  uint64_t group = 0;
  with_word(bits, [&](auto word) {
    using Word = decltype(word);
    constexpr int kSize = sizeof(Word);
#pragma unroll
    for (int i = 0; i < kMostBits; i += kSize)
      if (i < bits) group |= uint64_t{*reinterpret_cast<const Word*>(bytes + i)} << 8 * i;
  });
  return group;
}

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

// Calls use(j, channel) for the elements of a group, which lies in one channel or in several.
template <class Use>
__device__ __forceinline__ void for_each_channel(const Positions& positions, Positions::Place place,
                                                 Use use) {
#pragma unroll
  for (int j = 0; j < kGroup; ++j) {
    use(j, place.channel);
    if (++place.within == positions.inner) {
      place.within = 0;
      if (++place.channel == positions.channels) place.channel = 0;
    }
  }
}

struct Quantizer {
  ChannelQuantizer by;
  int32_t zero_point;

  template <typename T>
  __device__ __forceinline__ uint32_t code(T value) const {
    const float steps = centred_code(to_float(value), by);
    return static_cast<uint32_t>(steps == steps ? static_cast<int32_t>(steps) + zero_point : 0);
  }
};

__device__ __forceinline__ Quantizer quantizer(const Arguments& a, int64_t channel) {
  const int32_t zero_point = a.zero_point[channel];
  return {channel_quantizer(a.scale[channel], zero_point, max_code(a.bits), kToCodes), zero_point};
}

struct Dequantizer {
  float scale;
  float lo;
};

__device__ __forceinline__ Dequantizer dequantizer(const Arguments& a, int64_t channel) {
  return {a.scale[channel], code_bounds(a.zero_point[channel], 0).lo};
}

template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocksEach)
    quantize_pack_kernel(const T* x, uint8_t* packed, const Arguments a) {
  alignas(kPackBytes) __shared__ uint8_t tile[kTileBytes];
  const int64_t elements = a.positions.elements, groups = (elements + kGroup - 1) / kGroup;
  Quantizer known{};
  int64_t known_channel = -1;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads; first < groups;
       first += static_cast<int64_t>(gridDim.x) * kThreads) {
    const int64_t begin = (first + threadIdx.x) * kGroup;
    if (begin < elements) {
      const int count = static_cast<int>(min(int64_t{kGroup}, elements - begin));
      T values[kGroup];
      load_group_values(x + begin, count, a.is_aligned, values);
      const Positions::Place place = a.positions.place(begin, a.positions.inner);
      uint32_t codes[kGroup];
      if (place.within + kGroup <= a.positions.inner && count == kGroup) {
        if (place.channel != known_channel) {
          known = quantizer(a, place.channel);
          known_channel = place.channel;
        }
#pragma unroll
        for (int j = 0; j < kGroup; ++j) codes[j] = known.code(values[j]);
      } else {
        for_each_channel(a.positions, place, [&](int j, int64_t channel) {
          codes[j] = j < count ? quantizer(a, channel).code(values[j]) : 0;
        });
      }
      put_group(Group(codes, a.bits).stream(a.bits), a.bits, tile + threadIdx.x * a.bits);
    }
    __syncthreads();
    const int64_t base = first * a.bits;
    const int bytes = static_cast<int>(min(int64_t{kThreads} * a.bits, a.bytes - base));
    copy_bytes(tile, packed + base, bytes, a.bytes_are_aligned);
    __syncthreads();
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocksEach)
    unpack_dequantize_kernel(const uint8_t* packed, T* out, const Arguments a) {
  alignas(kPackBytes) __shared__ uint8_t tile[kTileBytes];
  const int64_t elements = a.positions.elements, groups = (elements + kGroup - 1) / kGroup;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads; first < groups;
       first += static_cast<int64_t>(gridDim.x) * kThreads) {
    const int64_t base = first * a.bits;
    const int bytes = static_cast<int>(min(int64_t{kThreads} * a.bits, a.bytes - base));
    copy_bytes(packed + base, tile, bytes, a.bytes_are_aligned);
    __syncthreads();
    const int64_t begin = (first + threadIdx.x) * kGroup;
    if (begin < elements) {
      const int count = static_cast<int>(min(int64_t{kGroup}, elements - begin));
      // Bytes behind those of the stream hold no code that is stored.
      const Group group(get_group(tile + threadIdx.x * a.bits, a.bits), a.bits);
      const Positions::Place place = a.positions.place(begin, a.positions.inner);
      T values[kGroup];
      const auto value = [&](int j, const Dequantizer& by) {
        values[j] = from_float<T>(value_from_code(group.code(j, a.bits), by.scale, by.lo));
      };
      if (place.within + kGroup <= a.positions.inner) {
        const Dequantizer by = dequantizer(a, place.channel);
#pragma unroll
        for (int j = 0; j < kGroup; ++j) value(j, by);
      } else {
        for_each_channel(a.positions, place,
                         [&](int j, int64_t channel) { value(j, dequantizer(a, channel)); });
      }
      store_group_values(values, out + begin, count, a.is_aligned);
    }
    __syncthreads();
  }
}

Arguments arguments(const float* scale, const int32_t* zero_point, const void* x,
                    const uint8_t* packed, const Layout& layout, int bits) {
  const int64_t elements = layout.elements();
  // One channel is one row.
  const int64_t inner = layout.channels == 1 ? elements : layout.inner;
  Positions positions{elements, layout.channels, inner, FastDivide(), FastDivide(), false};
  if (elements <= kLast32Bits) {
    positions.by_inner = FastDivide(static_cast<uint32_t>(inner));
    positions.by_channels = FastDivide(static_cast<uint32_t>(layout.channels));
    positions.fits_32_bits = true;
  }
  return {scale, zero_point, positions,      packed_bytes(elements, bits),
          bits,  aligned(x), aligned(packed)};
}

dim3 grid(const Arguments& a) {
  const int64_t groups = (a.positions.elements + kGroup - 1) / kGroup;
  const int64_t blocks = (groups + kThreads - 1) / kThreads;
  return dim3(static_cast<unsigned>(persistent_blocks(blocks, kBlocksEach)));
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
