// Quantisation to k-bit codes packed into bytes, and back (the format is csrc/common/packing.h).
#ifndef ADADFQ_CPU_PACKING_H_
#define ADADFQ_CPU_PACKING_H_

#include <cstdint>

#include "../common/dtype.h"
#include "channelwise.h"

namespace adadfq {

// x: layout.elements() values of `dtype` in the order of the stream; scale, zero_point:
// layout.channels values; packed: packed_bytes(layout.elements(), bits) bytes.
void quantize_pack(const void* x, const float* scale, const int32_t* zero_point, uint8_t* packed,
                   const Layout& layout, int bits, DType dtype, int threads);

// The same buffers, from `packed` to `out`.
void unpack_dequantize(const uint8_t* packed, const float* scale, const int32_t* zero_point,
                       void* out, const Layout& layout, int bits, DType dtype, int threads);

}  // namespace adadfq

#endif  // ADADFQ_CPU_PACKING_H_
