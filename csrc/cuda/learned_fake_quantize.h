// Fake quantisation of many tensors with given scales, and the backward of learned ones, on a CUDA
// device.
#ifndef ADADFQ_CUDA_LEARNED_FAKE_QUANTIZE_H_
#define ADADFQ_CUDA_LEARNED_FAKE_QUANTIZE_H_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../common/dtype.h"
#include "../common/dynamic_tensor.h"
#include "../common/learned_tensor.h"

namespace adadfq {
namespace cuda {

// `count` tensors of `dtype` in device memory, whose scales and zero points are read. tensors
// itself is host memory, read before the call returns. Queued on `stream` of the current device;
// never waits.
cudaError_t foreach_fake_quantize(const DynamicTensor* tensors, int64_t count, DType dtype,
                                  cudaStream_t stream);

// scratch: partial_doubles(channels) float64 numbers for the tensor of most channels; may be null
// where all have layout.outer == 1 and layout.inner <= kLongestRow (partials.h).
cudaError_t learned_fake_quantize_backward(const LearnedTensor* tensors, int64_t count,
                                           double* scratch, DType dtype, cudaStream_t stream);

}  // namespace cuda
}  // namespace adadfq

#endif  // ADADFQ_CUDA_LEARNED_FAKE_QUANTIZE_H_
