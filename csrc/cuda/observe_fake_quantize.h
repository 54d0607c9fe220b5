// Fake quantisation over a moving range that the same call moves, on a CUDA device.
#ifndef ADADFQ_CUDA_OBSERVE_FAKE_QUANTIZE_H_
#define ADADFQ_CUDA_OBSERVE_FAKE_QUANTIZE_H_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../common/dtype.h"
#include "../common/range_update.h"

namespace adadfq {
namespace cuda {

// Device memory. x, out: n values of `dtype`, n >= 1, may be the same memory; `state` is updated.
// scratch: partial_doubles(1) float64 numbers. Queued on `stream` of the current device; never
// waits.
cudaError_t observe_fake_quantize(const void* x, void* out, int64_t n, const RangeState& state,
                                  double* scratch, int bits, double momentum, DType dtype,
                                  cudaStream_t stream);

}  // namespace cuda
}  // namespace adadfq

#endif  // ADADFQ_CUDA_OBSERVE_FAKE_QUANTIZE_H_
