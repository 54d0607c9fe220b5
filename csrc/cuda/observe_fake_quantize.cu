// The range of an activation: a debiased moving average of batch minima and maxima, and fake
// quantisation over it.
//
//   lo, hi = min x, max x;  running += rate (end - running) for both;  scale, zero_point = qparams
//   x_hat  = fake_quantize(x, scale, zero_point)
//
// The update's arithmetic is csrc/common/range_update.h; build with --fmad=false.
// Two launches: the range, which the block that ends last moves, and csrc/cuda/fake_quantize.cu.
// Bytes an element, float32: 12, of which up to 4 from the cache; 16-bit types half of that. The
// first launch goes through x backwards, so that where x does not fit the cache, the second begins
// with what is still there.
//
// Test: ADADFQ_TEST_EMULATED_CUDA=1 python -m pytest tests/test_cuda_kernels.py -k observe
//
// On a GPU: python -m pytest -m gpu tests
//
// Time: python -m benchmarks ops --device cuda --suite gpu --ops observe_fake_quantize
//
// Alone: nvcc -std=c++17 -O3 --fmad=false -c csrc/cuda/observe_fake_quantize.cu
#include "observe_fake_quantize.h"

#include "dispatch_dtype.h"
#include "fake_quantize.h"
#include "last_block.h"
#include "launch.h"
#include "pack.h"
#include "partials.h"
#include "reduce_ends.h"

namespace adadfq {
namespace cuda {
namespace {

// Packs that a thread has on their way, and blocks that a multiprocessor holds.
constexpr int kLoads = 4, kBlocksEach = 4;

// x as elements up to a multiple of 16 bytes, packs, and the elements that are left.
struct Parts {
  int64_t head;
  int64_t packs;
  int64_t n;
};

template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocksEach)
    update_range_kernel(const T* x, const Parts parts, const RangeState state, Ends* block_results,
                        unsigned* counter, const Momentum momentum, int bits) {
  constexpr int n = kPackOf<T>;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  Ends ends = no_ends();

  // A thread takes one element at most of either end: the first block has more threads.
  const int64_t tail = parts.head + parts.packs * n + first;
  if (first < parts.head) ends.widen(to_float(x[first]));
  if (tail < parts.n) ends.widen(to_float(x[tail]));

  const T* last = x + parts.head + (parts.packs - 1) * n;
  for (int64_t pack = first; pack < parts.packs; pack += kLoads * step) {
    Pack<T, n> in[kLoads];
#pragma unroll
    for (int u = 0; u < kLoads; ++u)
      if (pack + u * step < parts.packs) in[u] = load<n>(last - (pack + u * step) * n);
#pragma unroll
    for (int u = 0; u < kLoads; ++u)
      if (pack + u * step < parts.packs) widen(ends, in[u]);
  }

  ends = block_ends(ends);
  if (threadIdx.x == 0) block_results[blockIdx.x] = ends;
  if (!is_last_block(counter)) return;
  ends = no_ends();
  for (unsigned block = threadIdx.x; block < gridDim.x; block += kThreads)
    ends.join({load_shared_result(&block_results[block].lo),
               load_shared_result(&block_results[block].hi)});
  // Before the block waits: the state is on its way while it does.
  RangeUpdate update{};
  if (threadIdx.x == 0) update = next_update(state, momentum);
  ends = block_ends(ends);
  if (threadIdx.x == 0) finish_update(state, update, ends, bits);
}

}  // namespace

cudaError_t observe_fake_quantize(const void* x, void* out, int64_t n, const RangeState& state,
                                  double* scratch, int bits, double momentum, DType dtype,
                                  cudaStream_t stream) {
  unsigned* counter = nullptr;
  if (const cudaError_t error = block_counter(stream, &counter); error != cudaSuccess) return error;
  const cudaError_t error = dispatch_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    const uintptr_t beyond = reinterpret_cast<uintptr_t>(x) % kPackBytes;
    const int64_t to_boundary = (kPackBytes - beyond) % kPackBytes / sizeof(T);
    const int64_t head = std::min<int64_t>(to_boundary, n), packs = (n - head) / kPackOf<T>;
    const int64_t blocks =
        std::min(kMostPartials, persistent_blocks((packs + kThreads - 1) / kThreads, kBlocksEach));
    return launch(update_range_kernel<T>, dim3(static_cast<unsigned>(blocks)), dim3(kThreads),
                  stream, static_cast<const T*>(x), Parts{head, packs, n}, state,
                  reinterpret_cast<Ends*>(scratch), counter, momentum_of(momentum), bits);
  });
  if (error != cudaSuccess) return error;
  return fake_quantize(x, state.scale, state.zero_point, out, Layout{1, 1, n}, bits, dtype, stream);
}

}  // namespace cuda
}  // namespace adadfq
