// Backward of fake quantisation with learned steps, of rows of memory, many tensors a launch; see
// learned_fake_quantize.cu.
#ifndef ADADFQ_CUDA_LEARNED_ROWS_H_
#define ADADFQ_CUDA_LEARNED_ROWS_H_

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "../common/division.h"
#include "../common/learned_tensor.h"
#include "launch.h"
#include "pack.h"
#include "quantize_rows.h"

namespace adadfq {
namespace cuda {

// `count` rows of `length` elements, one after the other, and the threads that share a row.
struct LearnedRows {
  const void* grad;
  const void* x;
  void* grad_x;
  const float* scale;
  const int32_t* zero_point;
  float* grad_scale;
  uint32_t count;
  uint32_t length : 17;
  uint32_t bits : 4;
  uint32_t log_threads : 4;
  uint32_t by_packs : 1;  // 16 bytes at a time

  uint32_t threads() const { return 1u << log_threads; }
  uint32_t rows_of_block() const { return kThreads / threads(); }
  uint32_t blocks() const { return (count + rows_of_block() - 1) / rows_of_block(); }
};

// Packs that a thread has in flight, of grad and of x each; they are summed in float.
constexpr uint32_t kLearnedLoads = 4;

// Sets how `rows` are read: a thread for every four packs, up to a block.
template <typename T>
void plan(LearnedRows& rows) {
  rows.by_packs = aligned(rows.grad, rows.x, rows.grad_x) && rows.length % kPackOf<T> == 0;
  const uint32_t units = rows.by_packs ? rows.length / kPackOf<T> : rows.length;
  rows.log_threads = 0;
  while (rows.threads() < 4 && rows.threads() < units) ++rows.log_threads;
  while (rows.threads() < kThreads && kLearnedLoads * rows.threads() < units) ++rows.log_threads;
}

// The sum over groups of `threads` neighbouring threads, a power of two, for the first of each. All
// threads of the block call it, once a launch.
__device__ __forceinline__ double sum_of_threads(double sum, unsigned threads) {
  __shared__ double of_warp[kThreads / kWarp];
  const unsigned lanes = threads < kWarp ? threads : kWarp;
  for (unsigned d = lanes / 2; d > 0; d /= 2)
    sum += __shfl_down_sync(kAllLanes, sum, d, static_cast<int>(lanes));
  if (threads <= kWarp) return sum;
  const unsigned warps = threads / kWarp, warp = threadIdx.x / kWarp;
  if (threadIdx.x % kWarp == 0) of_warp[warp] = sum;
  __syncthreads();
  if (threadIdx.x % threads == 0)
    for (unsigned other = 1; other < warps; ++other) sum += of_warp[warp + other];
  return sum;
}

// This thread's share of a row of `units` packs of n elements: grad_x written, terms summed.
template <typename T, int n>
__device__ __forceinline__ double learned_row(const T* grad, const T* x, T* grad_x, uint32_t units,
                                              uint32_t thread, uint32_t threads,
                                              const ChannelQuantizer& quantizer, CodeBounds codes) {
  double sum = 0.0;
  for (uint32_t unit = thread; unit < units; unit += kLearnedLoads * threads) {
    Pack<T, n> grads[kLearnedLoads], values[kLearnedLoads];
#pragma unroll
    for (uint32_t u = 0; u < kLearnedLoads; ++u) {
      if (unit + u * threads >= units) continue;
      grads[u] = load<n>(grad + (unit + u * threads) * n);
      values[u] = load<n>(x + (unit + u * threads) * n);
    }
    float part = 0.0f;
#pragma unroll
    for (uint32_t u = 0; u < kLearnedLoads; ++u) {
      if (unit + u * threads >= units) continue;
      Pack<T, n> out;
#pragma unroll
      for (int j = 0; j < n; ++j) {
        const LearnedStep step = learned_step(to_float(values[u].values[j]), quantizer, codes);
        out.values[j] = keep_if(step.inside, grads[u].values[j]);
        part += to_float(grads[u].values[j]) * step.slope;
      }
      store_global(grad_x + (unit + u * threads) * n, out);
    }
    sum += static_cast<double>(part);
  }
  return sum;
}

template <typename T, int kTensors>
__global__ void __launch_bounds__(kThreads, 3)
    learned_rows_kernel(const __grid_constant__ Table<kTensors, LearnedRows> table) {
  const int tensor = tensor_of(table, blockIdx.x);
  const LearnedRows& rows = table.tensors[tensor];
  const uint32_t log_threads = rows.log_threads, threads = 1u << log_threads;
  const uint32_t row =
      (blockIdx.x - table.first[tensor]) * (kThreads >> log_threads) + (threadIdx.x >> log_threads);
  const uint32_t thread = threadIdx.x & (threads - 1);
  const bool exists = row < rows.count;
  const uint32_t length = exists ? rows.length : 0;
  const int64_t begin = static_cast<int64_t>(row) * rows.length;
  const T* grad = static_cast<const T*>(rows.grad) + begin;
  const T* x = static_cast<const T*>(rows.x) + begin;
  T* grad_x = static_cast<T*>(rows.grad_x) + begin;
  const int32_t qmax = max_code(rows.bits), zero_point = exists ? rows.zero_point[row] : 0;
  const ChannelQuantizer quantizer =
      channel_quantizer(exists ? rows.scale[row] : 1.0f, zero_point, qmax, kToNeighbours);
  const CodeBounds codes = code_bounds(zero_point, qmax);
  double sum = 0.0;
  if (rows.by_packs) {
    constexpr int n = kPackOf<T>;
    sum = learned_row<T, n>(grad, x, grad_x, length / n, thread, threads, quantizer, codes);
  } else {
    sum = learned_row<T, 1>(grad, x, grad_x, length, thread, threads, quantizer, codes);
  }
  sum = sum_of_threads(sum, threads);
  if (exists && thread == 0) rows.grad_scale[row] = static_cast<float>(sum);
}

// Gathers tensors and launches them.
template <typename T>
class LearnedRowsQueue {
 public:
  explicit LearnedRowsQueue(cudaStream_t stream) : stream_(stream) {}

