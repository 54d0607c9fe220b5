// Fake quantisation on a CUDA device, and its clipped straight-through backward.
#ifndef ADADFQ_CUDA_FAKE_QUANTIZE_H_
#define ADADFQ_CUDA_FAKE_QUANTIZE_H_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../common/dtype.h"
#include "../common/layout.h"

namespace adadfq {
namespace cuda {

// Device memory. x, out: layout.elements() values of `dtype`; scale, zero_point: layout.channels
// values. Queued on `stream` of the current device; never waits.
cudaError_t fake_quantize(const void* x, const float* scale, const int32_t* zero_point, void* out,
                          const Layout& layout, int bits, DType dtype, cudaStream_t stream);

// grad, x, out: layout.elements() values of `dtype`.
cudaError_t fake_quantize_backward(const void* grad, const void* x, const float* scale,
                                   const int32_t* zero_point, void* out, const Layout& layout,
                                   int bits, DType dtype, cudaStream_t stream);

}  // namespace cuda
}  // namespace adadfq

#endif  // ADADFQ_CUDA_FAKE_QUANTIZE_H_
