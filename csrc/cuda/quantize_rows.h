// Fake quantisation of rows of memory over their own ranges, many tensors a launch; see
// dynamic_fake_quantize.cu.
#ifndef ADADFQ_CUDA_QUANTIZE_ROWS_H_
#define ADADFQ_CUDA_QUANTIZE_ROWS_H_

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "../common/division.h"
#include "../common/dynamic_tensor.h"
#include "launch.h"
#include "pack.h"
#include "partials.h"
#include "reduce_ends.h"

namespace adadfq {
namespace cuda {

// More are several tensors: a launch has fewer blocks than 2^31.
constexpr int64_t kMostRows = std::clamp<int64_t>(kLast32Bits, 64, 1 << 30);

// `count` rows of `length` elements, one after the other, and the threads that share a row.
struct RowTensor {
  const void* x;
  void* out;
  float* scale;
  int32_t* zero_point;
  uint32_t count;
  uint32_t length : 17;
  uint32_t bits : 4;
  uint32_t log_threads : 4;
  uint32_t by_packs : 1;  // 16 bytes at a time

  uint32_t threads() const { return 1u << log_threads; }
  uint32_t rows_of_block() const { return kThreads / threads(); }
  uint32_t blocks() const { return (count + rows_of_block() - 1) / rows_of_block(); }
};

// Packs (or elements, where rows are not whole packs) of a row that a thread keeps in registers.
template <int n>
constexpr uint32_t kHeld = n == 1 ? 16 : 8;

// Sets how `rows` are read. Threads of a row: one for every four packs, but neighbours, so that
// they use all of what the memory delivers. Beyond a warp, where a barrier is to pay for, as few as
// keep the row in registers, up to a block.
template <typename T>
void plan(RowTensor& rows) {
  rows.by_packs = aligned(rows.x, rows.out) && rows.length % kPackOf<T> == 0;
  const uint32_t units = rows.by_packs ? rows.length / kPackOf<T> : rows.length;
  const uint32_t held = rows.by_packs ? kHeld<kPackOf<T>> : kHeld<1>;
  uint32_t threads = 1;
  while (threads < 4 && threads < units) threads *= 2;
  while (threads < kWarp && 4 * threads < units) threads *= 2;
  while (threads < kThreads && held * threads < units) threads *= 2;
  rows.log_threads = 0;
  while (rows.threads() < threads) ++rows.log_threads;
}

// Tensors of a launch: what the 4 KB of a kernel's parameters hold, or fewer, which are passed
// faster. Tensor i has the blocks from first[i] on.
template <int kTensors, class Rows = RowTensor>
struct Table {
  uint32_t first[kTensors];
  Rows tensors[kTensors];
};

// Where there is no tensor.
constexpr uint32_t kNoBlock = UINT32_MAX;

// The tensor that `block` belongs to.
template <int kTensors, class Rows>
__device__ __forceinline__ int tensor_of(const Table<kTensors, Rows>& table, uint32_t block) {
  int found = 0;
#pragma unroll
  for (int step = 64; step > 0; step /= 2)
    if (found + step < kTensors && table.first[found + step] <= block) found += step;
  return found;
}

// Keeps the compiler from holding 16-bit elements as the floats they have been converted to, twice
// the registers.
template <typename T, int n>
__device__ __forceinline__ void hold_as_loaded(Pack<T, n>& pack) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof pack == kPackBytes) {
    uint4 bits;
    memcpy(&bits, &pack, sizeof bits);
    asm volatile("" : "+r"(bits.x), "+r"(bits.y), "+r"(bits.z), "+r"(bits.w));
    memcpy(&pack, &bits, sizeof bits);
  }
#endif
}

// A number that the compiler computes with anew: it would hold every offset from the loads for the
// stores.
__device__ __forceinline__ uint32_t forget(uint32_t value) {
#if defined(__CUDA_ARCH__)
  asm volatile("" : "+r"(value));
#endif
  return value;
}

// The quantiser over the range of a row, of which `held` is here.
template <typename T, int n>
__device__ __forceinline__ QParams find_params(const T* x, Pack<T, n> (&held)[kHeld<n>],
                                               uint32_t units, uint32_t thread, uint32_t threads,
                                               int bits) {
  constexpr uint32_t kLoads = 2;  // beside what is held
  Ends ends = zero_ends();
#pragma unroll
  for (uint32_t u = 0; u < kHeld<n>; ++u) {
    widen(ends, held[u]);
    hold_as_loaded(held[u]);
  }
  for (uint32_t rest = thread + kHeld<n> * threads; rest < units; rest += kLoads * threads) {
    Pack<T, n> in[kLoads];
#pragma unroll
    for (uint32_t u = 0; u < kLoads; ++u) {
      in[u] = Pack<T, n>{};
      if (rest + u * threads < units) in[u] = load<n>(x + (rest + u * threads) * n);
    }
#pragma unroll
    for (uint32_t u = 0; u < kLoads; ++u) widen(ends, in[u]);
  }
  ends = threads <= kWarp ? warp_ends(ends, static_cast<int>(threads)) : block_ends(ends, threads);
  return qparams_from_range(ends.lo, ends.hi, bits);
}

