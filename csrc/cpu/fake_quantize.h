// Fake quantisation with given scales and zero points, and its clipped straight-through backward.
#ifndef ADADFQ_CPU_FAKE_QUANTIZE_H_
#define ADADFQ_CPU_FAKE_QUANTIZE_H_

#include <cstdint>

#include "../common/dtype.h"
#include "../common/dynamic_tensor.h"
#include "channelwise.h"

namespace adadfq {

// x, out: layout.elements() values of `dtype`, may be the same memory; scale, zero_point:
// layout.channels values.
void fake_quantize(const void* x, const float* scale, const int32_t* zero_point, void* out,
                   const Layout& layout, int bits, DType dtype, int threads);

// `count` tensors of `dtype` with given scales and zero points; they are read, not written.
void foreach_fake_quantize(const DynamicTensor* tensors, int64_t count, DType dtype, int threads);

// grad, x, out: layout.elements() values of `dtype`.
void fake_quantize_backward(const void* grad, const void* x, const float* scale,
                            const int32_t* zero_point, void* out, const Layout& layout, int bits,
                            DType dtype, int threads);

}  // namespace adadfq

#endif  // ADADFQ_CPU_FAKE_QUANTIZE_H_
