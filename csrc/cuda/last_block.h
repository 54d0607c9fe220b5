// Sums in two stages and one launch: blocks write partial results, and the block that ends last
// combines them, in an order that does not depend on which one that is.
#ifndef ADADFQ_CUDA_LAST_BLOCK_H_
#define ADADFQ_CUDA_LAST_BLOCK_H_

#include <cuda_runtime.h>

namespace adadfq {
namespace cuda {

// Where the blocks of a launch on `stream` count how many of them have ended: 0 before and after
// every launch. Launches that can run at the same time have different ones: those of different
// streams, and those of a graph being captured, which may be replayed anywhere.
cudaError_t block_counter(cudaStream_t stream, unsigned** counter);

// Whether this block is the last of the grid; then it sees what all others wrote before. All
// threads of the block call it, once a launch. Read the others' results with load_shared_result().
__device__ __forceinline__ bool is_last_block(unsigned* counter) {
  __shared__ bool is_last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0 && threadIdx.y == 0) {
    const unsigned blocks = gridDim.x * gridDim.y * gridDim.z;
    is_last = atomicInc(counter, blocks - 1) == blocks - 1;  // goes back to 0
  }
  __syncthreads();
  if (is_last) __threadfence();
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