// One row of `units` packs of n elements by `threads` threads, this one being `thread` of them; no
// units where there is no row. All threads of the block come here. given: scale and zero point are
// read rather than found.
template <typename T, int n, bool given>
__device__ __forceinline__ void quantize_row(const T* x, T* out, float* scale, int32_t* zero_point,
                                             uint32_t units, uint32_t thread, uint32_t threads,
                                             int bits) {
  constexpr uint32_t kLoads = 2;  // beside what is held
  Pack<T, n> held[kHeld<n>];
#pragma unroll
  for (uint32_t u = 0; u < kHeld<n>; ++u) {
    const uint32_t unit = thread + u * threads;
    held[u] = Pack<T, n>{};  // the range holds 0 in any case
    if (unit < units) held[u] = load<n>(x + unit * n);
  }
  QParams params{1.0f, 0};
  if constexpr (given) {
    if (units > 0) params = {*scale, *zero_point};
  } else {
    params = find_params<T, n>(x, held, units, thread, threads, bits);
    if (units > 0 && thread == 0) {
      *scale = params.scale;
      *zero_point = params.zero_point;
    }
  }

  thread = forget(thread);
  const ChannelQuantizer quantizer =
      channel_quantizer(params.scale, params.zero_point, max_code(bits), kToCodes);
  const auto write = [&](uint32_t unit, const Pack<T, n>& in) {
    float values[n];
#pragma unroll
    for (int j = 0; j < n; ++j) values[j] = fake_quantize_value(to_float(in.values[j]), quantizer);
    store(out + unit * n, to_pack<T>(values));
  };
#pragma unroll
  for (uint32_t u = 0; u < kHeld<n>; ++u)
    if (thread + u * threads < units) write(thread + u * threads, held[u]);
  for (uint32_t rest = thread + kHeld<n> * threads; rest < units; rest += kLoads * threads) {
    Pack<T, n> in[kLoads];
#pragma unroll
    for (uint32_t u = 0; u < kLoads; ++u)
      if (rest + u * threads < units) in[u] = load<n>(x + (rest + u * threads) * n);
#pragma unroll
    for (uint32_t u = 0; u < kLoads; ++u)
      if (rest + u * threads < units) write(rest + u * threads, in[u]);
  }
}

template <typename T, int kTensors, bool given>
__global__ void __launch_bounds__(kThreads, given ? 2 : 4)
    quantize_rows_kernel(const __grid_constant__ Table<kTensors> table) {
  const int tensor = tensor_of(table, blockIdx.x);
  const RowTensor& rows = table.tensors[tensor];
  const uint32_t log_threads = rows.log_threads, threads = 1u << log_threads;
  const uint32_t row =
      (blockIdx.x - table.first[tensor]) * (kThreads >> log_threads) + (threadIdx.x >> log_threads);
  const uint32_t thread = threadIdx.x & (threads - 1);
  const uint32_t length = row < rows.count ? rows.length : 0;
  const int64_t begin = static_cast<int64_t>(row) * rows.length;
  const T* x = static_cast<const T*>(rows.x) + begin;
  T* out = static_cast<T*>(rows.out) + begin;
  float* scale = rows.scale + row;
  int32_t* zero_point = rows.zero_point + row;
  if (rows.by_packs) {
    constexpr int n = kPackOf<T>;
    quantize_row<T, n, given>(x, out, scale, zero_point, length / n, thread, threads, rows.bits);
  } else {
    quantize_row<T, 1, given>(x, out, scale, zero_point, length, thread, threads, rows.bits);
  }
}

// Gathers tensors and launches them; given: with the scales and zero points that they have.
template <typename T, bool given = false>
class RowsQueue {
 public:
  explicit RowsQueue(cudaStream_t stream) : stream_(stream) {}

  // A tensor of layout.outer == 1 and layout.inner <= kLongestRow.
  cudaError_t add(const DynamicTensor& tensor) {
    RowTensor rows{};
    rows.x = tensor.x;
    rows.out = tensor.out;
    rows.scale = tensor.scale;
    rows.zero_point = tensor.zero_point;
    rows.length = static_cast<uint32_t>(tensor.layout.inner);
    rows.bits = static_cast<uint32_t>(tensor.bits);
    plan<T>(rows);
    int64_t count = tensor.layout.channels;
    const int64_t elements = kMostRows * rows.length;
    for (; count > 0; count -= kMostRows) {
      rows.count = static_cast<uint32_t>(std::min(count, kMostRows));
      if (tensors_ == kTensors || blocks_ + int64_t{rows.blocks()} > INT32_MAX)
        if (const cudaError_t error = flush(); error != cudaSuccess) return error;
      table_.first[tensors_] = static_cast<uint32_t>(blocks_);
      table_.tensors[tensors_++] = rows;
      blocks_ += rows.blocks();
      rows.x = static_cast<const T*>(rows.x) + elements;
      rows.out = static_cast<T*>(rows.out) + elements;
      rows.scale += kMostRows;
      rows.zero_point += kMostRows;
    }
    return cudaSuccess;
  }

  // Launches what was added and has not been.
  cudaError_t flush() {
    if (tensors_ == 0) return cudaSuccess;
    const cudaError_t error = tensors_ <= kFew ? launch_first<kFew>() : launch_first<kTensors>();
    tensors_ = 0;
    blocks_ = 0;
    return error;
  }

 private:
  static constexpr int kFew = 4, kTensors = 90;
  static_assert(sizeof(Table<kTensors>) <= 4096, "a kernel's parameters");

  template <int kSize>
  cudaError_t launch_first() {
    Table<kSize> table;
    for (int i = 0; i < kSize; ++i) {
      table.first[i] = i < tensors_ ? table_.first[i] : kNoBlock;
      table.tensors[i] = table_.tensors[std::min(i, tensors_ - 1)];
    }
    return launch(quantize_rows_kernel<T, kSize, given>, dim3(static_cast<unsigned>(blocks_)),
                  dim3(kThreads), stream_, table);
  }

  cudaStream_t stream_;
  Table<kTensors> table_;
  int tensors_ = 0;
  int64_t blocks_ = 0;
};

}  // namespace cuda
}  // namespace adadfq

#endif  // ADADFQ_CUDA_QUANTIZE_ROWS_H_
