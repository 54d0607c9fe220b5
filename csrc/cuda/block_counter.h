// Counters of ended blocks; last_block.h uses them.
#ifndef ADADFQ_CUDA_BLOCK_COUNTER_H_
#define ADADFQ_CUDA_BLOCK_COUNTER_H_

#include <cuda_runtime_api.h>

namespace adadfq {
namespace cuda {

// Where the blocks of a launch on `stream` count how many of them have ended: 0 before and after
// every launch. Launches that can run at the same time have different ones: those of different
// streams, and those of a graph being captured, which may be replayed anywhere.
cudaError_t block_counter(cudaStream_t stream, unsigned** counter);

// Has the counters loaded on the current device, which else the first use does.
cudaError_t load_block_counters();

}  // namespace cuda
}  // namespace adadfq

#endif  // ADADFQ_CUDA_BLOCK_COUNTER_H_