  // A tensor of layout.outer == 1 and layout.inner <= kLongestRow.
  cudaError_t add(const LearnedTensor& tensor) {
    LearnedRows rows{};
    rows.grad = tensor.grad;
    rows.x = tensor.x;
    rows.grad_x = tensor.grad_x;
    rows.scale = tensor.scale;
    rows.zero_point = tensor.zero_point;
    rows.grad_scale = tensor.grad_scale;
    rows.length = static_cast<uint32_t>(tensor.layout.inner);
    rows.bits = static_cast<uint32_t>(tensor.bits);
    plan<T>(rows);
    const int64_t elements = kMostRows * rows.length;
    for (int64_t count = tensor.layout.channels; count > 0; count -= kMostRows) {
      rows.count = static_cast<uint32_t>(std::min(count, kMostRows));
      if (tensors_ == kTensors || blocks_ + int64_t{rows.blocks()} > INT32_MAX)
        if (const cudaError_t error = flush(); error != cudaSuccess) return error;
      table_.first[tensors_] = static_cast<uint32_t>(blocks_);
      table_.tensors[tensors_++] = rows;
      blocks_ += rows.blocks();
      rows.grad = static_cast<const T*>(rows.grad) + elements;
      rows.x = static_cast<const T*>(rows.x) + elements;
      rows.grad_x = static_cast<T*>(rows.grad_x) + elements;
      rows.scale += kMostRows;
      rows.zero_point += kMostRows;
      rows.grad_scale += kMostRows;
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
  static constexpr int kFew = 4, kTensors = 64;
  static_assert(sizeof(Table<kTensors, LearnedRows>) <= 4096, "a kernel's parameters");

  template <int kSize>
  cudaError_t launch_first() {
    Table<kSize, LearnedRows> table;
    for (int i = 0; i < kSize; ++i) {
      table.first[i] = i < tensors_ ? table_.first[i] : kNoBlock;
      table.tensors[i] = table_.tensors[std::min(i, tensors_ - 1)];
    }
    return launch(learned_rows_kernel<T, kSize>, dim3(static_cast<unsigned>(blocks_)),
                  dim3(kThreads), stream_, table);
  }

  cudaStream_t stream_;
  Table<kTensors, LearnedRows> table_;
  int tensors_ = 0;
  int64_t blocks_ = 0;
};

}  // namespace cuda
}  // namespace adadfq

#endif  // ADADFQ_CUDA_LEARNED_ROWS_H_
