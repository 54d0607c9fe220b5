// Sums in two stages and one launch: blocks write partial results, and the block that ends last
// combines them, in an order that does not depend on which one that is.
#ifndef ADADFQ_CUDA_LAST_BLOCK_H_
#define ADADFQ_CUDA_LAST_BLOCK_H_

#include <cuda_runtime.h>

#include "block_counter.h"

namespace adadfq {
namespace cuda {

// Whether this block is the last of the grid, which has one dimension; then it sees what all others
// wrote before. All threads of the block call it, once a launch. Read the others' results with
// load_shared_result().
__device__ __forceinline__ bool is_last_block(unsigned* counter) {
  __shared__ bool is_last;
  // One thread's fences are enough: what the barriers order comes before and after them for all.
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    is_last = atomicInc(counter, gridDim.x - 1) == gridDim.x - 1;  // goes back to 0
    if (is_last) __threadfence();
  }
  __syncthreads();
  return is_last;
}

// Not from the first-level cache, which does not know of other multiprocessors' writes.
template <typename T>
__device__ __forceinline__ T load_shared_result(const T* address) {
  return __ldcg(address);
}

}  // namespace cuda
}  // namespace adadfq

#endif  // ADADFQ_CUDA_LAST_BLOCK_H_
