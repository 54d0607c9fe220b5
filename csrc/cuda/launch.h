// How kernels are launched, and what they all share.
#ifndef ADADFQ_CUDA_LAUNCH_H_
#define ADADFQ_CUDA_LAUNCH_H_

#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace adadfq {
namespace cuda {

// Threads of a block, and of a warp.
constexpr int kThreads = 256, kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// Up to so many elements positions are counted in 32 bits. Tests build with less.
#ifndef ADADFQ_LAST_32_BITS
#define ADADFQ_LAST_32_BITS INT32_MAX
#endif
constexpr int64_t kLast32Bits = ADADFQ_LAST_32_BITS;

// Multiprocessors of the current device.
inline int multiprocessors() {
  constexpr int kDevices = 64;
  static std::atomic<int> known[kDevices];  // asking takes longer than a launch
  int device = 0, count = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 1;
  if (device < kDevices && (count = known[device].load(std::memory_order_relaxed)) != 0)
    return count;
  if (cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess)
    return 1;
  if (device < kDevices) known[device].store(count, std::memory_order_relaxed);
  return count;
}

// Blocks of a persistent grid: enough for `blocks` of work, at most `each` a multiprocessor.
inline int64_t persistent_blocks(int64_t blocks, int each) {
  return std::max<int64_t>(1, std::min<int64_t>(blocks, int64_t{each} * multiprocessors()));
}

namespace detail {

template <typename... Parameters, typename... Arguments>
cudaError_t launch(bool cooperative, void (*kernel)(Parameters...), dim3 grid, dim3 block,
                   cudaStream_t stream, Arguments&&... arguments) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = cooperative ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
}

}  // namespace detail

// Queues `kernel`; never waits.
template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, cudaStream_t stream,
                   Arguments&&... arguments) {
  return detail::launch(false, kernel, grid, block, stream, arguments...);
}

// The same, with all blocks running at once, so that they may wait for each other.
template <typename... Parameters, typename... Arguments>
cudaError_t launch_cooperative(void (*kernel)(Parameters...), dim3 grid, dim3 block,
                               cudaStream_t stream, Arguments&&... arguments) {
  return detail::launch(true, kernel, grid, block, stream, arguments...);
}

}  // namespace cuda
}  // namespace adadfq

#endif  // ADADFQ_CUDA_LAUNCH_H_
