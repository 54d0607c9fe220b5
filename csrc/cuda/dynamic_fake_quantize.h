// Fake quantisation of every channel over its own minimum and maximum, on a CUDA device.
#ifndef ADADFQ_CUDA_DYNAMIC_FAKE_QUANTIZE_H_
#define ADADFQ_CUDA_DYNAMIC_FAKE_QUANTIZE_H_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../common/dtype.h"
#include "../common/dynamic_tensor.h"

namespace adadfq {
namespace cuda {

// `count` tensors of `dtype` in device memory: all the weights of a network in one call. tensors
// itself is host memory, read before the call returns. scratch: partial_doubles(channels) float64
// numbers for the tensor of most channels; may be null where all have layout.outer == 1 and
// layout.inner <= kLongestRow (partials.h). Queued on `stream` of the current device; never waits.
cudaError_t dynamic_fake_quantize(const DynamicTensor* tensors, int64_t count, double* scratch,
                                  DType dtype, cudaStream_t stream);

}  // namespace cuda
}  // namespace adadfq

#endif  // ADADFQ_CUDA_DYNAMIC_FAKE_QUANTIZE_H_
