// Quantisation to k-bit codes packed into bytes, and back, on a CUDA device (the format is
// csrc/common/packing.h). Device memory; queued on `stream` of the current device, never waits.
#ifndef ADADFQ_CUDA_PACKING_H_
#define ADADFQ_CUDA_PACKING_H_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../common/dtype.h"
#include "../common/layout.h"

namespace adadfq {
namespace cuda {

// x: layout.elements() values of `dtype` in the order of the stream; scale, zero_point:
// layout.channels values; packed: packed_bytes(layout.elements(), bits) bytes.
cudaError_t quantize_pack(const void* x, const float* scale, const int32_t* zero_point,
                          uint8_t* packed, const Layout& layout, int bits, DType dtype,
                          cudaStream_t stream);

// The same buffers, from `packed` to `out`.
cudaError_t unpack_dequantize(const uint8_t* packed, const float* scale, const int32_t* zero_point,
                              void* out, const Layout& layout, int bits, DType dtype,
                              cudaStream_t stream);

}  // namespace cuda
}  // namespace adadfq

#endif  // ADADFQ_CUDA_PACKING_H_
