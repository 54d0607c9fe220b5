// Least and greatest value over the threads of a warp and of a block.
#ifndef ADADFQ_CUDA_REDUCE_ENDS_H_
#define ADADFQ_CUDA_REDUCE_ENDS_H_

#include "../common/ends.h"
#include "launch.h"
#include "pack.h"

namespace adadfq {
namespace cuda {

template <typename T, int n>
__device__ __forceinline__ void widen(Ends& ends, const Pack<T, n>& pack) {
#pragma unroll
  for (int j = 0; j < n; ++j) ends.widen(to_float(pack.values[j]));
}

// Over groups of `lanes` neighbouring lanes, a power of two up to a warp; for each of them.
__device__ __forceinline__ Ends warp_ends(Ends ends, int lanes = kWarp) {
  for (int distance = lanes / 2; distance > 0; distance /= 2)
    ends.join({__shfl_xor_sync(kAllLanes, ends.lo, distance),
               __shfl_xor_sync(kAllLanes, ends.hi, distance)});
  return ends;
}

// Over groups of `threads` neighbouring threads of a block, a power of two of warps; for each of
// them. All threads of the block call it; between two calls they must meet at a barrier.
__device__ __forceinline__ Ends block_ends(Ends ends, unsigned threads = blockDim.x) {
  __shared__ Ends of_warp[kThreads / kWarp];
  const unsigned warps = threads / kWarp, warp = threadIdx.x / kWarp;
  ends = warp_ends(ends);
  if (threadIdx.x % kWarp == 0) of_warp[warp] = ends;
  __syncthreads();
  const unsigned first = warp & ~(warps - 1);
  return warp_ends(of_warp[first + (threadIdx.x & (warps - 1))], static_cast<int>(warps));
}

}  // namespace cuda
}  // namespace adadfq

#endif  // ADADFQ_CUDA_REDUCE_ENDS_H_
